"""The three services as FastAPI apps that share one set of connections, locks and roots."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial

from fastapi import APIRouter, FastAPI, Response

from panotriton import __version__
from panotriton.client.client import Client
from panotriton.errors import ConnectError, InvalidInput
from panotriton.web.gateway import interpolate, preprocess, quality, super_resolution
from panotriton.web.gateway.connections import Connection, PatientConnection, SharedConnection
from panotriton.web.gateway.context import Context, Settings
from panotriton.web.gateway.docs import FAILURES
from panotriton.web.gateway.failures import Reply, answer_failures, retry_later
from panotriton.web.gateway.groups import groups_home
from panotriton.web.gateway.limits import BodyBudget, BodyLimit
from panotriton.web.gateway.paths import Roots
from panotriton.web.gateway.schemas import Health
from panotriton.web.gateway.workers import Workers

__all__ = ["SERVICES", "Settings", "create_apps"]

_LOG = logging.getLogger(__name__)
# Service → its routers and its port by custom.
SERVICES = {"preprocess": 5000, "osediff": 5001, "quality": 5002}
_ROUTERS: dict[str, tuple[Callable[[Context], APIRouter], ...]] = {
    "preprocess": (preprocess.router, interpolate.router),
    "osediff": (super_resolution.router,),
    "quality": (quality.router,),
}
_MAX_BODIES_BYTES = 128 << 20  # what is read and worked on; its tensors and JSON take as much again
_MAX_SHARED_BYTES = 4 << 30  # a thread's; made as requests need it
_WATCH_TIMEOUT_S = 0.8  # of a question to the server, so that /health can answer within a second
_ABOUT = """\
Endpoints that take paths open files below the gateway's roots only. Those that end in `_tensor` do the \
same work on tensors. Images are RGB. Every failure is `{"error": "…"}`.
"""


@contextlib.contextmanager
def create_apps(
    settings: Settings, connect: Callable[[], Connection] | None = None
) -> Iterator[dict[str, FastAPI]]:
    """The apps by service name, usable inside the block. `connect` makes the clients, one per thread.

    Makes the output folder. Raises InvalidInput where it cannot, or a root does not exist.
    """
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"output {settings.output} cannot be made: {error.strerror}") from error
    wait = partial(PatientConnection, wait_s=settings.wait_s)
    watch = connect or (lambda: Client(settings.url, timeout_s=_WATCH_TIMEOUT_S))
    work = connect or (lambda: _connect(settings))
    home = groups_home(settings.output)
    roots = Roots(settings.roots, settings.output, home)
    _LOG.info("groups lie in %s; group g draws from seed %d + g", home, settings.first_seed())
    with Workers(lambda: wait(work()), watch, settings.threads, settings.max_waiting) as workers:
        context = Context(settings, roots, workers)
        bodies = BodyBudget(_MAX_BODIES_BYTES)
        yield {name: _create_app(name, context, bodies) for name in SERVICES}


def _connect(settings: Settings) -> Connection:
    client = Client(settings.url, timeout_s=settings.timeout_s)
    return SharedConnection(client, _MAX_SHARED_BYTES) if settings.shared_memory else client


def _create_app(service: str, context: Context, bodies: BodyBudget) -> FastAPI:
    app = FastAPI(
        title=f"panotriton gateway: {service}",
        description=_ABOUT,
        version=__version__,
        default_response_class=Reply,
    )
    answer_failures(app)
    app.add_middleware(BodyLimit, max_bytes=_body_limit(context.settings), budget=bodies)
    for make_router in _ROUTERS[service]:
        app.include_router(make_router(context))
    app.include_router(_health(service, context))
    return app


def _body_limit(settings: Settings) -> Callable[[str], int]:
    def limit(path: str) -> int:
        tensor = path.endswith("_tensor")
        return settings.max_body_bytes if tensor else settings.max_path_body_bytes

    return limit


def _health(service: str, context: Context) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health", response_model=Health, responses={503: FAILURES[503]})
    async def health() -> Response:
        """Whether the Triton server behind is ready; answered within a second, come what may."""
        try:
            await context.check_health()
        except ConnectError as error:
            content = {"status": "unhealthy", "service": service, "error": str(error)}
            return Reply(content, 503, retry_later(503))
        return Reply({"status": "healthy", "service": service})

    return routes
