"""Write ARCHITECTURE.md from the configs and code of the models: what each hop carries, by name and shape.

python docs/architecture.py            rewrite it
python docs/architecture.py --check    exit 1 where it is stale
"""

import argparse
import sys
from pathlib import Path

from calls import calls
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
ENSEMBLE = "panorama"

INTRO = """\
# Architecture

One request to the `panorama` ensemble runs the whole pipeline. Every arrow below is a tensor that the server
hands from one model to the next; none is a file. `panorama_encoded` puts `decode` before it, for callers
who hold the bytes of image files. Inputs with a dashed arrow are optional.

This page is written by `make docs` from the `config.pbtxt` files and the models' code, and `make check` fails
when it is stale. Dims and batch sizes of the networks are those of full-size weights on onnxruntime; an
export writes what its weights and its engine ask for into the copy of the config that it makes.

"""

# Room of client/panotriton, or what else imports it: what is in it, and from where it may import.
ROOMS = {
    "errors": ("one tree of errors", ()),
    "pipeline": (
        "words that both sides share: cameras, images, groups, scores, results, events",
        (),
    ),
    "client": ("what is asked of a server, by which protocol and which memory", ("pipeline",)),
    "models": ("what the model.py files run inside tritonserver", ("pipeline",)),
    "server": ("the server as a process and a folder, engines, backends", ("pipeline",)),
    "groups": ("groups on disk: folders, data sets, reports", ("client", "pipeline")),
    "web": ("gateway of the file-path services, live page", ("groups", "client", "pipeline")),
    "local": ("super-resolution in this process", ("client", "models", "server", "pipeline")),
    "cli": ("the command", ("web", "groups", "local", "client", "models", "server", "pipeline")),
    "export": (
        "`panotriton_export`, PyTorch to what the server loads",
        ("local", "groups", "models", "server", "pipeline"),
    ),
}
ROOMS_TEXT = """\
## Rooms of the package

`client/panotriton` is divided by where the code runs. An arrow is an import that is allowed; all may import
`errors`, which imports nothing. So the client needs nothing of the server, the models nothing of the client,
and whoever serves a page or keeps groups goes through the client; nothing imports the command.

"""
CALLS_TEXT = """\
## Calls between models

`osediff`, `qwen_scorer` and `qwen_describer` are thin: they call the networks below through the server, so
that the tiles and images of all requests meet in the same batches and weights exist once. `panorama_stream`
goes the ensemble's way by calls of its own. This is read from the models' code. An optional input is named
where the caller sends it; `osediff_tagger` and `qwen_vision` are asked where they were exported. A call for
a network goes to another server, over gRPC, where `PANOTRITON_PLACE` says so (`serve --place`, pools of the
chart).

"""
OVERLAP_TEXT = """
## How images overlap

An image goes through five stages. None waits for all images to be through the one before:

| stage | where | at once |
|---|---|---|
| resized to the network's size | threads of `osediff`, in bands of 256 rows | all: two more than below |
| encoder, denoiser, decoder | models of their own, a process each | `images_in_flight` |
| colours aligned | threads of `osediff`, into the answer | as above |

So while one image is decoded, the next is denoised, a third encoded and a fourth resized: the slowest network
is never idle between its first image and its last, and of the processor's work only the first resize and the
last alignment are waited for. `panorama_stream`, which asks for image after image, shares these places over
a group (`Places`). `tests/unit/test_overlap.py` shows it, by a clock that only moves when everything waits.

- **Tiles.** An image sends as many in one request as `tiles_a_request` of osediff.json says, which the
  export takes from the denoiser's config: on a GPU its largest batch, so that a pair's 8 tiles are a full
  one, on a CPU four, which those of other requests join, or with OpenVINO one, since there a batch computes
  no quicker. On a GPU no request waits for others while the network is idle; while it works, they gather.
  `tiles_in_flight` bounds what of one image is sent and not yet back.
- **Threads.** A call to another model holds a thread until it is answered. Those threads are the calls'
  own, 30 a model: with asyncio's, the cores and four, calls in flight would keep images from being resized.
- **Copies.** Pixels cross as bytes; an answer is read where the server put it; an image that needs no
  resizing is not copied. Latents between two networks pass through the processor's memory: Python models
  could keep them on a GPU by DLPack, which has not been tried.
- **A GPU's memory.** `gpu_memory_fraction` of each config.pbtxt is a model's share: half for the scorer,
  which works on whole batches in a process of its own, a quarter for the denoiser, a quarter for all
  others. What cannot fit is refused at load: of the scorer by weights, keys and activations, of a network
  by its weights, once for each expected shape. Of sessions for other shapes as many stay as the share still
  holds. What a network's activations take besides has not been measured: where memory runs out, the sessions
  of all other shapes are closed, and the request is computed.
- **Several GPUs.** Triton starts an instance of each network on every GPU that it sees, each a process with
  its own weights, sessions and share of that GPU's memory. `export … --gpus 0,1` names
  some, in the line `instance_group` of each config. Requests go to whichever is free.

"""
NETWORK_TEXT = """
## Another super-resolution network

`SuperResolver` runs any network that takes one step in a latent space. It knows roles, whose tensors
`panotriton.pipeline.networks.Roles` lists. What is one network's own is in the module of its name:

| in `panotriton.models` | |
|---|---|
| `super_resolution` | the way of an image: what is in flight, prompts, tags, tiles, batches |
| `one_step` | what a network is: roles, settings, `plan` (its sizes), `step` (its formula) |
| `tiles`, `colours`, `tags` | blending, colour alignment, the tagger's words |
| `osediff` | OSEDiff's own: size rules, and the step with ᾱ of the last time step |

To add one called `toysr`:

1. `client/panotriton/models/toysr.py`: a class `Network(OneStepNetwork)` with `plan` and `step`, and what it
   reads from its settings besides the common ones.
2. An entry in `panotriton.pipeline.networks.NETWORKS`: the model of each role. The check for missing weights,
   the diagram above and the export take the names from there.
3. `model_repository/toysr/`, a copy of `osediff/` whose config says `toysr` twice (`name` and the parameter
   `network`), and a `config.pbtxt` for each role's model. Repositories get them by its export alone.
4. Its export: graphs by `export_component`; `tokenizer.json` and, by `write_settings`, `toysr.json` into each
   of `front_folders`; the models' code by `copy_model`; and a command in `panotriton.cli.export`.

Requests to the model `toysr`, and `Upscaler(network="toysr")`, then use it. For the pipeline to do so, name
it in `panorama/config.pbtxt`, in the parameter `network` of `panorama_stream/config.pbtxt`, and in
`panotriton.pipeline.networks.PIPELINE`. `tests/server/toysr.py` is such a network, of a few nodes.
"""

