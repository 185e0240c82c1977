"""The CUDA kernel of the loss: ``kernels/ohem/ohem.cu``, compiled when it is first used, as PyTorch operators.

The source is compiled by NVRTC through cuda.core for the device at hand; neither nvcc nor a host compiler is needed.
The result is kept in cuda.core's program cache (``~/.cache/cuda-python/program-cache``, moved by ``XDG_CACHE_HOME``).
``kernels/README.md`` describes the algorithm; :func:`bisenet.losses.ohem_cross_entropy` is the public function.
Shapes: N images, C classes, (h, w) the size of a head, (H, W) the size of the labels.
"""

import logging
import math
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

LOGIT_TYPES = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
LABEL_TYPES = {torch.uint8: "uint8", torch.int64: "int64"}
IGNORED = 255  # label of the pixels that do not count
KERNELS = ("ohem_forward", "ohem_refine", "ohem_backward")
MAX_SPECIALIZED_CLASSES = 32  # up to this number the kernel is compiled for it, and a pixel's logits fit in registers
_CHUNK = 16  # with more classes, a block of the backward pass takes this many
_TILE_ROWS = 32  # rows of pixels that a block of the forward pass walks down; the most that the source has room for
_GRADIENT_ROWS = 64  # rows of pixels that a block of the backward pass walks down, approximately
_WARP = 32  # threads in a warp
_MOST_GRADIENT_ROWS = 63  # the most rows of logits that the source has room for
_STATE_WORDS = 10 + 3 * 2048  # size of ``State`` in the source, in words of 64 bits

Argument = Tensor | int | float


class Specialization(NamedTuple):
    """Types and class count that the source is compiled for."""

    logit: str
    label: str
    classes: int  # 0: any number
    offset: str = "int"  # type of the offset between two logits or two pixels of an image

    @property
    def block(self) -> int:
        """Threads in a block; fewer for many classes, because shared memory grows with classes and threads."""
        return 64 if self.classes > 20 else 128

    @property
    def macros(self) -> list[tuple[str, str]]:
        """Preprocessor definitions."""
        return [(f"OHEM_{name.upper()}", str(value)) for name, value in self._asdict().items()]


def source_path() -> Path:
    """``ohem.cu``: beside the package in a wheel, in ``kernels/`` of a checkout."""
    package = Path(__file__).parent
    inside = package / "kernels" / "ohem" / "ohem.cu"
    return inside if inside.is_file() else package.parent / "kernels" / "ohem" / "ohem.cu"


def compile_source(arch: str, specialization: Specialization, *, cache: Any = None, logs: Any = None) -> Any:
    """Compile the source to a cubin, a ``cuda.core.ObjectCode``; needs no GPU.

    Args:
        arch: architecture such as ``sm_90``.
        specialization: types and class count to compile for.
        cache: ``cuda.core.utils.ProgramCacheResource`` to look in first; None: always compile.
        logs: object with a method ``write`` that gets ptxas' report of registers and spills; None: no report.
    """
    from cuda.core import Program, ProgramOptions  # type: ignore[attr-defined]

    settings: dict[str, Any] = {"define_macro": specialization.macros, "ptxas_options": ["-v"] if logs else None}
    options = ProgramOptions(name="ohem.cu", arch=arch, std="c++17", **settings)
    return Program(source_path().read_text(), "c++", options).compile("cubin", logs=logs, cache=cache)


def _load(arch: str, specialization: Specialization) -> dict[str, Any]:
    """Return the kernels by name, from the cache on disk or compiled. A cache that fails is not used."""
    from cuda.core.utils import FileStreamProgramCache  # type: ignore[import-not-found]

    def kernels(cache: Any) -> dict[str, Any]:
        code = compile_source(arch, specialization, cache=cache)
        return {name: code.get_kernel(name) for name in KERNELS}

    try:
        return kernels(FileStreamProgramCache())
    except Exception as error:  # a folder that cannot be written, a damaged entry
        compiled = kernels(None)  # raises again if the cache was not the cause
        _warn_once(f"compiled without cuda.core's cache of programs, which failed: {type(error).__name__}: {error}")
        return compiled


_warn_once = cache(log.warning)


