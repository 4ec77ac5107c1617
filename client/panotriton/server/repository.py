"""The model repository as a folder: its code, and whether its weights have been built."""

from __future__ import annotations

import shutil
from importlib import util
from pathlib import Path

from panotriton.errors import ServerStartError
from panotriton.models.tags import TAGS_FILE

__all__ = ["EXPORTED_FILES", "OPTIONAL", "check_exported", "copy_model", "copy_models"]

EXPORTED_FILES = (
    "osediff/1/osediff.json",
    "osediff/1/tokenizer.json",
    "osediff_text_encoder/1/model.onnx",
    "osediff_vae_encoder/1/model.onnx",
    "osediff_unet/1/model.onnx",
    "osediff_vae_decoder/1/model.onnx",
    "panorama_stream/1/osediff.json",
    "panorama_stream/1/tokenizer.json",
    "qwen/1/qwen.json",
    "qwen_scorer/1/prompt.txt",
    "qwen_describer/1/prompt.txt",
)
"""What `panotriton export` adds to the code of the models."""

_CODE = ("config.pbtxt", "README.md", "1/model.py", "1/.gitkeep")
_TAGGER = "osediff_tagger"
# Left out of a repository unless exported there: Triton loads no model without its graph.
OPTIONAL = (_TAGGER, "qwen_vision")


def check_exported(repository: Path, part: str = "") -> None:
    """Raise ServerStartError, with the command that mends it, where weights are missing.

    part: only of the models whose names begin so.
    """
    if not repository.is_dir():
        raise ServerStartError(
            f"no model repository at {repository}: build it with "
            f"`panotriton export --preset small --output {repository}`, or name one with --repository"
        )
    wanted = (path for path in EXPORTED_FILES if path.startswith(part))
    missing = [path for path in wanted if not (repository / path).is_file()]
    if missing:
        raise ServerStartError(
            f"the repository {repository} is not exported yet ({missing[0]} is missing): "
            f"run `panotriton export --preset small --output {repository}`"
        )
    _check_tagger(repository)


def _check_tagger(repository: Path) -> None:
    """The tagger may be there or not, but not by half."""
    folder, tags = repository / _TAGGER, repository / "osediff" / "1" / TAGS_FILE
    if _has_graph(folder) == tags.is_file() == folder.is_dir():
        return
    raise ServerStartError(
        f"the tagger in {repository} is incomplete: expected {_TAGGER}/1/model.onnx and "
        f"osediff/1/{TAGS_FILE}, or neither. Run `panotriton export osediff --tagger …` again, or remove "
        f"{folder} and every */1/{TAGS_FILE}"
    )


def _has_graph(model: Path) -> bool:
    return (model / "1" / "model.onnx").is_file()


def copy_models(repository: Path) -> None:
    """Put the models' code and configs into `repository`, unless it is their own home.

    A model with a graph is left alone: its export fitted the config, and copies it when it is run
    again. Those of `OPTIONAL` are left out: the others work without them.
    """
    for config in sorted(_models_folder().glob("*/config.pbtxt")):
        name = config.parent.name
        if name not in OPTIONAL and not _has_graph(repository / name):
            copy_model(name, repository)


def copy_model(name: str, repository: Path) -> None:
    """`copy_models` for one model."""
    source = _models_folder()
    if repository.exists() and repository.samefile(source):
        return
    for path in _CODE:
        if (source / name / path).exists():
            target = repository / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name / path, target)


def _models_folder() -> Path:
    spec = util.find_spec("panotriton_models")
    if spec is None or not spec.submodule_search_locations:
        raise ServerStartError("this installation lacks the model repository; reinstall panotriton")
    return Path(spec.submodule_search_locations[0])
