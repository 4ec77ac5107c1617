"""This tree against an older commit, in turns on one machine: a whole group, one image, and what overlaps.

    python tests/bench/against.py 91ea4d4 --only group   15 minutes, on a machine that does nothing else
    python tests/bench/against.py 21bc195                whole; older trees cannot load this one's stand-ins

- group: of `make demo`'s panoramas, by each tree's server with the small preset that each exports itself.
- image: of three sizes by each tree's server, around networks that answer at once: the host's whole part,
  with transport, copies and hops.
- overlap: images through the arithmetic alone, around one device that takes a fixed time over each
  network: how much longer the whole is than that device's work.

Ratios are medians of this tree over the other's; beside them the quarter of turns below and above.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import script

from panotriton.errors import ServerStartError
from panotriton.server.repository import EXPORTED_FILES

SCRIPTS = Path(__file__).parent / "trees"
WORK = script.ROOT / "build" / "against"
PARTS = ("group", "image", "overlap")
IMAGES = ((512, 512, 1), (512, 512, 2), (512, 1024, 2))
Ask = Callable[..., float]  # JSON of what is wanted → seconds
_LINKS = {"panotriton_export": "export", "panotriton_models": "model_repository"}
_ADDRESS = re.compile(r"gRPC +(\S+)")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("commit", nargs="?", default="HEAD^", help="the other one (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--turns", type=int, default=9, help="of each (%(default)s)")
    parser.add_argument("--crop-size", type=int, default=512, help="of the group (%(default)s)")


def checked_out(commit: str) -> Path:
    """The commit's files, and a Python in .venv that imports them beside this one's packages.

    An environment and not PYTHONPATH, which the server's Python models do not see.
    """
    folder = WORK / commit
    if not (folder / ".venv").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        archive = subprocess.run(
            ["git", "-C", script.ROOT, "archive", commit], capture_output=True, check=True
        )
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        for name, target in _LINKS.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
        venv.create(folder / ".venv", with_pip=False)
        found = [str(folder / "client"), str(folder)]
        found += [path for path in sys.path if path.endswith("site-packages")]
        (site,) = (folder / ".venv").glob("lib/python*/site-packages")
        (site / "trees.pth").write_text("\n".join(found) + "\n")
    return folder


def interpreter(tree: Path) -> str:
    """The Python whose `panotriton` is the tree's."""
    own = tree / ".venv" / "bin" / "python"
    return sys.executable if tree == script.ROOT else str(own)


def exported(tree: Path) -> Path:
    """The small preset by the tree's own export."""
    folder = tree / "repository"
    if not (folder / "osediff" / "1" / "osediff.json").is_file():
        command = [interpreter(tree), "-m", "panotriton", "export", "--preset", "small"]
        subprocess.run([*command, "--output", folder], check=True)
    return folder


def around_stand_ins(tree: Path, folder: Path) -> Path:
    """The tree's models, and networks of Stable Diffusion's sizes that answer at once."""
    sys.path.append(str(script.ROOT))
    from tests.server import standins  # noqa: PLC0415

    standins.ROOT = tree
    standins.SETTINGS |= {"latent_tile": 96, "latent_overlap": 32, "process_size": 512}
    standins.build(folder)
    shutil.copytree(folder / "echo", folder / "qwen")
    config = folder / "qwen" / "config.pbtxt"
    config.write_text(config.read_text().replace('"echo"', '"qwen"'))
    for path in EXPORTED_FILES:  # what the command looks for
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


