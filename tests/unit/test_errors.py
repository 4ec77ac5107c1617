"""How errors echo what they were given: never more than 80 characters of it."""

import numpy as np
import pytest

from panotriton.client import calls
from panotriton.errors import InvalidInput, brief, quoted
from panotriton.pipeline.contract import Options, check_seed
from panotriton.pipeline.images import decode_image


def test_short_values_are_whole_and_long_ones_cut() -> None:
    assert quoted("adian") == "'adian'"
    assert quoted(b"x") == "b'x'"
    assert quoted([0, 9]) == "[0, 9]"
    assert brief("a/b.jpg") == "a/b.jpg"
    for value in ("x" * 10_000, b"\xff" * 10_000, list(range(10_000)), 10**9000, "\n" * 81):
        assert len(quoted(value)) <= 80
        assert len(brief(value)) <= 80
    assert quoted("ab" * 100).startswith("'abab")
    assert quoted("ab" * 100).endswith("…")
    assert brief("/very" * 100 + "/name.jpg").endswith("/very/name.jpg")


LONG = "x" * 20_000


@pytest.mark.parametrize(
    "fail",
    [
        lambda: Options(align=LONG).check(),
        lambda: Options(upscale=LONG).check(),  # type: ignore[arg-type]
        lambda: Options(upscale=10**9000).check(),
        lambda: check_seed("seed", 10**9000),
        lambda: calls.score(np.zeros((64, 64, 3), np.uint8), mode=LONG),
        lambda: decode_image(LONG, b"GIF89a"),
        lambda: decode_image(LONG, b""),
    ],
)
def test_no_message_grows_with_what_it_echoes(fail: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        fail()  # type: ignore[operator]
    assert len(str(caught.value)) < 300
