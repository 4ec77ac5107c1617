"""Between `Call`s and tritonclient: tensors, statistics and reports. Pure functions, for every protocol."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from panotriton.client.calls import Value
from panotriton.client.pixels import Images
from panotriton.client.shared_memory import Layout, Slot
from panotriton.errors import ModelUnavailable, quoted
from panotriton.pipeline.results import Health, Model, StageTime, Timings

__all__ = [
    "decode",
    "encode",
    "health",
    "loaded",
    "models",
    "not_served",
    "parameter",
    "region_names",
    "requested",
    "stage_times",
    "timings",
]


def encode(
    wire: ModuleType,
    values: Mapping[str, Value],
    slot: Slot | None = None,
    layout: Layout | None = None,
) -> list[Any]:
    """tritonclient's inputs. What `layout` places is written to `slot`, in place."""
    inputs = []
    for name, value in values.items():
        kind = "UINT8" if isinstance(value, Images) else np_to_triton_dtype(value.dtype)
        tensor = wire.InferInput(name, list(value.shape), kind)
        if isinstance(value, Images) and slot and layout and name in layout.inputs:
            slot.write(layout.inputs[name].offset, value)
            tensor.set_shared_memory(slot.name, *_span(layout.inputs[name]))
        else:
            tensor.set_data_from_numpy(value.joined() if isinstance(value, Images) else value)
        inputs.append(tensor)
    return inputs


def requested(
    wire: ModuleType, names: Iterable[str], slot: Slot | None = None, layout: Layout | None = None
) -> list[Any]:
    """tritonclient's outputs; those that `layout` places go to `slot`."""
    outputs = [wire.InferRequestedOutput(name) for name in names]
    for output in outputs:
        if slot and layout and output.name() in layout.outputs:
            output.set_shared_memory(slot.name, *_span(layout.outputs[output.name()]))
    return outputs


def decode(
    result: Any, names: Iterable[str], slot: Slot | None = None, layout: Layout | None = None
) -> dict[str, Any]:
    """The named outputs; those in `slot` as views of it."""
    return {
        name: slot.read(layout.outputs[name].offset, *_shape_and_dtype(result.get_output(name)))
        if slot and layout and name in layout.outputs
        else result.as_numpy(name)
        for name in names
    }


def _span(span: Any) -> tuple[int, int]:
    return span.nbytes, span.offset


def _shape_and_dtype(output: Any) -> tuple[tuple[int, ...], Any]:
    if isinstance(output, dict):
        return tuple(output["shape"]), triton_to_np_dtype(output["datatype"])
    return tuple(output.shape), triton_to_np_dtype(output.datatype)


def not_served(model: str) -> ModelUnavailable:
    """For a model that is missing or not ready."""
    return ModelUnavailable(
        f"the server does not serve {quoted(model)}; `models()` lists what it serves"
    )


def stage_times(report: Any) -> dict[str, StageTime]:
    """A statistics report as JSON, by model."""
    return {entry["name"]: _stage_time(entry) for entry in report["model_stats"]}


def _stage_time(entry: Mapping[str, Any]) -> StageTime:
    stats = entry.get("inference_stats", {})

    def total_ms(key: str) -> float:
        return int(stats.get(key, {}).get("ns", 0)) / 1e6

    return StageTime(
        model=entry["name"],
        executions=int(entry.get("execution_count", 0)),
        inferences=int(entry.get("inference_count", 0)),
        queue_ms=total_ms("queue"),
        compute_ms=sum(map(total_ms, ("compute_input", "compute_infer", "compute_output"))),
        requests=int(stats.get("success", {}).get("count", 0)),
        request_ms=total_ms("success"),
        busy_ms=sum(
            int(batch.get(part, {}).get("ns", 0)) / 1e6
            for batch in entry.get("batch_stats", [])
            for part in ("compute_input", "compute_infer", "compute_output")
        ),
    )


def timings(total_ms: float, before: StageTime | None, after: StageTime | None) -> Timings:
    """Exact where the server finished one request between two readings; else the total alone."""
    if before is None or after is None or after.requests != before.requests + 1:
        return Timings(total_ms)
    # The server's clock stops a little after its answer is out.
    server_ms = min(after.request_ms - before.request_ms, total_ms)
    queue_ms = after.queue_ms - before.queue_ms
    return Timings(total_ms, queue_ms, server_ms - queue_ms, total_ms - server_ms)


def models(index: Any) -> list[Model]:
    """The repository index as JSON, of either protocol."""
    entries = index.get("models", []) if isinstance(index, dict) else index
    return [
        Model(
            entry["name"],
            entry.get("version", ""),
            entry.get("state") == "READY",
            entry.get("reason", ""),
        )
        for entry in entries
    ]


def loaded(report: Any) -> list[Model]:
    """The models of a statistics report, which has those that are loaded."""
    return [
        Model(entry["name"], entry.get("version", ""), True, "") for entry in report["model_stats"]
    ]


def parameter(config: Any, name: str) -> str | None:
    """A parameter of a model's config as JSON, of either protocol."""
    known = config.get("config", config).get("parameters", {})
    value = known.get(name, {}).get("string_value")
    return str(value) if value else None


def region_names(status: Any) -> list[str]:
    """From a shared-memory status as JSON, of either protocol."""
    if isinstance(status, dict):
        return list(status.get("regions", {}))
    return [entry["name"] for entry in status]


def health(live: bool, ready: bool, metadata: Any) -> Health:
    """From the server's metadata as JSON."""
    return Health(live, ready, metadata.get("name", ""), metadata.get("version", ""))
