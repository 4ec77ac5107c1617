#!/bin/sh
# Check what a container commonly lacks, then become the supervisor of tritonserver, hardened. Arguments are
# added to the server's own. Settings, by environment (README.md explains them):
#   PANOTRITON_REPOSITORY         folder or s3://, gs://, as:// address             /models
#   PANOTRITON_LOAD_MODELS        names, space-separated; * is all                  *
#   PANOTRITON_PLACE              NAME[,NAME]=HOST:PORT[,…] …: networks that other servers have; all else is
#                                 loaded here                                       unset
#   PANOTRITON_HOST               address to listen on                              0.0.0.0
#   PANOTRITON_HTTP_PORT, …_GRPC_PORT, …_METRICS_PORT                               8000, 8001, 8002
#   PANOTRITON_HEALTH_PORT        /ready, /live and /metrics of the supervisor     8003
#   PANOTRITON_MAX_REQUEST_BYTES  of one HTTP request                               1 GiB
#   PANOTRITON_EXIT_TIMEOUT_S     what requests in flight get after SIGTERM         300
#   PANOTRITON_SHM_MIN_BYTES      start only with a /dev/shm of this size           2 GiB
#   PANOTRITON_CLIENT_SHM         true where all callers share this host's memory   false
#   PANOTRITON_ADMIN_KEY_FILE     holds the key to the restricted APIs; unset: nobody has one
#   PANOTRITON_GPU                true: the start fails where no network would use one; auto: it warns
#                                 where there is one; false                         auto
#   PANOTRITON_MAX_INFLIGHT       groups between two steps of panorama, where the server knows
#                                 max_inflight_requests; 0: no limit                0
#   PANOTRITON_TLS_FOLDER         holds tls.crt and tls.key: gRPC speaks TLS, HTTP on loopback only
#   PANOTRITON_TLS_MUTUAL         true: callers need certificates that ca.crt there signed     false
#   PANOTRITON_LOG_VERBOSE        Triton's level                                    0
#   PANOTRITON_OTLP_URL           traces go to this collector, e.g. http://otel:4318/v1/traces; unset: none
#   PANOTRITON_TRACE_RATE         one request in this many is traced                100
set -eu

server=${TRITONSERVER:-/opt/tritonserver/bin/tritonserver}
backends=${TRITON_BACKENDS:-$(dirname "$(dirname "$server")")/backends}
repository=${PANOTRITON_REPOSITORY:-/models}
place=${PANOTRITON_PLACE:-}
host=${PANOTRITON_HOST:-0.0.0.0}
http_port=${PANOTRITON_HTTP_PORT:-8000}
grpc_port=${PANOTRITON_GRPC_PORT:-8001}
metrics_port=${PANOTRITON_METRICS_PORT:-8002}
health_port=${PANOTRITON_HEALTH_PORT:-8003}
max_request_bytes=${PANOTRITON_MAX_REQUEST_BYTES:-1073741824}
exit_timeout_s=${PANOTRITON_EXIT_TIMEOUT_S:-300}
shm_min_bytes=${PANOTRITON_SHM_MIN_BYTES:-2147483648}
client_shm=${PANOTRITON_CLIENT_SHM:-false}
gpu_wanted=${PANOTRITON_GPU:-auto}
max_inflight=${PANOTRITON_MAX_INFLIGHT:-0}
tls_folder=${PANOTRITON_TLS_FOLDER:-}
tls_mutual=${PANOTRITON_TLS_MUTUAL:-false}
log_verbose=${PANOTRITON_LOG_VERBOSE:-0}
trace_rate=${PANOTRITON_TRACE_RATE:-100}

fail() {
    printf 'entrypoint: %s\n' "$*" >&2
    exit 2
}

check_number() { # NAME VALUE
    case $2 in
    '' | *[!0-9]*) fail "$1 is '$2'; expected a whole number" ;;
    esac
}

check_choice() { # NAME VALUE [MORE]
    case $2 in
    true | false) ;;
    *) fail "$1 is '$2'; expected true or false${3:-}" ;;
    esac
}

