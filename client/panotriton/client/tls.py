"""Certificates, as each network stack takes them."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panotriton.errors import InvalidInput, brief

__all__ = ["Tls"]


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files. ca: who may have signed the server's certificate (None: the system's list).

    certificate and key are the client's own, for servers that ask for one. Raises InvalidInput for files that
    cannot be read, or are none.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        given = {name: path for name, path in vars(self).items() if path is not None}
        for name, path in given.items():
            if not os.access(path, os.R_OK):
                raise InvalidInput(f"{name} {brief(path)} cannot be read; expected a PEM file")
        try:
            self.context()
        except OSError as error:  # ssl's too
            files = ", ".join(map(brief, given.values()))
            raise InvalidInput(
                f"{files}: {error}; expected PEM files that belong together"
            ) from error

    def context(self) -> Any:
        """An SSL context with these files, host names checked."""
        return self._with_certificate(ssl.create_default_context(cafile=_text(self.ca)))

    def gevent_context(self, cafile: str | None = None) -> Any:
        """The same for tritonclient's HTTP client, whose own idea of `cafile` does not count."""
        import gevent.ssl  # noqa: PLC0415

        return self._with_certificate(gevent.ssl.create_default_context(cafile=_text(self.ca)))

    def _with_certificate(self, context: Any) -> Any:
        if self.certificate is not None:
            context.load_cert_chain(str(self.certificate), _text(self.key))
        return context

    def grpc_options(self) -> dict[str, Any]:
        """As tritonclient's gRPC clients take them."""
        return {
            "ssl": True,
            "root_certificates": _text(self.ca),
            "certificate_chain": _text(self.certificate),
            "private_key": _text(self.key),
        }


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)
