"""The measurements' own arithmetic, the file-hop services, and that a report and its plots come out."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from torch import nn

from panotriton.cli import main
from panotriton.pipeline.camera import Camera, Sphere, sample_cameras

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))  # the scripts find each other as scripts do

import breakdown  # noqa: E402
import cost  # noqa: E402
import counters  # noqa: E402
import memory_store  # noqa: E402
import pipeline  # noqa: E402
import plots  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import script  # noqa: E402
import traces  # noqa: E402
import transport  # noqa: E402
from filehop import preprocess  # noqa: E402
from filehop.client import Outcome  # noqa: E402

SECOND = 1_000_000_000


def seconds(*spans: tuple[float, float]) -> list[traces.Span]:
    return [(int(start * SECOND), int(end * SECOND)) for start, end in spans]


WINDOW = seconds((10, 20))[0]


def test_spans_that_overlap_count_once_and_only_inside_the_window() -> None:
    spans = seconds((8, 11), (12, 14), (13, 15), (13.5, 14), (19, 30), (40, 50))
    assert traces.covered_s(spans, WINDOW) == pytest.approx(1 + 3 + 1)
    assert traces.covered_s([], WINDOW) == 0


def test_a_partition_adds_up_to_the_window() -> None:
    stages = {"first": seconds((10, 14)), "second": seconds((13, 16)), "third": seconds((11, 12))}
    shares = traces.partition_s(stages, WINDOW)
    assert shares == pytest.approx({"first": 4, "second": 2, "third": 0, "rest": 4})


def test_a_trace_is_read_as_triton_writes_it(tmp_path: Path) -> None:
    stamps = ("REQUEST_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "REQUEST_END")
    entries: list[dict] = [{"id": 3, "model_name": "qwen", "model_version": 1, "parent_id": 1}]
    entries += [{"id": 3, "timestamps": [{"name": n, "ns": i}]} for i, n in enumerate(stamps)]
    # An ensemble has no compute of its own.
    entries += [{"id": 1, "model_name": "panorama"}]
    entries += [
        {"id": 1, "timestamps": [{"name": n, "ns": i}]}
        for n, i in zip(stamps[::3], (0, 9), strict=True)
    ]
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(entries))
    assert traces.read(file, traces.COMPUTE) == {"qwen": [(1, 2)]}
    assert traces.read(file, traces.REQUEST) == {"qwen": [(0, 3)], "panorama": [(0, 9)]}


def test_time_without_a_network_is_what_no_network_covers() -> None:
    spans = {
        "osediff_unet": seconds((10, 13)),
        "qwen": seconds((12, 15)),
        "osediff": seconds((10, 20)),
    }
    found = breakdown.wall(spans, WINDOW)
    assert found["network_s"] == pytest.approx(5)
    assert found["other_share"] == pytest.approx(0.5)
    assert found["osediff_unet"] == pytest.approx(3)
    # A trace without networks must not pass for a server whose networks never work.
    assert breakdown.wall({"osediff": spans["osediff"]}, WINDOW)["other_share"] is None


def test_an_instrumented_copy_leaves_the_repository_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "repository"
    for name, code in (("osediff", "respond_async(requests)\n"), ("crop", "pass\n")):
        (source / name / "1").mkdir(parents=True)
        (source / name / "1" / "model.py").write_text(code)
    copy = traces.instrumented(source, tmp_path / "copy")
    assert (copy / "osediff/1/model.py").read_text().startswith("import traced_calls\n")
    assert (copy / "osediff/1/traced_calls.py").is_file()
    assert not (copy / "crop/1/traced_calls.py").exists()
    assert (source / "osediff/1/model.py").read_text() == "respond_async(requests)\n"
    assert (source / "crop/1/model.py").samefile(copy / "crop/1/model.py")


def test_the_models_that_call_others_are_instrumented(tmp_path: Path) -> None:
    copy = traces.instrumented(script.ROOT / "model_repository", tmp_path / "copy")
    found = {path.parts[-3] for path in copy.glob("*/1/traced_calls.py")}
    assert {"osediff", "qwen_scorer", "qwen_describer"} <= found
    assert "panorama_stream" not in found


def test_counts_are_what_was_added() -> None:
    before = counters.Counts(requests=2, calls=1, rows=8, compute_s=1.5, batches={8: 1})
    now = counters.Counts(requests=5, calls=3, rows=14, compute_s=2.0, batches={8: 1, 2: 1, 4: 1})
    added = counters.since({"unet": now, "idle": before}, {"unet": before, "idle": before})
    assert added == {
        "unet": counters.Counts(requests=3, calls=2, rows=6, compute_s=0.5, batches={2: 1, 4: 1})
    }


def test_processor_time_is_that_of_the_processes() -> None:
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # Servers that other tests have started are children of this process too.
    before = counters.processor_s(psutil.Process().pid).get("osediff_unet", 0.0)
    with subprocess.Popen([sys.executable, "-c", code, "osediff_unet_0_0"], **pipes) as busy:
        busy.stdout.readline()
        used = counters.processor_s(psutil.Process().pid)
        busy.communicate(b"\n")
    assert 0.25 <= used["osediff_unet"] - before < 3
    assert used["server"] > 0


def test_tiles_in_flight_follow_littles_law() -> None:
    # 20 requests of 4 tiles, each 0.5 s there, in 2 s: 5 requests at once, 20 tiles.
    counts = counters.Counts(requests=20, rows=80, queue_s=6, compute_s=4)
    assert scaling.tiles_in_flight(counts, 2.0) == pytest.approx(20)


def test_busy_share_sees_idle_time() -> None:
    before = psutil.cpu_times()
    idle = before._replace(idle=before.idle + 3, user=before.user + 1)
    assert scaling.busy_share(before, idle) == pytest.approx(0.25)


def test_the_services_crop_is_the_crop() -> None:
    panorama = cv2.imread(str(script.PANORAMAS / "forest.jpg"))
    sphere = Sphere(panorama, 128)
    for row in sample_cameras(3).reshape(-1, 5)[::5]:
        camera = Camera.from_array(row)
        expected = sphere.crop(camera).astype(int)
        difference = np.abs(preprocess.crop(sphere.image, camera) - expected)
        assert difference.mean() < 0.5


def test_the_services_write_what_the_next_one_reads(tmp_path: Path) -> None:
    body = {"image_path": str(script.GROUP[0]), "group_id": 1, "is_first": True, "seed": 7}
    body |= {"group_dir": str(tmp_path), "crop_size": 64}
    client = preprocess.app.test_client()
    pairs = client.post("/preprocess_for_group", json=body).get_json()["results"]
    assert [pair["interval"] for pair in pairs] == list(range(1, 9))
    assert cv2.imread(pairs[0]["pair_image"]).shape == (64, 128, 3)
    kept = pairs[2] | {"panorama": 1, "left_image": str(tmp_path / "x_left.jpg")}
    body |= {"split_results": [kept], "panorama1_path": body["image_path"], "num_interpolations": 2}
    (result,) = client.post("/generate_interpolated_images", json=body).get_json()["results"]
    assert [view["weight_idx"] for view in result["interpolated_images"]] == [1, 2]
    assert all(Path(view["path"]).is_file() for view in result["interpolated_images"])


def compared() -> dict:
    old = Outcome([0.8] * 16, [1, 2], 44)
    old.seconds.update({"super-resolution": 30.0, "scoring": 8.0})
    group = {"seconds": 10.0, "write_s": 2.0, "window": WINDOW, "kept": [1], "images": 22}
    group["scores"] = [0.8] * 15 + [0.7]
    spans = {"osediff": seconds((11, 18)), "qwen_scorer": seconds((17, 19))}
    request = {"seed": 7, "crop_size": 64, "interpolations": 9, "threshold": 0.7}
    return pipeline.compare([(40.0, old)], [group], spans) | {"request": request}


def test_a_comparison_counts_files_and_shows_what_differs() -> None:
    result = compared()
    assert result["ratio"] == pytest.approx(4.0)
    assert result["ratio_written"] == pytest.approx(40 / 12)
    assert result["score_difference"] == pytest.approx(0.1)
    assert result["stages"]["file hops"]["rest"] == pytest.approx(2.0)
    assert result["stages"]["ensemble"]["scoring"] == pytest.approx(1.0)
    text = pipeline.markdown(result)
    assert "4.0 times" in text
    assert "file hops kept [1, 2]; ensemble kept [1]" in text


def test_flops_are_those_of_the_layers() -> None:
    layer = nn.Linear(64, 32, bias=False, device="meta")
    work = cost.count(layer, lambda: layer(cost.meta(10, 64)), width=4)
    assert work.flops == 2 * 10 * 64 * 32
    assert work.nbytes == 4 * (10 * 64 + 10 * 32 + 64 * 32)
    assert work.floor_s(1e6, 1e9) == pytest.approx(work.flops / 1e6)
    assert work.floor_s(1e12, 1e3) == pytest.approx(work.nbytes / 1e3)
    assert not layer._forward_hooks


def test_the_vision_towers_flops_are_near_two_a_weight_and_patch() -> None:
    from transformers import Qwen2_5_VLConfig  # noqa: PLC0415
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen  # noqa: PLC0415

    config = Qwen2_5_VLConfig(vision_config=cost.QWEN_VISION).vision_config
    with torch.device("meta"):
        tower = qwen.Qwen2_5_VisionTransformerPretrainedModel(config)
    few = cost.vision(tower, 64)  # too few for attention to count
    weights = sum(p.numel() for p in tower.blocks.parameters())
    assert few.flops == pytest.approx(2 * 64 * weights, rel=0.1)


def test_a_group_has_the_tiles_of_the_real_sizes() -> None:
    assert cost.PAIRS * cost.PAIR_TILES + cost.VIEWS * cost.VIEW_TILES == 704
    assert cost.patch_count(1024, 2048) == 10804


@pytest.mark.skipif(memory_store.find() is None, reason="no redis-server: apt install redis-server")
def test_redis_starts_and_is_gone_afterwards() -> None:
    import redis  # noqa: PLC0415

    with memory_store.running(memory_store.find()) as port:
        store = redis.Redis(port=port)
        store.set("a", b"\x00\x01")
        assert store.get("a") == b"\x00\x01"
    with pytest.raises(redis.ConnectionError):
        store.ping()


def transported() -> dict:
    ways = ("memcpy", "shared memory", "gRPC", "HTTP", "base64 in JSON, HTTP")
    times = {way: [2.0 * 3**i, 1.0] for i, way in enumerate(ways)}
    return {
        "runs": 1,
        "ms": times,
        "same": dict.fromkeys(ways, True),
        "absent": {"Redis and pickle": "redis-server not found"},
        "overhead_ratio": transport.ratios(times),
        "upload_ms": {"pixels": [10.0, 9.0]},
        "upload_bytes": {"pixels": 50_000_000},
    }


def test_transports_are_compared_above_the_floor() -> None:
    result = transported()
    assert result["overhead_ratio"]["gRPC"] == pytest.approx((18 - 2) / (6 - 2))
    assert "| Redis and pickle | redis-server not found |" in transport.markdown(result)


def test_plots_are_drawn_for_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    results = {"transport": transported(), "pipeline": compared(), "scaling": {"error": "exit"}}
    assert plots.draw(results, tmp_path) == ["transport.png", "pipeline.png"]
    for name in ("transport.png", "pipeline.png"):
        image = cv2.imread(str(tmp_path / name))
        assert min(image.shape[:2]) > 300
        assert (image[:5, :5] == 255).all()  # a white ground, also in dark mode


def test_the_summary_has_what_was_measured_without_an_error() -> None:
    crops = {"rows": [[1, 1, 2.19], [160, 1, 358.0], [160, 2, 193.0], [1, 1, 6.5]]}
    text = run.summary({"pipeline": compared(), "crop": crops, "scaling": {"error": "exit code 1"}})
    assert "40 s and 10 s: 4.0 times as fast" in text
    assert "| 160 crops of one panorama, 2 threads | 193 ms |" in text
    assert "throughput" not in text


def test_docs_are_filled_between_their_markers_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- bench:perf_analyzer -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:crop -->\nkept\n<!-- /bench -->\nafter\n"
    )
    monkeypatch.setattr(run, "DOCS", (page,))
    monkeypatch.setattr(run, "IMAGES", tmp_path / "images")
    measured = {"perf_analyzer": {"markdown": "| new |"}}
    run.write_docs({"machine": script.machine(), "results": measured})
    text = page.read_text()
    assert "<!-- bench:perf_analyzer -->\n| new |\n<!-- /bench -->\nbetween" in text
    assert "<!-- bench:crop -->\nkept\n<!-- /bench -->\nafter\n" in text
    assert "never measured: crop" in capsys.readouterr().out


def test_the_docs_name_only_measurements_that_exist() -> None:
    named = {name for path in run.DOCS for _, name, _ in run.MARKED.findall(path.read_text())}
    assert named <= run.SUITE.keys() | {"machine", "summary"}
    assert named


def test_every_script_that_runs_alone_is_in_the_suite() -> None:
    mains = re.compile(r"^if __name__ == ", re.MULTILINE)
    found = {path.stem for path in BENCH.glob("*.py") if mains.search(path.read_text())}
    assert run.SUITE.keys() == found - {"run"}
    for name, entry in run.SUITE.items():
        assert entry.keys() <= {"title", "only_named", "only_prints", "limit_s"}, name


def test_the_command_and_the_runner_know_the_same_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = f"no bench 'script'; expected some of {', '.join(run.SUITE)}"
    assert main(["bench", "script"]) == 2  # a module beside the scripts
    assert expected in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run.py", "script"])
    with pytest.raises(SystemExit, match="2"):
        run.parse()
    assert expected in capsys.readouterr().err


def test_the_runner_reports_what_ran_and_what_failed(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "run.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(
        [*command, "crop", "breakdown", "--repository", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "breakdown failed" in done.stderr
    assert "no model repository at" in done.stderr
    content = json.loads((tmp_path / "quick" / "report.json").read_text())
    assert content["results"]["crop"]["rows"][0][2] > 0
    assert "exit code 1" in content["results"]["breakdown"]["error"]
    assert content["machine"]["cores"] == script.cores()
    text = (tmp_path / "quick" / "report.md").read_text()
    assert "| crops of 512×512 |" in text
    assert "**Failed**" in text


def test_a_script_that_is_told_to_end_ends_in_order(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.append({str(BENCH)!r}); import script\n"
        "def main():\n"
        "    try:\n        print('up', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaning', flush=True); time.sleep(1); print('cleaned', flush=True)\n"
        "script.run(main)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        began = time.monotonic()
        child.terminate()
        assert child.stdout.readline() == "cleaning\n"
        child.send_signal(signal.SIGINT)  # again: it must not stop the cleaning up
        assert child.stdout.read() == "cleaned\n"
    assert child.returncode == 130
    assert time.monotonic() - began < 30
