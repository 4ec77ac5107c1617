"""The scorer on a real server: its modes, the exported vision tower, and vLLM as the engine."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from panotriton import AsyncClient, Client
from panotriton.cli import main
from panotriton.errors import InferenceFailed, InvalidInput
from panotriton.server.launch import LocalServer
from panotriton.server.repository import copy_model
from panotriton_export.qwen import export_qwen
from panotriton_export.qwen_vllm import NAME as VLLM
from tests.brief import BriefServer

ROOT = Path(__file__).parent.parent.parent
SMALL = ROOT / "export" / "small" / "qwen"
MODELS = ["qwen", "qwen_scorer", "qwen_describer"]
EXPLODING = "exploding_scorer"  # its prompt makes vLLM's stand-in fail


@pytest.fixture(scope="module")
def pairs(panoramas: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    """Six pairs, (256, 512, 3): three as they are, and blurred."""
    cuts = [np.ascontiguousarray(panoramas[0][128:384, x : x + 512]) for x in (0, 200, 400)]
    return cuts + [cv2.GaussianBlur(cut, (0, 0), 6) for cut in cuts]


def build(folder: Path, **options: object) -> Path:
    """The scorer's part of a repository."""
    for name in MODELS:
        copy_model(name, folder)
    export_qwen(SMALL, folder, report=lambda line: None, **options)
    return folder


@pytest.fixture(scope="module")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """With a vision tower for 256×512 besides."""
    folder = build(tmp_path_factory.mktemp("torch") / "repository", vision_size=(256, 512))
    with BriefServer(folder) as running:
        yield running


@pytest.fixture(scope="module")
def torch_client(torch_server: LocalServer) -> Iterator[Client]:
    with Client(torch_server.grpc_url) as client:
        yield client


@pytest.mark.parametrize("mode", ["expected", "levels"])
def test_a_mode_without_decoding_scores_and_says_nothing(
    torch_client: Client, pairs: list[np.ndarray], mode: str
) -> None:
    together = torch_client.score(pairs, mode=mode)
    assert all(0 <= score.final <= 1 for score in together)
    assert all(score.raw == "" and np.isnan(score.clarity) for score in together)
    alone = [torch_client.score(pair, mode=mode).final for pair in pairs]
    np.testing.assert_allclose([score.final for score in together], alone, atol=1e-4)
    finals = np.array(alone)
    assert (finals[:3] > finals[3:]).all()  # blurred


def test_a_batch_of_16_scores_as_16_requests(torch_client: Client, pairs: list[np.ndarray]) -> None:
    batch = (pairs * 3)[:16]
    together = torch_client.score(batch)
    alone = [torch_client.score(pair) for pair in batch]
    assert [score.raw for score in together] == [score.raw for score in alone]
    assert not any(np.isnan(score.final) for score in together)


def test_the_mode_is_checked_and_both_clients_know_it(
    torch_server: LocalServer, torch_client: Client, pairs: list[np.ndarray]
) -> None:
    with pytest.raises(InvalidInput, match="mode is 'fast'; expected one of generate, expected"):
        torch_client.score(pairs[0], mode="fast")

    async def ask() -> float:
        async with AsyncClient(torch_server.grpc_url) as client:
            return (await client.score(pairs[0], mode="levels")).final

    assert asyncio.run(ask()) == torch_client.score(pairs[0], mode="levels").final


def served(client: Client, model: str) -> int:
    """How many images it has worked on."""
    return client.statistics(model)[model].inferences


def test_the_exported_tower_sees_its_own_size_and_the_built_in_one_the_rest(
    torch_client: Client, pairs: list[np.ndarray]
) -> None:
    before = served(torch_client, "qwen_vision")
    seen = torch_client.score(pairs, mode="expected")
    assert served(torch_client, "qwen_vision") == before + len(pairs)
    square = np.ascontiguousarray(pairs[0][:, :256])
    others = torch_client.score([square, pairs[0]], mode="expected")
    assert served(torch_client, "qwen_vision") == before + len(pairs) + 1
    assert others[1].final == pytest.approx(seen[0].final, abs=1e-4)


def test_the_exported_tower_changes_no_score(
    torch_client: Client, pairs: list[np.ndarray], tmp_path: Path
) -> None:
    with (
        BriefServer(build(tmp_path / "repository")) as plain,
        Client(plain.grpc_url) as client,
    ):
        assert not any(model.name == "qwen_vision" for model in client.models())
        expected = [score.final for score in client.score(pairs, mode="expected")]
        replies = [score.raw for score in client.score(pairs)]
    got = [score.final for score in torch_client.score(pairs, mode="expected")]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert [score.raw for score in torch_client.score(pairs)] == replies


