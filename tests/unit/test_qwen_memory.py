"""What a model is said to need, against numbers worked out by hand from its published shape."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from panotriton.errors import InvalidInput
from panotriton.models.qwen_memory import (
    Need,
    check_fits,
    estimate,
    free_ram_bytes,
    stored_parameters,
)

# Qwen2.5-VL-3B-Instruct.
CONFIG_3B = {
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
}
PARAMETERS_3B = 3_754_622_976
PAIR = 1024 * 2048


def need(batch: int = 16, pixels: int = PAIR) -> Need:
    return estimate(CONFIG_3B, PARAMETERS_3B, 2, batch, pixels)


def check(free_bytes: int, where: str) -> None:
    check_fits(need, 16, PAIR, free_bytes, where)


def test_the_parts_by_hand() -> None:
    found = need(batch=1)
    assert found.weights == 7_509_245_952
    tokens = 10_700 // 4 + 1536
    assert found.cache == tokens * 36 * 2 * 2 * 128 * 2
    assert found.total == found.weights + found.cache + found.activations
    # The wider of the two sides decides: here the tokens, with 45,312 values each.
    working = tokens * (6 * 2048 + 3 * 11_008) * 2
    shown = 10_700 * 1176 * 6
    assert found.activations == pytest.approx(1.1 * (working + shown), rel=0.02)


def test_batch_and_pixels_count_and_the_weights_stay() -> None:
    one, sixteen = need(batch=1), need(batch=16)
    assert sixteen.cache == 16 * one.cache
    assert sixteen.weights == one.weights
    assert need(pixels=PAIR // 4).total < need().total
    assert 12e9 < need().total < 24e9


def test_the_tower_of_the_first_version_is_as_wide_as_it_says() -> None:
    vision = CONFIG_3B["vision_config"]
    first = {name: value for name, value in vision.items() if name != "intermediate_size"}
    first |= {"embed_dim": 1280, "hidden_size": 2048, "mlp_ratio": 3420 / 1280}
    same = estimate(CONFIG_3B | {"vision_config": first}, PARAMETERS_3B, 2, 16, PAIR)
    assert same == need()


def test_what_fits_passes_and_what_does_not_says_what_would() -> None:
    check(24_000_000_000, "cuda:0")
    with pytest.raises(
        InvalidInput, match=r"16 images of 2097152 pixels need about 1\d\.\d GB"
    ) as refused:
        check(12_000_000_000, "cuda:0")
    says = str(refused.value)
    assert "cuda:0 has 12.0 GB free" in says
    pixels, batch = (
        int(re.search(pattern, says)[1])
        for pattern in (r"--max-pixels (\d+)", r"config.pbtxt to (\d+)")
    )
    assert need(pixels=pixels).total <= 12_000_000_000 < need(pixels=pixels + 1000).total
    assert need(batch=batch).total <= 12_000_000_000 < need(batch=batch + 1).total


def test_weights_that_alone_are_too_much_need_another_model() -> None:
    with pytest.raises(
        InvalidInput, match="use a smaller model, or one with fewer bytes per weight"
    ):
        check(4_000_000_000, "cpu")


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({}))
    assert stored_parameters(tmp_path) == 24


def test_free_memory_is_the_machines_or_the_cgroups_share(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_ram_bytes(meminfo, cgroup) == 5000 * 1024
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("1000\n")
    (cgroup / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    assert free_ram_bytes(meminfo, cgroup) == 5000 * 1024
    (cgroup / "memory.max").write_text("4000\n")
    assert free_ram_bytes(meminfo, cgroup) == 4000 - 1000 + 300


def test_this_machine_has_some() -> None:
    assert free_ram_bytes() > 100_000_000
