"""The CUDA kernel of the loss: ``kernels/ohem/ohem.cu``, compiled when it is first used, as PyTorch operators.

The source is compiled by NVRTC through cuda.core for the device at hand; neither nvcc nor a host compiler is needed.
The result is kept in cuda.core's program cache (``~/.cache/cuda-python/program-cache``, moved by ``XDG_CACHE_HOME``).
``kernels/README.md`` describes the algorithm; :func:`bisenet.ops.ohem_cross_entropy` is the public function.

Shapes: N images, C classes, (h, w) the size of a head, (H, W) the size of the labels.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

LOGIT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
LABEL_TYPES = {torch.uint8: "uint8", torch.int64: "int64"}
KERNELS = ("ohem_forward", "ohem_refine", "ohem_backward")
BLOCK = 128
"""Threads in a block; the source says the same."""
MAX_SPECIALIZED_CLASSES = 32
"""Up to here the kernel is compiled for the very number of classes, which then fit into registers."""
_TILE_ROWS = 32
"""Rows of pixels that a block of the forward pass walks down; the most that the source has room for."""
_GRADIENT_ROWS = 64
"""About so many rows of pixels that a block of the backward pass walks down, and the most rows of logits."""
_STATE_WORDS = 10 + 3 * 2048
"""Size of ``State`` in the source, in words of 64 bits."""

Argument = Tensor | int | float


class Specialization(NamedTuple):
    """What the source is compiled for."""

    logit: str
    label: str
    classes: int
    """0: any number."""

    @property
    def macros(self) -> list[tuple[str, str]]:
        """Preprocessor definitions."""
        return [("OHEM_LOGIT", self.logit), ("OHEM_LABEL", self.label), ("OHEM_CLASSES", str(self.classes))]


class Library(Protocol):
    """Compiled kernels. ``launch`` takes tensors as pointers, ints as 64 bits and floats as 32."""

    block: int
    multiprocessors: int

    def launch(self, kernel: str, grid: int, *arguments: Argument) -> None:
        """Start ``grid`` blocks of ``block`` threads."""
        ...


def source_path() -> Path:
    """``ohem.cu``: beside the package in a wheel, in ``kernels/`` of a checkout."""
    package = Path(__file__).parent
    candidates = (package / "kernels" / "ohem" / "ohem.cu", package.parent / "kernels" / "ohem" / "ohem.cu")
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"the source of the kernel is missing: neither {candidates[0]} nor {candidates[1]} exists")


def compile_source(arch: str, specialization: Specialization, *, cache: Any = None, logs: Any = None) -> Any:
    """Compile for an architecture such as ``sm_90``; needs no GPU.

    Args:
        arch: the architecture.
        specialization: types and number of classes.
        cache: a ``cuda.core.utils.ProgramCacheResource`` to look in first.
        logs: where ptxas writes registers and spills; an object with ``write``.

    Returns:
        A ``cuda.core.ObjectCode`` with a cubin.
    """
    from cuda.core import Program  # type: ignore[attr-defined]

    options = _options(arch, specialization, ["-v"] if logs else None)
    return Program(source_path().read_text(), "c++", options).compile("cubin", cache=cache, logs=logs)


def _options(arch: str, specialization: Specialization, ptxas_options: list[str] | None = None) -> Any:
    from cuda.core import ProgramOptions  # type: ignore[attr-defined]

    macros: Any = specialization.macros
    return ProgramOptions(name="ohem.cu", arch=arch, std="c++17", define_macro=macros, ptxas_options=ptxas_options)


def _load(arch: str, specialization: Specialization) -> dict[str, Any]:
    """The kernels by name, from the cache on disk or compiled. A cache that fails costs a compilation, no more."""

    def kernels(cache: Any) -> dict[str, Any]:
        code = compile_source(arch, specialization, cache=cache)
        return {name: code.get_kernel(name) for name in KERNELS}

    try:
        from cuda.core.utils import FileStreamProgramCache  # type: ignore[import-not-found]

        return kernels(FileStreamProgramCache())
    except Exception as error:  # no cache in this cuda.core, a folder that cannot be written, a damaged entry
        compiled = kernels(None)  # raises again where the cache is not to blame
        _warn_once(f"compiled without the cache of compiled kernels, which failed: {type(error).__name__}: {error}")
    with suppress(Exception):
        _forget(arch, specialization)
    return compiled


def _forget(arch: str, specialization: Specialization) -> None:
    """Remove an entry from the cache, so that the next process writes it anew."""
    from cuda.core.utils import FileStreamProgramCache, make_program_cache_key  # type: ignore[import-not-found]

    source, options = source_path().read_text(), _options(arch, specialization)
    key = make_program_cache_key(code=source, code_type="c++", options=options, target_type="cubin")
    del FileStreamProgramCache()[key]


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


class _CurrentStream:
    """PyTorch's current stream in CUDA's stream protocol, which streams of older versions do not have."""

    def __cuda_stream__(self) -> tuple[int, int]:
        legacy = 1  # CU_STREAM_LEGACY is PyTorch's default stream; 0 is another one if cuda.core is told so
        return 0, torch.cuda.current_stream().cuda_stream or legacy


class _CudaLibrary:
    block = BLOCK

    def __init__(self, device: int, specialization: Specialization) -> None:
        from cuda.core import Device, LaunchConfig, launch  # type: ignore[attr-defined]

        major, minor = torch.cuda.get_device_capability(device)
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        Device(device).set_current()
        self._kernels = _load(f"sm_{major}{minor}", specialization)
        self._launch, self._config = launch, LaunchConfig

    def launch(self, kernel: str, grid: int, *arguments: Argument) -> None:
        values = [
            value.data_ptr()
            if isinstance(value, Tensor)
            else np.int64(value)
            if isinstance(value, int)
            else np.float32(value)
            for value in arguments
        ]
        config = self._config(grid=grid, block=self.block)
        self._launch(_CurrentStream(), config, self._kernels[kernel], *values)


@cache
def library(device: torch.device, specialization: Specialization) -> Library:
    """The kernels for a device, compiled once per process."""
    if device.type != "cuda":
        raise ValueError(f"the CUDA kernel takes tensors on a CUDA device, got {device}")
    return _CudaLibrary(torch.cuda.current_device() if device.index is None else device.index, specialization)


def specialize(dtype: torch.dtype, label_dtype: torch.dtype, classes: int) -> Specialization:
    """What the source must be compiled for to take these types and so many classes."""
    known = classes if classes <= MAX_SPECIALIZED_CLASSES else 0
    return Specialization(LOGIT_TYPES[dtype], LABEL_TYPES[label_dtype], known)


_USUAL = Specialization("half", "uint8", 19)


def why_not(device: torch.device | None = None, specialization: Specialization = _USUAL) -> str | None:
    """Why the kernel cannot run on a device (the current one), None if it can. Compiles it."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    device = device or torch.device("cuda", torch.cuda.current_device())
    try:
        with _on(device):
            library(device, specialization)
    except ImportError as error:
        return f"{error}: install the extra `cuda` (pip install -e '.[cuda]')"
    except Exception as error:  # whatever the compiler or the driver says
        return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------------------------ operators


