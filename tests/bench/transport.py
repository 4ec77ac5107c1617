"""What each way to a server costs: two 4096×2048 panoramas, 2 × 25 MB, there and back.

One tritonserver, started here, echoes them; every way is measured in the same run, in turns, against a
memcpy of the same bytes. A second table is about the way there alone: pixels against encoded files.

python tests/bench/transport.py [--runs 7] [--json out.json]
"""

import argparse
import base64
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from panotriton import Client
from panotriton.server import LocalServer

HEIGHT, WIDTH = 2048, 4096
PANORAMA = Path(__file__).parent.parent / "data" / "panoramas" / "city.jpg"

# One folder a model: its inputs and outputs, and what it does with a request.
TENSOR = '{{ name: "{}" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }}'
STRING = '{{ name: "{}" data_type: TYPE_STRING dims: [ 1 ] }}'
HEAD = """
import base64, json, os
import cv2, numpy as np, triton_python_backend_utils as pb_utils

def tensor(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

def text(name, value):
    return pb_utils.Tensor(name, np.array([value.encode()], np.object_))

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse(self.work(request)) for request in requests]

    def work(self, request):
"""
MODELS = {
    "echo": (TENSOR, ("A", "B"), TENSOR, ("A", "B"), "return request.inputs()"),
    "echo_path": (
        STRING,
        ("A", "B"),
        STRING,
        ("A", "B"),
        """
        answers = []
        for name in ("A", "B"):
            path = tensor(request, name).item().decode()
            stem, suffix = os.path.splitext(path)
            cv2.imwrite(stem + "_out" + suffix, cv2.imread(path))
            answers.append(text(name, stem + "_out" + suffix))
        return answers
""",
    ),
    "echo_base64": (
        STRING,
        ("BODY",),
        STRING,
        ("BODY",),
        """
        body = json.loads(tensor(request, "BODY").item())
        answer = {}
        for name, image in body.items():
            pixels = np.frombuffer(base64.b64decode(image["data"]), np.uint8).reshape(image["shape"])
            data = base64.b64encode(pixels.tobytes()).decode()
            answer[name] = {"data": data, "shape": pixels.shape}
        return [text("BODY", json.dumps(answer))]
""",
    ),
    "take": (TENSOR, ("A", "B"), STRING, ("OK",), 'return [text("OK", "ok")]'),
    "take_encoded": (
        STRING,
        ("A", "B"),
        STRING,
        ("OK",),
        """
        for name in ("A", "B"):
            cv2.imdecode(np.frombuffer(tensor(request, name).item(), np.uint8), cv2.IMREAD_COLOR)
        return [text("OK", "ok")]
""",
    ),
}


def build(folder):
    """Write the models."""
    for name, (kind, inputs, out_kind, outputs, body) in MODELS.items():
        ins = ", ".join(kind.format(tensor) for tensor in inputs)
        outs = ", ".join(out_kind.format(tensor) for tensor in outputs)
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\ninput [ {ins} ]\n'
            f"output [ {outs} ]\ninstance_group [ {{ kind: KIND_CPU count: 1 }} ]\n"
        )
        code = body if body.startswith("\n") else f"        {body}\n"
        (folder / name / "1" / "model.py").write_text(HEAD + code)
    return folder


