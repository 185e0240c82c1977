"""Time and memory of the loss of every head of BiSeNetV1 and V2, in all implementations, side by side.

    python kernels/ohem/bench.py                       # on a GPU at training size, on a CPU at a smaller one
    python kernels/ohem/bench.py --device cpu --load 2 # beside two busy processes

Implementations: ``naive`` is what the reference repository does (upsample, cross entropy, boolean index, topk), given
int64 labels as its data loader makes them, ``compiled`` is torch.compile of that (fp16, V2's main head and its head at
stride 2), ``torch`` and ``cuda`` are those of ``loss.impl``. Regimes: all pixels hard (start of training), 8 %
(trained), 0.2 %, which is fewer than n_min, so that the n_min-th largest must be found. The floor of a head is the
larger of the bytes that must move over the measured bandwidth of a copy, and the exponentials over their rate; labels
are read twice, logits twice, their gradient and the float32 loss map are written and the map is read.

Prints a table and writes it, dated, with hardware and versions, to ``kernels/ohem/results``.
"""

import argparse
import ctypes
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bisenet.losses import OhemCrossEntropy

CLASSES = 19
THRESHOLD = 0.7
IGNORE = 255
NETWORKS = {"bisenetv2": ((16, 512, 1024), (8, 2, 4, 8, 16)), "bisenetv1": ((8, 1024, 1024), (8, 8, 16))}
"""Batch and crop on one GPU, and the strides of the heads, the main one first. In this order, for a time limit."""
CPU_SIZES = {"bisenetv1": (1, 512, 512), "bisenetv2": (2, 256, 512)}
REGIMES = {"all hard": 1.0, "8% hard": 0.08, "0.2% hard": 0.002}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
COMPILED = {("bisenetv2", 0), ("bisenetv2", 1)}

Criterion = Callable[[Tensor], Tensor]


def naive(logits: Tensor, labels: Tensor, limit: Tensor) -> Tensor:
    """The reference's composition: its network upsamples, its loss indexes and sorts.

    Labels are int64 and ``limit``, the loss above which a pixel is hard, is on the device: it converts neither.
    """
    full = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    n_min = labels[labels != IGNORE].numel() // 16
    losses = F.cross_entropy(full.float(), labels, ignore_index=IGNORE, reduction="none").view(-1)
    hard = losses[losses > limit]
    if hard.numel() < n_min:
        hard, _ = losses.topk(n_min)
    return hard.mean()


LIMIT = -torch.log(torch.tensor(THRESHOLD))


