"""onnxruntime on a GPU: fixed shapes, bound buffers and the fused group norm give what the CPU gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from panotriton.server.engines import CPU, CUDA, Settings
from panotriton.server.engines.memory import total_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = "X 1x16x24x40; X 4x16x32x32"


class Network(nn.Module):
    """A block as diffusers has them, in whose place a GPU gets the fused operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.norm1, self.nonlinearity = nn.GroupNorm(4, 16), nn.SiLU()

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.conv2(
            self.nonlinearity(self.norm1(self.conv1(X.half())))
        ).float()
        return result


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file for a GPU, and its portable twin."""
    pytest.importorskip("onnx_ir")
    from panotriton_export.gpu_operators import for_gpu, portable  # noqa: PLC0415
    from panotriton_export.graph import Component, save, to_onnx  # noqa: PLC0415
    from panotriton_export.osediff.group_norm import fuse_group_norm  # noqa: PLC0415

    torch.manual_seed(0)
    module = Network().half().eval()
    fuse_group_norm(module)
    sides = {axis: torch.export.Dim(f"d{axis}", min=2) for axis in (0, 2, 3)}
    traced = {"X": torch.randn(2, 16, 12, 20)}
    model = to_onnx(Component("n", module, traced, {"X": sides}, ["Y"], (), {}))
    folder = tmp_path_factory.mktemp("graphs")
    portable(model)
    save(model, folder / "portable.onnx")
    for_gpu(model)
    save(model, folder / "model.onnx")
    return folder / "model.onnx", folder / "portable.onnx"


def settings(**parameters: str) -> Settings:
    fixed = {"fixed_batches": "1,4", "expected_shapes": SHAPES, **parameters}
    options = CUDA.precisions["fp16"].accelerator or {}
    return Settings(threads=1, accelerators={"cuda": options}, parameters=fixed)


def test_the_driver_says_what_torch_says_of_memory() -> None:
    for number in range(torch.cuda.device_count()):
        _, total = torch.cuda.mem_get_info(number)
        assert total_bytes(number) == pytest.approx(total, rel=0.02)


@pytest.mark.parametrize("cuda_graphs", ["0", "1"])
def test_shapes_in_turn_give_what_the_cpu_gives(
    graphs: tuple[Path, Path], cuda_graphs: str
) -> None:
    on_gpu, on_cpu = CUDA.open(graphs[0], settings(cuda_graphs=cuda_graphs)), CPU.open(graphs[1])
    random = np.random.default_rng(0)
    shapes = [feeds["X"].shape for feeds in on_gpu.zeros()]
    results: list[tuple[Any, Any]] = []
    for shape in shapes * 3:
        feeds = {"X": random.normal(size=shape).astype(np.float32)}
        results += [(on_gpu.run(["Y"], feeds)[0], on_cpu.run(["Y"], feeds)[0])]
    for got, expected in results:  # only now: none may have been overwritten
        assert np.abs(got - expected).max() < 2e-2 * np.abs(expected).max()
    assert len(on_gpu._sessions) == 2
    assert on_gpu.get_providers()[0] == "CUDAExecutionProvider"
