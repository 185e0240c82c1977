"""Instructions per pixel of the kernels, counted without a GPU, and what they would cost, beside the floor.

    python kernels/ohem/count.py        # needs g++, gcov, NVRTC and nvdisasm (pip install nvidia-cuda-nvdisasm)

How it counts. The source is compiled for a GPU with line numbers and disassembled: every instruction then names its
line, and the lines from which that one was inlined. The same source, compiled for the CPU (``tests/cuda_shim.h``) with
gcov, runs a head with the blocks and tiles of a GPU, all pixels hard: every line then has a number of executions. A
basic block of instructions weighs the median of its lines' executions, made to agree with what flows in and out of it;
in an unrolled loop that is divided by the number of copies. Loops that only the first threads of a block take are
counted for whole warps. The result is instructions issued per warp for 32 pixels, which is instructions of a thread per
pixel, the rims of tiles included.

What it assumes. Time is the longest of three: instructions at 75 % of one per scheduler and clock, exponentials at 16
per multiprocessor and clock, bytes at the bandwidth of a copy; and 25 us for six launches and their ends. Nobody has
measured that 75 %, nor the 25 us.
"""

import argparse
import ctypes
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cuda.core import Program, ProgramOptions
from scipy.optimize import linprog

from bisenet import kernel

CLASSES = 19
IMAGE = (256, 512)
"""Of the run on the CPU."""
PASSES = {"ohem_forward": "forward", "ohem_backward": "backward"}


class Gpu(NamedTuple):
    """Figures from the data sheet; the bandwidth is nine tenths of it, about what a copy reaches."""

    name: str
    multiprocessors: int
    hertz: float
    bytes_per_second: float


GPUS = {
    "sm_80": Gpu("A100 80 GB SXM", 108, 1.41e9, 0.9 * 2.039e12),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 0.9 * 3.35e12),
    "sm_100": Gpu("B200", 148, 1.965e9, 0.9 * 7.7e12),
}


class Line(NamedTuple):
    """A line of the source in the run on the CPU."""

    executions: float
    calls: float
    """Of its function."""


