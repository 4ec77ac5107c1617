"""What the scorer's ways of working save: batches, readings, the kept prefix, the exported vision tower.

Every ratio is of two ways measured in turns in this run, on the small model that comes with the project.
With --real-size instead one image and four tokens go through Qwen2.5-VL-3B's own shape: bfloat16 weights
drawn from a seed, written as a Hugging Face folder (7.5 GB under --work) and loaded by the same engine.

python tests/bench/qwen.py [--runs 5] [--threads 1] [--json out.json]
python tests/bench/qwen.py --real-size [--layers 4] [--work DIR] [--json out.json]
"""

import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import script
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from panotriton.models.qwen import FixedVision, QwenVL
from panotriton.pipeline.camera import Camera, Sphere, sample_cameras
from panotriton.server.engines import CPU, Settings
from panotriton.server.repository import copy_model
from panotriton_export.qwen_vision import export_tower, export_vision

SMALL = script.ROOT / "export" / "small" / "qwen"
PROMPT = script.ROOT / "client" / "panotriton" / "prompts" / "quality.txt"
BATCH, NEW_TOKENS = 16, 512
WIDE_GRID = (32, 64)  # patches of a 448×896 pair
REAL_PIXELS = 1_003_520
REAL_LIMIT_BYTES = 20_000_000_000
SHARD_BYTES = 1_000_000_000

# Qwen2.5-VL-3B-Instruct's config.json; the token ids are those of the small model's tokenizer.
REAL_TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128_000,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
    "tie_word_embeddings": True,
}
REAL_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


def pairs(count):
    """Pairs as the pipeline cuts them, enlarged as super-resolution leaves them: (1024, 2048, 3) each."""
    panorama = cv2.cvtColor(cv2.imread(str(script.GROUP[1])), cv2.COLOR_BGR2RGB)
    sphere = Sphere(panorama)
    rows = sample_cameras(script.SEED).reshape(-1, 2, 5)[:count]
    cut = [np.hstack([sphere.crop(Camera.from_array(c)) for c in row]) for row in rows]
    return [cv2.resize(pair, (2048, 1024), interpolation=cv2.INTER_CUBIC) for pair in cut]


def in_turns(ways, runs):
    """Median seconds of each of a few ways, measured alternately after a first round that is not counted."""
    times = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if run:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in times.items()}


def compared(what, slow, fast, difference, times):
    """A row: two ways, their times, the ratio, and how far their results differ."""
    return {
        "what": what,
        "slow": slow,
        "fast": fast,
        "slow_ms": times[slow] * 1e3,
        "fast_ms": times[fast] * 1e3,
        "ratio": times[slow] / times[fast],
        "difference": difference,
    }


def batches(qwen, images, prompt, runs):
    """16 pairs in one call against 16 calls, whole replies and read numbers."""
    readings = {
        "reply": lambda part: qwen.reply(part, prompt, NEW_TOKENS, "final score"),
        "expected": lambda part: qwen.read_number(part, prompt),
    }
    rows = []
    for name, read in readings.items():
        ways = {
            "16 calls": lambda read=read: [read([image])[0] for image in images],
            "one batch": lambda read=read: read(images),
        }
        times = in_turns(ways, runs)
        off = differ(*(way() for way in ways.values()))
        rows.append(compared(f"{name}, 16 pairs", "16 calls", "one batch", off, times))
    return rows


def differ(a, b):
    """Of numbers the largest difference, of texts how many differ."""
    if isinstance(a[0], str):
        return f"{sum(x != y for x, y in zip(a, b, strict=True))} replies"
    return f"{np.abs(np.subtract(a, b)).max():.0e}"


def readings(qwen, images, prompt, runs):
    """The whole reply against the number read directly."""
    ways = {
        "generate": lambda: qwen.reply(images, prompt, NEW_TOKENS, "final score"),
        "expected": lambda: qwen.read_number(images, prompt),
    }
    return [compared("16 pairs", *ways, "another score", in_turns(ways, runs))]


