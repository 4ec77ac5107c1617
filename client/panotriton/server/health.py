"""Health and counts of a supervised server over HTTP: /live, /ready and /metrics, for probes and Prometheus.

ready: a new request would be answered. Triton's own /v2/health/ready knows neither that a model's process is
gone nor that one is being replaced. live: restarting this process would not help; while tritonserver itself
is being started again it stays true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from panotriton.server.supervise import Supervisor

__all__ = ["answer_probes"]


@contextlib.contextmanager
def answer_probes(supervisor: Supervisor, host: str, port: int) -> Iterator[int]:
    """Answer at host:port (0: a free one) while the block runs; gives the port. Raises OSError."""

    class Probes(_Probes):
        watched = supervisor

    with ThreadingHTTPServer((host, port), Probes) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


class _Probes(BaseHTTPRequestHandler):
    watched: Supervisor
    timeout = 10  # of a caller that says nothing

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self._answer(200, _metrics(self.watched))
        elif self.path in ("/live", "/ready"):
            good = self.watched.live() if self.path == "/live" else self.watched.ready()
            self._answer(200 if good else 503, f"{self.watched.health.state}\n")
        else:
            self._answer(404, "expected /live, /ready or /metrics\n")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Probes come every few seconds and say nothing."""


def _metrics(supervisor: Supervisor) -> str:
    health = supervisor.health
    lines = [
        "# HELP panotriton_ready Whether a new request would be answered",
        "# TYPE panotriton_ready gauge",
        f"panotriton_ready {int(supervisor.ready())}",
        "# HELP panotriton_model_reloads_total Models loaded anew because a process of theirs died",
        "# TYPE panotriton_model_reloads_total counter",
        *(f'panotriton_model_reloads_total{{model="{m}"}} {n}' for m, n in health.reloads.items()),
        "# HELP panotriton_server_restarts_total Starts of tritonserver after the first, by what failed",
        "# TYPE panotriton_server_restarts_total counter",
        *(
            f'panotriton_server_restarts_total{{failed="{what}"}} {n}'
            for what, n in health.restarts.items()
        ),
    ]
    return "\n".join(lines) + "\n"
