#!/usr/bin/env bash
# Make .venv with the package and its pinned dependencies; nothing is done when it is up to date.
# PYTHON chooses the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed
wanted="$PWD $(cat pyproject.toml constraints.txt | sha256sum)"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 1
}
echo "Installing into .venv (a few minutes the first time)"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
echo "$wanted" > "$stamp"
