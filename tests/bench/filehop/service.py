"""What the three services share: images as JPEG files, and werkzeug's development server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from flask import Flask
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


def new_app(name: str) -> Flask:
    """An app that answers GET /health."""
    app = Flask(name)
    app.add_url_rule("/health", view_func=lambda: {"status": "healthy"})
    return app


def read_image(path: str | Path) -> U8:
    """The file's pixels, (H, W, 3) RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(f"{path} is no image")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def write_image(path: Path, image: U8) -> str:
    """Write a JPEG of OpenCV's default quality, 95; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return str(path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def serve(app: Flask) -> None:
    """Serve on --port of this machine until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    app.run("127.0.0.1", parser.parse_args().port, threaded=True)
