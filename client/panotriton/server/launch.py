"""Run a real tritonserver on this machine: the one that the nvidia-pytriton wheel carries, or any other.

```python
with LocalServer(Path("model_repository")) as server:
    print(server.grpc_url)
```
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from panotriton.errors import ServerStartError
from panotriton.pipeline.channel import is_local
from panotriton.pipeline.placement import SETTING
from panotriton.pipeline.regions import FOLDER
from panotriton.pipeline.scratch import PREFIX, Scratch
from panotriton.server.control import KEY_HEADER, ModelControl
from panotriton.server.engines import ENGINES
from panotriton.server.leftovers import SHM_PREFIX
from panotriton.server.processes import Loading, Stub
from panotriton.server.repository import placed, served_here

__all__ = [
    "Installation",
    "LocalServer",
    "die_with_parent",
    "environment",
    "find_installation",
    "libpython_folder",
    "python_version",
]

# What no web page may do, which can send requests to localhost: load and unload models, change logs.
_CONTROL = "model-repository,trace,logging"
# Nor callers of other machines, who must not name this one's memory either.
_CONTROL_FROM_AFAR = f"{_CONTROL},shared-memory"
# glibc's malloc: keep up to 2 GB of what was freed. The images of one group, hundreds of MB, otherwise
# come from the kernel anew each time, page by page, which takes longer than to compute some of them.
_KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
}
# On a busy machine 24.10 aborts at times while it loads Python models: boost's lock_exception, see the
# open issue in docs/RELIABILITY.md.
_STARTS = 3
_POLL_S = 0.1
_DOCKER_WAY = "run it in a container instead: see docker/ in the project"
_PLAIN_PATH = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
_TRACEBACK = r"\n\nAt:"
_OTHER_VERSION = re.compile(r"(?:ImportError|ModuleNotFoundError): .*'panotriton\b")
_LOAD_FAILURE = re.compile(r"failed to load '([^']+)' version \d+: (.+?)\"?$")


@dataclass(frozen=True)
class Installation:
    """A tritonserver binary and what it needs around it.

    `backends` is the server's own backend folder (None: the binary's default). `library_path`
    holds folders for LD_LIBRARY_PATH. `stub` is the Python backend's stub to run models with,
    None where the backend folder already has the right one.
    """

    binary: Path
    backends: Path | None = None
    library_path: tuple[Path, ...] = ()
    stub: Path | None = None
    flags: frozenset[str] = field(default=frozenset())


def find_installation(binary: Path | None = None) -> Installation:
    """Find the tritonserver to run: `binary`, or the one inside the nvidia-pytriton wheel.

    Raises ServerStartError, with the way out, for a platform, Python or environment in which the
    server cannot run or would silently return empty tensors (numpy 2 in its Python models).
    """
    if binary is not None:
        if not os.access(binary, os.X_OK):
            raise ServerStartError(f"{binary} is not an executable tritonserver")
        return Installation(binary=binary, flags=_supported_flags(binary, ()))
    _check_platform()
    root = _wheel_folder()
    stub = root / "python_backend_stubs" / python_version() / "triton_python_backend_stub"
    if not stub.is_file():
        served = ", ".join(sorted(path.name for path in stub.parent.parent.iterdir()))
        raise ServerStartError(
            f"the pip-installed tritonserver has no stub for Python {python_version()}; "
            f"use one of {served}, or {_DOCKER_WAY}"
        )
    _check_numpy()
    libraries = (root.parent.parent / "nvidia_pytriton.libs", libpython_folder())
    server = root / "bin" / "tritonserver"
    return Installation(
        binary=server,
        backends=root / "backends",
        library_path=libraries,
        stub=stub,
        flags=_supported_flags(server, libraries),
    )


def _check_platform() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ServerStartError(
            f"the pip-installed tritonserver runs on Linux x86_64, this is {sys.platform} "
            f"{platform.machine()}; {_DOCKER_WAY}"
        )
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split("."))) < (2, 35):
        raise ServerStartError(
            f"the pip-installed tritonserver needs glibc 2.35, this system has {version}; {_DOCKER_WAY}"
        )


def _wheel_folder() -> Path:
    spec = util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise ServerStartError(
            "no tritonserver in this environment: pip install 'panotriton[serve]', "
            f"or name one with --tritonserver, or {_DOCKER_WAY}"
        )
    return Path(spec.submodule_search_locations[0]) / "tritonserver"


def _check_numpy() -> None:
    version = metadata.version("numpy")
    if int(version.split(".")[0]) >= 2:
        raise ServerStartError(
            f"numpy {version} is installed, but with numpy 2 every output of this server's Python "
            "models is silently empty: pip install 'numpy<2'"
        )


def libpython_folder() -> Path:
    name = f"libpython{python_version()}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), "/usr/lib/x86_64-linux-gnu", "/usr/lib64"):
        if folder and (Path(folder) / name).exists():
            return Path(folder)
    raise ServerStartError(
        f"{name} not found: this Python was built without its shared library, which the server's "
        f"Python models link. Debian and Ubuntu: apt-get install libpython{python_version()}; "
        "pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install"
    )


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _supported_flags(binary: Path, libraries: Sequence[Path]) -> frozenset[str]:
    """The flags that this very server takes, from its own help: they differ between releases."""
    text = subprocess.run(
        [binary, "--help"], capture_output=True, text=True, env=environment(libraries), check=False
    )
    flags = frozenset(re.findall(r"--[a-z][a-z0-9-]+", text.stdout + text.stderr))
    if "--model-repository" not in flags:
        reason = (text.stderr or text.stdout).strip().splitlines()[-1:] or ["no output"]
        raise ServerStartError(f"{binary} does not run here: {reason[0]}; {_DOCKER_WAY}")
    return flags


def environment(libraries: Sequence[Path]) -> dict[str, str]:
    """The server's environment: this Python first on PATH, since the stub runs the one it finds."""
    env = dict(os.environ)
    inherited = [env["LD_LIBRARY_PATH"]] if env.get("LD_LIBRARY_PATH") else []
    env["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, libraries), *inherited])
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    for name, value in _KEEP_MEMORY.items():
        env.setdefault(name, value)
    # Several processes share the cores: a thread that waits must sleep, not spin on one of them.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return env


class LocalServer:
    """A tritonserver child process, ready on entry and gone on exit, with nothing left behind.

    Ports of 0 pick free ones. `load_models` serves only the named models (and what they compose);
    None serves every model of the repository. `strict` fails the start when any model does not
    load; otherwise the others are served. `auto_complete` lets configs leave out inputs and outputs,
    for an extra process per model at start. `controlled` lets the holder of `control` load and unload
    models, and over gRPC every process of this machine; over HTTP that takes a key, since any web page
    can send a request to localhost. `placement` says which networks other servers have, which then are not
    loaded here (`panotriton.pipeline.placement`). Raises ServerStartError with the reason from the server's
    log, which is kept at `log_file` where one is named.
    """

    def __init__(
        self,
        model_repository: Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        log_file: Path | None = None,
        log_verbose: int = 0,
        load_models: Sequence[str] | None = None,
        placement: str = "",
        strict: bool = True,
        auto_complete: bool = False,
        controlled: bool = False,
        start_timeout_s: float = 300.0,
        exit_timeout_s: float = 30.0,
        max_request_bytes: int = 1 << 30,
        installation: Installation | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.model_repository = Path(model_repository).absolute()
        self.host = host
        free = _free_ports(host, 3)
        self.http_port = http_port or free[0]
        self.grpc_port = grpc_port or free[1]
        self.metrics_port = metrics_port or free[2]
        self.log_file = log_file
        self.installation = installation
        self._log_verbose = log_verbose
        self._placement = placement
        elsewhere = placed(placement)
        if load_models is None and elsewhere:
            load_models = served_here(self.model_repository, elsewhere)
        self._load_models = ["*"] if controlled and load_models is None else load_models
        self._strict = strict
        self._auto_complete = auto_complete
        self._start_timeout_s = start_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._max_request_bytes = max_request_bytes
        self._extra_args = list(extra_args)
        # Nobody else knows it. Who needs control from afar runs the container, where it is a secret.
        self._key = secrets.token_hex(24) if controlled or not is_local(host) else ""
        self._shm_prefix = f"{SHM_PREFIX}{uuid.uuid4().hex[:12]}_"
        self._work: Scratch | None = None
        self._log: IO[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.loaded: set[Stub] = set()

    @property
    def http_url(self) -> str:
        return f"{_reachable(self.host)}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"{_reachable(self.host)}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self.host)}:{self.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def control(self) -> ModelControl:
        """What loads and unloads this server's models, where it is `controlled`."""
        return ModelControl(self.http_url, self._key)

    def log_text(self) -> str:
        """What the server has written to its log so far."""
        return self._log_path().read_text(errors="replace")

    def log_lines(self) -> Iterator[str]:
        """Follow the log line by line until the server ends."""
        with self._log_path().open(errors="replace") as log:
            while True:
                ended = self._process is None or self._process.poll() is not None
                yield from log
                if ended:
                    return
                time.sleep(0.1)

    def __enter__(self) -> LocalServer:
        plain = _PLAIN_PATH.fullmatch(tempfile.gettempdir())
        place = None if plain else Path("/tmp")  # noqa: S108
        # The logs of a dead one are left to whoever asks why: `panotriton doctor` removes it.
        self._work = Scratch(f"{PREFIX}server-", place, sweep=False)
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait(self) -> int:
        """Block until the server ends by itself; returns its exit code."""
        return self._running().wait()

    def start(self) -> None:
        """Start the server, again after `kill` at the same addresses, and wait until it is ready.

        Raises ServerStartError with the reason; a crash while it loads is tried again first.
        """
        for left in reversed(range(_STARTS)):
            self._start()
            try:
                self._wait_ready()
            except ServerStartError:
                if not left or (self.exit_code() or 0) >= 0:
                    raise
                self.kill()
            else:
                return

    def exit_code(self) -> int | None:
        """How the server ended, -N by signal N; None while it runs."""
        return self._running().poll()

    def kill(self) -> None:
        """End the server at once, and with it every request that it has: their callers see it go."""
        if self._process is not None:
            _kill(self._process)
            self._process = None
        # A clean exit removes the regions; after a hard kill they are ours alone to remove.
        for region in FOLDER.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the server and its stubs and remove their files; safe to call twice."""
        try:
            if self._process is not None:
                _end(self._process, self._exit_timeout_s)
        finally:  # a second Ctrl-C cuts the wait short
            self.kill()
            if self._log is not None:
                self._log.close()
                self._log = None
            if self._work is not None:
                self._work.close()
                self._work = None

    def _start(self) -> None:
        for port in (self.http_port, self.grpc_port, self.metrics_port):
            _check_port(self.host, port)
        installation = self.installation or find_installation()
        work = self._scratch()
        self._log = self._log or self._log_path().open("wb")
        self._process = _started(
            self._command(installation, work.path),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment(installation.library_path) | {SETTING: self._placement},
            cwd=work.path,  # the stub imports `model` from its working directory first
            pass_fds=[work.lock],  # and on to the stubs: the folder is theirs as well
            start_new_session=True,  # Ctrl-C reaches only us; we then end the server in order
        )

    def _command(self, installation: Installation, work: Path) -> list[str]:
        flags = {
            "--model-repository": str(_shell_word(self.model_repository, work)),
            "--http-address": self.host,
            "--http-port": str(self.http_port),
            "--grpc-address": self.host,
            "--grpc-port": str(self.grpc_port),
            "--metrics-address": self.host,
            "--metrics-port": str(self.metrics_port),
            "--allow-gpu-metrics": "true" if Path("/dev/nvidiactl").exists() else "false",
            "--exit-on-error": "true" if self._strict else "false",
            "--exit-timeout-secs": str(int(self._exit_timeout_s)),
            "--log-verbose": str(self._log_verbose),
            "--model-control-mode": "none" if self._load_models is None else "explicit",
            # Releases from 25.07 cap a request at 64 MB unless told otherwise; from 26.05 clients may
            # register shared memory only where this is said.
            "--http-max-input-size": str(self._max_request_bytes),
            "--allow-client-shm": "true" if is_local(self.host) else "false",
        }
        flags |= self._restrictions()
        command = [*die_with_parent(), str(installation.binary)]
        command += [
            f"{flag}={value}" for flag, value in flags.items() if flag in installation.flags
        ]
        command += [] if self._auto_complete else ["--disable-auto-complete-config"]
        command += [f"--load-model={name}" for name in self._load_models or ()]
        command += [f"--backend-config=python,{item}" for item in self._python_backend_config()]
        if installation.backends is not None:
            command.append(f"--backend-directory={_build_backends(installation, work)}")
        return command + self._extra_args

    def _restrictions(self) -> dict[str, str]:
        if not self._key:
            return {}
        if is_local(self.host):
            return {"--http-restricted-api": f"{_CONTROL}:{KEY_HEADER}={self._key}"}
        restricted = f"{_CONTROL_FROM_AFAR}:{KEY_HEADER}={self._key}"
        return {"--http-restricted-api": restricted, "--grpc-restricted-protocol": restricted}

    def _python_backend_config(self) -> list[str]:
        return [
            f"shm-region-prefix-name={self._shm_prefix}",
            # Image tensors are tens of MB: few large growth steps instead of many small ones.
            f"shm-default-byte-size={16 << 20}",
            f"shm-growth-byte-size={64 << 20}",
            "stub-timeout-seconds=300",
        ]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        process = self._running()
        loading = Loading(process.pid)
        self.loaded = loading.stubs
        while not self._ready():
            loading.look()
            if loading.stalled:
                _kill(process)  # as if it had crashed
                raise ServerStartError(self._start_failure("a model's process died as it loaded"))
            if process.poll() is not None:
                raise ServerStartError(self._start_failure(f"exit code {process.returncode}"))
            if time.monotonic() > deadline:
                late = f"not ready after {self._start_timeout_s:g} s"
                raise ServerStartError(self._start_failure(late))
            time.sleep(_POLL_S)

    def _ready(self) -> bool:
        # A server that serves on despite a broken model (not strict) is live but never ready.
        probe = "ready" if self._strict else "live"
        return self.control.healthy(probe, timeout_s=2)

    def _start_failure(self, outcome: str) -> str:
        log = self.log_text()
        lines = log.splitlines()
        failures = filter(None, map(_LOAD_FAILURE.search, lines))
        # A Python model's traceback follows its message on the same line, escaped; the log has it.
        reasons = [f"model {m[1]}: {m[2].split(_TRACEBACK)[0]}" for m in failures]
        reasons = list(dict.fromkeys(reasons)) or lines[-5:]
        if any(_OTHER_VERSION.search(reason) for reason in reasons):
            reasons.append(
                "the repository's models are of another version of panotriton: export it again"
            )
        where = f" (log: {self.log_file})" if self.log_file else ""
        return f"tritonserver did not start: {outcome}{where}\n  " + "\n  ".join(reasons)

    def _log_path(self) -> Path:
        return self.log_file if self.log_file is not None else self._scratch().path / "server.log"

    def _scratch(self) -> Scratch:
        if self._work is None:
            raise ServerStartError("the server is not running: use it inside its `with` block")
        return self._work

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerStartError("the server is not running: use it inside its `with` block")
        return self._process


def die_with_parent() -> list[str]:
    """A prefix that has the kernel end the server when the thread that started it is killed."""
    setpriv = shutil.which("setpriv")  # util-linux; where it is missing only a hard kill leaks
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def _started(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start what `die_with_parent` would end with the thread that starts it: from one that stays as long."""
    if threading.current_thread() is threading.main_thread():
        return subprocess.Popen(command, **options)
    started: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        try:
            process = subprocess.Popen(command, **options)
        except Exception as error:  # raised where it is waited for
            started.set_exception(error)
            return
        started.set_result(process)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # leaves its end to others

    threading.Thread(target=start, name="tritonserver's starter", daemon=True).start()
    return started.result()


def _shell_word(repository: Path, work: Path) -> Path:
    """The repository, by a link in `work` where the path has spaces, quotes or letters beyond ASCII.

    The Python backend starts each model by a shell, which would take such a path apart, and in a Python
    that opens ASCII names alone, whatever the locale.
    """
    if _PLAIN_PATH.fullmatch(str(repository)):
        return repository
    link = work / "repository"
    link.symlink_to(repository)
    return link


def _build_backends(installation: Installation, work: Path) -> Path:
    """Lay out a backend folder of copies: the server refuses links that leave it."""
    if installation.backends is None or installation.stub is None:
        raise ServerStartError(f"{installation.binary} brings its own backends")
    python = work / "backends" / "python"
    if (python / installation.stub.name).is_file():
        return work / "backends"  # started again
    shutil.rmtree(work / "backends", ignore_errors=True)  # of which somebody removed old files
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(installation.backends / "python" / name, python)
    with (python / "triton_python_backend_utils.py").open("a") as utils:
        utils.write("\n\n" + Path(__file__).with_name("stub_end.py").read_text())
    onnxruntime = Path(__file__).parent / "backends" / "onnxruntime" / "model.py"
    for name in sorted({engine.backend for engine in ENGINES.values()}):
        (work / "backends" / name).mkdir()
        shutil.copy2(onnxruntime, work / "backends" / name)
    shutil.copy2(installation.stub, python)  # the last: with it all are there
    return work / "backends"


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """SIGTERM, then wait for requests in flight."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s + 10)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the server and to what is left of its stubs, which share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_ports(host: str, count: int) -> list[int]:
    """Different ones: each is held until all are found. Raises ServerStartError for an address of none."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            try:
                probe.bind((host, 0))
            except OSError as error:
                raise ServerStartError(
                    f"cannot listen on {host}: {error.strerror}; expected an IPv4 address of this machine, "
                    "as 127.0.0.1 or 0.0.0.0"
                ) from error
        return [int(probe.getsockname()[1]) for probe in probes]


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerStartError(
                f"cannot listen on {host}:{port}: {error.strerror}; stop what listens there or choose "
                "other ports (--http-port, --grpc-port, --metrics-port)"
            ) from error


def _reachable(host: str) -> str:
    return "127.0.0.1" if host == "0.0.0.0" else host  # noqa: S104
