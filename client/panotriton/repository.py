"""The model repository as a folder: its code, and whether its weights have been built."""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path

from panotriton.errors import ServerStartError

__all__ = ["EXPORTED_FILES", "check_exported", "copy_models"]

EXPORTED_FILES = (
    "osediff/1/osediff.json",
    "osediff/1/tokenizer.json",
    "osediff_text_encoder/1/model.onnx",
    "osediff_vae_encoder/1/model.onnx",
    "osediff_unet/1/model.onnx",
    "osediff_vae_decoder/1/model.onnx",
    "qwen/1/qwen.json",
    "qwen_scorer/1/prompt.txt",
    "qwen_describer/1/prompt.txt",
)
"""What `panotriton export` adds to the code of the models."""

_CODE = ("config.pbtxt", "README.md", "1/model.py", "1/.gitkeep")


def check_exported(repository: Path) -> None:
    """Raise ServerStartError, with the command that mends it, where weights are missing."""
    if not repository.is_dir():
        raise ServerStartError(
            f"no model repository at {repository}: build it with "
            f"`panotriton export --preset small --output {repository}`, or name one with --repository"
        )
    missing = [path for path in EXPORTED_FILES if not (repository / path).is_file()]
    if missing:
        raise ServerStartError(
            f"the repository {repository} is not exported yet ({missing[0]} is missing): "
            f"run `panotriton export --preset small --output {repository}`"
        )


def copy_models(repository: Path) -> None:
    """Put the models' code and configs into `repository`, unless it is their own home."""
    source = _models_folder()
    if repository.exists() and repository.samefile(source):
        return
    for config in sorted(source.glob("*/config.pbtxt")):
        for name in _CODE:
            if (config.parent / name).exists():
                target = repository / config.parent.name / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(config.parent / name, target)


def _models_folder() -> Path:
    spec = util.find_spec("panotriton_models")
    if spec is None or not spec.submodule_search_locations:
        raise ServerStartError("this installation lacks the model repository; reinstall panotriton")
    return Path(spec.submodule_search_locations[0])
