"""All measurements, or those that are named, and a report of them.

    python tests/bench/run.py                    everything, about half an hour on 2 cores
    python tests/bench/run.py crop transport     these; the report keeps the others' last results
    python tests/bench/run.py fullsize           another half hour, 20 GB of disk: only when it is named
    python tests/bench/run.py --quick            whether everything runs; no figure means anything
    python tests/bench/run.py --write-docs       the last results into README.md and docs/

Writes build/bench/report.md, report.json and plots; with --quick to build/bench/quick, so that no smoke run
overwrites a measurement. Each script runs in a process of its own and also alone. suite.json lists them in
the report's order, and says which run only when they are named and which of those only print.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import capacity
import plots
import script

FOLDER = Path(__file__).parent
SUITE: dict[str, dict[str, Any]] = json.loads((FOLDER / "suite.json").read_text())
DEFAULT_LIMIT_S = 900
PAGES = ("CAPACITY", "MOVING", "PERFORMANCE", "SCORING", "TRANSPORT")
DOCS = (script.ROOT / "README.md", *(script.ROOT / "docs" / f"{name}.md" for name in PAGES))
IMAGES = script.ROOT / "docs" / "images" / "bench"
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n).*?(\n<!-- /bench -->)", re.DOTALL)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SUITE)}")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one run each")
    parser.add_argument("--write-docs", action="store_true", help="run nothing; fill the markers")
    parser.add_argument("--take", type=Path, metavar="FILE", help="run nothing; keep these results")
    parser.add_argument("--output", type=Path, default=script.ROOT / "build" / "bench")
    parser.add_argument(
        "--repository", type=Path, default=script.ROOT / "repository", help="exported models"
    )
    chosen = parser.parse_args()
    if chosen.take and chosen.take.stem not in SUITE:
        parser.error(f"{chosen.take.name} is named for no bench; expected NAME.json, as gpu.json")
    for name in chosen.names:
        if name not in SUITE:
            parser.error(f"no bench {name!r}; expected some of {', '.join(SUITE)}")
    return chosen


def measure(
    name: str, chosen: argparse.Namespace, output: Path, content: dict[str, Any]
) -> dict[str, Any]:
    """Run one script; its results, or the reason why there are none under "error"."""
    results = output / f"{name}.json"
    results.unlink(missing_ok=True)
    command = [*script_command(name), "--json", str(results)]
    command += ["--repository", str(chosen.repository)] + ["--quick"] * chosen.quick
    # Of its own: the report keeps results of other runs.
    run = {key: content["machine"][key] for key in ("commit", "at")}
    began = time.perf_counter()
    reason = supervise(command, SUITE[name].get("limit_s", DEFAULT_LIMIT_S))
    run["took_s"] = round(time.perf_counter() - began, 1)
    if reason or not results.exists():
        return run | {"error": reason or "the script wrote no results"}
    return json.loads(results.read_text()) | run


def script_command(name: str) -> list[str]:
    return [sys.executable, str(FOLDER / f"{name}.py")]


def supervise(command: list[str], limit_s: float = DEFAULT_LIMIT_S) -> str:
    """Run to the end; why it failed, or "". Ctrl-C and the time limit let it stop its servers."""
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
            return f"stopped after {limit_s} s"
        except KeyboardInterrupt:
            process.send_signal(signal.SIGTERM)  # it may have been started with SIGINT ignored
            process.wait()
            raise
    return f"exit code {code}: its output has the reason" if code else ""


def report(content: dict[str, Any], images: list[str]) -> str:
    """The whole report as Markdown."""
    parts = ["# Measurements", about(content["machine"]), summary(content["results"])]
    for name, entry in SUITE.items():
        result, title = content["results"].get(name), entry["title"]
        if result is None:
            continue
        parts += [f"## {title}", *(f"![{title}]({image})" for image in images if name in image)]
        parts.append(result.get("markdown", f"**Failed**: {result.get('error')}"))
        parts.append(f"`python tests/bench/{name}.py`, {result['took_s']:.0f} s{stamp(result)}")
    return "\n\n".join(parts) + "\n"


def stamp(result: dict[str, Any]) -> str:
    """What code was measured, and when."""
    return f". Commit {result['commit']}, {result['at']}." if "commit" in result else ""


def about(machine: dict[str, Any]) -> str:
    """One paragraph: what the figures were measured on."""
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gb']:.0f} GB, {gpus}; load before "
        f"the start {machine['load_before']}; {machine['system']}, Python {machine['python']}; {versions}; "
        f"last run at commit {machine['commit']}, {machine['at']}."
    )


def summary(results: dict[str, Any]) -> str:
    """The figures that people ask for, of what was measured without an error."""
    good = {name: result for name, result in results.items() if "error" not in result}
    rows = [row for name, line in LINES.items() if name in good for row in line(good[name])]
    return script.table(("measure", "result"), rows)


def _crop_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    one, _, many, own = (row[2] for row in result["rows"][:4])
    count, threads = result["rows"][2][:2]
    return [
        ("a crop of 512×512, one thread", f"{one:.1f} ms"),
        ("the same from 4096×2048 at its own resolution", f"{own:.1f} ms"),
        (f"{count} crops of one panorama, {threads} threads", f"{many:.0f} ms"),
    ]


def _pipeline_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    old, new = result["seconds"].values()
    times = f"{old:.0f} s and {new:.0f} s: {result['ratio']:.1f} times as fast"
    return [("a group by file hops, and by the ensemble, same weights and cameras", times)]


def _breakdown_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    share = result["wall"]["other_share"]
    wall = "unknown" if share is None else f"{share:.1%}"
    return [
        ("a group's time in which no network computes", wall),
        (
            "processor time that is not a network's",
            f"{result['processor']['other_share']:.1%}",
        ),
    ]


def _scaling_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    one, *_, most = result["steps"]
    gain = most["groups_a_minute"] / one["groups_a_minute"]
    what = f"throughput of {most['groups']} groups at once against {one['groups']}"
    return [(what, f"{gain:.2f} times; one keeps {one['own_share']:.0%} of the cores busy")]


def _coldstart_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    return [("from nothing to a ready server", f"{result['runs'][0]['serve to ready']:.1f} s")]


LINES = {
    "pipeline": _pipeline_lines,
    "breakdown": _breakdown_lines,
    "crop": _crop_lines,
    "scaling": _scaling_lines,
    "coldstart": _coldstart_lines,
}


def write_docs(content: dict[str, Any]) -> None:
    """Put each result between its markers, `<!-- bench:NAME -->` and `<!-- /bench -->`; and the plots."""
    texts = {
        name: "\n\n".join(filter(None, (result["markdown"], stamp(result).removeprefix(". "))))
        for name, result in content["results"].items()
        if "markdown" in result
    }
    if content["results"].keys() & LINES.keys():  # not for a GPU's alone, which say their own
        texts["machine"] = about(content["machine"])
        texts["summary"] = summary(content["results"])
    if "pipeline" in texts:
        texts["capacity"] = capacity.measured(content["results"]["pipeline"])
    for path in DOCS:
        text = path.read_text()
        path.write_text(MARKED.sub(lambda found: filled(found, texts), text))
        missing = sorted({name for _, name, _ in MARKED.findall(text)} - texts.keys())
        print(f"{path}: filled" + (f"; never measured: {', '.join(missing)}" if missing else ""))
    plots.draw(content["results"], IMAGES)


def filled(found: re.Match[str], texts: dict[str, str]) -> str:
    """One marked place with its result; as it was where there is none."""
    return f"{found[1]}{texts[found[2]]}{found[3]}" if found[2] in texts else found[0]


def load(path: Path) -> dict[str, Any]:
    """The last report, or an empty one."""
    if not path.exists():
        return {"results": {}}
    return dict(json.loads(path.read_text()))


def main() -> None:
    """Measure what was asked for and report."""
    chosen = parse()
    output = chosen.output / "quick" if chosen.quick else chosen.output
    kept = output / "report.json"
    content = load(kept)
    if chosen.write_docs:
        if not content["results"]:
            sys.exit(f"error: no {kept}: run the measurements first, python {FOLDER}/run.py")
        write_docs(content)
        return
    output.mkdir(parents=True, exist_ok=True)
    if chosen.take:
        content.setdefault("machine", script.machine())
        content["results"][chosen.take.stem] = json.loads(chosen.take.read_text())
        kept.write_text(json.dumps(content, indent=1) + "\n")
        return
    if "gpu" in chosen.names and not (script.gpus() or chosen.quick):
        print("NO GPU HERE: nothing was measured", file=sys.stderr)
        sys.exit(script.NO_GPU)
    content["machine"] = script.machine()
    failed = []
    for name in chosen.names or [name for name in SUITE if "only_named" not in SUITE[name]]:
        print(f"\n── {name} ──", flush=True)
        if "only_prints" in SUITE[name]:
            failed += [name] if supervise(script_command(name)) else []
            continue
        content["results"][name] = measure(name, chosen, output, content)
        failed += [name] if "error" in content["results"][name] else []
        kept.write_text(json.dumps(content, indent=1) + "\n")
    images = plots.draw(content["results"], output)
    (output / "report.md").write_text(report(content, images))
    print(f"\nreport: {output / 'report.md'}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed")


if __name__ == "__main__":
    script.run(main)
