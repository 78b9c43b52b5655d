#!/usr/bin/env bash
# What is to be known of conserve_sgl on one GPU, in the order of worth, within a given time:
#
#     scripts/gpu/run.sh [--minutes N] [--from ARCHIVES] [--rehearse] [PART ...]
#
# Every part that is not done and fits is run, or those that are named; --plan says what fits,
# --list what there is, --backend NAME chooses the attention backend where the part `check` did
# not. Results go to out/gpu, and as they come into one archive a folder, each below 16 MiB, to $OUT
# (out/gpu-archives), with summary.md. On a fresh machine --from takes those archives, and what is
# done in them is not done again. The summary ends the output. The exit status is the number of
# parts that failed; one that ran out of time leaves what it has.
#
# python3 must import sglang and what conserve_sgl needs (on a machine without a network: install.sh
# beside this file). CONSERVE_BENCH_DATA names the folder of azure_llm_2023_conv.csv,
# CONSERVE_GPU_FLAGS flags for every server. --rehearse runs the same parts on a CPU with a tiny
# model, for seconds: it shows that the commands work and measures nothing.
set -euo pipefail
[ -z "${OUT:-}" ] || export OUT=$(realpath -m "$OUT")
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m conserve_sgl.bench.gpu "$@"
