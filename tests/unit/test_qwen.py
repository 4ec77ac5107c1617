"""The Qwen engine without a server: the small trained model, and untrained ones of its sister classes."""

import json
import os
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from panotriton.errors import ExportError, InvalidInput
from panotriton.models import qwen as qwen_module
from panotriton.models.qwen import FixedVision, QwenVL, choose_attention, choose_dtype
from panotriton.pipeline.quality import LEVELS, parse_reply
from panotriton.server.engines import CPU
from panotriton.server.repository import copy_model
from panotriton_export.qwen import check_folder, export_qwen, read_prompt
from panotriton_export.qwen_vision import FixedGridTower, export_vision, grid_of, load_tower
from panotriton_export.train_small.vision_language.degrade import Scores
from panotriton_export.train_small.vision_language.replies import level, number

ROOT = Path(__file__).parent.parent.parent
SMALL = ROOT / "export" / "small" / "qwen"
PROMPT = (ROOT / "client" / "panotriton" / "prompts" / "quality.txt").read_text().strip()


def engine(folder: Path, **options: object) -> QwenVL:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own next releases
        return QwenVL(folder, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def qwen() -> QwenVL:
    return engine(SMALL, max_batch=3)


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


TOKENS = {
    f"{name}_token_id": f"<|{mark}|>"
    for name, mark in (
        ("image", "image_pad"),
        ("video", "video_pad"),
        ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    )
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small folder of each class: Qwen2.5-VL trained, Qwen2-VL and Qwen3-VL with random weights."""
    small = AutoProcessor.from_pretrained(SMALL)
    text = json.loads((SMALL / "config.json").read_text())["text_config"]
    text = {name: text[name] for name in text if name not in ("model_type", "layer_types")}
    ids = {name: small.tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    ids["tie_word_embeddings"] = True
    seen = {"depth": 3, "num_heads": 4, "initializer_range": 0.1}
    torch.manual_seed(0)
    two = Qwen2VLConfig(
        text_config=text, vision_config=seen | {"embed_dim": 64, "hidden_size": 96}, **ids
    )
    text["rope_parameters"]["mrope_interleaved"] = True
    wide = {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 96}
    deep = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 16}
    three = Qwen3VLConfig(
        text_config=text | {"head_dim": 24}, vision_config=seen | wide | deep, **ids
    )
    parts = {"tokenizer": small.tokenizer, "chat_template": small.chat_template}
    sized = Qwen2VLImageProcessor(size=dict(small.image_processor.size), patch_size=16)
    models = {
        "qwen2_vl": (
            Qwen2VLForConditionalGeneration(two),
            Qwen2VLProcessor(small.image_processor, video_processor=small.video_processor, **parts),
        ),
        "qwen3_vl": (
            Qwen3VLForConditionalGeneration(three),
            Qwen3VLProcessor(sized, video_processor=Qwen3VLVideoProcessor(), **parts),
        ),
    }
    work = tmp_path_factory.mktemp("folders")
    for name, (model, processor) in models.items():
        model.save_pretrained(work / name)
        processor.save_pretrained(work / name)
    return {name: work / name for name in models} | {"qwen2_5_vl": SMALL}


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_kept_prefix_changes_nothing(
    folders: dict[str, Path], images: list[np.ndarray], name: str
) -> None:
    kept, computed = (engine(folders[name], prefix_cache=on) for on in (True, False))
    assert kept.prefix_cache
    for _ in range(2):  # the first pass fills it, the second uses it
        got, expected = (
            model._skeleton_logits(images, PROMPT, "Final Score: 0.", keep=3)
            for model in (kept, computed)
        )
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert len(kept._prefixes) == 1
    replies = [model.reply(images, PROMPT, 24) for model in (kept, computed)]
    assert replies[0] == replies[1]


def test_only_the_latest_prefixes_are_kept(images: list[np.ndarray]) -> None:
    model = engine(SMALL)
    first = model.read_number(images[:1], "prompt 0")
    for i in range(1, 6):
        model.read_number(images[:1], f"prompt {i}")
    assert len(model._prefixes) == 4
    assert model.read_number(images[:1], "prompt 0") == pytest.approx(first, abs=1e-6)
    model.read_number(images[:1], "word " * 5000)  # longer than is worth keeping
    assert len(model._prefixes) == 4


SIZES = [
    (168, 336),  # kept as it is
    (224, 224),
    (30, 40),  # enlarged to the least number of pixels
    (100, 380),  # rounded to whole patches
    (28, 500),
    (301, 299),
    (1024, 2048),  # shrunk to the budget
]


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_process_vision_info(qwen: QwenVL, size: tuple[int, int]) -> None:
    """The reference resizes PIL images, we tensors: equal where nothing is resized, else to a grey level."""
    panorama = cv2.imread(str(ROOT / "tests" / "data" / "panoramas" / "city.jpg"))[:, :, ::-1]
    image = np.ascontiguousarray(cv2.resize(panorama, size[::-1]))
    processor = qwen.processor.image_processor
    least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
    picture = {"type": "image", "image": Image.fromarray(image)}
    picture |= {"min_pixels": least, "max_pixels": most}
    (resized,), _ = process_vision_info([{"role": "user", "content": [picture]}])
    expected = processor(images=[resized], return_tensors="pt")
    ours = qwen.inputs([image], PROMPT)
    assert ours["image_grid_thw"].tolist() == expected["image_grid_thw"].tolist()
    levels = torch.tensor(processor.image_std).repeat_interleave(2 * 14 * 14) * 255  # (1176)
    difference = ((ours["pixel_values"] - expected["pixel_values"]) * levels).abs()
    if size in SIZES[:2]:
        assert difference.max() == 0
    assert difference.max() < 1.01
    assert difference.mean() < 0.02


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_pixels", [None, 20_000])
def test_the_grid_is_the_processors(
    qwen: QwenVL, size: tuple[int, int], max_pixels: int | None
) -> None:
    blank = torch.zeros(3, *size, dtype=torch.uint8)
    bounds = dict(qwen.processor.image_processor.size)
    bounds["longest_edge"] = max_pixels or bounds["longest_edge"]
    made = qwen.processor.image_processor(images=[blank], size=bounds, return_tensors="pt")
    assert [1, *grid_of(SMALL, size, max_pixels)] == made["image_grid_thw"][0].tolist()


@pytest.mark.parametrize(
    ("size", "max_pixels"), [((27, 500), None), ((28, 5601), None), ((28, 500), 12_544)]
)
def test_a_size_without_a_grid_is_refused(size: tuple[int, int], max_pixels: int | None) -> None:
    with pytest.raises(ExportError, match=rf"for {size[0]}x{size[1]} px .* sides of 28 px or more"):
        grid_of(SMALL, size, max_pixels)


def test_a_tower_for_one_size_stands_in_for_the_models_own(images: list[np.ndarray]) -> None:
    grid = grid_of(SMALL, (256, 512), None)
    tower = FixedGridTower(load_tower(SMALL), grid)
    asked: list[int] = []

    @torch.inference_mode()
    def see(patches: np.ndarray) -> np.ndarray:
        asked.append(len(patches))
        return tower(torch.from_numpy(patches)).numpy()

    ours, theirs = engine(SMALL, vision=FixedVision(grid, see)), engine(SMALL)
    square = cv2.resize(images[0], (224, 224))
    mixed = [images[0], square, images[2]]
    np.testing.assert_allclose(
        ours.read_number(mixed, PROMPT), theirs.read_number(mixed, PROMPT), atol=1e-4
    )
    assert asked == [2]
    assert ours.reply(mixed, PROMPT, 200) == theirs.reply(mixed, PROMPT, 200)
    ours.read_number([square], PROMPT)
    assert asked == [2, 2]


@pytest.mark.parametrize(
    ("name", "size"),
    [("qwen2_5_vl", (224, 448)), ("qwen2_5_vl", (100, 380)), ("qwen2_vl", (140, 84))],
)
def test_the_exported_tower_equals_pytorch(
    folders: dict[str, Path], tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    copy_model("qwen_vision", tmp_path)
    grid, results = export_vision(folders[name], tmp_path, size, None)
    assert [result.passed for result in results] == [True, True]
    graph = CPU.open(tmp_path / "qwen_vision" / "1" / "model.onnx")
    patches = np.random.default_rng(0).normal(size=(5, grid[0] * grid[1], 1176))
    (tokens,) = graph.run(["TOKENS"], {"PATCHES": patches.astype(np.float32)})
    assert tokens.shape == (5, grid[0] * grid[1] // 4, 96)
    config = (tmp_path / "qwen_vision" / "config.pbtxt").read_text()
    assert f"[ {grid[0] * grid[1]}, 1176 ]" in config
    assert f"[ {grid[0] * grid[1] // 4}, 96 ]" in config


def test_a_tower_of_several_outputs_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ExportError, match="Qwen3VLVisionModel cannot be exported; .* --export-vision"
    ):
        load_tower(folders["qwen3_vl"])


def test_what_a_device_gets() -> None:
    assert choose_dtype("auto", bf16_supported=True, on_gpu=True) == "bfloat16"
    assert choose_dtype("auto", bf16_supported=False, on_gpu=True) == "float16"
    assert choose_dtype("auto", bf16_supported=False, on_gpu=False) == "auto"
    assert choose_dtype("float32", bf16_supported=True, on_gpu=True) == "float32"
    assert choose_attention("bfloat16", flash_installed=True) == "flash_attention_2"
    assert choose_attention("float32", flash_installed=True) == "sdpa"
    assert choose_attention("bfloat16", flash_installed=False) == "sdpa"


def test_what_cannot_fit_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidInput, match=r"images of 57000 pixels need about .* cpu has"):
        engine(SMALL, max_batch=10_000_000)


def test_its_share_of_a_gpu_is_what_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where more is free: the networks beside it get the rest."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90_000_000, 100_000_000))
    asked = (SMALL, "float32", "cuda:0", 1, 57_000)
    qwen_module.check_memory(*asked, 0.9)
    with pytest.raises(InvalidInput, match=r"cuda:0, of which it may take 10%, has 0.0 GB free"):
        qwen_module.check_memory(*asked, 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_works_in_bf16_and_agrees_with_the_cpu(images: list[np.ndarray]) -> None:
    on_gpu, on_cpu = engine(SMALL, device="cuda:0"), engine(SMALL)
    assert next(on_gpu.model.parameters()).dtype == torch.bfloat16
    np.testing.assert_allclose(
        on_gpu.read_number(images, PROMPT), on_cpu.read_number(images, PROMPT), atol=0.05
    )


def test_replies_in_batches_equal_single_ones(qwen: QwenVL, images: list[np.ndarray]) -> None:
    together = qwen.reply(images, PROMPT, 512)
    alone = [qwen.reply([image], PROMPT, 512)[0] for image in images]
    assert together == alone
    assert not any(np.isnan(parse_reply(reply).final_score) for reply in together)


def test_what_a_call_left_behind_does_not_reach_the_next(
    qwen: QwenVL, images: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two sizes in turn, and offsets of another batch that a library may have kept."""
    alone = {count: engine(SMALL).reply(images[:count], PROMPT, 64) for count in (1, 3)}
    generate, kept = qwen.model.generate, []

    def watched(**inputs: object) -> object:
        kept.append(qwen.model.model.rope_deltas)
        return generate(**inputs)

    monkeypatch.setattr(qwen.model, "generate", watched)
    for count in (1, 3, 1, 3):
        qwen.model.model.rope_deltas = torch.full((2, 1), 1000)
        assert qwen.reply(images[:count], PROMPT, 64) == alone[count]
    assert kept == [None] * 4


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


def test_the_small_model_means_the_same_in_every_mode(
    qwen: QwenVL, images: list[np.ndarray]
) -> None:
    """It was taught to; a real model was not."""
    written = [parse_reply(reply).final_score for reply in qwen.reply(images, PROMPT, 512)]
    for read in (qwen.read_number, qwen.read_level):
        np.testing.assert_allclose(read(images, PROMPT), written, atol=0.12)


def test_the_levels_that_are_taught_average_to_the_score() -> None:
    rng = np.random.default_rng(0)
    for final in (0.0, 0.13, 0.7, 0.96, 1.0):
        scores = Scores(*[final] * 5)
        drawn = [LEVELS[level(scores, rng).said] for _ in range(2000)]
        assert np.mean(drawn) == pytest.approx(final, abs=0.02)
        assert np.ptp(drawn) <= 0.25
    reply = number(Scores(*[0.7] * 5))
    assert (reply.given, reply.said) == ("Final Score: ", "0.70")


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
    options = {"prompt_file": prompt, "max_pixels": 100_352, "with_code": True}
    export_qwen(folder, repository, report=lambda line: None, **options)
    assert (repository / "preprocess" / "1" / "model.py").is_file()
    assert str(folder) in (repository / "qwen" / "1" / "qwen.json").read_text()
    assert (repository / "qwen_scorer" / "1" / "prompt.txt").read_text() == "Judge."
    assert "Describe" in (repository / "qwen_describer" / "1" / "prompt.txt").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of auto, bf16"),
        ({"max_pixels": 100}, "max_pixels is 100; expected at least 3136"),
        ({"engine": "tgi"}, "engine is 'tgi'; expected one of torch, vllm"),
        ({"engine": "vllm", "vision_size": (224, 448)}, "leave --export-vision out"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(ExportError, match=says):
        export_qwen(SMALL, tmp_path, **options)


def test_an_export_drops_what_an_earlier_one_of_another_folder_left(tmp_path: Path) -> None:
    (tmp_path / "qwen" / "1").mkdir(parents=True)
    for name in ("qwen_vision", "qwen_vllm"):
        (tmp_path / name).mkdir()
    export_qwen(SMALL, tmp_path, report=lambda line: None)
    assert not (tmp_path / "qwen_vision").exists()
    assert not (tmp_path / "qwen_vllm").exists()


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


def changed(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def template_to(folder: Path, name: str, wrap=lambda text: text) -> None:
    """Move the chat template into that file's `chat_template`."""
    path = folder / "chat_template.jinja"
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    changed(folder / name, chat_template=wrap(path.read_text()))
    path.unlink()


@pytest.mark.parametrize(
    "spread",
    [
        lambda f: template_to(f, "tokenizer_config.json"),
        lambda f: template_to(
            f, "tokenizer_config.json", lambda text: [{"name": "default", "template": text}]
        ),
        lambda f: template_to(f, "processor_config.json"),
        lambda f: template_to(f, "chat_template.json"),
    ],
)
def test_a_chat_template_is_found_where_folders_have_it(
    folder: Path, images: list[np.ndarray], qwen: QwenVL, spread
) -> None:
    spread(folder)
    check_folder(folder)
    assert engine(folder).reply(images[:1], PROMPT, 8) == qwen.reply(images[:1], PROMPT, 8)


def split(folder: Path) -> None:
    """The weights as two shards, without their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for i in range(2):
        part = {name: weights[name] for name in sorted(weights)[i::2]}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")


def kept(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: template_to(f, "tokenizer_config.json", lambda _: None), "no chat template"),
        (lambda f: (f / "model.safetensors").write_text(POINTER), "git lfs pull"),
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a Git-LFS"),
        (
            lambda f: os.truncate(f / "model.safetensors", 1_000_000),
            "truncated .*has 1,000,000 bytes, and its header is for 2,575,080",
        ),
        (split, "2 files of weights .*no model.safetensors.index.json"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapters .*merge_and_unload"),
        (
            lambda f: changed(f / "config.json", quantization_config={"quant_method": "awq"}),
            r"quantized \(awq\).*--engine vllm",
        ),
        # What loads, and only a question finds out.
        (lambda f: (f / "tokenizer.json").unlink(), "does not answer a question"),
        (lambda f: (f / "chat_template.jinja").write_text("Hello."), "leaves the system turn out"),
        (lambda f: kept(f, lambda w: w.pop("visual.patch_embed.proj.weight")), "lacks the weights"),
        (lambda f: kept(f, lambda w: w["visual.merger.ln_q.weight"].fill_(torch.nan)), "finite"),
    ],
)
def test_what_could_not_answer_is_refused_at_the_export(folder: Path, spoil, says: str) -> None:
    spoil(folder)
    repository = folder / "repository"
    with pytest.raises(ExportError, match=says) as caught:
        export_qwen(folder, repository, report=lambda line: None)
    assert "\n" not in str(caught.value)
    assert not repository.exists()


def test_quantized_weights_are_for_vllm(folder: Path) -> None:
    changed(folder / "config.json", quantization_config={"quant_method": "gptq"})
    check_folder(folder, "vllm")


def test_a_folder_of_another_alphabet_is_linked(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path.parent / f"{tmp_path.name} Qwén")
    repository = tmp_path.parent / f"{tmp_path.name}_repository"
    for _ in range(2):
        (repository / "qwen" / "1").mkdir(parents=True, exist_ok=True)
        export_qwen(moved, repository, question=False, report=lambda line: None)
    assert json.loads((repository / "qwen" / "1" / "qwen.json").read_text())["weights"] == "weights"
    assert (repository / "qwen" / "1" / "weights").resolve() == moved


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Judge.", "Judge."),
        (b"\xef\xbb\xbfJudge \xc3\xbc.", "Judge ü."),
        (None, "cannot be read: No such file"),
        ("Judge.".encode("utf-16"), "is UTF-16, as PowerShell's > writes it"),
        (b"caf\xe9", r"is no UTF-8 \(byte 3\)"),
        (b" \n", "is empty"),
    ],
)
def test_a_prompt_file_is_text(tmp_path: Path, data: bytes | None, text: str) -> None:
    path = tmp_path / "prompt.txt"
    if data is not None:
        path.write_bytes(data)
    if text.startswith("Judge"):
        assert read_prompt(path) == text
        return
    with pytest.raises(InvalidInput, match=text):
        export_qwen(SMALL, tmp_path / "repository", prompt_file=path)
    assert not (tmp_path / "repository").exists()


def test_the_engine_is_not_imported_by_the_client() -> None:
    import subprocess  # noqa: PLC0415

    code = "import sys, panotriton, panotriton.cli; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
