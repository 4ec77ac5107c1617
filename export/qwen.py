"""Point the repository's `qwen` model at a Hugging Face folder, and give its fronts their prompts.

Two engines serve the folder: PyTorch inside the model `qwen`, or Triton's vLLM backend as a further
model, `qwen_vllm`, which `qwen` asks. The fronts, their prompts and the parser are the same.
"""

from __future__ import annotations

import codecs
import json
import shutil
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from panotriton.errors import ExportError, InvalidInput, PanotritonError, brief, quoted
from panotriton.pipeline.files import PROMPT, settings_file
from panotriton.server.repository import copy_model, copy_models
from panotriton_export.configs import name_weights
from panotriton_export.weights import WeightsError, check_weights

__all__ = ["ENGINES", "check_folder", "export_qwen", "read_prompt"]

ENGINES = ("torch", "vllm")
DECODING = ("dynamic", "static")

ARCHITECTURES = (
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
)
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MACHINE = "Where it is this machine that cannot ask it, export with --no-question"
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
    decode: str = "dynamic",
    question: bool = True,
    with_code: bool = False,
    report: Callable[[str], None] = print,
) -> None:
    """Make `repository`'s qwen, qwen_scorer and qwen_describer serve the folder `model`.

    The folder is used where it lies, or copied into the repository with `copy`. No code in it is
    run. prompt_file replaces the default quality prompt. dtype: auto (what the weights are stored
    in; bf16 on a GPU), bf16, fp16 or fp32. max_pixels bounds an image in the processor, else the
    folder's own bound counts; it is the cheapest way to speed, and changes scores. vision_size:
    export the vision tower too, for images of that height and width. decode: dynamic, or static for steps of
    a reply that are compiled on a GPU, see `QwenVL`. question: ask the model one
    by PyTorch before anything is written, which takes its memory. with_code: then put the code of all models
    there, too. Raises ExportError for a folder
    that is not a complete Qwen-VL one, or whose answer is none, and for options that do not go
    together; InvalidInput for a prompt file that is no text.
    """
    _check_options(dtype, max_pixels, engine, vision_size, decode)
    prompt = read_prompt(prompt_file) if prompt_file else _prompt("quality.txt")
    settings: dict[str, Any] = {"engine": engine, "architecture": check_folder(model, engine)}
    if question and not _quantized(model):
        _ask(model, prompt, max_pixels, _DTYPES[dtype], report)
    if with_code:
        copy_models(repository)
    version = repository / "qwen" / "1"
    for name in ("qwen_vision", "qwen_vllm"):  # what an earlier export of another folder left
        shutil.rmtree(repository / name, ignore_errors=True)
    if engine == "vllm":
        settings |= _vllm(model, repository, max_pixels, _DTYPES[dtype])
    else:
        settings |= {
            "weights": _place(model, version / "weights", copy),
            "dtype": _DTYPES[dtype],
            "decode": decode,
            "max_pixels": max_pixels,
            "vision_grid": _vision(model, repository, vision_size, max_pixels, report),
        }
    (version / settings_file("qwen")).write_text(json.dumps(settings, indent=1) + "\n")
    _write_prompt(repository / "qwen_scorer", prompt)
    _write_prompt(repository / "qwen_describer", _prompt("describe.txt"))
    asked = [repository / front / "1" / PROMPT for front in ("qwen_scorer", "qwen_describer")]
    how = {
        name: value for name, value in settings.items() if name != "weights"
    }  # not: where they lie
    how_bytes = json.dumps(how, sort_keys=True).encode()
    name_weights(repository / "qwen", *sorted(model.glob("*.safetensors")), *asked, how_bytes)
    report(f"qwen: {settings['architecture']} from {model}, engine {engine}")


def _place(model: Path, link: Path, copy: bool) -> str:
    """Where the server finds the folder: itself, a copy, or a link where its path is not ASCII.

    The Python of tritonserver's models opens no other names.
    """
    if link.is_symlink():
        link.unlink()
    shutil.rmtree(link, ignore_errors=True)
    if copy:
        shutil.copytree(model, link)
    elif not str(model.absolute()).isascii():
        link.symlink_to(model.absolute())
    else:
        return str(model.absolute())
    return link.name


def _ask(
    model: Path, prompt: str, max_pixels: int | None, dtype: str, report: Callable[[str], None]
) -> None:
    """One real question: what loads and cannot answer is found here and not by a server."""
    import torch  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    from panotriton.models.qwen import QwenVL  # noqa: PLC0415

    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": dtype, "device": device, "max_batch": 1, "max_pixels": max_pixels}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about their own next releases
            reply = QwenVL(model, **options).try_out(prompt)
    except PanotritonError as error:
        raise ExportError(f"{model} does not answer a question: {error}. {_MACHINE}") from error
    except Exception as error:  # whatever a folder makes transformers raise
        raise ExportError(
            f"{model} does not answer a question ({type(error).__name__}: {brief(error)}): copy the "
            f"whole folder again. {_MACHINE}"
        ) from error
    report(f"qwen: asked about a picture, begins {quoted(reply)}")


