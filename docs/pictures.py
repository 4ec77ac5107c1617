"""Make the README's first two pictures from a group.

python docs/pictures.py                          of the newest group that `make demo` has left in out/demo
python docs/pictures.py GROUP --interval 5 --output FOLDER

sequence.jpg: the left view, three in between and the right view of a kept interval. before_after.jpg: of all
super-resolved views the place that super-resolution changes most, in bicubic and in the group's own pixels,
enlarged three times without smoothing.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from panotriton import Camera
from panotriton.pipeline.camera import Sphere

ROOT = Path(__file__).parent.parent
QUALITY = 88
VIEWS, VIEW_PX = 5, 200
PLACE = (110, 168)  # rows, columns that are shown
ENLARGED = 3
GAP_PX = 8


def sequence(group, images):
    """One row of views."""
    places = np.linspace(0, len(images) - 1, VIEWS).round().astype(int)
    paths = [group / images[place]["path"] for place in places]
    views = (Image.open(path).resize((VIEW_PX, VIEW_PX)) for path in paths)
    return np.concatenate([np.asarray(view) for view in views], axis=1)


def bicubic(sphere, image, options):
    """The view as it was before super-resolution, enlarged by Pillow."""
    view = sphere.crop(Camera(**image["params"]))
    larger = (options["crop_size"] * options["upscale"],) * 2
    return np.asarray(Image.fromarray(view).resize(larger, Image.Resampling.BICUBIC))


def most_changed(group, record):
    """(bicubic, super-resolved), each PLACE large."""
    found = []
    options = record["options"]
    panoramas = (np.asarray(Image.open(ROOT / path).convert("RGB")) for path in record["panoramas"])
    spheres = [Sphere(each, options["crop_size"], options["sphere_size"]) for each in panoramas]
    for interval in record["intervals"]:
        for sequence in interval["sequences"]:
            for image in sequence["images"][1:-1]:
                before = bicubic(spheres[sequence["panorama"] - 1], image, options)
                after = np.asarray(Image.open(group / image["path"]).convert("RGB"))
                change = np.abs(after.astype(np.float32) - before).mean(2)
                mean = cv2.blur(change, PLACE[::-1], anchor=(0, 0))
                mean = mean[: -PLACE[0], : -PLACE[1]]
                y, x = np.unravel_index(mean.argmax(), mean.shape)
                place = slice(y, y + PLACE[0]), slice(x, x + PLACE[1])
                found.append((mean.max(), len(found), before[place], after[place]))
    return max(found)[2:]


def side_by_side(images):
    """Enlarged, with a white gap."""
    large = [image.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1) for image in images]
    gap = np.full((large[0].shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([large[0], gap, large[1]], axis=1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", nargs="?", type=Path, help="(newest of out/demo)")
    parser.add_argument("--interval", type=int, help="of sequence.jpg (the first that was kept)")
    parser.add_argument("--panorama", type=int, choices=(1, 2), default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    chosen = parser.parse_args()
    group = chosen.group or max((ROOT / "out" / "demo").glob("group_*"), default=None)
    if group is None:
        parser.error("no group in out/demo: run `make demo` first, or name one")
    record = json.loads((group / "group_info.json").read_text())
    kept = {interval["interval"]: interval["sequences"] for interval in record["intervals"]}
    if not kept:
        parser.error(f"{group} has kept no interval")
    sequences = kept.get(chosen.interval or min(kept))
    if sequences is None:
        parser.error(f"interval {chosen.interval} was not kept; kept: {sorted(kept)}")
    pictures = {
        "sequence.jpg": sequence(group, sequences[chosen.panorama - 1]["images"]),
        "before_after.jpg": side_by_side(most_changed(group, record)),
    }
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(chosen.output / name, quality=QUALITY)
        print(chosen.output / name)


if __name__ == "__main__":
    main()
