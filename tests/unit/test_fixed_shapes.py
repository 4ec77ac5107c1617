"""Shapes that do not change: sessions for each, batches filled up, and what a deployment expects."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from panotriton.cli import main
from panotriton.errors import EngineError, ExportError, InvalidInput
from panotriton.local import in_process, open_network
from panotriton.models.input_shapes import input_shapes
from panotriton.models.one_step import read_network
from panotriton.models.super_resolution import Limits, SuperResolver
from panotriton.pipeline.contract import Options
from panotriton.pipeline.sizes import PIPELINE_SIZES, ImageSize
from panotriton.server.engines import (
    CPU,
    CUDA,
    TENSORRT,
    ConfigEntries,
    Engine,
    Settings,
    memory,
    onnxruntime,
)
from panotriton.server.engines.onnxruntime import BoundSession, ShapedSessions
from panotriton.server.engines.per_shape import PerShape
from panotriton.server.engines.shapes import FixedShapes, text_of
from panotriton_export.configs import read_config, set_engine, set_gpus, tiles_a_request
from tests.server import graphs

ROOT = Path(__file__).parent.parent.parent
EXPECTED = "x 1x3; x 4x3"


def settings(**given: Any) -> Settings:
    parameters = {"fixed_batches": "1,4", "expected_shapes": EXPECTED} | given.pop("parameters", {})
    return Settings(threads=1, parameters=parameters, **given)


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    return graphs.save(tmp_path, "affine", graphs.affine(), None)


# ------------------------------------------------------------------------------- what configs say


def test_shapes_are_read_as_they_are_written() -> None:
    shapes = [
        {"LATENT": (8, 4, 96, 96), "PROMPT_EMBEDS": (8, 77, 1024)},
        {"LATENT": (1, 4, 64, 64)},
    ]
    parameters = {"fixed_batches": "1,8", "expected_shapes": text_of(shapes)}
    assert FixedShapes.of(parameters) == FixedShapes((1, 8), tuple(shapes))
    assert FixedShapes.of({}) is None


@pytest.mark.parametrize(
    ("parameters", "fault"),
    [
        ({"fixed_batches": "8,1"}, "'8,1', expected rising numbers as 1,4,8"),
        ({"fixed_batches": "1,x"}, "'1,x', expected rising"),
        ({"fixed_batches": "0,1"}, "'0,1', expected rising"),
        ({"fixed_batches": "1", "expected_shapes": "x 1xA"}, "'x 1xA', expected names and shapes"),
    ],
)
def test_shapes_that_are_none_are_refused(parameters: dict[str, str], fault: str) -> None:
    with pytest.raises(EngineError, match=fault):
        FixedShapes.of(parameters)


def test_rows_are_filled_up_to_the_next_size() -> None:
    fixed = FixedShapes((1, 4, 8))
    assert [fixed.rows(n) for n in range(1, 10)] == [1, 4, 4, 4, 8, 8, 8, 8, 9]


def model(folder: Path, name: str) -> Path:
    """A copy of a model's config, whose free sizes are as Stable Diffusion's."""
    (folder / name).mkdir(parents=True)
    text = (ROOT / "model_repository" / name / "config.pbtxt").read_text()
    (folder / name / "config.pbtxt").write_text(text)
    return folder / name


def parameters_of(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    config = text_format.Parse((path / "config.pbtxt").read_text(), ModelConfig())
    return config, {key: value.string_value for key, value in config.parameters.items()}


def test_the_config_for_a_gpu_names_batches_shapes_and_the_backend(tmp_path: Path) -> None:
    unet = model(tmp_path, "osediff_unet")
    set_engine(unet, CUDA, "fp16", [{"LATENT": (4, 96, 96)}])
    config, parameters = parameters_of(unet)
    assert (config.backend, config.max_batch_size) == ("panotriton_onnxruntime", 8)
    fixed = FixedShapes.of(parameters)
    assert fixed is not None
    assert fixed.batches == (1, 4, 8)
    assert fixed.expected == tuple(
        {"LATENT": (batch, 4, 96, 96), "PROMPT_EMBEDS": (batch, 77, 1024)} for batch in (1, 4, 8)
    )
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    set_engine(unet, CPU, "fp32")
    config, parameters = parameters_of(unet)
    assert (config.backend, config.max_batch_size, parameters) == ("onnxruntime", 8, {})


@pytest.mark.parametrize(
    ("engine", "tiles"),
    [
        (CUDA, 8),
        (replace(CUDA, fixed_batches={"osediff_unet": (1, 2)}), 2),  # never more than it takes
        (replace(CPU, fixed_batches={"osediff_unet": (1, 6)}), 6),
        (TENSORRT, 8),
        (CPU, 4),
        (replace(CPU, batches={"osediff_unet": 3}), 3),
    ],
)
def test_an_image_sends_as_many_tiles_as_the_config_takes(
    tmp_path: Path, engine: Engine, tiles: int
) -> None:
    unet = model(tmp_path, "osediff_unet")
    set_engine(unet, engine, "fp32")
    assert tiles_a_request(read_config(unet)) == tiles


def test_several_gpus_are_a_line_of_the_config(tmp_path: Path) -> None:
    unet, qwen = model(tmp_path, "osediff_unet"), model(tmp_path, "qwen")
    set_engine(unet, CUDA, "fp16")
    for path, count in ((unet, 1), (qwen, 1)):
        for gpus in ([0, 1], [2]):
            set_gpus(path, gpus)
            (group,) = parameters_of(path)[0].instance_group
            found = (ModelInstanceGroup.Kind.Name(group.kind), group.count, list(group.gpus))
            assert found == ("KIND_GPU", count, gpus)
    with pytest.raises(ExportError, match="osediff/config.pbtxt has no instances on a GPU"):
        set_gpus(model(tmp_path, "osediff"), [0])


def test_gpus_are_refused_where_there_would_be_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["export", "osediff", "--preset", "full-random", "--output", str(tmp_path)]
    qwen = ["export", "qwen", "--model", str(tmp_path), "--output", str(tmp_path)]
    assert main([*full, "--gpus", "0,1"]) == 2
    assert "--gpus means nothing to cpu; use --provider cuda or tensorrt" in capsys.readouterr().err
    assert main([*qwen, "--engine", "vllm", "--gpus", "0"]) == 2
    assert "--gpus means nothing to vllm, which has tensor_parallel_size" in capsys.readouterr().err
    for wrong in ("0,0", "0,", "-1", "a"):
        with pytest.raises(SystemExit):
            main([*full, f"--gpus={wrong}"])
        assert "names no GPUs; expected different numbers, as 0,1" in capsys.readouterr().err


def test_images_go_through_the_vae_one_by_one(tmp_path: Path) -> None:
    for name in ("osediff_vae_encoder", "osediff_vae_decoder"):
        path = model(tmp_path, name)
        set_engine(path, CUDA, "fp16")
        config, parameters = parameters_of(path)
        assert config.max_batch_size == 1
        # No size was named, so none is opened at load.
        assert parameters == {"fixed_batches": "1", "gpu_memory_fraction": "0.07"}


def test_a_network_without_free_sizes_expects_its_own(tmp_path: Path) -> None:
    text = model(tmp_path, "osediff_text_encoder")
    set_engine(text, CUDA, "fp16")
    assert parameters_of(text)[1]["expected_shapes"] == "INPUT_IDS 1x77; INPUT_IDS 4x77"


def test_tensorrt_gets_a_profile_of_the_same_shapes(tmp_path: Path) -> None:
    unet = model(tmp_path, "osediff_unet")
    set_engine(unet, TENSORRT, "fp16", [{"LATENT": (4, 64, 64)}, {"LATENT": (4, 96, 80)}])
    config, parameters = parameters_of(unet)
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert {
        key: accelerator.parameters[key] for key in accelerator.parameters if "profile" in key
    } == {
        "trt_profile_min_shapes": "LATENT:1x4x64x64,PROMPT_EMBEDS:1x77x1024",
        "trt_profile_opt_shapes": "LATENT:8x4x96x80,PROMPT_EMBEDS:8x77x1024",
        "trt_profile_max_shapes": "LATENT:8x4x96x80,PROMPT_EMBEDS:8x77x1024",
    }
    assert accelerator.parameters["trt_engine_cache_path"] == "/var/cache/panotriton/tensorrt"
    assert (config.backend, parameters) == ("onnxruntime", {})
    providers = onnxruntime.tensorrt_providers(
        Settings(accelerators={"tensorrt": dict(accelerator.parameters)})
    )
    assert providers[0][1]["trt_profile_min_shapes"].startswith("LATENT:1x4x64x64")


# ------------------------------------------------------------------------------- sizes of images


@pytest.mark.parametrize(
    ("text", "size"),
    [("512x1024@2", ImageSize(512, 1024, 2)), ("512x512", ImageSize(512, 512, 2))],
)
def test_sizes_are_named_by_their_sides(text: str, size: ImageSize) -> None:
    assert ImageSize.of(text) == size


@pytest.mark.parametrize("text", ["512", "512x0", "5x5x5", "axb", "512x512@x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="expected HxW or HxW@UPSCALE"):
        ImageSize.of(text)


def test_sizes_mean_nothing_where_any_shape_is_as_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "osediff", "--preset", "full-random", "--output", str(tmp_path)]
    assert main([*arguments, "--shapes", "512x512"]) == 2  # wrong arguments
    assert (
        "--shapes means nothing to cpu; use --provider cuda or tensorrt" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main([*arguments, "--shapes", "512"])
    assert "'512' is no size" in capsys.readouterr().err


def test_what_is_expected_is_what_the_networks_are_fed(repository: Path) -> None:
    """By a resolver whose calls are written down, for tiles, whole images, small ones, tiled VAEs."""
    limits = Limits(vae_untiled_max_pixels=1_500_000)
    sizes = [ImageSize(320, 512), ImageSize(64, 80, 4), ImageSize(200, 210), ImageSize(200, 900, 1)]
    sizes += [ImageSize(640, 1300, 2)]
    folder = repository / "osediff" / "1"
    network = read_network(folder, "osediff")
    seen: dict[str, set[tuple[str, tuple[int, ...]]]] = {}

    async def call(name: str, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        for key, value in inputs.items():
            seen.setdefault(name, set()).add((key, value.shape[1:]))
        rows, f = len(next(iter(inputs.values()))), network.latent_px
        if name == network.roles.text_encoder:
            return {"PROMPT_EMBEDS": np.zeros((1, 77, 8), np.float32)}
        shape = next(iter(inputs.values())).shape[1:]
        if name == network.roles.encoder:
            latent = (network.channels, shape[0] // f, shape[1] // f)
            return {"LATENT": np.zeros((rows, *latent), np.float32)}
        if name == network.roles.denoiser:
            return {"NOISE": np.zeros((rows, *inputs["LATENT"].shape[1:]), np.float32)}
        return {"IMAGE": np.zeros((rows, shape[1] * f, shape[2] * f, 3), np.uint8)}

    resolver = SuperResolver(folder, limits)
    for size in sizes:
        images = np.zeros((2, size.height, size.width, 3), np.uint8)
        asyncio.run(resolver.run(images, call, Options(upscale=size.upscale)))
    for name, rows in input_shapes(network, limits, sizes).items():
        fed = {each for each in seen[name] if each[0] != "PROMPT_EMBEDS"}
        assert {item for row in rows for item in row.items()} == fed, name


def test_a_groups_images_have_two_sizes() -> None:
    pair, view = PIPELINE_SIZES
    assert (pair.height, pair.width) == (512, 1024)
    assert (view.height, view.width) == (512, 512)


# ------------------------------------------------------------------------------- sessions


def test_what_was_used_last_stays_open() -> None:
    opened: list[str] = []
    kept: PerShape[str, str] = PerShape(lambda key: opened.append(key) or key.upper(), 2)
    assert [kept[key] for key in "abacab"] == list("ABACAB")
    assert opened == ["a", "b", "c", "b"]  # c sends b away, since a was used meanwhile
    assert len(kept) == 2


def test_each_shape_has_a_session_and_what_was_not_expected_is_said_once(affine: Path) -> None:
    told: list[str] = []
    graph = CPU.open(affine, settings(report=told.append))
    assert isinstance(graph, ShapedSessions)
    for feeds in graph.zeros():
        graph.run(["plus"], feeds)
    assert (len(graph._sessions), told) == (2, [])
    for rows in (4, 2, 1, 2, 4):
        x = np.arange(3 * rows, dtype=np.float32).reshape(rows, 3)
        plus, double = graph.run(["plus", "double"], {"x": x})
        np.testing.assert_array_equal(plus, 2 * x + 1)
        np.testing.assert_array_equal(double, 2 * x)
    assert len(graph._sessions) == 3
    assert told == ["x 2x3: not an expected shape, so opened only now; export with --shapes"]
    assert [each.shape for each in graph.get_inputs()] == [["batch", 3]]  # as the config must say


def test_sessions_are_bounded(affine: Path) -> None:
    graph = CPU.open(affine, settings(report=lambda line: None))
    for rows in range(1, 13):
        graph.run(["plus"], {"x": np.zeros((rows, 3), np.float32)})
    assert len(graph._sessions) == 8


def test_sessions_keep_to_the_share_of_a_gpu(affine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights so large that five fit; as many as are expected are kept in any case."""
    weights = affine.stat().st_size
    monkeypatch.setattr(memory, "total_bytes", lambda device: weights * 11)
    for share, kept in (("0.5", 5), ("0.1", 2), ("1", 8)):
        told = settings(parameters={"gpu_memory_fraction": share}, report=lambda line: None)
        graph = CPU.open(affine, told)
        for rows in range(1, 13):
            graph.run(["plus"], {"x": np.zeros((rows, 3), np.float32)})
        assert len(graph._sessions) == kept


