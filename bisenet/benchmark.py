"""Size, latency, throughput and memory of networks over image sizes, batch sizes, precisions and runtimes.

The clock covers the network alone, from normalised images on the device to logits at the stride of the main head. With
``processing`` it also covers the steps from a camera's image to a mask: transfer, normalisation, upsampling, argmax.
"""

import csv
import ctypes
import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bisenet import report, runtimes
from bisenet.networks.blocks import fold

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Run = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) -> logits of the main head."""


def _eager(network: nn.Module, image: Tensor) -> Run:
    return lambda given: network(given)[0]


def _folded(network: nn.Module, image: Tensor) -> Run:
    folded = fold(network, torch.channels_last)
    return lambda given: folded(given.contiguous(memory_format=torch.channels_last))[0]


def _compiled(network: nn.Module, image: Tensor) -> Run:
    compiled: Any = torch.compile(network)
    return lambda given: compiled(given)[0]


def _exported(runtime: str, network: nn.Module, image: Tensor) -> Run:
    if image.device.type != "cpu":
        raise ValueError(f"{runtime} runs on the CPU here; accepted: accelerator=cpu")
    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[image.dtype]
    program = torch.export.export(fold(network).float(), (image.float(),))
    run = runtimes.run_onnx(runtime, runtimes.to_onnx(program), torch.get_num_threads(), precision)
    return lambda given: torch.from_numpy(run(given.float().numpy()))


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "eager": _eager,
    "folded": _folded,
    "compiled": _compiled,
    "onnxruntime": partial(_exported, "onnxruntime"),
    "openvino": partial(_exported, "openvino"),
}
"""Name -> function that prepares a network in evaluation mode for images like the given one.

