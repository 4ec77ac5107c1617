"""`panotriton export`: build what the server loads."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

from panotriton.cli.places import check_folder
from panotriton.errors import ExportError, InvalidInput, quoted
from panotriton.models.imports import uncollected
from panotriton.pipeline.networks import OSEDIFF
from panotriton.pipeline.sizes import ImageSize
from panotriton.server.engines import ENGINES

_EXAMPLES = """\
examples:
  panotriton export --preset small                 the small weights that come with the project
  panotriton export --preset small --output /srv/models
  panotriton export osediff --base stable-diffusion-2-1-base --checkpoint osediff.pkl
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --precision fp16 --provider cuda
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --precision fp16 --provider cuda \
      --shapes 512x512,512x1024@2,1024x2048@1
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --precision fp16 --provider cuda --gpus 0,1
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --precision bf16 --provider openvino
  panotriton export osediff --base SD21 --checkpoint osediff.pkl --tagger ram_swin_large_14m.pth \
      --dape DAPE.pth --tags ram_tag_list.txt --thresholds ram_tag_list_threshold.txt
  panotriton export osediff --preset full-random   the real size, random weights: what will it cost?
  panotriton export qwen --model Qwen2.5-VL-7B-Instruct --dtype bf16 --max-pixels 1003520
  panotriton export qwen --model Qwen2.5-VL-7B-Instruct --max-pixels 1003520 --engine vllm
