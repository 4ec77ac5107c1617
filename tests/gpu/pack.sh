#!/usr/bin/env bash
# pack.sh OUTPUT [VENV]: the kit for a GPU machine that reaches no registry, OUTPUT/part_* of at most 56 MiB. See
# README.md. Run in the project's root, where a registry is.
#   TINY=1           graphs of a few layers, to try the packing
#   ARCHITECTURE=90  of the GPU: 90 is Hopper's
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: tests/gpu/pack.sh OUTPUT [VENV]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"; out=$(cd "$1" && pwd) venv=${2:-$root/.venv}
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python=$venv/bin/python
version() { "$python" -c "from importlib import metadata; print(metadata.version('$1'))"; }

# What that machine's image has already is left out: torch, transformers, OpenCV.
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
    --platform manylinux_2_27_x86_64 --platform any)
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$work/wheels" onnxruntime-gpu==1.31.1 \
    $(for name in numpy tritonclient diffusers grpcio protobuf onnx onnx-ir onnxscript ml-dtypes psutil \
        requests urllib3 idna certifi charset-normalizer importlib-metadata zipp qwen-vl-utils \
        pytest pluggy iniconfig peft cuda-bindings cuda-pathfinder rich python-rapidjson tokenizers; do echo "$name==$(version "$name")"; done)
mkdir -p "$work/kit/site" "$work/kit/first"
for wheel in "$work"/wheels/*.whl; do
    case $wheel in */numpy-*) to=first ;; *) to=site ;; esac # before the machine's own
    "$python" -m zipfile -e "$wheel" "$work/kit/$to"
done
"$python" "$here/slim.py" "$work/kit/site/onnxruntime/capi/libonnxruntime_providers_cuda.so" "${ARCHITECTURE:-90}"
rm -f "$work/kit/site/onnxruntime/capi/libonnxruntime_providers_tensorrt.so"
site=$("$python" -c 'import pytriton, pathlib; print(pathlib.Path(pytriton.__file__).parents[1])')
cp -r "$site"/pytriton "$site"/nvidia_pytriton* "$work/kit/site/"
rm -rf "$work"/kit/site/nvidia_pytriton.libs/libpython3-* \
    "$work"/kit/site/pytriton/tritonserver/python_backend_stubs/3.{8,9,10,11,13}

mkdir "$work/kit/project"
git -C "$root" archive HEAD | tar x -C "$work/kit/project" --exclude docs/images --exclude docker --exclude tests/data/golden
git -C "$root" rev-parse --short HEAD >"$work/kit/project/COMMIT"
"$python" "$here/graphs.py" "$work/kit/graphs" ${TINY:+--tiny}
cp "$here/setup.sh" "$work/kit/"
find "$work/kit" -name __pycache__ -prune -exec rm -rf {} +
tar c -C "$work/kit" . | xz -T0 -3 | split -b 56M - "$out/part_"
ls -l "$out"
