"""What an engine is, and what it is told when it opens a graph."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from panotriton.errors import EngineError
from panotriton.server.engines.shapes import FixedShapes, Shapes

__all__ = ["Config", "ConfigEntries", "Engine", "Graph", "Settings", "accelerators"]

Config = Mapping[str, Any]
"""A config.pbtxt as the server's JSON of it; what is unset may be missing."""

_SIDES = {False: "cpu_execution_accelerator", True: "gpu_execution_accelerator"}
_LOG = logging.getLogger(__name__)

Chosen = TypeVar("Chosen")


class Graph(Protocol):
    """An opened model.onnx, for one thread: what of onnxruntime's InferenceSession is used here.

    A tensor is described by name, type ("tensor(float)") and shape, where a free side is no int.
    """

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The named outputs, as arrays of their own."""

    def get_inputs(self) -> Sequence[Any]:
        """What every run must feed."""

    def get_outputs(self) -> Sequence[Any]:
        """What a run can return."""

    def get_overridable_initializers(self) -> Sequence[Any]:
        """What a run may feed, since the graph has a value for it."""

    def get_providers(self) -> Sequence[str]:
        """What computes, for the log."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is told when it opens a graph.

    threads: those of one operator; inter_op_threads: operators at once, where the engine can; 0 for its
    own choice. device: the GPU's number. accelerators: name → its parameters. parameters: those of
    config.pbtxt, of which an engine reads the ones that it knows. graph_level: `optimization { graph {
    level } }`. libraries: paths of custom operators. emulate: compute in the precision asked for even
    where this machine lacks it, slowly. report: takes a line for the log.
    """

    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    inter_op_threads: int = 0
    device: str = "0"
    accelerators: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    graph_level: int = 0
    libraries: Sequence[str] = ()
    emulate: bool = False
    report: Callable[[str], None] = _LOG.warning

    @classmethod
    def of(cls, config: Config, **given: Any) -> Settings:
        """What `config` says; `given` are further fields.

        Threads that it leaves open, or at 0, are the process's cores shared out over the model's
        instances. Raises EngineError for a number that is none.
        """
        parameters = {
            key: str(value.get("string_value", ""))
            for key, value in config.get("parameters", {}).items()
        }
        both = accelerators(config, on_gpu=True) | accelerators(config, on_gpu=False)
        return cls(
            threads=_threads(config, parameters, "intra_op_thread_count"),
            inter_op_threads=_threads(config, parameters, "inter_op_thread_count"),
            accelerators=both,
            parameters=parameters,
            graph_level=config.get("optimization", {}).get("graph", {}).get("level", 0),
            libraries=config.get("model_operations", {}).get("op_library_filename", ()),
            **given,
        )

    @property
    def shapes(self) -> FixedShapes | None:
        """The shapes that the graph is to see; None for any. Raises EngineError."""
        return FixedShapes.of(self.parameters)

    def choice(self, key: str, choices: Mapping[str, Chosen], default: str) -> Chosen:
        """What `choices` has for the parameter, in any case; raises EngineError for another value."""
        text = self.parameters.get(key, default)
        if text.lower() not in choices:
            raise EngineError(f"parameter {key} is '{text}', expected one of {', '.join(choices)}")
        return choices[text.lower()]


def accelerators(config: Config, *, on_gpu: bool) -> dict[str, dict[str, str]]:
    """The execution accelerators that a config names for instances of one kind: name → parameters."""
    named = config.get("optimization", {}).get("execution_accelerators", {})
    return {each["name"]: each.get("parameters", {}) for each in named.get(_SIDES[on_gpu], ())}


def _threads(config: Config, parameters: Mapping[str, str], key: str) -> int:
    text = parameters.get(key, "0")
    if not re.fullmatch(r"-?\d+", text):
        raise EngineError(f"parameter {key} is '{text}', expected a whole number")
    groups = config.get("instance_group", ())
    instances = sum(each.get("count", 1) * max(1, len(each.get("gpus", ()))) for each in groups)
    share = len(os.sched_getaffinity(0)) // max(1, instances)
    return int(text) if int(text) > 0 else max(1, share)


@dataclass(frozen=True, slots=True)
class ConfigEntries:
    """What a config.pbtxt must say for one precision.

    accelerator: parameters of the engine's execution accelerator; None where it is not named at all.
    parameters: of the config itself, which every server reads but only our backend may understand.
    """

    accelerator: Mapping[str, str] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to run an exported graph.

    name: of `panotriton export --provider`. about: a few words for its help. wheel: what pip installs.
    precisions: name → what a config says for it. opener: opens a graph; it alone imports the wheel, as
    does best, the quickest of the precisions on this machine. accelerator: its name in config.pbtxt
    files, "" for none. operators: those beyond ONNX's own, of com.microsoft, that the export may
    write. slack: how many times the usual difference from PyTorch its rounding takes. images_only:
    whether only networks that images go through are worth it. batches: model → max_batch_size, where
    another one than config.pbtxt's pays. fixed_batches: model → the batch sizes that it is to see, see
    `panotriton.server.engines.shapes`; the last is its max_batch_size. shape_entries: what a config says
    of the shapes that a deployment expects, each input's with the batch size first; None where it says
    nothing. memory_fractions: model → what it may take of a GPU's memory. backend: the server's name for
    what opens the graph.
    """

    name: str
    about: str
    wheel: str
    precisions: Mapping[str, ConfigEntries]
    opener: Callable[[Path, Settings], Graph]
    best: Callable[[], str] = lambda: "fp32"
    accelerator: str = ""
    on_gpu: bool = False
    operators: frozenset[str] = frozenset()
    slack: float = 1
    images_only: bool = False
    batches: Mapping[str, int] = field(default_factory=dict)
    fixed_batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shape_entries: Callable[[Sequence[Shapes]], ConfigEntries] | None = None
    memory_fractions: Mapping[str, float] = field(default_factory=dict)
    backend: str = "onnxruntime"

    def largest_batch(self, model: str) -> int | None:
        """The max_batch_size that it wants for a model; None for the config's own."""
        return self.fixed_batches.get(model, (None,))[-1] or self.batches.get(model)

    @property
    def kind(self) -> str:
        """Of an instance group."""
        return "KIND_GPU" if self.on_gpu else "KIND_CPU"

    @property
    def side(self) -> str:
        """The list of config.pbtxt that its accelerator is named in."""
        return _SIDES[self.on_gpu]

    def open(self, path: Path, settings: Settings | None = None) -> Graph:
        """Open `path`, an ONNX file; without settings, on all cores that this process may use.

        Raises EngineError, of one line, where the wheel is missing, a setting is unknown, or the file is
        no graph for this engine.
        """
        with self._wheel():
            try:
                return self.opener(path, settings or Settings())
            except (EngineError, ImportError):
                raise
            except Exception as error:  # the wheels' errors have no narrower base
                reason = " ".join(str(error).split())
                raise EngineError(
                    f"the engine {self.name} cannot open {path}: {reason}; export it again"
                ) from error

    def settings(self, precision: str, **given: Any) -> Settings:
        """What a config.pbtxt with its entries for this precision says; `given` are further fields."""
        entries = self.precisions[precision]
        named = {self.accelerator: entries.accelerator or {}}
        return Settings(accelerators=named, parameters=entries.parameters, **given)

    def best_precision(self) -> str:
        """The quickest of its precisions on this machine; raises EngineError where the wheel is missing."""
        with self._wheel():
            return self.best()

    @contextmanager
    def _wheel(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:
            raise EngineError(
                f"the engine {self.name} needs {error.name}: pip install {self.wheel}, or export with "
                "another --provider"
            ) from error
