#!/usr/bin/env bash
# Makes the checkout's own virtual environment (.venv) from the lock. Idempotent; seconds when
# nothing changed. Needs git, bash, Python >= 3.11 and a package index; no root, no global change.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "setup: $*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python found: install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version) is too old: install Python 3.11 or newer, or set PYTHON"

stamp=.venv/.installed
wanted=$(cat requirements.lock pyproject.toml scripts/setup.sh | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

uv=$(command -v uv || true)
if [ -z "$uv" ]; then
    uv=.tools/bin/uv
    if [ ! -x "$uv" ]; then
        echo "setup: installing uv into .tools" >&2
        "$python" -m venv .tools || fail "python's venv module does not work: install it (Debian: python3-venv)"
        .tools/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 \
            || fail "uv could not be installed: is the package index reachable from here?"
    fi
fi

free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
[ -d .venv ] || [ "$free_gib" -ge 15 ] || fail "SGLang with its torch needs about 12 GiB of disk; $free_gib GiB are free here"

echo "setup: installing the locked environment into .venv (12 GB the first time)" >&2
[ -d .venv ] || "$uv" venv --quiet --python "$python" .venv
# With bytecode, as pip leaves it: to compile SGLang at each start takes its processes half a minute.
"$uv" pip sync --quiet --compile-bytecode --python .venv/bin/python requirements.lock \
    || fail "the locked packages could not be installed: is the package index reachable, and is this Linux on x86-64?"
"$uv" pip install --quiet --python .venv/bin/python --no-deps --editable . \
    || fail "the checkout itself could not be installed"
echo "$wanted" > "$stamp"
