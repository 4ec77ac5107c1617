"""Imports without a search for garbage, in the process of a model and in the export."""

from __future__ import annotations

import gc

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