@pytest.fixture
def folder(pairs: list[np.ndarray], tmp_path: Path) -> Path:
    for index, pair in enumerate(pairs):
        cv2.imwrite(str(tmp_path / f"{index}.png"), pair[..., ::-1])
    return tmp_path


def test_compare_says_how_far_the_modes_agree(
    torch_server: LocalServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["score", str(folder), "--compare", "--url", torch_server.grpc_url]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["first"], row["second"]) for row in rows] == [
        ("generate", "expected"),
        ("generate", "levels"),
        ("expected", "levels"),
    ]
    for row in rows:
        counts = ("both_pass", "both_fail", "only_first", "only_second")
        assert sum(row[name] for name in counts) == row["pairs"] == 6
        assert row["spearman"] > 0.5
    assert main([*command, "--threshold", "0.5"]) == 0
    table = capsys.readouterr().out
    assert "6 pairs at a threshold of 0.5" in table
    assert "best threshold" in table


def test_a_mode_is_asked_for_by_name(
    torch_server: LocalServer, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["score", str(folder), "--url", torch_server.grpc_url, "--json"]
    assert main([*command, "--mode", "levels"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [Path(entry["image"]).name for entry in entries] == [f"{i}.png" for i in range(6)]
    assert all(entry["clarity"] is None and entry["final"] is not None for entry in entries)


# A model with the vLLM backend's tensors, as its src/utils/request.py reads and answers them, around
# the same weights.
STANDIN = """
import base64, json, sys
import cv2, numpy as np, torch, triton_python_backend_utils as pb_utils
from transformers import AutoModelForImageTextToText, AutoProcessor

class TritonPythonModel:
    def initialize(self, args):
        arguments = json.load(open(args["model_repository"] + "/1/model.json"))
        assert pb_utils.using_decoupled_model_transaction_policy(json.loads(args["model_config"]))
        self.processor = AutoProcessor.from_pretrained(arguments["model"])
        pixels = arguments["mm_processor_kwargs"]["max_pixels"]
        self.processor.image_processor.size["longest_edge"] = pixels
        self.model = AutoModelForImageTextToText.from_pretrained(arguments["model"]).eval()
        self.most = arguments["max_logprobs"]

    def execute(self, requests):
        for request in requests:
            try:
                response = pb_utils.InferenceResponse(self.answer(request))
            except Exception as error:
                error = pb_utils.TritonError(f"Error generating stream: {error}")
                response = pb_utils.InferenceResponse(error=error)
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            request.get_response_sender().send(response, flags=final)

    @torch.inference_mode()
    def answer(self, request):
        def value(name):
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        text = value("text_input")[0].decode()
        sampling = json.loads(value("sampling_parameters")[0])
        assert set(sampling) <= {"temperature", "max_tokens", "logprobs", "repetition_penalty"}
        assert sampling["temperature"] == 0 and sampling.get("logprobs", 0) <= self.most
        if "explode" in text:
            raise ValueError("the prompt says so")
        (image,) = value("image")
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(image.decode()), np.uint8), cv2.IMREAD_COLOR)
        pixels = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1])).permute(2, 0, 1)
        inputs = self.processor(images=[pixels], text=[text], return_tensors="pt")
        start = inputs["input_ids"].shape[1]
        out = self.model.generate(**inputs, max_new_tokens=sampling["max_tokens"], do_sample=False,
                                  output_logits=True, return_dict_in_generate=True)
        said = self.processor.decode(out.sequences[0, start:], skip_special_tokens=True)
        said = said if value("exclude_input_in_output")[0] else text + said
        tensors = [self.tensor("text_output", said)]
        if value("return_logprobs")[0]:
            positions = [self.top(logits[0], sampling["logprobs"]) for logits in out.logits]
            tensors.append(self.tensor("logprobs", json.dumps(positions)))
        return tensors

    def tensor(self, name, text):
        return pb_utils.Tensor(name, np.array([text.encode()], np.object_))

    def top(self, logits, count):
        found = logits.log_softmax(-1).topk(count)
        return {
            token: {"logprob": value, "rank": rank, "decoded_token": self.processor.decode([token])}
            for rank, (value, token) in enumerate(zip(*map(torch.Tensor.tolist, found)), start=1)
        }
"""


@pytest.fixture(scope="module")
def vllm_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("vllm") / "repository", engine="vllm")
    config = folder / VLLM / "config.pbtxt"
    text = config.read_text()
    config.write_text(
        text.replace('backend: "vllm"', 'backend: "python"').replace("KIND_MODEL", "KIND_CPU")
    )
    (folder / VLLM / "1" / "model.py").write_text(STANDIN)
    exploding = Path(shutil.copytree(folder / "qwen_scorer", folder / EXPLODING))
    (exploding / "1" / "prompt.txt").write_text("explode")
    config = exploding / "config.pbtxt"
    config.write_text(config.read_text().replace('"qwen_scorer"', f'"{EXPLODING}"', 1))
    return folder


@pytest.fixture(scope="module")
def vllm_client(vllm_repository: Path) -> Iterator[Client]:
    with BriefServer(vllm_repository) as running, Client(running.grpc_url) as client:
        yield client


def test_both_engines_give_the_same_replies(
    torch_client: Client, vllm_client: Client, pairs: list[np.ndarray]
) -> None:
    ours, theirs = torch_client.score(pairs), vllm_client.score(pairs)
    assert [score.final for score in theirs] == [score.final for score in ours]
    assert [score.raw for score in theirs] == [score.raw for score in ours]
    describe = [client.describe(pairs[0]).text for client in (torch_client, vllm_client)]
    assert describe[0] == describe[1] != ""


@pytest.mark.parametrize("mode", ["expected", "levels"])
def test_both_engines_read_the_same_score(
    torch_client: Client, vllm_client: Client, pairs: list[np.ndarray], mode: str
) -> None:
    ours, theirs = (client.score(pairs, mode=mode) for client in (torch_client, vllm_client))
    # The backend sends 20 tokens' probabilities; what a further digit holds is lost.
    np.testing.assert_allclose(
        [score.final for score in theirs], [score.final for score in ours], atol=2e-3
    )


def test_what_vllm_says_of_a_failure_reaches_the_caller(
    vllm_client: Client, pairs: list[np.ndarray]
) -> None:
    said = "qwen_vllm: Error generating stream: the prompt says so"
    with pytest.raises(InferenceFailed, match=said):
        vllm_client.infer(EXPLODING, {"IMAGES": pairs[0][None]}, {"SCORE": 0})


COUNTS = """


class _Counts:
    def __init__(self, *settings): pass

    async def answer(self, images, *question):
        return [(str(len(images)), 0.5) for _ in images]
"""


@pytest.mark.parametrize(
    ("across", "together"), [("true", ["3", "3", "3"]), ("false", ["1", "2", "2"])]
)
def test_requests_share_a_batch_or_not_as_the_config_says(
    tmp_path: Path, across: str, together: list[str]
) -> None:
    copy_model("qwen", tmp_path)
    code = tmp_path / "qwen" / "1" / "model.py"
    code.write_text(code.read_text().replace('"torch": _Torch', '"torch": _Counts') + COUNTS)
    (tmp_path / "qwen" / "1" / "qwen.json").write_text('{"engine": "torch"}')
    config = tmp_path / "qwen" / "config.pbtxt"
    text = config.read_text().replace("microseconds: 5000", "microseconds: 1000000")
    key = 'key: "batch_across_requests" value { string_value: '
    assert f'{key}"true"' in text
    config.write_text(text.replace(f'{key}"true"', f'{key}"{across}"'))
    image = np.zeros((28, 28, 3), np.uint8)

    def question(count: int) -> dict[str, np.ndarray]:
        texts = {"SYSTEM_PROMPT": b"Look.", "READING": b"text", "STOP_AFTER": b""}
        asked = {name: np.full((count, 1), text, object) for name, text in texts.items()}
        limit = np.ones((count, 1), np.int32)
        return {"IMAGE": np.stack([image] * count), "MAX_NEW_TOKENS": limit} | asked

    async def main(url: str) -> list[str]:
        async with AsyncClient(url) as client:
            asked = [
                client.infer("qwen", question(count), {"TEXT": 0, "VALUE": 0}) for count in (1, 2)
            ]
            return [
                text.decode() for got in await asyncio.gather(*asked) for text in got["TEXT"].flat
            ]

    with BriefServer(tmp_path) as server:
        assert asyncio.run(main(server.grpc_url)) == together
