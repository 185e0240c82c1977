#!/usr/bin/env bash
# Set up, then lint, formatting, layers, types and every test that is not slow. Extra arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export OMP_NUM_THREADS=1  # one thread for each of the two test processes

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports
.venv/bin/pyright
.venv/bin/pytest -n 2 -m "not slow" "$@"
