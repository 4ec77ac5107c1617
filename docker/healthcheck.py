#!/usr/bin/env python3
"""Docker's HEALTHCHECK: exit 0 when a new request would be answered, 1 otherwise. The supervisor knows more
than tritonserver, which calls a model ready whose process has died. NVIDIA's image and python:slim both have
python3; the second has no curl."""

import os
import sys
import urllib.request

port = os.environ.get("PANOTRITON_HEALTH_PORT", "8003")
try:
    # Past a proxy that Docker puts into the environment of every container.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(f"http://127.0.0.1:{port}/ready", timeout=4).close()
except OSError as error:
    sys.exit(f"not ready on port {port}: {error}")
