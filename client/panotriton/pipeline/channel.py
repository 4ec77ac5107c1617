"""How a gRPC channel to a tritonserver is set, for clients and for servers that ask another one."""

from __future__ import annotations

__all__ = ["GRPC_CHANNEL"]

# Messages of any size; and a server that was away is looked for every second, not, as by default, after
# up to two minutes: our own retries would find the channel asleep. Pings find a network that swallows
# everything. Only beside calls, and two without data in between: a server that is not told to
# expect more closes the connection on whoever sends them. The rest is for whoever waits: to ask
# whether it is live.
GRPC_CHANNEL: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Where a server's error is longer than the usual 8 KB, gRPC says that it has no resources left.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
]