``eager`` runs the network as it is; ``folded`` folds batch norms into convolutions and uses ``channels_last``;
``compiled`` uses torch.compile; the others export the folded network to ONNX and run it on the CPU.
"""


def benchmark(
    models: Mapping[str, tuple[nn.Module, float | None]],
    *,
    sizes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    precisions: Sequence[str],
    runtimes: Sequence[str],
    device: str,
    processing: bool = False,
    warmup: int = 5,
    runs: int = 30,
) -> dict[str, Any]:
    """Time every combination, each from a copy of its network.

    Args:
        models: name -> network, and its mIoU in [0, 1] if it is known.
        sizes: height and width of the images, at least 64.
        batches: numbers of images in a run.
        precisions: types of weights and images, keys of :data:`PRECISIONS`.
        runtimes: keys of :data:`RUNTIMES`.
        device: where the networks run, ``cpu`` or ``cuda``.
        processing: also time transfer, normalisation, upsampling and argmax.
        warmup: number of runs before the clock starts.
        runs: number of timed runs; each is timed by itself, until the device has finished.

    Returns:
        Plain data: ``rows`` of measurements, ``failed`` (combination -> reason), ``device``, ``timed`` (the steps that
        the clock covers) and ``provenance``.

    Raises:
        ValueError: an argument that is not accepted.
    """
    for key, given, accepted in (("precisions", precisions, PRECISIONS), ("runtimes", runtimes, RUNTIMES)):
        if unknown := [name for name in given if name not in accepted]:
            raise ValueError(f"{key}: got {unknown[0]!r}, accepted: {', '.join(accepted)}")
    if min(runs, *batches, *(length // 64 for size in sizes for length in size)) < 1:
        raise ValueError(f"sizes, batches, runs: got {sizes}, {batches}, {runs}, accepted: at least 64, 1 and 1")
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    facts = {(name, *size): describe(models[name][0], size) for name in models for size in sizes}
    combinations = list(product(models, sizes, batches, precisions, runtimes))
    for name, size, batch, precision, runtime in track(combinations, "measuring", console=Console(stderr=True)):
        network, miou = models[name]
        row = {"model": name, "size": f"{size[0]}x{size[1]}", "batch": batch, "precision": precision,
               "runtime": runtime} | facts[name, *size]  # fmt: skip
        try:
            measured = _measure(network, size, batch, precision, runtime, device, processing, warmup, runs)
        except Exception as error:  # a runtime may raise anything, and the others go on
            where = ", ".join(str(row[key]) for key in ("model", "size", "batch", "precision", "runtime"))
            failed[where] = " ".join(str(error).split())[:200] or type(error).__name__
            log.warning("%s failed: %s", where, failed[where])
        else:
            rows.append(row | measured | {"miou": miou})
    scope = "transfer, normalisation, network, upsampling, argmax" if processing else "network alone"
    return {"rows": rows, "failed": failed, "device": device, "timed": scope, "provenance": report.provenance({})}


def describe(network: nn.Module, size: tuple[int, int]) -> dict[str, Any]:
    """Count the parameters in training and in inference (without auxiliary heads), and 10^9 multiply-adds per image."""
    auxiliary = tuple(f"{head}." for head in getattr(network, "head_names", ())[1:])
    counts = {name: parameter.numel() for name, parameter in network.named_parameters()}
    with FlopCounterMode(display=False) as counter:
        deepcopy(network).to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    inference = sum(count for name, count in counts.items() if not name.startswith(auxiliary))
    return {"parameters_training": sum(counts.values()), "parameters": inference,
            "gmacs": counter.get_total_flops() / 2e9}  # fmt: skip


@torch.inference_mode()
def _measure(
    network: nn.Module, size: tuple[int, int], batch: int, precision: str, runtime: str, device: str,
    processing: bool, warmup: int, runs: int,
) -> dict[str, Any]:  # fmt: skip
    def once() -> None:
        given = image
        if processing:
            given = (raw.to(device).to(dtype) / 255 - 0.5) / 0.25
        logits = run(given)
        if processing:
            F.interpolate(logits.float(), size, mode="bilinear").argmax(1).cpu()
        if device == "cuda":
            torch.cuda.synchronize()

    dtype = PRECISIONS[precision]
    raw = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    image = ((raw / 255 - 0.5) / 0.25).to(device, dtype)
    run = RUNTIMES[runtime](deepcopy(network).to(device, dtype).eval(), image)
    before = _memory(device, reset=True)
    for _ in range(warmup):
        once()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    after = _memory(device)
    median, p90, p99 = np.percentile(seconds, [50, 90, 99]).tolist()
    return {"median_ms": 1e3 * median, "p90_ms": 1e3 * p90, "p99_ms": 1e3 * p99, "images_per_second": batch / median,
            "peak_mib": None if before is None or after is None else (after - before) / 2**20}  # fmt: skip


def _memory(device: str, reset: bool = False) -> float | None:
    """Return the peak of bytes in use since the last reset; with ``reset``, reset it and return the bytes in use now.

    On a CPU these are bytes of the process, or None on systems other than Linux with glibc.
    """
    if device == "cuda":
        if not reset:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # else memory that earlier runs freed counts as in use
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except (OSError, AttributeError, TypeError):  # no Linux, or another C library
        return None
    key = "VmRSS:" if reset else "VmHWM:"
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


# ---------------------------------------------------------------- output

_SIZES = ("model", "size", "parameters_training", "parameters", "gmacs", "miou")
_SPEEDS = ("batch", "size", "precision", "runtime", "median_ms", "p90_ms", "p99_ms", "images_per_second", "peak_mib")


def write(found: Mapping[str, Any], folder: Path) -> None:
    """Write ``benchmark.json`` and ``benchmark.csv``, and ``benchmark.png`` if an mIoU is known; print the tables."""
    rows, versions, hardware = found["rows"], found["provenance"]["versions"], found["provenance"]["hardware"]
    report.write_json(folder / "benchmark.json", found)
    if rows:
        with (folder / "benchmark.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if any(row["miou"] is not None for row in rows):
        report.plot_speed(rows, f"{found['device']}, {found['timed']}", folder / "benchmark.png")
    console = Console()
    models = dict.fromkeys(row["model"] for row in rows)
    for keys, name in ((_SIZES, None), *((_SPEEDS, name) for name in models)):
        table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for key in keys:
            number = bool(rows) and not isinstance(rows[0][key], str)
            title = key.replace("_", "\n")
            table.add_column(title, justify="right" if number else "left", no_wrap=key != "model", overflow="fold")
        shown = [row for row in rows if name in (None, row["model"])]
        for cells in dict.fromkeys(tuple(_cell(key, row[key]) for key in keys) for row in shown):
            table.add_row(*cells)
        console.print(table)
    machine = hardware["gpus"][0] if found["device"] == "cuda" else f"{hardware['cpu']}, {hardware['threads']} threads"
    console.print(f"{found['timed']} on {machine}; torch {versions['torch']}", markup=False, highlight=False)
    for where, reason in found["failed"].items():
        console.print(f"failed: {where}: {reason}", markup=False, highlight=False)


def _cell(key: str, value: Any) -> str:
    if key == "miou":
        return report.percent(value)
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,d}" if isinstance(value, int) else f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