@contextmanager
def served(tree: Path, repository: Path) -> Iterator[Ask]:
    """Asks a server that the tree's own command starts, by the tree's own client."""
    command = [interpreter(tree), "-m", "panotriton", "serve", "--repository", repository]
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    with subprocess.Popen(
        [*map(str, command), *ports], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line.startswith("ready"):
                    break
            found = _ADDRESS.search(said)
            if found is None:
                raise ServerStartError(f"{tree} does not serve; its output above has the reason")
            with asking(tree, found[1]) as ask:
                yield ask
        finally:
            process.terminate()
            process.communicate()  # to its end: what it still says needs a reader


@contextmanager
def asking(tree: Path, address: str) -> Iterator[Ask]:
    command = [interpreter(tree), str(SCRIPTS / "asking.py"), address]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def ask(**wanted: Any) -> float:
            process.stdin.write(json.dumps(wanted) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            said = process.stdout.readline()  # type: ignore[union-attr]
            if not said:
                raise ServerStartError(f"{tree} does not answer; its output above has the reason")
            return float(said)

        yield ask
        process.stdin.close()  # type: ignore[union-attr]


def in_turns(sides: Mapping[str, Callable[[], float]], turns: int) -> dict[str, Any]:
    """Seconds of each side, measured alternately, after one of each that does not count."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, work in sides.items():
            took = work()
            if turn:
                spent[name].append(round(took, 4))
    this, other = spent.values()
    ratios = [one / two for one, two in zip(this, other, strict=True)]
    quarters = statistics.quantiles(ratios, n=4) if turns > 1 else ratios * 3
    return {
        "seconds": spent,
        "median_s": {name: round(statistics.median(each), 4) for name, each in spent.items()},
        "ratio": round(statistics.median(this) / statistics.median(other), 3),
        "quarters": [round(quarters[0], 3), round(quarters[-1], 3)],
    }


def groups(trees: Mapping[str, Path], chosen: Any) -> dict[str, Any]:
    request = {"seed": script.SEED, "crop_size": 64 if chosen.quick else chosen.crop_size}
    request["interpolations"] = 1 if chosen.quick else 9
    request["panoramas"] = [str(path) for path in script.GROUP]
    with ExitStack() as stack:
        sides = {}
        for name, tree in trees.items():
            ask = stack.enter_context(served(tree, exported(tree)))
            sides[name] = partial(ask, **request)
        return {"a group": in_turns(sides, chosen.turns)}


def images(trees: Mapping[str, Path], chosen: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        asks = {}
        for name, tree in trees.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "repository"
            repository = around_stand_ins(tree, folder)
            asks[name] = stack.enter_context(served(tree, repository))
        found = {}
        for height, width, upscale in IMAGES:
            wanted = {"side": (height, width), "upscale": upscale}
            sides = {name: partial(ask, **wanted) for name, ask in asks.items()}
            turns = chosen.turns if chosen.quick else 5 * chosen.turns
            found[f"{height}×{width} px × {upscale}"] = in_turns(sides, turns)
        return found


def overlaps(trees: Mapping[str, Path], chosen: Any) -> dict[str, Any]:
    """Of each way of working; a tree from before the arithmetic had its present place has none."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        around_stand_ins(script.ROOT, Path(work) / "repository")
        folder = Path(work) / "repository" / "osediff" / "1"
        for name, mode in {"images of a group, 4 in flight": "4", "one after another": "1"}.items():
            command = [str(SCRIPTS / "sleeping.py"), str(folder), mode]
            command += ["--quick"] * chosen.quick
            busy: list[float] = []
            sides = {side: partial(asleep, tree, command, busy) for side, tree in trees.items()}
            try:
                measured = in_turns(sides, min(chosen.turns, 5))
                found[name] = {**measured, "device_s": round(statistics.median(busy), 3)}
            except RuntimeError as error:
                found[name] = {"not run": str(error)}
    return found


def asleep(tree: Path, command: list[str], busy: list[float]) -> float:
    """Seconds that `sleeping` takes with the tree's package; adds its device's to `busy`."""
    done = subprocess.run(
        [interpreter(tree), *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    answer = json.loads(done.stdout)
    busy.append(answer["device_s"])
    return float(answer["s"])


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each thing that was measured."""
    rows = []
    for part in PARTS:
        for name, each in result["parts"].get(part, {}).items():
            if "not run" in each:
                rows.append((name, "", "", f"not run: {each['not run']}", "", ""))
                continue
            this, other = (f"{value * 1e3:.0f}" for value in each["median_s"].values())
            spread = "–".join(map(str, each["quarters"]))
            device = f"{each['device_s'] * 1e3:.0f}" if "device_s" in each else ""
            rows.append((name, this, other, each["ratio"], spread, device))
    headings = ("", "this tree, ms", f"{result['against']}, ms", "ratio", "quarters", "device, ms")
    return script.table(headings, rows)


def main() -> None:
    """Measure, print Markdown, write JSON."""
    chosen = script.options(__doc__, arguments)
    if chosen.quick:
        chosen.turns = 1
    named = subprocess.run(
        ["git", "-C", script.ROOT, "rev-parse", "--short", f"{chosen.commit}^{{commit}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if named.returncode:
        sys.exit(f"error: {chosen.commit} is no commit of {script.ROOT}")
    commit = named.stdout.strip()
    trees = {"this": script.ROOT, commit: checked_out(commit)}
    measures = {"group": groups, "image": images, "overlap": overlaps}
    result: dict[str, Any] = {"machine": script.machine(), "against": commit, "parts": {}}
    for part in chosen.only:
        print(f"── {part} ──", file=sys.stderr, flush=True)
        try:
            result["parts"][part] = measures[part](trees, chosen)
        except ServerStartError as error:  # what the other parts have measured is kept
            result["parts"][part] = {part: {"not run": str(error)}}
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
