#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest.
#   scripts/test.sh                                             everything, 50 minutes on 2 cores
#   scripts/test.sh -m "not engine" -n auto --dist worksteal   the fast tier, 2 minutes
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
export PYTHONDONTWRITEBYTECODE=  # without bytecode a server takes twice as long to start
.venv/bin/python scripts/demo_model.py
.venv/bin/python scripts/demo_model.py --dtype float32
[ $# -eq 0 ] || exec .venv/bin/python -m pytest "$@"
# A worker more than there are processors: some tests wait for clocks and for processes.
.venv/bin/python -m pytest -m "not engine" -n "$(($(nproc) + 1))" --dist worksteal
.venv/bin/python -m pytest -m engine  # one engine at a time
