"""Replies with buffers of fixed shape, and what one reading costs: passes, tokens, calls, memory."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from panotriton.errors import InferenceFailed
from panotriton.models import qwen_windows
from panotriton.models.qwen import QwenVL
from panotriton.models.qwen_cache import LENGTHS, StaticCaches, compile_each_shape
from tests.unit.test_qwen import PROMPT, ROOT, SMALL, engine, folders, images  # noqa: F401 fixtures

LIMIT = 24


@pytest.fixture(scope="module")
def dynamic() -> QwenVL:
    return engine(SMALL, max_batch=4)


@pytest.fixture(scope="module")
def static() -> QwenVL:
    return engine(SMALL, max_batch=4, decode="static")


@contextmanager
def steps(model: QwenVL) -> Iterator[list[dict[str, Any]]]:
    """What the language model is called with while this is entered: shapes, and its cache's address."""
    seen: list[dict[str, Any]] = []

    def note(module: Any, given: Any, named: dict[str, Any]) -> None:
        shapes = {name: tuple(v.shape) for name, v in named.items() if hasattr(v, "shape")}
        cache = named.get("past_key_values")
        layer = cache.layers[0] if cache is not None and cache.layers else None
        address = layer.keys.data_ptr() if layer is not None and layer.is_initialized else None
        seen.append({"shapes": shapes, "cache": cache, "address": address})

    language = model.model.model.language_model
    handle = language.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_fixed_buffers_decode_the_same_tokens(
    folders: dict[str, Path],  # noqa: F811
    images: list[np.ndarray],  # noqa: F811
    name: str,
    prefix: bool,
) -> None:
    """Token by token, of images of several sizes: rows with padding at the left, and batches filled up."""
    models = [
        engine(folders[name], max_batch=4, prefix_cache=prefix, decode=decode)
        for decode in ("dynamic", "static")
    ]
    written: list[list[Any]] = [[], []]
    for kept, model in zip(written, models, strict=True):
        generate = model.model.generate

        def watched(generate: Any = generate, kept: list[Any] = kept, **given: Any) -> Any:
            tokens = generate(**given)
            kept.append(tokens[:, given["input_ids"].shape[1] :])
            return tokens

        model.model.generate = watched
        for count in (1, 3, 2, 5):
            model.reply(images[:count], PROMPT, LIMIT, stop_after="image clarity")
    for plain, fixed in zip(*written, strict=True):
        rows, length = plain.shape
        assert torch.equal(fixed[:rows, :length], plain)
        assert fixed.shape[1] == length  # what fills a batch up does not keep it going


def test_every_step_of_a_reply_has_one_shape_and_one_place(
    static: QwenVL,
    images: list[np.ndarray],  # noqa: F811
) -> None:
    """Whatever its images: another call with as many rows has those of the call before."""
    found = []
    static.reply(images[:3], PROMPT, LIMIT)  # computes the kept prefix
    for chosen in (images[:3], images[1:4], images[:4], images[2:5]):
        with steps(static) as seen:
            static.reply(chosen, PROMPT, LIMIT)
        first, *later = seen
        assert first["shapes"]["inputs_embeds"][:2] != (4, 1)
        assert len(later) == LIMIT - 1
        shapes = {tuple(sorted(step["shapes"].items())) for step in later}
        assert len(shapes) == 1
        found.append((shapes, {step["address"] for step in later}))
    assert all(each == found[0] for each in found)
    (places,) = (addresses for _, addresses in found[:1])
    assert len(places) == 1


def test_a_growing_cache_has_another_shape_at_every_step(
    dynamic: QwenVL,
    images: list[np.ndarray],  # noqa: F811
) -> None:
    """What the static one is for; also that the test above can fail."""
    dynamic.reply(images[:3], PROMPT, LIMIT)
    with steps(dynamic) as seen:
        dynamic.reply(images[:3], PROMPT, LIMIT)
    assert len({tuple(sorted(step["shapes"].items())) for step in seen[1:]}) == LIMIT - 1


