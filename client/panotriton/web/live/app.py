"""The live page as a FastAPI app: one page, and one request per run whose response is its events."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from panotriton import __version__
from panotriton.errors import InvalidInput, PanotritonError
from panotriton.groups.report.document import TEMPLATES, render, template
from panotriton.groups.report.page import SLIDER
from panotriton.pipeline.camera import interval_bounds
from panotriton.pipeline.contract import DEFAULTS, INTERVALS, MAX_INTERPOLATIONS
from panotriton.pipeline.images import SUFFIXES
from panotriton.web.bodies import Paced
from panotriton.web.live.runs import Runs
from panotriton.web.live.settings import Settings

__all__ = ["Settings", "create_app"]

_HERE = Path(__file__).parent / "templates"
# The panoramas are shown from the visitor's own disk, the rest comes inside the events.
_SOURCES = "img-src data: blob:; connect-src 'self'"
_HEADERS = {"X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff"}


def create_app(settings: Settings) -> FastAPI:
    """Requests name no file: what a visitor sends is held in memory and gone with the run."""
    state: dict[str, Runs] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Runs(settings) as state["runs"]:
            yield

    app = FastAPI(title="panotriton live", lifespan=lifespan, docs_url=None, redoc_url=None)
    _answer_failures(app)
    app.add_middleware(Paced)
    if hosts := _hosts(settings.host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    page = _page(settings)

    @app.get("/")
    async def show() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers=_HEADERS | {"Cache-Control": "no-store"})

    @app.post("/runs")
    async def run(
        request: Request,
        first_bytes: Annotated[int, Query(description="length of the first file")],
        seed: int = 0,
        threshold: float = DEFAULTS.threshold,
        interpolations: int = DEFAULTS.interpolations,
    ) -> Response:
        """Two files, one after the other, to the pipeline's events; ending the request cancels."""
        options = {"seed": seed, "threshold": threshold, "interpolations": interpolations}
        return await state["runs"].start(request, first_bytes, **options)

    return app


def _page(settings: Settings) -> str:
    return render(
        "live.html",
        scripts=(
            SLIDER / "index.js",
            template("slider.js"),
            template("player.js"),
            _HERE / "live.js",
        ),
        styles=(SLIDER / "styles.css", template("page.css"), _HERE / "live.css"),
        sources=_SOURCES,
        folders=(_HERE, TEMPLATES),
        version=__version__,
        defaults=DEFAULTS,
        max_interpolations=MAX_INTERPOLATIONS,
        max_bytes=settings.max_upload_bytes,
        suffixes=",".join(SUFFIXES),
        intervals=[(number, interval_bounds(number)) for number in range(1, INTERVALS + 1)],
    )


def _hosts(host: str) -> list[str]:
    """Names by which the page may be asked for; none where it listens on every address.

    A foreign site whose name is made to point here is refused by its name.
    """
    if host in ("0.0.0.0", "::"):  # noqa: S104 -- compared, not listened on
        return []
    return ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]


def _answer_failures(app: FastAPI) -> None:
    """Every failure is {"error": message}."""

    async def ours(request: Request, error: Any) -> JSONResponse:
        status = 400 if isinstance(error, InvalidInput) else 503
        return JSONResponse({"error": str(error)}, status)

    async def http(request: Request, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)

    async def malformed(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}"}, 400)

    app.exception_handler(PanotritonError)(ours)
    app.exception_handler(HTTPException)(http)
    app.exception_handler(RequestValidationError)(malformed)
