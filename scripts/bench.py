"""All benchmarks in one go and their table, and what the benchmarks share.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench.py              # all, beside the reference
    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench.py data step    # bench_data.py and bench_step.py

Contenders work in turn in one process, so that what disturbs the machine disturbs all of them; a ratio is taken within
each round, and the table shows the median with the lowest and the highest. Memory is measured in a process for each.
Results go to outputs/benchmarks/<name>_<date>.json with hardware, versions and commit.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from rich.console import Console
from rich.progress import track
from rich.table import Table

BENCHMARKS = ("data", "step", "evaluation", "prediction", "start")
OUTPUTS = Path("outputs/benchmarks")


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    value: float
    unit: str
    ratio: Sequence[float] | None = None
    """To the reference: median, lowest and highest of the rounds; None: not compared."""
    target: float | None = None
    """What the ratio is to reach; for memory, to stay below."""
    note: str = ""


def main() -> None:
    """Run the benchmarks that are named, each in a process of its own, and print one table of all."""
    options, rest = parser(__doc__, add_names=True).parse_known_args()
    files = []
    for name in options.names or BENCHMARKS:
        before = set(OUTPUTS.glob(f"{name}_*.json"))
        command = [sys.executable, str(Path(__file__).with_name(f"bench_{name}.py")), *rest]
        common = ["--rounds", str(options.rounds), "--threads", str(options.threads)]
        subprocess.run([*command, *common], check=True)
        files += sorted(set(OUTPUTS.glob(f"{name}_*.json")) - before)
    found = [json.loads(file.read_text()) for file in files]
    print(markdown([Row(**row) for one in found for row in one["rows"]]))


def parser(description: str | None, *, add_names: bool = False) -> argparse.ArgumentParser:
    """Command line of a benchmark, with what all of them take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if add_names:
        made.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="which benchmarks; default: all")
    made.add_argument("--rounds", type=int, default=7, help="rounds that are timed, after one that is not")
    made.add_argument("--threads", type=int, default=1, help="threads of PyTorch and of OpenCV")
    return made


def reference(module: str) -> Any:
    """A module of the checkout that REFERENCE_ROOT names, to be run on a CPU as it stands.

    What it imports and needs for nothing that is measured here is replaced, as are the weights that its constructors
    download. Where there is no GPU, its ``.cuda()`` does nothing.
    """
    import torch
    from torch.utils import model_zoo

    sys.path.insert(0, os.environ["REFERENCE_ROOT"])
    missing = [name for name in ("tabulate", "tqdm", "torchvision") if importlib.util.find_spec(name) is None]
    sys.modules.update({name: MagicMock(tqdm=iter) for name in missing})
    model_zoo.load_url = lambda *_, **__: {}
    if not torch.cuda.is_available():
        for kind in (torch.Tensor, torch.nn.Module):
            kind.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    imported = importlib.import_module(module)
    for name in missing:  # others look whether they are installed
        del sys.modules[name]
    return imported


def has_reference() -> bool:
    """Whether REFERENCE_ROOT is set."""
    return "REFERENCE_ROOT" in os.environ


def in_turn(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every second round is in reverse order, and one before is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True), transient=True):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            contenders[name]()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str = "reference") -> list[float] | None:
    """How many times faster one contender is than another: median, lowest and highest of the rounds."""
    if to not in seconds:
        return None
    ratios = [other / own for own, other in zip(seconds[name], seconds[to], strict=True)]
    return [statistics.median(ratios), min(ratios), max(ratios)]


def peak_of(function: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> int:
    """Most bytes that what `function(*arguments)` has prepared takes beyond it, of its process or of a GPU."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, device, function, arguments))
    process.start()
    sender.close()
    grown = receiver.recv()
    process.join()
    return grown


def _measure_peak(sender: Any, device: str, function: Callable[..., Callable[[], Any]], arguments: Any) -> None:
    work = function(*arguments)
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        sender.send(torch.cuda.max_memory_allocated() - before)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark becomes what is in use
        before = _resident("VmRSS")
        work()
        sender.send(_resident("VmHWM") - before)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def write(name: str, rows: Sequence[Row], **setup: Any) -> None:
    """Print the rows and write ``outputs/benchmarks/<name>_<date>.json``; ``setup`` says what was measured on."""
    from bisenet import report

    found = {"rows": [asdict(row) for row in rows], "setup": setup, "provenance": report.provenance({})}
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    report.write_json(OUTPUTS / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}.json", found)
    table = Table(title=f"{name}: {setup}", title_justify="left")
    for title in ("what", "value", "ratio to the reference", "target", "note"):
        table.add_column(title)
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=160).print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The table of a page."""
    lines = ["| what | value | ratio to the reference | target | note |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: Row) -> list[str]:
    compared = "{:.2f}x ({:.2f} to {:.2f})".format(*row.ratio) if row.ratio else "not run"
    return [row.what, f"{row.value:.3g} {row.unit}", compared, f"{row.target}x" if row.target else "-", row.note]


if __name__ == "__main__":
    main()
