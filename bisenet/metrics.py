"""Exact segmentation scores from integer counts: one confusion matrix, and counts per image and class.

IoU is the ratio of pixel counts summed over all images, as in the official Cityscapes evaluation. Pixels with an
ignored label are not counted, and a class that occurs neither in the labels nor in the predictions is left out of the
mean.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from bisenet.classes import ClassTable


class SegmentationScores(NamedTuple):
    """Scores in [0, 1], NaN where undefined; C classes, n images. A tuple, because torchmetrics traverses results."""

    confusion: NDArray[np.int64]
    """(C, C) pixels: rows are the truth, columns the prediction."""
    iou: NDArray[np.float64]
    """(C,) true positives / (predicted or true); NaN: the class never occurs."""
    precision: NDArray[np.float64]
    """(C,) true positives / predicted; NaN: never predicted."""
    recall: NDArray[np.float64]
    """(C,) true positives / true; NaN: never true."""
    f1: NDArray[np.float64]
    """(C,) harmonic mean of precision and recall, 2 tp / (predicted + true); NaN: never occurs."""
    absent: tuple[int, ...]
    """Classes that occur neither in the truth nor in a prediction; left out of every mean."""
    miou: float
    """Mean of ``iou`` over the classes that occur."""
    fw_iou: float
    """Mean of ``iou`` weighted by the share of true pixels."""
    pixel_accuracy: float
    """Share of the valid pixels that are predicted correctly."""
    mean_accuracy: float
    """Mean of ``recall`` over the classes that occur in the truth."""
    image_index: NDArray[np.int64]
    """(n,) index of each image in its data set, ascending."""
    per_image: NDArray[np.int64]
    """(n, 3, C) pixels of each image: true positives, predicted, true."""

    @property
    def mean_f1(self) -> float:
        """Mean of ``f1`` over the classes that occur."""
        return _mean(self.f1)

    def category_iou(self, categories: Sequence[str | None]) -> dict[str, float]:
        """IoU of groups of classes; confusing two classes of one group is no mistake (as in Cityscapes).

        ``categories`` gives the category of each class, or None. The IoU is NaN where no class of a category occurs.
        """
        found: dict[str, float] = {}
        for category in dict.fromkeys(filter(None, categories)):
            inside = np.array([other == category for other in categories])
            true, predicted = self.confusion[inside], self.confusion[:, inside]
            tp = true[:, inside].sum()
            found[category] = float(_ratio(tp, true.sum() + predicted.sum() - tp))
        return found

    @property
    def n_images(self) -> int:
        """Number of images counted."""
        return len(self.image_index)

    def to_dict(self, names: Sequence[str], categories: Sequence[str | None] = ()) -> dict[str, Any]:
        """Plain Python, ready for JSON (NaN becomes None): the means and, under "classes", the scores by class name.

        If ``categories`` gives any class a category, "category_miou" and "categories" (IoU by category) are added.
        """
        keys = ("miou", "fw_iou", "pixel_accuracy", "mean_accuracy", "mean_f1")
        means = {key: _plain(getattr(self, key)) for key in keys}
        columns = {key: getattr(self, key).tolist() for key in ("iou", "precision", "recall", "f1")}
        columns["pixels"] = self.confusion.sum(1).tolist()
        table = {name: {key: _plain(column[c]) for key, column in columns.items()} for c, name in enumerate(names)}
        found = means | {"n_images": self.n_images, "absent": [names[c] for c in self.absent], "classes": table}
        if grouped := self.category_iou(categories):
            found["category_miou"] = _plain(_mean(np.array(list(grouped.values()))))
            found["categories"] = {name: {"iou": _plain(iou)} for name, iou in grouped.items()}
        return found


class SegmentationMetric(Metric):
    """Counts pixels over images, batches and ranks; every image must be counted exactly once.

    Counts are int64, so that they do not depend on the order of images or the number of ranks. Memory: one (C, C)
    matrix and 3 C + 1 numbers for each image. An image is identified by its index in the data set. A sampler that
    repeats images so that all ranks see equally many would count some twice: :meth:`compute` then raises an error
    rather than report a score that depends on the number of ranks.

    Labels and predictions are classes in [0, C), labels also ``ClassTable.ignore_index`` for pixels that do not count.
    """

    full_state_update = False
    higher_is_better = True
    confusion: Tensor
    images: list[Tensor]

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", [], dist_reduce_fx="cat")  # (B, 1 + 3 C): index, true positives, predicted, true
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        # Never empty: a rank without images would otherwise send a float vector to ranks that expect int64 rows.
        self.images = [self.confusion.new_empty(0, 1 + 3 * self.num_classes)]

    def update(self, prediction: Tensor, target: Tensor, index: Tensor) -> None:
        """Count a batch.

        Args:
            prediction: integer (B, H, W).
            target: integer (B, H, W).
            index: integer (B,), the index of each image in its data set.

        Raises:
            ValueError: shapes that do not fit, or values that are neither a class nor (in ``target``) ignored.
        """
        if prediction.shape != target.shape or target.ndim != 3 or index.shape != target.shape[:1]:
            shapes = " ".join(str(tuple(t.shape)) for t in (prediction, target, index))
            raise ValueError(f"prediction, target, index: got {shapes}, accepted: (B, H, W) (B, H, W) (B,)")
        n, classes = len(target), self.num_classes
        prediction, target = prediction.long(), target.long()
        ignored = target == ClassTable.ignore_index
        for what, values in (("prediction", prediction), ("target", target.masked_fill(ignored, 0))):
            if values.amin() < 0 or values.amax() >= classes:
                unknown = values[(values < 0) | (values >= classes)].unique().tolist()
                also = f" and ignore_index {ClassTable.ignore_index}" if what == "target" else ""
                raise ValueError(f"{what} holds {unknown}; accepted are the classes 0 to {classes - 1}{also}")

        # One bin per image, true class and predicted class, and a last one for all ignored pixels.
        image = torch.arange(n, device=target.device).view(-1, 1, 1)
        cell = ((image * classes + target) * classes + prediction).masked_fill_(ignored, n * classes**2)
        counts = torch.bincount(cell.flatten(), minlength=n * classes**2 + 1)[:-1].view(n, classes, classes)
        rows = [index[:, None].to(counts), counts.diagonal(dim1=1, dim2=2), counts.sum(1), counts.sum(2)]
        self.confusion += counts.sum(0)
        self.images.append(torch.cat(rows, dim=1))

    def compute(self) -> SegmentationScores:
        """Scores of all images counted so far, on all ranks.

        Raises:
            ValueError: an image was counted more than once.
        """
        rows = dim_zero_cat(self.images).cpu().numpy()
        rows = rows[rows[:, 0].argsort()]
        index, times = np.unique(rows[:, 0], return_counts=True)
        if (times > 1).any():
            raise ValueError(
                f"images {index[times > 1].tolist()} were counted more than once; accepted: a sampler that gives every "
                "image to one rank, once, without padding"
            )
        confusion = self.confusion.cpu().numpy()
        tp, predicted, true = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
        iou, recall = _ratio(tp, predicted + true - tp), _ratio(tp, true)
        return SegmentationScores(
            confusion=confusion,
            iou=iou,
            precision=_ratio(tp, predicted),
            recall=recall,
            f1=_ratio(2 * tp, predicted + true),
            absent=tuple(np.flatnonzero(np.isnan(iou)).tolist()),
            miou=_mean(iou),
            fw_iou=float(_ratio((true * np.nan_to_num(iou)).sum(), true.sum())),
            pixel_accuracy=float(_ratio(tp.sum(), true.sum())),
            mean_accuracy=_mean(recall),
            image_index=index,
            per_image=rows[:, 1:].reshape(-1, 3, self.num_classes),
        )


def _ratio(part: Any, whole: Any) -> Any:
    """Elementwise quotient in float64, NaN where ``whole`` is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: NDArray[np.float64]) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _plain(value: float | int) -> float | int | None:
    return None if value != value else value
