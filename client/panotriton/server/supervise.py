"""Keep a server serving: replace what died, start it again when it goes itself, drain it before it ends.

tritonserver says "ready" of a model whose process was killed, for ever. The processes themselves tell the
truth: a dead one is replaced by loading its model anew, which leaves requests to other models alone; where
a request would be left without an answer the whole server is started again, so that its caller sees
the connection go.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Protocol

from panotriton.errors import ServerStartError
from panotriton.pipeline.channel import REFUSES_SINCE
from panotriton.pipeline.regions import FOLDER
from panotriton.server.control import ControlError, ModelControl
from panotriton.server.leftovers import abandoned
from panotriton.server.processes import Stub, find_stubs, look_at

__all__ = ["EXIT_GAVE_UP", "Health", "Served", "Supervisor", "Watch"]

EXIT_GAVE_UP = 4
"""The exit code where starting again did not help."""

_POLL_S = 0.5
_ASK_EVERY_S = 5.0
_STOPPED_S = 15.0  # longer than a debugger's glance, shorter than a caller's patience
_SILENT_S = 60.0  # a busy machine answers late, a locked server never
_UNLOAD_S = 8.0  # idle or answering with errors, a dead model's last request ends in about a second
_LOAD_S = 300.0
_BIRTH_S = 10.0  # until a model that is loaded has a process
_LOAD_FAILS_S = 3.0
_STUCK_S = 12.0  # in a drain; longer than one execution takes, short of a caller's patience
_MOST_BACK_OFF_S = 16.0
_SWEEP_EVERY_S = 10.0
# The server calls a request answered once it has handed the answer to its connection.
_FLUSH_S = 1.0


class Served(Protocol):
    """A server that can be watched, ended and started again."""

    @property
    def pid(self) -> int: ...
    @property
    def control(self) -> ModelControl: ...
    @property
    def loaded(self) -> Iterable[Stub]:
        """The models' processes that were seen while it started; requests may have ended some since."""

    def start(self) -> None: ...
    def exit_code(self) -> int | None: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Health:
    """What a supervisor knows, for probes and metrics; state is starting, serving or draining."""

    state: str = "starting"
    beat_s: float = field(default_factory=time.monotonic)
    restarts: Counter[str] = field(default_factory=Counter)
    reloads: Counter[str] = field(default_factory=Counter)


class Watch:
    """The processes of one server's Python models, and which of the models lost one."""

    def __init__(
        self, server: int, loaded: Iterable[Stub] = (), stopped_s: float = _STOPPED_S
    ) -> None:
        self._server = server
        self._stopped_s = stopped_s
        self._known: dict[int, tuple[str, str]] = {}  # pid → instance, model
        self._bare: set[str] = set()  # models loaded anew of which no process has been seen yet
        self._stopped: dict[int, float] = {}  # pid → since when
        self._learn([*loaded, *find_stubs(server)])

    def _learn(self, stubs: Iterable[Stub]) -> None:
        for stub in stubs:
            if stub.instance != stub.model:  # not one that only completed a config
                self._known[stub.pid] = (stub.instance, stub.model)
                self._bare.discard(stub.model)

    def lost(self) -> dict[str, list[int]]:
        """Models that lost processes, with those that have been seen; each call looks anew."""
        alive = find_stubs(self._server)
        self._learn(alive)
        useful = {stub.pid: stub.instance for stub in alive if not self._hangs(stub.pid)}
        lost: dict[str, list[int]] = {model: [] for model in self._bare}
        for pid, (instance, model) in list(self._known.items()):
            if pid in useful:
                continue
            if instance in useful.values():
                del self._known[pid]  # replaced
            else:
                lost.setdefault(model, []).append(pid)
        return lost

    def renewed(self, model: str) -> None:
        """It was loaded anew: whoever is not there at the next look died at once."""
        self.forget(model)
        self._bare.add(model)

    def forget(self, model: str) -> None:
        """Somebody unloaded it."""
        self._bare.discard(model)
        self._known = {pid: known for pid, known in self._known.items() if known[1] != model}

    def _hangs(self, pid: int) -> bool:
        """Whether the process has been stopped, by SIGSTOP or a debugger, for too long."""
        process = look_at(pid)
        if process is None or not process.stopped:
            self._stopped.pop(pid, None)
            return False
        return time.monotonic() - self._stopped.setdefault(pid, time.monotonic()) > self._stopped_s