check_settings() {
    check_number PANOTRITON_HTTP_PORT "$http_port"
    check_number PANOTRITON_GRPC_PORT "$grpc_port"
    check_number PANOTRITON_METRICS_PORT "$metrics_port"
    check_number PANOTRITON_HEALTH_PORT "$health_port"
    check_number PANOTRITON_MAX_REQUEST_BYTES "$max_request_bytes"
    check_number PANOTRITON_EXIT_TIMEOUT_S "$exit_timeout_s"
    check_number PANOTRITON_SHM_MIN_BYTES "$shm_min_bytes"
    check_number PANOTRITON_LOG_VERBOSE "$log_verbose"
    check_number PANOTRITON_TRACE_RATE "$trace_rate"
    check_number PANOTRITON_MAX_INFLIGHT "$max_inflight"
    check_choice PANOTRITON_CLIENT_SHM "$client_shm"
    check_choice PANOTRITON_TLS_MUTUAL "$tls_mutual"
    [ "$gpu_wanted" = auto ] || check_choice PANOTRITON_GPU "$gpu_wanted" " or auto"
    [ -x "$server" ] || fail "$server is not an executable; set TRITONSERVER to a tritonserver"
}

check_repository() {
    case $repository in
    *://*) return ;; # an object store: the server says what it finds there
    esac
    for config in "$repository"/*/config.pbtxt; do
        [ -f "$config" ] && return
    done
    fail "no model in $repository: expected NAME/config.pbtxt there;" \
        "mount a repository that 'panotriton export' built, or set PANOTRITON_REPOSITORY"
}

check_shm() {
    bytes=$(($(df -Pk /dev/shm | awk 'NR == 2 { print $2 }') * 1024))
    [ "$bytes" -ge "$shm_min_bytes" ] || fail "/dev/shm has $bytes bytes, expected $shm_min_bytes:" \
        "tensors pass between models there; docker run --shm-size=2g, in Kubernetes an emptyDir" \
        "with medium Memory (or lower PANOTRITON_SHM_MIN_BYTES for small panoramas)"
}

check_numpy() {
    python3 -c 'import numpy, sys; sys.exit(int(numpy.__version__.split(".")[0]) >= 2)' ||
        fail "numpy is 2 or later, or missing: the outputs of Python models would be empty;" \
            "python3 -m pip install 'numpy<2'"
}

check_gpu_used() {
    case $repository in
    *://*) return ;; # not to be read here
    esac
    [ "$gpu_wanted" != false ] || return 0
    [ "$gpu_wanted" = true ] || [ "$gpu" = true ] || return 0
    networks=$(grep -l -E 'backend: "(onnxruntime|tensorrt)"' "$repository"/*/config.pbtxt || true)
    [ -n "$networks" ] || return 0
    # Their names are folders of ours, without spaces:
    # shellcheck disable=SC2086
    if grep -q 'KIND_GPU' $networks; then return; fi
    says="every network in $repository is KIND_CPU and leaves the GPU idle: panotriton export --preset small"
    says="$says --provider cuda --output FOLDER, or export osediff --provider cuda with weights of your own"
    [ "$gpu_wanted" = auto ] || fail "$says (or PANOTRITON_GPU=false)"
    printf 'entrypoint: warning: %s\n' "$says" >&2
}

check_tls() {
    [ -n "$tls_folder" ] || return 0
    names='tls.crt tls.key'
    [ "$tls_mutual" = false ] || names="$names ca.crt"
    for name in $names; do
        [ -s "$tls_folder/$name" ] || fail "$tls_folder/$name is missing or empty; PANOTRITON_TLS_FOLDER expects $names"
    done
}

knows_max_inflight() { # older releases refuse the field; its name is in the library that reads configs
    grep -q -s max_inflight_requests "$server" "$(dirname "$(dirname "$server")")"/lib/libtritonserver*
}

