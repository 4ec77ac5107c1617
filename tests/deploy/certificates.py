"""Certificates of an authority of our own, for tests on loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path


def certificates(folder: Path) -> None:
    """ca.crt, and tls.* and caller.* that it signed, for localhost."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=folder, capture_output=True)

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl(*new, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.crt")
    for name in ("tls", "caller"):
        signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=DNS:localhost")
        files = ("-keyout", f"{name}.key", "-out", f"{name}.crt")
        openssl(*new, "-subj", f"/CN={name}", *signed, *files)
