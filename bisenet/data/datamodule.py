"""One LightningDataModule for every data set."""

import logging
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import lightning as L
import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bisenet.classes import ClassTable
from bisenet.data import datasets
from bisenet.data.cache import DecodedCache
from bisenet.data.datasets import Sample
from bisenet.data.transforms import ScaleCrop
from bisenet.launch import ENDING_SIGNALS, cores, pool

log = logging.getLogger(__name__)


class SegmentationDataModule(L.LightningDataModule):
    """Batches of a data set: ``{"image": uint8 (B, 3, H, W), "mask": uint8 (B, H, W)}``, evaluation also ``"index"``.

    Training is an endless loader that starts at the trainer's current step (see :mod:`bisenet.data.datasets`).
    Evaluation takes every image once, whole, one per batch, in a fixed order, shared out over the ranks.

    Args:
        dataset: function from ``root`` to a data set (see :class:`bisenet.data.datasets.FolderDataset`).
        root: folder of the data set.
        classes: class table, or the name or file of one (see :meth:`ClassTable.load`).
        augment: albumentations transforms of the training samples, in order, as a sequence or as values of a mapping.
        seed: key of the order and the augmentation of the training samples.
        name: short name, for folders and tables.
        train_split: split that is trained on. ``a+b`` is two splits, ``trainval`` is ``train+val``.
        val_split: split of the validations during training, which select ``best.ckpt``.
        report_split: split of the final evaluation, whose numbers are reported.
        mean: RGB mean in [0, 1] that normalises images on the device.
        std: RGB standard deviation in (0, 1].
        eval_window: (height, width) in pixels of the windows of protocols that crop.
        eval_short_side: protocols first resize each image so that its shorter side has this many pixels; None: no
            protocol does.
        batch_size: images per optimisation step, over all devices and all accumulated batches.
        workers: data-loading processes per device; 0 loads in the main process; ``auto``: one for each core that the
            devices' own processes leave, up to 16. The data do not depend on it.
        limit: use only the first so many images of every split; None: all.
        exif: how to treat images with an EXIF orientation: ``apply`` it (labels were drawn on the upright image),
            ``ignore`` it (labels were drawn on the pixels as stored); None: such an image is an error.
        cache: ``memmap``: images are decoded once, into files that all trainings read (see :mod:`bisenet.data.cache`);
            ``ram``: the same, and they are read into memory at the start; None: images are decoded each time. The
            data do not depend on it.
        cache_root: folder of the caches.

    Raises:
        ValueError: a value outside its range, or a mistake in the class table; with :meth:`setup`, in the data set.
    """

    def __init__(
        self, dataset: Callable[[Path], Any], root: str | Path, classes: str | Path | ClassTable,
        augment: Sequence[Any] | Mapping[str, Any], seed: int, *, name: str = "", train_split: str = "train",
        val_split: str = "val", report_split: str = "val", mean: Sequence[float] = (0.3257, 0.3690, 0.3223),
        std: Sequence[float] = (0.2112, 0.2148, 0.2115), eval_window: Sequence[int] = (1024, 1024),
        eval_short_side: int | None = None, batch_size: int = 16, workers: int | str = "auto",
        limit: int | None = None, exif: str | None = None, cache: str | None = None,
        cache_root: str | Path = "outputs/cache",
    ) -> None:  # fmt: skip
        super().__init__()
        numbers = {"batch_size": (batch_size, 1), "workers": (0 if workers == "auto" else workers, 0),
                   "limit": (1 if limit is None else limit, 1)}  # fmt: skip
        for key, (value, least) in numbers.items():
            if not (isinstance(value, int) and value >= least):
                also = " or auto" * (key == "workers")
                raise ValueError(f"{key}: got {value}, accepted: an integer of at least {least}{also}")
        if cache not in ("memmap", "ram", None):
            raise ValueError(f"cache: got {cache!r}, accepted: memmap | ram | null")
        transforms = list(augment.values()) if isinstance(augment, Mapping) else list(augment)
        if wrong := [step for step in transforms if not isinstance(step, A.BasicTransform | A.BaseCompose)]:
            raise ValueError(f"augment: got {wrong[0]!r}, accepted: transforms of albumentations")
        self.root = Path(root).expanduser()
        try:
            self.dataset = dataset(self.root)
        except ValueError as error:  # which begins with the name of an argument
            raise ValueError(f"dataset.{error}") from error
        self.table = classes if isinstance(classes, ClassTable) else ClassTable.load(classes)
        self.name, self.transform, self.seed = name, A.Compose(transforms), seed
        self.train_split, self.val_split, self.report_split = train_split, val_split, report_split
        self.mean, self.std, self.eval_window, self.eval_short_side = mean, std, eval_window, eval_short_side
        self.batch_size, self.workers, self.limit, self.exif = batch_size, workers, limit, exif
        decode = partial(datasets.read_sample, table=self.table)
        of = {"root": str(self.root.resolve()), "classes": self.table.to_dict()}
        self._cache = cache and DecodedCache(Path(cache_root).expanduser(), of, decode, resident=cache == "ram")
        self._read: datasets.Read = self._cache.read if self._cache else decode
        self._samples: dict[str, list[Sample]] = {}
        self._digests: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Let a data set that makes its files itself make those that are missing."""
        if hasattr(self.dataset, "prepare"):
            self.dataset.prepare()

    def setup(self, stage: str | None = None) -> None:
        """List and check the splits of a stage; for ``fit`` all splits, since an evaluation follows the training."""
        _, world, batches = self._share()
        if stage in ("fit", None) and self.batch_size % (world * batches):
            accepted = f"multiples of {world * batches}, the devices times trainer.accumulate_grad_batches"
            raise ValueError(f"data.batch_size: got {self.batch_size}, accepted: {accepted}")
        splits = {"validate": [self.val_split], "test": [self.report_split]}
        for split in splits.get(stage or "", [self.train_split, self.val_split, self.report_split]):
            self.samples(split)
        if stage == "fit":
            trained_on = {sample.image for sample in self.samples(self.train_split)}
            for split in dict.fromkeys((self.val_split, self.report_split)):
                if seen := sum(sample.image in trained_on for sample in self.samples(split)):
                    log.warning("%d of the %d images of %s are trained on as well: their scores say nothing about "
                                "images the network has not seen", seen, len(self.samples(split)), split)  # fmt: skip

    def samples(self, split: str) -> list[Sample]:
        """The samples of any split. All headers are checked, and up to 400 labels and 16 images are decoded.

        Raises:
            FileNotFoundError: see :func:`bisenet.data.datasets.list_samples`.
            ValueError: see there; or a file is damaged, of the wrong kind or without a label, an id is not in the class
                table, or a split has only ignored pixels or only black images.
        """
        if split not in self._samples:
            samples = datasets.list_samples(self.dataset, split, self.exif)[: self.limit]
            if not samples:
                raise ValueError(f"split {split!r} of {self.root} is empty")
            for sample in samples:
                datasets.check_headers(sample)
            if self._cache:
                self._cache.add(samples, partial(pool, cores()) if self.workers else None)
            # A few seconds at the size of Cityscapes, all labels of a small set.
            masks = self._masks(_spread(samples, 400))
            ignored = [(mask == self.table.ignore_index).all() for mask in masks]
            if all(ignored):  # as in the labels of Cityscapes' test split that are public
                raise ValueError(f"split {split!r} of {self.root} has only ignored pixels, {datasets.NOT_SCORABLE}")
            images = (self._read(sample)[0] for sample in _spread(samples, 16))
            if max(image.max() for image in images) < 16:
                raise ValueError(f"split {split!r} of {self.root} has only black images, {datasets.NEARLY_BLACK}")
            self._samples[split] = samples
            self._digests[split] = _digest(samples, self.root)
        return self._samples[split]

    def state_dict(self) -> dict[str, str]:
        """Split -> number of samples and digest of their names and sizes, which a continued run compares."""
        return dict(self._digests)

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Raise a ValueError if a split has changed since the run that is continued was begun."""
        trainer: Any = self.trainer
        same_run = Path(trainer.ckpt_path).is_relative_to(trainer.default_root_dir)
        for split, there in state_dict.items():
            if same_run and (here := self._digests.get(split, there)) != there:
                raise ValueError(
                    f"data: split {split!r} of {self.root} has changed: {there} there, {here} now; accepted: the files "
                    "that the run was begun with"
                )

    def examples(self, split: str, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Up to ``most`` images and masks (as ``datasets.read_sample``), evenly over a split and always the same."""
        return [self._read(sample) for sample in _spread(self.samples(split), most)]

    def _masks(self, samples: Iterable[Sample]) -> Iterator[np.ndarray]:
        """The masks of samples; without a cache, images are not decoded."""
        for sample in samples:
            yield self._cache.view(sample)[1] if self._cache else datasets.read_mask(sample, self.table)

    def class_counts(self, split: str) -> np.ndarray:
        """Pixels of each train id in the labels of a split, int64 (C,). Reads all labels: tens of ms each."""
        counts = np.zeros(256, np.int64)
        samples = self.samples(split)
        for mask in track(self._masks(samples), "Counting classes", len(samples), transient=True):
            counts += np.bincount(mask.ravel(), minlength=256)
        return counts[: self.table.num_classes]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Endless batches from the trainer's current step on; each rank gets its part of every step."""
        rank, world, parts = self._share()
        samples = self.samples(self.train_split)
        start = self.trainer.global_step * parts if self.trainer else 0
        size = self.batch_size // parts  # accumulated batches split a step, whose draws stay the same
        batches = datasets.TrainingBatches(len(samples), size, self.seed, start=start, rank=rank, world=world)
        # ScaleCrop reads only its window. Another first transform may write to its input, and gets copies.
        windowed = bool(self.transform.transforms) and isinstance(self.transform.transforms[0], ScaleCrop)
        read = self._cache.view if self._cache and windowed else self._read
        augmented = datasets.TrainingSet(samples, read, self.transform, self.seed)
        if self.workers == "auto":
            log.info("data.workers: auto took %d, of %d cores", self._workers(), cores())
        return self._loader(augmented, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """``val_split``."""
        return self.evaluation_dataloader(self.val_split)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """``report_split``."""
        return self.evaluation_dataloader(self.report_split)

    def evaluation_dataloader(self, split: str) -> DataLoader[dict[str, Tensor]]:
        """Any split, without augmentation."""
        rank, world, _ = self._share()
        samples = self.samples(split)
        if len(samples) < world:
            raise ValueError(f"split {split!r} of {self.root}: got {len(samples)} images, accepted: one per device")
        return self._loader(datasets.EvaluationSet(samples, self._read), sampler=range(rank, len(samples), world))

    def _share(self) -> tuple[int, int, int]:
        """Rank of this process, number of processes, and number of accumulated batches in a step."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches) if trainer else (0, 1, 1)

    def _workers(self) -> int:
        """Data-loading processes of this process."""
        trainer: Any = self.trainer
        processes = trainer.world_size // trainer.num_nodes if trainer else 1  # on this machine
        return min(16, max(0, cores() // processes - 1)) if self.workers == "auto" else int(self.workers)

    def _loader(self, dataset: Dataset[dict[str, Tensor]], **sampling: Iterable[Any]) -> DataLoader[dict[str, Tensor]]:
        cv2.setNumThreads(0)  # OpenCV's threads do not survive a fork, and compete with torch's
        workers = self._workers()
        return DataLoader(
            dataset,
            **sampling,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_init_worker,
            # Forked workers start at once; spawned ones would need seconds to import. Forking is safe on Linux.
            multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
            generator=torch.Generator(),  # else each iterator takes a number from the generator that training uses
        )


def _digest(samples: Sequence[Sample], root: Path) -> str:
    files = [file for sample in samples for file in (sample.image, sample.label)]
    listed = [(str(f.relative_to(root) if f.is_relative_to(root) else f), f.stat().st_size) for f in files]
    return f"{len(samples)} samples, names and sizes {sha256(repr(listed).encode()).hexdigest()[:16]}"


def _spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` of the samples, spread evenly."""
    indices = np.linspace(0, len(samples) - 1, min(len(samples), most)).round().astype(int)
    return [samples[index] for index in np.unique(indices)]


def _init_worker(_: int) -> None:
    cv2.setNumThreads(0)  # torch sets its own to 1
    for number in ENDING_SIGNALS:  # may be sent to all processes, and the step that is being finished needs its workers
        signal.signal(number, signal.SIG_IGN)
