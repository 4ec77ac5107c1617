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

    certificate and key are the client's own, for servers that ask for one; a certificate's file may hold its
    key, too. Raises InvalidInput for files that cannot be read, or are none, and for a key alone.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None

    def __post_init__(self) -> None:
        given = {name: path for name, path in vars(self).items() if path is not None}
        for name, path in given.items():
            if not os.access(path, os.R_OK):
                raise InvalidInput(f"{name} {brief(path)} cannot be read; expected a PEM file")
        if self.key is not None and self.certificate is None:
            raise InvalidInput(f"key {brief(self.key)} has no certificate; expected both, or none")
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
            "root_certificates": _text(self.ca) or _system_roots(),
            "certificate_chain": _text(self.certificate),
            "private_key": _text(self.key or self.certificate),
        }


def _system_roots() -> str | None:
    """What OpenSSL goes by; None where that is a folder, or gRPC has been told another: gRPC's own."""
    told = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH" in os.environ
    return None if told else ssl.get_default_verify_paths().cafile


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)
