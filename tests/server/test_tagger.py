"""The tagger in a real server: what osediff makes of an image's tags, and what it says without any."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from panotriton.models.osediff import plan_size
from panotriton.models.tags import Tags, tagger_input
from panotriton.server.launch import LocalServer
from panotriton_export import graph
from panotriton_export.tagger import export_tagger
from tests.brief import BriefServer
from tests.tagger import Tagger

NETWORKS = ("text_encoder", "vae_encoder", "unet", "vae_decoder")
UNTAGGED = ["osediff", *(f"osediff_{name}" for name in NETWORKS)]
LOUDER = 12000
NO_TAGGER = "osediff: no tagger was exported"


@pytest.fixture(scope="module")
def untagged_repository(quick_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small preset, made to heed prompts: trained on few, it hardly does."""
    folder = Path(
        shutil.copytree(quick_repository, tmp_path_factory.mktemp("untagged") / "repository")
    )
    path = folder / "osediff_text_encoder" / "1" / "model.onnx"
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["faint" if name == output.name else name for name in node.output]
    factor = onnx.numpy_helper.from_array(np.float32(LOUDER), "factor")
    model.graph.initializer.append(factor)
    model.graph.node.append(onnx.helper.make_node("Mul", ["faint", "factor"], [output.name]))
    onnx.save(model, path)
    return folder


@pytest.fixture(scope="module")
def tagged_repository(
    untagged_repository: Path, tagger: Tagger, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same and a tiny random tagger."""
    folder = tmp_path_factory.mktemp("tagged") / "repository"
    shutil.copytree(untagged_repository, folder)
    with pytest.MonkeyPatch.context() as patch:
        traced = tagger.repository / "osediff_tagger" / "1" / "model.onnx"
        patch.setattr(graph, "to_onnx", lambda component: ir.load(traced))
        export_tagger(tagger.source, folder)
    return folder


@pytest.fixture(scope="module")
def tagged(tagged_repository: Path) -> Iterator[LocalServer]:
    with BriefServer(tagged_repository, load_models=[*UNTAGGED, "osediff_tagger"]) as running:
        yield running


@pytest.fixture(scope="module")
def untagged(untagged_repository: Path) -> Iterator[LocalServer]:
    with BriefServer(untagged_repository, load_models=UNTAGGED) as running:
        yield running


@pytest.fixture(scope="module")
def images(panoramas: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Four views that differ, (4, 128, 160, 3)."""
    corners = [(panorama, x) for panorama in panoramas for x in (0, 500)]
    return np.stack([panorama[200:328, x : x + 160] for panorama, x in corners])


def infer(server: LocalServer, model: str, output: str, **inputs: np.ndarray) -> np.ndarray:
    tensors = []
    for name, value in inputs.items():
        tensor = triton.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
        tensors.append(tensor.set_data_from_numpy(value))
    with triton.InferenceServerClient(server.grpc_url) as client:
        return np.asarray(client.infer(model, tensors).as_numpy(output))


def upscale(server: LocalServer, images: np.ndarray, prompt: str) -> np.ndarray:
    text = np.array([prompt.encode()], np.object_)
    return infer(server, "osediff", "IMAGES_SR", IMAGES=images, PROMPT=text).astype(np.int16)


def test_every_image_is_upscaled_with_its_own_tags(
    tagged: LocalServer, tagged_repository: Path, untagged: LocalServer, images: np.ndarray
) -> None:
    plan = plan_size(*images.shape[1:3], 2)
    seen = np.stack([tagger_input(plan.prepare(image)) for image in images])
    probabilities = infer(tagged, "osediff_tagger", "PROBABILITY", IMAGE=seen)
    tags = Tags.read(tagged_repository / "osediff" / "1")
    assert tags is not None
    prompts = [tags.prompt(row, "sharp") for row in probabilities]
    assert len(set(prompts)) == len(images)
    pairs = zip(images, prompts, strict=True)
    expected = np.concatenate([upscale(untagged, image[None], prompt) for image, prompt in pairs])
    got, plain = upscale(tagged, images, "sharp"), upscale(untagged, images, "sharp")
    # Equal but for rounding: in a batch of another size the networks' sums end in other bits.
    assert np.abs(got - expected).max() <= 1
    for index in range(len(images)):  # the prompt matters, so the comparison means something
        assert np.abs(plain[index] - expected[index]).max() > 3


def test_images_share_the_taggers_batches(tagged: LocalServer, images: np.ndarray) -> None:
    before = counts(tagged)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda prompt: upscale(tagged, images, prompt), ("a", "b")))
    asked, runs = counts(tagged) - before
    assert asked == 8
    assert runs < 8


def counts(server: LocalServer) -> np.ndarray:
    """Images that the tagger has seen, and runs of it."""
    with triton.InferenceServerClient(server.grpc_url) as client:
        (stats,) = client.get_inference_statistics("osediff_tagger", as_json=True)["model_stats"]
    return np.array([int(stats["inference_count"]), int(stats["execution_count"])])


def test_no_images_need_no_tags(tagged: LocalServer, images: np.ndarray) -> None:
    assert upscale(tagged, images[:0], "sharp").shape == (0, 256, 320, 3)


def test_the_log_says_once_that_there_is_no_tagger(
    tagged: LocalServer, untagged: LocalServer
) -> None:
    assert untagged.log_text().count(NO_TAGGER) == 1
    assert NO_TAGGER not in tagged.log_text()