def run_on_cpu(specialization: kernel.Specialization, stride: int) -> dict[int, Line]:
    """Executions of each line, per pixel. Runs in a process of its own, since gcov writes at its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ohem.so"
        macros = [("OHEM_SOURCE", f'"{kernel.source_path()}"'), *specialization.macros]
        options = ["-std=c++20", "-O0", "--coverage", "-fprofile-update=atomic", "-fPIC", "-shared", "-pthread", "-w"]
        shim = kernel.source_path().parents[2] / "tests" / "cuda_shim.h"
        source = ["-x", "c++", str(shim), "-o", str(path)]
        subprocess.run(["g++", *options, *[f"-D{k}={v}" for k, v in macros], *source], check=True, cwd=folder)
        subprocess.run([sys.executable, __file__, "--run", str(path), str(stride)], check=True, cwd=folder)
        notes = [str(next(Path(folder).glob("*.gcda")))]
        report = subprocess.run(
            ["gcov", "--json-format", "--stdout", *notes], cwd=folder, check=True, capture_output=True
        )
    lines: dict[int, Line] = defaultdict(lambda: Line(0, 0))
    for file in json.loads(report.stdout)["files"]:
        if Path(file["file"]).name == "ohem.cu":
            calls = {function["name"]: function["execution_count"] for function in file["functions"]}
            for line in file["lines"]:
                before = lines[line["line_number"]]
                own = calls.get(line.get("function_name", ""), 0)
                lines[line["line_number"]] = Line(before.executions + line["count"], before.calls + own)
    return lines


class CpuLibrary:
    """The kernels on the CPU, as many threads to a block as on a GPU."""

    multiprocessors = 1

    def __init__(self, path: str, block: int) -> None:
        self.block = block
        self._library = ctypes.CDLL(path)

    def launch(self, name: str, grid: int, *arguments: kernel.Argument) -> None:
        """Start a kernel."""
        values = [
            ctypes.c_void_p(value.data_ptr())
            if isinstance(value, torch.Tensor)
            else (ctypes.c_float if isinstance(value, float) else ctypes.c_longlong)(value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        getattr(self._library, f"launch_{name}")(ctypes.c_uint(grid), ctypes.c_uint(self.block), pointers)


def run(path: str, stride: int) -> None:
    """Both passes on a head, all pixels hard."""
    library: Any = CpuLibrary(path, 128)
    kernel.library = lambda *_: library
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, CLASSES, IMAGE[0] // stride, IMAGE[1] // stride, generator=draw).half().requires_grad_()
    target = torch.randint(CLASSES, (1, *IMAGE), generator=draw).to(torch.uint8)
    loss, kept, _, _ = kernel.ohem(logits, target, 0.0, 0, 0, True, False)
    assert kept == target.numel()
    loss.backward()


def plan_of(stride: int) -> Any:
    """Tiles of a head of the run on the CPU."""
    size = IMAGE[0] // stride, IMAGE[1] // stride
    shape = torch.Size((1, CLASSES, *size))
    strides = torch.Size((CLASSES * math.prod(size), math.prod(size), size[1], 1))
    return kernel._plan((shape, strides, torch.Size((1, *IMAGE))), False, kernel.specialize(classes=CLASSES), 128)


def unrolled(source: list[str], bounds: dict[str, int]) -> dict[int, int]:
    """Copies of each line (from 1) that unrolling makes."""
    copies: dict[int, int] = defaultdict(lambda: 1)
    for number, line in enumerate(source):
        found = re.match(r"#pragma unroll ?(\d*)", line)
        if not found:
            continue
        bound = re.search(r"; \w+ < ([\w* ]+);", source[number + 1])
        factor = int(found[1] or (bounds[bound[1]] if bound else 1))
        depth, end = 0, number + 1
        while True:  # to the end of the loop
            text = source[end].split("//")[0]
            depth += text.count("{") - text.count("}")
            if depth == 0 and text.rstrip().endswith(("}", ";")) and not (end == number + 1 and text.endswith(")")):
                break
            end += 1
        for inside in range(number + 1, end + 1):
            copies[inside + 1] *= factor
    return copies


def disassemble(arch: str, specialization: kernel.Specialization) -> str:
    """SASS with line numbers."""
    options = ProgramOptions(name="ohem.cu", arch=arch, std="c++17", define_macro=specialization.macros, lineinfo=True)  # type: ignore[arg-type]
    code = Program(kernel.source_path().read_text(), "c++", options).compile("cubin").code
    tool = shutil.which("nvdisasm") or next(
        (str(p) for f in sys.path for p in Path(f).glob("nvidia/*/bin/nvdisasm")), ""
    )
    if not tool:
        sys.exit("no nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(bytes(code))
        file.flush()
        return subprocess.run([tool, "-c", "-gi", file.name], check=True, capture_output=True, text=True).stdout


class Block:
    """Instructions that are executed together."""

    def __init__(self) -> None:
        self.instructions: list[str] = []
        self.weights: list[float] = []
        self.target = ""
        """Label to which it may branch."""
        self.goes_on = True
        """Whether the next block may follow."""
        self.ends = False
        """Whether the function may end here."""
        self.chains: list[tuple[int, ...]] = []
        """Line of each instruction, and those it was inlined into."""

    @property
    def signature(self) -> tuple[Any, ...] | None:
        """The same in copies of a block, None in small ones: their commonest line, and the commonest instruction."""
        if len(self.instructions) < 10 or not self.chains:
            return None
        return statistics.mode(self.chains), Counter(self.instructions).most_common(1)[0]


def flow(blocks: list[Block], labels: dict[str, int]) -> list[float]:
    """Executions of each block: as many leave as enter, as near as that allows to the medians of the lines.

    A linear program over the edges. Of blocks that the compiler wrote twice the sum counts, since one of them runs, and
    lines that the CPU never reached weigh much.
    """
    edges = [(i, i + 1) for i, block in enumerate(blocks[:-1]) if block.goes_on]
    edges += [(i, labels[block.target]) for i, block in enumerate(blocks) if block.target in labels]
    entered = {to for _, to in edges}
    edges += [(-1, i) for i in range(len(blocks)) if i not in entered]  # where a function begins
    edges += [(i, -1) for i, block in enumerate(blocks) if block.ends]
    n = len(blocks)
    enters, leaves = np.zeros((n, len(edges))), np.zeros((n, len(edges)))
    for e, (start, end) in enumerate(edges):
        if end >= 0:
            enters[end, e] = 1
        if start >= 0:
            leaves[start, e] = 1
    copies: dict[Any, list[int]] = defaultdict(list)
    for i, block in enumerate(blocks):
        copies[block.signature or i].append(i)
    together = np.array([enters[alike].sum(0) for alike in copies.values()])
    medians = np.array([statistics.median(blocks[i].weights or [0.0]) for i, *_ in copies.values()])
    costs = np.array([len(blocks[i].weights) for i, *_ in copies.values()]) * np.where(medians == 0, 100, 1)
    apart = np.eye(len(copies))
    found = linprog(
        np.concatenate([np.zeros(len(edges)), costs]),
        A_ub=np.block([[together, -apart], [-together, -apart]]),  # |entered - median| <= distance
        b_ub=np.concatenate([medians, -medians]),
        A_eq=np.hstack([enters - leaves, np.zeros((n, len(copies)))]),
        b_eq=np.zeros(n),
    )
    return list(enters @ found.x[: len(edges)])


def count(sass: str, lines: dict[int, Line], stride: int) -> dict[str, tuple[float, float]]:
    """Instructions and exponentials per pixel of each pass."""
    source = kernel.source_path().read_text().split("\n")
    quads = (CLASSES + 3) // 4 | 1
    bounds = {"K": CLASSES, "PAD": 4 * quads, "QUADS": quads, "4": 4, "N": quads, "4 * N": 4 * quads}
    copies = unrolled(source, bounds)
    functions = {
        name: next(
            (i + 1 for i, line in enumerate(source) if f" {name}(" in line and "__device__" in line + source[i - 1]), 0
        )
        for name in ("stage", "gather")
    }
    spans = {
        name: range(start, start + next((i for i, line in enumerate(source[start:]) if line == "}"), 0) + 1)
        if start
        else range(0)
        for name, start in functions.items()
    }
    plan = plan_of(stride)
    near = {  # threads that take these loops
        ("ohem_forward", "stage"): plan.forward_tile[1] // stride + 2,
        ("ohem_backward", "stage"): plan.backward_tile[1] + 2,
        ("ohem_backward", "gather"): plan.backward_tile[1],
    }
    pixels = math.prod(IMAGE)

    def weight(kernel_name: str, chain: tuple[int, ...]) -> float:
        """Executions of an instruction, per pixel, of the copy that it is."""
        *inner, outermost = chain
        value = lines[outermost].executions / copies[outermost] if outermost in lines else 0.0
        for line in inner:
            if line in lines and lines[line].calls:
                value *= lines[line].executions / lines[line].calls / copies[line]
        for function, span in spans.items():
            if any(line in span for line in inner):
                threads = near[kernel_name, function]
                value *= math.ceil(threads / 32) * 32 / threads
        return value / pixels

    result = {}
    for text in re.split(r"//-+ \.text\.", sass)[1:]:
        name = text.split()[0]
        if name not in PASSES:
            continue
        blocks = [Block()]
        labels: dict[str, int] = {}
        chain: list[int] = []
        fresh = True
        for line in text.split("\n"):
            if found := re.match(r'\s*//## File ".*?", line (\d+)( inlined)?', line):
                chain = [int(found[1])] if fresh else [*chain, int(found[1])]
                fresh = not found[2]
            elif found := re.match(r"([.$]\S+):", line):
                blocks.append(Block())
                labels[found[1]] = len(blocks) - 1
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+ )?\s*([\w.]+)(.*)", line):
                block = blocks[-1]
                block.instructions.append(found[2])
                if chain:
                    block.weights.append(weight(name, tuple(chain)))
                    block.chains.append(tuple(chain))
                if found[2].startswith(("BRA", "EXIT", "RET", "CALL")):
                    block.goes_on = bool(found[1]) or found[2].startswith(("CALL", "BRA.DIV", "BRA.CONV"))
                    block.ends = found[2].startswith(("EXIT", "RET"))
                    target = re.search(r"`\((\S+)\)", found[3])
                    block.target = target[1] if target and found[2].startswith("BRA") else ""
                    blocks.append(Block())
        frequencies = flow(blocks, labels)
        total = sum(f * sum(i != "NOP" for i in b.instructions) for f, b in zip(frequencies, blocks, strict=True))
        exponentials = sum(f * b.instructions.count("MUFU.EX2") for f, b in zip(frequencies, blocks, strict=True))
        result[PASSES[name]] = (total, exponentials)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--archs", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run[0], int(arguments.run[1]))
        return
    specialization = kernel.specialize(torch.float16, torch.uint8, CLASSES)
    executions = {stride: run_on_cpu(specialization, stride) for stride in arguments.strides}
    pixels = 16 * 512 * 1024
    print("| GPU | stride | forward | backward | exponentials | estimate, us | floor, us | estimate / floor |")
    print("|---|---|---|---|---|---|---|---|")
    for arch in arguments.archs:
        gpu, sass = GPUS[arch], disassemble(arch, specialization)
        for stride, lines in executions.items():
            found = count(sass, lines, stride)
            (forward, some), (backward, others) = found["forward"], found["backward"]
            clocks = pixels / gpu.multiprocessors / gpu.hertz
            moved = (10 * pixels + 6 * CLASSES * pixels / stride**2) / gpu.bytes_per_second
            floor = max(2 * CLASSES * clocks / 16, moved)
            estimate = max((forward + backward) / 32 / 4 / 0.75 * clocks, (some + others) * clocks / 16, moved) + 25e-6
            numbers = f"{forward:.0f} | {backward:.0f} | {some + others:.0f} | {1e6 * estimate:.0f} | {1e6 * floor:.0f}"
            print(f"| {arch}, {gpu.name} | {stride} | {numbers} | {estimate / floor:.1f} |", flush=True)


if __name__ == "__main__":
    main()
