"""A group on disk without a server: real crops of a real panorama, OpenCV in the network's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image as PILImage

from panotriton.groups.folder import write_group
from panotriton.pipeline.camera import sample_cameras
from panotriton.pipeline.group import interpolate_cameras, interpolate_views, make_pairs
from panotriton.pipeline.results import StageTime, Timings, group_from_tensors

PANORAMAS = Path(__file__).parent / "data" / "panoramas"
STAGES = (
    StageTime("preprocess", 1, 1, 0.3, 92.0),
    StageTime("osediff", 2, 70, 14.0, 26400.0),
    StageTime("osediff_unet", 18, 70, 300.0, 9800.0),
    StageTime("qwen_scorer", 1, 1, 1.0, 9800.0),
)


def write_example(
    root: Path,
    scores: Sequence[float],
    kept: Sequence[int],
    panoramas: tuple[Path, Path] = (PANORAMAS / "courtyard.jpg", PANORAMAS / "interior.jpg"),
    group_id: int = 1,
    crop_size: int = 64,
    interpolations: int = 9,
    description: str = "A bright room. A sofa stands in the middle.",
    **about: Any,
) -> Path:
    """Write group `group_id` below `root`; scores are the 16 final scores, NaN for none.

    Panoramas that do not exist are recorded all the same; their place is taken by a known one.
    """
    cameras = sample_cameras(group_id)
    pairs, spheres = make_pairs([_pixels(path) for path in panoramas], cameras, crop_size)
    keep = np.array(kept, np.int32)
    between = interpolate_cameras(cameras, keep, interpolations)
    views = interpolate_views(spheres, between)
    empty = np.empty((0, 2 * crop_size, 2 * crop_size, 3), np.uint8)
    tensors = {
        "CAMERAS": cameras,
        "PAIRS": pairs,
        "PAIRS_SR": np.stack([_sharper(pair) for pair in pairs]),
        "SCORE": np.array(scores, np.float32),
        "SUB_SCORES": np.full((16, 5), 0.5, np.float32),
        "RAW_OUTPUT": np.array([b"Final Score: ?"] * 16, np.object_),
        "KEPT": keep,
        "DESCRIPTION": np.array([description.encode()] * len(keep), np.object_),
        "DESCRIPTION_ERROR": np.array([b""] * len(keep), np.object_),
        "INTERPOLATED": views,
        "INTERPOLATED_CAMERAS": between,
        "INTERPOLATED_SR": np.stack([_sharper(view) for view in views]) if len(views) else empty,
    }
    facts = {
        "panoramas": [str(path) for path in panoramas],
        "options": {"seed": group_id, "threshold": 0.7, "interpolations": interpolations},
        "version": "0.1.0",
        "seconds": 41.3,
        "stages": [asdict(stage) for stage in STAGES],
    }
    group = group_from_tensors(tensors, Timings(total_ms=41300.0))
    bases = (panoramas[0].stem, panoramas[1].stem)
    return write_group(group, root, bases, facts | about, group_id=group_id)


def _pixels(path: Path) -> np.ndarray:
    source = path if path.is_file() else PANORAMAS / "forest.jpg"
    return np.asarray(PILImage.open(source).convert("RGB"))


def _sharper(image: np.ndarray) -> np.ndarray:
    large = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_LANCZOS4)
    return cv2.addWeighted(large, 2.0, cv2.GaussianBlur(large, (0, 0), 1.6), -1.0, 0)
