#!/usr/bin/env bash
# Everything that a GPU machine without a network needs, in one folder to carry there:
#
#     scripts/gpu/pack.sh KIT TRACE OUT
#
# KIT is a folder whose pack.py writes SGLang in pieces and whose install.sh unpacks them, with the
# kernels that an earlier machine compiled (cache*.tar.xz) beside it, TRACE azure_llm_2023_conv.csv,
# OUT the folder. There, in a checkout: scripts/gpu/install.sh OUT. Wheels are downloaded once, to
# .cache/gpu-wheels (1 GB), by the pip of python3. Needs scripts/setup.sh and a network.
set -euo pipefail
kit=$(realpath "${1:?usage: $0 KIT TRACE OUT}") trace=$(realpath "${2:?}") out=$(realpath -m "${3:?}")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=.cache/gpu-wheels

mkdir -p "$wheels" "$out/ours" "$out/data"
"$python" "$kit/pack.py" --out "$out" --wheels "$wheels" --no-flashinfer
rm -f "$out"/ours/*
.venv/bin/python -m build --wheel --no-isolation --outdir "$out/ours" .
# What conserve_sgl and its tests need, and neither the kit nor a PyTorch image brings.
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --dest "$out/ours" aiosqlite pytest-asyncio
cp "$trace" "$out/data/azure_llm_2023_conv.csv"
for kernels in "$kit"/cache*.tar.xz; do
    [ ! -e "$kernels" ] || cp -f "$kernels" "$out"
done
# A checkout is carried without its history.
git describe --always --dirty=+ --abbrev=12 --exclude '*' >"$out/commit"
du -sh "$out"
