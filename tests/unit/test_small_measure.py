"""What the small super-resolution is measured with."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from panotriton_export.train_small.measure import load_lpips, psnr, ssim


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
