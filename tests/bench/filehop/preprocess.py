"""Panorama file → pair files; pair cameras → files of the views in between. One crop at a time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from flask import request

from filehop.service import U8, new_app, read_image, serve, write_image, write_json
from panotriton.pipeline.camera import Camera, interval_bounds, lerp, sample_cameras
from panotriton.pipeline.contract import INTERVALS

app = new_app("preprocess")


@app.post("/preprocess_for_group")
def preprocess_for_group() -> dict[str, Any]:
    """Crop the eight pairs of one panorama."""
    body = request.get_json()
    source, folder = Path(body["image_path"]), Path(body["group_dir"])
    # The cameras that the ensemble draws from this seed; the original drew them itself.
    cameras = sample_cameras(body["seed"])[0 if body["is_first"] else 1]
    sphere = resized(source, body["crop_size"])
    pairs = []
    for k in range(INTERVALS):
        left, right = (Camera.from_array(row) for row in cameras[k])
        pair = np.hstack([crop(sphere, left), crop(sphere, right)])
        name = f"{source.stem}_yaw{k + 1:02d}"
        path = write_image(folder / "pairs" / f"{name}_pair.jpg", pair)
        for side, camera in (("left", left), ("right", right)):
            write_json(folder / "params" / f"{name}_{side}_params.json", asdict(camera))
        pairs.append(
            {
                "pair_image": path,
                "main_params": asdict(left),
                "rand_params": asdict(right),
                "interval": k + 1,
                "yaw_interval": interval_bounds(k + 1),
                "group_id": body["group_id"],
            }
        )
    return {"success": True, "results": pairs}


@app.post("/generate_interpolated_images")
def generate_interpolated_images() -> dict[str, Any]:
    """Crop the views between left and right camera of each kept pair."""
    body = request.get_json()
    results = []
    for split in body["split_results"]:
        source = body[f"panorama{split['panorama']}_path"]
        sphere = resized(Path(source), body["crop_size"])
        results.append(split | {"interpolated_images": views(split, sphere, body)})
    return {"success": True, "results": results}


def views(split: dict[str, Any], sphere: U8, body: dict[str, Any]) -> list[dict[str, Any]]:
    left, right = Camera(**split["main_params"]), Camera(**split["rand_params"])
    stem = Path(split["left_image"]).stem
    count = body["num_interpolations"]
    found = []
    for i in range(1, count + 1):
        camera = lerp(left, right, i / (count + 1))
        path = Path(body["group_dir"]) / "interpolated" / f"{stem}_interp_{i:02d}.jpg"
        written = write_image(path, crop(sphere, camera))
        found.append({"path": written, "weight_idx": i, "params": asdict(camera)})
    return found


def resized(path: Path, size: int) -> U8:
    """The panorama at crop size: once per request, though a crop on its own would do it again."""
    return np.asarray(cv2.resize(read_image(path), (size, size), interpolation=cv2.INTER_AREA))


def crop(sphere: U8, camera: Camera) -> U8:
    """One view (S, S, 3), by the formulas as they are written, in float64, on a grid of its own."""
    size = sphere.shape[0]
    yaw, pitch, roll, vfov = np.radians([camera.yaw, camera.pitch, camera.roll, camera.vfov])
    s = np.sin(vfov / 2)
    f = 0.5 * (size / 2) * (camera.xi + np.sqrt(1 - s**2)) / s
    u, v = np.meshgrid(np.arange(size), np.arange(size))
    x, y = (u - size / 2) / f, -(v - size / 2) / f
    r2 = x**2 + y**2
    a = (camera.xi + np.sqrt(1 + (1 - camera.xi**2) * r2)) / (r2 + 1)
    point = np.stack([x * a, y * a, a - camera.xi], axis=-1)  # (S, S, 3)
    x, y, z = np.moveaxis(point @ rotation(yaw, pitch, roll).T, -1, 0)
    theta, phi = np.arctan2(x, z), np.arctan2(y, np.sqrt(x**2 + z**2))
    map_x = ((theta + np.pi) / (2 * np.pi) * (size - 1)).astype(np.float32)
    map_y = ((np.pi / 2 - phi) / np.pi * (size - 1)).astype(np.float32)
    return np.asarray(cv2.remap(sphere, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP))


def rotation(yaw: float, pitch: float, roll: float) -> Any:
    """R_az(yaw) · R_el(-pitch) · R_roll(roll)ᵀ of angles in radians, (3, 3)."""
    (ca, sa), (ce, se), (cr, sr) = ((np.cos(t), np.sin(t)) for t in (yaw, -pitch, roll))
    azimuth = np.array([[ca, 0, -sa], [0, 1, 0], [sa, 0, ca]])
    elevation = np.array([[1, 0, 0], [0, ce, -se], [0, se, ce]])
    spin = np.array([[cr, sr, 0], [-sr, cr, 0], [0, 0, 1]])
    return azimuth @ elevation @ spin.T


if __name__ == "__main__":
    serve(app)
