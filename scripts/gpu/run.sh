#!/usr/bin/env bash
# What is to be known of conserve_sgl on one GPU, in parts of at most ten minutes each:
#
#     scripts/gpu/run.sh [--rehearse] [PART ...]        # every part, in this order, when none is named
#
#     check     versions, the doctor, one server with one answer of each class
#     cost      resuming against recomputing, sliced against plain prefills, arrival to yield
#     bench     online-only, stock-priority and conserve on Llama-3.1-8B
#     ceiling   offline-only, conserve at 1.25x, conserve without checkpoints
#     alone     conserve without offline work, to be set against online-only
#     overlap   a trace: copies and slices beside the steps of the model
#     qwen      the part `bench` on Qwen2.5-7B
#     tests     the engine tests that a GPU changes: preemption, slices, co-serving, random traffic
#
# Results go to $OUT (out/gpu): logs, Markdown tables, JSON and pictures. A part that fails or runs
# out of time leaves what it has, and the next one runs; finished systems of a benchmark are kept,
# so a part that is called again goes on. The exit status is the number of parts that failed.
#
# python3 must import sglang and conserve_sgl (on a machine without a network: install.sh beside
# this file). CONSERVE_BENCH_DATA names the folder of azure_llm_2023_conv.csv, CONSERVE_GPU_FLAGS
# flags for every server. --rehearse runs the same parts on a CPU with a tiny model, for seconds:
# it shows that the commands work and measures nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."

readonly PARTS=(check cost bench ceiling alone overlap qwen tests)
readonly LIMIT_S=570 GRACE_S=20
python=${PYTHON:-python3}
rehearse=

[ "${1:-}" = --rehearse ] && { rehearse=1; shift; }
if [ "${1:-}" = --list ]; then printf '%s\n' "${PARTS[@]}"; exit; fi
for part in "$@"; do
    case " ${PARTS[*]} " in
    *" $part "*) ;;
    *) echo "$0: no part is called $part; there are: ${PARTS[*]}" >&2; exit 64 ;;
    esac
done
[ $# -gt 0 ] || set -- "${PARTS[@]}"

out=${OUT:-out/gpu}
mkdir -p "$out"
read -ra flags <<<"${CONSERVE_GPU_FLAGS:-}"
flags+=(--load-format=dummy --skip-tokenizer-init)
duration=60 llama=llama-3.1-8b qwen=qwen2.5-7b contexts=(1024 4096 8192) lengths=(512 2048 8192)
activities=(GPU)
if [ -n "$rehearse" ]; then
    duration=5 llama=tiny qwen=tiny contexts=(256 1024) lengths=(256 1024) activities=(CPU)
    flags+=(--max-total-tokens=32768)
    export CUDA_VISIBLE_DEVICES= SGLANG_PLATFORM=conserve_cpu
fi

model() { # model NAME: the folder of its geometry
    "$python" scripts/dummy_model.py "$1" ".cache/models/$1-dummy" >&2
    echo ".cache/models/$1-dummy"
}

bench() { # bench FILE MODEL SYSTEMS: one folder for all systems of a file
    "$python" -m conserve_sgl.cli bench "configs/bench/$1.yaml" --model "$(model "$2")" \
        --systems "$3" --duration "$duration" --out "$out/$1" -- "${flags[@]}"
}

check() {
    nvidia-smi || [ -n "$rehearse" ] || return
    "$python" -m conserve_sgl.cli --version
    local at; at=$(model "$llama")
    "$python" -m conserve_sgl.cli doctor -- --model-path "$at" "${flags[@]}" || return
    "$python" -m conserve_sgl.bench.first_light --model "$at" -- "${flags[@]}"
}

cost() {
    local at failed=0; at=$(model "$llama")
    "$python" -m conserve_sgl.bench.resume --model "$at" --contexts "${contexts[@]}" \
        -- "${flags[@]}" >"$out/resume.md" || failed=1
    "$python" -m conserve_sgl.bench.slice_cost --model "$at" --lengths "${lengths[@]}" \
        -- "${flags[@]}" >"$out/slice_cost.md" || failed=1
    cat "$out/resume.md" "$out/slice_cost.md"
    return $failed
}

overlap() {
    "$python" -m conserve_sgl.bench.overlap --model "$(model "$llama")" --out "$out/trace" \
        --activities "${activities[@]}" -- "${flags[@]}" | tee "$out/overlap.md"
}

tests() {
    "$python" -m pytest -m engine -q -p no:cacheprovider --timeout 300 --durations 10 \
        tests/engine/test_checkpoint.py tests/engine/test_slices.py tests/engine/test_coserving.py \
        tests/engine/test_random_traffic.py
}

run() { # run PART
    case $1 in
    bench) bench h100-llama8b "$llama" online-only,stock-priority,conserve ;;
    ceiling) bench h100-llama8b "$llama" offline-only,conserve-tight,conserve-no-checkpoint ;;
    alone) bench h100-llama8b "$llama" conserve-online-only ;;
    qwen) bench h100-qwen7b "$qwen" online-only,stock-priority,conserve ;;
    *) "$1" ;;
    esac
}

# Each part is a session of its own, so that one that is out of time ends with all it started.
if [ -n "${CONSERVE_GPU_PART:-}" ]; then
    run "$1"
    exit
fi
failed=0
for part in "$@"; do
    echo "== $part"
    since=$SECONDS
    CONSERVE_GPU_PART=1 timeout --signal INT --kill-after "$GRACE_S" "$LIMIT_S" \
        bash scripts/gpu/run.sh ${rehearse:+--rehearse} "$part" 2>&1 | tee "$out/$part.log"
    status=${PIPESTATUS[0]}
    echo "== $part: status $status after $((SECONDS - since)) s"
    [ "$status" -eq 0 ] || failed=$((failed + 1))
done
exit "$failed"
