"""A walk over a data set as training reads it, that does not stop at the first problem."""

import logging
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from bisenet.classes import ClassTable
from bisenet.config import DataConfig
from bisenet.data.datamodule import list_samples
from bisenet.data.samples import IncompleteSplit, Sample, check_headers, read_sample

log = logging.getLogger(__name__)


@dataclass
class SplitFindings:
    """What the files of one split hold; problems leave a file out of the counts."""

    classes: ClassTable
    pairs: int = 0
    """Pictures with their labels that the split names, whether they are there or not."""
    problems: list[str] = field(default_factory=list)
    """One message for each missing, unreadable or wrong file, naming it."""
    images: list[Path] = field(default_factory=list)
    """Pictures that are fit."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(height, width) -> number of pictures."""
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Train id -> pixels."""
    occurrences: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Train id -> pictures that hold it."""
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    """Pixels by channel (red, green, blue) and value."""
    unlabelled: list[Path] = field(default_factory=list)
    """Pictures whose labels are ignored all over."""

    def add(self, sample: Sample, found: "_Sample | str") -> None:
        """Count one sample, or note its problem."""
        if isinstance(found, str):
            self.problems.append(found)
            return
        self.images.append(sample.image)
        self.sizes[found.size] += 1
        self.pixels += found.pixels
        self.occurrences += found.pixels > 0
        self.histogram += found.histogram
        if found.pixels[self.classes.ignore_index] == found.pixels.sum():
            self.unlabelled.append(sample.image)

    @property
    def valid(self) -> int:
        """Number of pixels that are not ignored."""
        return int(self.pixels[: self.classes.num_classes].sum())

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over all pixels, in [0, 1]; nothing read: NaN."""
        values, counts = np.arange(256) / 255, self.histogram.sum(1)
        with np.errstate(invalid="ignore"):
            mean = self.histogram @ values / counts
            std = np.sqrt(np.maximum(self.histogram @ values**2 / counts - mean**2, 0))
        return mean.round(4).tolist(), std.round(4).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for a JSON file."""
        mean, std = self.mean_and_std()
        per_class = zip(self.classes.names, self.pixels.tolist(), self.occurrences.tolist(), strict=False)
        return {
            "pairs": self.pairs,
            "fit": len(self.images),
            "sizes": {f"{height}x{width}": n for (height, width), n in self.sizes.most_common()},
            "ignored_share": 1 - self.valid / max(int(self.pixels.sum()), 1),
            "mean": mean if self.images else None,
            "std": std if self.images else None,
            "classes": {
                name: {"pixels": pixels, "share": pixels / max(self.valid, 1), "images": images}
                for name, pixels, images in per_class
            },
            "problems": self.problems,
        }


def walk(data: DataConfig, classes: ClassTable, splits: Sequence[str], workers: int) -> dict[str, SplitFindings]:
    """Read every file of some splits as training would, in several processes.

    Args:
        data: the data set.
        classes: its class table.
        splits: their names.
        workers: number of processes beside this one; 0: none.

    Returns:
        Findings by split. A split that cannot even be listed has one problem that says so.
    """
    cv2.setNumThreads(0)  # before the fork: threads of OpenCV do not survive it
    found: dict[str, SplitFindings] = {}
    for split in splits:
        findings = found[split] = SplitFindings(classes)
        try:
            samples = list_samples(data, split)
            findings.pairs = len(samples)
        except IncompleteSplit as error:
            samples, findings.pairs = error.samples, error.pairs
            findings.problems += error.problems
        except (OSError, ValueError) as error:
            samples = []
            findings.problems.append(str(error))
        inspected = _inspect_all(samples, classes, workers)
        for sample, result in track(zip(samples, inspected, strict=True), f"reading {split}", total=len(samples)):
            findings.add(sample, result)
    return found


def warnings(found: dict[str, SplitFindings], train_split: str) -> list[str]:
    """What does not keep from training, but may surprise."""
    told: list[str] = []
    for split, findings in found.items():
        if absent := [n for n, count in zip(findings.classes.names, findings.pixels, strict=False) if not count]:
            effect = "cannot be learnt" if split == train_split else "are left out of the mean IoU"
            told.append(f"{split}: {len(absent)} classes never occur and {effect}: {', '.join(absent)}")
        if findings.unlabelled:
            count, first = len(findings.unlabelled), findings.unlabelled[0]
            told.append(f"{split}: {count} labels are ignored all over, the first of {first}")
        if repeated := [image for image, times in Counter(findings.images).items() if times > 1]:
            told.append(f"{split}: {len(repeated)} pictures are listed, and count, more than once: {repeated[0]} ...")
    for split, findings in found.items():
        trained = set(found[train_split].images) if train_split in found else set()
        if split != train_split and (shared := sorted(trained & set(findings.images))):
            told.append(f"{split}: {len(shared)} of its pictures are trained on, the first: {shared[0]}")
    return told


@dataclass(frozen=True)
class _Sample:
    size: tuple[int, int]
    pixels: np.ndarray  # by train id
    histogram: np.ndarray  # by channel and value


def _inspect_all(samples: Sequence[Sample], classes: ClassTable, workers: int) -> Iterator[_Sample | str]:
    inspect = partial(_inspect, classes=classes)
    if workers == 0 or len(samples) < 2 * workers:
        yield from map(inspect, samples)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(inspect, samples, chunksize=max(1, min(16, len(samples) // (4 * workers))))


def _inspect(sample: Sample, classes: ClassTable) -> _Sample | str:
    try:
        check_headers(sample)
        image, mask = read_sample(sample, classes)
    except (OSError, ValueError) as error:
        return str(error)
    histogram = np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])
    return _Sample(mask.shape, np.bincount(mask.ravel(), minlength=256), histogram)
