"""The tagger's export, on a tiny random RAM and DAPE in upstream's layout."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format
from torch import Tensor
from torchvision.transforms import Resize
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.cli import main
from panotriton.errors import ExportError, ServerStartError
from panotriton.models.tags import Tags, tagger_input
from panotriton.server.engines import ENGINES
from panotriton.server.repository import EXPORTED_FILES, check_exported, copy_models
from panotriton_export import graph
from panotriton_export.graph import ParityResult
from panotriton_export.tagger import CheckpointError, export_tagger, open_tagger
from panotriton_export.tagger.checkpoint import open_ram
from panotriton_export.tagger.lists import read_tags
from panotriton_export.tagger.model import Sizes
from panotriton_export.tagger.random_ram import RandomFiles
from tests.tagger import Tagger

State = dict[str, Tensor]
Exported = tuple[Path, list[ParityResult], list[str]]


@pytest.fixture(scope="session")
def files(tagger: Tagger) -> RandomFiles:
    return tagger.files


@pytest.fixture(scope="session")
def exported(tagger: Tagger) -> Exported:
    return tagger.repository, tagger.results, tagger.lines


def test_openvino_serves_it_too(
    exported: Exported, files: RandomFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the parity check on what OpenVINO computes; the graph is that of every engine and precision."""
    assert graph.WEIGHTS["fp32"] == graph.WEIGHTS["bf16"]
    traced = exported[0] / "osediff_tagger" / "1" / "model.onnx"
    monkeypatch.setattr(graph, "to_onnx", lambda component: ir.load(traced))
    source = open_tagger(files.ram, files.dape, files.tags, files.thresholds)
    for precision in ("fp32", "bf16"):
        results = export_tagger(source, tmp_path, provider="openvino", precision=precision)
        assert results
        assert all(result.passed for result in results)
    assert 'name: "openvino"' in (tmp_path / "osediff_tagger" / "config.pbtxt").read_text()


