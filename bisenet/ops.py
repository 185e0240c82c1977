"""Pixel losses on logits at the heads' own stride: bilinear upsampling, cross entropy and hard example mining in one.

The heads answer at stride 2 to 16 and the labels have full size, so the upsampling is part of the loss: it need never
exist as a whole. Online hard example mining (arXiv 1604.03540), here over pixels, averages only the pixels that the
network still gets wrong, and at least a given number of them.

Shapes: N images, C classes, (h, w) the size of a head, (H, W) the size of the labels.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from bisenet import kernel

log = logging.getLogger(__name__)

NORMALIZERS = ("kept", "at_least_n_min")
IMPLEMENTATIONS = ("auto", "torch", "cuda")

_TILE = 64
"""Side of the square of full-size pixels upsampled at a time on the CPU: 19 classes of it stay in the L2 cache."""
_FEW = 4
"""With fewer threads than this the loss takes one of them."""


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float,
    min_kept: float | int,
    normalizer: str,
    ignore_index: int,
    align_corners: bool,
    class_weights: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the hard pixels of a batch.

    A pixel is valid when its label is not ``ignore_index``, and hard when the probability of its label is below
    ``threshold``. If fewer than n_min pixels are hard, the n_min valid ones with the largest losses are kept instead;
    pixels that tie for the last places share the remaining weight equally, so that value and gradient are
    deterministic.

    Args:
        logits: float32, float16, bfloat16 (computed in float32) or float64 (N, C, h, w), upsampled bilinearly to
            (H, W) unless they have that size.
        target: uint8 or int64 (N, H, W), class in [0, C) or ``ignore_index``.
        threshold: probability in (0, 1].
        min_kept: n_min: a float in [0, 1] is a fraction of the valid pixels, rounded down (1/16: ``valid // 16``);
            an int is a count, of which no more can be kept than are valid.
        normalizer: divide by the number ``kept``, or by ``at_least_n_min`` = max(kept, n_min), n_min as asked for.
        ignore_index: label of pixels without a class; may lie outside the range of ``target``'s dtype.
        align_corners: as in ``torch.nn.functional.interpolate``.
        class_weights: float (C,), at least 0. Pixels are selected by their unweighted losses; the mean over those kept
            is then the weighted one, sum(w l) / sum(w), times kept / divisor where the divisor is not their number.
        impl: ``torch`` is PyTorch code for any device, ``cuda`` the fused kernel (``kernels/README.md``), ``auto`` the
            kernel where it runs: on CUDA, unless the logits are float64, there are ``class_weights``, it cannot be
            compiled, or it fails a small example. The log says once which of them runs, and why.

    Returns:
        The loss (float32, or float64 for float64 logits) and the number of pixels kept (int64), both 0-d. Nothing
        kept (an empty batch, all ignored, nothing hard and n_min 0): loss 0 with gradient 0. A NaN anywhere in the
        logits makes the loss NaN. Infinite logits are followed where nothing is upsampled (a class at -inf has
        probability 0) and otherwise give infinity or NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit; an impossible ``min_kept``; on the CPU, labels that are neither a
            class nor ``ignore_index``. On other devices these make the loss NaN, since raising would stall the device.
            ``impl="cuda"`` with tensors that the kernel does not take.
        RuntimeError: ``impl="cuda"`` where the kernel cannot be built, or fails a small example.
    """
    _check(logits, target)
    hard_loss = -math.log(threshold)
    if _use_kernel(impl, logits, target, class_weights):
        at_least, divisor = as_fraction(min_kept)
        kept_only = normalizer == "kept"
        return kernel.ohem(logits, target, hard_loss, at_least, divisor, kept_only, ignore_index, align_corners)[:2]
    on_host = logits.device.type == "cpu"
    with _calmly(on_host):
        losses, valid = _pixel_losses(logits, target, ignore_index, align_corners, on_host)
        at_least, divisor = as_fraction(min_kept)
        n_min = valid * at_least // divisor if divisor else torch.full_like(valid, at_least)
        n_least = torch.minimum(n_min, valid)
        if class_weights is None:
            total, kept = _sum_of_hardest(losses, hard_loss, n_least, on_host)
        else:
            share, kept = _kept_share(losses.masked_fill(target == ignore_index, -1.0), hard_loss, n_least, on_host)
            total = kept * _weighted_mean(losses, share, target, class_weights)
        return _mean(total, kept if normalizer == "kept" else torch.maximum(kept, n_min), logits), kept


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
    class_weights: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the valid pixels, and their number: :func:`ohem_cross_entropy` that keeps them all.

    With ``class_weights`` it is the weighted mean of ``torch.nn.CrossEntropyLoss``.
    """
    _check(logits, target)
    if _use_kernel(impl, logits, target, class_weights):
        everything = -0.5  # a loss is never negative, so all are above this one
        return kernel.ohem(logits, target, everything, 0, 0, True, ignore_index, align_corners)[:2]
    on_host = logits.device.type == "cpu"
    with _calmly(on_host):
        losses, valid = _pixel_losses(logits, target, ignore_index, align_corners, on_host)
        if class_weights is None:
            return _mean(losses.sum(), valid, logits), valid
        total = valid * _weighted_mean(losses, target != ignore_index, target, class_weights)
        return _mean(total, valid, logits), valid


def _weighted_mean(losses: Tensor, share: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Mean of the losses weighted by ``share`` (0 where the label is ignored) and class; 0 where the weights are."""
    weights = share * class_weights.to(losses)[target.long().clamp(0, len(class_weights) - 1)]
    total = weights.sum()
    return (weights * losses).sum() / torch.where(total > 0, total, 1.0)


