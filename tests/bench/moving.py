"""What each step from file paths to the native client gains: the same group, stage by stage, five ways.

The first is the file-path services made again (see filehop), with the same weights; the others have a gateway
or this project's server in their place.

python tests/bench/moving.py                        starts a server with ./repository
python tests/bench/moving.py --url gpu1:8001        measures a server that runs

Prints a Markdown table of medians in ms. Files are on the temporary folder's disk.
"""

import base64
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import script
from filehop import client as filehop

from panotriton.client.client import Client
from panotriton.pipeline.camera import sample_cameras
from panotriton.server.launch import LocalServer
from panotriton.web.gateway import triton

PANORAMAS = [script.PANORAMAS / f"{name}.jpg" for name in ("city", "forest")]
COMMAND = [sys.executable, "-m", "panotriton", "gateway"]
PORTS = ["--preprocess-port=0", "--osediff-port=0", "--quality-port=0"]
STEPS = ("preprocess", "super-resolve", "score", "interpolate")
CAMERAS = sample_cameras(1)
KEPT = CAMERAS[:, :2]  # two intervals


@contextlib.contextmanager
def running_gateway(url, folder, crop_size):
    """The URLs of a gateway process."""
    options = ["--url", url, "-o", folder, "--root", str(PANORAMAS[0].parent)]
    command = [*COMMAND, *options, "--crop-size", str(crop_size), *PORTS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "ready; Ctrl-C stops it\n")
        yield dict(line.split()[:2] for line in lines)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def post(url, body, kind):
    """The reply's bytes."""
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    with urllib.request.urlopen(request) as reply:
        return reply.read()


class Services:
    """An old client and the file-path services as they were."""

    name = "old services"

    def __init__(self, services, folder, crop_size):
        self.ask = services.post
        self.folder = Path(folder)
        self.shared = {"group_id": 1, "group_dir": str(self.folder), "crop_size": crop_size}

    def preprocess(self):
        """Two panorama files to 16 pair files."""
        self.pairs = []
        for number, path in enumerate(PANORAMAS, start=1):
            body = self.shared | {"image_path": str(path), "is_first": number == 1, "seed": 1}
            made = self.ask("preprocess", "preprocess_for_group", **body)
            self.pairs += [pair | {"panorama": number} for pair in made]

    def super_resolve(self):
        """16 pair files to 16 sharp files."""
        body = {"input_paths": [pair["pair_image"] for pair in self.pairs], "align_method": "adain"}
        output = str(self.folder / "osediff")
        self.ask("super_resolution", "super_resolution_batch", output_dir=output, **body)

    def score(self):
        """16 sharp files to scores."""
        folder = self.folder / "osediff"
        sharp = [p | {"pair_image": str(folder / Path(p["pair_image"]).name)} for p in self.pairs]
        self.ask("quality", "evaluate_pairs", pairs_data=sharp)

    def interpolate(self):
        """Two intervals of both panoramas to 36 view files."""
        splits = [
            pair | {"left_image": pair["pair_image"]}
            for pair in self.pairs
            if pair["interval"] in (1, 2)
        ]
        one, two = map(str, PANORAMAS)
        body = {"split_results": splits, "panorama1_path": one, "panorama2_path": two}
        body |= {"num_interpolations": 9}
        self.ask("preprocess", "generate_interpolated_images", **body, **self.shared)


class Paths:
    """An old client and the gateway: files on disk, their paths over HTTP."""

    name = "paths, gateway"

    def __init__(self, urls):
        self.urls = urls

    def ask(self, service, endpoint, **body):
        """The results of one endpoint."""
        reply = post(
            f"{self.urls[service]}/{endpoint}", json.dumps(body).encode(), "application/json"
        )
        return json.loads(reply)["results"]

    def preprocess(self):
        """Two panorama files to 16 pair files."""
        self.pairs = []
        for path in PANORAMAS:
            body = {"image_path": str(path), "group_id": 1, "is_first": path is PANORAMAS[0]}
            self.pairs += self.ask("preprocess", "preprocess_for_group", **body)
        self.folder = Path(self.pairs[0]["pair_image"]).parent.parent

    def super_resolve(self):
        """16 pair files to 16 sharp files."""
        paths = [pair["pair_image"] for pair in self.pairs]
        self.ask(
            "osediff", "super_resolution_batch", input_paths=paths, output_dir=str(self.folder)
        )

    def score(self):
        """16 sharp files to scores."""
        sharp = [str(self.folder / "osediff" / Path(p["pair_image"]).name) for p in self.pairs]
        self.ask("quality", "evaluate_pairs", pairs_data=[{"pair_image": path} for path in sharp])

    def interpolate(self):
        """Two intervals of both panoramas to 36 view files."""
        splits = [pair for pair in self.pairs if pair["interval"] in (1, 2)]
        one, two = map(str, PANORAMAS)
        body = {"split_results": splits, "panorama1_path": one, "panorama2_path": two}
        self.ask("preprocess", "generate_interpolated_images", **body, group_id=1)


