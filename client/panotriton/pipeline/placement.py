"""Which networks are on other servers, and where, as one line of text.

`osediff_unet=unet:8001 qwen=10.0.0.7:8001,10.0.0.8:8001`: NAMES=ADDRESSES, spaces between placements, commas
between names and between addresses. A host that stands for several addresses has as many replicas.
"""

from __future__ import annotations

import re

from panotriton.errors import InvalidInput, quoted

__all__ = ["SETTING", "read_placement"]

SETTING = "PANOTRITON_PLACE"
"""The environment variable by which a server's models are told."""

_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):([0-9]{1,5})", re.ASCII)


def read_placement(text: str) -> dict[str, tuple[str, ...]]:
    """Model → addresses, host:port each; nothing of empty text. Raises InvalidInput with what is wrong."""
    placement: dict[str, tuple[str, ...]] = {}
    for part in text.split():
        names, _, addresses = part.partition("=")
        for name in names.split(","):
            if name in placement:
                raise InvalidInput(
                    f"{name} is placed twice: write all its addresses once, with commas"
                )
            placement[name] = tuple(dict.fromkeys(addresses.split(",")))
            _check(part, name, placement[name])
    return placement


def _check(part: str, name: str, addresses: tuple[str, ...]) -> None:
    for address in addresses:
        found = _ADDRESS.fullmatch(address)
        if not name or found is None or not 0 < int(found[1]) < 1 << 16:
            raise InvalidInput(
                f"the placement {quoted(part)} is not NAME[,NAME]=HOST:PORT[,HOST:PORT], with the "
                "gRPC ports of the servers that have it"
            )
