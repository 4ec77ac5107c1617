"""ram_swin_large_14m.pth and DAPE.pth: reading, checking, and merging into a `Tagger`.

The first is a torch.save'd dict whose "model" is the state of the whole of RAM: visual_encoder (Swin, in
the names of its authors' code), tagging_head, image_proj, wordvec_proj, fc, label_embed, and the
captioning half (tag_encoder, text_decoder), which is not needed.

The second is a dict of loralib weights alone, made by SeeSR: rank 8 and loralib's default alpha of 1, so
that an update counts an eighth. In Swin, loralib's MergedLinear adapts the query and value thirds of
each qkv: lora_A (2·8, C) and lora_B (2·C, 8) hold both, query first. In the tagging head the query and
key of each cross-attention have a plain pair. Sources: ram/models/swin_transformer_lora.py and
bert_lora.py of github.com/cswry/OSEDiff and SeeSR; loralib 0.1.2, layers.py.

The head's weights are those of the first tag_encoder layers too: upstream ties them, and loralib adds the
update of each owner to the shared weight. So tag_encoder's updates count where the file has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from panotriton_export.pickles import CheckpointError, read_pickle
from panotriton_export.tagger.model import WINDOW, Sizes, Tagger

__all__ = ["LORA_ALPHA", "LORA_RANK", "Ram", "open_ram"]

LORA_RANK = 8
LORA_ALPHA = 1

# Parameters of `Tagger` and of upstream; the first that fits at a place wins.
_RENAMED = (
    ("swin.embeddings.patch_embeddings.projection.", "visual_encoder.patch_embed.proj."),
    ("swin.embeddings.norm.", "visual_encoder.patch_embed.norm."),
    ("swin.layernorm.", "visual_encoder.norm."),
    ("swin.encoder.", "visual_encoder."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".attention.relative_position_bias.", ".attn."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.q_proj.", ".attn.qkv."),
    (".attention.k_proj.", ".attn.qkv."),
    (".attention.v_proj.", ".attn.qkv."),
    ("tagging_head.", "tagging_head.encoder.layer."),
)
_THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}  # of qkv's rows
_READ = re.compile(r"(visual_encoder|tagging_head|image_proj|wordvec_proj|fc)\.|label_embed$")
# Computed anew, or of the self-attention that upstream deletes from the tagging head.
_SKIPPED = re.compile(
    r"\.(relative_position_index|attn_mask)$|^tagging_head\.(embeddings\.|encoder\.layer\.\d+\.attention\.)"
)
_QKV = ".attn.qkv.weight"
_ADAPTED = re.compile(r"\.attn\.qkv\.weight$|\.crossattention\.self\.(query|key)\.weight$")
_STAGE = re.compile(r"visual_encoder\.layers\.(\d+)\.blocks\.(\d+)\.")
_LAYER = re.compile(r"tagging_head\.encoder\.layer\.(\d+)\.")

State = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Ram:
    """Both files, checked against each other; the tensors stay on disk until `load`."""

    sizes: Sizes
    state: State
    lora: State

    @torch.no_grad()
    def load(self) -> Tagger:
        """The tagger in fp32 with DAPE's updates merged."""
        tagger = Tagger(self.sizes)
        for name, parameter in tagger.named_parameters():
            theirs, third = _upstream(name)
            tensor = self.state[theirs].float()
            if _ADAPTED.search(theirs):
                tensor = tensor + _update(theirs, self.lora)
            parameter.copy_(tensor if third is None else tensor.chunk(3)[third])
        return tagger


def open_ram(ram: Path, dape: Path) -> Ram:
    """Open ram_swin_large_14m.pth and DAPE.pth and check every name and shape.

    Raises CheckpointError for whatever would fail later, or change the result unnoticed.
    """
    content = read_pickle(ram, "RAM's ram_swin_large_14m.pth")
    if not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{ram} lacks the dict 'model'; it has {_some(content)}. Expected RAM's "
            "ram_swin_large_14m.pth"
        )
    state = {_current(name): tensor for name, tensor in content["model"].items()}
    sizes = _sizes(state, ram)
    shapes = _shapes(sizes)
    _check(state, shapes, ram, "another RAM than for 384 px with a Swin encoder")
    lora = read_pickle(dape, "SeeSR's DAPE.pth")
    _check(lora, _lora_shapes(shapes), dape, f"another RAM than {ram}, or is no DAPE.pth")
    return Ram(sizes, state, lora)


def _current(name: str) -> str:
    """Older checkpoints call the tagging head vision_multi."""
    return name.replace("vision_multi", "tagging_head")


