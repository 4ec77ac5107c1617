"""HTML documents: templates filled with every value escaped, styles and scripts inside."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from panotriton.errors import InvalidInput
from panotriton.groups.report.footprint import footprint, interval_x
from panotriton.groups.report.verdict import verdict
from panotriton.pipeline.scratch import atomic

__all__ = ["OFFLINE", "TEMPLATES", "degrees", "render", "save", "template"]

TEMPLATES = Path(__file__).parent / "templates"
OFFLINE = "img-src data:"
"""What a page may load that asks the network for nothing, in the words of a content security policy."""


def render(
    page: str,
    scripts: tuple[Path, ...],
    styles: tuple[Path, ...],
    sources: str = OFFLINE,
    folders: tuple[Path, ...] = (TEMPLATES,),
    **context: Any,
) -> str:
    """Fill a template of `folders`. Every value is escaped; only our own scripts may run, by their hashes.

    sources: directives of what else the page may load.
    """
    bodies = [_script(path) for path in scripts]
    hashes = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score, "degrees": degrees, "bound": _bound, "brief": _brief}
    environment.globals |= {"verdict": verdict, "footprint": footprint, "interval_x": interval_x}
    return environment.get_template(page).render(
        policy=f"default-src 'none'; {sources}; style-src 'unsafe-inline'; "
        f"script-src {allowed}; base-uri 'none'; form-action 'none'",
        scripts=[Markup(body) for body in bodies],  # noqa: S704 -- files of this package
        styles=[Markup(path.read_text(encoding="utf-8")) for path in styles],  # noqa: S704
        **context,
    )


def _script(path: Path) -> str:
    """A script's text under its licence, where it has one beside it.

    Without the link to its source map, which a browser's tools would ask the network for.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL"))
    licence = path.with_name("LICENSE")
    if not licence.is_file():
        return text
    return f"/*\n{path.parent.name}\n{licence.read_text(encoding='utf-8')}*/\n{text}"


def template(name: str) -> Path:
    """A file of the templates folder."""
    return TEMPLATES / name


def _score(value: float | None) -> str:
    return "no score" if value is None else f"{value:.2f}"


def degrees(value: float) -> str:
    """With one decimal and a real minus sign."""
    return f"{value:.1f}°".replace("-", "−")


def _bound(value: float) -> str:
    return f"{value:.0f}°".replace("-", "−")


def _brief(identity: str) -> str:
    """The first eight digits of a checksum; anything else whole."""
    return identity[:15] if identity.startswith("sha256:") else identity


def save(page: str, path: Path) -> Path:
    """Replace `path` by the page.

    Raises InvalidInput where there is no folder to write to.
    """
    if not path.parent.is_dir():
        raise InvalidInput(
            f"{path.parent} is not a folder; expected one for {path.name}: create it first"
        )
    with atomic(path) as part:
        part.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path