def _kept_share(losses: Tensor, threshold: float, n_min: Tensor, on_host: bool) -> tuple[Tensor, Tensor]:
    """With what share in [0, 1] :func:`_sum_of_hardest` keeps each pixel, and the number kept.

    The sum is linear in the losses that it keeps, so the shares are its gradient.
    """
    with torch.enable_grad():
        leaf = losses.detach().requires_grad_()
        total, kept = _sum_of_hardest(leaf, threshold, n_min, on_host)
        return torch.autograd.grad(total, leaf)[0], kept


def require_implementation(impl: str) -> None:
    """Raise, before anything expensive, where ``impl`` is unknown (ValueError) or cannot be built (RuntimeError)."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: got {impl!r}, accepted: {' | '.join(IMPLEMENTATIONS)}")
    if impl == "cuda" and (reason := kernel.why_not()):
        raise RuntimeError(f"impl 'cuda': the kernel cannot be built: {reason}")


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.ndim != 4 or target.ndim != 3 or len(logits) != len(target):
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} do not fit together; "
            "accepted are (N, C, h, w) and (N, H, W)"
        )
    if target.dtype not in kernel.LABEL_TYPES:
        raise ValueError(f"target has dtype {target.dtype}; accepted are torch.uint8 and torch.int64")


def _use_kernel(impl: str, logits: Tensor, target: Tensor, class_weights: Tensor | None) -> bool:
    if impl == "torch" or (impl == "auto" and class_weights is not None):
        return False
    if class_weights is not None:
        raise ValueError(
            "impl: got 'cuda' with class_weights, accepted: auto or torch; the kernel has no class weights"
        )
    return _known_to_run(impl, logits.device, logits.dtype, target.dtype, logits.shape[1])


@torch.compiler.assume_constant_result
def _known_to_run(*arguments: Any) -> bool:
    return _kernel_runs(*arguments)  # torch.compile would look through the cache if it were decorated itself


@cache
def _kernel_runs(impl: str, device: torch.device, dtype: torch.dtype, label_dtype: torch.dtype, classes: int) -> bool:
    """Whether the kernel runs; says so, once for each kind of argument."""
    if device.type != "cuda" or dtype not in kernel.LOGIT_TYPES:
        if impl == "cuda":
            raise ValueError(
                f"impl: got 'cuda' with {dtype} logits on {device}; the kernel takes "
                f"{', '.join(map(str, kernel.LOGIT_TYPES))} on a CUDA device (impl 'auto' and 'torch' take any)"
            )
        log.info("loss: PyTorch implementation, for %s logits on %s", dtype, device)
        return False
    reason = kernel.why_not(device, kernel.specialize(dtype, label_dtype, classes))
    reason = reason or _disagreement(device, dtype, label_dtype, classes)
    if reason and impl == "cuda":
        raise RuntimeError(f"impl 'cuda': the kernel does not run here: {reason}")
    if reason:
        log.warning("loss: PyTorch implementation, because the CUDA kernel does not run here: %s", reason)
    else:
        log.info("loss: CUDA kernel, for %s logits of %d classes on %s", dtype, classes, device)
    return not reason


def _disagreement(device: torch.device, dtype: torch.dtype, label_dtype: torch.dtype, classes: int) -> str | None:
    """What the kernel gets wrong in a small example; None where it agrees with the PyTorch implementation.

    A device or a driver that nobody has tested must not train on a wrong loss.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        draw = torch.Generator().manual_seed(0)
        example = torch.randn(2, classes, 5, 9, generator=draw).to(device, dtype)
        target = torch.randint(classes, (2, 37, 70), generator=draw).to(device, label_dtype)
        target[:, :5] = 255
        for hard_loss, n_min in ((math.log(classes), 0), (50.0, 1000)):  # enough are hard; none is
            theirs, ours = (example.clone().requires_grad_() for _ in range(2))
            rule: dict[str, Any] = {"threshold": math.exp(-hard_loss), "min_kept": n_min, "normalizer": "kept"}
            rule |= {"ignore_index": 255, "align_corners": False}
            expected, _ = ohem_cross_entropy(theirs, target, **rule, impl="torch")
            try:
                found = kernel.ohem(ours, target, hard_loss, n_min, 0, True, 255, False)[0]
                gradients = torch.autograd.grad(found, ours)[0], torch.autograd.grad(expected, theirs)[0]
            except Exception as error:  # whatever the driver says
                return f"{type(error).__name__}: {error}"
            # A pixel on the edge of being hard may be kept by one of them.
            error = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max().clamp(min=1e-4)
            if not (abs(found - expected) <= 1e-4 + 0.02 * abs(expected) and error <= 0.1):
                return (
                    f"its loss for an example is {found:.5f} instead of {expected:.5f}, gradients differ by {error:.1%}"
                )
    return None


