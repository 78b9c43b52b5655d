#!/usr/bin/env bash
# The whole product on a machine without a GPU: sets everything up, makes the demo's model, starts
# a server, replays a bursty online stream alone and then beside an offline eval job, prints the
# table, writes out/demo/demo.png, and stops what it started. About 5 minutes after the set-up, on a
# machine with nothing else to do. Arguments go to python -m conserve_sgl.bench.demo: --port N, --help.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PYTHONDONTWRITEBYTECODE=  # without bytecode a server takes twice as long to start
.venv/bin/python scripts/demo_model.py
exec .venv/bin/python -m conserve_sgl.bench.demo \
    --model .cache/models/SmolLM2-135M-Instruct --config configs/bench/demo.yaml --out out/demo "$@"
