#!/usr/bin/env bash
# Everything that needs a CUDA device, in less than ten minutes and without a network: versions, the quickest checks, the
# tests marked gpu, the benchmarks of the loss and of a training step, the profiler and the memory checkers where they are.
#   bash scripts/gpu_check.sh [RESULTS]    results (default: outputs/gpu_check): logs, tables, JSON, a line per stage
# A stage that fails stops no other; the script fails in the end. PYTHON chooses the interpreter; it needs torch with CUDA,
# cuda-core 1.2 or newer, pytest and hypothesis. On a machine without CUDA everything runs small on the CPU, to see that it
# runs; gpu tests are skipped then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-outputs/gpu_check}
if [ -z "${PYTHON:-}" ]; then PYTHON=python3; [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python; fi
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # for the deterministic rows
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$results"
failed=0
: > "$results/summary.txt"

stage() {  # stage NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$results/$name.log" 2>&1
    local code=$?
    [ $code -eq 0 ] || failed=1
    echo "$name: exit code $code, $((SECONDS - start)) s" | tee -a "$results/summary.txt"
    [ $code -eq 0 ] || tail -n 25 "$results/$name.log"
}
show() { grep "$1" "$results/$2.log" || true; }

stage versions 40 "$PYTHON" -c 'import platform, subprocess, sys, torch
from importlib.metadata import PackageNotFoundError, version
def found(name):
    try: return version(name)
    except PackageNotFoundError: return "not installed"
def said(*command):
    try: return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError: return "unknown"
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print(*(f"{name} {found(name)}" for name in ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")), "(cuda-core 1.2 or newer is needed)")
print("commit", said("git", "describe", "--always", "--dirty"))
print("gpu", said("nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"))'
cat "$results/versions.log"
cuda=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))' 2> /dev/null || echo 0)
if [ "$cuda" = 1 ]; then loss=(); step=(--device cuda --batch 16); else loss=(--shrink 4 --repeats 1); step=(--size 64 128 --rounds 1); fi

stage build 40 "$PYTHON" -c 'import sys, torch
from bisenet import kernel
reason = kernel.why_not()
print(reason or "the kernel is built")
sys.exit(bool(reason) and torch.cuda.is_available())'
cat "$results/build.log"
stage example 40 "$PYTHON" -c 'import logging, torch
from bisenet.losses import OhemCrossEntropy
logging.basicConfig(level=logging.INFO, format="%(message)s")
device = "cuda" if torch.cuda.is_available() else "cpu"
target = torch.randint(19, (2, 64, 128), device=device).to(torch.uint8)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    logits = torch.randn(2, 19, 8, 16, device=device, dtype=dtype, requires_grad=True)
    results = {}
    for impl in ["torch"] + ["cuda"] * (device == "cuda"):
        loss, kept = OhemCrossEntropy(impl=impl)(logits, target)
        results[impl] = loss.item(), kept.item(), torch.autograd.grad(loss, logits)[0].float().norm().item()
    print(dtype, results)'
cat "$results/example.log"
stage tests 150 "$PYTHON" -m pytest tests/test_kernel.py -m gpu -q -p no:cacheprovider
tail -n 3 "$results/tests.log"
stage loss 150 "$PYTHON" kernels/ohem/bench.py --output "$results" "${loss[@]}"
show '^|' loss
stage step 110 env -C "$results" "$PYTHON" "$PWD/scripts/bench_step.py" --models bisenetv2 "${step[@]}"  # REFERENCE_ROOT compares
show '│' step
if [ "$cuda" = 1 ] && command -v ncu > /dev/null; then
    for head in 0 1; do  # of V2: strides 8 and 2
        stage "ncu$head" 40 ncu --set basic --kernel-name regex:ohem --launch-count 5 "$PYTHON" -c "import sys, torch
sys.path.insert(0, 'kernels/ohem'); import bench
logits, target = bench.make_inputs(16, (512, 1024), (8, 2)[$head], 1.0, torch.float16, torch.device('cuda'))
bench.ours('cuda')(logits.requires_grad_(), target).backward()"
        show 'ohem_\|Duration\|Throughput\|Registers' "ncu$head"
    done
else
    echo "ncu: not run" | tee -a "$results/summary.txt"
fi
if [ "$cuda" = 1 ] && command -v compute-sanitizer > /dev/null; then
    # A few small cases, since hypothesis would take minutes under the checkers, and our kernels only. Without PyTorch's
    # cache every tensor is an allocation of its own, so that memcheck sees an access beyond its end.
    for tool in memcheck racecheck; do
        stage "$tool" 55 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --kernel-regex kns=ohem "$PYTHON" -m pytest tests/test_kernel.py \
            -q -p no:cacheprovider -k "gpu and (sizes_at or ties_at or layout)"
        tail -n 3 "$results/$tool.log"
    done
else
    echo "compute-sanitizer: not run" | tee -a "$results/summary.txt"
fi
cat "$results/summary.txt"
exit $failed
