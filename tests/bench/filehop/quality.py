"""Pair files → scores, view files → descriptions: Qwen-VL in eager PyTorch, one image at a time."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from flask import request

from filehop.service import new_app, read_image, serve
from panotriton.models.qwen import QwenVL
from panotriton.pipeline.quality import parse_reply
from panotriton_export.presets import SMALL

app = new_app("quality")


@app.post("/evaluate_pairs")
def evaluate_pairs() -> dict[str, Any]:
    """Each pair's whole reply is generated and read."""
    results = []
    for pair in request.get_json()["pairs_data"]:
        reply = ask(pair["pair_image"], "quality", 512)
        results.append(pair | {"final_score": str(parse_reply(reply).final_score), "raw": reply})
    return {"success": True, "results": results}


@app.post("/generate_descriptions")
def generate_descriptions() -> dict[str, Any]:
    paths = request.get_json()["image_paths"]
    found = [{"image_path": path, "description": ask(path, "describe", 256)} for path in paths]
    return {"success": True, "results": found}


def ask(path: str, question: str, max_new_tokens: int) -> str:
    prompt = files("panotriton.prompts").joinpath(f"{question}.txt").read_text("utf-8").strip()
    (reply,) = app.config["qwen"].reply([read_image(path)], prompt, max_new_tokens)
    return str(reply)


if __name__ == "__main__":
    app.config["qwen"] = QwenVL(SMALL / "qwen")
    serve(app)