def images() -> Tensor:
    """Noise, a ramp with a bright corner: (2, 384, 384, 3)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (384, 384, 3), generator=generator, dtype=torch.uint8)
    ramp = (torch.arange(384)[:, None, None] * 0.6).expand(384, 384, 3).clone()
    ramp[:50, :70] = 255
    return torch.stack([noise, ramp.to(torch.uint8)])


# ------------------------------------------------------------------- upstream, from its papers, by names


class Upstream:
    """RAM with DAPE's adapters unmerged, by the names of its checkpoints."""

    def __init__(self, files: RandomFiles, adapted: bool = True) -> None:
        self.state: State = torch.load(files.ram, weights_only=True)["model"]
        self.lora: State = torch.load(files.dape, weights_only=True) if adapted else {}

    def __call__(self, image: Tensor) -> Tensor:
        """(B, 384, 384, 3) uint8 → probabilities (B, T)."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        tokens = self._swin((image / 255 - mean) / std).flatten(1, 2)  # (B, 144, C)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        context = self._linear("image_proj", tokens)
        tags = self._linear("wordvec_proj", self.state["label_embed"]).relu()
        tags = tags.expand(len(image), -1, -1)
        for layer in range(2):
            tags = self._tagging_layer(f"tagging_head.encoder.layer.{layer}", tags, context)
        return self._linear("fc", tags)[..., 0].sigmoid()

    def _swin(self, x: Tensor) -> Tensor:
        """Channels last: (B, 384, 384, 3) → (B, 12, 12, C)."""
        weight, bias = self._of("visual_encoder.patch_embed.proj")
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=4).permute(0, 2, 3, 1)
        x = self._norm("visual_encoder.patch_embed.norm", x, 1e-5)
        for stage, depth in enumerate((2, 1, 3, 2)):
            name = f"visual_encoder.layers.{stage}"
            for block in range(depth):
                shift = 6 if block % 2 and x.shape[1] > 12 else 0
                x = self._block(f"{name}.blocks.{block}", x, shift)
            if stage < 3:
                corners = [x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
                x = self._norm(f"{name}.downsample.norm", torch.cat(corners, -1), 1e-5)
                x = x @ self.state[f"{name}.downsample.reduction.weight"].T
        return self._norm("visual_encoder.norm", x, 1e-5)

    def _block(self, name: str, x: Tensor, shift: int) -> Tensor:
        x = x + self._window_attention(name, self._norm(f"{name}.norm1", x, 1e-5), shift)
        inner = self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", x, 1e-5))
        return x + self._linear(f"{name}.mlp.fc2", F.gelu(inner))

    def _window_attention(self, name: str, x: Tensor, shift: int) -> Tensor:
        tokens = windows(x.roll((-shift, -shift), (1, 2)))  # (B, n, n, 144, C)
        table = self.state[f"{name}.attn.relative_position_bias_table"]
        heads = table.shape[1]
        qkv = self._linear(f"{name}.attn.qkv", tokens) + self._qkv_update(name, tokens)
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + position_bias(table)
        scores = scores + torch.where(neighbours(x.shape[1], shift), 0.0, -100.0)
        mixed = (scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2)
        whole = unwindows(self._linear(f"{name}.attn.proj", mixed))
        return whole.roll((shift, shift), (1, 2))

    def _qkv_update(self, name: str, x: Tensor) -> Tensor | float:
        if not self.lora:
            return 0.0
        a, b = (self.lora[f"{name}.attn.qkv.lora_{part}"] for part in "AB")
        width = x.shape[-1]
        query, value = x @ a[:8].T @ b[:width].T, x @ a[8:].T @ b[width:].T
        return torch.cat([query, torch.zeros_like(query), value], -1) / 8

    def _tagging_layer(self, name: str, tags: Tensor, context: Tensor) -> Tensor:
        query = self._adapted(f"{name}.crossattention.self.query", tags)
        key = self._adapted(f"{name}.crossattention.self.key", context)
        value = self._linear(f"{name}.crossattention.self.value", context)
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        mixed = self._linear(f"{name}.crossattention.output.dense", mixed)
        tags = self._norm(f"{name}.crossattention.output.LayerNorm", mixed + tags, 1e-12)
        inner = F.gelu(self._linear(f"{name}.intermediate.dense", tags))
        result = self._linear(f"{name}.output.dense", inner)
        return self._norm(f"{name}.output.LayerNorm", result + tags, 1e-12)

    def _adapted(self, name: str, x: Tensor) -> Tensor:
        """The weight is shared by two layers, which each bring an adapter."""
        result = self._linear(name, x)
        for owner in (name, name.replace("tagging_head", "tag_encoder")) if self.lora else ():
            a, b = self.lora[f"{owner}.lora_A"], self.lora[f"{owner}.lora_B"]
            result = result + x @ a.T @ b.T / 8
        return result

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, *self._of(name))

    def _norm(self, name: str, x: Tensor, epsilon: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self._of(name), epsilon)


def windows(x: Tensor) -> Tensor:
    """(B, n·12, n·12, C) → (B, n, n, 144, C)."""
    return x.unfold(1, 12, 12).unfold(2, 12, 12).flatten(4).transpose(3, 4)


def unwindows(x: Tensor) -> Tensor:
    return x.unflatten(3, (12, 12)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def position_bias(table: Tensor) -> Tensor:
    """(heads, 144, 144): the table's row for the offset of each query from each key."""
    y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    dy, dx = (axis.flatten()[:, None] - axis.flatten() for axis in (y, x))
    return table[(dy + 11) * 23 + dx + 11].permute(2, 0, 1)


def neighbours(side: int, shift: int) -> Tensor:
    """(n, n, 1, 144, 144): whether two pixels of a shifted window were neighbours before."""
    wrapped = torch.arange(side).roll(-shift) < shift  # of rows or columns: come from the other end
    region = (2 * wrapped[:, None] + wrapped[None]).float()[None, ..., None]
    region = windows(region)[0, ..., 0]  # (n, n, 144)
    return (region[..., None] == region[..., None, :])[:, :, None]


@torch.no_grad()
def test_the_tagger_computes_what_upstream_does(files: RandomFiles) -> None:
    got = open_ram(files.ram, files.dape).load()(images())
    expected, plain = Upstream(files)(images()), Upstream(files, adapted=False)(images())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 0.02  # the adapters do something
    assert (expected[0] - expected[1]).abs().max() > 0.02  # and so does the image
    assert got.dtype == torch.float32


# ------------------------------------------------------------------------------- the checkpoints


def test_sizes_are_read_off_the_shapes(files: RandomFiles) -> None:
    sizes = open_ram(files.ram, files.dape).sizes
    assert sizes == Sizes(8, (2, 1, 3, 2), (1, 2, 4, 8), 24, 32, 64, layers=2, tags=40)


