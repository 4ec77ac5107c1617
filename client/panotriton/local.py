"""OSEDiff in this process: the exported networks and the server's own arithmetic, without a server.

```python
from panotriton.local import Upscaler

sharp = Upscaler("repository").upscale("photo.jpg").image
```
Needs pip install 'panotriton[serve]'. For more than some images use a server: it joins the tiles of
all requests into batches.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc.model_config_pb2 import ModelConfig

from panotriton.client.pixels import ImageLike, pixels
from panotriton.errors import InferenceFailed
from panotriton.models.super_resolution import Call, Limits, SuperResolver
from panotriton.models.tags import Tags
from panotriton.pipeline.contract import DEFAULTS, MIN_SR_SIDE_PX, Options
from panotriton.pipeline.results import Timings, Upscaled
from panotriton.server.repository import check_exported

__all__ = ["Upscaler", "in_process", "open_network"]

_ONE_IMAGE = Limits(images_in_flight=1)  # in one process there is nothing to overlap


class Upscaler:
    """`Client.upscale` in process, for one thread at a time.

    repository: one that `panotriton export` has built. providers: onnxruntime's names, in order of
    preference; None for what the repository's configs say of CPUs, as in the server. threads: of each
    network; 0 for all cores that this process may use. Raises
    ServerStartError where the repository lacks exported networks.
    """

    def __init__(
        self,
        repository: str | Path = "repository",
        *,
        providers: Sequence[str] | None = None,
        threads: int = 0,
        limits: Limits = _ONE_IMAGE,
    ) -> None:
        self._repository = Path(repository)
        check_exported(self._repository, "osediff")
        self._providers = providers
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        folder = self._repository / "osediff" / "1"
        self._resolver = SuperResolver(folder, limits, Tags.read(folder))

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
        Options(upscale=upscale, align=align, prompt=prompt).check()
        source = pixels("image", image, min_side_px=MIN_SR_SIDE_PX)[None]  # (1, h, w, 3)
        call = in_process(self._session)
        warnings: list[str] = []
        work = self._resolver.run(
            source, call, upscale=upscale, method=align, prompt=prompt, warnings=warnings
        )
        sharp = asyncio.run(work)[0]
        timings = Timings((time.perf_counter() - began) * 1e3)
        return Upscaled(sharp, timings, "osediff", "".join(warnings))

    def _session(self, model: str) -> Any:
        """The network's session, opened on first use."""
        if model not in self._sessions:
            self._sessions[model] = open_network(
                self._repository / model, self._threads, self._providers
            )
        return self._sessions[model]


def open_network(model: Path, threads: int = 0, providers: Sequence[str] | None = None) -> Any:
    """What runs `model`/1/model.onnx as onnxruntime's InferenceSession does; see `Upscaler`."""
    path = model / "1" / "model.onnx"
    threads = threads or len(os.sched_getaffinity(0))
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    accelerators = config.optimization.execution_accelerators.cpu_execution_accelerator
    if providers is None and any(each.name == "openvino" for each in accelerators):
        from panotriton.server.openvino_graph import OpenVINOGraph  # noqa: PLC0415, of this engine alone

        precision = config.parameters["openvino_precision"].string_value or "fp32"
        return OpenVINOGraph(path, threads=threads, precision=precision)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    chosen = list(providers or ("CPUExecutionProvider",))
    return onnxruntime.InferenceSession(path, options, providers=chosen)


def in_process(session: Callable[[str], Any]) -> Call:
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
