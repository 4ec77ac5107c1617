"""OSEDiff's export, on tiny random networks in the real formats."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from google.protobuf import text_format
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.errors import ExportError
from panotriton.local import open_network
from panotriton.models.colours import align_colours
from panotriton.models.osediff import one_step, plan_size
from panotriton.models.tiles import TileBlend
from panotriton.server.engines import CPU, ENGINES
from panotriton.server.engines.openvino import OpenVINOGraph
from panotriton.server.repository import copy_models
from panotriton_export import graph
from panotriton_export.configs import set_engine
from panotriton_export.osediff import CheckpointError, ParityResult, export_osediff
from panotriton_export.osediff.checkpoint import (
    add_adapters,
    open_checkpoint,
    save_checkpoint,
)
from panotriton_export.osediff.random_sd import write_random
from panotriton_export.osediff.reference import Pipeline, super_resolve
from panotriton_export.osediff.text_encoder import text_encoder_component
from panotriton_export.osediff.whole_image import check_distinct

RNG = np.random.default_rng(0)
COMPONENTS = ("text_encoder", "vae_encoder", "unet", "vae_decoder")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    write_random(folder)
    return folder


@pytest.fixture(scope="session")
def exported(
    base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[ParityResult], list[str]]:
    repository = tmp_path_factory.mktemp("repository")
    lines: list[str] = []
    pickle = base / "osediff.pkl"
    results = export_osediff(base, pickle, repository, with_code=True, report=lines.append)
    return repository, results, lines


# ------------------------------------------------------------------------------- what is refused


def drop(part: str) -> Callable[[Path], None]:
    return lambda base: shutil.rmtree(base / part)


def unlink(name: str) -> Callable[[Path], None]:
    return lambda base: (base / name).unlink()


def configure(part: str, **changes: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = next((base / part).glob("*config.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def repickle(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        content = torch.load(base / "osediff.pkl", weights_only=True)
        torch.save(edit(content) or content, base / "osediff.pkl")

    return change


def truncate(base: Path) -> None:
    path = base / "osediff.pkl"
    path.write_bytes(path.read_bytes()[:50_000])


def damage(base: Path) -> None:
    """A whole zip file with half of the pickle in it."""
    path = base / "osediff.pkl"
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content[: len(content) // 2])


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def narrow(content: dict[str, Any]) -> None:
    """As trained on a base with a narrower prompt."""
    name = next(n for n in content["state_dict_unet"] if "attn2.to_k.lora_A" in n)
    content["state_dict_unet"][name] = content["state_dict_unet"][name][:, :-8].clone()


def forget(content: dict[str, Any]) -> None:
    content["state_dict_vae"].popitem()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

REFUSED = {
    "single file": (
        lambda b: [unlink("model_index.json")(b), drop("vae")(b)],
        "is not a diffusers folder",
    ),
    "half a vae": (
        lambda b: os.truncate(b / "vae/diffusion_pytorch_model.safetensors", 9_000),
        "vae/diffusion_pytorch_model.safetensors is truncated.*has 9,000 bytes",
    ),
    "half a text encoder": (
        lambda b: os.truncate(b / "text_encoder/model.safetensors", 4),
        "text_encoder/model.safetensors is truncated",
    ),
    "pointer": (
        lambda b: (b / "unet/diffusion_pytorch_model.safetensors").write_text(POINTER),
        "unet/diffusion_pytorch_model.safetensors is a Git-LFS pointer.*git lfs pull",
    ),
    "pickle of a pointer": (lambda b: (b / "osediff.pkl").write_text(POINTER), "git lfs pull"),
    "old code": (
        lambda b: torch.save(
            {"x": Code()}, b / "osediff.pkl", _use_new_zipfile_serialization=False
        ),
        "osediff.pkl is damaged.*|wants to run code",
    ),
    "no vae": (drop("vae"), "lacks the subfolder vae"),
    "no weights": (unlink("unet/diffusion_pytorch_model.safetensors"), "has no weights"),
    "broken config": (lambda b: (b / "vae/config.json").write_text("{"), "cannot be read"),
    "768-v": (configure("scheduler", prediction_type="v_prediction"), "stable-diffusion-2-1-base"),
    "500 steps": (configure("scheduler", num_train_timesteps=500), "num_train_timesteps 500"),
    "parts differ": (configure("text_encoder", hidden_size=48), "cross_attention_dim is 32"),
    "no pickle": (unlink("osediff.pkl"), "osediff.pkl not found"),
    "truncated": (truncate, "50,000 bytes.*download it again"),
    "damaged": (damage, "is damaged"),
    "code": (repickle(lambda c: c | {"x": Code()}), "wants to run code.*builtins.eval"),
    "a list": (repickle(lambda c: [1]), "holds a list"),
    "keys": (repickle(lambda c: {"params": {}}), "lacks rank_unet.*it has params"),
    "rank": (repickle(lambda c: c | {"rank_unet": 8}), "has rank 4 but the file says rank 8"),
    "other modules": (
        repickle(lambda c: c | {"unet_lora_others_modules": ["mid_block.attentions.9.to_k"]}),
        "mid_block.attentions.9.to_k.*another base",
    ),
    "other shapes": (repickle(narrow), r"\(4, 24\); the base needs \(4, 32\).*another base"),
    "incomplete": (repickle(forget), "state_dict_vae lacks .*incomplete"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_network_is_read(
    base: Path, tmp_path: Path, case: str
) -> None:
    spoil, message = REFUSED[case]
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(copy, copy / "osediff.pkl")


def test_folders_are_taken_as_people_have_them(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    (copy / "model_index.json").unlink()
    for part in ("unet", "vae", "text_encoder"):
        (path,) = (copy / part).glob("*.safetensors")
        half = {name: value.half() for name, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"))
        path.unlink()
    content = torch.load(base / "osediff.pkl", weights_only=True)
    torch.save(content, copy / "osediff.pkl", _use_new_zipfile_serialization=False)
    taken, given = (open_checkpoint(f, f / "osediff.pkl") for f in (copy, base))
    for load in ("load_unet", "load_vae"):
        pairs = zip(
            getattr(taken, load)().parameters(), getattr(given, load)().parameters(), strict=True
        )
        for one, other in pairs:
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3)
    taken.base.load_text_encoder()
    assert any(path.name.endswith(".fp16.safetensors") for path in taken.base.source_files())


def test_missing_weights_are_not_made_up(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    path = copy / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[max(weights)]
    save_file(weights, path)
    with pytest.raises(CheckpointError, match="text_encoder lacks the weights of"):
        open_checkpoint(copy, copy / "osediff.pkl").base.load_text_encoder()


@pytest.mark.parametrize(
    ("value", "says"),
    [(0.0, "answers two different inputs alike"), (float("nan"), "answers with what is no number")],
)
def test_a_useless_component_is_found(
    exported: tuple[Path, list[ParityResult], list[str]], tmp_path: Path, value: float, says: str
) -> None:
    repository = Path(shutil.copytree(exported[0], tmp_path / "repository"))
    check_distinct(repository)
    path = repository / "osediff_vae_encoder" / "1" / "model.onnx"
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4:
            array = np.full(tuple(tensor.dims), value, np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=f"osediff_vae_encoder {says}"):
        check_distinct(repository)


def test_unknown_provider_is_refused(base: Path, tmp_path: Path) -> None:
    expected = f"provider is 'rocm'; expected one of {', '.join(ENGINES)}"
    with pytest.raises(ExportError, match=expected):
        export_osediff(base, base / "osediff.pkl", tmp_path, provider="rocm")


def test_configs_take_the_graphs_dims_and_the_provider(
    exported: tuple[Path, list[ParityResult], list[str]],
) -> None:
    unet = exported[0] / "osediff_unet"
    config = text_format.Parse((unet / "config.pbtxt").read_text(), ModelConfig())
    assert [list(io.dims) for io in config.input] == [[4, -1, -1], [77, 32]]
    set_engine(unet, ENGINES["tensorrt"], "fp16")
    set_engine(unet, ENGINES["tensorrt"], "fp16")  # again: replaced, not added
    config = text_format.Parse((unet / "config.pbtxt").read_text(), ModelConfig())
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, accelerator.parameters["precision_mode"]) == ("tensorrt", "FP16")
    set_engine(unet, ENGINES["cpu"], "fp32")
    config = text_format.Parse((unet / "config.pbtxt").read_text(), ModelConfig())
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert not config.HasField("optimization")


def test_unknown_precision_is_refused(base: Path, tmp_path: Path) -> None:
    pickle = base / "osediff.pkl"
    with pytest.raises(ExportError, match="'int8'; expected fp32 or fp16 for cpu"):
        export_osediff(base, pickle, tmp_path, precision="int8")
    with pytest.raises(ExportError, match="'bf16'; expected fp32 or fp16 for tensorrt"):
        export_osediff(base, pickle, tmp_path, precision="bf16", provider="tensorrt")
    with pytest.raises(ExportError, match="'fp16'; expected fp32 or bf16 for openvino"):
        export_osediff(base, pickle, tmp_path, precision="fp16", provider="openvino")


# ------------------------------------------------------------------------------- OpenVINO


@pytest.fixture(scope="session")
def by_openvino(
    base: Path,
    exported: tuple[Path, list[ParityResult], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Exported with bf16, whose factors are rounded on every CPU, if not as fast on every one.

    Its graphs are those of `exported`, which are not traced again; OpenVINO's results are compared.
    """
    assert ENGINES["openvino"].operators == CPU.operators
    repository = tmp_path_factory.mktemp("openvino")
    copy_models(repository)
    pickle = base / "osediff.pkl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            graph, "to_onnx", lambda each: ir.load(exported[0] / each.name / "1/model.onnx")
        )
        export_osediff(base, pickle, repository, provider="openvino", precision="bf16")
    return repository


