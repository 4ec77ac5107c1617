"""What the small super-resolution is measured with."""

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

from panotriton_export.train_small.measure import gmsd, load_lpips, psnr, ssim
from panotriton_export.train_small.super_resolution import data
from panotriton_export.train_small.super_resolution.codec import start_as_codec
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.soap import Soap
from panotriton_export.train_small.super_resolution.training import to_tensor


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_takes_a_backbone_in_torchvisions_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alexnet.pth")
    measure = load_lpips(tmp_path / "alexnet.pth")
    rng = np.random.default_rng(0)
    truth = rng.integers(60, 190, (96, 96, 3), np.uint8)
    near, far = (
        np.clip(truth + rng.normal(0, s, truth.shape), 0, 255).astype(np.uint8) for s in (3, 40)
    )
    assert measure(truth, truth) == pytest.approx(0, abs=1e-6)
    assert 0 < measure(near, truth) < measure(far, truth)
    assert psnr(near, truth) > psnr(far, truth)
    assert 1 > ssim(near, truth) > ssim(far, truth)
    assert gmsd(truth, truth) == 0
    assert 0 < gmsd(near, truth) < gmsd(far, truth)


def test_the_optimiser_goes_downhill_and_goes_on_from_its_state() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(256, 12, generator=generator)  # a mean larger than what differs
    wanted = (inputs - 3) @ torch.randn(12, 2, generator=generator) * 0.05

    def learn(layer: torch.nn.Linear, optimiser: Soap, steps: int) -> float:
        for _ in range(steps):
            optimiser.zero_grad()
            error = (layer(inputs) - wanted).square().mean()
            torch.autograd.backward(error)
            optimiser.step()
        return error.item()

    first, second = (torch.nn.Linear(12, 2, bias=False) for _ in range(2))
    torch.nn.init.zeros_(first.weight)
    optimiser = Soap(first.parameters(), lr=3e-3)
    learn(first, optimiser, 60)
    second.load_state_dict(first.state_dict())
    resumed = Soap(second.parameters(), lr=3e-3)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    assert learn(first, optimiser, 60) == learn(second, resumed, 60)
    assert learn(first, optimiser, 60) < 0.05 * wanted.square().mean()


def test_a_new_network_is_about_bicubic() -> None:
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (2, 12, 12, 3), np.uint8)
    whole = np.stack([cv2.resize(each, (192, 192)) for each in smooth])
    spoilt = np.stack([data.enlarge(each[::2, ::2]) for each in whole])
    model = SmallOsediff().eval()
    start_as_codec(model.vae, to_tensor(spoilt), to_tensor(whole))
    with torch.inference_mode():
        made = model(to_tensor(spoilt), model.embed(["", ""]))
    assert (made - to_tensor(spoilt))[..., 8:-8, 8:-8].abs().mean() < 0.05
