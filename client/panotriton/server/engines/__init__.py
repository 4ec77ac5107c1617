"""What runs exported graphs. One module for each library, one value for each engine, one registry.

```python
graph = ENGINES["cpu"].open(Path("repository/osediff_unet/1/model.onnx"))
(noise,) = graph.run(["NOISE"], {"LATENT": latent, "PROMPT_EMBEDS": embeds})
```
To add an engine, write a module with its `Engine` and name it in `ENGINES`: `panotriton export`, the
server's backend and `panotriton.local` go by what it says. A library is imported when its engine opens
a graph, not before.
"""

from __future__ import annotations

from panotriton.errors import EngineError
from panotriton.server.engines.engine import (
    Config,
    ConfigEntries,
    Engine,
    Graph,
    Settings,
    accelerators,
)
from panotriton.server.engines.onnxruntime import CPU, CUDA, TENSORRT
from panotriton.server.engines.openvino import OPENVINO

__all__ = [
    "CPU",
    "CUDA",
    "ENGINES",
    "OPENVINO",
    "TENSORRT",
    "Config",
    "ConfigEntries",
    "Engine",
    "Graph",
    "Settings",
    "engine_of",
    "stand_in",
]

ENGINES: dict[str, Engine] = {each.name: each for each in (CPU, OPENVINO, CUDA, TENSORRT)}
"""By name. Of those for one kind of instance the first runs a graph whose config names none, and of
several named ones the last."""


def engine_of(config: Config, *, on_gpu: bool = False) -> Engine:
    """What runs an instance of this model on a CPU or on a GPU.

    GPU accelerators count for instances on a GPU alone, as in Triton's own onnxruntime backend. Raises
    EngineError for an accelerator that no engine of its kind answers to.
    """
    chosen = _engine_of_kind(config, on_gpu)
    if on_gpu:
        _engine_of_kind(config, False)  # refused there, so refused here
    return chosen


def stand_in(engine: Engine) -> Engine:
    """What computes in its place on a machine that may have no GPU, as where graphs are exported."""
    return CPU if engine.on_gpu else engine


def _engine_of_kind(config: Config, on_gpu: bool) -> Engine:
    first, *others = (each for each in ENGINES.values() if each.on_gpu == on_gpu)
    known = {each.accelerator: each for each in (*reversed(others), first) if each.accelerator}
    named = accelerators(config, on_gpu=on_gpu)
    for name in named:
        if name not in known:
            expected = " or ".join(known)
            raise EngineError(f"unknown execution accelerator '{name}', expected {expected}")
    return next((each for name, each in known.items() if name in named), first)
