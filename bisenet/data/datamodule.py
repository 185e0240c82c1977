"""One LightningDataModule for every data set."""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bisenet.classes import ClassTable
from bisenet.config import AugmentConfig, DataConfig
from bisenet.data import cityscapes, listed
from bisenet.data.dataset import EvaluationSet, TrainingBatches, TrainingSet
from bisenet.data.samples import Sample, check_headers, read_mask, read_sample
from bisenet.data.synthetic import write_synthetic

# What is read of a split before the first step: a few seconds at the size of Cityscapes, all labels of a small set.
_READ_LABELS, _READ_SAMPLES = 400, 16

log = logging.getLogger(__name__)


def list_samples(data: DataConfig, split: str) -> list[Sample]:
    """The samples of a split in a fixed order. Every file exists; none has been opened.

    Args:
        data: the data set.
        split: its name; ``a+b`` is one after the other, and ``trainval`` is ``train+val`` where no list has that name.

    Returns:
        All samples; those of a split without labels (the test split of Cityscapes) have no label.

    Raises:
        FileNotFoundError: the root, a list, an image or a label is missing; the message says what is expected.
        ValueError: the split is unknown or empty, or a malformed list.
    """
    return [sample for part in data.split_parts(split) for sample in _list_part(data, part)]


def _list_part(data: DataConfig, split: str) -> list[Sample]:
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: {root} is not a folder; {_help(data.format, split)}")
    if data.format in ("cityscapes", "synthetic"):
        return cityscapes.list_cityscapes(root, split)
    if data.format == "camvid":
        return listed.list_camvid(root, split, data.lists.get(split))
    if split not in data.lists:
        raise ValueError(f"data.lists: got no list for split {split!r}, accepted: {', '.join(sorted(data.lists))}")
    return listed.list_file(root, root / data.lists[split])


def _help(format: str, split: str) -> str:
    """What a data set of this format looks like."""
    texts = {
        "cityscapes": cityscapes.help_text(split),
        "synthetic": "training writes the scenes there",
        "camvid": listed.CAMVID_HELP.format(split=split),
        "listed": listed.LISTED_HELP,
    }
    return texts[format]


