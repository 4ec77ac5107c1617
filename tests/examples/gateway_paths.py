"""A client of the three file-path services: it passes paths, and filters, splits and assembles by itself.

python gateway_paths.py out --sample-n 3 FOLDER FOLDER     three groups
python gateway_paths.py out --target-n 20 FOLDER FOLDER    groups until 20 intervals passed the filter

FOLDERs hold panoramas; a group is one of each of two of them. A run that ended, however it did, goes on
where it was when it is started again. Needs OpenCV; the gateway writes to `out`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2

URLS = {
    "preprocess": "http://127.0.0.1:5000",
    "osediff": "http://127.0.0.1:5001",
    "quality": "http://127.0.0.1:5002",
}
TIMEOUT_S = 300


def post(url: str, body: Any) -> Any:
    """JSON there and back."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        return json.load(reply)


class PathClient:
    """urls: of the services by name. between: views of a sequence. threshold: of both scores, 0 to 1."""

    def __init__(
        self, urls: dict[str, str] = URLS, between: int = 9, threshold: float = 0.7
    ) -> None:
        self.urls, self.between, self.threshold = urls, between, threshold

    def run(
        self,
        output: Path,
        folders: Sequence[Path],
        *,
        seed: int = 0,
        sample_n: int | None = None,
        target_n: int | None = None,
    ) -> None:
        """Groups until `sample_n` are done, or `target_n` intervals are kept; those done are left alone.

        A group that fails says why in its folder's error.json, ends the run and is made anew by the next.
        """
        kept = 0
        for group_id, panoramas in enumerate(pairs(folders, seed), start=1):
            if group_id - 1 == sample_n or (target_n is not None and kept >= target_n):
                return
            info = output / f"group_{group_id:04d}" / "group_info.json"
            if not info.exists():
                self._record(output, panoramas, group_id)
            kept += len(json.loads(info.read_text())["kept"])

    def _record(self, output: Path, panoramas: list[Path], group_id: int) -> None:
        folder, results = output / f"group_{group_id:04d}", output / "results.json"
        try:
            made = self.process(panoramas, group_id)
        except OSError as error:  # urllib's are among them
            if folder.is_dir():
                (folder / "error.json").write_text(json.dumps({"error": str(error)}))
            raise
        entries = json.loads(results.read_text()) if results.exists() else []
        entries = [entry for entry in entries if entry["group_id"] != group_id]
        results.write_text(json.dumps([*entries, {"group_id": group_id, "intervals": made}]))
        (folder / "error.json").unlink(missing_ok=True)
        info = {"group_id": group_id, "kept": [entry["interval"] for entry in made]}
        (folder / "group_info.json").write_text(json.dumps(info))

    def process(self, panoramas: list[Path], group_id: int) -> list[dict[str, Any]]:
        """Finish a group; returns its kept intervals."""
        pairs = []
        for path in panoramas:
            body = {"image_path": str(path), "group_id": group_id, "is_first": path is panoramas[0]}
            pairs += self.call("preprocess", "preprocess_for_group", body)
        folder = Path(pairs[0]["pair_image"]).parent.parent
        sharp = self.sharpen([pair["pair_image"] for pair in pairs], folder)
        for pair, path in zip(pairs, sharp, strict=True):
            pair["pair_image"] = path
        scored = self.call("quality", "evaluate_pairs", {"pairs_data": pairs})
        splits = [split(pair, folder) for pair in self.passed(scored)]
        if not splits:
            return []
        self.describe(splits, panoramas[1], folder)
        body = {
            "split_results": splits,
            "panorama1_path": str(panoramas[0]),
            "panorama2_path": str(panoramas[1]),
            "group_id": group_id,
            "num_interpolations": self.between,
        }
        groups = self.call("preprocess", "generate_interpolated_images", body)
        self.sharpen_views(
            [view for group in groups for view in group["interpolated_images"]], folder
        )
        return assemble(splits, groups)

    def call(self, service: str, endpoint: str, body: Any) -> list[Any]:
        """The results of one endpoint."""
        reply = post(f"{self.urls[service]}/{endpoint}", body)
        assert reply["success"] is True
        return list(reply["results"])

    def sharpen(self, paths: list[str], folder: Path) -> list[str]:
        body = {"input_paths": paths, "output_dir": str(folder), "align_method": "adain"}
        results = self.call("osediff", "super_resolution_batch", body)
        assert all(result["success"] for result in results)
        return [result["output_path"] for result in results]

    def sharpen_views(self, views: list[Any], folder: Path) -> None:
        target = folder / "interpolated_sr"
        target.mkdir(exist_ok=True)
        for view, path in zip(views, self.sharpen([v["path"] for v in views], folder), strict=True):
            view["super_resolved"] = shutil.move(path, target / Path(path).name)

    def passed(self, scored: list[Any]) -> list[Any]:
        """The pairs of intervals whose lowest score reaches the threshold."""
        intervals = defaultdict(list)
        for pair in scored:
            intervals[pair.get("interval", 0)].append(pair)
        kept = []
        for found in intervals.values():
            scores = [float(p["final_score"]) for p in found if p.get("final_score") is not None]
            if scores and min(scores) >= self.threshold:
                kept += found
        return kept

    def describe(self, splits: list[Any], second: Path, folder: Path) -> None:
        (folder / "descriptions").mkdir(exist_ok=True)
        mine = [entry for entry in splits if Path(entry["pair_image"]).stem.startswith(second.stem)]
        body = {"image_paths": [entry["right_image"] for entry in mine]}
        for entry, result in zip(
            mine, self.call("quality", "generate_descriptions", body), strict=True
        ):
            entry["description"] = result["description"]
        (folder / "descriptions" / "panorama2_right_descriptions.json").write_text(json.dumps(mine))