"""


def add_parser(commands: Any) -> None:
    """Add the command to the argument parser."""
    parser = commands.add_parser(
        "export",
        help="build the model repository's weights",
        description="Turn PyTorch weights into the ONNX components and folders that the model "
        "repository loads, checking each against PyTorch. A real deployment runs `osediff` and "
        "`qwen`, in any order, into the same --output.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=["small"], help="weights that need no download")
    parser.add_argument(
        "--provider",
        choices=("openvino", "cpu", "cuda"),
        default="openvino",
        help="what runs the preset's networks: OpenVINO, onnxruntime where a server lacks that, or "
        "onnxruntime on a GPU (%(default)s)",
    )
    _add_output(parser)
    parser.set_defaults(run=_run_preset)
    parts = parser.add_subparsers(metavar="PART", title="parts")
    _add_osediff(parts)
    _add_qwen(parts)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("repository"),
        metavar="DIR",
        help="model repository to build, code and weights (%(default)s)",
    )


# Option → the parameter of `open_tagger`, and what the file is.
_TAGGER_FILES = {
    "tagger": ("ram", "RAM's ram_swin_large_14m.pth"),
    "dape": ("dape", "SeeSR's DAPE.pth, merged into it"),
    "tags": ("tags", "ram_tag_list.txt, as in RAM's ram/data"),
    "thresholds": ("thresholds", "ram_tag_list_threshold.txt, from there too"),
}


def _add_osediff(parts: Any) -> None:
    engines = ENGINES.values()
    parser = parts.add_parser(
        "osediff",
        help="export Stable Diffusion 2.1-base with OSEDiff's adapters",
        description="Merge osediff.pkl into the base, export the four networks to ONNX and compare "
        "each, and one whole image, with PyTorch. With the four files of the tagger, which only go "
        "together, prompts begin with what is in the image; without, they are the callers' alone, "
        "unless the repository has a tagger from before, which stays.",
    )
    parser.add_argument("--base", type=Path, metavar="DIR", help="Stable Diffusion 2.1-base folder")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="osediff.pkl")
    parser.add_argument(
        "--preset",
        choices=["full-random"],
        help="instead of the two: Stable Diffusion 2.1-base's architecture with random weights, to see "
        "what the real ones will cost on a machine (15 GB of disk)",
    )
    for name, (_, help_text) in _TAGGER_FILES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=help_text)
    parser.add_argument(
        "--precision",
        choices=list(dict.fromkeys(each for engine in engines for each in engine.precisions)),
        default="fp32",
        help="fp16: the weights, the decoder's where whole pictures keep 45 dB of fp32's; bf16, with "
        "openvino: the factors of products inside the networks' blocks, for CPUs with AVX512_BF16 or AMX "
        "(%(default)s)",
    )
    parser.add_argument(
        "--provider",
        choices=list(ENGINES),
        default="cpu",
        help="what runs the networks, written to their configs: "
        + "; ".join(f"{each.name}, {each.about}" for each in engines)
        + " (%(default)s)",
    )
    parser.add_argument(
        "--shapes",
        type=_image_sizes,
        metavar="HxW@UPSCALE,...",
        help="with cuda and tensorrt: sizes of images to be expected, and how many times larger they are "
        "to become (2). What they need is ready when the server is; other sizes work, and are slow the "
        "first time (512x1024@2,512x512@2: a group's pairs and in-between views)",
    )
    _add_gpus(parser, "with cuda and tensorrt: ")
    _add_output(parser)
    parser.set_defaults(run=_run_osediff)


def _add_qwen(parts: Any) -> None:
    parser = parts.add_parser(
        "qwen",
        help="serve a Qwen-VL folder",
        description="Point the repository at a Hugging Face folder of Qwen2-VL, Qwen2.5-VL or "
        "Qwen3-VL. The folder is checked and used where it lies; no code in it is run.",
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompt-file", type=Path, help="quality prompt, instead of the default")
    parser.add_argument("--max-pixels", type=int, help="an image's pixel budget in the processor")
    parser.add_argument("--dtype", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    parser.add_argument(
        "--engine",
        choices=["torch", "vllm"],
        default="torch",
        help="PyTorch in the server's process, or Triton's vLLM backend, in NVIDIA's vLLM container "
        "(%(default)s)",
    )
    parser.add_argument(
        "--decode",
        choices=["dynamic", "static"],
        default="dynamic",
        help="static: replies by buffers of fixed shape, so that on a GPU a token's work is compiled and "
        "replayed whole; the first replies of each batch size wait for that (%(default)s)",
    )
    parser.add_argument(
        "--export-vision",
        type=_size,
        metavar="HxW",
        help="export the vision tower to ONNX, for images of this size alone (none)",
    )
    parser.add_argument(
        "--no-question",
        dest="question",
        action="store_false",
        help="do not ask the model one question first, which takes its memory",
    )
    _add_gpus(parser, "")
    _add_output(parser)
    parser.set_defaults(run=_run_qwen)


def _add_gpus(parser: argparse.ArgumentParser, when: str) -> None:
    parser.add_argument(
        "--gpus",
        type=_gpu_numbers,
        metavar="N,...",
        help=f"{when}numbers of the GPUs to run on, each with an instance and weights of its own (every "
        "GPU that the server sees)",
    )


def _gpu_numbers(text: str) -> list[int]:
    """0,1."""
    numbers = [int(each) for each in text.split(",") if each.isdecimal()]
    if len(numbers) != text.count(",") + 1 or len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(
            f"{quoted(text)} names no GPUs; expected different numbers, as 0,1"
        )
    return numbers


def _size(text: str) -> tuple[int, int]:
    """1024x2048 → (1024, 2048): height and width in px."""
    height, by, width = text.partition("x")
    if not (by and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no size; expected HxW, as 1024x2048")
    return int(height), int(width)


def _image_sizes(text: str) -> list[ImageSize]:
    """512x512,512x1024@2."""
    try:
        return [ImageSize.of(each) for each in text.split(",")]
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run_preset(options: argparse.Namespace) -> int:
    if options.preset is None:
        raise InvalidInput("nothing to export: give --preset small, or a part (see --help)")
    presets = _export_code("presets")
    return _timed(options, lambda: presets.export_small(options.output, options.provider, _report))


def _run_osediff(options: argparse.Namespace) -> int:
    given = (options.base is not None, options.checkpoint is not None)
    if given != ((False, False) if options.preset else (True, True)):
        raise InvalidInput("give --base and --checkpoint, or --preset full-random alone")
    if options.shapes and ENGINES[options.provider].shape_entries is None:
        knowing = " or ".join(each.name for each in ENGINES.values() if each.shape_entries)
        raise InvalidInput(
            f"--shapes means nothing to {options.provider}; use --provider {knowing}"
        )
    if options.gpus and not ENGINES[options.provider].on_gpu:
        knowing = " or ".join(each.name for each in ENGINES.values() if each.on_gpu)
        raise InvalidInput(f"--gpus means nothing to {options.provider}; use --provider {knowing}")
    osediff, presets = _export_code("osediff"), _export_code("presets")

    def work() -> None:
        tagger = _open_tagger(options)  # refused before minutes go into the rest
        common = {
            "precision": options.precision,
            "provider": options.provider,
            "report": _report,
        }
        sizes = {"sizes": options.shapes} if options.shapes else {}
        if options.preset:
            presets.export_full_random(options.output, **common, **sizes)
        else:
            paths = (options.base, options.checkpoint, options.output)
            osediff.export_osediff(*paths, with_code=True, **common, **sizes)
        if tagger is not None:
            _export_code("tagger").export_tagger(tagger, options.output, **common)
        for model in OSEDIFF.models if options.gpus else ():
            if (options.output / model).is_dir():
                _export_code("configs").set_gpus(options.output / model, options.gpus)

    return _timed(options, work)


def _open_tagger(options: argparse.Namespace) -> Any:
    """The tagger's files, checked; None where none was named."""
    given = {option: getattr(options, option) for option in _TAGGER_FILES}
    absent = [f"--{option}" for option, path in given.items() if path is None]
    if len(absent) == len(given):
        return None
    if absent:
        raise InvalidInput(
            f"a tagger needs {', '.join(f'--{option}' for option in given)}; {', '.join(absent)} "
            "is missing"
        )
    files = {_TAGGER_FILES[option][0]: path for option, path in given.items()}
    return _export_code("tagger").open_tagger(**files)


def _run_qwen(options: argparse.Namespace) -> int:
    qwen = _export_code("qwen")
    if options.gpus and options.engine != "torch":
        raise InvalidInput(
            f"--gpus means nothing to {options.engine}, which has tensor_parallel_size in "
            "qwen_vllm/1/model.json"
        )

    def work() -> None:
        qwen.export_qwen(
            options.model,
            options.output,
            prompt_file=options.prompt_file,
            max_pixels=options.max_pixels,
            dtype=options.dtype,
            engine=options.engine,
            vision_size=options.export_vision,
            decode=options.decode,
            question=options.question,
            with_code=True,
            report=_report,
        )
        if options.gpus:
            _export_code("configs").set_gpus(options.output / "qwen", options.gpus)

    return _timed(options, work)


def _export_code(module: str) -> Any:
    try:
        with uncollected():
            return importlib.import_module(f"panotriton_export.{module}")
    except ImportError as error:
        raise ExportError(
            f"exporting needs {error.name}: pip install 'panotriton[export]'"
        ) from error


def _timed(options: argparse.Namespace, work: Any) -> int:
    began = time.perf_counter()
    check_folder(options.output)
    work()
    print(f"exported to {options.output} in {time.perf_counter() - began:.0f} s")
    return 0


def _report(line: str) -> None:
    print(line, flush=True)
