"""What a caller is told by a server in trouble, so that it can tell that from trouble of its own making."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from panotriton.server.launch import LocalServer
from panotriton.server.processes import find_stubs


def upscale(server: LocalServer, protocol: ModuleType) -> str | None:
    """The status and message that a request to `osediff` gets; None where it is answered."""
    url = server.grpc_url if protocol is tritonclient.grpc else server.http_url
    client: Any = protocol.InferenceServerClient(url)
    image = protocol.InferInput("IMAGES", [1, 64, 64, 3], "UINT8")
    image.set_data_from_numpy(np.zeros((1, 64, 64, 3), np.uint8))
    try:
        client.infer("osediff", [image])
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}".removeprefix("StatusCode.")
    finally:
        client.close()
    return None


def test_trouble_of_the_server_is_told_from_that_of_the_request(standin_repository: Path) -> None:
    with LocalServer(standin_repository, controlled=True) as server:

        def says(grpc: str, http: str, ends: str) -> None:
            for protocol, begins in ((tritonclient.grpc, grpc), (tritonclient.http, http)):
                said = upscale(server, protocol)
                assert said
                assert said.startswith(begins)
                assert said.endswith(ends)

        def kill(model: str) -> None:
            for stub in find_stubs(server.pid):
                if stub.model == model:
                    stub.kill()

        assert upscale(server, tritonclient.grpc) is None
        kill("osediff_unet")  # which osediff asks
        says("UNAVAILABLE osediff_unet: ", "503 osediff_unet: ", "is not healthy.")
        kill("osediff")
        says("INTERNAL Stub process", "500 Stub process", "is not healthy.")
        server.control.unload("osediff")
        says("NOT_FOUND ", "404 ", "'osediff' has no available versions")
        server.kill()  # whose requests to dead processes it would wait for
