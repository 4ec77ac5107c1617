"""A group through the three services."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filehop.service import read_image, write_image

FOLDER = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m"]
START_TIMEOUT_S = 180


@dataclass
class Outcome:
    """What came of a group: scores in the order of the ensemble's, and seconds per stage."""

    scores: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    images: int = 0
    seconds: Counter[str] = field(default_factory=Counter)


class Services:
    """The three processes, ready on entry and gone on exit."""

    def __enter__(self) -> Services:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._stack.close)
            names = ("preprocess", "super_resolution", "quality")
            self.urls = {name: self._stack.enter_context(_service(name)) for name in names}
            for url in self.urls.values():
                _wait_healthy(url)
            undo.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def post(self, service: str, endpoint: str, **body: Any) -> list[dict[str, Any]]:
        """The results of one endpoint."""
        data = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.urls[service]}/{endpoint}", data, headers)
        with urllib.request.urlopen(request) as reply:
            return list(json.loads(reply.read())["results"])


class Run:
    """One group on its way. Files go to `folder`, named as the services name them."""

    def __init__(self, services: Services, panoramas: tuple[Path, Path], folder: Path) -> None:
        self._services, self._panoramas, self._folder = services, panoramas, folder
        self.outcome = Outcome()

    def process(
        self,
        *,
        seed: int,
        crop_size: int = 512,
        interpolations: int = 9,
        threshold: float = 0.7,
        align: str = "adain",
    ) -> Outcome:
        """The whole pipeline; see `Client.process` for the options."""
        shared = {"group_id": 1, "group_dir": str(self._folder), "crop_size": crop_size}
        pairs = self._pairs(shared | {"seed": seed})
        self._super_resolve([pair["pair_image"] for pair in pairs], "osediff", align)
        for pair in pairs:
            pair["pair_image"] = str(self._folder / "osediff" / Path(pair["pair_image"]).name)
        scored = self._post("scoring", "quality", "evaluate_pairs", pairs_data=pairs)
        kept = self._filter(scored, threshold)
        if not kept:
            return self.outcome
        self._describe(kept)
        views = self._between(kept, shared | {"num_interpolations": interpolations})
        self._super_resolve(views, "interpolated_sr", align)
        self.outcome.images = 2 * len(kept) + len(views)
        return self.outcome

    def _post(self, stage: str, service: str, endpoint: str, **body: Any) -> list[dict[str, Any]]:
        with self._timed(stage):
            return self._services.post(service, endpoint, **body)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.outcome.seconds[stage] += time.perf_counter() - began

    def _pairs(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        pairs = []
        for number, path in enumerate(self._panoramas, start=1):
            asked = body | {"image_path": str(path), "is_first": number == 1}
            made = self._post("preprocessing", "preprocess", "preprocess_for_group", **asked)
            pairs += [pair | {"panorama": number} for pair in made]
        return pairs

    def _super_resolve(self, paths: list[str], folder: str, align: str) -> None:
        body = {"input_paths": paths, "output_dir": str(self._folder / folder)}
        body |= {"align_method": align}
        self._post("super-resolution", "super_resolution", "super_resolution_batch", **body)

    def _filter(self, pairs: list[dict[str, Any]], threshold: float) -> list[dict[str, Any]]:
        """The kept pairs, split into left and right files."""
        self.outcome.scores = [float(pair["final_score"]) for pair in pairs]
        by_interval: dict[int, list[float]] = defaultdict(list)
        for pair, score in zip(pairs, self.outcome.scores, strict=True):
            by_interval[pair["interval"]] += [] if math.isnan(score) else [score]
        self.outcome.kept = sorted(
            number for number, scores in by_interval.items() if scores and min(scores) >= threshold
        )
        with self._timed("filtering and splitting"):
            return [self._split(p) for p in pairs if p["interval"] in self.outcome.kept]

    def _split(self, pair: dict[str, Any]) -> dict[str, Any]:
        image = read_image(pair["pair_image"])
        middle = image.shape[1] // 2
        stem = Path(pair["pair_image"]).stem
        parts = {"left": image[:, :middle], "right": image[:, middle:]}
        files = {
            f"{side}_image": write_image(self._folder / "interpolated" / f"{stem}_{side}.jpg", part)
            for side, part in parts.items()
        }
        return pair | files

    def _describe(self, kept: list[dict[str, Any]]) -> None:
        paths = [pair["right_image"] for pair in kept if pair["panorama"] == 2]
        self._post("describing", "quality", "generate_descriptions", image_paths=paths)

    def _between(self, kept: list[dict[str, Any]], body: dict[str, Any]) -> list[str]:
        one, two = map(str, self._panoramas)
        asked = body | {"split_results": kept, "panorama1_path": one, "panorama2_path": two}
        found = self._post("interpolating", "preprocess", "generate_interpolated_images", **asked)
        return [view["path"] for result in found for view in result["interpolated_images"]]


@contextlib.contextmanager
def _service(name: str) -> Iterator[str]:
    """The URL of a service's process; its log, one line per request, is not shown."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*COMMAND, f"filehop.{name}", "--port", str(port)]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=FOLDER, stdout=silent, stderr=silent)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_healthy(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{url}/health: no answer after {START_TIMEOUT_S} s; run the service by hand "
                    f"to see why: cd {FOLDER} && {' '.join(COMMAND)} filehop.NAME --port 5000"
                ) from error
            time.sleep(0.2)
