"""The tests that need a GPU, which are skipped aloud elsewhere.

python tests/gpu/marked.py
"""

from __future__ import annotations

import re
import subprocess
import sys

import record
from record import script

# Not those of tests/server: each would start a server of full size. serving.py asks its own.
WHERE = ("tests/gpu", "tests/unit/test_qwen.py", "tests/unit/test_qwen_decode.py")


def main() -> None:
    """Run them; fails where one does."""
    chosen = record.options(__doc__)
    found = record.Record(chosen.json)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["-W", "default"]  # another release of a library may warn of what ours does not
    where = WHERE[:1] if chosen.quick else WHERE
    done = subprocess.run(
        [*command, *where], cwd=script.ROOT, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    last = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout.splitlines()[-1])
    found["pytest"] = ", ".join(last) or f"exit code {done.returncode}"
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    script.run(main)