def pairs(folders: Sequence[Path], seed: int) -> Iterator[list[Path]]:
    """Panoramas of two of the folders, without end; the same for the same seed."""
    drawn = random.Random(seed)
    files = [sorted(path for path in folder.iterdir() if path.is_file()) for folder in folders]
    for _ in itertools.count():
        yield [drawn.choice(choice) for choice in drawn.sample(files, 2)]


def split(pair: Any, folder: Path) -> dict[str, Any]:
    """The pair with files of its left and its right half."""
    image = cv2.imread(pair["pair_image"])
    (folder / "interpolated").mkdir(exist_ok=True)
    middle = image.shape[1] // 2
    entry = dict(pair)
    for side, half in (("left", image[:, :middle]), ("right", image[:, middle:])):
        path = folder / "interpolated" / f"{Path(pair['pair_image']).stem}_{side}.jpg"
        cv2.imwrite(str(path), half)
        entry[f"{side}_image"] = str(path)
    return entry


def assemble(splits: list[Any], groups: list[Any]) -> list[dict[str, Any]]:
    """Each kept interval's sequence of both panoramas: left, the views in between, right."""
    intervals: dict[int, dict[str, Any]] = defaultdict(dict)
    for entry, group in zip(splits, groups, strict=True):
        views = sorted(group["interpolated_images"], key=lambda view: view["weight_idx"])
        intervals[entry["interval"]][group["panorama"]] = {
            "images": [
                entry["left_image"],
                *(str(view["super_resolved"]) for view in views),
                entry["right_image"],
            ],
            "params": [entry["main_params"], *(v["params"] for v in views), entry["rand_params"]],
            "description": entry.get("description"),
        }
    return [
        {"interval": interval, **panoramas} for interval, panoramas in sorted(intervals.items())
    ]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="the gateway's")
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.7)
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--sample-n", type=int, metavar="GROUPS")
    until.add_argument("--target-n", type=int, metavar="INTERVALS")
    chosen = parser.parse_args()
    PathClient(threshold=chosen.threshold).run(
        chosen.output,
        chosen.folders,
        seed=chosen.seed,
        sample_n=chosen.sample_n,
        target_n=chosen.target_n,
    )


if __name__ == "__main__":
    main()