def _upstream(name: str) -> tuple[str, int | None]:
    """A `Tagger` parameter's upstream name, and which third of its rows it is, if it is one."""
    third = next((index for part, index in _THIRDS.items() if f".{part}." in name), None)
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return name, third


def _shapes(sizes: Sizes) -> Shapes:
    """What a RAM checkpoint of these sizes holds of what is read."""
    with torch.device("meta"):
        tagger = Tagger(sizes)
    shapes = {}
    for name, parameter in tagger.named_parameters():
        theirs, third = _upstream(name)
        rows, *rest = parameter.shape
        shapes[theirs] = (rows if third is None else 3 * rows, *rest)
    return shapes


def _lora_shapes(shapes: Shapes) -> Shapes:
    """What DAPE holds of what is read, for a RAM checkpoint of these shapes."""
    found: Shapes = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes.items() if _ADAPTED.search(n)):
        pairs = 2 if name.endswith(_QKV) else 1
        module = name.removesuffix("weight")
        found[f"{module}lora_A"] = (pairs * LORA_RANK, columns)
        found[f"{module}lora_B"] = (2 * columns if pairs == 2 else rows, LORA_RANK)
    return found


def _sizes(state: State, path: Path) -> Sizes:
    """Read off the shapes in a checkpoint."""
    stages = [depth for _, depth in sorted(_depths(state).items())]
    tables = [
        _shape(state, f"visual_encoder.layers.{i}.blocks.0.attn.relative_position_bias_table", path)
        for i in range(max(len(stages), 1))
    ]
    if tables[0][0] != (2 * WINDOW - 1) ** 2:
        raise CheckpointError(
            f"{path}: Swin's relative position table has {tables[0][0]} rows; expected "
            f"{(2 * WINDOW - 1) ** 2}, of the window of {WINDOW} for images of 384 px"
        )
    tags, text_width = _shape(state, "label_embed", path)
    dense = _shape(state, "tagging_head.encoder.layer.0.intermediate.dense.weight", path)
    return Sizes(
        embed_width=_shape(state, "visual_encoder.patch_embed.proj.weight", path)[0],
        depths=tuple(stages),
        heads=tuple(table[1] for table in tables),
        text_width=text_width,
        width=dense[1],
        inner_width=dense[0],
        layers=1 + max(int(found[1]) for name in state if (found := _LAYER.match(name))),
        tags=tags,
    )


def _depths(state: State) -> dict[int, int]:
    """Stage → number of its blocks."""
    depths: dict[int, int] = {}
    for found in filter(None, map(_STAGE.match, state)):
        stage, block = int(found[1]), int(found[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    return depths


def _shape(state: State, name: str, path: Path) -> torch.Size:
    if name not in state:
        raise CheckpointError(
            f"{path} lacks {name}; it has {_some(state)}. Expected RAM with a Swin encoder, "
            "ram_swin_large_14m.pth"
        )
    return state[name].shape


def _check(state: State, shapes: Shapes, path: Path, otherwise: str) -> None:
    """Every expected tensor must be there with its shape, and none that would be left unused."""
    missing = [name for name in shapes if name not in state]
    if missing:
        raise CheckpointError(
            f"{path} lacks {_some(missing)}; it has {_some(state)}. It is incomplete or was made for "
            f"{otherwise}"
        )
    unexpected = [name for name in _used(state) if name not in shapes]
    if unexpected:
        raise CheckpointError(
            f"{path} has {_some(unexpected)}, for which there is no place: it was made for {otherwise}"
        )
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{path}: {name} is {tuple(state[name].shape)}; expected {shape}: it was made for "
                f"{otherwise}"
            )


def _used(state: State) -> Iterator[str]:
    return (name for name in state if _READ.match(name) and not _SKIPPED.search(name))


def _some(names: Mapping[str, object] | list[str]) -> str:
    shown = ", ".join(map(str, list(names)[:3])) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _update(name: str, lora: State) -> Tensor:
    """What DAPE adds to the weight `name`, of its shape."""
    module = name.removesuffix("weight")
    if name.endswith(_QKV):
        a, b = lora[f"{module}lora_A"].chunk(2), lora[f"{module}lora_B"].chunk(2)
        query, value = (_product(*pair) for pair in zip(a, b, strict=True))
        return torch.cat([query, torch.zeros_like(query), value])
    update = _product(lora[f"{module}lora_A"], lora[f"{module}lora_B"])
    twin = module.replace("tagging_head.", "tag_encoder.")
    if f"{twin}lora_A" in lora:
        update = update + _product(lora[f"{twin}lora_A"], lora[f"{twin}lora_B"])
    return update


def _product(a: Tensor, b: Tensor) -> Tensor:
    return b.float() @ a.float() * (LORA_ALPHA / LORA_RANK)