class Supervisor:
    """Runs a server until a signal asks for its end.

    restarts: how often within restarts_within_s it is started again before `run` gives up; 0 leaves that
    to whoever started this process. drain_s: what requests in flight get at the end. `say` is told of
    everything that happened, one line each.
    """

    def __init__(
        self,
        server: Served,
        *,
        drain_s: float,
        restarts: int = 5,
        restarts_within_s: float = 600.0,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.health = Health()
        self._server = server
        self._drain_s = drain_s
        self._restarts = restarts
        self._within_s = restarts_within_s
        self._say = say
        self._began: deque[float] = deque()  # the last restarts
        self._end = threading.Event()
        self._starting = False

    def ready(self) -> bool:
        """Whether a new request would be answered: serving, every process there, and the server agrees."""
        return self.health.state == "serving" and self._server.control.healthy("ready")

    def live(self) -> bool:
        """Whether this supervisor still works; a server that does not is its task."""
        busy_s = _LOAD_S + _SILENT_S  # at most, where a model is loaded anew
        return time.monotonic() - self.health.beat_s < busy_s

    def run(self) -> int:
        """Serve a server that has been started; 0 after a signal, EXIT_GAVE_UP where nothing helped.

        SIGTERM, SIGINT or SIGHUP drain it; a second one ends it at once and raises KeyboardInterrupt.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's word counts
                signal.signal(number, self._on_signal)
        try:
            return self._run()
        except KeyboardInterrupt:
            self._server.kill()
            raise

    def _run(self) -> int:
        while (trouble := self._serve(watch := self._look())) is not None:
            self._say(f"{trouble}; its requests got an error")
            self.health.state = "starting"
            self._server.kill()
            self._starting = True
            if self._end.is_set() or not self._start_again(trouble):
                return 0 if self._end.is_set() else EXIT_GAVE_UP
            self._starting = False
        self._drain(watch)
        return 0

    def _look(self) -> Watch:
        return Watch(self._server.pid, self._server.loaded)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._end.is_set() or self._starting:  # where nothing is in flight
            raise KeyboardInterrupt
        self._end.set()

    def _serve(self, watch: Watch) -> str | None:
        """Serve until the end is asked for (None) or only a new start helps (why)."""
        self.health.state = "serving"
        silent = Silence(self._server)
        sweep = Sweep(self._server.control)
        while not self._end.wait(_POLL_S):
            self.health.beat_s = time.monotonic()
            if trouble := _ended(self._server) or silent.too_long():
                return trouble
            if (lost := watch.lost()) and (trouble := self._replace(watch, lost)):
                return trouble
            if self.health.state == "starting" and not watch.lost():
                self.health.state = "serving"
            sweep.sometimes()
        return None

    def _replace(self, watch: Watch, lost: Mapping[str, list[int]]) -> str | None:
        """Load models anew that lost processes; the reason where that did not help."""
        control = self._server.control
        fates = {model: f"{model}: {_fate(processes)}" for model, processes in lost.items()}
        try:
            states = control.states()
            for model in lost:
                if states.get(model) != "READY":
                    watch.forget(model)  # unloaded, or being loaded, by whoever has the key
                    del fates[model]
            if not fates:
                return None
            self.health.state = "starting"
            for stub in find_stubs(self._server.pid):
                if stub.pid in lost.get(stub.model, ()):
                    stub.kill()  # stopped: it would wait for ever to be told to end
            control.replace(fates, _UNLOAD_S, _LOAD_S, lambda it: Born(self._server.pid, it).died)
        except ControlError as error:
            return f"{'; '.join(fates.values())}, and loading anew failed: {error}"
        for model, fate in fates.items():
            watch.renewed(model)
            self.health.reloads[model] += 1
            self._say(f"{fate}; loaded anew")
        return None

    def _start_again(self, trouble: str) -> bool:
        """Whether the server runs again."""
        while self._may_start():
            self.health.restarts[trouble.partition(":")[0]] += 1
            try:
                self._server.start()
            except ServerStartError as error:
                self._say(str(error))
                self._server.kill()
            else:
                self._say("serving again")
                return True
        if not self._restarts:
            return False  # a container's engine starts the next one
        self._say(
            f"given up after {len(self._began)} starts within {self._within_s:g} s; last: {trouble}"
        )
        return False

    def _may_start(self) -> bool:
        now = time.monotonic()
        while self._began and now - self._began[0] > self._within_s:
            self._began.popleft()
        if len(self._began) >= self._restarts:
            return False
        if self._began:
            time.sleep(min(2.0 ** (len(self._began) - 1), _MOST_BACK_OFF_S))
        self._began.append(now)
        return True

    def _drain(self, watch: Watch) -> None:
        self.health.state = "draining"
        self._say("stopping: new requests are refused, those in flight finish; again ends at once")
        silent = Silence(self._server)
        stuck = Stuck(self._server.control, watch)
        trouble: list[str] = []

        def hopeless() -> bool:
            self.health.beat_s = time.monotonic()
            why = _ended(self._server) or silent.too_long()
            if not why and not silent.stopped:
                why = stuck.by_now()
            if why:
                trouble.append(why)
            return bool(why)

        try:
            answered = self._server.control.drain(self._drain_s, hopeless)
        except ControlError as error:
            self._say(f"not drained: {error}")
            return
        if not answered:
            why = "".join(trouble) or f"not all requests ended within {self._drain_s:g} s"
            self._say(f"{why}; ending without them")
            self._server.kill()
            return
        time.sleep(_FLUSH_S)


class Born:
    """The new process of a model that is being loaded."""

    def __init__(self, server: int, model: str) -> None:
        self._server = server
        self._model = model
        self._due_s = time.monotonic() + _BIRTH_S

    def died(self) -> bool:
        """Whether it is gone for longer than a load that failed takes to say so, or was never seen."""
        now = time.monotonic()
        if any(stub.model == self._model for stub in find_stubs(self._server)):
            self._due_s = now + _LOAD_FAILS_S
        return now > self._due_s


class Stuck:
    """Requests in a draining server that nobody will answer, since their model's process died under them.

    Which they are the server does not say. Whoever asks that model from then on has an error at once, and
    others go on; so once a process has died, and no execution of any model has ended for `_STUCK_S`, what is
    left waits for nothing.
    """

    def __init__(self, control: ModelControl, watch: Watch) -> None:
        self._control = control
        self._watch = watch
        self._executions = -1
        self._moved_s = 0.0

    def by_now(self) -> str | None:
        """The process that they wait for, where there are any."""
        try:
            dead = self._dead()
            executions = self._control.executions() if dead else -1
        except ControlError:
            return None  # its silence is another matter
        now = time.monotonic()
        if executions != self._executions:
            self._executions, self._moved_s = executions, now
        if not dead or now - self._moved_s < _STUCK_S:
            return None
        return "; ".join(f"{model}: {_fate(processes)}" for model, processes in dead.items())

    def _dead(self) -> dict[str, list[int]]:
        """Models that lost processes and can't be let go of."""
        states = self._control.states()
        lost = self._watch.lost()
        for model in lost:
            if states.get(model, "UNAVAILABLE") == "UNAVAILABLE":
                self._watch.forget(model)
        return {model: lost[model] for model in lost if states.get(model) in ("READY", "UNLOADING")}


class Silence:
    """How long a server has not answered that it is live."""

    def __init__(self, server: Served) -> None:
        self._server = server
        self._asked_s = self._heard_s = time.monotonic()
        self._stopped_s: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether it was, when last looked at."""
        return self._stopped_s is not None

    def too_long(self) -> str | None:
        """Why only its end helps, where it does."""
        now = time.monotonic()
        process = look_at(self._server.pid)
        if process is not None and process.stopped:
            self._stopped_s = self._stopped_s or now
            late = now - self._stopped_s > _STOPPED_S
            return f"tritonserver: stopped for {_STOPPED_S:g} s" if late else None
        self._stopped_s = None
        if now - self._asked_s < _ASK_EVERY_S:
            return None
        self._asked_s = now
        if self._server.control.healthy("live"):
            self._heard_s = time.monotonic()
        late = time.monotonic() - self._heard_s > _SILENT_S
        return f"tritonserver: no answer for {_SILENT_S:g} s" if late else None


class Sweep:
    """Shared memory that callers left with a server: it would hold the pages of each until its own end.

    A caller that gives a request up can't take back what the server may still write to; it removes the
    file, and the registration stays. One that was killed leaves both.
    """

    def __init__(self, control: ModelControl) -> None:
        self._control = control
        self._next_s = 0.0

    def sometimes(self) -> None:
        """Let go of what nobody will name again, every `_SWEEP_EVERY_S`."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + _SWEEP_EVERY_S
        with contextlib.suppress(ControlError):  # busy, or without shared memory
            if self._refuses:
                for name in abandoned(self._control.regions()):
                    self._remove(name)

    @cached_property
    def _refuses(self) -> bool:
        return self._control.release() >= REFUSES_SINCE

    def _remove(self, name: str) -> None:
        with contextlib.suppress(ControlError):  # in use: next time
            self._control.unregister(name)
            (FOLDER / name).unlink(missing_ok=True)


def _ended(server: Served) -> str | None:
    code = server.exit_code()
    if code is None:
        return None
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"tritonserver: ended by itself, {how}"


def _fate(processes: list[int]) -> str:
    alive = [process for process in map(look_at, processes) if process and not process.dead]
    plural = "process" if len(processes) == 1 else "processes"
    numbers = ", ".join(map(str, sorted(processes)))
    return f"its {plural} {numbers} {'hung' if alive else 'died'}" if processes else "no process"
