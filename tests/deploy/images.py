"""Dockerfiles as instructions, and the rules that a general linter does not know."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ROOT_USERS = ("", "0", "root", "0:0", "root:root")


@dataclass
class Stage:
    """One FROM and what follows it; `base` is an image or another stage's name."""

    base: str
    name: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all_of(self, keyword: str) -> list[str]:
        return [text for word, text in self.instructions if word == keyword]


def stages(dockerfile: Path) -> dict[str, Stage]:
    """The stages by name, in order; a backslash joins lines, comments are dropped."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found: dict[str, Stage] = {}
    current = Stage("", "")
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            current = Stage(base, name or str(len(found)))
            found[current.name] = current
        else:
            current.instructions.append((keyword, rest))
    return found


def effective(found: dict[str, Stage], name: str, keyword: str) -> str:
    """The last such instruction of a stage or of those that it is built on; empty where there is none."""
    while name in found:
        if own := found[name].all_of(keyword):
            return own[-1]
        name = found[name].base
    return ""


def problems(dockerfile: Path, targets: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the images that are run."""
    found = stages(dockerfile)
    for stage in found.values():
        if (
            stage.base not in found
            and not re.search(r":.|@sha256:", stage.base)
            and "$" not in stage.base
        ):
            yield f"{stage.name} is built on {stage.base}, which has no tag"
    for target in targets:
        if effective(found, target, "USER") in _ROOT_USERS:
            yield f"{target} runs as root"
        if not effective(found, target, "HEALTHCHECK"):
            yield f"{target} has no HEALTHCHECK"
        entrypoint = effective(found, target, "ENTRYPOINT")
        if not entrypoint.startswith("["):
            yield f"{target}: a shell before the entrypoint would keep SIGTERM from it: {entrypoint!r}"
        elif json.loads(entrypoint) != ["entrypoint.sh"]:
            yield f"{target} starts {entrypoint}, expected the hardened entrypoint.sh"


def copied(stage: Stage) -> list[str]:
    """What a stage's COPY lines take from the build context."""
    sources = []
    for text in stage.all_of("COPY"):
        words = [word for word in shlex.split(text) if not word.startswith("--chmod")]
        if not any(word.startswith("--from") for word in words):
            sources += words[:-1]
    return sources


def lint(tool: str, *files: Path) -> str:
    """What hadolint or shellcheck says about files; empty where it is content."""
    command = [str(Path(sys.executable).with_name(tool)), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr
