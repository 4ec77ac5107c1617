"""Image files → super-resolved files: OSEDiff in eager PyTorch, one image and one tile at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from flask import request

from filehop.service import new_app, read_image, serve, write_image
from panotriton_export.osediff import reference
from panotriton_export.presets import LATENT_TILE, SMALL, write_small_checkpoint

app = new_app("super_resolution")


def load() -> reference.Pipeline:
    """The small preset's weights, as PyTorch modules on all cores."""
    reference.LATENT_TILE = LATENT_TILE  # the tile that the small preset is exported with
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_small_checkpoint(Path(folder) / "osediff.pkl")
        return reference.load_pipeline(SMALL / "osediff" / "base", checkpoint)


@app.post("/super_resolution_batch")
def super_resolution_batch() -> dict[str, Any]:
    """A batch in name: a loop over files."""
    body = request.get_json()
    results = []
    for path in map(Path, body["input_paths"]):
        sharp = reference.super_resolve(
            app.config["pipeline"], read_image(path), align=body["align_method"]
        )
        written = write_image(Path(body["output_dir"]) / path.name, sharp)
        results.append({"success": True, "output_path": written})
    return {"success": True, "results": results}


if __name__ == "__main__":
    app.config["pipeline"] = load()
    serve(app)