def _quantized(model: Path) -> str:
    """By what method, if any."""
    return str(_json(model / "config.json").get("quantization_config", {}).get("quant_method", ""))


def _check_options(
    dtype: str,
    max_pixels: int | None,
    engine: str,
    vision_size: tuple[int, int] | None,
    decode: str,
) -> None:
    if dtype not in _DTYPES:
        raise ExportError(f"dtype is {quoted(dtype)}; expected one of {', '.join(_DTYPES)}")
    if max_pixels is not None and max_pixels < _LEAST_PIXELS:
        raise ExportError(f"max_pixels is {max_pixels}; expected at least {_LEAST_PIXELS}")
    if engine not in ENGINES:
        raise ExportError(f"engine is {quoted(engine)}; expected one of {', '.join(ENGINES)}")
    if engine == "vllm" and vision_size is not None:
        raise ExportError("vLLM has a vision tower of its own: leave --export-vision out")
    if decode not in DECODING:
        raise ExportError(f"decode is {quoted(decode)}; expected one of {', '.join(DECODING)}")
    if engine == "vllm" and decode != DECODING[0]:
        raise ExportError("vLLM decodes in its own way: leave --decode out")


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


def check_folder(model: Path, engine: str = "torch") -> str:
    """The folder's architecture; ExportError names what is missing and where it comes from."""
    config = _json(model / "config.json")
    architecture = str((config.get("architectures") or ["none"])[0])
    if architecture not in ARCHITECTURES:
        raise WeightsError(
            f"{brief(model)}/config.json is for {architecture}; expected one of {', '.join(ARCHITECTURES)}"
        )
    if (model / "adapter_config.json").is_file():
        raise WeightsError(
            f"{brief(model)} holds adapters (adapter_config.json); expected whole weights: merge them into "
            "their base first, with peft's merge_and_unload"
        )
    if engine == "torch" and (method := _quantized(model)):
        raise WeightsError(
            f"{brief(model)} is quantized ({method}), which PyTorch here does not run: export it with "
            "--engine vllm, for a GPU, or name the folder of the unquantized model"
        )
    if not list(model.glob("*.safetensors")):
        found = [path.name for path in model.glob("*.bin")]
        hint = f" ({found[0]} is a pickle, which is not loaded: convert it)" if found else ""
        raise WeightsError(f"{brief(model)} has no *.safetensors weights{hint}")
    for path in sorted((*model.glob("*.safetensors"), *model.glob("*.json"))):
        check_weights(path)
    _check_index(model)
    for kind, names in (("processor", _PROCESSOR_FILES), ("tokenizer", ("tokenizer_config.json",))):
        if not any((model / name).is_file() for name in names):
            raise WeightsError(
                f"{brief(model)} has no {kind} ({' or '.join(names)}): copy the whole folder"
            )
    if not _has_chat_template(model):
        raise WeightsError(
            f"{brief(model)} has no chat template: expected {' or '.join(_CHAT_TEMPLATES)}, or one in "
            "tokenizer_config.json"
        )
    return architecture


def _check_index(model: Path) -> None:
    index = model / "model.safetensors.index.json"
    if index.is_file():
        shards = set(_json(index)["weight_map"].values())
        missing = sorted(name for name in shards if not (model / name).is_file())
        if missing:
            raise WeightsError(
                f"{brief(model)} lacks {len(missing)} of {len(shards)} shards: {missing[0]} …"
            )
    elif not (model / "model.safetensors").is_file():
        found = sorted(path.name for path in model.glob("*.safetensors"))
        raise WeightsError(
            f"{brief(model)} has {len(found)} files of weights ({found[0]} …) and no {index.name}, which "
            "says what is in which: copy it too"
        )


def _has_chat_template(model: Path) -> bool:
    if any((model / name).is_file() for name in _CHAT_TEMPLATES):
        return True
    named = (*_PROCESSOR_FILES, "tokenizer_config.json")
    configs = [_json(model / name) for name in named if (model / name).is_file()]
    return any(config.get("chat_template") for config in configs)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            f"{brief(path)} not found; expected a Hugging Face Qwen-VL folder"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_prompt(path: Path) -> str:
    """A file's text, UTF-8 with or without a mark of it. Raises InvalidInput for any other."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"the prompt file {brief(path)} cannot be read: {error.strerror}"
        ) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidInput(
            f"the prompt file {brief(path)} is UTF-16, as PowerShell's > writes it; expected UTF-8: "
            "save it as that"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"the prompt file {brief(path)} is no UTF-8 (byte {error.start}): save it as that"
        ) from error
    if not text.strip():
        raise InvalidInput(
            f"the prompt file {brief(path)} is empty; expected the question to the scorer"
        )
    return text


def _prompt(name: str) -> str:
    return (resources.files("panotriton.prompts") / name).read_text(encoding="utf-8")


def _write_prompt(model: Path, prompt: str) -> None:
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / PROMPT).write_text(prompt, encoding="utf-8")