def ours(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of this package."""
    criterion = OhemCrossEntropy(threshold=THRESHOLD, impl=impl)
    return lambda logits, target: criterion(logits, target)[0]


def make_inputs(
    images: int, size: tuple[int, int], stride: int, hard: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits and labels, a share ``hard`` of them hard: squares of 32 pixels with a wrong label, right ones elsewhere.

    Pixels between two regions that are hard without being asked to are ignored.
    """
    draw = torch.Generator(device).manual_seed(0)
    head = (size[0] // stride, size[1] // stride)
    noise = torch.randn(images, CLASSES, *head, generator=draw, device=device)
    labels = torch.randint(CLASSES, (images, *size), generator=draw, device=device, dtype=torch.uint8)
    if hard == 1.0:
        return noise.to(dtype), labels
    regions = torch.randint(CLASSES, (images, 1, -(-size[0] // 128), -(-size[1] // 128)), generator=draw, device=device)
    coarse = F.interpolate(regions.float(), head, mode="nearest").long()
    logits = torch.zeros_like(noise).scatter_(1, coarse, 9.0).add_(noise).to(dtype)
    right = F.interpolate(regions.float(), size, mode="nearest")[:, 0].to(torch.uint8)
    squares = torch.rand(images, 1, size[0] // 32, size[1] // 32, generator=draw, device=device)
    wrong = F.interpolate((squares < torch.quantile(squares.flatten(), hard)).float(), size, mode="nearest")[:, 0] > 0
    for image in range(images):  # one at a time: the whole batch at full size would need much memory
        full = F.interpolate(logits[image : image + 1].float(), size, mode="bilinear")
        losses = F.cross_entropy(full, right[image : image + 1].long(), reduction="none")[0]
        right[image][(losses > LIMIT.to(device)) & ~wrong[image]] = IGNORE
    return logits, torch.where(wrong & (right != IGNORE), (right + 7) % CLASSES, right)


class Sample(NamedTuple):
    """Medians of one implementation on one head, milliseconds and MiB."""

    forward: float
    backward: float
    peak: float

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


def measure(criteria: dict[str, Criterion], logits: Tensor, repeats: int) -> dict[str, Sample]:
    """Median times of both passes, and the memory they need beyond their inputs (the gradient counts).

    The implementations take turns, so that whatever else the machine does slows all of them. One that fails, for want
    of a compiler or of memory, is named and left out.
    """
    run = _measure_cuda if logits.is_cuda else _measure_cpu
    samples: dict[str, list[Sample]] = {name: [] for name in criteria}
    for turn in range(-2, repeats):  # two to warm up
        for name in list(samples):
            try:
                sample = run(criteria[name], logits)
            except Exception as error:
                print(f"{name} failed: {error}")
                logits.grad = None
                del samples[name]
            else:
                samples[name] += [sample] if turn >= 0 else []
    medians = {
        name: Sample(*(statistics.median(values) for values in zip(*taken, strict=True)))
        for name, taken in samples.items()
    }
    if logits.is_cuda:
        return medians
    return {name: m._replace(peak=_peak_on_cpu(criteria[name], logits)) for name, m in medians.items()}


def _measure_cuda(criterion: Criterion, logits: Tensor) -> Sample:
    """Times on the device: it is kept busy while the host queues its work, and the cache is emptied before."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.empty(2**28, dtype=torch.uint8, device=logits.device).zero_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(4_000_000)  # about 2 ms
    start.record()
    loss = criterion(logits)
    middle.record()
    loss.backward()
    end.record()
    torch.cuda.synchronize()
    logits.grad = None
    peak = torch.cuda.max_memory_allocated() - before
    return Sample(start.elapsed_time(middle), middle.elapsed_time(end), peak / 2**20)


def _measure_cpu(criterion: Criterion, logits: Tensor) -> Sample:
    start = time.perf_counter()
    loss = criterion(logits)
    middle = time.perf_counter()
    loss.backward()
    end = time.perf_counter()
    logits.grad = None
    return Sample(1e3 * (middle - start), 1e3 * (end - middle), float("nan"))


def _peak_on_cpu(criterion: Criterion, logits: Tensor) -> float:
    """Growth of the peak resident memory in MiB, from a heap without free pages; NaN where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water()
        criterion(logits).backward()
        return (_high_water() - before) / 2**10
    except (OSError, AttributeError):
        return float("nan")
    finally:
        logits.grad = None


def _high_water() -> float:
    return float(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


class Rates(NamedTuple):
    """What the floor is computed with."""

    bytes_per_second: float
    exponentials_per_second: float


def rates(device: torch.device) -> Rates:
    """Bandwidth of a copy, measured; exponentials per second: 16 per multiprocessor and clock, on a CPU measured."""
    n = 2**30 if device.type == "cuda" else 2**26
    source, copy = (torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2))
    if device.type == "cuda":
        seconds = statistics.median(_seconds_cuda(lambda: copy.copy_(source)) for _ in range(10))
        properties = torch.cuda.get_device_properties(device)
        clock = said("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
        megahertz = float(clock) if clock.isdecimal() else 2000.0  # about that of an H100 or H200
        return Rates(2 * n / seconds, 16 * properties.multi_processor_count * megahertz * 1e6)
    values = torch.rand(2**14)
    copy_seconds = min(_seconds(lambda: copy.copy_(source)) for _ in range(10))
    exp_seconds = (
        min(_seconds(lambda: [torch.exp(values, out=values.clone()) for _ in range(100)]) for _ in range(5)) / 100
    )
    return Rates(2 * n / copy_seconds, len(values) / exp_seconds)


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _seconds_cuda(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def floor_ms(logits: Tensor, target: Tensor, kept: float, rate: Rates) -> float:
    """What no implementation can beat; exponentials backward are needed for the share ``kept`` only."""
    pixels = target.numel()
    moved = 2 * pixels + 3 * logits.numel() * logits.element_size() + 8 * pixels
    exponentials = pixels * CLASSES * (1 + kept)
    return 1e3 * max(moved / rate.bytes_per_second, exponentials / rate.exponentials_per_second)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Run beside so many processes that compute without end."""
    work = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends with us, however we end
    others = [subprocess.Popen([sys.executable, "-c", work]) for _ in range(processes)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def hardware(device: torch.device) -> str:
    """Name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def said(*command: str) -> str:
    """First line of what a program says; "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.split("\n")[0].strip() or "unknown"


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    commit = said("git", "describe", "--always", "--dirty")
    found = {"commit": commit, "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"cuda": str(torch.version.cuda), "driver": driver}
    return found


def report(
    folder: Path,
    name: str,
    device: torch.device,
    about: dict[str, Any],
    results: list[dict[str, Any]],
    lines: list[str],
) -> None:
    """Print and write a table, and the numbers as JSON, with what they were made on and with."""
    now = datetime.now()
    header = {"date": f"{now:%Y-%m-%d %H:%M}", "hardware": hardware(device), **versions(), **about}
    text = "\n".join([f"* {key}: {value}" for key, value in header.items() if value != ""] + ["", *lines]) + "\n"
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    slug = "".join(c if c.isalnum() else "-" for c in machine.lower())
    path = folder / f"{now:%Y-%m-%d_%H%M%S}_{slug}_{name}"
    path.with_suffix(".json").write_text(json.dumps({**header, "results": results}, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(f"written: {path}.md and .json")


def collect(measured: Iterable[dict[str, Any]], write: Callable[[list[dict[str, Any]]], None]) -> None:
    """Print rows as they come and write them in the end, or what there is when a time limit or an error ends it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; what was measured until then is written"))
    results = []
    try:
        for row in measured:
            results.append(row)
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    finally:
        write(results)


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure everything, one row per head, type, regime and implementation."""
    rate = rates(device)
    print(f"copy {rate.bytes_per_second / 1e9:.1f} GB/s, exponentials {rate.exponentials_per_second / 1e9:.2f} G/s")
    for network in arguments.networks:
        shape, strides = NETWORKS[network]
        images, height, width = shape if device.type == "cuda" else CPU_SIZES[network]
        height, width = height // arguments.shrink, width // arguments.shrink
        for head, stride in enumerate(strides):
            torch._dynamo.reset()
            compiled = torch.compile(naive)
            for dtype in arguments.dtypes:
                for regime in arguments.regimes:
                    logits, target = make_inputs(
                        images, (height, width), stride, REGIMES[regime], DTYPES[dtype], device
                    )
                    loss = OhemCrossEntropy(threshold=THRESHOLD, impl="torch")
                    hard = OhemCrossEntropy(threshold=THRESHOLD, min_kept=0, impl="torch")(logits, target)[1]
                    valid, kept = (target != IGNORE).sum(), loss(logits, target)[1]
                    floor = floor_ms(logits, target, (kept / target.numel()).item(), rate)
                    logits.requires_grad_()
                    criteria: dict[str, Criterion] = {
                        impl: partial(ours(impl), target=target)
                        for impl in ("torch", "cuda")
                        if impl in arguments.implementations
                    }
                    theirs = {"labels": target.long(), "limit": LIMIT.to(device)}  # conversions are not timed
                    if "naive" in arguments.implementations:
                        criteria = {"naive": partial(naive, **theirs), **criteria}  # first: the table compares with it
                    if "compiled" in arguments.implementations and (network, head) in COMPILED and dtype == "fp16":
                        criteria["compiled"] = partial(compiled, **theirs)
                    for implementation, sample in measure(criteria, logits, arguments.repeats).items():
                        yield {
                            "network": network,
                            "head": head,
                            "stride": stride,
                            "size": [images, height, width],
                            "dtype": dtype,
                            "regime": regime,
                            "hard": (hard / valid.clamp(min=1)).item(),
                            "implementation": implementation,
                            **{f"{key}_ms": value for key, value in sample._asdict().items() if key != "peak"},
                            "peak_mib": sample.peak,
                            "floor_ms": floor,
                        }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = [
        "| network, head (stride) | type | hard | implementation | forward ms | backward ms | peak MiB | "
        "naive/this: time, memory | this/floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    baseline: dict[str, Any] = {}
    for row in results:
        if row["implementation"] == "naive":
            baseline = row
        total, base = (r["forward_ms"] + r["backward_ms"] if r else float("nan") for r in (row, baseline))
        memory = baseline.get("peak_mib", float("nan")) / row["peak_mib"] if row["peak_mib"] else float("nan")
        lines.append(
            f"| {row['network']}, {row['head']} ({row['stride']}) | {row['dtype']} | {row['hard']:.1%} | "
            f"{row['implementation']} | {row['forward_ms']:.3f} | {row['backward_ms']:.3f} | {row['peak_mib']:.1f} | "
            f"{base / total:.2f}, {memory:.1f} | {total / row['floor_ms']:.2f} |"
        )
    return [*lines, "", *_totals(results)]


def _totals(results: list[dict[str, Any]]) -> list[str]:
    """All heads of a network together, as a training step needs them: naive/this."""
    milliseconds: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in results:
        total = milliseconds.setdefault((row["network"], row["dtype"], row["regime"]), {})
        total[row["implementation"]] = total.get(row["implementation"], 0.0) + row["forward_ms"] + row["backward_ms"]
    lines = ["| all heads of | type | regime | implementation | ms | naive/this |", "|---|---|---|---|---|---|"]
    for (network, dtype, regime), total in milliseconds.items():
        for name, value in total.items():
            if name != "compiled":  # measured for some of the heads
                ratio = total.get("naive", float("nan")) / value
                lines.append(f"| {network} | {dtype} | {regime} | {name} | {value:.2f} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Command line."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--implementations", nargs="+", choices=["naive", "torch", "cuda", "compiled"], help="default: all that run"
    )
    parser.add_argument("--repeats", type=int, help="default: 20 on a GPU, 5 on a CPU")
    parser.add_argument("--shrink", type=int, default=1, help="divide height and width")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside the measurement")
    parser.add_argument("--note", default="", help="written into the results, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    arguments.dtypes = arguments.dtypes or (list(DTYPES) if cuda else ["fp32"])
    arguments.implementations = arguments.implementations or (
        ["naive", "compiled", "torch", "cuda"] if cuda else ["naive", "torch"]
    )
    arguments.repeats = arguments.repeats or (20 if cuda else 5)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    about = {"busy processes beside": arguments.load, "repeats": arguments.repeats, "note": arguments.note}
    with busy(arguments.load):
        collect(
            rows(arguments, device),
            lambda results: report(arguments.output, f"load{arguments.load}", device, about, results, table(results)),
        )


if __name__ == "__main__":
    main()
