"""Super-resolution in this process: the exported networks and the server's own arithmetic, without a server.

```python
from panotriton.local import Upscaler

sharp = Upscaler("repository").upscale("photo.jpg").image
```
Needs pip install 'panotriton[serve]'. For more than some images use a server: it joins the tiles of
all requests into batches.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.client.pixels import ImageLike, pixels
from panotriton.errors import InferenceFailed
from panotriton.models.super_resolution import CallNetwork, Limits, SuperResolver
from panotriton.models.tags import Tags
from panotriton.pipeline.contract import DEFAULTS, MIN_SR_SIDE_PX, TENSORS, Options
from panotriton.pipeline.networks import PIPELINE
from panotriton.pipeline.results import Timings, Upscaled
from panotriton.server.engines import Graph, Settings, engine_of
from panotriton.server.engines.onnxruntime import by_providers
from panotriton.server.repository import check_exported

__all__ = ["Upscaler", "in_process", "open_network"]

_LOG = logging.getLogger(__name__)
_ONE_IMAGE = Limits(images_in_flight=1)  # in one process there is nothing to overlap


class Upscaler:
    """`Client.upscale` in process, for one thread at a time.

    repository: one that `panotriton export` has built. network: which of its super-resolution networks.
    providers: onnxruntime's names, in order of
    preference; None for what the repository's configs say of CPUs, as in the server. threads: of each
    network; 0 for all cores that this process may use. Raises
    ServerStartError where the repository lacks exported networks.
    """

    def __init__(
        self,
        repository: str | Path = "repository",
        *,
        network: str = PIPELINE,
        providers: Sequence[str] | None = None,
        threads: int = 0,
        limits: Limits = _ONE_IMAGE,
    ) -> None:
        self._repository = Path(repository)
        self._network = network
        check_exported(self._repository, network)
        self._providers = providers
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        folder = self._repository / network / "1"
        self._resolver = SuperResolver(folder, limits, Tags.read(folder), network=network)

    def upscale(
        self,
        image: ImageLike,
        *,
        upscale: int = DEFAULTS.upscale,
        align: str = DEFAULTS.align,
        prompt: str = DEFAULTS.prompt,
    ) -> Upscaled:
        """Super-resolve one image (h, w, 3) to (upscale·h, upscale·w, 3), as `Client.upscale` does."""
        began = time.perf_counter()
        options = Options(upscale=upscale, align=align, prompt=prompt).check(TENSORS)
        source = pixels("image", image, min_side_px=MIN_SR_SIDE_PX)[None]  # (1, h, w, 3)
        call = in_process(self._session)
        warnings: list[str] = []
        sharp = asyncio.run(self._resolver.run(source, call, options, warnings))[0]
        timings = Timings((time.perf_counter() - began) * 1e3)
        return Upscaled(sharp, timings, self._network, "".join(warnings))

    def _session(self, model: str) -> Any:
        """The network's session, opened on first use."""
        if model not in self._sessions:
            self._sessions[model] = open_network(
                self._repository / model, self._threads, self._providers
            )
        return self._sessions[model]


def open_network(
    model: Path,
    threads: int = 0,
    providers: Sequence[str] | None = None,
    *,
    emulate: bool = False,
) -> Graph:
    """`model`/1/model.onnx, opened by the engine that config.pbtxt names for CPUs; see `Upscaler`.

    emulate: compute in a precision that this CPU lacks, slowly, instead of in fp32. Raises EngineError.
    """
    text = (model / "config.pbtxt").read_text()
    config = MessageToDict(text_format.Parse(text, ModelConfig()), preserving_proto_field_name=True)
    settings = replace(
        Settings.of(config),
        threads=threads or len(os.sched_getaffinity(0)),
        emulate=emulate,
        report=lambda line: _LOG.warning("%s: %s", model.name, line),
    )
    engine = engine_of(config) if providers is None else by_providers(providers)
    return engine.open(model / "1" / "model.onnx", settings)


def in_process(session: Callable[[str], Any]) -> CallNetwork:
    """Runs networks here. session: a model's name → what `open_network` returns."""

    async def call(
        model: str, inputs: dict[str, Any], outputs: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        try:
            arrays = session(model).run(list(outputs), inputs)
        except Exception as error:  # onnxruntime errors have no narrower base
            raise InferenceFailed(f"{model}: {error}") from error
        return dict(zip(outputs, arrays, strict=True))

    return call