IMAGES_TEXT = """
## What counts as an image

Where a model takes pixels, an image is a uint8 tensor (…, H, W, 3), RGB in sRGB, and it is taken as it is.
Where bytes of a file are taken, by `decode`, the client, the gateway and the live page alike, they become
such pixels by the same rules (`panotriton.pipeline.images`):

- **Format**: AVIF, BMP, TIFF, JPEG, PNG and WebP are read; others are refused by their name. Of several
  pictures in one file the first counts.
- **Orientation**: that of EXIF or XMP is applied, all eight values.
- **Colours**: an ICC profile of RGB, grey or CMYK is converted to sRGB, perceptually, as Pillow does by
  default. Where one moves no colour by more than 1 of 255 it is sRGB's own, and pixels stay as they are.
  One that is broken, or of another kind than the pixels, is left out.
- **Depth**: 16 bits a channel become 8 by round(v / 257); 32 bits, floats, 16-bit CMYK and Lab are refused.
- **Transparency** is dropped.
- **Size**: a panorama has 64 px a side, an image to super-resolve 8, one to score or describe 28 and at
  most 200 times as much one way as the other; all at most 134 megapixels. Checked before memory is taken
  for the pixels.

PIL images of RGB, CMYK, palettes and grey, of 16 bits too, are turned and converted by the same rules, since
they still carry what their file said; arrays and tensors are not. In folders, hidden files (`._a.jpg`) are
never taken for images.

**Names.** A group's files are named after its panoramas and hold their paths, as UTF-8. A panorama whose
path is no UTF-8, or whose name leaves no room for what the files add, is refused by `process` before
anything is sent; a run of `dataset` records it in failed.json and goes on. Where such a name is only told,
on the terminal or in JSON, a byte like ff is written as `\\udcff`, which Python and JSON read as the same
name.
"""