class _Axis(NamedTuple):
    """One axis of the upsampling; ``scale`` is source pixels per full-size pixel in float32, as PyTorch computes it."""

    size: int
    full: int
    scale: float

    @classmethod
    def make(cls, size: int, full: int, align_corners: bool) -> "_Axis":
        if align_corners:
            return cls(size, full, float(np.float32(size - 1) / np.float32(full - 1)) if full > 1 else 0.0)
        return cls(size, full, float(np.float32(size) / np.float32(full)))

    def pixels_near(self, count: int) -> int:
        """At most so many pixels are interpolated from one of ``count`` neighbours (count + 1 cells)."""
        if self.scale == 0:
            return self.full
        exact = math.frexp(self.scale)[0] == 0.5 and self.size == self.scale * self.full  # else rounding may add one
        return min(self.full, math.ceil((count + 1) / self.scale) + (not exact))


def gradient_tile(vertical: _Axis, horizontal: _Axis, block: int) -> tuple[int, int]:
    """Rows and columns of logits whose gradient one block writes: their pixels fit in a row of ``block`` threads."""
    columns = min(horizontal.size, block)
    while columns > 1 and horizontal.pixels_near(columns) > block:
        columns -= 1
    if horizontal.pixels_near(columns) > block:
        return 1, 1
    rows = 1 if vertical.scale == 0 else round(_GRADIENT_ROWS * vertical.scale)
    return max(1, min(rows, vertical.size, _GRADIENT_ROWS)), columns


def _axes(logits: Tensor, target: Tensor, align_corners: bool) -> tuple[_Axis, _Axis]:
    vertical, horizontal = (
        _Axis.make(size, full, align_corners) for size, full in zip(logits.shape[-2:], target.shape[-2:], strict=True)
    )
    return vertical, horizontal


