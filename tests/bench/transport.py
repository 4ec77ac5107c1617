"""What each way to a server costs: two 4096×2048 panoramas, 2 × 25 MB, there and back.

One tritonserver, started here, echoes them; every way is measured in the same run, in turns, against a
memcpy of the same bytes. A second table is about the way there alone: pixels against encoded files.

python tests/bench/transport.py [--runs 7]

Redis and CUDA have rows only where there is a redis-server or a GPU. Arrays are pickled for Redis because
that is the way that is measured: loading a pickle runs whatever code its sender put there, and panotriton
itself never does.
"""

import base64
import contextlib
import json
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import memory_store
import numpy as np
import redis
import script

from panotriton import Client
from panotriton.client.cuda import check_cuda
from panotriton.errors import SharedMemoryError
from panotriton.server.launch import LocalServer

HEIGHT, WIDTH = 2048, 4096
POOL_BYTES = 256 << 20

# One folder per model: its inputs and outputs, and what it does with a request.
TENSOR = '{{ name: "{}" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }}'
STRING = '{{ name: "{}" data_type: TYPE_STRING dims: [ 1 ] }}'
HEAD = """
import base64, json, os, pickle
import cv2, redis, numpy as np, triton_python_backend_utils as pb_utils

def tensor(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()

def text(name, value):
    return pb_utils.Tensor(name, np.array([value.encode()], np.object_))

PORT = {redis_port}

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
    "echo_redis": (
        STRING,
        ("A", "B"),
        STRING,
        ("A", "B"),
        """
        store = redis.Redis(port=PORT)
        for name in ("A", "B"):
            pixels = pickle.loads(store.get(tensor(request, name).item()))
            store.set(name + "_out", pickle.dumps(pixels, pickle.HIGHEST_PROTOCOL))
        return [text(name, name + "_out") for name in ("A", "B")]
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


def build(folder, redis_port):
    """Write the models; those that need no Redis ignore its port."""
    head = HEAD.replace("{redis_port}", str(redis_port))
    for name, (kind, inputs, out_kind, outputs, body) in MODELS.items():
        ins = ", ".join(kind.format(tensor) for tensor in inputs)
        outs = ", ".join(out_kind.format(tensor) for tensor in outputs)
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(
            f'name: "{name}"\nbackend: "python"\nmax_batch_size: 0\ninput [ {ins} ]\n'
            f"output [ {outs} ]\ninstance_group [ {{ kind: KIND_CPU count: 1 }} ]\n"
        )
        code = body if body.startswith("\n") else f"        {body}\n"
        (folder / name / "1" / "model.py").write_text(head + code)
    return folder


def panoramas():
    """Two panoramas with a photograph's content, not noise: their size as files matters."""
    image = cv2.cvtColor(cv2.imread(str(script.PANORAMAS / "city.jpg")), cv2.COLOR_BGR2RGB)
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


def by_redis(client, images, store):
    """Arrays pickled into Redis, their keys to the server; and back the same way."""
    for name, image in zip("AB", images, strict=True):
        store.set(name, pickle.dumps(image, pickle.HIGHEST_PROTOCOL))
    a, b = strings(b"A", b"B")
    got = client.infer("echo_redis", {"A": a, "B": b}, ["A", "B"])
    return [pickle.loads(store.get(got[name].item())) for name in "AB"]


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


def by_cuda(client, images, memory):
    """Pixels of the host through memory of the GPU, and back to the host."""
    return [tensor.cpu().numpy() for tensor in by_tensors(client, images, memory)]


def memcpy(images, targets):
    """One copy of the same bytes to memory that is already there."""
    for image, target in zip(images, targets, strict=True):
        np.copyto(target, image)
    return targets


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


