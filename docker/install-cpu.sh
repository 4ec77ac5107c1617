#!/bin/sh
# Install the pip-carried tritonserver and lay it out as NVIDIA's image does, so that one entrypoint
# starts both: install-cpu.sh SOURCE EXTRAS ENVIRONMENT SERVER
#   SOURCE       the project's folder          EXTRAS  of its pyproject, comma-separated
#   ENVIRONMENT  virtual environment to make   SERVER  folder to make: bin/ backends/ lib/
set -eu
[ $# -eq 4 ] || { echo "install-cpu.sh: expected SOURCE EXTRAS ENVIRONMENT SERVER, got: $*" >&2; exit 2; }
source=$1 extras=$2 environment=$3 server=$4

python3 -m venv "$environment"
"$environment/bin/python" -m pip install -c "$source/constraints.txt" "${source}[${extras}]"

packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
version=$("$environment/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wheel=$packages/pytriton/tritonserver
stub=$wheel/python_backend_stubs/$version/triton_python_backend_stub
[ -f "$stub" ] || {
    echo "install-cpu.sh: the server has no stub for Python $version, only for:" >&2
    ls "$wheel/python_backend_stubs" >&2
    exit 1
}

# Copies, not links: the server refuses a backend that a link takes out of its folder.
mkdir -p "$server/bin" "$server/backends/python" "$server/backends/onnxruntime"
ln -s "$packages/nvidia_pytriton.libs" "$server/lib"
ln -s "$wheel/bin/tritonserver" "$server/bin/tritonserver"
cp "$wheel/backends/python/libtriton_python.so" "$wheel/backends/python/triton_python_backend_utils.py" \
    "$stub" "$server/backends/python/"
chmod +x "$server/backends/python/triton_python_backend_stub"
cp "$packages/panotriton/server/backends/onnxruntime/model.py" "$server/backends/onnxruntime/"