def _geometry(
    logits: Tensor, target: Tensor, vertical: _Axis, horizontal: _Axis, align_corners: bool
) -> list[Argument]:
    """The arguments that both passes begin with."""
    sizes = (logits.shape[1], vertical.size, horizontal.size, vertical.full, horizontal.full)
    return [logits, *logits.stride(), target, *sizes, vertical.scale, horizontal.scale, int(align_corners)]


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Make a CUDA device current, and its context that of this thread, as a launch through the driver needs it.

    Entering ``torch.cuda.device`` does nothing where the number is current already, as 0 is in a new thread, such as
    that of a backward pass. ``set_device`` always tells CUDA, which then binds the context (pytorch#195256).
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.set_device(torch.cuda.current_device())
        yield


def _blocks(*counts: int) -> int:
    blocks = math.prod(counts)
    if blocks >= 2**31:
        raise ValueError(f"{blocks} blocks of threads are more than a CUDA grid has (2^31 - 1): use a smaller batch")
    return blocks


@torch.library.custom_op("bisenet::ohem_cross_entropy", mutates_args=())
def ohem(
    logits: Tensor,
    target: Tensor,
    hard_loss: float,
    numerator: int,
    denominator: int,
    kept_only: bool,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass.

    Args:
        logits: (N, C, h, w), float32, float16 or bfloat16, any strides.
        target: (N, H, W), uint8 or int64.
        hard_loss: a pixel is hard above this loss.
        numerator: n_min, or its numerator as a fraction of the valid pixels.
        denominator: of that fraction, or 0.
        kept_only: divide by the number kept, not by the larger of it and n_min.
        ignore_index: label that does not count.
        align_corners: as in ``interpolate``.

    Returns:
        loss, number kept, and for the backward pass the loss map (N, H, W) and the selection (cut, share, scale).
    """
    target = target.contiguous()
    losses = logits.new_empty(target.shape, dtype=torch.float32)
    new = logits.new_empty if losses.numel() else logits.new_zeros  # the kernel writes them, where it runs
    loss, kept = new((), dtype=torch.float32), new((), dtype=torch.int64)
    selection = new(3, dtype=torch.float32)
    if not losses.numel():
        return loss, kept, losses, selection
    with _on(logits.device):
        kernels = library(logits.device, specialize(logits.dtype, target.dtype, logits.shape[1]))
        vertical, horizontal = _axes(logits, target, align_corners)
        grid = _blocks(len(target), -(-vertical.full // _TILE_ROWS), -(-horizontal.full // kernels.block))
        refine_grid = min(8 * kernels.multiprocessors, -(-losses.numel() // kernels.block))
        state = logits.new_zeros(_STATE_WORDS, dtype=torch.int64)
        slots = logits.new_empty(max(grid, refine_grid), dtype=torch.float64)
        kernels.launch(
            "ohem_forward",
            grid,
            *_geometry(logits, target, vertical, horizontal, align_corners),
            len(target),
            ignore_index,
            float(hard_loss),
            numerator,
            denominator,
            int(kept_only),
            _TILE_ROWS,
            losses,
            *(results := (state, slots, selection, loss, kept)),
        )
        for level in range(3):
            kernels.launch("ohem_refine", refine_grid, losses, losses.numel(), level, *results)
    return loss, kept, losses, selection


@ohem.register_fake
def _(logits, target, hard_loss, numerator, denominator, kept_only, ignore_index, align_corners):
    scalar = logits.new_empty((), dtype=torch.float32)
    kept = logits.new_empty((), dtype=torch.int64)
    losses = logits.new_empty(target.shape, dtype=torch.float32)
    return scalar, kept, losses, logits.new_empty(3, dtype=torch.float32)


@torch.library.custom_op("bisenet::ohem_cross_entropy_backward", mutates_args=())
def ohem_backward(
    upstream: Tensor, logits: Tensor, target: Tensor, losses: Tensor, selection: Tensor, align_corners: bool
) -> Tensor:
    """Gradient of the logits, in their memory format, from the gradient of the loss (0-d float32)."""
    target = target.contiguous()
    gradient = torch.empty_like(logits)
    if not losses.numel() or not gradient.numel():
        return gradient.zero_()
    with _on(logits.device):
        kernels = library(logits.device, specialize(logits.dtype, target.dtype, logits.shape[1]))
        vertical, horizontal = _axes(logits, target, align_corners)
        rows, columns = gradient_tile(vertical, horizontal, kernels.block)
        classes = logits.shape[1]
        chunks = 1 if classes <= MAX_SPECIALIZED_CLASSES else -(-classes // 16)
        grid = _blocks(chunks, len(logits), -(-vertical.size // rows), -(-horizontal.size // columns))
        geometry = _geometry(logits, target, vertical, horizontal, align_corners)
        kernels.launch(
            "ohem_backward",
            grid,
            *geometry,
            losses,
            selection,
            upstream.contiguous(),
            rows,
            columns,
            gradient,
            *gradient.stride(),
        )
    return gradient


@ohem_backward.register_fake
def _(upstream, logits, target, losses, selection, align_corners):
    return torch.empty_like(logits)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *_, align_corners = inputs
    _, kept, losses, selection = output
    ctx.mark_non_differentiable(kept, losses, selection)
    ctx.save_for_backward(logits, target, losses, selection)
    ctx.align_corners = align_corners


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return ohem_backward(upstream, *ctx.saved_tensors, ctx.align_corners), *[None] * 7


ohem.register_autograd(_backward, setup_context=_keep_for_backward)