class Library:
    """Compiled kernels on one device."""

    def __init__(self, device: int, specialization: Specialization) -> None:
        from cuda.core import Device, LaunchConfig, Stream, launch  # type: ignore[attr-defined]

        major, minor = torch.cuda.get_device_capability(device)
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self.block = specialization.block
        Device(device).set_current()
        self._kernels = _load(f"sm_{major}{minor}", specialization)
        self._config = lru_cache(lambda grid: LaunchConfig(grid=grid, block=self.block))
        self._launch, self._stream = launch, lru_cache(maxsize=128)(Stream.from_handle)

    def launch(self, kernel: str, grid: int, *arguments: Argument) -> None:
        """Start ``grid`` blocks on the current stream; tensors become pointers, ints have 64 bits and floats 32."""
        stream = self._stream(torch.cuda.current_stream().cuda_stream or 1)  # 1: CU_STREAM_LEGACY; 0 may be another
        pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        values = [np.float32(value) if type(value) is float else value for value in pointers]
        self._launch(stream, self._config(grid), self._kernels[kernel], *values)


@cache
def library(device: torch.device, specialization: Specialization) -> Library:
    """The kernels for a CUDA device, compiled once per process."""
    return Library(torch.cuda.current_device() if device.index is None else device.index, specialization)


def specialize(
    dtype: torch.dtype = torch.float16, label_dtype: torch.dtype = torch.uint8, classes: int = 19, wide: bool = False
) -> Specialization:
    """Return the specialization for these dtypes and this number of classes; ``wide``: 64-bit offsets."""
    known, offset = classes if classes <= MAX_SPECIALIZED_CLASSES else 0, "int64" if wide else "int"
    return Specialization(LOGIT_TYPES[dtype], LABEL_TYPES[label_dtype], known, offset)


