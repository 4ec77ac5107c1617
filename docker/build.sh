#!/bin/sh
# Build, push and sign one image, its bases pinned to what their tags mean at this moment:
#   docker/build.sh REPOSITORY TAG TARGET        e.g. registry.example/panotriton 0.1.0 baked
# Needs docker buildx, a registry to push to, and cosign. The SBOM and the provenance, which names the digests of the
# bases, are attached to the image:
#   docker buildx imagetools inspect REPOSITORY:TAG --format '{{ json .SBOM }}'
#   cosign verify REPOSITORY@DIGEST --certificate-identity … --certificate-oidc-issuer …
set -eu
[ $# -eq 3 ] || { echo "build.sh: expected REPOSITORY TAG TARGET, got: $*" >&2; exit 2; }
repository=$1 tag=$2 target=$3
root=$(cd "$(dirname "$0")/.." && pwd)

argument() { # NAME: the default of an ARG in the Dockerfile
    sed -n "s/^ARG $1=//p" "$root/docker/Dockerfile" | head -n 1
}

digest() { # IMAGE
    docker buildx imagetools inspect "$1" --format '{{ .Manifest.Digest }}'
}

python=$(argument PYTHON_IMAGE)
triton=nvcr.io/nvidia/tritonserver:$(argument TRITON_RELEASE)-py3
python=$python@$(digest "$python")
triton=$triton@$(digest "$triton")
echo "build.sh: $target on $python and $triton"

docker buildx build --file "$root/docker/Dockerfile" --target "$target" --tag "$repository:$tag" \
    --build-arg PYTHON_IMAGE="$python" --build-arg TRITON_IMAGE="$triton" \
    --sbom=true --provenance=mode=max --push "$root"
built=$repository@$(digest "$repository:$tag")
cosign sign --yes "$built"
echo "build.sh: $built"