def test_a_step_is_compiled_once_for_all_calls(images: list[np.ndarray]) -> None:  # noqa: F811
    """As on a GPU, where transformers compiles it by itself; here by a backend that runs what it is given."""
    model = engine(SMALL, max_batch=4, decode="static")
    plain = engine(SMALL, max_batch=4)
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    everywhere = replace(compile_each_shape(), backend=backend, fullgraph=True, mode=None)
    everywhere._compile_all_devices = True
    model.model.generation_config.compile_config = everywhere
    torch._dynamo.reset()
    for chosen in (images[:3], images[1:4], images[:4]):
        assert model.reply(chosen, PROMPT, 12) == plain.reply(chosen, PROMPT, 12)
    assert len(graphs) == 1
    for chosen in (images[:2], images[:1], images[:4], images[:2]):  # 2, 1, 4 and 2 rows
        assert model.reply(chosen, PROMPT, 12) == plain.reply(chosen, PROMPT, 12)
    assert len(graphs) == 3
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_recorded_steps_write_the_same(images: list[np.ndarray]) -> None:  # noqa: F811
    """By CUDA graphs, in fp32; a second call of each batch size replays what the first recorded."""
    options = {"max_batch": 4, "device": "cuda:0", "dtype": "float32"}
    plain, fixed = engine(SMALL, **options), engine(SMALL, **options, decode="static")
    for count in (3, 2, 4, 1):
        chosen = images[:count]
        assert fixed.reply(chosen, PROMPT, LIMIT) == plain.reply(chosen, PROMPT, LIMIT)


def test_buffers_stay_where_they_are_until_a_longer_reply(static: QwenVL) -> None:
    """Those of small batches are the first rows of the largest one's."""
    caches = StaticCaches(static.model.config, most=12)
    assert [caches.rows(count) for count in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]

    def taken(rows: int, tokens: int) -> tuple[Any, list[int]]:
        cache = caches.take(rows, tokens, None)
        for index, layer in enumerate(cache.layers):
            one = torch.full((rows, 2, 3, 4), rows + index, dtype=torch.float32)
            keys, values = cache.update(one, 2 * one, index)
            assert keys.shape == values.shape == (rows, 2, layer.get_max_length(), 4)
            assert layer.get_max_length() in (512, 768)
            assert torch.equal(keys[:, :, :3], one)
            assert torch.equal(values[:, :, :3], 2 * one)
            assert not keys[:, :, 3:].any()
        return cache, [layer.keys.data_ptr() for layer in cache.layers]

    four, places = taken(4, 300)
    for rows, tokens in ((12, 512), (1, 10), (4, 400), (2, 300), (12, 300)):
        cache, found = taken(rows, tokens)
        assert found == places
        assert (cache is four) == (rows == 4)
        assert cache.get_seq_length() == 3
    assert four.layers[0].get_max_length() == 512
    longer, _ = taken(4, 513)
    assert longer.layers[0].get_max_length() == 768
    assert taken(4, 300)[0] is longer


