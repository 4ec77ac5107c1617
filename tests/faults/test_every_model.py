"""The small preset's server: kill the processes of every model while idle, and of every kind while busy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from panotriton.errors import PanotritonError
from panotriton.server.processes import find_stubs
from tests.faults.conftest import Answer, Serving, group, served
from tests.faults.test_deaths import mended, recovered

pytestmark = pytest.mark.thorough
SEED = 19
BUSY = ("preprocess", "osediff", "osediff_unet", "qwen", "qwen_scorer", "panorama_stream")

Panoramas = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def real(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with served(repository, tmp_path_factory.mktemp("real"), "--restarts=40") as running:
        yield running


def test_every_models_process_is_replaced_idle_and_busy(
    real: Serving, panoramas: Panoramas
) -> None:
    undisturbed = group(real, panoramas)
    draw = random.Random(SEED)
    models = sorted({stub.model for stub in find_stubs(real.server().pid)})
    draw.shuffle(models)
    for model in models:
        before = recovered(real)
        real.kill_stubs(model)
        mended(real, before)
    assert group(real, panoramas) == undisturbed
    for model in BUSY:
        before = recovered(real)
        call = Answer(lambda: group(real, panoramas))
        call.join(draw.uniform(0.1, 3.0))
        real.kill_stubs(model)
        mended(real, before)
        call.join(4 * real.patience_s)  # it may have nothing to do with that model, and finish
        assert call.ended(), f"killed {model}: a caller waits for nothing:\n{real.text()}"
        assert call.result == undisturbed or isinstance(call.error, PanotritonError)
    assert group(real, panoramas) == undisturbed
