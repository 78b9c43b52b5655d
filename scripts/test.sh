#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest.
#   scripts/test.sh                   everything, about 15 minutes on 2 cores
#   scripts/test.sh -m "not engine"   the fast tier, under a minute
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/python scripts/demo_model.py
.venv/bin/python scripts/demo_model.py --dtype float32
exec .venv/bin/python -m pytest "$@"
