"""The training of the small super-resolution goes on where it stopped, and leaves the real formats."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from panotriton_export.train_small.measure import load_model, upscale
from panotriton_export.train_small.super_resolution import data, training
from panotriton_export.train_small.super_resolution.loss import loss
from panotriton_export.train_small.super_resolution.training import Run

STAGES = {"head": 4, "decoder": 2, "base": 4, "finish": 8, "adapters": 2}
STEPS = sum(STAGES.values())
SIDES = (32, 40)  # px of crops


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something smooth under each name."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name in data.SOURCES:
        image = cv2.resize(rng.integers(0, 256, (24, 24, 3), np.uint8), (200, 200))
        cv2.imwrite(str(folder / name), image)
    return folder


def run(photographs: Path, output: Path) -> Run:
    """As the command begins, or goes on with what it finds."""
    torch.manual_seed(7)
    return Run(
        argparse.Namespace(
            images=[photographs],
            output=output,
            state=output.with_suffix(".state.pt"),
            steps=STEPS,
            seed=7,
            pixels=2048,
            rate=2e-3,
            save_every=12,
        )
    )


def test_a_stopped_training_goes_on_to_the_same_weights(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "STAGES", STAGES)
    monkeypatch.setattr(training, "SIZES", SIDES)
    monkeypatch.setattr(training, "_BEGIN", (4, 64))
    run(photographs, tmp_path / "whole").run()
    stopped = run(photographs, tmp_path / "stopped")
    learn = stopped._learn

    def stop_at(spoilt: torch.Tensor, wanted: torch.Tensor) -> float:
        if stopped.step == 15:  # three steps after the last save, in the middle of a stage
            raise KeyboardInterrupt
        return learn(spoilt, wanted)

    stopped._learn = stop_at  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = run(photographs, tmp_path / "stopped")
    assert (resumed.name, resumed.step) == ("finish", 12)
    resumed.run()

    files = [path for path in (tmp_path / "whole").rglob("*.safetensors") if path.is_file()]
    assert len(files) == 4  # VAE, UNet, text encoder, adapters
    for path in files:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes(), path

    enlarged, raw, _ = upscale(load_model(tmp_path / "whole"), np.full((24, 40, 3), 90, np.uint8))
    assert raw.shape == enlarged.shape == (48, 80, 3)


def test_the_loss_of_tones_tells_a_shift_of_colour_from_detail() -> None:
    wanted = torch.zeros(1, 3, 48, 48)
    shift = torch.full_like(wanted, 0.1)
    detail = shift * (torch.arange(48) % 2 * 2 - 1)  # stripes, as far off
    assert loss(shift, wanted) == pytest.approx(loss(detail, wanted).item())
    assert loss(shift, wanted, 0.5) > 1.3 * loss(detail, wanted, 0.5)


def test_a_recoloured_target_has_the_same_channels_in_some_order() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    orders = set()
    for seed in range(20):
        made = data.recolour(image, np.random.default_rng(seed))
        (order,) = [
            each for each in itertools.permutations(range(3)) if (image[..., each] == made).all()
        ]
        orders.add(order)
    assert len(orders) == 6
