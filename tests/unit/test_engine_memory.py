"""A network's share of a GPU's memory, with a driver that tells what the test wants."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from panotriton.errors import EngineError
from panotriton.server.engines import CUDA, TENSORRT, Settings
from panotriton.server.engines.memory import check_share, total_bytes
from panotriton_export.configs import set_engine

CONFIG = (
    'backend: "onnxruntime"\nmax_batch_size: 8\ninstance_group [ { kind: KIND_CPU count: 1 } ]\n'
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """900 bytes of weights, most of them beside the graph."""
    (tmp_path / "model.onnx").write_bytes(bytes(100))
    (tmp_path / "model.onnx.data").write_bytes(bytes(800))
    return tmp_path / "model.onnx"


def driver(monkeypatch: pytest.MonkeyPatch, gpus: list[int]) -> None:
    """Of GPUs with so many bytes."""

    def get(handle: Any, number: int) -> int:
        handle._obj.value = number
        return 0 if number < len(gpus) else 101  # CUDA_ERROR_INVALID_DEVICE

    def total(found: Any, handle: Any) -> int:
        found._obj.value = gpus[handle.value]
        return 0

    functions = {"cuInit": lambda flags: 0, "cuDeviceGet": get, "cuDeviceTotalMem_v2": total}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(**functions))


def shaped(fraction: str, device: str = "0") -> Settings:
    shapes = "; ".join(f"X {batch}x3" for batch in (1, 4, 8))
    parameters = {"fixed_batches": "1,4,8", "expected_shapes": shapes}
    return Settings(device=device, parameters=parameters | {"gpu_memory_fraction": fraction})


def test_weights_count_once_for_each_expected_shape(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, [10_000, 20_000])
    check_share(graph, shaped("0.27"))
    with pytest.raises(EngineError, match=r"3 sessions of .* GPU 0 has .* may take 26%") as refused:
        check_share(graph, shaped("0.26"))
    assert "gpu_memory_fraction" in str(refused.value)
    check_share(graph, shaped("0.26", device="1"))
    check_share(graph, Settings(parameters={"gpu_memory_fraction": "0.1"}))  # one for any shape
    check_share(graph, Settings())


@pytest.mark.parametrize("value", ["0", "1.5", "half", "nan"])
def test_a_share_that_is_none_is_named(graph: Path, value: str) -> None:
    with pytest.raises(EngineError, match=f"gpu_memory_fraction is '{value}', expected more than"):
        check_share(graph, shaped(value))


def test_a_driver_that_does_not_know_refuses_nothing(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, [])
    assert total_bytes(0) is None
    check_share(graph, shaped("0.001"))

    def none(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert total_bytes(0) is None


def test_a_network_too_large_for_its_share_is_refused_before_its_wheel_is_looked_for(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(monkeypatch, [1000])
    for engine in (CUDA, TENSORRT):
        with pytest.raises(EngineError, match="export with fewer --shapes"):
            engine.opener(graph, shaped("0.5"))


def test_configs_for_cuda_say_the_shares_which_leave_the_scorer_its_half(tmp_path: Path) -> None:
    model = tmp_path / "osediff_unet"
    model.mkdir()
    config = model / "config.pbtxt"
    config.write_text(CONFIG)
    for _ in range(2):  # written once, however often it is exported
        set_engine(model, CUDA, "fp16")
        said = 'key: "gpu_memory_fraction" value { string_value: "0.24" }'
        assert config.read_text().count(said) == 1
    set_engine(model, TENSORRT, "fp16")
    assert "gpu_memory_fraction" not in config.read_text()
    assert sum(CUDA.memory_fractions.values()) == pytest.approx(0.5)