def test_what_fixed_buffers_take_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their full length, before the weights are read."""
    seen: list[dict[str, Any]] = []
    from panotriton.models import qwen as qwen_module  # noqa: PLC0415

    def noted(*sizes: Any, **caches: Any) -> Any:
        seen.append(caches)
        raise MemoryError

    monkeypatch.setattr(qwen_module, "estimate", noted)
    for decode in ("dynamic", "static"):
        with pytest.raises(MemoryError):
            engine(SMALL, decode=decode)
    assert seen == [
        {"further_tokens": 0},
        {"further_tokens": LENGTHS},
    ]


@pytest.mark.parametrize(("read", "positions"), [("read_number", 3), ("read_level", 1)])
def test_a_reading_is_one_pass_of_what_is_new(
    dynamic: QwenVL,
    images: list[np.ndarray],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    read: str,
    positions: int,
) -> None:
    """For each batch; no more logits than are read, and no keys or values that outlive a layer."""
    getattr(dynamic, read)(images[:1], PROMPT)  # computes the kept prefix
    logits: list[tuple[int, ...]] = []
    head = dynamic.model.lm_head.register_forward_hook(
        lambda module, given, result: logits.append(tuple(result.shape[:2]))
    )
    towers: list[Any] = []
    tower = dynamic.model.model.visual.register_forward_hook(
        lambda module, given, result: towers.append(module)
    )
    whole = {count: dynamic.inputs(images[:count], PROMPT, "") for count in (4,)}
    with steps(dynamic) as seen:
        getattr(dynamic, read)(images, PROMPT)  # five: batches of 4 and 1
    head.remove()
    tower.remove()
    assert len(seen) == len(towers) == 2
    assert sorted(logits) == [(1, positions), (4, positions)]
    (prefix,) = {cache.layers[0].keys.shape[2] for cache in dynamic._prefixes.values()}
    for step in seen:
        _, tokens = step["shapes"]["inputs_embeds"][:2]
        assert tokens < whole[4]["input_ids"].shape[1] + 12 - prefix  # the skeleton's are few
        kept = step["cache"].layers[0]
        assert kept.keys.shape[2] == prefix
        assert kept.keys.untyped_storage().data_ptr() in {
            cache.layers[0].keys.untyped_storage().data_ptr()
            for cache in dynamic._prefixes.values()
        }


def test_a_reading_without_a_kept_prefix_has_no_cache(images: list[np.ndarray]) -> None:  # noqa: F811
    model = engine(SMALL, max_batch=4, prefix_cache=False)
    with steps(model) as seen:
        model.read_number(images[:3], PROMPT)
    assert [step["cache"] for step in seen] == [None]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_windows_of_one_length_are_one_call(
    folders: dict[str, Path],  # noqa: F811
    images: list[np.ndarray],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """And what they compute is what transformers' own attention does, window by window."""
    joined = engine(folders[name])
    with monkeypatch.context() as patched:
        patched.setattr("panotriton.models.qwen.join_windows", lambda model: None)
        plain = engine(folders[name])
    inputs = joined.inputs(images, PROMPT)
    shown = (inputs["pixel_values"], inputs["image_grid_thw"])
    calls: list[int] = []
    sdpa = qwen_windows.scaled_dot_product_attention

    def counted(*tensors: Any, **given: Any) -> Any:
        calls.append(len(tensors[0]))
        return sdpa(*tensors, **given)

    monkeypatch.setattr(qwen_windows, "scaled_dot_product_attention", counted)
    with torch.inference_mode():
        got, expected = (model.model.model.visual(*shown) for model in (joined, plain))
    np.testing.assert_allclose(got.pooler_output, expected.pooler_output, atol=1e-4)
    depth, patches = len(joined.model.model.visual.blocks), inputs["image_grid_thw"].prod(-1)
    if name != "qwen2_5_vl":  # each image is a window
        assert len(calls) == depth * len(patches.unique())
        return
    assert len(calls) < depth * int(patches.sum()) / 64 / 2
    assert max(calls) > len(images)


def model_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The repository's qwen/1/model.py, without a server."""
    stub = ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.delitem(sys.modules, "panotriton.models.requests", raising=False)
    path = ROOT / "model_repository" / "qwen" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("qwen_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("panotriton.models.requests")  # it holds the stub
    return module


def test_a_request_that_fails_takes_none_of_its_batch_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Engine:
        async def answer(self, shown: list[str], *question: str) -> list[tuple[str, str]]:
            if "bad" in shown:
                raise InferenceFailed("prompt too long")
            return [(image, *question) for image in shown]

    model = model_module(monkeypatch).TritonPythonModel()
    model._engine = Engine()
    first, bad, last = asyncio.run(model._answers([["a", "b"], ["c", "bad"], ["d"]], ["why"]))
    assert first == [("a", "why"), ("b", "why")]
    assert isinstance(bad, InferenceFailed)
    assert last == [("d", "why")]


def test_an_instance_works_on_its_own_gpu_with_its_share_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two, as the server starts them for `gpus: [ 0, 1 ]`: what they are told."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("panotriton.models.qwen.QwenVL", lambda folder, **rest: told.append(rest))
    module = model_module(monkeypatch)
    settings = {"engine": "torch", "weights": "w", "dtype": "auto", "max_pixels": None}
    settings |= {"vision_grid": None, "decode": "static"}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "qwen.json").write_text(json.dumps(settings))
    limits = {"max_batch_images": "16", "gpu_memory_fraction": "0.4"}
    limits["batch_across_requests"] = "true"
    config = {"parameters": {name: {"string_value": each} for name, each in limits.items()}}
    for device in ("0", "1"):
        module.TritonPythonModel().initialize(
            {
                "model_repository": str(tmp_path),
                "model_version": "1",
                "model_config": json.dumps(config),
                "model_instance_kind": "GPU",
                "model_instance_device_id": device,
            }
        )
    found = [(each["device"], each["memory_fraction"], each["decode"]) for each in told]
    assert found == [("cuda:0", 0.4, "static"), ("cuda:1", 0.4, "static")]
