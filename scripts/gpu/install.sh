#!/usr/bin/env bash
# On a GPU machine without a network: unpack what pack.sh packed.
#
#     scripts/gpu/install.sh FOLDER [SITE]      # SITE: /opt/conserve
#     source SITE/env.sh && scripts/gpu/run.sh
set -euo pipefail
from=$(realpath "${1:?usage: $0 FOLDER [SITE]}") site=${2:-/opt/conserve}
python=${PYTHON:-python3}

mkdir -p "$site"
tar -xf "$from/piece-00.tar" -C "$site" install.sh
bash "$site/install.sh" "$from" "$site/sglang" # with the kernels of FOLDER/cache*.tar*
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target "$site/ours" "$from"/ours/*.whl
cache=$site/sglang/cache
cat >"$site/env.sh" <<ENV
source "$site/sglang/env.sh"
export PYTHONPATH="$site/ours\${PYTHONPATH:+:\$PYTHONPATH}"
export TRITON_CACHE_DIR="$cache/triton" CONSERVE_KERNEL_CACHE="$cache"
export CONSERVE_BENCH_DATA="$from/data"
export CONSERVE_COMMIT="$(cat "$from/commit" 2>/dev/null || true)"
export CONSERVE_GPU_FLAGS="--sampling-backend=pytorch"
ENV
flashinfer=$site/sglang/lib-flashinfer
[ ! -d "$flashinfer" ] || echo "export CONSERVE_FLASHINFER=\"$flashinfer\"" >>"$site/env.sh"
echo "source $site/env.sh"