def test_openvino_is_in_the_configs_of_the_networks_that_images_go_through(
    by_openvino: Path,
) -> None:
    batches = {}
    for name in COMPONENTS:
        config = text_format.Parse(
            (by_openvino / f"osediff_{name}" / "config.pbtxt").read_text(), ModelConfig()
        )
        batches[name] = config.max_batch_size
        accelerators = config.optimization.execution_accelerators.cpu_execution_accelerator
        images = name != "text_encoder"
        assert [each.name for each in accelerators] == ["openvino"] * images
        assert config.parameters["openvino_precision"].string_value == "bf16" * images
    assert batches == {"text_encoder": 8, "vae_encoder": 1, "unet": 1, "vae_decoder": 1}


def test_bf16_rounds_the_blocks_and_little_else(
    by_openvino: Path, exported: tuple[Path, list[ParityResult], list[str]]
) -> None:
    graph_file = Path("osediff_vae_encoder", "1", "model.onnx")
    image = RNG.integers(0, 256, (1, 64, 80, 3), dtype=np.uint8)
    feeds = {"IMAGE": image}
    (expected,) = CPU.open(exported[0] / graph_file).run(["LATENT"], feeds)
    full = OpenVINOGraph(by_openvino / graph_file, threads=1)
    mixed = open_network(by_openvino / "osediff_vae_encoder", threads=1, emulate=True)
    differences = [
        graph.relative_difference(each.run(["LATENT"], feeds)[0], expected)
        for each in (full, mixed)
    ]
    assert differences[0] < graph.LIMITS["fp32"]
    assert 1e-3 < differences[1] < graph.LIMITS["bf16"]


