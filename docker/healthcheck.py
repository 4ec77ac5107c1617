#!/usr/bin/env python3
"""Docker's HEALTHCHECK: exit 0 when every model is ready, 1 otherwise. NVIDIA's image and python:slim
both have python3; the second has no curl."""

import os
import sys
import urllib.request

port = os.environ.get("PANOTRITON_HTTP_PORT", "8000")
try:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=4).close()
except OSError as error:
    sys.exit(f"not ready on port {port}: {error}")