def test_an_update_counts_an_eighth_in_query_and_value(files: RandomFiles) -> None:
    tagger, upstream = open_ram(files.ram, files.dape).load(), Upstream(files)
    name = "visual_encoder.layers.2.blocks.1.attn.qkv"
    query, key, value = upstream.state[f"{name}.weight"].chunk(3)
    a, b = upstream.lora[f"{name}.lora_A"], upstream.lora[f"{name}.lora_B"]
    attention = tagger.swin.encoder.layers[2].blocks[1].attention
    torch.testing.assert_close(attention.q_proj.weight, query + b[:32] @ a[:8] / 8)
    torch.testing.assert_close(attention.v_proj.weight, value + b[32:] @ a[8:] / 8)
    assert torch.equal(attention.k_proj.weight, key)
    assert torch.equal(attention.k_proj.bias, upstream.state[f"{name}.bias"][32:64])


def test_a_shared_weight_gets_the_updates_of_both_owners(
    files: RandomFiles, tmp_path: Path
) -> None:
    name = "encoder.layer.1.crossattention.self.key"
    upstream = Upstream(files)
    weight = upstream.state[f"tagging_head.{name}.weight"]
    updates = [
        upstream.lora[f"{part}.{name}.lora_B"] @ upstream.lora[f"{part}.{name}.lora_A"] / 8
        for part in ("tagging_head", "tag_encoder")
    ]
    layer = open_ram(files.ram, files.dape).load().tagging_head[1]
    torch.testing.assert_close(layer.crossattention.self.key.weight, weight + sum(updates))
    alone = {n: t for n, t in upstream.lora.items() if not n.startswith("tag_encoder")}
    torch.save(alone, tmp_path / "DAPE.pth")
    layer = open_ram(files.ram, tmp_path / "DAPE.pth").load().tagging_head[1]
    torch.testing.assert_close(layer.crossattention.self.key.weight, weight + updates[0])


def test_the_older_name_of_the_tagging_head_is_known(files: RandomFiles, tmp_path: Path) -> None:
    content = torch.load(files.ram, weights_only=True)
    model = {n.replace("tagging_head", "vision_multi"): t for n, t in content["model"].items()}
    torch.save({"model": model}, tmp_path / "old.pth")
    old, new = (open_ram(path, files.dape).load() for path in (tmp_path / "old.pth", files.ram))
    assert all(map(torch.equal, old.state_dict().values(), new.state_dict().values()))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


def model(edit: Callable[[State], Any]) -> Callable[[Path], None]:
    return resave(lambda content: edit(content["model"]))