def test_shapes_beyond_those_kept_are_compiled_anew(by_openvino: Path) -> None:
    path = by_openvino / "osediff_vae_encoder" / "1" / "model.onnx"
    kept, free = (OpenVINOGraph(path, threads=1, shapes=count) for count in (2, 0))
    images = [RNG.integers(0, 256, (n, 64, 8 * n, 3), dtype=np.uint8) for n in (1, 2, 3, 1)]
    for image in images:
        (got,) = kept.run(["LATENT"], {"IMAGE": image})
        (expected,) = free.run(["LATENT"], {"IMAGE": image})
        assert graph.relative_difference(got, expected) < 1e-4
    assert len(kept._compiled) == 2
    assert len(free._compiled) == 1


def test_results_are_not_overwritten_by_the_next_run(by_openvino: Path) -> None:
    network = OpenVINOGraph(by_openvino / "osediff_vae_encoder" / "1" / "model.onnx", threads=1)
    black, white = (np.full((1, 64, 64, 3), level, np.uint8) for level in (0, 255))
    (first,) = network.run(["LATENT"], {"IMAGE": black})
    before = first.copy()
    network.run(["LATENT"], {"IMAGE": white})
    np.testing.assert_array_equal(first, before)


def test_openvino_names_a_file_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(RuntimeError, match=r"model\.onnx"):
        OpenVINOGraph(path, threads=1)


