"""The Qwen engine on the small trained model, without a server."""

import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest

from panotriton.errors import ExportError
from panotriton.quality import parse_reply
from panotriton.qwen import QwenVL
from panotriton_export.qwen import check_folder, export_qwen

ROOT = Path(__file__).parent.parent.parent
SMALL = ROOT / "export" / "small" / "qwen"
PROMPT = (ROOT / "client" / "panotriton" / "prompts" / "quality.txt").read_text().strip()


@pytest.fixture(scope="module")
def qwen() -> QwenVL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own next releases
        return QwenVL(SMALL, max_batch=3)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Pairs of several sizes and qualities, cut from real panoramas."""
    cuts = []
    for name, width in (("courtyard", 512), ("interior", 320), ("sunrise", 512), ("city", 400)):
        panorama = cv2.imread(str(ROOT / "tests" / "data" / "panoramas" / f"{name}.jpg"))
        cut = cv2.resize(panorama, (width, width // 2))
        cuts.append(np.ascontiguousarray(cut[:, :, ::-1]))
    cuts.append(cv2.GaussianBlur(cuts[0], (0, 0), 8))
    return cuts


def test_replies_in_batches_equal_single_ones(qwen: QwenVL, images: list[np.ndarray]) -> None:
    together = qwen.reply(images, PROMPT, 512)
    alone = [qwen.reply([image], PROMPT, 512)[0] for image in images]
    assert together == alone
    assert not any(np.isnan(parse_reply(reply).final_score) for reply in together)


def test_a_reply_ends_after_the_line_that_it_is_to_end_after(
    qwen: QwenVL, images: list[np.ndarray]
) -> None:
    (whole,) = qwen.reply(images[:1], PROMPT, 512)
    (short,) = qwen.reply(images[:1], PROMPT, 512, stop_after="image clarity")
    assert short == whole[: whole.index("\n", whole.index("Image Clarity")) + 1]


@pytest.mark.parametrize("read", ["read_number", "read_level"])
def test_readings_in_batches_equal_single_ones(
    qwen: QwenVL, images: list[np.ndarray], read: str
) -> None:
    together = getattr(qwen, read)(images, PROMPT)
    alone = [getattr(qwen, read)([image], PROMPT)[0] for image in images]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert all(0 <= value <= 1.05 for value in together)


def test_no_images_no_work(qwen: QwenVL) -> None:
    assert qwen.reply([], PROMPT, 8) == []
    assert qwen.read_number([], PROMPT) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in SMALL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_good_folder_is_pointed_at_and_its_prompt_replaced(folder: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "mine.txt"
    prompt.write_text("Judge.")
    repository = tmp_path / "repository"
    (repository / "qwen" / "1").mkdir(parents=True)
    export_qwen(
        folder, repository, prompt_file=prompt, max_pixels=100_352, report=lambda line: None
    )
    assert str(folder) in (repository / "qwen" / "1" / "qwen.json").read_text()
    assert (repository / "qwen_scorer" / "1" / "prompt.txt").read_text() == "Judge."
    assert "Describe" in (repository / "qwen_describer" / "1" / "prompt.txt").read_text()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json not found"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (
            lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'),
            "is for LlamaForCausalLM; expected one of Qwen2VL",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "no .*safetensors weights .*pytorch_model.bin is a pickle",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
            ),
            "lacks 1 of 2 shards: model-2",
        ),
        (lambda f: (f / "processor_config.json").unlink(), "no processor"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "no tokenizer"),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    ],
)
def test_an_incomplete_folder_is_refused_with_what_it_lacks(folder: Path, spoil, says: str) -> None:
    spoil(folder)
    with pytest.raises(ExportError, match=says):
        check_folder(folder)


def test_the_engine_is_not_imported_by_the_client() -> None:
    import subprocess  # noqa: PLC0415

    code = "import sys, panotriton, panotriton.cli; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
