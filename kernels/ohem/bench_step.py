"""Time and peak memory of a whole training step with each implementation of the loss.

    python kernels/ohem/bench_step.py            # on a GPU: V2 16x512x1024 and V1 8x1024x1024, fp16 and bf16
    python kernels/ohem/bench_step.py --shrink 16 # two small images: that it runs, on a CPU (fp32)

A step is normalisation, network under autocast, the loss of all heads, backward and SGD. Implementations are those of
``bench.py``. Prints a table and writes it to ``kernels/ohem/results``.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench import CLASSES, DTYPES, LIMIT, NETWORKS, collect, naive, report
from torch import Tensor, nn

from bisenet.losses import DeepSupervision, OhemCrossEntropy
from bisenet.networks import BiSeNetV1, BiSeNetV2

MODELS = {"bisenetv1": BiSeNetV1, "bisenetv2": BiSeNetV2}


class Naive(nn.Module):
    """The reference's composition in the form of our losses; labels are int64."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("limit", LIMIT)

    def forward(self, logits: Tensor, target: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
        """Loss, and a count that nobody reads."""
        return naive(logits, target, self.limit), target.new_zeros(())


def measure(
    network: nn.Module, criterion: nn.Module, image: Tensor, mask: Tensor, dtype: torch.dtype, repeats: int
) -> tuple[float, float, float]:
    """Median milliseconds of a step, peak memory in MiB (NaN on a CPU), and the last loss."""
    device = image.device.type
    loss_of = DeepSupervision(criterion)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16 and device == "cuda")
    times = []
    loss = torch.zeros(())
    for step in range(3 + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
            if step == 3:
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(network(image.float().sub(80.0).div(50.0)), mask).total
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else float("nan")
    return 1e3 * statistics.median(times[3:]), peak, loss.item()


def rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure every network, type and implementation."""
    for name, ((images, height, width), _) in NETWORKS.items():
        if arguments.shrink > 1:
            images, height, width = 2, height // arguments.shrink, width // arguments.shrink
        draw = torch.Generator(device).manual_seed(0)
        image = torch.randint(256, (images, 3, height, width), generator=draw, device=device, dtype=torch.uint8)
        mask = torch.randint(CLASSES, (images, height, width), generator=draw, device=device, dtype=torch.uint8)
        for dtype in ["fp16", "bf16"] if device.type == "cuda" else ["fp32"]:
            implementations = ["naive", "torch"] + ["cuda"] * (device.type == "cuda")
            for implementation in [*implementations, *["cuda, deterministic"] * (dtype == "fp16")]:
                impl, _, deterministic = implementation.partition(", ")
                torch.use_deterministic_algorithms(bool(deterministic), warn_only=True)
                torch.manual_seed(0)
                network = MODELS[name](n_classes=CLASSES).to(device).train()
                criterion = Naive() if impl == "naive" else OhemCrossEntropy(impl=impl)
                labels = mask.long() if impl == "naive" else mask
                step, peak, loss = measure(
                    network, criterion.to(device), image, labels, DTYPES[dtype], arguments.repeats
                )
                yield {
                    "network": name,
                    "size": [images, height, width],
                    "dtype": dtype,
                    "implementation": implementation,
                    "step_ms": step,
                    "peak_mib": peak,
                    "loss": loss,
                }


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown."""
    lines = ["| network | batch | type | implementation | step ms | peak MiB | loss |", "|---|---|---|---|---|---|---|"]
    for row in results:
        size = "x".join(map(str, row["size"]))
        lines.append(
            f"| {row['network']} | {size} | {row['dtype']} | {row['implementation']} | {row['step_ms']:.1f} | "
            f"{row['peak_mib']:.0f} | {row['loss']:.4f} |"
        )
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="divide height and width; two images then")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--note", default="", help="written into the results")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    about = {"repeats": arguments.repeats, "note": arguments.note}
    collect(
        rows(arguments, device),
        lambda results: report(arguments.output, "step", device, about, results, table(results)),
    )


if __name__ == "__main__":
    main()
