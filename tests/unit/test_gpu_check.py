"""The check that needs a GPU, where there is none: it says so, and survives its parts."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "gpu")]

import gpu  # noqa: E402
import record  # noqa: E402
import run as bench_run  # noqa: E402
import script  # noqa: E402
import serving  # noqa: E402
import slim  # noqa: E402


@pytest.mark.skipif(bool(script.gpus()), reason="there is a GPU")
@pytest.mark.parametrize("command", [["gpu.py"], ["run.py", "gpu"]])
def test_without_a_gpu_it_says_so_and_ends_with_its_own_code(
    command: list[str], tmp_path: Path
) -> None:
    first, *rest = command
    arguments = ["--output", str(tmp_path)] if first == "run.py" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "bench" / first), *rest, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == script.NO_GPU
    assert done.stderr.startswith("NO GPU HERE: nothing was measured")
    assert not list(tmp_path.glob("*.json"))


def part(name: str, code: str, limit_s: int = 60) -> gpu.Part:
    """A script of its own that finds something before anything happens to it."""
    start = (
        "import sys, time; from pathlib import Path; p = Path(sys.argv[sys.argv.index('--json') + 1]);"
        "p.write_text('{\"found\": 1}');"
    )
    return gpu.Part(name, ("-c", start + code), limit_s)


def test_a_part_that_fails_or_hangs_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_GRACE_S", 1)
    monkeypatch.setattr(gpu, "_QUICK_TIMES", 1)
    hangs = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    monkeypatch.setattr(
        gpu,
        "PARTS",
        (part("bad", "sys.exit(3)"), part("slow", hangs, 8), part("networks, shipped", "pass")),
    )
    chosen = SimpleNamespace(quick=True, plain=None, only=None, limit=200)
    found = gpu.measure(chosen, tmp_path, tmp_path)
    assert found["bad"]["failed"] == "exit code 3"
    assert found["slow"]["failed"] == "stopped after 8 s"
    assert "failed" not in found["networks, shipped"]
    assert all(each["found"] == 1 for each in found.values())
    text = gpu.markdown(
        {"machine": script.machine(), "quick": True, "parts": found, "floors_ms": {}}
    )
    assert "- bad: exit code 3\n- slow: stopped after 8 s" in text
    chosen.limit = 0
    assert gpu.measure(chosen, tmp_path, tmp_path)["bad"] == {"failed": "no time was left"}


def test_the_table_has_a_column_for_each_candidate_that_was_measured() -> None:
    parts = {
        "server": {"512 px": {"ms": 20.0, "first_ms": 30.0}, "took_s": 1.0},
        "networks, shipped": {
            "osediff_unet 1x4x64x64": {"ms": 5.0, "first_ms": 100.0, "finite": True}
        },
        "networks, torch eager": {"osediff_unet 1x4x64x64": {"error": "out of | memory"}},
    }
    text = gpu.table_of_networks(parts, {"osediff_unet 1x4x64x64": 0.81})
    assert "| network, input | shipped | torch eager | floor |" in text
    assert "| osediff_unet 1x4x64x64 | 5.0 (100) | not run: out of / memory | 0.81 |" in text
    parts["networks, TensorRT"] = {"not_run": "no TensorRT", "took_s": 1.0}
    assert "TensorRT |" not in gpu.table_of_networks(parts, {})
    assert "- networks, TensorRT: not run: no TensorRT" in gpu.failures(parts)
    assert "| server | 512 px | ms 20.0, first_ms 30.0 |" in gpu.callers(parts)


def test_what_another_machine_measured_is_taken_over(tmp_path: Path) -> None:
    results = tmp_path / "gpu.json"
    results.write_text(json.dumps({"markdown": "| a card |", "took_s": 1.0}))
    run = [sys.executable, str(ROOT / "tests/bench/run.py"), "--output", str(tmp_path / "out")]
    subprocess.run([*run, "--take", str(results)], check=True)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["results"]["gpu"]["markdown"] == "| a card |"
    other = results.rename(tmp_path / "card.json")
    refused = subprocess.run(
        [*run, "--take", str(other)], capture_output=True, text=True, check=False
    )
    assert "card.json is named for no bench; expected NAME.json" in refused.stderr


def test_a_gpus_results_alone_leave_the_other_machines_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- bench:machine -->\nkept\n<!-- /bench -->\n<!-- bench:gpu -->\nold\n<!-- /bench -->\n"
    )
    monkeypatch.setattr(bench_run, "DOCS", (page,))
    monkeypatch.setattr(bench_run, "IMAGES", tmp_path)
    results = {"gpu": {"markdown": "| a card |"}}
    bench_run.write_docs({"machine": script.machine(), "results": results})
    assert "kept" in page.read_text()
    assert "| a card |" in page.read_text()


def test_copies_between_a_process_and_the_gpu_are_told_by_the_profilers_trace() -> None:
    """Its events as Kineto names them; what is no copy is left out."""

    def copy(way: str, count: int) -> dict[str, Any]:
        name = f"Memcpy {way} (Pinned -> Device)"
        return {"ph": "X", "cat": "gpu_memcpy", "name": name, "args": {"bytes": count}}

    kernel = {"ph": "X", "cat": "kernel", "name": "Memcpy HtoD of another kind", "args": {}}
    trace = {"traceEvents": [copy("HtoD", 3), kernel, copy("DtoH", 5), copy("HtoD", 4), {}]}
    assert serving.copied_bytes(trace) == {"HtoD": 7, "DtoH": 5, "DtoD": 0}


def test_a_figure_that_cannot_be_had_leaves_its_reason(tmp_path: Path) -> None:
    found = record.Record(tmp_path / "found.json")
    found.attempt("good", lambda: 1)
    found.attempt("bad", lambda: 1 / 0)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == {"good": 1, "bad": {"error": "ZeroDivisionError: division by zero"}}


def fat_binary(*contents: tuple[int, bytes]) -> bytes:
    """As nvcc packs it: (architecture, machine code) each."""
    entries = b""
    for architecture, content in contents:
        header = struct.pack("<HHIQ", 2, 0, 64, len(content)).ljust(28, b"\0")
        entries += (header + struct.pack("<I", architecture)).ljust(64, b"\0") + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_only_other_gpus_kernels_are_dropped(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    both, other = fat_binary((80, b"a" * 40), (90, b"b" * 48)), fat_binary((80, b"c" * 24))
    library.write_bytes(b"code" + both + b"more" + other + b"end")
    before = library.read_bytes()
    assert slim.slim(library, 90) == (48 + 24, 40)
    assert library.read_bytes() == before.replace(b"a" * 40, bytes(40))