def there_and_back(grpc, http, images, folder, stack):
    """The ways of the first table, and why others are not among them."""
    targets = [np.zeros_like(image) for image in images]
    memory = stack.enter_context(grpc.shared_memory(POOL_BYTES))
    lent = stack.enter_context(grpc.shared_memory(POOL_BYTES, views=True))
    ways = {
        "memcpy": lambda: memcpy(images, targets),
        "shared memory, results as views": lambda: by_tensors(grpc, images, lent),
        "shared memory": lambda: by_tensors(grpc, images, memory),
        "gRPC": lambda: by_tensors(grpc, images),
        "HTTP": lambda: by_tensors(http, images),
        "base64 in JSON, HTTP": lambda: by_base64(http, images),
        "JPEG files and their paths": lambda: by_files(http, images, folder, ".jpg"),
        "PNG files and their paths": lambda: by_files(http, images, folder, ".png"),
    }
    absent = {}
    try:
        check_cuda(0)
    except SharedMemoryError:
        absent["CUDA shared memory"] = "no GPU here"
    else:
        on_gpu = stack.enter_context(grpc.shared_memory(POOL_BYTES, "cuda"))
        ways["CUDA shared memory"] = lambda: by_cuda(grpc, images, on_gpu)
    return ways, absent


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


def ratios(times):
    """Overhead over the memcpy, in that of shared memory."""
    over = {name: median - times["memcpy"][0] for name, (median, _) in times.items()}
    names = ("gRPC", "HTTP", "base64 in JSON, HTTP", "Redis and pickle")
    return {name: over[name] / over["shared memory"] for name in names if name in over}


def markdown(result):
    """Both tables, and what the first says of shared memory's overhead."""
    times = result["ms"]
    floor = times["memcpy"][0]
    rows = [
        (
            name,
            f"{median:.0f}",
            f"{best:.0f}",
            f"{median / floor:.1f}",
            "yes" if result["same"][name] else "no",
        )
        for name, (median, best) in times.items()
    ]
    rows += [(name, reason, "", "", "") for name, reason in result["absent"].items()]
    says = ", ".join(f"{name} {ratio:.1f} ×" for name, ratio in result["overhead_ratio"].items())
    uploads = [
        (name, f"{result['upload_bytes'][name] / 1e6:.1f}", f"{median:.0f}")
        for name, (median, _) in result["upload_ms"].items()
    ]
    return "\n\n".join(
        [
            f"2 × {HEIGHT * WIDTH * 3 / 1e6:.1f} MB there and back, {result['runs']} runs.",
            script.table(("way", "median ms", "best ms", "× memcpy", "bit for bit"), rows),
            f"Overhead over the memcpy, against shared memory: {says}.",
            script.table(("there alone, gRPC", "MB sent", "median ms"), uploads),
        ]
    )


def measured(folder, runs, stack):
    """Results of all ways, with servers that the stack ends."""
    binary = memory_store.find()
    port = stack.enter_context(memory_store.running(binary)) if binary else 0
    server = stack.enter_context(LocalServer(build(folder / "repository", port)))
    grpc = stack.enter_context(Client(server.grpc_url))
    http = stack.enter_context(Client(server.http_url, protocol="http"))
    images = panoramas()
    ways, absent = there_and_back(grpc, http, images, folder, stack)
    if binary:
        store = redis.Redis(port=port)
        ways["Redis and pickle"] = lambda: by_redis(http, images, store)
    else:
        absent["Redis and pickle"] = "redis-server not found: apt install redis-server"
    same = equal(ways, images)
    times = measure(ways, runs)
    uploads, sizes = there(grpc, images)
    return {
        "runs": runs,
        "ms": times,
        "same": same,
        "absent": absent,
        "overhead_ratio": ratios(times),
        "upload_ms": measure(uploads, runs),
        "upload_bytes": sizes,
    }


def main():
    """Measure, print Markdown, and write JSON where asked."""
    chosen = script.options(
        __doc__, lambda parser: parser.add_argument("--runs", type=int, default=7)
    )
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        result = measured(Path(work), 1 if chosen.quick else chosen.runs, stack)
    script.finish(chosen, result, markdown(result))


if __name__ == "__main__":
    script.run(main)