def configs():
    """Every model's parsed config, by name."""
    found = {}
    for path in sorted(ROOT.glob("model_repository/*/config.pbtxt")):
        config = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        found[config.name] = config
    return found


def tensor(io, batched=False):
    """`uint8 (16, ?, ?, 3)`."""
    kind = model_config_pb2.DataType.Name(io.data_type).removeprefix("TYPE_").lower()
    dims = ["B"] if batched else []
    dims += ["?" if dim < 0 else str(dim) for dim in io.dims]
    return f"{kind} ({', '.join(dims)})"


def diagram(models):
    """The ensemble as a Mermaid flow chart."""
    steps = models[ENSEMBLE].ensemble_scheduling.step
    names = [f"{step.model_name}_{index}" for index, step in enumerate(steps)]
    lines = ["```mermaid", "flowchart TB", '  caller(["request"])', '  reply(["response"])']
    lines += [f'  {name}["{step.model_name}"]' for name, step in zip(names, steps, strict=True)]
    made = {}
    for name, step in zip(names, steps, strict=True):
        outputs = {io.name: tensor(io) for io in models[step.model_name].output}
        made |= {value: (name, outputs[key]) for key, value in step.output_map.items()}
    hops = {}  # (source, arrow, target) → what it carries: parallel arrows are drawn as one
    for name, step in zip(names, steps, strict=True):
        for io in models[step.model_name].input:
            if io.name not in step.input_map:  # reading a missing key would make it, as ""
                continue
            value = step.input_map[io.name]
            source, kind = made.get(value, ("caller", tensor(io)))
            arrow = "-.->" if source == "caller" and io.optional else "-->"
            hops.setdefault((source, arrow, name), []).append(f"{value} {kind}")
    for io in models[ENSEMBLE].output:
        hops.setdefault((made[io.name][0], "-->", "reply"), []).append(f"{io.name} {tensor(io)}")
    lines += [
        f'  {a} {arrow}|"{"<br/>".join(kinds)}"| {b}' for (a, arrow, b), kinds in hops.items()
    ]
    return "\n".join([*lines, "```", ""])


def table(config):
    """One model's inputs and outputs."""
    batched = config.max_batch_size > 0
    kind = config.backend or config.platform
    batch = f", batches up to {config.max_batch_size}" if batched else ""
    lines = [
        f"### {config.name}",
        "",
        f"{kind}{batch}",
        "",
        "| tensor | | carries |",
        "|---|---|---|",
    ]
    for io in config.input:
        role = "input, optional" if io.optional else "input"
        lines.append(f"| `{io.name}` | {role} | {tensor(io, batched)} |")
    lines += [f"| `{io.name}` | output | {tensor(io, batched)} |" for io in config.output]
    return "\n".join([*lines, ""])


def calls_diagram(models):
    """The calls that Python models make, with what they carry."""
    lines = ["```mermaid", "flowchart LR"]
    for caller in models:
        called, built = calls(caller, set(models))
        for name in called:
            batched = models[name].max_batch_size > 0
            sent = [io for io in models[name].input if not io.optional or io.name in built]
            text = "<br/>".join(f"{io.name} {tensor(io, batched)}" for io in sent)
            lines.append(f'  {caller} -->|"{text}"| {name}')
    return "\n".join([*lines, "```", ""])


def rooms():
    """What is where in the package, and the imports that are allowed."""
    lines = ["| room | what is in it |", "|---|---|"]
    lines += [f"| `{name}` | {about} |" for name, (about, _) in ROOMS.items()]
    lines += ["", "```mermaid", "flowchart TB"]
    lines += [f"  {name} --> {' & '.join(to)}" for name, (_, to) in ROOMS.items() if to]
    lines += ["  pipeline --> errors"]
    return "\n".join([*lines, "```", ""])


def page():
    """The whole page."""
    models = configs()
    tables = "\n".join(table(config) for config in models.values())
    parts = [
        INTRO,
        diagram(models),
        "\n",
        CALLS_TEXT,
        calls_diagram(models),
        OVERLAP_TEXT,
        NETWORK_TEXT,
        "\n",
        ROOMS_TEXT,
        rooms(),
        IMAGES_TEXT,
        "\n## Every model\n\n",
        tables,
    ]
    return "".join(parts)


def main():
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE.relative_to(ROOT)} is stale: run `make docs`")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