def prefixes(kept, computed, images, prompt, runs):
    """The system turn's keys and values kept against computed each time."""
    rows = []
    for count in (1, len(images)):
        for times_longer in (1, 6):
            asked = prompt * times_longer
            ways = {
                "computed": partial(computed.read_number, images[:count], asked),
                "kept": partial(kept.read_number, images[:count], asked),
            }
            off = differ(*(way() for way in ways.values()))
            tokens = len(kept.processor.tokenizer(asked)["input_ids"])
            what = f"expected, {count} pairs, prompt of {tokens} tokens"
            rows.append(compared(what, *ways, off, in_turns(ways, runs)))
    return rows


def visions(qwen, images, prompt, folder, threads, runs):
    """The tower in PyTorch against its ONNX graph: alone at two widths, and in a whole reading."""
    copy_model("qwen_vision", folder)
    grid, _ = export_vision(SMALL, folder, (1024, 2048), None)
    small = graph(folder, threads)
    rows = [
        tower_row("64 wide", qwen.model.model.visual, small, grid, count, runs) for count in (1, 16)
    ]
    exported = QwenVL(SMALL, vision=FixedVision(grid, small))
    ways = {
        "PyTorch": partial(qwen.read_number, images, prompt),
        "ONNX": partial(exported.read_number, images, prompt),
    }
    off = differ(*(way() for way in ways.values()))
    rows.append(compared("expected, 16 pairs", *ways, off, in_turns(ways, runs)))
    wide = Qwen2_5_VLConfig(vision_config=REAL_VISION | {"depth": 2, "fullatt_block_indexes": [1]})
    torch.manual_seed(0)
    tower = Qwen2_5_VisionTransformerPretrainedModel(wide.vision_config).eval()
    export_tower(tower, folder, WIDE_GRID)
    rows.append(tower_row("1280 wide, 2 of 32", tower, graph(folder, threads), WIDE_GRID, 1, runs))
    return rows


def graph(folder, threads):
    """(n, patches, values) → (n, tokens, hidden), by ONNX Runtime on so many threads."""
    opened = CPU.open(folder / "qwen_vision" / "1" / "model.onnx", Settings(threads=threads))
    return lambda patches: opened.run(["TOKENS"], {"PATCHES": patches})[0]


@torch.inference_mode()
def tower_row(what, tower, see, grid, count, runs):
    """The tower alone on random patches."""
    patches = torch.randn(count, grid[0] * grid[1], 1176)
    grids = torch.tensor([[1, *grid]] * count)
    ways = {
        "PyTorch": lambda: tower(patches.flatten(0, 1), grid_thw=grids).pooler_output,
        "ONNX": lambda: see(patches.numpy()),
    }
    tokens = ways["PyTorch"]().numpy()
    off = np.abs(tokens - ways["ONNX"]().reshape(tokens.shape)).max() / np.abs(tokens).max()
    name = f"tower of layers {what}, {count} × {grid[0]}×{grid[1]} patches"
    return compared(name, *ways, f"{off:.0e}", in_turns(ways, runs))


def measure(chosen):
    """All rows of the table."""
    torch.set_num_threads(chosen.threads)
    prompt = PROMPT.read_text().strip()
    images = pairs(BATCH)
    runs = 1 if chosen.quick else chosen.runs
    kept, computed = QwenVL(SMALL), QwenVL(SMALL, prefix_cache=False)
    rows = batches(kept, images, prompt, runs)
    rows += readings(kept, images, prompt, runs)
    rows += prefixes(kept, computed, images, prompt, runs)
    with tempfile.TemporaryDirectory() as folder:
        rows += visions(kept, images, prompt, Path(folder), chosen.threads, runs)
    return {"machine": script.machine(), "threads": chosen.threads, "runs": runs, "rows": rows}


def markdown(result):
    """One row per comparison."""
    cells = [
        (
            row["what"],
            f"{row['slow']} {row['slow_ms']:.0f} ms",
            f"{row['fast']} {row['fast_ms']:.0f} ms",
            f"{row['ratio']:.2f} ×",
            row["difference"],
        )
        for row in result["rows"]
    ]
    return script.table(("", "one way", "the other", "ratio", "results differ by"), cells)


def real_size(chosen):
    """Write the folder, and load and ask it in a process of its own, whose peak memory counts."""
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        began = time.perf_counter()
        parameters = write_real(Path(folder), chosen.layers)
        written_s = time.perf_counter() - began
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            found = process.submit(ask_real, folder, chosen.threads).result()
    return {
        "machine": script.machine(),
        "parameters": parameters,
        "layers": chosen.layers or REAL_TEXT["num_hidden_layers"],
        "written_s": written_s,
        **found,
    }


