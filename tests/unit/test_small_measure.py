"""What the small super-resolution is measured with."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

from panotriton_export.train_small.measure import gmsd, load_lpips, psnr, ssim
from panotriton_export.train_small.super_resolution import data
from panotriton_export.train_small.super_resolution.autoencoder import Decoder, halve
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.training import Base, to_tensor
from panotriton_export.train_small.super_resolution.unet import balance


def write_backbone(path: Path) -> torch.nn.Module:
    """An AlexNet with random weights, in torchvision's format."""
    torch.manual_seed(0)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), path)
    return backbone


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_takes_a_backbone_in_torchvisions_format(tmp_path: Path) -> None:
    write_backbone(tmp_path / "alexnet.pth")
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


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_lpips_takes_flaxs_arrays_and_nothing_that_runs(tmp_path: Path) -> None:
    backbone = write_backbone(tmp_path / "alexnet.pth")
    layers = {}
    for index, place in enumerate((0, 3, 6, 8, 10)):
        layer = backbone.features[place]
        kernel = layer.weight.detach().permute(2, 3, 1, 0).contiguous().numpy()
        layers[f"Conv_{index}"] = {"kernel": kernel, "bias": layer.bias.detach().numpy()}
    (tmp_path / "alexnet.ckpt").write_bytes(pickle.dumps({"AlexNet_0": layers}, protocol=3))
    truth = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    found = [
        load_lpips(tmp_path / f"alexnet.{kind}")(255 - truth, truth) for kind in ("pth", "ckpt")
    ]
    assert found[0] == found[1] > 0
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps(print))
    with pytest.raises(pickle.UnpicklingError, match="builtins.print: expected NumPy arrays"):
        load_lpips(tmp_path / "bad.ckpt")


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two smooth scenes: (spoilt, whole), each (2, 3, 192, 192)."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (2, 12, 12, 3), np.uint8)
    whole = np.stack([cv2.resize(each, (192, 192)) for each in smooth])
    spoilt = np.stack([data.enlarge(each[::2, ::2]) for each in whole])
    return to_tensor(spoilt), to_tensor(whole)


@pytest.fixture(scope="module")
def base(pair: tuple[torch.Tensor, torch.Tensor]) -> Base:
    """As if something had been learnt: every weight moved, attention's left out."""
    torch.manual_seed(0)
    base = Base(gain=1.0023).eval()
    base.decoder.begin(*pair)
    with torch.no_grad():
        for group in base.groups("finish"):
            for parameter in group["params"]:
                parameter.add_(0.1 * parameter.std(correction=0) * torch.randn_like(parameter))
    balance(base.unet)
    return base


def test_a_new_network_is_about_bicubic(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    spoilt, _ = pair
    decoder = Decoder()
    decoder.begin(*pair)
    with torch.inference_mode():
        made = decoder(halve(spoilt))
    assert (made - spoilt)[..., 8:-8, 8:-8].abs().mean() < 0.05


@pytest.mark.parametrize("shade", [None, -1.0, 1.0])
def test_the_saved_networks_do_what_was_trained(
    base: Base, pair: tuple[torch.Tensor, torch.Tensor], shade: float | None
) -> None:
    """Group norms and all, on half-dark, black and white pictures of another size than a crop's."""
    spoilt = pair[0].clone()
    if shade is not None:
        spoilt[..., 40:] = shade
    model = SmallOsediff().eval()
    base.write(model)
    prompt = model.embed(["", "a red house"])
    with torch.inference_mode():
        wanted, made = base(spoilt, prompt), model(spoilt, prompt)
    assert wanted.std() > 0.1
    assert (made - wanted).abs().max() < 2e-3  # a quarter of a grey level