def test_where_memory_runs_out_other_shapes_make_room(affine: Path) -> None:
    told: list[str] = []
    graph = CPU.open(affine, settings(report=told.append))
    for feeds in graph.zeros():
        graph.run(["plus"], feeds)
    (first, second) = graph._sessions._opened.values()
    words = "Failed to allocate memory for requested buffer of size 8"

    def full(outputs: Any, feeds: Any) -> Any:
        raise RuntimeError(words)

    second.run = full
    x = np.ones((4, 3), np.float32)
    np.testing.assert_array_equal(graph.run(["plus"], {"x": x})[0], 2 * x + 1)
    assert first not in graph._sessions._opened.values()
    assert told == ["x 4x3: no memory; closing the sessions of other shapes"]
    (only,) = graph._sessions._opened.values()
    only.run = full
    graph._open_one = lambda sides: only
    with pytest.raises(RuntimeError, match=words):
        graph.run(["plus"], {"x": x})
    only.run, words = full, "another fault"
    with pytest.raises(RuntimeError, match=words):
        graph.run(["plus"], {"x": x})
    assert len(graph._sessions) == 1  # for which nothing was closed


def test_memory_of_fixed_shapes_is_taken_once(affine: Path) -> None:
    """A plan made in the first run would take all of it again in the second."""
    assert onnxruntime.session_options(Settings()).enable_mem_pattern
    assert not onnxruntime.session_options(settings()).enable_mem_pattern
    chosen = settings(parameters={"enable_mem_pattern": "1"})
    assert onnxruntime.session_options(chosen).enable_mem_pattern