def missing() -> str | None:
    """Return a message if a CUDA device or cuda.core is missing, None if both are there. Touches no device."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        __import__("cuda.core")
    except ImportError as error:
        return f"{error}: install the extra `cuda` (pip install -e '.[cuda]')"
    return None


def why_not(device: torch.device | None = None, *types: Any) -> str | None:
    """Return why the kernel cannot run on a device, or None if it can. This compiles the kernel.

    Args:
        device: CUDA device; None: the current one.
        types: arguments of :func:`specialize`.

    Raises:
        RuntimeError: a CUDA graph is being captured, which cannot contain a compilation.
    """
    if reason := missing():
        return reason
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the loss compiles its kernel at the first call: call it once before capturing a CUDA graph")
    device = device or torch.device("cuda", torch.cuda.current_device())
    try:
        with _on(device):
            library(device, specialize(*types))
    except Exception as error:  # the compiler and the driver may raise anything
        return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------------------------------------------ operators


class _Axis(NamedTuple):
    """One axis of the upsampling; ``scale`` is logits per full-size pixel in float32, as PyTorch computes it."""

    size: int
    full: int
    scale: float

    @classmethod
    def make(cls, size: int, full: int, align_corners: bool) -> "_Axis":
        parts, whole = (size - 1, full - 1) if align_corners else (size, full)
        return cls(size, full, float(np.float32(parts) / np.float32(whole)) if whole else 0.0)

    def pixels_near(self, count: int) -> int:
        """Upper bound of the pixels interpolated from any of ``count`` neighbouring logits (count + 1 cells)."""
        if self.scale == 0:
            return self.full
        exact = math.frexp(self.scale)[0] == 0.5 and self.size == self.scale * self.full  # else rounding may add one
        return min(self.full, math.ceil((count + 1) / self.scale) + (not exact))

    def pixels_beside(self, count: int) -> int:
        """Number of neighbouring pixels that need at most ``count`` logits, wherever they begin."""
        return self.full if self.scale == 0 else 1 + math.floor(max(count - 3, 0) / self.scale)


class _Plan(NamedTuple):
    """How both passes are launched. A tile is (rows, columns): of pixels forward, of logits backward."""

    geometry: tuple[Argument, ...]  # the source's geometry arguments, without tensors
    grids: tuple[int, int]  # blocks of the forward and of the backward pass
    forward_tile: tuple[int, int]
    backward_tile: tuple[int, int]


@lru_cache(maxsize=256)
def _plan(shapes: tuple[torch.Size, ...], align_corners: bool, specialization: Specialization, block: int) -> _Plan:
    (images, classes, *size), strides, (_, *full) = shapes  # of logits, their strides, of labels
    most = specialization.block // 2  # columns of logits that shared memory has room for, without those at the rim
    vertical, horizontal = (_Axis.make(*sizes, align_corners) for sizes in zip(size, full, strict=True))
    width = min(block, horizontal.pixels_beside(most + 3))
    fitting = (n for n in range(min(horizontal.size, most), 0, -1) if horizontal.pixels_near(n) <= block)
    # As many columns as have pixels for one row of threads. If not even one fits, a block takes one logit in turns.
    columns = next(fitting, 0)
    if 2 < columns < horizontal.size and (columns + 2) % _WARP <= 2:
        columns -= (columns + 2) % _WARP  # one warp less is needed to copy these columns and the two beside them
    rows = min(max(round(_GRADIENT_ROWS * vertical.scale), 1), vertical.size, _MOST_GRADIENT_ROWS) if columns else 1
    columns = max(columns, 1)
    chunks = 1 if specialization.classes else -(-classes // _CHUNK)
    forward = images * -(-vertical.full // _TILE_ROWS) * -(-horizontal.full // width)
    backward = chunks * images * -(-vertical.size // rows) * -(-horizontal.size // columns)
    if vertical.full >= 2**24:
        raise ValueError(f"{vertical.full} rows of pixels: the kernel numbers fewer than 2^24, in float32")
    geometry = (*strides, *shapes[0], *full, vertical.scale, horizontal.scale, int(align_corners))
    return _Plan(geometry, (forward, backward), (_TILE_ROWS, width), (rows, columns))


def _prepare(logits: Tensor, target: Tensor, align_corners: bool) -> tuple[Library, _Plan]:
    _, classes, height, width = logits.shape
    farthest = max(classes * height * width, classes * logits.stride(1) + width * logits.stride(3), target[0].numel())
    specialization = specialize(logits.dtype, target.dtype, classes, farthest >= 2**31)
    kernels = library(logits.device, specialization)
    shapes = logits.shape, torch.Size(logits.stride()), target.shape
    return kernels, _plan(shapes, align_corners, specialization, kernels.block)


@contextmanager
def _on(device: torch.device) -> Generator[None]:
    """Make a CUDA device current and bind its context to this thread, which a launch through the driver needs.

    ``torch.cuda.device`` does nothing if the device is already current, as device 0 is in a new thread, for example in
    a backward pass. ``set_device`` always calls CUDA, which then binds the context (pytorch#195256).
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.set_device(torch.cuda.current_device())
        yield


@torch.library.custom_op("bisenet::ohem_cross_entropy", mutates_args=())
def ohem(
    logits: Tensor,
    target: Tensor,
    hard_loss: float,
    numerator: int,
    denominator: int,
    kept_only: bool,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward pass of the loss.

    Args:
        logits: (N, C, h, w), float32, float16 or bfloat16, any strides.
        target: (N, H, W), uint8 or int64.
        hard_loss, numerator, denominator, kept_only: the fields of :class:`bisenet.losses.Rule`.
        align_corners: as in ``torch.nn.functional.interpolate``.

    Returns:
        The loss (0-d float32), the number of pixels kept (0-d int64), and for the backward pass the loss map
        (N, H, W) float32 and the selection (3,) float32.
    """
    target = target.contiguous()
    new = logits.new_empty if target.numel() else logits.new_zeros  # without pixels no kernel runs
    loss, losses, selection = (new(shape, dtype=torch.float32) for shape in ((), target.shape, 3))
    kept = new((), dtype=torch.int64)
    if not losses.numel():
        return loss, kept, losses, selection
    with _on(logits.device):
        kernels, plan = _prepare(logits, target, align_corners)
        refine_grid = min(8 * kernels.multiprocessors, -(-losses.numel() // kernels.block))
        state = logits.new_zeros(_STATE_WORDS, dtype=torch.int64)
        slots = logits.new_empty(max(plan.grids[0], refine_grid), dtype=torch.float64)
        rule = float(hard_loss), numerator, denominator, int(kept_only)
        results = state, slots, selection, loss, kept
        given = (logits, target, *plan.geometry, *rule, *plan.forward_tile, losses)
        kernels.launch("ohem_forward", plan.grids[0], *given, *results)
        for level in range(3):
            kernels.launch("ohem_refine", refine_grid, losses, losses.numel(), level, *results)
    return loss, kept, losses, selection


@ohem.register_fake
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, losses, selection = (logits.new_empty(shape, dtype=torch.float32) for shape in ((), target.shape, (3,)))
    return loss, logits.new_empty((), dtype=torch.int64), losses, selection


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
        kernels, plan = _prepare(logits, target, align_corners)
        given = (logits, target, *plan.geometry, losses, selection, upstream.contiguous(), *plan.backward_tile)
        kernels.launch("ohem_backward", plan.grids[1], *given, gradient, *gradient.stride())
    return gradient


@ohem_backward.register_fake
def _(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, *_, align_corners = inputs
    _, kept, losses, selection = output
    ctx.mark_non_differentiable(kept, losses, selection)
    ctx.set_materialize_grads(False)  # else autograd allocates zeros for each output, also for the loss map
    ctx.save_for_backward(logits, target, losses, selection)
    ctx.align_corners = align_corners


def _backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = None if upstream is None else ohem_backward(upstream, *ctx.saved_tensors, ctx.align_corners)
    return gradient, *[None] * 6


ohem.register_autograd(_backward, setup_context=_keep_for_backward)