class Tensors:
    """A client of the tensor endpoints; the arrays are in its memory before and after."""

    def __init__(self, urls, crop_size):
        self.urls, self.crop_size = urls, crop_size
        images = [cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in PANORAMAS]
        self.panoramas = np.stack(images)

    def preprocess(self):
        """Two panoramas (2, H, W, 3) to 16 pairs."""
        self.pairs = self.ask("preprocess", "preprocess_tensor", self.panoramas, cameras=CAMERAS)

    def super_resolve(self):
        """16 pairs to 16 sharp ones."""
        self.sharp = self.ask("osediff", "super_resolution_tensor", self.pairs)

    def score(self):
        """16 sharp pairs to scores."""
        self.ask("quality", "evaluate_pairs_tensor", self.sharp)

    def interpolate(self):
        """Two intervals of both panoramas to 36 views."""
        self.ask("preprocess", "interpolate_tensor", self.panoramas, cameras=KEPT)


class Json(Tensors):
    """base64 in JSON."""

    name = "JSON base64"

    def ask(self, service, endpoint, array, cameras=None):
        """The reply's array, or its results."""
        body = {"tensor": base64.b64encode(array).decode(), "shape": array.shape}
        body |= {"dtype": array.dtype.name, "layout": "NHWC"}
        body |= {} if cameras is None else {"cameras": cameras.tolist()}
        url = f"{self.urls[service]}/{endpoint}"
        reply = json.loads(post(url, json.dumps(body).encode(), "application/json"))
        if "tensor" not in reply:
            return reply["results"]
        data = base64.b64decode(reply["tensor"])
        return np.frombuffer(data, reply["dtype"]).reshape(reply["shape"])


class Npy(Tensors):
    """.npy bodies."""

    name = ".npy"

    def ask(self, service, endpoint, array, cameras=None):
        """The reply's array, or its results."""
        body = io.BytesIO()
        np.save(body, array)
        query = "layout=NHWC"
        query += (
            ""
            if cameras is None
            else f"&cameras={json.dumps(cameras.tolist(), separators=(',', ':'))}"
        )
        url = f"{self.urls[service]}/{endpoint}?{query}"
        reply = post(url, body.getvalue(), "application/octet-stream")
        is_array = reply.startswith(b"\x93NUMPY")
        return np.load(io.BytesIO(reply)) if is_array else json.loads(reply)["results"]


class Native(Tensors):
    """No gateway: our client."""

    name = "native client"

    def __init__(self, client, crop_size):
        super().__init__({}, crop_size)
        self.client = client

    def preprocess(self):
        """Two panoramas to 16 pairs."""
        self.pairs = triton.preprocess(self.client, list(self.panoramas), CAMERAS, self.crop_size)

    def super_resolve(self):
        """16 pairs to 16 sharp ones."""
        self.sharp = np.stack([sharp.numpy() for sharp in self.client.upscale(list(self.pairs))])

    def score(self):
        """16 sharp pairs to scores."""
        self.client.score(list(self.sharp))

    def interpolate(self):
        """Two intervals of both panoramas to 36 views."""
        triton.interpolate(self.client, list(self.panoramas), KEPT, 9, self.crop_size)


def measure(ways, runs):
    """Median ms of every step and way; ways take turns, so that a slow moment hits all of them."""
    times = {(way.name, step): [] for way in ways for step in STEPS}
    for run in range(runs + 1):
        for way in ways:
            for step in STEPS:
                began = time.perf_counter()
                getattr(way, step.replace("-", "_"))()
                if run:  # the first warms up
                    times[way.name, step].append((time.perf_counter() - began) * 1e3)
    return {key: statistics.median(values) for key, values in times.items()}


def table(ways, medians):
    """Markdown: ms, and in brackets the ratio to the first way."""
    rows = [
        "| step | " + " | ".join(way.name for way in ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    for step in STEPS:
        base = medians[ways[0].name, step]
        cells = [f"{ms:.0f} ({ms / base:.2f})" for ms in (medians[way.name, step] for way in ways)]
        rows.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def arguments(parser):
    """Options beside the common ones."""
    parser.add_argument("--url", help="gRPC of a server that runs; else one is started")
    parser.add_argument("--crop-size", type=int, help="px (512)")
    parser.add_argument("--runs", type=int, default=3)


def main():
    """Measure and print."""
    chosen = script.options(__doc__, arguments)
    size = chosen.crop_size or (64 if chosen.quick else 512)
    with contextlib.ExitStack() as stack:
        url = chosen.url
        if url is None:
            repository = script.exported(chosen.repository)
            url = stack.enter_context(LocalServer(repository)).grpc_url
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        urls = stack.enter_context(running_gateway(url, folder, size))
        client = stack.enter_context(Client(url))
        old = Services(stack.enter_context(filehop.Services()), Path(folder) / "old", size)
        ways = [old, Paths(urls), Json(urls, size), Npy(urls, size), Native(client, size)]
        medians = measure(ways, 1 if chosen.quick else chosen.runs)
    about = f"Median ms, in brackets the ratio to the old services; crops of {size} px."
    text = f"{about}\n\n{table(ways, medians)}"
    script.finish(chosen, {"ms": {" ".join(key): ms for key, ms in medians.items()}}, text)


if __name__ == "__main__":
    script.run(main)
