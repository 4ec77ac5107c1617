"""Graphs for a GPU, made and compared without one: fused group norms, and the decoder's half precision."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import AutoencoderKL
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

from panotriton.errors import EngineError
from panotriton.local import Upscaler
from panotriton.server.engines import CPU, CUDA
from panotriton.server.repository import copy_models
from panotriton_export import osediff
from panotriton_export.gpu_operators import for_gpu, open_here, portable
from panotriton_export.graph import Component, Probe, export_component, relative_difference
from panotriton_export.half import InHalf, compare_in_half
from panotriton_export.osediff import export_osediff
from panotriton_export.osediff.group_norm import fuse_group_norm
from panotriton_export.osediff.random_sd import VAE, vae_blocks, write_random
from panotriton_export.osediff.vae_decoder import vae_decoder_component

RNG = np.random.default_rng(0)
NETWORKS = ("osediff_vae_encoder", "osediff_unet", "osediff_vae_decoder")


class Block(nn.Module):
    """As diffusers names them: two norms with an activation, one without."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, 16, eps=1e-6), nn.GroupNorm(2, 16)
        self.norm = nn.GroupNorm(8, 16, eps=0.3)
        self.nonlinearity = nn.SiLU()
        for each in (self.norm1, self.norm2, self.norm):
            nn.init.normal_(each.weight)
            nn.init.normal_(each.bias)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        first = self.nonlinearity(self.norm1(X))
        second = self.nonlinearity(self.norm2(first + X))
        result: torch.Tensor = self.norm(second * 2 - 1)
        return result