def test_bound_buffers_give_the_same_and_are_not_overwritten(affine: Path) -> None:
    graph = CPU.open(affine, settings(parameters={"cuda_graphs": "1"}))
    first, second = (np.full((4, 3), value, np.float32) for value in (1, 2))
    (before,) = graph.run(["plus"], {"x": first})
    (after,) = graph.run(["plus"], {"x": second})
    assert all(isinstance(each, BoundSession) for each in graph._sessions._opened.values())
    np.testing.assert_array_equal(before, 2 * first + 1)
    np.testing.assert_array_equal(after, 2 * second + 1)


def test_buffers_need_shapes_that_follow_from_the_inputs(tmp_path: Path) -> None:
    path = graphs.save(tmp_path, "non_zero", graphs.non_zero(), None)
    graph = CPU.open(path, settings(parameters={"cuda_graphs": "1", "expected_shapes": ""}))
    with pytest.raises(EngineError, match="shapes of where do not follow .* leave cuda_graphs out"):
        graph.run(["where"], {"x": np.ones((1, 2), np.float32)})


def test_a_real_network_gives_the_same_by_session_of_each_shape(
    repository: Path, tmp_path: Path
) -> None:
    """All four, joined by the arithmetic of the server, in this process."""
    shaped = replace(
        CPU, fixed_batches=CUDA.fixed_batches, shape_entries=lambda shapes: ConfigEntries()
    )
    for name in CUDA.fixed_batches.keys() & {path.name for path in repository.iterdir()}:
        config = model(tmp_path, name)
        (config / "1").symlink_to((repository / name / "1").resolve())
        (config / "config.pbtxt").write_text((repository / name / "config.pbtxt").read_text())
        set_engine(config, shaped, "fp32")
    resolver = SuperResolver(repository / "osediff" / "1", Limits())
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 300, 3), np.uint8)

    def run(folder: Path, **providers: Any) -> np.ndarray:
        networks: dict[str, Any] = {}

        def session(name: str) -> Any:
            return networks.setdefault(name, open_network(folder / name, **providers))

        return asyncio.run(resolver.run(image, in_process(session), Options()))

    expected = run(repository, providers=["CPUExecutionProvider"]).astype(int)
    assert np.abs(run(tmp_path) - expected).max() <= 1
