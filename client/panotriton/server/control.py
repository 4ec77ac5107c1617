"""Loading and unloading a running server's models, and what it says of itself."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Collection, Sequence
from http.client import HTTPConnection, HTTPException
from typing import Any

from panotriton.errors import PanotritonError
from panotriton.pipeline.channel import release
from panotriton.pipeline.networks import NETWORKS

__all__ = ["KEY_HEADER", "ControlError", "ModelControl"]

KEY_HEADER = "panotriton-admin"
_POLL_S = 0.1
_BRIEF_S = 3.0  # for an answer without which something else is looked at
_GONE = "UNAVAILABLE"
# What nothing else of the repository calls comes first; what a layer calls is unloaded after it. Few layers:
# the Python backend takes more than a second to let a model go.
_LAYERS = (
    ("panorama", "panorama_encoded", "panorama_stream"),
    (
        *("crop", "decode", "interpolate", "options", "osediff", "preprocess", "select", "tap"),
        *("qwen_describer", "qwen_scorer"),
    ),
    # Last, for servers that others ask for their networks.
    ("qwen", *(model for roles in NETWORKS.values() for model in roles.models)),
    ("qwen_vision",),
)


class ControlError(PanotritonError):
    """The server did not do what its repository API was asked for."""


class NoAnswer(ControlError):
    """The server is not there, or did not answer in time."""


class ModelControl:
    """The repository API of one server, over HTTP, with the key that it wants ("" where it wants none)."""

    def __init__(self, http_url: str, key: str = "") -> None:
        self._http_url = http_url
        self._headers = {KEY_HEADER: key} if key else {}

    def healthy(self, probe: str, timeout_s: float = 5.0) -> bool:
        """Whether the server answers that it is `live` or `ready`."""
        try:
            return self._ask("GET", f"health/{probe}", timeout_s)[0] == 200
        except OSError:
            return False

    def states(self, timeout_s: float = 10.0) -> dict[str, str]:
        """Each model's state: READY, LOADING, UNLOADING, UNAVAILABLE. Raises ControlError."""
        index = self._post("repository/index", timeout_s)
        return {entry["name"]: entry.get("state", _GONE) for entry in index}

    def release(self) -> tuple[int, int]:
        """Of the server, such as (2, 51). Raises ControlError."""
        return release(self._get("")["version"])

    def executions(self) -> int:
        """How many executions of all models have ended. Raises ControlError."""
        return sum(model["execution_count"] for model in self._get("models/stats")["model_stats"])

    def regions(self) -> list[str]:
        """Names under which callers registered system shared memory. Raises ControlError."""
        return [region["name"] for region in self._get("systemsharedmemory/status")]

    def unregister(self, region: str) -> None:
        """Let go of a caller's region. Raises ControlError, also while a request uses it."""
        self._post(f"systemsharedmemory/region/{region}/unregister")

    def unload(self, model: str) -> None:
        """Take no new request for the model; those in flight go on. Raises ControlError."""
        self._post(f"repository/models/{model}/unload")

    def load(self, model: str, timeout_s: float) -> None:
        """Load the model, and the ensembles that went with it. Raises ControlError."""
        self._post(f"repository/models/{model}/load", timeout_s)

    def replace(
        self,
        models: Collection[str],
        unload_s: float,
        load_s: float,
        watch: Callable[[str], Callable[[], bool]],
    ) -> None:
        """Replace the processes of models.

        watch: given the model that is to be loaded, what says from then on whether that comes to nothing.
        Raises ControlError, also where a request still waits for the old processes after unload_s: it would
        wait for ever.
        """
        for model in models:
            self.unload(model)
        deadline = time.monotonic() + unload_s
        while busy := [each for each in models if self.states().get(each, _GONE) != _GONE]:
            if time.monotonic() > deadline:
                raise ControlError(f"requests to {', '.join(busy)} were left without an answer")
            time.sleep(_POLL_S)
        for model in models:
            self._load_watched(model, load_s, watch(model))

    def _load_watched(self, model: str, load_s: float, hopeless: Callable[[], bool]) -> None:
        """The server does not see that a process died while it loads, and waits for it for minutes."""
        ended: list[ControlError | None] = []

        def load() -> None:
            try:
                self.load(model, load_s)
            except ControlError as error:
                ended.append(error)
            else:
                ended.append(None)

        threading.Thread(target=load, daemon=True).start()
        while not ended:
            if hopeless():
                raise ControlError(f"the new process of {model} died as well")
            time.sleep(_POLL_S)
        if ended[0]:
            raise ended[0]

    def drain(self, bound_s: float, hopeless: Callable[[], bool] = lambda: False) -> bool:
        """Refuse new groups and let those in flight finish, then the steps that they are made of.

        The server is not ready meanwhile, and answers a new request with NOT_FOUND, 404: "has no available
        versions". Returns whether all was answered within bound_s, and before `hopeless`, which is asked
        again and again. Raises ControlError where it refuses; where it does not answer it is asked again.
        """
        deadline = time.monotonic() + bound_s
        return all(self._drained(layer, deadline, hopeless) for layer in _LAYERS)

    def _drained(self, layer: Sequence[str], deadline: float, hopeless: Callable[[], bool]) -> bool:
        while time.monotonic() < deadline and not hopeless():
            with contextlib.suppress(NoAnswer):
                states = self.states(_BRIEF_S)
                for name in layer:
                    if states.get(name) == "READY":
                        self.unload(name)
                if all(states.get(name, _GONE) == _GONE for name in layer):
                    return True
            time.sleep(_POLL_S)
        return False

    def _get(self, path: str) -> Any:
        return self._answer("GET", path, 5.0)

    def _post(self, path: str, timeout_s: float = 10.0) -> Any:
        return self._answer("POST", path, timeout_s)

    def _answer(self, method: str, path: str, timeout_s: float) -> Any:
        try:
            status, answer = self._ask(method, path, timeout_s)
        except OSError as error:
            raise NoAnswer(f"{path}: {error}") from error
        if status != 200:
            raise ControlError(f"{path}: {status}, {answer.decode(errors='replace')}")
        return json.loads(answer or b"null")

    def _ask(self, method: str, path: str, timeout_s: float) -> tuple[int, bytes]:
        """Status and body. Straight to the server: no proxy that the environment names may come between."""
        connection = HTTPConnection(self._http_url, timeout=timeout_s)
        try:
            connection.request(method, f"/v2/{path}".rstrip("/"), b"{}", self._headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        except HTTPException as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
