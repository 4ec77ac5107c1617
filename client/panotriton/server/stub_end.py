"""Ends a Python model's process soon after its server is gone, however that went.

The launcher appends this text to its copy of triton_python_backend_utils.py, which every stub imports:
models, backends, all of them. The kernel's own signal at a parent's death does not fit, since it comes
with the end of the thread that started the stub.
"""

import os
import signal
import threading
import time

_LOOK_EVERY_S = 1.0


def _end_with_server(server: int) -> None:
    while os.getppid() == server:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGKILL)  # nobody is left to answer, or to clean up for


threading.Thread(target=_end_with_server, args=(os.getppid(),), daemon=True).start()
