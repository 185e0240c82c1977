"""Losses on logits at the heads' own stride: bilinear upsampling, cross entropy and hard example mining in one.

The heads give logits at strides 2 to 32 and the labels have full size. Upsampling is part of the loss, so that the
full-size logits never have to exist as a whole. Online hard example mining (arXiv 1604.03540), here over pixels,
averages only the pixels with a large loss, and at least a given number of them.

Shapes: N images, C classes, (h, w) the size of a head, (H, W) the size of the labels. Pixels labelled 255 do not count.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import logging
import math
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bisenet import kernel

if TYPE_CHECKING:
    from bisenet.networks import SegmentationOutput

log = logging.getLogger(__name__)

_TILE = 64  # side in full-size pixels of a tile that the CPU upsamples at a time: 19 classes of it stay in cache
_THREADS_LOCK = threading.RLock()  # held while the process-wide number of threads is changed


class Rule(NamedTuple):
    """Which pixels are kept, and the divisor of their sum, in the form that the kernel takes.

    A fraction of the valid pixels is an exact ratio, because 0.29 * 100 is less than 29 in floating point.
    """

    hard_loss: float  # a pixel is hard if its loss is larger
    numerator: int  # n_min is numerator / denominator of the valid pixels; or the numerator itself
    denominator: int  # 0: n_min is the numerator
    kept_only: bool  # divide by the number kept; otherwise by max(kept, n_min)


_EVERYTHING = Rule(-0.5, 0, 0, True)  # keeps every valid pixel: no loss is negative


def _rule(threshold: Any, min_kept: Any, normalizer: str) -> Rule:
    if not (isinstance(threshold, int | float) and 0 < threshold <= 1):
        raise ValueError(f"threshold: got {threshold!r}, accepted: a probability in (0, 1]")
    if normalizer not in ("kept", "at_least_n_min"):
        raise ValueError(f"normalizer: got {normalizer!r}, accepted: kept | at_least_n_min")
    if isinstance(min_kept, int) and 0 <= min_kept < 2**63:
        fraction = min_kept, 0
    elif isinstance(min_kept, float) and 0 <= min_kept <= 1:
        fraction = Fraction(min_kept).limit_denominator(10**9).as_integer_ratio()
    else:
        accepted = "a float in [0, 1] (fraction) or an int in [0, 2^63) (count)"
        raise ValueError(f"min_kept: got {min_kept!r}, accepted: {accepted}")
    return Rule(-math.log(threshold), *fraction, normalizer == "kept")


class _Criterion(nn.Module):
    """A loss with a rule for the pixels kept, optional class weights, and a choice of implementation."""

    class_weights: Tensor | None

    def __init__(self, rule: Rule, class_weights: Sequence[float] | None, impl: str) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
        if weights is not None and not (weights.isfinite().all() and (weights >= 0).all() and weights.any()):
            raise ValueError(f"class_weights: got {class_weights}, accepted: finite numbers of at least 0, not all 0")
        if impl not in ("auto", "torch", "cuda"):
            raise ValueError(f"impl: got {impl!r}, accepted: auto | torch | cuda")
        if impl == "cuda" and weights is not None:
            raise ValueError("impl: got 'cuda' with class_weights, accepted: auto | torch; the kernel has none")
        if impl == "cuda" and (reason := kernel.missing()):
            raise RuntimeError(f"impl 'cuda': the kernel cannot be built: {reason}")
        self.rule = rule
        self.register_buffer("class_weights", weights)
        self.impl = impl

    def forward(self, logits: Tensor, target: Tensor, align_corners: bool = False) -> tuple[Tensor, Tensor]:
        """Return the loss and the number of pixels kept; shapes, types and errors as in :func:`ohem_cross_entropy`."""
        return _loss(logits, target, self.rule, align_corners, self.class_weights, self.impl)


class OhemCrossEntropy(_Criterion):
    """Cross entropy over the hard pixels of the batch, at least ``min_kept`` of them.

    Arguments as in :func:`ohem_cross_entropy`. The reference keeps at least 0.0625 of the valid pixels; its older V1
    uses a count and ``at_least_n_min``.

    Raises:
        ValueError: an argument outside its range; class weights that are negative, infinite or all 0, or that are
            combined with ``impl="cuda"``.
        RuntimeError: ``impl="cuda"`` without a CUDA device or cuda.core.
    """

    def __init__(
        self,
        threshold: float = 0.7,
        min_kept: float | int = 0.0625,
        normalizer: str = "kept",
        class_weights: Sequence[float] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__(_rule(threshold, min_kept, normalizer), class_weights, impl)


class CrossEntropy(_Criterion):
    """Mean cross entropy over all valid pixels; arguments and errors as in :class:`OhemCrossEntropy`."""

    def __init__(self, class_weights: Sequence[float] | None = None, impl: str = "auto") -> None:
        super().__init__(_EVERYTHING, class_weights, impl)


def enet_class_weights(counts: np.ndarray) -> list[float]:
    """Class weights 1 / ln(1.02 + share of the pixels), from 1.4 to 50.5 for an absent class (arXiv 1606.02147).

    Args:
        counts: pixels of each class, int64 (C,), not all 0.
    """
    return (1 / np.log(1.02 + counts / counts.sum())).tolist()


class SupervisedLoss(NamedTuple):
    """Result of :class:`DeepSupervision`, all tensors 0-d; ``heads`` and ``kept`` start with the main head."""

    total: Tensor  # the loss to minimise: main head + ``aux_weight`` x sum of the auxiliary heads
    heads: tuple[Tensor, ...]  # the loss of each head, unweighted
    kept: tuple[Tensor, ...]  # int64: the number of pixels in the loss of each head


class DeepSupervision(nn.Module):
    """One criterion on the main head and on every auxiliary head (arXiv 1808.00897, section 3.3: equal weights).

    Args:
        criterion: ``(logits, target, align_corners) -> (loss, kept)``.
        aux_weight: weight of each auxiliary head, at least 0. A network in eval mode returns no auxiliary logits.
    """

    def __init__(self, criterion: nn.Module, aux_weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight: got {aux_weight!r}, accepted: a finite number of at least 0")
        if not callable(criterion):
            raise ValueError(f"criterion: got {criterion!r}, accepted: (logits, target, align_corners) -> (loss, kept)")
        self.criterion = criterion
        self.aux_weight = aux_weight

    def forward(self, output: "SegmentationOutput", target: Tensor, align_corners: bool = False) -> SupervisedLoss:
        """Score all heads of ``output`` against ``target`` (N, H, W)."""
        scores = [self.criterion(logits, target, align_corners) for logits in (output.logits, *output.aux)]
        heads, kept = zip(*scores, strict=True)
        return SupervisedLoss(heads[0] + self.aux_weight * sum(heads[1:]), heads, kept)


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    threshold: float,
    min_kept: float | int,
    normalizer: str,
    align_corners: bool,
    class_weights: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy over the hard pixels of a batch.

    A pixel is valid when its label is not 255, and hard when the probability of its label is below ``threshold``. If
    fewer than n_min pixels are hard, the n_min valid ones with the largest losses are kept; ties for the last places
    share the remaining weight equally, so that value and gradient are deterministic.

    Args:
        logits: float32, float16, bfloat16 (computed in float32) or float64 (N, C, h, w), upsampled bilinearly to
            (H, W) unless they have that size.
        target: uint8 or int64 (N, H, W), class in [0, C) or 255.
        threshold: probability in (0, 1].
        min_kept: n_min: a float in [0, 1] is a fraction of the valid pixels, rounded down; an int is a count.
        normalizer: divide by the number ``kept``, or by ``at_least_n_min`` = max(kept, n_min). There n_min may exceed
            the number of valid pixels: the smaller their share, the smaller the loss.
        align_corners: as in ``torch.nn.functional.interpolate``.
        class_weights: float (C,). Pixels are selected by their unweighted losses; the mean over those kept
            is then weighted, sum(w l) / sum(w). With ``at_least_n_min`` it is multiplied by kept / max(kept, n_min).
        impl: ``torch`` is PyTorch code for any device, ``cuda`` the fused kernel (``kernels/README.md``), ``auto`` the
            kernel if the device is CUDA, there are no ``class_weights``, and the kernel is right in a small example.
            The choice and its reason are logged once. The first call waits for the device: make it before a CUDA graph
            is captured.

    Returns:
        The loss (float32, or float64 for float64 logits) and the number of pixels kept (int64), both 0-d. Nothing
        kept (an empty batch, all ignored, nothing hard and n_min 0): loss 0 with gradient 0. A NaN anywhere in the
        logits makes the loss NaN. A class at -inf has probability 0 where nothing is upsampled; otherwise infinite
        logits give infinity or NaN.

    Raises:
        ValueError: arguments outside their range; shapes or dtypes that do not fit; ``at_least_n_min`` with a count
            above the pixels of the batch; on the CPU, labels that are neither a class nor 255 (on other devices these
            make the loss NaN, since raising would stall the device).
        RuntimeError: ``impl="cuda"`` where the kernel cannot be built, or fails a small example.
    """
    return _loss(logits, target, _rule(threshold, min_kept, normalizer), align_corners, class_weights, impl)


