"""Write API.md from the docstrings and signatures of the package's public names.

python docs/api.py            rewrite it
python docs/api.py --check    exit 1 where it is stale
"""

import argparse
import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import panotriton
from panotriton import events
from panotriton.client.shared_memory import Pool

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "API.md"

INTRO = """\
# API

Everything here is imported from `panotriton`, the events of a stream from `panotriton.events`; what is not
here is private. `panotriton.__version__` is the
installed version, which `panotriton --version` prints too. `AsyncClient` has the methods of
`Client`, awaited; it is listed for its own docstring alone. This page is written by `make docs` from the
docstrings and `make check` fails when it is stale. For the models' own tensors see
[ARCHITECTURE.md](ARCHITECTURE.md), for `via` [TRANSPORT.md](TRANSPORT.md).

"""


def cleaned(signature):
    """Without the modules' names in front of the types, and without quotes around them."""
    text = re.sub(r"""(: |-> )(["'])(.*?)\2(?=[,) ]|$)""", r"\1\3", str(signature))
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
    return re.sub(r"\(self(?:, )?", "(", text)


def signature(value):
    """How it is called."""
    try:
        return cleaned(inspect.signature(value))
    except (TypeError, ValueError):
        return "()"


def paragraphs(value):
    """The docstring."""
    return (inspect.getdoc(value) or "").strip()


def members(kind):
    """Public methods and properties that the class or its bases in this package define."""
    for name, value in inspect.getmembers(kind):
        documented = inspect.getdoc(value) and not name.startswith("_")
        if documented and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, value


def class_text(name, kind):
    """A class: what it holds or takes, and its methods."""
    lines = [f"## {name}", ""]
    if is_dataclass(kind):
        lines += [", ".join(f"`{field.name}: {cleaned(field.type)}`" for field in fields(kind)), ""]
    elif not issubclass(kind, (Exception, Pool)):  # pools are made by shared_memory()
        lines += [f"```python\n{name}{signature(kind)}\n```", ""]
    lines += [paragraphs(kind), ""]
    if name == "AsyncClient":
        return lines
    for member, value in members(kind):
        if isinstance(value, property):
            lines += [f"**`.{member}`**: {paragraphs(value)}", ""]
        else:
            lines += [f"### {name}.{member}", "", f"```python\n{member}{signature(value)}\n```", ""]
            lines += [paragraphs(value), ""]
    return lines


def page():
    """The whole page."""
    lines = []
    for name in panotriton.__all__:
        value = getattr(panotriton, name)
        if inspect.isclass(value):
            lines += class_text(name, value)
        elif inspect.isfunction(value):
            lines += [f"## {name}", "", f"```python\n{name}{signature(value)}\n```", ""]
            lines += [paragraphs(value), ""]
    lines += ["# panotriton.events", "", paragraphs(events), ""]
    for name in events.__all__:
        if inspect.isclass(getattr(events, name)):
            lines += class_text(name, getattr(events, name))
    return INTRO + "\n".join(lines).rstrip() + "\n"


def main():
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE.relative_to(ROOT)} is stale: run `make docs`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
