"""What the processes of models import, and that it is without a search for garbage."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from panotriton.models.imports import uncollected


def test_garbage_is_looked_for_again_whatever_became_of_the_import() -> None:
    gc.unfreeze()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    gc.unfreeze()


def test_a_process_that_needs_no_codec_imports_none() -> None:
    """Of networks, options, scores: a third of the start, and 18 MB, of each of a dozen processes."""
    code = """
import sys, types
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
import panotriton.models.requests, panotriton.pipeline.checks, panotriton.pipeline.quality
import panotriton.server.engines.onnxruntime
print({"cv2", "PIL", "tritonclient"} & sys.modules.keys() or "none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "none"
