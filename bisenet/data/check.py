"""Check a data set: read every file as training would, and collect all problems instead of stopping at the first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cv2
import numpy as np
from rich.progress import track

from bisenet.classes import ClassTable
from bisenet.data.datasets import NEARLY_BLACK, IncompleteSplit, Sample, check_headers, list_samples, read_sample
from bisenet.launch import cores, pool


@dataclass
class _Split:
    """What was found in the files of one split; files with a problem are left out of the counts."""

    pairs: int = 0  # pairs that the split names, also those whose files are missing
    problems: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # without a problem
    ignored: list[str] = field(default_factory=list)  # images whose pixels are all ignored
    black: list[str] = field(default_factory=list)  # images that are nearly black
    sizes: Counter[str] = field(default_factory=Counter)
    counts: np.ndarray = field(default_factory=lambda: np.zeros((5, 256), np.int64))  # see _inspect


def check(
    dataset: Any, table: ClassTable, splits: Sequence[str], train_split: str, workers: int | None = None,
    exif: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Read every file of some splits as training would, in several processes.

    Args:
        dataset: an object like :class:`bisenet.data.datasets.FolderDataset`.
        table: its class table.
        splits: their names.
        train_split: name of the training split; the suggested mean and standard deviation are measured on it.
        workers: number of processes beside this one; 0: none, None: one per core.
        exif: as of :func:`bisenet.data.datasets.list_samples`.

    Returns:
        Plain data: ``class_table`` (its name), ``fit`` (whether no split has a problem, and each has pixels that are
        not ignored), ``suggested`` (mean and std), ``warnings`` (lines), and ``splits`` (name -> findings, with
        ``problems``: a line for each missing or wrong file, or for a split that cannot be listed).

    Raises:
        BrokenProcessPool: one of the processes was killed.
    """
    cv2.setNumThreads(0)  # before forking: OpenCV's threads do not survive a fork
    processes = cores() if workers is None else workers
    walked = {split: _walk(dataset, table, split, exif, processes) for split in splits}
    found = {split: _describe(walk, table) for split, walk in walked.items()}
    measured = train_split if train_split in found else splits[0]
    mean, std = found[measured]["mean"], found[measured]["std"]
    return {
        "class_table": table.name,
        "fit": all(f["ignored_share"] < 1 and not f["problems"] for f in found.values()),
        "suggested": {"mean": mean, "std": std, "split": measured} if mean else None,
        "warnings": [line for split in splits for line in _warnings(walked, table, split, train_split)],
        "splits": found,
    }


def _walk(dataset: Any, table: ClassTable, split: str, exif: str | None, workers: int) -> _Split:
    found, samples = _Split(), list[Sample]()
    try:
        samples = list_samples(dataset, split, exif)
        found.pairs = len(samples)
    except IncompleteSplit as error:
        samples, found.pairs = error.samples, error.pairs
        found.problems += error.problems
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
    inspect = partial(_inspect, table=table)
    with pool(workers or 1) as executor:
        results = executor.map(inspect, samples, chunksize=4) if workers else map(inspect, samples)
        for sample, result in track(zip(samples, results, strict=True), f"reading {split}", total=len(samples)):
            if isinstance(result, str):
                found.problems.append(result)
                continue
            size, counts = result
            found.images.append(str(sample.image))
            if counts[3, table.ignore_index] == counts[3].sum():
                found.ignored.append(str(sample.image))
            if not counts[:3, 16:].any():
                found.black.append(str(sample.image))
            found.sizes[size] += 1
            found.counts += counts
    if found.black and found.black == found.images:
        found.problems.append(f"all images are black, {NEARLY_BLACK}")
    return found


def _inspect(sample: Sample, table: ClassTable) -> tuple[str, np.ndarray] | str:
    """Size ``HxW``, and counts int64 (5, 256); or the problem.

    Rows of the counts: pixels by value of red, green and blue, pixels by train id, and 1 for each train id that occurs.
    """
    try:
        check_headers(sample)
        image, mask = read_sample(sample, table)
    except (OSError, ValueError) as error:
        return str(error)
    except Exception as error:  # a decoder's error does not name the file
        return f"{sample.image} or its label: {type(error).__name__}: {error}"
    counts = [np.bincount(plane.ravel(), minlength=256) for plane in (*image.transpose(2, 0, 1), mask)]
    return f"{mask.shape[0]}x{mask.shape[1]}", np.stack([*counts, counts[3] > 0])


def _describe(found: _Split, table: ClassTable) -> dict[str, Any]:
    """A split's entry in ``check_data.json``."""
    values, pixels = np.arange(256) / 255, found.counts[3]
    total, valid = int(pixels.sum()), int(pixels[: table.num_classes].sum())
    mean = found.counts[:3] @ values / max(total, 1)
    std = np.sqrt(np.maximum(found.counts[:3] @ values**2 / max(total, 1) - mean**2, 0))
    rows = zip(table.names, pixels.tolist(), found.counts[4].tolist(), strict=False)
    return {
        "pairs": found.pairs,
        "fit": len(found.images),
        "sizes": dict(found.sizes.most_common()),
        "ignored_share": 1 - valid / max(total, 1),
        "mean": mean.round(4).tolist() if total else None,
        "std": std.round(4).tolist() if total else None,
        "classes": {name: {"pixels": n, "share": n / max(valid, 1), "images": images} for name, n, images in rows},
        "problems": found.problems,
    }


def _warnings(walked: dict[str, _Split], table: ClassTable, split: str, train_split: str) -> Iterator[str]:
    """Findings of a split that do not prevent a training, but may surprise."""
    found = walked[split]
    if absent := [name for name, pixels in zip(table.names, found.counts[3], strict=False) if not pixels]:
        effect = "cannot be learnt" if split == train_split else "are left out of the mean IoU"
        yield f"{split}: {len(absent)} classes never occur and {effect}: {', '.join(absent)}"
    if found.ignored:
        yield f"{split}: {len(found.ignored)} labels are ignored all over, the first of {found.ignored[0]}"
    if found.black:
        yield f"{split}: {len(found.black)} images are black, the first {found.black[0]}: {NEARLY_BLACK}"
    if repeated := [image for image, times in Counter(found.images).items() if times > 1]:
        yield f"{split}: {len(repeated)} images are listed, and count, more than once: {repeated[0]} ..."
    trained_on = set(walked[train_split].images) if train_split in walked and split != train_split else set()
    if shared := [image for image in dict.fromkeys(found.images) if image in trained_on]:
        yield f"{split}: {len(shared)} of its images are trained on, the first: {shared[0]}"