def ask_real(folder, threads):
    """One pair, four tokens. Peak memory is the process's, with what it maps of the files."""
    torch.set_num_threads(threads)
    (image,) = pairs(1)
    prompt = PROMPT.read_text().strip()
    began = time.perf_counter()
    qwen = QwenVL(Path(folder), dtype="bfloat16", max_batch=1, max_pixels=REAL_PIXELS)
    loaded = time.perf_counter()
    (reply,) = qwen.reply([image], prompt, 4)
    replied = time.perf_counter()
    (number,) = qwen.read_number([image], prompt)
    return {
        "load_s": loaded - began,
        "reply_s": replied - loaded,
        "expected_s": time.perf_counter() - replied,
        "tokens": int(qwen.inputs([image], prompt)["input_ids"].shape[1]),
        "reply": reply,
        "number": number,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def write_real(folder, layers, device="cpu"):
    """Write config, tokenizer, processor and shards in the format of the published folder."""
    for path in SMALL.iterdir():
        if path.suffix not in (".md", ".safetensors"):
            shutil.copyfile(path, folder / path.name)
    small = json.loads((SMALL / "config.json").read_text())
    ids = {name: small[name] for name in small if name.endswith("_token_id")}
    text, vision = dict(REAL_TEXT), dict(REAL_VISION)
    if layers:
        text["num_hidden_layers"] = vision["depth"] = layers
        vision["fullatt_block_indexes"] = [layers - 1]
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        dtype="bfloat16",
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        **ids,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    shapes = {published(n): p.shape for n, p in model.named_parameters()}
    return write_shards(folder, shapes, device)


def published(name):
    """A weight's name in the published folders."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def write_shards(folder, shapes, device="cpu"):
    """Seeded weights, drawn on the device; returns how many there are."""
    generator = torch.Generator(device).manual_seed(script.SEED)
    index, shard, total = {}, {}, 0
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        shard[name] = weight(name, shape, generator)
        total += shard[name].numel()
        full = sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES
        if full or number == len(shapes):
            file = f"model-{len(set(index.values())) + 1:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return total


def weight(name, shape, generator):
    """bfloat16: norms are ones, the rest is drawn with a deviation of 0.02."""
    if "norm" in name or "ln_q" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.randn(shape, generator=generator, device=generator.device)
    return (drawn * 0.02).bfloat16().cpu()


def real_markdown(result):
    """One sentence and a table."""
    rows = [
        ("written, seeded", f"{result['written_s']:.1f}"),
        ("loaded", f"{result['load_s']:.1f}"),
        (f"reply, prompt of {result['tokens']} tokens and 4 new", f"{result['reply_s']:.1f}"),
        ("expected", f"{result['expected_s']:.1f}"),
    ]
    shape = f"{result['parameters'] / 1e9:.2f} billion parameters in {result['layers']} layers"
    peak = f"peak memory {result['peak_bytes'] / 1e9:.1f} GB of {REAL_LIMIT_BYTES / 1e9:.0f}"
    return f"{shape}, bfloat16, one pair: {peak}\n\n" + script.table(("", "s"), rows)


def add_options(parser):
    parser.add_argument("--runs", type=int, default=5, help="that count, of each way")
    parser.add_argument("--threads", type=int, default=script.cores())
    parser.add_argument("--real-size", action="store_true", help="Qwen2.5-VL-3B's shape instead")
    parser.add_argument("--layers", type=int, help="so many of its layers (all)")
    parser.add_argument("--work", type=Path, help="where its 7.5 GB go meanwhile (the system's)")


def main():
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(__doc__, add_options)
    warnings.simplefilter("ignore")  # of transformers, about its own next releases
    if not chosen.real_size:
        result = measure(chosen)
        script.finish(chosen, result, markdown(result))
        return
    result = real_size(chosen)
    script.finish(chosen, result, real_markdown(result))
    if result["peak_bytes"] > REAL_LIMIT_BYTES:
        sys.exit("error: the peak is above the limit")


if __name__ == "__main__":
    script.run(main)