def resave(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Apply `edit`, which changes the content or returns another."""

    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        changed = edit(content)
        torch.save(content if changed is None else changed, path)

    return change


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20_000])


def damage(path: Path) -> None:
    """A whole zip file with half of the pickle in it."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in entries.items():
            new.writestr(name, content[: len(content) // 2])


def assign(name: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({name: torch.zeros(shape)})


def drop(part: str) -> Callable[[State], None]:
    def edit(state: State) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return edit


TABLE = "visual_encoder.layers.0.blocks.0.attn.relative_position_bias_table"
QKV = "visual_encoder.layers.2.blocks.2.attn.qkv"
REFUSED_RAM = {
    "none": (Path.unlink, "ram.pth not found; expected RAM's ram_swin_large_14m.pth"),
    "truncated": (truncate, "20,000 bytes.*truncated.*download it again"),
    "damaged": (damage, "is damaged"),
    "code": (resave(lambda c: c | {"x": Code()}), "wants to run code.*builtins.eval.*refused"),
    "a list": (resave(lambda c: [1]), "holds a list; expected a dict"),
    "bare": (resave(lambda c: c["model"]), "lacks the dict 'model'; it has label_embed, .* more"),
    "no swin": (model(drop("visual_encoder")), "lacks visual_encoder.layers.0.*Swin encoder"),
    "no labels": (model(drop("label_embed")), "lacks label_embed; it has "),
    "no head": (model(drop("tagging_head")), "lacks tagging_head.encoder.layer.0.intermediate"),
    "window": (model(assign(TABLE, 169, 1)), "table has 169 rows; expected 529.*384 px"),
    "missing": (model(drop("norm2")), r"lacks visual_encoder.*norm2.*and 13 more.*incomplete"),
    "unknown": (
        model(assign("visual_encoder.absolute_pos_embed", 1, 9216, 8)),
        "has visual_encoder.absolute_pos_embed, for which there is no place",
    ),
    "shape": (model(assign("fc.weight", 1, 40)), r"fc.weight is \(1, 40\); expected \(1, 32\)"),
}
REFUSED_DAPE = {
    "none": (Path.unlink, "dape.pth not found; expected SeeSR's DAPE.pth"),
    "rank": (
        resave(assign(f"{QKV}.lora_A", 8, 32)),
        r"lora_A is \(8, 32\); expected \(16, 32\).*another RAM",
    ),
    "missing": (resave(drop(QKV)), f"lacks {QKV}.lora_A, {QKV}.lora_B; it has .* more"),
    "wrapped": (resave(lambda c: {"params": c}), "lacks .*; it has params. .*no DAPE.pth"),
    "unknown": (
        resave(assign("visual_encoder.layers.0.blocks.0.attn.proj.lora_A", 8, 8)),
        "has visual_encoder.layers.0.blocks.0.attn.proj.lora_A, for which there is no place",
    ),
}


@pytest.mark.parametrize("case", REFUSED_RAM)
def test_what_is_no_ram_is_refused(files: RandomFiles, tmp_path: Path, case: str) -> None:
    spoil, message = REFUSED_RAM[case]
    copy = tmp_path / "ram.pth"
    copy.write_bytes(files.ram.read_bytes())
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        open_ram(copy, files.dape)


@pytest.mark.parametrize("case", REFUSED_DAPE)
def test_what_is_no_dape_is_refused(files: RandomFiles, tmp_path: Path, case: str) -> None:
    spoil, message = REFUSED_DAPE[case]
    copy = tmp_path / "dape.pth"
    copy.write_bytes(files.dape.read_bytes())
    spoil(copy)
    with pytest.raises(CheckpointError, match=message):
        open_ram(files.ram, copy)


# ------------------------------------------------------------------------------- the lists and the prompt


def test_lists_are_read_as_they_come(files: RandomFiles) -> None:
    tags = read_tags(files.tags, files.thresholds, 40)  # no newline at the end; CRLF
    assert tags.names[:3] == ("sky", "tree", "building")
    assert tags.thresholds.dtype == np.float32
    np.testing.assert_array_equal(tags.thresholds[:4], np.float32([0, 0.62, 0.24, 0.85]))


LISTS = {
    "short": ("sky\n", "0.1\n0.2\n", "names.txt has 1 lines but the checkpoint 2 tags"),
    "empty name": ("sky\n \n", "0.1\n0.2\n", "names.txt, line 2 is empty"),
    "no number": ("sky\ntree\n", "0.1\nhigh\n", "thresholds.txt, line 2 is 'high'; expected"),
    "not a number": ("sky\ntree\n", "nan\n0.1\n", "thresholds.txt, line 1 is 'nan'"),
    "percent": ("sky\ntree\n", "0.1\n65\n", "line 2 is '65'; expected a number from 0 to 1"),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_that_do_not_fit_are_refused(tmp_path: Path, case: str) -> None:
    names, thresholds, message = LISTS[case]
    (tmp_path / "names.txt").write_text(names)
    (tmp_path / "thresholds.txt").write_text(thresholds)
    with pytest.raises(CheckpointError, match=message):
        read_tags(tmp_path / "names.txt", tmp_path / "thresholds.txt", 2)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.txt cannot be read.*ram_tag_list.txt"):
        read_tags(tmp_path / "none.txt", tmp_path / "none.txt", 2)


@pytest.mark.parametrize(
    ("probabilities", "user", "prompt"),
    [
        ([0.9, 0.9, 0.9], "clean, 8k", "sky, tree, clean, 8k,"),
        ([0.9, 0.1, 0.9], "", "sky, ,"),
        ([0.65, 0.7, 0.1], "", "tree, ,"),  # a threshold must be exceeded, in fp32 too
        ([0.1, 0.1, 1.0], "clean", ", clean,"),
    ],
)
def test_a_prompt_is_upstreams_to_the_comma(
    probabilities: list[float], user: str, prompt: str
) -> None:
    tags = Tags(("sky", "tree", "removed"), np.array([0.65, 0.65, 1], np.float32))
    assert tags.prompt(np.array(probabilities, np.float32), user) == prompt


def test_tags_are_written_and_read(tmp_path: Path) -> None:
    assert Tags.read(tmp_path) is None
    Tags(("café", "tree"), np.array([0.65, 1], np.float32)).write(tmp_path)
    content = json.loads((tmp_path / "tags.json").read_text("utf-8"))
    assert content == {"names": ["café", "tree"], "thresholds": [0.65, 1.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["tags.json"]
    tags = Tags.read(tmp_path)
    assert tags is not None
    assert tags.names == ("café", "tree")
    assert tags.thresholds.tobytes() == np.array([0.65, 1], np.float32).tobytes()


@pytest.mark.parametrize("size", [(512, 1024), (1024, 2048), (264, 280), (384, 384)])
def test_the_taggers_input_is_upstreams(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    tensor = torch.tensor(image).permute(2, 0, 1) / 255
    expected = Resize((384, 384), antialias=False)(tensor).permute(1, 2, 0) * 255
    got = tagger_input(image)
    assert got.shape == (384, 384, 3)
    assert got.dtype == np.uint8
    assert np.abs(got - expected.numpy()).max() < 1  # of 255: rounded to bytes


# ------------------------------------------------------------------------------- the export


def test_the_graph_agrees_with_pytorch(exported: Exported) -> None:
    _, results, lines = exported
    assert {result.shape for result in results} == {(1, 40), (3, 40)}
    assert all(result.difference <= 1e-4 and result.limit == 1e-4 for result in results)
    assert lines == [str(result) for result in results]


def test_graph_and_config_keep_their_contract(exported: Exported) -> None:
    folder = exported[0] / "osediff_tagger"
    loaded = onnx.load(str(folder / "1" / "model.onnx"))
    onnx.checker.check_model(loaded)
    (image,), (probability,) = loaded.graph.input, loaded.graph.output
    for value, name, kind, rest in (
        (image, "IMAGE", onnx.TensorProto.UINT8, [384, 384, 3]),
        (probability, "PROBABILITY", onnx.TensorProto.FLOAT, [40]),
    ):
        first, *others = value.type.tensor_type.shape.dim
        assert (value.name, value.type.tensor_type.elem_type) == (name, kind)
        assert first.dim_param == "batch"
        assert [dim.dim_value for dim in others] == rest
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    assert [list(io.dims) for io in (*config.input, *config.output)] == [[384, 384, 3], [40]]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_every_model_that_super_resolves_gets_the_tags(exported: Exported) -> None:
    for model_name in ("osediff", "panorama_stream"):
        tags = Tags.read(exported[0] / model_name / "1")
        assert tags is not None
        assert len(tags.names) == len(tags.thresholds) == 40


def test_unknown_options_are_refused(files: RandomFiles, tmp_path: Path) -> None:
    source = open_tagger(files.ram, files.dape, files.tags, files.thresholds)
    with pytest.raises(ExportError, match="'int8'; expected fp32 or fp16 for cpu"):
        export_tagger(source, tmp_path, precision="int8")
    with pytest.raises(ExportError, match=f"'rocm'; expected one of {', '.join(ENGINES)}"):
        export_tagger(source, tmp_path, provider="rocm")


# ------------------------------------------------------------------------------- repository and command


def test_the_tagger_is_left_out_until_it_is_exported(exported: Exported, tmp_path: Path) -> None:
    copy_models(tmp_path)
    assert (tmp_path / "osediff" / "config.pbtxt").is_file()
    assert not (tmp_path / "osediff_tagger").exists()
    config = exported[0] / "osediff_tagger" / "config.pbtxt"
    fitted = config.read_text()
    copy_models(exported[0])
    assert (exported[0] / "osediff_unet" / "config.pbtxt").is_file()
    assert config.read_text() == fitted


@pytest.mark.parametrize(
    "half", [(), ("osediff_tagger/1/model.onnx",), ("osediff/1/tags.json",), ("osediff_tagger/",)]
)
def test_a_tagger_by_half_is_refused(tmp_path: Path, half: tuple[str, ...]) -> None:
    for name in (*EXPORTED_FILES, *half):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).touch()
    if not half:
        check_exported(tmp_path)
        return
    with pytest.raises(ServerStartError, match=r"tagger in .* is incomplete.*--tagger.*remove"):
        check_exported(tmp_path)


def test_a_whole_tagger_is_accepted(tmp_path: Path) -> None:
    for name in (*EXPORTED_FILES, "osediff_tagger/1/model.onnx", "osediff/1/tags.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    check_exported(tmp_path)


def command(files: RandomFiles, output: Path, **options: Path | None) -> int:
    given = {"tagger": files.ram, "dape": files.dape, "tags": files.tags}
    given |= {"thresholds": files.thresholds, **options}
    words = ["export", "osediff", "--base", "none", "--checkpoint", "none", "--output", str(output)]
    for name, path in given.items():
        words += [f"--{name}", str(path)] if path else []
    return main(words)


def test_the_taggers_files_only_go_together(
    files: RandomFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(files, tmp_path, dape=None, thresholds=None) == 2  # wrong arguments
    expected = "needs --tagger, --dape, --tags, --thresholds; --dape, --thresholds is missing"
    assert expected in capsys.readouterr().err


def test_the_taggers_files_are_checked_before_the_rest(
    files: RandomFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(files, tmp_path, dape=files.ram) == 2
    assert "no DAPE.pth" in capsys.readouterr().err
    assert command(files, tmp_path) == 2  # the tagger is fine, the base comes next
    assert "none is not a diffusers folder" in capsys.readouterr().err
