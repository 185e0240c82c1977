"""Losses as modules: a criterion scores one head, :class:`DeepSupervision` applies it to all heads of a network."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bisenet.networks import SegmentationOutput
from bisenet.ops import NORMALIZERS, as_fraction, cross_entropy, ohem_cross_entropy, require_implementation


class OhemCrossEntropy(nn.Module):
    """Cross entropy over the hard pixels of the batch, at least ``min_kept`` of them.

    Args:
        threshold: a pixel is hard when its class has a probability below this, in (0, 1].
        min_kept: the least to keep: a float in [0, 1] is a fraction of the valid pixels (0.0625: ``valid // 16``, the
            reference's rule), an int of at least 0 a count (the older V1 rule).
        normalizer: divide by the number ``kept`` or by ``at_least_n_min`` (older V1).
        ignore_index: label of the pixels that do not count.
        class_weights: weight of each class in the mean over the pixels kept; None: the plain mean.
        impl: ``auto``, ``torch`` or ``cuda``, see :func:`bisenet.ops.ohem_cross_entropy`.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: ``impl="cuda"`` where the kernel cannot be built.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        threshold: float = 0.7,
        min_kept: float | int = 0.0625,
        normalizer: str = "kept",
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("class_weights", _weights(class_weights))
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, accepted: a probability in (0, 1]")
        as_fraction(min_kept)  # refuses what is neither a fraction nor a count
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer: got {normalizer!r}, accepted: {' | '.join(NORMALIZERS)}")
        require_implementation(impl)
        self.threshold = threshold
        self.min_kept = min_kept
        self.normalizer = normalizer
        self.ignore_index = ignore_index
        self.impl = impl

    def forward(self, logits: Tensor, target: Tensor, align_corners: bool = False) -> tuple[Tensor, Tensor]:
        """Return loss and number of pixels kept; see :func:`bisenet.ops.ohem_cross_entropy`."""
        return ohem_cross_entropy(
            logits,
            target,
            threshold=self.threshold,
            min_kept=self.min_kept,
            normalizer=self.normalizer,
            ignore_index=self.ignore_index,
            align_corners=align_corners,
            class_weights=self.class_weights,
            impl=self.impl,
        )


class CrossEntropy(nn.Module):
    """Mean cross entropy over all pixels but those labelled ``ignore_index``, weighted by class where that is asked.

    ``impl`` as for OHEM.
    """

    class_weights: Tensor | None

    def __init__(
        self, ignore_index: int = 255, class_weights: Sequence[float] | None = None, impl: str = "auto"
    ) -> None:
        super().__init__()
        require_implementation(impl)
        self.ignore_index = ignore_index
        self.register_buffer("class_weights", _weights(class_weights))
        self.impl = impl

    def forward(self, logits: Tensor, target: Tensor, align_corners: bool = False) -> tuple[Tensor, Tensor]:
        """Return loss and number of valid pixels; see :func:`bisenet.ops.cross_entropy`."""
        return cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            align_corners=align_corners,
            class_weights=self.class_weights,
            impl=self.impl,
        )


def _weights(class_weights: Sequence[float] | None) -> Tensor | None:
    return None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)


def enet_class_weights(counts: np.ndarray) -> list[float]:
    """1 / ln(1.02 + share of the class among the pixels): from 50.5 for absent classes down to 1.4 (arXiv 1606.02147).

    Args:
        counts: pixels of each class, int64 (C,), not all 0.
    """
    return (1 / np.log(1.02 + counts / counts.sum())).tolist()


class SupervisedLoss(NamedTuple):
    """What :class:`DeepSupervision` returns, all 0-d; ``heads`` and ``kept`` start with the main head."""

    total: Tensor
    """The loss to minimise: main head + ``aux_weight`` x sum of the auxiliary heads."""
    heads: tuple[Tensor, ...]
    """The loss of each head, unweighted."""
    kept: tuple[Tensor, ...]
    """int64: the number of pixels that made the loss of each head."""


class DeepSupervision(nn.Module):
    """One criterion on the main head and on every auxiliary head (arXiv 1808.00897, section 3.3: equal weights).

    Args:
        criterion: ``(logits, target, align_corners) -> (loss, kept)``.
        aux_weight: weight of each auxiliary head, at least 0. A network in eval mode has none.
    """

    def __init__(self, criterion: nn.Module, aux_weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight: got {aux_weight}, accepted: a finite number of at least 0")
        self.criterion = criterion
        self.aux_weight = aux_weight

    def forward(self, output: SegmentationOutput, target: Tensor, align_corners: bool = False) -> SupervisedLoss:
        """Score all heads of ``output`` against ``target`` (N, H, W)."""
        scores = [self.criterion(logits, target, align_corners) for logits in (output.logits, *output.aux)]
        heads, kept = zip(*scores, strict=True)
        return SupervisedLoss(heads[0] + self.aux_weight * sum(heads[1:]), heads, kept)