def _mean(total: Tensor, count: Tensor, logits: Tensor) -> Tensor:
    """``total / count``, 0 when nothing counts, NaN when a logit is (though it may touch ignored pixels only)."""
    if logits.numel():
        total = total * torch.where(logits.detach().amax().isnan(), math.nan, 1.0)
    return total / count.clamp(min=1)


def as_fraction(min_kept: float | int) -> tuple[int, int]:
    """n_min as a share of the valid pixels, exact in integers (0.29 of 100 is 29, in float 28); a count is over 0.

    Raises:
        ValueError: neither a fraction nor a count that fits into 64 bits.
    """
    possible = min_kept < 2**63 if isinstance(min_kept, int) else min_kept <= 1
    if not (min_kept >= 0 and possible):
        raise ValueError(
            f"min_kept: got {min_kept}, accepted: a float in [0, 1] (fraction) or an int in [0, 2^63) (count)"
        )
    if isinstance(min_kept, int):
        return min_kept, 0
    return Fraction(min_kept).limit_denominator(10**9).as_integer_ratio()


def _sum_of_hardest(losses: Tensor, threshold: float, n_min: Tensor, on_host: bool) -> tuple[Tensor, Tensor]:
    """Sum the losses above ``threshold``, or the ``n_min`` largest where fewer are above, and count the summands.

    Away from the host nothing is read back from the device: both cases are computed and one is chosen there.
    """
    hard = F.threshold(losses, threshold, 0.0)  # zeroes what is <= threshold, and therefore lets a NaN through
    n_hard = hard.count_nonzero()
    if losses.numel() == 0 or (on_host and n_hard >= n_min):
        return hard.sum(), n_hard

    flat = losses.detach().flatten()
    if on_host:
        nth_largest = flat.kthvalue(flat.numel() - int(n_min) + 1).values
    else:
        nth_largest = flat.sort(descending=True).values.gather(0, (n_min - 1).clamp(min=0).view(1))[0]
    too_few = n_hard < n_min
    cut = torch.where(too_few, nth_largest, threshold)
    above = ~(losses <= cut)
    at_cut = losses == cut
    share = torch.where(too_few, (n_min - above.sum()).to(losses.dtype) / at_cut.sum(), 0.0)
    total = torch.where(above, losses, 0.0).sum() + share * torch.where(at_cut, losses, 0.0).sum()
    return total, torch.where(too_few, n_min, n_hard)