# ------------------------------------------------------------------------------- the checkpoint


@torch.no_grad()
def test_merging_equals_running_the_adapters(base: Path) -> None:
    checkpoint = open_checkpoint(base, base / "osediff.pkl")
    for lora, load, merged in (
        (checkpoint.unet, checkpoint.base.load_unet, checkpoint.load_unet()),
        (checkpoint.vae, checkpoint.base.load_vae, checkpoint.load_vae()),
    ):
        adapted = load()
        plain = run(adapted)
        add_adapters(adapted, lora.rank, lora.modules)
        adapted.load_state_dict(lora.state, strict=False)
        scales = {s for m in adapted.modules() for s in getattr(m, "scaling", {}).values()}
        assert scales == {2.0}
        expected = run(adapted)
        assert not any("lora" in name for name, _ in merged.named_modules())
        torch.testing.assert_close(run(merged), expected, rtol=1e-5, atol=1e-5)
        assert (expected - plain).abs().max() > 0.01  # the adapters do something


def run(network: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if hasattr(network, "encode"):
        image = torch.rand(1, 3, 32, 48, generator=generator)
        return network.encode(image).latent_dist.mode()  # type: ignore[no-any-return]
    latent = torch.randn(1, 4, 8, 12, generator=generator)
    embeds = torch.randn(1, 77, 32, generator=generator)
    return network(latent, 999, embeds).sample  # type: ignore[no-any-return]


def test_conv_in_replaces_the_bases(base: Path) -> None:
    checkpoint = open_checkpoint(base, base / "osediff.pkl")
    state = checkpoint.unet.state
    whole, a, b = (
        state[f"conv_in.{part}.weight"]
        for part in ("base_layer", "lora_A.default_encoder", "lora_B.default_encoder")
    )
    update = torch.einsum("orhw,rihw->oihw", b.expand(-1, -1, 3, 3), a)
    torch.testing.assert_close(checkpoint.load_unet().conv_in.weight, whole + 2 * update)
    assert (whole - checkpoint.base.load_unet().conv_in.weight).abs().max() > 0.005


def test_what_is_written_reads_back(base: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(base, base / "osediff.pkl")
    networks = []
    for lora, network in (
        (checkpoint.unet, checkpoint.base.load_unet()),
        (checkpoint.vae, checkpoint.base.load_vae()),
    ):
        add_adapters(network, lora.rank, lora.modules)
        network.load_state_dict(lora.state, strict=False)
        networks.append(network)
    again = open_checkpoint(base, save_checkpoint(tmp_path / "again.pkl", *networks))
    assert again.unet.modules == {k: list(v) for k, v in checkpoint.unet.modules.items()}
    assert set(again.vae.modules["default_encoder"]) == set(
        checkpoint.vae.modules["default_encoder"]
    )
    for ours, theirs in ((again.unet, checkpoint.unet), (again.vae, checkpoint.vae)):
        assert ours.state.keys() == theirs.state.keys()
        assert all(torch.equal(ours.state[name], theirs.state[name]) for name in theirs.state)
    assert list(tmp_path.iterdir()) == [tmp_path / "again.pkl"]


# ------------------------------------------------------------------------------- the export


def test_every_graph_agrees_with_pytorch(
    exported: tuple[Path, list[ParityResult], list[str]],
) -> None:
    _, results, lines = exported
    assert {r.component for r in results} == {f"osediff_{name}" for name in COMPONENTS}
    assert {r.shape[0] for r in results} == {1, 3}
    assert all(r.difference <= 1e-4 for r in results if r.limit < 1e-3)
    found = re.search(r"whole image, 280×264 px ×2: ([\d.]+) dB", lines[-1])
    assert found
    assert float(found[1]) >= 50
    assert len(lines) == len(results) + 2  # a header, one line per result, the whole image


CONTRACT = {
    "text_encoder": {"INPUT_IDS": ("INT64", 2), "PROMPT_EMBEDS": ("FLOAT", 3)},
    "vae_encoder": {"IMAGE": ("UINT8", 4), "LATENT": ("FLOAT", 4)},
    "unet": {"LATENT": ("FLOAT", 4), "PROMPT_EMBEDS": ("FLOAT", 3), "NOISE": ("FLOAT", 4)},
    "vae_decoder": {"LATENT": ("FLOAT", 4), "IMAGE": ("UINT8", 4), "SAMPLE": ("FLOAT", 4)},
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_graphs_keep_their_contract_and_carry_no_traces_of_this_machine(
    exported: tuple[Path, list[ParityResult], list[str]], name: str
) -> None:
    model = onnx.load(str(exported[0] / f"osediff_{name}" / "1" / "model.onnx"))
    onnx.checker.check_model(model)
    tensors = {}
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        tensors[value.name] = (
            onnx.TensorProto.DataType.Name(tensor.elem_type),
            len(tensor.shape.dim),
        )
        assert tensor.shape.dim[0].dim_param == "batch"
    assert tensors == CONTRACT[name]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.metadata_props
    del model.graph.initializer[:]
    assert str(Path(torch.__file__).parent.parent) not in str(model)


def test_settings_and_tokenizer(
    base: Path, exported: tuple[Path, list[ParityResult], list[str]]
) -> None:
    folder = exported[0] / "osediff" / "1"
    settings = json.loads((folder / "osediff.json").read_text())
    assert settings.pop("alpha_cumprod") == pytest.approx(0.0046601, rel=1e-5)
    assert re.fullmatch("[0-9a-f]{64}", settings.pop("weights_sha256"))
    assert settings.pop("models") == {
        "text_encoder": "osediff_text_encoder",
        "encoder": "osediff_vae_encoder",
        "denoiser": "osediff_unet",
        "decoder": "osediff_vae_decoder",
        "tagger": "osediff_tagger",
    }
    assert settings == {
        "latent_channels": 4,
        "latent_overlap": 32,
        "latent_tile": 96,
        "precision": "fp32",
        "process_size": 512,
        "tiles_a_request": 4,
        "vae_scale_factor": 8,
    }
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    original = open_checkpoint(base, base / "osediff.pkl").base.load_tokenizer()
    for text in ("", "the sky, tree, ,", "sky! " * 99, "Ünï 街 🌲", "a\n B  c"):
        ids = original(text, max_length=77, padding="max_length", truncation=True).input_ids
        assert tokenizer.encode(text).ids == ids
        assert len(ids) == 77
    assert tokenizer.encode("").ids[2:] == [0] * 75  # pads with "!", as Stable Diffusion 2.1 does


def component(base: Path, precision: str = "fp32") -> graph.Component:
    checkpoint = open_checkpoint(base, base / "osediff.pkl")
    return text_encoder_component(checkpoint.base.load_text_encoder(), precision)


def test_two_exports_are_equal_byte_for_byte(
    base: Path, exported: tuple[Path, list[ParityResult], list[str]], tmp_path: Path
) -> None:
    graph.export_component(component(base), tmp_path)
    name = "osediff_text_encoder/1/model.onnx"
    assert (tmp_path / name).read_bytes() == (exported[0] / name).read_bytes()
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == ["model.onnx"]


def test_large_half_precision_weights_lie_beside_the_graph(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_ABOVE_BYTES", 0)
    first, *_ = graph.export_component(component(base, "fp16"), tmp_path)
    assert 1e-6 < first.difference < 5e-3
    version = tmp_path / "osediff_text_encoder" / "1"
    assert {path.name for path in version.iterdir()} == {"model.onnx", "model.onnx.data"}
    model = onnx.load(str(version / "model.onnx"), load_external_data=False)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_a_graph_that_differs_replaces_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "osediff_text_encoder" / "1"
    version.mkdir(parents=True)
    (version / "model.onnx").write_text("the old one")
    monkeypatch.setattr(graph, "relative_difference", lambda *_: 0.5)
    with pytest.raises(ExportError, match=r"differ from PyTorch.*\n.*1×77×32 .*5.0e-01.*FAILED"):
        graph.export_component(component(base), tmp_path)
    assert [path.name for path in version.iterdir()] == ["model.onnx"]
    assert (version / "model.onnx").read_text() == "the old one"


# ------------------------------------------------------------------------------- the reference


class Average(nn.Module):
    """A VAE that averages 8×8 px, and a text encoder and UNet to go with it."""

    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, pixels: torch.Tensor) -> Any:
        latent = nn.functional.avg_pool2d(pixels, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, latent: torch.Tensor) -> Any:
        return SimpleNamespace(sample=nn.functional.interpolate(latent, scale_factor=8.0))


def predict(latent: torch.Tensor, *_: Any, **__: Any) -> Any:
    """Something that depends on where in its tile a value lies."""
    ramp = torch.linspace(-0.01, 0.01, latent.shape[3])
    return SimpleNamespace(sample=latent * 0.99 + ramp)


def tokenize(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(input_ids=torch.zeros(1, 77, dtype=torch.int64))


PIPELINE = Pipeline(predict, Average(), lambda ids: [ids[..., None]], tokenize, 0.0046601)


def serve(image: NDArray[np.uint8], method: str) -> NDArray[np.uint8]:
    """The server's arithmetic with the networks of PIPELINE."""
    plan = plan_size(image.shape[0], image.shape[1], 2)
    source = plan.prepare(image)
    pixels = torch.tensor(source).permute(2, 0, 1)[None] / 127.5 - 1
    latent = (Average().encode(pixels).latent_dist.mode() * 0.5)[0].numpy()
    blend = TileBlend(latent.shape, 96, 32)
    tiles = torch.tensor(blend.cut(latent, blend.positions))
    blend.add(predict(tiles).sample.numpy(), blend.positions)
    x0 = one_step(latent, blend.result(), PIPELINE.alpha_cumprod)
    sample = Average().decode(torch.tensor(x0[None]) / 0.5).sample[0]
    sharp = ((sample.clamp(-1, 1) * 0.5 + 0.5) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return plan.finish(align_colours(np.ascontiguousarray(sharp), source, method))


@pytest.mark.parametrize("method", ["adain", "wavelet", "nofix"])
@pytest.mark.parametrize("size", [(264, 420), (100, 130), (257, 300)])
def test_the_servers_arithmetic_is_the_references(size: tuple[int, int], method: str) -> None:
    blots = np.random.default_rng(1).integers(0, 256, (6, 7, 3), np.uint8)
    image = cv2.resize(blots, size[::-1], interpolation=cv2.INTER_LINEAR)
    expected = super_resolve(PIPELINE, image, align=method, tiled=True)
    got = serve(image, method)
    assert got.shape == expected.shape
    difference = np.abs(got.astype(int) - expected)
    stretch = 1.0
    if method == "adain":  # makes more of a level that truncation has turned
        channels = (0, 1)
        stretch += (expected.std(channels) / serve(image, "nofix").std(channels)).max()
    assert difference.max() <= stretch
    assert (difference > 0).mean() < 0.01


def test_the_reference_tiles_large_latents_only() -> None:
    image = RNG.integers(0, 256, (384, 392, 3), np.uint8)  # 96 × 98 latents
    small = image[:, :384]
    for crop, tiles in ((image, True), (small, False)):
        by_itself = super_resolve(PIPELINE, crop)
        assert np.array_equal(by_itself, super_resolve(PIPELINE, crop, tiled=tiles))
    assert not np.array_equal(
        super_resolve(PIPELINE, image), super_resolve(PIPELINE, image, tiled=False)
    )
