#!/usr/bin/env bash
# Set up, write synthetic street scenes, train BiSeNetV2 on them, evaluate it and say where the pictures are.
# Arguments are Hydra overrides: bash scripts/demo.sh model=bisenetv1_diss trainer.max_steps=500
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/python scripts/train.py experiment=demo "$@"