def _loss(
    logits: Tensor, target: Tensor, rule: Rule, align_corners: bool, class_weights: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    _check(logits, target, rule, class_weights)
    chosen = impl, logits.device, logits.dtype, target.dtype, logits.shape[1]
    if impl != "torch" and class_weights is None and _kernel_runs(*chosen):
        return kernel.ohem(logits, target, *rule, align_corners)[:2]
    with _one_thread(logits.device.type == "cpu"):
        losses, valid = _pixel_losses(logits, target, align_corners)
        asked = valid * rule.numerator // rule.denominator if rule.denominator else valid * 0 + rule.numerator
        weights, kept = _selection(losses.detach(), rule.hard_loss, torch.minimum(asked, valid))
        divisor = (kept if rule.kept_only else torch.maximum(kept, asked)).clamp(min=1)
        if class_weights is not None:
            weights = weights * class_weights.to(losses)[target.long().clamp(0, len(class_weights) - 1)]
            weights = weights * (kept / torch.where(weights.any(), weights.sum(), 1.0))
        total = (weights * losses).sum()
        if logits.numel():  # a NaN makes the loss NaN even if it touches ignored pixels only
            total = total * torch.where(logits.detach().amax().isnan(), math.nan, 1.0)
        return total / divisor, kept


def _check(logits: Tensor, target: Tensor, rule: Rule, class_weights: Tensor | None) -> None:
    if logits.ndim != 4 or target.ndim != 3 or len(logits) != len(target):
        shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{shapes} do not fit together; accepted are (N, C, h, w) and (N, H, W)")
    if target.dtype not in kernel.LABEL_TYPES:
        raise ValueError(f"target has dtype {target.dtype}; accepted are torch.uint8 and torch.int64")
    if not rule.kept_only and not rule.denominator and 0 < target.numel() < rule.numerator:
        accepted = f"at most the pixels of a batch on one device, here {target.numel()}, or a share such as 0.0625"
        raise ValueError(f"min_kept: got {rule.numerator} with normalizer 'at_least_n_min', accepted: {accepted}")
    if class_weights is not None and len(class_weights) != logits.shape[1]:
        raise ValueError(f"class_weights: got {len(class_weights)}, accepted: as many as classes, {logits.shape[1]}")


@torch.compiler.assume_constant_result
def _kernel_runs(*arguments: Any) -> bool:
    return _choose(*arguments)  # torch.compile would look through the cache if it were decorated itself


@cache
def _choose(impl: str, device: torch.device, dtype: torch.dtype, label_dtype: torch.dtype, classes: int) -> bool:
    """Decide whether the kernel runs, and log the choice once for each combination of arguments."""
    if device.type != "cuda" or dtype not in kernel.LOGIT_TYPES:
        if impl == "cuda":
            accepted = ", ".join(map(str, kernel.LOGIT_TYPES))
            raise ValueError(f"impl: got 'cuda' with {dtype} logits on {device}, accepted: {accepted} on a CUDA device")
        log.info("loss: PyTorch implementation, for %s logits on %s", dtype, device)
        return False
    arguments = device, dtype, label_dtype, classes
    reason = kernel.why_not(*arguments) or _disagreement(*arguments)
    if reason and impl == "cuda":
        raise RuntimeError(f"impl 'cuda': the kernel does not run here: {reason}")
    if reason:
        log.warning("loss: PyTorch implementation, because the CUDA kernel does not run here: %s", reason)
    else:
        log.info("loss: CUDA kernel, for %s logits of %d classes on %s", dtype, classes, device)
    return not reason


def _disagreement(device: torch.device, dtype: torch.dtype, label_dtype: torch.dtype, classes: int) -> str | None:
    """Describe how the kernel differs from the PyTorch implementation in a small example; None where they agree.

    This check keeps an untested device or driver from training on a wrong loss.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        draw = torch.Generator().manual_seed(0)
        logits = torch.randn(2, classes, 5, 9, generator=draw).to(device, dtype).requires_grad_()
        target = torch.randint(classes, (2, 37, 70), generator=draw).to(device, label_dtype)
        target[:, :5] = kernel.IGNORED
        for rule in (Rule(math.log(classes), 0, 0, True), Rule(50.0, 1000, 0, True)):  # many hard pixels; none
            try:
                found = kernel.ohem(logits, target, *rule, False)[0]
                slope = torch.autograd.grad(found, logits)[0]
            except Exception as error:  # whatever the driver says
                return f"{type(error).__name__}: {error}"
            expected = _loss(logits, target, rule, False, None, "torch")[0]
            true_slope = torch.autograd.grad(expected, logits)[0]
            # a pixel on the edge of being hard may be kept by only one of the two
            error = (slope - true_slope).abs().max() / true_slope.abs().max().clamp(min=1e-4)
            if not (abs(found - expected) <= 1e-4 + 0.02 * abs(expected) and error <= 0.1):
                return f"its loss for an example is {found:.5f}, not {expected:.5f}; gradients differ by {error:.1%}"
    return None


@contextmanager
def _one_thread(on_host: bool = True) -> Generator[None]:
    """On the CPU: one thread (a parallel region for each tile would wait until all cores are free), no autocast."""
    with _THREADS_LOCK, torch.autocast("cpu", enabled=False):
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if on_host else threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _selection(losses: Tensor, hard_loss: float, n_min: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight in [0, 1] of each pixel, and the number of pixels kept.

    The pixels kept are those with losses above ``hard_loss``, or with the ``n_min`` largest losses if fewer are above.
    On a device other than the CPU both cases are computed and one is chosen there, so that nothing waits for a copy.
    """
    on_host = losses.device.type == "cpu"
    hard = ~(losses <= hard_loss)  # true for NaN as well
    n_hard = hard.count_nonzero()
    if losses.numel() == 0 or (on_host and n_hard >= n_min):
        return hard.to(losses.dtype), n_hard

    flat = losses.flatten()
    if on_host:
        nth_largest = flat.kthvalue(flat.numel() - int(n_min) + 1).values
    else:
        nth_largest = flat.sort(descending=True).values.gather(0, (n_min - 1).clamp(min=0).view(1))[0]
    too_few = n_hard < n_min
    cut = torch.where(too_few, nth_largest, hard_loss)
    above, at_cut = ~(losses <= cut), losses == cut
    share = torch.where(too_few, (n_min - above.count_nonzero()).to(losses.dtype) / at_cut.count_nonzero(), 0.0)
    return above + share * at_cut, torch.where(too_few, n_min, n_hard)


def _pixel_losses(logits: Tensor, target: Tensor, align_corners: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy of every pixel (N, H, W), -1 where ignored, and the number of valid pixels (0-d int64)."""
    on_host = logits.device.type == "cpu"
    if logits.dtype != torch.float64:
        logits = logits.float()
    classes = logits.shape[1]
    if classes > 256:
        target = target.long()  # the number of classes would overflow in a comparison with uint8
    ignored = target == kernel.IGNORED
    unknown = ~ignored & ((target < 0) | (target > classes - 1))
    if on_host and unknown.any():
        ids = target[unknown].unique().tolist()
        raise ValueError(
            f"target holds {ids}; accepted are the classes 0 to {classes - 1} and {kernel.IGNORED} (ignored)"
        )
    labels = target.masked_fill(ignored | unknown, 0)
    full_size = target.shape[-2:]
    if on_host and logits.shape[-2:] != full_size:
        losses: Tensor = _TiledCrossEntropy.apply(logits, labels, align_corners)
    else:
        if logits.shape[-2:] != full_size:
            logits = F.interpolate(logits, full_size, mode="bilinear", align_corners=align_corners)
        losses = F.cross_entropy(logits, labels.long(), reduction="none")
    if not on_host:
        losses = losses * torch.ones_like(losses).masked_fill(unknown, math.nan)
    return losses.masked_fill(ignored, -1.0), ignored.numel() - ignored.count_nonzero()


class _TiledCrossEntropy(torch.autograd.Function):
    """Cross entropy of bilinearly upsampled logits for the CPU, one small tile at a time, recomputed backward.

    A tile stays in cache. Upsampling tiles twice, forward and backward, is therefore faster than upsampling the whole
    once, and no tensor of full-size logits is made. The backward pass skips tiles without gradient (no kept pixel).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, align_corners: bool) -> Tensor:
        ctx.save_for_backward(logits, labels)
        sizes = zip(logits.shape[2:], labels.shape[1:], strict=True)
        ctx.spans = [_spans(*size, align_corners, logits.dtype) for size in sizes]
        losses = logits.new_empty(labels.shape)
        for image, its_labels, its_losses in zip(logits, labels, losses, strict=True):
            for rows in ctx.spans[0]:
                band = rows.weights @ image[:, rows.source]  # (C, <= 64, w)
                for cols in ctx.spans[1]:
                    here = rows.pixels, cols.pixels
                    tile = band[:, :, cols.source] @ cols.weights.T  # (C, <= 64, <= 64)
                    label = its_labels[here].long()[None]
                    its_losses[here] = F.cross_entropy(tile[None], label, reduction="none")[0]
        return losses

    @staticmethod
    @once_differentiable
    @_one_thread()
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, labels = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for image, its_labels, its_grad, its_result in zip(logits, labels, grad, grad_logits, strict=True):
            for rows in ctx.spans[0]:
                band = rows.weights @ image[:, rows.source]
                grad_band = torch.zeros_like(band)
                for cols in ctx.spans[1]:
                    here = rows.pixels, cols.pixels
                    if not its_grad[here].any():
                        continue
                    grad_tile = torch.softmax(band[:, :, cols.source] @ cols.weights.T, 0)
                    label = its_labels[here].long()[None]
                    grad_tile.scatter_add_(0, label, grad_tile.new_full((), -1.0).expand(label.shape))
                    grad_tile *= its_grad[here]
                    grad_band[:, :, cols.source] += grad_tile @ cols.weights
                its_result[:, rows.source] += rows.weights.T @ grad_band
        return grad_logits, None, None


class _Span(NamedTuple):
    """Up to 64 full-size pixels along one axis, the source pixels they are interpolated from, and the weights."""

    pixels: slice
    source: slice
    weights: Tensor  # (pixels, source)


@lru_cache(maxsize=64)
def _spans(size: int, full_size: int, align_corners: bool, dtype: torch.dtype) -> list[_Span]:
    """Cut one axis into spans. Interpolating unit vectors gives the weights exactly as torch computes them."""
    unit = torch.eye(size, dtype=dtype)[None]
    weights = F.interpolate(unit, full_size, mode="linear", align_corners=align_corners)[0].T  # (full_size, size)
    spans: list[_Span] = []
    for start in range(0, full_size, _TILE):
        pixels = slice(start, start + _TILE)
        used = weights[pixels].any(0).nonzero()
        source = slice(int(used[0]), int(used[-1]) + 1)
        spans.append(_Span(pixels, source, weights[pixels, source].contiguous()))
    return spans