bounded() { # FOLDER: the repository with a limit in the config of panorama
    rm -rf "$1" # /tmp outlives a container that is started again in its pod
    mkdir -p "$1/panorama"
    from=$(cd "$repository" && pwd)
    for model in "$from"/*/; do
        name=$(basename "$model")
        [ "$name" = panorama ] || ln -s "${model%/}" "$1/$name"
    done
    ln -s "$from/panorama/1" "$1/panorama/1"
    sed "s/^ensemble_scheduling {/&\n  max_inflight_requests: $max_inflight/" "$from/panorama/config.pbtxt" \
        >"$1/panorama/config.pbtxt"
}

admin_key() {
    if [ -n "${PANOTRITON_ADMIN_KEY_FILE:-}" ]; then
        [ -s "$PANOTRITON_ADMIN_KEY_FILE" ] ||
            fail "PANOTRITON_ADMIN_KEY_FILE names $PANOTRITON_ADMIN_KEY_FILE, which is missing or empty"
        secret=$(tr -d '\n' <"$PANOTRITON_ADMIN_KEY_FILE")
        case $secret in
        *[!A-Za-z0-9._-]*) fail "the key in $PANOTRITON_ADMIN_KEY_FILE has other characters than A-Z a-z 0-9 . _ -" ;;
        esac
        printf %s "$secret"
    else
        od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
    fi
}

check_settings
check_repository
check_shm
check_numpy
gpu=false
[ ! -e /dev/nvidiactl ] || gpu=true
check_gpu_used
check_tls
if [ "$max_inflight" -gt 0 ] && [ -f "$repository/panorama/config.pbtxt" ]; then
    if knows_max_inflight; then
        bounded "${TMPDIR:-/tmp}/panotriton-repository"
        repository=${TMPDIR:-/tmp}/panotriton-repository
    else
        printf 'entrypoint: warning: this server knows no max_inflight_requests; PANOTRITON_MAX_INFLIGHT is not used\n' >&2
    fi
fi
key=$(admin_key) # on a line of its own, so that its failure ends the script

restricted='model-repository,trace,logging'
[ "$client_shm" = true ] || restricted=$restricted,shared-memory

help=$("$server" --help 2>&1 || true)
takes() { # FLAG: releases differ
    printf '%s\n' "$help" | grep -q -e "--$1\$" -e "--$1 "
}

# Added in front of the caller's arguments, whose word is the last.
if takes http-max-input-size; then # 25.07 and later, where it is 64 MB by default
    set -- --http-max-input-size="$max_request_bytes" "$@"
fi
if takes allow-client-shm; then # 26.05 and later
    set -- --allow-client-shm="$client_shm" "$@"
fi
if takes grpc-max-response-pool-size; then # newer releases; a response may have 550 MB
    set -- --grpc-max-response-pool-size=4 "$@"
fi
set -- --grpc-infer-allocation-pool-size=4 "$@" # requests kept allocated for the next ones
http_host=$host
if [ -n "$tls_folder" ]; then
    http_host=127.0.0.1 # the server's HTTP has no TLS; the supervisor asks it
    set -- --grpc-use-ssl=true --grpc-server-cert="$tls_folder/tls.crt" --grpc-server-key="$tls_folder/tls.key" "$@"
    if [ "$tls_mutual" = true ]; then
        set -- --grpc-use-ssl-mutual=true --grpc-root-cert="$tls_folder/ca.crt" "$@"
    fi
fi
if [ -n "${PANOTRITON_OTLP_URL:-}" ]; then
    set -- --trace-config=mode=opentelemetry --trace-config=level=TIMESTAMPS \
        --trace-config=rate="$trace_rate" --trace-config=opentelemetry,url="$PANOTRITON_OTLP_URL" \
        --trace-config=opentelemetry,resource=service.name=panotriton "$@"
fi
set -f # no file is called *
for model in ${PANOTRITON_LOAD_MODELS:-*}; do
    set -- --load-model="$model" "$@"
done

export PANOTRITON_HOST="$host" PANOTRITON_HTTP_HOST="$http_host" PANOTRITON_HTTP_PORT="$http_port" \
    PANOTRITON_HEALTH_PORT="$health_port" PANOTRITON_EXIT_TIMEOUT_S="$exit_timeout_s" PANOTRITON_ADMIN_KEY="$key" \
    PANOTRITON_PLACE="$place"

# exec: the supervisor gets the container's signals and its exit code is the container's.
exec python3 -m panotriton.server.contained "$server" \
    --model-repository="$repository" --model-control-mode=explicit --exit-on-error=true \
    --strict-readiness=true --disable-auto-complete-config \
    --exit-timeout-secs="$exit_timeout_s" --backend-directory="$backends" \
    --http-address="$http_host" --http-port="$http_port" \
    --grpc-address="$host" --grpc-port="$grpc_port" \
    --metrics-address="$host" --metrics-port="$metrics_port" \
    --allow-gpu-metrics="$gpu" --metrics-config=summary_latencies=true \
    --http-restricted-api="$restricted:panotriton-admin=$key" \
    --grpc-restricted-protocol="$restricted:panotriton-admin=$key" \
    --allow-sagemaker=false --allow-vertex-ai=false \
    --log-format=ISO8601 --log-verbose="$log_verbose" \
    --backend-config=python,shm-region-prefix-name=triton_python_backend_shm_region_ \
    --backend-config=python,shm-default-byte-size=16777216 \
    --backend-config=python,shm-growth-byte-size=67108864 \
    --backend-config=python,stub-timeout-seconds=300 \
    "$@"
