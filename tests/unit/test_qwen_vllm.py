"""The repository for Triton's vLLM backend, and what is asked of it, without either."""

import base64
import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from google.protobuf import text_format
from transformers import AutoProcessor
from tritonclient.grpc import model_config_pb2

from panotriton.errors import ExportError, InferenceFailed
from panotriton.models.qwen_vllm import Chat, Question, answer, encode, questions, tensors
from panotriton.server.repository import copy_model
from panotriton_export.qwen import export_qwen
from panotriton_export.qwen_vllm import split_template

SMALL = Path(__file__).parent.parent.parent / "export" / "small" / "qwen"
CHAT = Chat("<s>", "</s><image>", {"repetition_penalty": 1.05})

# Fields of EngineArgs in vllm/engine/arg_utils.py of vLLM 0.33.0 that a repository may want to set.
ENGINE_ARGUMENTS = {
    "allowed_local_media_path", "async_scheduling", "attention_backend", "block_size",
    "cpu_offload_gb", "disable_log_stats", "dtype", "enable_chunked_prefill",
    "enable_prefix_caching", "enforce_eager", "generation_config", "gpu_memory_utilization",
    "hf_overrides", "kv_cache_dtype", "kv_cache_memory_bytes", "limit_mm_per_prompt",
    "load_format", "logprobs_mode", "max_logprobs", "max_model_len", "max_num_batched_tokens",
    "max_num_seqs", "mm_encoder_attn_backend", "mm_processor_cache_gb", "mm_processor_kwargs",
    "model", "pipeline_parallel_size", "quantization", "revision", "seed",
    "tensor_parallel_size", "tokenizer", "tokenizer_mode", "trust_remote_code",
}  # fmt: skip
# Inputs and outputs that src/model.py of triton-inference-server/vllm_backend (8de0c14, January 2026)
# completes a config with: one that names others, or other types, would not load.
BACKEND_INPUTS = {
    "text_input": ("TYPE_STRING", [1]),
    "image": ("TYPE_STRING", [-1]),
    "stream": ("TYPE_BOOL", [1]),
    "sampling_parameters": ("TYPE_STRING", [1]),
    "exclude_input_in_output": ("TYPE_BOOL", [1]),
    "return_finish_reason": ("TYPE_BOOL", [1]),
    "return_logprobs": ("TYPE_BOOL", [1]),
}
BACKEND_OUTPUTS = {
    "text_output": ("TYPE_STRING", [-1]),
    "finish_reason": ("TYPE_STRING", [-1]),
    "logprobs": ("TYPE_STRING", [-1]),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    copy_model("qwen", folder)
    export_qwen(
        SMALL, folder, engine="vllm", dtype="bf16", max_pixels=100_352, report=lambda line: None
    )
    return folder


def described(tensors_of_config: object) -> dict[str, tuple[str, list[int]]]:
    names = model_config_pb2.DataType
    return {io.name: (names.Name(io.data_type), list(io.dims)) for io in tensors_of_config}


def test_the_config_is_one_that_the_backend_takes(repository: Path) -> None:
    text = (repository / "qwen_vllm" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("qwen_vllm", "vllm", 0)
    assert config.model_transaction_policy.decoupled
    kinds = [group.Kind.Name(group.kind) for group in config.instance_group]
    assert kinds == ["KIND_MODEL"]
    assert described(config.input).items() <= BACKEND_INPUTS.items()
    assert described(config.output).items() <= BACKEND_OUTPUTS.items()
    assert all(io.optional for io in config.input if io.name != "text_input")


def test_the_engines_arguments_are_known_and_bounded(repository: Path) -> None:
    arguments = json.loads((repository / "qwen_vllm" / "1" / "model.json").read_text())
    assert set(arguments) <= ENGINE_ARGUMENTS
    assert arguments["model"] == str(SMALL)
    assert arguments["dtype"] == "bfloat16"
    assert arguments["mm_processor_kwargs"] == {"max_pixels": 100_352}
    assert arguments["max_model_len"] == 100_352 // 28**2 + 3072
    assert arguments["trust_remote_code"] is False
    assert arguments["max_logprobs"] >= 20


def test_qwen_passes_on_and_holds_no_device(repository: Path) -> None:
    settings = json.loads((repository / "qwen" / "1" / "qwen.json").read_text())
    assert settings["engine"] == "vllm"
    assert "weights" not in settings
    text = (repository / "qwen" / "config.pbtxt").read_text()
    (group,) = text_format.Parse(text, model_config_pb2.ModelConfig()).instance_group
    assert group.Kind.Name(group.kind) == "KIND_CPU"


def test_the_chat_around_a_prompt_is_the_templates() -> None:
    processor = AutoProcessor.from_pretrained(SMALL)
    before, after = split_template(processor)
    turns = [
        {"role": "system", "content": "Judge {this}."},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    whole = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert before + "Judge {this}." + after == whole
    processor.chat_template = "<|image_pad|>"
    with pytest.raises(ExportError, match="leaves the system turn out"):
        split_template(processor)


def test_a_reply_is_one_question_and_a_number_two() -> None:
    assert questions(CHAT, "p", "text", 512) == [Question("<s>p</s><image>", 512)]
    asked = questions(CHAT, "p", "number", 1)
    assert [q.text.removeprefix("<s>p</s><image>") for q in asked] == [
        "Final Score: ",
        "Final Score: 0.",
    ]
    assert all(q.next_token and q.max_tokens == 1 for q in asked)
    (levels,) = questions(CHAT, "p", "levels", 1)
    assert levels.text.endswith("The quality of the pair is")


def test_a_penalty_goes_with_a_reply_and_not_with_a_reading() -> None:
    reply, reading = (
        tensors(Question("t", tokens, next_token=tokens == 1), b"png", CHAT) for tokens in (9, 1)
    )
    assert json.loads(reply["sampling_parameters"][0]) == {
        "temperature": 0,
        "max_tokens": 9,
        "repetition_penalty": 1.05,
    }
    assert json.loads(reading["sampling_parameters"][0]) == {
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 20,
    }
    assert reply["exclude_input_in_output"].dtype == np.bool_
    assert [bool(part["return_logprobs"][0]) for part in (reply, reading)] == [False, True]
    assert set(reply) <= set(BACKEND_INPUTS)


def test_an_image_arrives_unchanged() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    data = np.frombuffer(base64.b64decode(encode(image)), np.uint8)
    np.testing.assert_array_equal(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1], image)


def logprobs(**shares: float) -> bytes:
    """One position, as the backend writes it; _ stands for a space."""
    return json.dumps(
        [
            {
                str(token): {
                    "logprob": math.log(share),
                    "rank": token + 1,
                    "decoded_token": name.replace("_", " ").removeprefix("n"),
                }
                for token, (name, share) in enumerate(shares.items())
            }
        ]
    ).encode()


def test_a_number_is_the_expectation_over_the_digits_alone() -> None:
    found = [logprobs(n0=0.6, n1=0.2, the=0.2), logprobs(n8=0.4, n7=0.4, x=0.2)]
    text, value = answer("number", found, "")
    assert text == ""
    assert value == pytest.approx(0.25 + 0.75 * (0.75 + 0.045))


def test_tokens_that_are_written_alike_are_added() -> None:
    alike = json.loads(logprobs(n0=0.25, n1=0.5, x=0.25))
    alike[0]["2"]["decoded_token"] = "0"  # the third
    _, value = answer("number", [json.dumps(alike).encode(), logprobs(n0=1.0)], "")
    assert value == pytest.approx(0.5 + 0.5 * 0.045)


def test_a_level_counts_by_its_first_token() -> None:
    _, value = answer("levels", [logprobs(_ex=0.3, _good=0.3, _=0.4)], "")
    assert value == pytest.approx((1.0 + 0.75) / 2)


def test_nothing_is_made_up_where_no_answer_is_likely() -> None:
    with pytest.raises(InferenceFailed, match="none of ' excellent', .* use the mode 'generate'"):
        answer("levels", [logprobs(the=0.9, a=0.1)], "")
    with pytest.raises(InferenceFailed, match="no logprobs"):
        answer("number", [b"null", b"null"], "")


def test_a_reply_is_cut_after_the_line_that_ends_it() -> None:
    reply = b"Image Clarity: 0.5\nFinal Score: 0.7\nReason: none\n"
    text, value = answer("text", [reply], "final score")
    assert text == "Image Clarity: 0.5\nFinal Score: 0.7\n"
    assert math.isnan(value)
    for whole in (b"Final Score: 0.7", b"nothing\n", b""):
        assert answer("text", [whole], "final score")[0] == whole.decode()
    assert answer("text", [reply], "")[0] == reply.decode()