def _pixel_losses(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool, on_host: bool
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every pixel (N, H, W), 0 where ignored, and the number of valid pixels (0-d int64)."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    classes = logits.shape[1]
    if not 0 <= ignore_index < 256 or classes > 256:
        target = target.long()  # a comparison in uint8 would wrap these numbers
    ignored = target == ignore_index
    unknown = ~ignored & ((target < 0) | (target > classes - 1))
    if on_host and unknown.any():
        ids = target[unknown].unique().tolist()
        raise ValueError(
            f"target holds {ids}; accepted are the classes 0 to {classes - 1} and the ignore_index {ignore_index}"
        )
    labels = target.masked_fill(ignored | unknown, 0)

    full_size = target.shape[-2:]
    if on_host and logits.shape[-2:] != full_size:
        losses = cast(Tensor, _TiledCrossEntropy.apply(logits, labels, align_corners))
    else:
        if logits.shape[-2:] != full_size:
            logits = F.interpolate(logits, full_size, mode="bilinear", align_corners=align_corners)
        losses = F.cross_entropy(logits, labels.long(), reduction="none")
    if not on_host:
        losses = losses * torch.ones_like(losses).masked_fill(unknown, math.nan)
    return losses.masked_fill(ignored, 0.0), ignored.numel() - ignored.count_nonzero()


class _TiledCrossEntropy(torch.autograd.Function):
    """Cross entropy of bilinearly upsampled logits for the CPU, one small tile at a time, recomputed backward.

    Tiles stay in cache, which is faster than upsampling the whole although it is done twice, and no tensor as large as
    the full-size logits is made. Tiles without gradient (nothing hard in them) are skipped.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # keeps autocast away from the matrix products
    def forward(ctx: Any, logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        sizes = zip(logits.shape[2:], labels.shape[1:], strict=True)
        ctx.spans = [_spans(*size, align_corners, logits.dtype) for size in sizes]
        losses = logits.new_empty(labels.shape)

        def score(n: int) -> None:
            for rows in ctx.spans[0]:
                band = rows.weights @ logits[n, :, rows.source]  # (C, <= 64, w)
                for cols in ctx.spans[1]:
                    tile = band[:, :, cols.source] @ cols.weights.T  # (C, <= 64, <= 64)
                    here = n, rows.pixels, cols.pixels
                    losses[here] = F.cross_entropy(tile[None], labels[here].long()[None], reduction="none")[0]

        _for_each_image(score, len(logits))
        return losses

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)

        def differentiate(n: int) -> None:
            for rows in ctx.spans[0]:
                band = rows.weights @ logits[n, :, rows.source]
                grad_band = torch.zeros_like(band)
                for cols in ctx.spans[1]:
                    here = n, rows.pixels, cols.pixels
                    if not grad[here].any():
                        continue
                    grad_tile = torch.softmax(band[:, :, cols.source] @ cols.weights.T, 0)
                    label = labels[here].long()[None]
                    grad_tile.scatter_add_(0, label, grad_tile.new_full((), -1.0).expand(label.shape))
                    grad_tile *= grad[here]
                    grad_band[:, :, cols.source] += grad_tile @ cols.weights
                grad_logits[n, :, rows.source] += rows.weights.T @ grad_band

        _for_each_image(differentiate, len(logits))
        return grad_logits, None, None


def _for_each_image(work: Callable[[int], None], images: int) -> None:
    """Call ``work`` for each image, on half as many threads as PyTorch has, each of them without parallel regions.

    A parallel region per tile costs more than the tile when other processes keep the cores busy; and PyTorch's own
    threads wait for work by keeping them busy.
    """
    inference = torch.is_inference_mode_enabled()

    def alone(image: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # these modes belong to the calling thread
            work(image)

    with _without_parallel_regions() as threads:
        if threads < _FEW or images < 2:
            for image in range(images):
                work(image)
        else:
            with ThreadPoolExecutor(min(threads // 2, images), "loss", torch.set_num_threads, (1,)) as pool:
                list(pool.map(alone, range(images)))


def _calmly(on_host: bool) -> AbstractContextManager[object]:
    """On the CPU with few threads, without parallel regions: waiting for a busy core costs more than they save."""
    return _without_parallel_regions() if on_host and torch.get_num_threads() < _FEW else nullcontext()


class _Callers:
    """Those inside :func:`_without_parallel_regions`, and the number of threads that PyTorch had before the first."""

    lock = threading.Lock()
    inside = 0
    threads = 1
    own = threading.local()  # `inside` is set in a thread that is


@contextmanager
def _without_parallel_regions() -> Iterator[int]:
    """PyTorch on one thread, for this thread and those that start meanwhile; yields how many it had.

    The number belongs to a thread, and that of new threads to all: a thread that first comes here while another is
    inside finds the other's 1, which it must not put back when it leaves after it.
    """
    if getattr(_Callers.own, "inside", False):
        yield _Callers.threads
        return
    with _Callers.lock:
        if not _Callers.inside:
            _Callers.threads = torch.get_num_threads()
        _Callers.inside += 1
        threads = _Callers.threads
        torch.set_num_threads(1)
    _Callers.own.inside = True
    try:
        yield threads
    finally:
        _Callers.own.inside = False
        with _Callers.lock:
            _Callers.inside -= 1
            torch.set_num_threads(threads)


class _Span(NamedTuple):
    """Up to 64 full-size pixels along one axis: which they are, what they are interpolated from, and how."""

    pixels: slice
    source: slice
    weights: Tensor  # (pixels, source)


@lru_cache(maxsize=64)
def _spans(size: int, full_size: int, align_corners: bool, dtype: torch.dtype) -> tuple[_Span, ...]:
    """Cut one axis into tiles. The weights are torch's own: what it makes of the unit vectors."""
    unit = torch.eye(size, dtype=dtype)[None]
    weights = F.interpolate(unit, full_size, mode="linear", align_corners=align_corners)[0].T  # (full_size, size)
    spans = []
    for start in range(0, full_size, _TILE):
        used = weights[start : start + _TILE].any(0).nonzero()
        source = slice(int(used[0]), int(used[-1]) + 1)
        pixels = slice(start, start + _TILE)
        spans.append(_Span(pixels, source, weights[pixels, source].contiguous()))
    return tuple(spans)
