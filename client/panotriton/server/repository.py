"""The model repository as a folder: its code, and whether its weights have been built."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from importlib import util
from pathlib import Path

from panotriton.errors import InvalidInput, RepositoryMissing, ServerStartError, brief, quoted
from panotriton.pipeline.files import PROMPT, TAGS, TOKENIZER, settings_file
from panotriton.pipeline.networks import NETWORKS, PIPELINE, fronts
from panotriton.pipeline.placement import read_placement

__all__ = [
    "ALL_EXPORTED",
    "EXPORTED_FILES",
    "OPTIONAL",
    "PLACEABLE",
    "check_exported",
    "check_served",
    "copy_model",
    "copy_models",
    "placed",
    "served_here",
    "with_behind",
]


def _network_files(network: str) -> tuple[str, ...]:
    """What the export of a super-resolution network adds, without a tagger's."""
    beside = (settings_file(network), TOKENIZER)
    return (
        *(f"{front}/1/{name}" for front in fronts(network) for name in beside),
        *(f"{model}/1/model.onnx" for model in NETWORKS[network].required),
    )


EXPORTED_FILES = (
    *_network_files(PIPELINE),
    f"qwen/1/{settings_file('qwen')}",
    f"qwen_scorer/1/{PROMPT}",
    f"qwen_describer/1/{PROMPT}",
)
"""What `panotriton export` adds to the code of the models."""

_CODE = ("config.pbtxt", "README.md", "1/model.py", "1/.gitkeep")
_TAGGERS = tuple(roles.tagger for roles in NETWORKS.values() if roles.tagger)
_OTHERS = tuple(
    model for name in NETWORKS if name != PIPELINE for model in (name, *NETWORKS[name].required)
)
# Left out of a repository unless exported there: Triton loads no model without its graph.
OPTIONAL = (*_TAGGERS, *_OTHERS, "qwen_vision")
ALL_EXPORTED = frozenset((*(path.partition("/")[0] for path in EXPORTED_FILES), *OPTIONAL))
"""The models that an export may add files to."""

PLACEABLE = (*(model for roles in NETWORKS.values() for model in roles.models), "qwen")
"""What may be on another server: models that others ask by calls alone. An ensemble's steps stay with it."""
_BEHIND = {"qwen": ("qwen_vision", "qwen_vllm")}  # what only a placeable one asks: it goes with it


def placed(text: str) -> frozenset[str]:
    """The models that a placement has on other servers, with what only they ask. Raises InvalidInput."""
    names = read_placement(text)
    for name in names:
        if name not in PLACEABLE:
            raise InvalidInput(
                f"{quoted(name)} cannot be placed on another server; expected one of {', '.join(PLACEABLE)}"
            )
    return frozenset(names) | {model for name in names for model in _BEHIND.get(name, ())}


def served_here(repository: Path, elsewhere: Collection[str]) -> list[str]:
    """The models of a repository's folder that are not elsewhere."""
    names = (config.parent.name for config in repository.glob("*/config.pbtxt"))
    return sorted(set(names) - set(elsewhere))


def with_behind(repository: Path, models: Collection[str]) -> list[str]:
    """The models, and what of the repository's only they ask."""
    behind = (name for model in models for name in _BEHIND.get(model, ()))
    return [*models, *(name for name in behind if (repository / name / "config.pbtxt").is_file())]


def check_served(repository: Path, models: Collection[str]) -> None:
    """Raise InvalidInput where the repository has no such models."""
    known = served_here(repository, ())
    for model in models:
        if model not in known:
            raise InvalidInput(
                f"{brief(repository)} has no model {quoted(model)}; expected {', '.join(known)}"
            )


def check_exported(
    repository: Path, network: str | None = None, *, elsewhere: Collection[str] = ()
) -> None:
    """Raise ServerStartError, with the command that mends it, where weights are missing.

    network: of this super-resolution network alone; None: of all that the pipeline asks. elsewhere: models
    that this server need not have.
    """
    if not os.path.isdir(repository):  # noqa: PTH112 false of names that no file can have, too
        raise RepositoryMissing(
            f"no model repository at {brief(repository)}: build it with "
            f"`panotriton export --preset small --output {brief(repository)}`, or name one with --repository"
        )
    files = _network_files(network) if network else EXPORTED_FILES
    wanted = (path for path in files if path.partition("/")[0] not in elsewhere)
    missing = [path for path in wanted if not (repository / path).is_file()]
    if missing:
        raise RepositoryMissing(
            f"the repository {repository} is not exported yet ({missing[0]} is missing): "
            f"run `panotriton export --preset small --output {repository}`"
        )
    if NETWORKS[network or PIPELINE].tagger not in elsewhere:
        _check_tagger(repository, network or PIPELINE)


def _check_tagger(repository: Path, network: str) -> None:
    """The tagger may be there or not, but not by half."""
    tagger = NETWORKS[network].tagger
    if tagger is None:
        return
    folder, tags = repository / tagger, repository / network / "1" / TAGS
    if _has_graph(folder) == tags.is_file() == folder.is_dir():
        return
    raise RepositoryMissing(
        f"the tagger in {repository} is incomplete: expected {tagger}/1/model.onnx and "
        f"{network}/1/{TAGS}, or neither. Run `panotriton export {network} --tagger …` again, or remove "
        f"{folder} and every */1/{TAGS}"
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
