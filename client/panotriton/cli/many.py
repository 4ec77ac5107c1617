"""Work on many images, some at a time: each result goes out as it comes, and one failure loses no other."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.text import Text

from panotriton.cli.connection import (
    address,
    client_options,
    console_for,
    exit_code,
    spinner,
    warn,
    without_nan,
)
from panotriton.cli.words import one_line
from panotriton.client.aio import AsyncClient
from panotriton.errors import (
    InferenceFailed,
    InvalidInput,
    PanotritonError,
    RequestTimeout,
    ServerBusy,
    brief,
)

__all__ = ["Results", "ask_each"]

Ask = Callable[[AsyncClient, Path], Awaitable[Any]]
# What concerns one image; anything else, as a server that is gone, ends the command.
_OF_ONE = (InferenceFailed, InvalidInput, RequestTimeout, ServerBusy)


class Results:
    """Prints results: lines, or with --json one array, item by item. `code` is what the command ends with.

    head: printed before the first line. `failed` says on stderr what went wrong with one image, and adds it
    to the array.
    """

    def __init__(self, options: argparse.Namespace, head: Text | None = None) -> None:
        self.console = console_for(options)
        self.code = 0
        self._json: bool = options.json
        self._items = 0
        self._warned = False
        self._head = head

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._json and (self._items or error is None):
            print("]" if self._items else "[]", flush=True)

    def add(self, line: str, item: dict[str, Any]) -> None:
        if self._head is not None:
            self.console.print(self._head, soft_wrap=True)
            self._head = None
        self.console.print(line, soft_wrap=True)
        self._add(item)

    def warn(self, text: str) -> None:
        """Warn of what the images have in common: the first time only."""
        if not self._warned:
            warn(text)
        self._warned = self._warned or bool(text)

    def failed(self, path: Path, error: PanotritonError) -> None:
        words = str(error)
        named = words.startswith(brief(path)) or f" {brief(path)}" in words or f" {path}" in words
        line = one_line(words if named else f"{brief(path)}: {words}")
        print(f"panotriton: {line}", file=sys.stderr, flush=True)
        self._add({"image": str(path), "error": words})
        self.code = self.code or exit_code(error)

    def _add(self, item: dict[str, Any]) -> None:
        if self._json:
            text = json.dumps(without_nan(item))
            print(f"{', ' if self._items else '['}{text}", end="", flush=True)
        self._items += 1


def ask_each(
    options: argparse.Namespace,
    doing: str,
    paths: Iterable[Path],
    ask: Ask,
    take: Callable[[Path, Any], None],
    results: Results,
    *,
    at_once: int,
) -> None:
    """`take` each image's answer, in the order of `paths`; failures of single ones go to `results`."""
    with (
        address(options, results.console) as (url, protocol),
        spinner(results.console) as progress,
    ):
        progress.add_task(doing)

        async def work() -> None:
            async with AsyncClient(url, protocol=protocol, **client_options(options)) as client:
                await _through(client, paths, ask, take, results, at_once)

        asyncio.run(work())


async def _through(
    client: AsyncClient,
    paths: Iterable[Path],
    ask: Ask,
    take: Callable[[Path, Any], None],
    results: Results,
    at_once: int,
) -> None:
    left = iter(paths)
    asked: deque[tuple[Path, asyncio.Task[Any]]] = deque()
    try:
        while True:
            while len(asked) < at_once and (path := next(left, None)):
                asked.append((path, asyncio.ensure_future(ask(client, path))))
            if not asked:
                return
            path, task = asked[0]
            try:
                take(path, await task)
            except _OF_ONE as error:
                results.failed(path, error)
            asked.popleft()
    finally:
        for _, task in asked:
            task.cancel()
        await asyncio.gather(*(task for _, task in asked), return_exceptions=True)