class SegmentationDataModule(L.LightningDataModule):
    """Batches of a data set: ``{"image": uint8 (B, 3, H, W), "mask": uint8 (B, H, W)}``, evaluation also ``"index"``.

    Training is an endless loader that starts at the trainer's current step (see :mod:`bisenet.data.dataset`).
    Evaluation takes every picture once, whole, one per batch, in a fixed order, shared out over the ranks.

    Args:
        data: the data set.
        augment: training augmentation.
        seed: keys order and augmentation of the training samples.
        table: class table; by default the one that ``data.classes`` names.

    Raises:
        ValueError: a mistake in the class table; with :meth:`setup` or the loaders, in the data set.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig, seed: int, table: ClassTable | None = None) -> None:
        super().__init__()
        self.data = data
        self.augment = augment
        self.seed = seed
        self.table = ClassTable.load(data.classes) if table is None else table
        self._samples: dict[str, list[Sample]] = {}

    def prepare_data(self) -> None:
        """Write the scenes of the synthetic set, unless they are there."""
        if self.data.format == "synthetic":
            scenes = self.data.synthetic
            counts = {"train": scenes.train, "val": scenes.val, "test": scenes.test}
            size = (scenes.size[0], scenes.size[1])
            root = Path(self.data.root).expanduser()
            write_synthetic(root, counts=counts, size=size, seed=scenes.seed, scene=scenes.scene)

    def setup(self, stage: str | None = None) -> None:
        """List and check the splits of a stage; for ``fit`` all of them, since an evaluation follows the training."""
        splits = {"validate": [self.data.val_split], "test": [self.data.report_split]}
        for split in splits.get(stage or "", [self.data.train_split, self.data.val_split, self.data.report_split]):
            self.samples(split)
        if stage == "fit":
            trained_on = {sample.image for sample in self.samples(self.data.train_split)}
            for split in dict.fromkeys((self.data.val_split, self.data.report_split)):
                seen = sum(sample.image in trained_on for sample in self.samples(split))
                if seen:
                    log.warning("%d of the %d pictures of %s are trained on as well: their scores say nothing about "
                                "pictures the network has not seen", seen, len(self.samples(split)), split)  # fmt: skip

    def samples(self, split: str) -> list[Sample]:
        """The samples of any split, checked: all headers, the labels of a small set, and a few whole files.

        Raises:
            FileNotFoundError, ValueError: see :func:`list_samples`; a file that is damaged or of the wrong kind, ids
                outside the class table, or a split without labels or with nothing but ignored pixels in them.
        """
        if split not in self._samples:
            samples = list_samples(self.data, split)[: self.data.limit]
            if unlabelled := sum(sample.label_file is None for sample in samples):
                raise self._unscorable(split, f"{unlabelled} pictures without label")
            for sample in samples:
                check_headers(sample)
            read = (read_mask(samples[index], self.table) for index in _spread(len(samples), _READ_LABELS))
            ignored = [(mask == self.table.ignore_index).all() for mask in read]
            if all(ignored):  # as the labels of Cityscapes' test split that are public
                raise self._unscorable(split, "only ignored pixels in its labels")
            for index in _spread(len(samples), _READ_SAMPLES):
                read_sample(samples[index], self.table)
            self._samples[split] = samples
        return self._samples[split]

    def _unscorable(self, split: str, found: str) -> ValueError:
        return ValueError(
            f"split {split!r} of {self.data.root} has {found}, so it can be neither trained on nor scored. "
            "scripts/predict.py writes predictions with the ids of the class table, as the servers of benchmarks score "
            f"them. Where labels would be: {_help(self.data.format, split)}"
        )

    def picture(self, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample of a split: image, RGB uint8 (H, W, 3), and mask, uint8 (H, W), of train ids."""
        return read_sample(self.samples(split)[index], self.table)

    def class_counts(self, split: str) -> np.ndarray:
        """Pixels of each train id in the labels of a split, int64 (C,). Reads all of them: tens of ms each."""
        counts = np.zeros(256, np.int64)
        for sample in track(self.samples(split), "Counting classes", transient=True):
            counts += np.bincount(read_mask(sample, self.table).ravel(), minlength=256)
        return counts[: self.table.num_classes]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches from the trainer's current step on; each rank gets its part."""
        rank, world = self._rank()
        samples = self.samples(self.data.train_split)
        parts = self.trainer.accumulate_grad_batches if self.trainer else 1
        start = self.trainer.global_step * parts if self.trainer else 0
        size = self.data.batch_size // parts  # the parts of a step in order are the step: its draws stay the same
        batches = TrainingBatches(len(samples), size, self.seed, start=start, rank=rank, world=world)
        return self._loader(TrainingSet(samples, self.table, self.augment, self.seed), batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """``val_split``."""
        return self.evaluation_dataloader(self.data.val_split)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """``report_split``."""
        return self.evaluation_dataloader(self.data.report_split)

    def evaluation_dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        """Any split, without augmentation."""
        rank, world = self._rank()
        samples = self.samples(split)
        if len(samples) < world:
            raise ValueError(f"split {split!r} of {self.data.root}: {len(samples)} pictures, accepted: one per device")
        return self._loader(EvaluationSet(samples, self.table), sampler=range(rank, len(samples), world))

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: Dataset[dict[str, Tensor]], **sampling: Iterable[Any]) -> DataLoader[dict[str, Tensor]]:
        workers = self.data.workers
        cv2.setNumThreads(0)  # here: threads of OpenCV do not survive a fork, and contend with those of torch
        return DataLoader(
            dataset,
            **sampling,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_init_worker,
            # Where it is safe to, fork: a spawned worker needs seconds to import what its parent has.
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else each iterator takes a number from the generator that training uses
        )


def _spread(length: int, most: int) -> list[int]:
    """All indices, or so many of them, evenly."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int)).tolist()


def _init_worker(_: int) -> None:
    cv2.setNumThreads(0)  # torch sets its own to 1
