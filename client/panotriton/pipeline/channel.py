"""How a tritonserver is asked over gRPC, and what its silence and its words mean.

For clients, and for servers that ask another one.
"""

from __future__ import annotations

import re

__all__ = [
    "DEATHS",
    "MAX_PORT",
    "NEVER_SENT",
    "REFUSES_SINCE",
    "SILENT_S",
    "WATCH_EVERY_S",
    "channel",
    "in_trouble",
    "is_local",
    "release",
]

WATCH_EVERY_S = 10.0
"""How long an answer is waited for before the server is asked whether it lives, again and again."""
SILENT_S = 20.0
"""How long it may take to say so, before the request is given up."""
DEATHS = 2
"""A request with which so many servers went may be why."""
REFUSES_SINCE = (2, 50)
"""An older server ends when it is asked to let go of memory that a request still uses; this one refuses."""
MAX_PORT = 65535
NEVER_SENT = "failed to connect"
"""gRPC's own words for it."""

# Of a model whose process is dead, and of models that are unloaded, because it stops or loads them anew.
_TROUBLE = re.compile(
    r"Stub process .*is not healthy|Server (?:is stopping|exiting|not ready)|has no available versions"
    r"|Model '.*' is not ready"
)

# Messages of any size; and a server that was away is looked for every second, not, as by default, after
# up to two minutes: our own retries would find the channel asleep. Pings find a network that swallows
# everything. Only beside calls, and two without data in between: a server that is not told to
# expect more closes the connection on whoever sends them. The rest is for whoever waits: to ask
# whether it is live.
_CHANNEL: list[tuple[str, int]] = [
    # Channels to one server would share a connection, its streams and its buffers.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Where a server's error is longer than the usual 8 KB, gRPC says that it has no resources left.
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Not a pause, for all its name: how long one try to connect may take, TLS and a far server's settings
    # included. A busy server accepts late; one that refuses still says so at once.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 2),
]


def is_local(host: str) -> bool:
    """Whether only this machine's processes reach that address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def channel(url: str, *, direct: bool = False) -> list[tuple[str, int]]:
    """Options of a gRPC channel to host:port.

    direct: past any proxy that the environment names, as is every server of this machine.
    """
    is_direct = direct or is_local(url.rpartition(":")[0].strip("[]"))
    return [*_CHANNEL, ("grpc.enable_http_proxy", 0)] if is_direct else _CHANNEL


def release(version: str) -> tuple[int, int]:
    """Of a server that calls itself 2.51.0: (2, 51). (0, 0) for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def in_trouble(message: str) -> bool:
    """Whether the server's words tell of itself, not of the request, whatever their status."""
    return _TROUBLE.search(message) is not None
