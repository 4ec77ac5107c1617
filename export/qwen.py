"""Point the repository's `qwen` model at a Hugging Face folder, and give its fronts their prompts.

Two engines serve the folder: PyTorch inside the model `qwen`, or Triton's vLLM backend as a further
model, `qwen_vllm`, which `qwen` asks. The fronts, their prompts and the parser are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from panotriton.errors import ExportError
from panotriton.pipeline.files import PROMPT, settings_file
from panotriton.server.repository import copy_model

__all__ = ["ENGINES", "check_folder", "export_qwen"]

ENGINES = ("torch", "vllm")

ARCHITECTURES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_LEAST_PIXELS = 4 * 28 * 28
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def export_qwen(
    model: Path,
    repository: Path,
    *,
    prompt_file: Path | None = None,
    max_pixels: int | None = None,
    dtype: str = "auto",
    copy: bool = False,
    engine: str = "torch",
    vision_size: tuple[int, int] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Make `repository`'s qwen, qwen_scorer and qwen_describer serve the folder `model`.

    The folder is used where it lies, or copied into the repository with `copy`. No code in it is
    run. prompt_file replaces the default quality prompt. dtype: auto (what the weights are stored
    in; bf16 on a GPU), bf16, fp16 or fp32. max_pixels bounds an image in the processor, else the
    folder's own bound counts; it is the cheapest way to speed, and changes scores. vision_size:
    export the vision tower too, for images of that height and width. Raises ExportError for a
    folder that is not a complete Qwen-VL one, and for options that do not go together.
    """
    _check_options(dtype, max_pixels, engine, vision_size)
    settings: dict[str, Any] = {"engine": engine, "architecture": check_folder(model)}
    version = repository / "qwen" / "1"
    for name in ("qwen_vision", "qwen_vllm"):  # what an earlier export of another folder left
        shutil.rmtree(repository / name, ignore_errors=True)
    if engine == "vllm":
        settings |= _vllm(model, repository, max_pixels, _DTYPES[dtype])
    else:
        if copy:
            shutil.rmtree(version / "weights", ignore_errors=True)
            shutil.copytree(model, version / "weights")
        settings |= {
            "weights": "weights" if copy else str(model.absolute()),
            "dtype": _DTYPES[dtype],
            "max_pixels": max_pixels,
            "vision_grid": _vision(model, repository, vision_size, max_pixels, report),
        }
    (version / settings_file("qwen")).write_text(json.dumps(settings, indent=1) + "\n")
    prompt = prompt_file.read_text(encoding="utf-8") if prompt_file else _prompt("quality.txt")
    _write_prompt(repository / "qwen_scorer", prompt)
    _write_prompt(repository / "qwen_describer", _prompt("describe.txt"))
    report(f"qwen: {settings['architecture']} from {model}, engine {engine}")


def _check_options(
    dtype: str, max_pixels: int | None, engine: str, vision_size: tuple[int, int] | None
) -> None:
    if dtype not in _DTYPES:
        raise ExportError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if max_pixels is not None and max_pixels < _LEAST_PIXELS:
        raise ExportError(f"max_pixels is {max_pixels}; expected at least {_LEAST_PIXELS}")
    if engine not in ENGINES:
        raise ExportError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "vllm" and vision_size is not None:
        raise ExportError("vLLM has a vision tower of its own: leave --export-vision out")


def _vllm(model: Path, repository: Path, max_pixels: int | None, dtype: str) -> dict[str, Any]:
    from panotriton_export.qwen_vllm import export_vllm  # noqa: PLC0415 transformers

    settings: dict[str, Any] = export_vllm(model, repository, max_pixels=max_pixels, dtype=dtype)
    return settings


def _vision(
    model: Path,
    repository: Path,
    size: tuple[int, int] | None,
    max_pixels: int | None,
    report: Callable[[str], None],
) -> tuple[int, int] | None:
    """The grid that was exported."""
    if size is None:
        return None
    from panotriton_export.qwen_vision import NAME, export_vision  # noqa: PLC0415 torch

    copy_model(NAME, repository)
    grid: tuple[int, int]
    grid, results = export_vision(model, repository, size, max_pixels)
    for result in results:
        report(str(result))
    return grid


def check_folder(model: Path) -> str:
    """The folder's architecture; ExportError names what is missing and where it comes from."""
    config = _json(model / "config.json")
    architecture = str((config.get("architectures") or ["none"])[0])
    if architecture not in ARCHITECTURES:
        raise ExportError(
            f"{model}/config.json is for {architecture}; expected one of {', '.join(ARCHITECTURES)}"
        )
    if not list(model.glob("*.safetensors")):
        found = [path.name for path in model.glob("*.bin")]
        hint = f" ({found[0]} is a pickle, which is not loaded: convert it)" if found else ""
        raise ExportError(f"{model} has no *.safetensors weights{hint}")
    _check_index(model)
    for kind, names in (("processor", _PROCESSOR_FILES), ("tokenizer", ("tokenizer_config.json",))):
        if not any((model / name).is_file() for name in names):
            raise ExportError(
                f"{model} has no {kind} ({' or '.join(names)}): copy the whole folder"
            )
    if not _has_chat_template(model):
        raise ExportError(f"{model} has no chat template ({' or '.join(_CHAT_TEMPLATES)})")
    return architecture


def _check_index(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_json(index)["weight_map"].values())
        missing = sorted(name for name in shards if not (model / name).is_file())
        if missing:
            raise ExportError(
                f"{model} lacks {len(missing)} of {len(shards)} shards: {missing[0]} …"
            )


def _has_chat_template(model: Path) -> bool:
    if any((model / name).is_file() for name in _CHAT_TEMPLATES):
        return True
    return "chat_template" in _json(model / "tokenizer_config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ExportError(f"{path} not found; expected a Hugging Face Qwen-VL folder") from error
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _prompt(name: str) -> str:
    return (resources.files("panotriton.prompts") / name).read_text(encoding="utf-8")


def _write_prompt(model: Path, prompt: str) -> None:
    if not prompt.strip():
        raise ExportError("the prompt file is empty")
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / PROMPT).write_text(prompt, encoding="utf-8")
