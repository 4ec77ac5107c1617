"""The cameras that a group's two panoramas share, in its folder.

`layout.RIGHT_PARAMS` and `layout.LEFT_1_PARAMS` carry them from the first panorama's request to the
second's, each a list of eight, as the file-path services kept them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from panotriton.errors import InvalidInput
from panotriton.groups import layout
from panotriton.pipeline.camera import CAMERA_FIELDS, LIMITS, Camera, sample_cameras
from panotriton.pipeline.contract import INTERVALS
from panotriton.web.gateway.failures import ForbiddenPath
from panotriton.web.gateway.paths import Roots

__all__ = ["Groups", "Params", "camera_row", "groups_home", "params"]

F64 = NDArray[np.float64]
Params = dict[str, float]

_MAX_STATE_BYTES = 64 << 10
_LOCKS = 64


def groups_home(output: Path) -> Path:
    """The folder that holds an output's groups; absolute, its links not resolved.

    As the services had it: the output itself, or its parent where the output's path contains `preprocess`.
    """
    home = output.absolute()
    return home.parent if "preprocess" in str(output) else home


class Groups:
    """The groups below one folder."""

    def __init__(self, roots: Roots, home: Path, seed: int) -> None:
        self._roots = roots
        self._home = home
        self._seed = seed
        # One lock per group keeps its two files together; groups may share one, which only costs time.
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def folder(self, group_id: int) -> Path:
        """`home/group_0001`."""
        return layout.group_folder(self._home, group_id)

    def make_folder(self, group_id: int) -> None:
        """Make the group's folder, where a client notes what became of the group."""
        self._roots.make(self.folder(group_id))

    def first_cameras(self, group_id: int) -> F64:
        """Draw the first panorama's cameras (8, left|right, 5)."""
        cameras: F64 = self._drawn(group_id)[0]
        return cameras

    def keep_cameras(self, group_id: int, cameras: F64) -> None:
        """Keep the first panorama's cameras (8, left|right, 5) for the second."""
        with self._lock(group_id):
            self._write_rows(group_id, layout.RIGHT_PARAMS, cameras[:, 1])
            self._write_rows(group_id, layout.LEFT_1_PARAMS, cameras[:, 0])

    def second_cameras(self, group_id: int, base: str) -> F64:
        """The second panorama's cameras (8, left|right, 5), from what the first left in the folder.

        base: what the second panorama's files are named after. Raises InvalidInput where the first
        panorama has not been here, or has the same name and would lose its files; what an earlier
        run left of that name may be overwritten.
        """
        with self._lock(group_id):
            right = self._read_rows(group_id, layout.RIGHT_PARAMS)
            left_1 = self._read_rows(group_id, layout.LEFT_1_PARAMS)
            self._check_base(group_id, base, left_1)
        return np.stack([_second_left(left_1, right, self._drawn(group_id)), right], axis=1)

    def write_params(self, group_id: int, base: str, cameras: F64) -> list[tuple[str, str]]:
        """Write each pair's left and right camera; returns the paths."""
        written = []
        for interval, pair in enumerate(cameras, start=1):
            left, right = (
                self._write(group_id, layout.params(base, interval, side), params(row))
                for side, row in zip(layout.SIDES, pair, strict=True)
            )
            written.append((left, right))
        return written

    def _drawn(self, group_id: int) -> F64:
        return sample_cameras(self._seed + group_id)  # (2, 8, 2, 5)

    def _lock(self, group_id: int) -> AbstractContextManager[bool]:
        return self._locks[group_id % _LOCKS]

    def _check_base(self, group_id: int, base: str, left_1: F64) -> None:
        name = layout.params(base, 1, "left")
        try:
            taken = self._read(group_id, name)
        except InvalidInput:
            return  # no such file: the name is free
        # The first panorama's files are written after the state; older ones are of an earlier run.
        current = self._written_ns(group_id, name) >= self._written_ns(
            group_id, layout.LEFT_1_PARAMS
        )
        if current and taken == params(left_1[0]):
            raise InvalidInput(
                f"the second panorama of group {group_id} is called {base} like the first; expected "
                "another name, since their files go to one folder: rename or copy it"
            )

    def _read_rows(self, group_id: int, name: str) -> F64:
        rows = self._read(group_id, name)
        try:
            cameras = [camera_row(row) for row in rows]
            if len(cameras) != INTERVALS:
                raise ValueError(f"{len(cameras)} cameras")
        except (TypeError, ValueError, KeyError) as error:
            raise InvalidInput(
                f"{Path(name).name} of group {group_id} is broken ({error}); expected a list of {INTERVALS} "
                f"cameras with {', '.join(CAMERA_FIELDS)}: send the first panorama again"
            ) from error
        return np.stack(cameras)

    def _read(self, group_id: int, name: str) -> Any:
        path = self.folder(group_id) / name
        try:
            return json.loads(self._roots.read(str(path), _MAX_STATE_BYTES))
        except ForbiddenPath:
            raise
        except (InvalidInput, ValueError) as error:
            raise InvalidInput(
                f"group {group_id} has no cameras yet ({error}); expected its first panorama before "
                "the second: send it with is_first true"
            ) from error

    def _written_ns(self, group_id: int, name: str) -> int:
        return self._roots.modified_ns(str(self.folder(group_id) / name))

    def _write_rows(self, group_id: int, name: str, rows: F64) -> None:
        self._write(group_id, name, [params(row) for row in rows])

    def _write(self, group_id: int, name: str, content: Any) -> str:
        path = self.folder(group_id) / name
        self._roots.write(path, (json.dumps(content, indent=4) + "\n").encode())
        return str(path)


def _second_left(left_1: F64, right: F64, drawn: F64) -> F64:
    """The second panorama's left cameras (8, 5): as far from what the first's are as those drawn are.

    The kept state decides, whoever wrote it. Where it is what was drawn, so is the result, to the bit.
    """
    low, high = np.array([LIMITS[name] for name in CAMERA_FIELDS]).T
    moved = (left_1 + drawn[1, :, 0] - drawn[0, :, 0]).clip(low, high)
    left_2 = np.where(left_1 == drawn[0, :, 0], drawn[1, :, 0], moved)
    left_2[:, 0] = right[:, 0]  # the yaw is the pair's
    return left_2


def params(row: F64) -> Params:
    """A (5,) camera as the services' JSON object."""
    return asdict(Camera.from_array(row))


def camera_row(fields: Mapping[str, float]) -> F64:
    """The reverse; raises ValueError or KeyError for a field that is missing or out of range."""
    return Camera(*(float(fields[name]) for name in CAMERA_FIELDS)).to_array()