@torch.no_grad()
def block(folder: Path, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> list[Any]:
    """Export and compare it on inputs of those shapes; raises where they differ."""
    torch.manual_seed(0)
    module = Block().to(dtype)
    inputs = [
        torch.randn(2, 16, 4, 6, dtype=dtype),
        *(3 * torch.randn(s).to(dtype) + 1 for s in shapes),
    ]
    probes = [
        Probe({"X": each}, {"Y": module.float()(each.float()).to(dtype)}) for each in inputs[1:]
    ]
    module.to(dtype)
    fuse_group_norm(module)
    sides = {axis: torch.export.Dim(f"d{axis}", min=1) for axis in (0, 2, 3)}
    limits = {"Y": 2e-6 if dtype == torch.float32 else 4e-3}
    component = Component("block", module, {"X": inputs[0]}, {"X": sides}, ["Y"], probes, limits)
    return export_component(component, folder, CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_fused_group_norm_is_pytorchs(tmp_path: Path, dtype: torch.dtype) -> None:
    shapes = ((1, 16, 1, 1), (3, 16, 5, 7), (1, 16, 64, 33))
    assert len(block(tmp_path, shapes, dtype)) == 3
    graph = onnx.load(str(tmp_path / "block/1/model.onnx"))
    norms = [node for node in graph.graph.node if node.op_type == "GroupNorm"]
    assert [node.domain for node in norms] == ["com.microsoft"] * 3
    activations = [{a.name: a.i for a in node.attribute}["activation"] for node in norms]
    assert activations == [1, 1, 0]
    assert not graph.functions
    kinds = {each.name: each.data_type for each in graph.graph.initializer}
    assert {kinds[name] for node in norms for name in node.input[1:]} == {onnx.TensorProto.FLOAT}
    assert not {"InstanceNormalization", "Sigmoid"} & {node.op_type for node in graph.graph.node}


def test_a_wrong_body_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from panotriton.errors import ExportError  # noqa: PLC0415
    from panotriton_export import gpu_operators  # noqa: PLC0415

    wrong = gpu_operators.FUNCTION.replace("Add (variance, least)", "Add (variance, variance)")
    monkeypatch.setattr(gpu_operators, "FUNCTION", wrong)
    with pytest.raises(ExportError, match="differ from PyTorch"):
        block(tmp_path, ((1, 16, 5, 7),), torch.float32)


@pytest.mark.parametrize(
    ("channels", "groups", "fused"),
    [(16, 4, True), (16, 16, False), (24, 8, False), (1024, 2, True), (2048, 2, False)],
)
def test_a_norm_that_a_gpu_refuses_stays_as_it_is(channels: int, groups: int, fused: bool) -> None:
    """An odd number of channels in a group, or more than 512."""
    network = nn.Sequential(nn.GroupNorm(groups, channels))
    fuse_group_norm(network)
    assert isinstance(network[0], nn.GroupNorm) != fused


# ------------------------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Tiny networks, as for a GPU in half precision, and what the export said."""
    folder = tmp_path_factory.mktemp("gpu")
    write_random(folder / "base")
    copy_models(folder / "repository")
    lines: list[str] = []
    export_osediff(
        folder / "base",
        folder / "base" / "osediff.pkl",
        folder / "repository",
        provider="cuda",
        precision="fp16",
        report=lines.append,
    )
    return folder / "repository", lines


class GroupNorm(OpRun):
    """com.microsoft's, channels last, in NumPy."""

    op_domain = "com.microsoft"

    def _run(
        self,
        x: Any,
        gamma: Any,
        beta: Any,
        activation: int,
        channels_last: int,
        epsilon: float,
        groups: int,
    ) -> tuple[Any]:
        assert channels_last == 1
        assert gamma.dtype == beta.dtype == np.float32
        n, height, width, channels = x.shape
        split = x.astype(np.float32).reshape(n, height * width, groups, channels // groups)
        mean = split.mean((1, 3), keepdims=True)
        deviation = np.sqrt(split.var((1, 3), keepdims=True) + np.float32(epsilon))
        result = ((split - mean) / deviation).reshape(x.shape) * gamma + beta
        if activation:
            result = result / (1 + np.exp(-result))
        return (result.astype(x.dtype),)


class MultiHeadAttention(OpRun):
    """com.microsoft's, in NumPy."""

    op_domain = "com.microsoft"

    def _run(self, query: Any, key: Any, value: Any, num_heads: int, scale: float) -> tuple[Any]:
        def heads(x: Any) -> Any:  # (B, S, heads·d) → (B, heads, S, d)
            return x.astype(np.float32).reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2)

        scores = heads(query) @ heads(key).swapaxes(2, 3) * np.float32(scale)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        result = weights / weights.sum(-1, keepdims=True) @ heads(value)
        return (result.swapaxes(1, 2).reshape(query.shape).astype(query.dtype),)


def feeds(name: str, height: int, width: int) -> dict[str, Any]:
    if name.endswith("encoder"):
        return {"IMAGE": RNG.integers(0, 256, (2, 8 * height, 8 * width, 3), np.uint8)}
    latent = RNG.normal(size=(2, 4, height, width)).astype(np.float32)
    if name.endswith("decoder"):
        return {"LATENT": latent * np.float32(0.18215)}
    return {"LATENT": latent, "PROMPT_EMBEDS": RNG.normal(size=(2, 77, 32)).astype(np.float32)}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_renamed_graph_computes_what_the_portable_one_does(
    exported: tuple[Path, list[str]], name: str
) -> None:
    model = exported[0] / name
    renamed = onnx.load(str(model / "1" / "model.onnx"))
    domains = {node.domain for node in renamed.graph.node if node.op_type == "GroupNorm"}
    assert domains == {"com.microsoft"}
    evaluator = ReferenceEvaluator(renamed, new_ops=[GroupNorm, MultiHeadAttention])
    here = open_here(model)
    for height, width in ((5, 6), (8, 3)):
        fed = feeds(name, height, width)
        output = {"osediff_unet": "NOISE", "osediff_vae_encoder": "LATENT"}.get(name, "SAMPLE")
        (expected,) = here.run([output], fed)
        (got,) = evaluator.run([output], fed)
        assert relative_difference(got, expected) < 5e-3
    assert {path.name for path in (model / "1").iterdir()} == {"model.onnx"}


def test_a_graph_of_a_gpu_is_refused_elsewhere_in_one_line(
    exported: tuple[Path, list[str]],
) -> None:
    upscaler = Upscaler(exported[0])
    with pytest.raises(
        EngineError, match=r"engine cpu cannot open .*GroupNorm.*; export it again$"
    ):
        upscaler._session("osediff_unet")


def test_names_go_there_and_back(exported: tuple[Path, list[str]]) -> None:
    model = ir.load(exported[0] / "osediff_unet" / "1" / "model.onnx")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert portable(model)
    assert ("panotriton", "GroupNorm", "") in model.functions
    for_gpu(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# ------------------------------------------------------------------------------- the decoder


def test_a_decoder_that_stands_half_precision_gets_it_and_that_is_said(
    exported: tuple[Path, list[str]],
) -> None:
    repository, lines = exported
    assert "osediff_vae_decoder is served in fp16" in lines
    pictures = [line for line in lines if line.startswith("osediff_vae_decoder rms")]
    assert sum(line.startswith("osediff_vae_decoder rms fp16") for line in pictures) == 5
    assert len(pictures) == 2 * 5
    settings = json.loads((repository / "osediff" / "1" / "osediff.json").read_text())
    assert settings["decoder_precision"] == "fp16"
    graph = onnx.load(str(repository / "osediff_vae_decoder/1/model.onnx")).graph
    assert onnx.TensorProto.FLOAT16 in {each.data_type for each in graph.initializer}


def vae() -> Any:
    """Of two levels, which is what the test needs."""
    torch.manual_seed(0)
    short = VAE["tiny"] | {"block_out_channels": VAE["tiny"]["block_out_channels"][-2:]}
    return AutoencoderKL(**vae_blocks(short), sample_size=64).eval()


@torch.no_grad()
def test_halves_are_pytorchs() -> None:
    """Of a whole decoder, which PyTorch computes in fp16 too, slowly; the errors are as large."""
    component = vae_decoder_component(vae(), "fp16")
    stored = InHalf(component)
    for probe in component.probes:
        (latent,) = probe.inputs.values()
        (ours,) = stored.run(["SAMPLE"], {"LATENT": latent.numpy()})
        _, theirs = component.module(latent)
        expected = probe.expected["SAMPLE"].numpy()
        errors = [relative_difference(each, expected) for each in (ours, theirs.numpy())]
        assert 2e-4 < min(errors) < max(errors) < 1e-2  # fp16 has 11 bits
        assert relative_difference(ours, theirs.numpy()) < 2 * max(errors)
    assert len(compare_in_half(component, "fp16")) == 2 * 2 + 5


@torch.no_grad()
def overflowing(network: Any) -> Any:
    """fp16 holds its weights, and not the values between its first block and the norm after that."""
    conv = network.decoder.mid_block.resnets[0].conv2
    conv.weight *= 3e5
    assert conv.weight.abs().max() < 65504
    return network


def test_a_decoder_that_overflows_stays_in_fp32_and_that_is_said(tmp_path: Path) -> None:
    copy_models(tmp_path)
    network, lines = overflowing(vae()), []
    each = osediff.PlannedNetwork(
        lambda precision: vae_decoder_component(copy.deepcopy(network), precision),
        CPU,
        ("fp16", "fp32"),
    )
    assert osediff.write_network(each, tmp_path, {}, [], lines.append) == "fp32"
    assert lines[0].startswith("osediff_vae_decoder is not safe in fp16: exported graphs differ")
    assert "inf" in lines[0]
    assert lines[-1] == "osediff_vae_decoder is served in fp32"
    graph = onnx.load(str(tmp_path / "osediff_vae_decoder/1/model.onnx")).graph
    assert onnx.TensorProto.FLOAT16 not in {each.data_type for each in graph.initializer}