def panoramas():
    """Two panoramas with a photograph's content, not noise: their size as files matters."""
    image = cv2.cvtColor(cv2.imread(str(PANORAMA)), cv2.COLOR_BGR2RGB)
    large = cv2.resize(image, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return large, np.ascontiguousarray(large[:, ::-1])


def encoded(image, suffix):
    """A file's bytes."""
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def strings(*values):
    """A string tensor each."""
    return [np.array([value], np.object_) for value in values]


def by_files(client, images, folder, suffix):
    """As the file-based services did: paths travel, images go by disk, both ways."""
    paths = [folder / f"{name}{suffix}" for name in "ab"]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(encoded(image, suffix))
    a, b = strings(*(str(path).encode() for path in paths))
    got = client.infer("echo_path", {"A": a, "B": b}, ["A", "B"])
    found = (cv2.imread(got[name].item().decode()) for name in "AB")
    return [cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image in found]


def by_base64(client, images):
    """Pixels as base64 inside JSON, both ways."""
    body = {
        name: {"data": base64.b64encode(image.tobytes()).decode(), "shape": image.shape}
        for name, image in zip("AB", images, strict=True)
    }
    (text,) = strings(json.dumps(body).encode())
    answer = json.loads(client.infer("echo_base64", {"BODY": text}, ["BODY"])["BODY"].item())
    return [
        np.frombuffer(base64.b64decode(answer[name]["data"]), np.uint8).reshape(
            answer[name]["shape"]
        )
        for name in "AB"
    ]


def by_tensors(client, images, via=None):
    """Pixels as tensors: in the request, or through shared memory."""
    inputs = dict(zip("AB", images, strict=True))
    outputs = {name: image.nbytes for name, image in inputs.items()} if via else ["A", "B"]
    got = client.infer("echo", inputs, outputs, via=via)
    return [got["A"], got["B"]]


def memcpy(images):
    """One copy of the same bytes to memory that is already there."""
    for image, target in zip(images, memcpy.targets, strict=True):
        np.copyto(target, image)
    return memcpy.targets


def measure(ways, runs):
    """Median and best ms of each way, all ways in turns, after one round that is not counted."""
    times = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


def there_and_back(grpc, http, images, folder, memory, lent):
    """The ways of the first table."""
    return {
        "memcpy": lambda: memcpy(images),
        "shared memory, results as views": lambda: by_tensors(grpc, images, lent),
        "shared memory": lambda: by_tensors(grpc, images, memory),
        "gRPC": lambda: by_tensors(grpc, images),
        "HTTP": lambda: by_tensors(http, images),
        "base64 in JSON, HTTP": lambda: by_base64(http, images),
        "JPEG files and their paths": lambda: by_files(http, images, folder, ".jpg"),
        "PNG files and their paths": lambda: by_files(http, images, folder, ".png"),
    }


def there(client, images):
    """The ways of the second table, and the bytes that each puts on the wire."""
    files = {suffix: [encoded(image, suffix) for image in images] for suffix in (".jpg", ".png")}
    raw = dict(zip("AB", images, strict=True))

    def send(suffix):
        a, b = strings(*files[suffix])
        return client.infer("take_encoded", {"A": a, "B": b}, ["OK"])

    ways = {
        "pixels": lambda: client.infer("take", raw, ["OK"]),
        "JPEG bytes, decoded by the server": lambda: send(".jpg"),
        "PNG bytes, decoded by the server": lambda: send(".png"),
    }
    sizes = [sum(image.nbytes for image in images)]
    sizes += [sum(map(len, files[suffix])) for suffix in files]
    return ways, dict(zip(ways, sizes, strict=True))


def equal(ways, images):
    """Which ways give back the very same bytes."""
    found = {}
    for name, way in ways.items():
        pairs = zip(way(), images, strict=True)
        found[name] = all(np.array_equal(got, sent) for got, sent in pairs)
    return found


def table(times, same):
    """The first table, and what it says of shared memory's overhead."""
    floor = times["memcpy"][0]
    lines = ["| way | median ms | best ms | × memcpy | bit for bit |", "|---|---|---|---|---|"]
    for name, (median, best) in times.items():
        answer = "yes" if same[name] else "no"
        lines.append(f"| {name} | {median:.0f} | {best:.0f} | {median / floor:.1f} | {answer} |")
    over = {name: median - floor for name, (median, _) in times.items()}
    ratios = {
        other: over[other] / over["shared memory"]
        for other in ("gRPC", "HTTP", "base64 in JSON, HTTP")
    }
    says = ", ".join(f"{other} {ratio:.1f} ×" for other, ratio in ratios.items())
    return "\n".join(
        [*lines, "", f"Overhead over the memcpy, against shared memory: {says}"]
    ), ratios


def main():
    """Measure, print Markdown, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    images = panoramas()
    memcpy.targets = [np.zeros_like(image) for image in images]
    try:
        with (
            LocalServer(build(work / "repository")) as server,
            Client(server.grpc_url) as grpc,
            Client(server.http_url, protocol="http") as http,
            grpc.shared_memory(256 << 20) as memory,
            grpc.shared_memory(256 << 20, views=True) as lent,
        ):
            ways = there_and_back(grpc, http, images, work, memory, lent)
            same = equal(ways, images)
            times = measure(ways, options.runs)
            uploads, sizes = there(grpc, images)
            upload_times = measure(uploads, options.runs)
    finally:
        shutil.rmtree(work)
    report(options, times, same, upload_times, sizes)


def report(options, times, same, upload_times, sizes):
    """Print both tables."""
    text, ratios = table(times, same)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    print(f"2 × {HEIGHT * WIDTH * 3 / 1e6:.1f} MB there and back, {options.runs} runs, {machine}\n")
    print(text)
    print("\n| there alone, gRPC | MB sent | median ms |\n|---|---|---|")
    for name, (median, _) in upload_times.items():
        print(f"| {name} | {sizes[name] / 1e6:.1f} | {median:.0f} |")
    if options.json:
        content = {"machine": machine, "ms": times, "same": same, "overhead_ratio": ratios}
        content |= {"upload_ms": upload_times, "upload_bytes": sizes}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
