#!/usr/bin/env bash
# setup.sh KIT, on the GPU machine, where KIT is what the parts hold: cat part_* | tar xJ -C KIT. Makes it
# importable, also in the server's Python models, writes the weights and says what to run.
set -euo pipefail
kit=$(cd "$1" && pwd)
site=$(python3 -c 'import site; print(site.getsitepackages()[0])')
ln -sfn export "$kit/project/panotriton_export"
ln -sfn model_repository "$kit/project/panotriton_models"
ln -sfn ../graphs/repository "$kit/project/repository"
# The server's stub needs numpy < 2, which packages there that were built for numpy 2 cannot use: hide them from
# transformers. PYTHONPATH does not reach the stub; a .pth file does.
cat >"$kit/first/kit_hides.py" <<'PYTHON'
import importlib.util

_find = importlib.util.find_spec
_HIDDEN = {"sklearn", "scipy", "pandas", "librosa"}


def _hiding(name, package=None):
    return None if name.split(".")[0] in _HIDDEN else _find(name, package)


importlib.util.find_spec = _hiding
PYTHON
echo "import sys; sys.path[:0] = ['$kit/first', '$kit/site', '$kit/project/client', '$kit/project']; import kit_hides" \
    >"$site/aa_panotriton_kit.pth"
for folder in repository plain; do python3 "$kit/project/tests/gpu/fill.py" "$kit/graphs/$folder"; done
libraries=$(python3 -c "import glob; print(':'.join(sorted(glob.glob('$site/nvidia/*/lib'))))")
echo "export LD_LIBRARY_PATH=$libraries\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}" >"$kit/env.sh"
echo "ready: . $kit/env.sh && python3 $kit/project/tests/bench/gpu.py --repository $kit/graphs/repository" \
    "--plain $kit/graphs/plain --json gpu.json"
