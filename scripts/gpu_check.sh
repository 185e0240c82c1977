#!/usr/bin/env bash
# Everything that needs a CUDA device, in less than ten minutes and without a network: the tests marked gpu, the memory
# checkers where there are any, the benchmark of the loss and that of a whole training step.
#   bash scripts/gpu_check.sh [RESULTS]    results (default: outputs/gpu_check): logs, tables, JSON, a line per stage
# PYTHON chooses the interpreter; it needs torch with CUDA, cuda-core 1.2 or newer, pytest and hypothesis.
# On a machine without CUDA everything runs small on the CPU, to see that it runs; gpu tests are skipped then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-outputs/gpu_check}
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python; fi
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # for the deterministic rows
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$results"
failed=0

stage() {  # stage NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$results/$name.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || failed=1
    echo "$name: exit code $code, $((SECONDS - start)) s" | tee -a "$results/summary.txt"
    [ $code -eq 0 ] || tail -n 25 "$results/$name.log"
}

: > "$results/summary.txt"
cuda=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$cuda" = 1 ]; then loss=(); step=(); else loss=(--shrink 4 --repeats 1); step=(--shrink 16 --repeats 1); fi

stage build 50 "$PYTHON" -c 'import sys, torch; from bisenet import kernel
from importlib.metadata import PackageNotFoundError, version
try: found = version("cuda-core")
except PackageNotFoundError: found = "not installed"
print(sys.version, "torch", torch.__version__, "CUDA", torch.version.cuda)
print("cuda-core:", found, "(1.2 or newer is needed)")
reason = kernel.why_not()
print(reason or "the kernel is built")
sys.exit(bool(reason) and torch.cuda.is_available())'
cat "$results/build.log"
stage tests 125 "$PYTHON" -m pytest tests/test_kernel.py -m gpu -q -p no:cacheprovider
tail -n 3 "$results/tests.log"
stage loss 155 "$PYTHON" kernels/ohem/bench.py --output "$results" "${loss[@]}"
grep '^|' "$results/loss.log"
stage step 130 "$PYTHON" kernels/ohem/bench_step.py --output "$results" "${step[@]}"
grep '^|' "$results/step.log"
if [ "$cuda" = 1 ] && command -v compute-sanitizer > /dev/null; then
    # A few small cases, since hypothesis would take minutes under the checkers, and our kernels only. Without PyTorch's
    # cache every tensor is an allocation of its own, so that memcheck sees an access beyond its end.
    for tool in memcheck racecheck; do
        stage "$tool" 65 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --kernel-regex kns=ohem "$PYTHON" -m pytest tests/test_kernel.py \
            -q -p no:cacheprovider -k "gpu and (sizes_at or ties_at or layout)"
        tail -n 3 "$results/$tool.log"
    done
else
    echo "compute-sanitizer: not run" | tee -a "$results/summary.txt"
fi
cat "$results/summary.txt"
exit $failed
