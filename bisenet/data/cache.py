"""A cache of decoded images and masks, in files that are mapped into memory: a training reads only its crops' windows.

A cache is a folder that trainings share, with a file for each sample: RGB (H, W, 3), then the mask (H, W). The file's
name holds a digest of the sample (paths, sizes, times of change), the image's size and a checksum of the pixels, so
that the folder is its own index. Files appear whole and are never changed, so that readers need no lock; processes
that decode take turns. ``cache.json`` describes the data set.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import PIL
from filelock import FileLock, Timeout
from PIL import Image
from rich.progress import track

from bisenet.files import replacing

if TYPE_CHECKING:
    from bisenet.data.datasets import Sample

log = logging.getLogger(__name__)

_FORMAT = 2  # version of the files' layout
Pixels = tuple[np.ndarray, np.ndarray]
"""Image and mask, as :func:`bisenet.data.datasets.read_sample` returns them."""


class DecodedCache:
    """The decoded samples of a data set.

    :meth:`add` checks size and time of change of the data set's files. A sample's checksum is checked when a process
    reads it for the first time (1 ms for 1024x2048); checking all at the start would mean to read the whole cache.

    Args:
        root: folder of all caches.
        of: everything but the files that determines the pixels, in plain values, with ``root``, the folder of the data
            set. The cache is named after these values and the versions of the decoders.
        read: function that decodes a sample; its errors pass through.
        resident: read all samples into memory when they are added, instead of each page when it is needed.
    """

    def __init__(
        self, root: Path, of: Mapping[str, Any], read: "Callable[[Sample], Pixels]", resident: bool = False
    ) -> None:
        self._of = {"format": _FORMAT, "opencv": cv2.__version__, "pillow": PIL.__version__, **of}
        digest = sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()
        self.folder = root / f"{Path(of['root']).name}-{digest[:12]}"
        self._read, self._resident = read, resident
        self._files: dict[Sample, Path] = {}
        self._checked: set[Path] = set()

    def add(self, samples: "Sequence[Sample]", pool: Callable[[], Any] | None = None) -> None:
        """Decode the samples that are not in the cache, or whose files have changed.

        If another process is decoding into this cache, wait for it.

        Args:
            samples: samples whose files exist and have sound headers.
            pool: function that makes an executor of processes to share the work; None: only this process.

        Raises:
            ValueError: an error of ``read``, or too little room on the disk.
            OSError: the cache cannot be written; the message names the file.
        """
        if self._missing(samples):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock():
                if missing := self._missing(samples):
                    self._build(missing, pool)
        if self._resident:
            for sample in track(samples, f"Reading {self.folder}", transient=True):
                self.view(sample)

    def view(self, sample: "Sample") -> Pixels:
        """Image, RGB uint8 (H, W, 3), and mask, uint8 (H, W), both read-only; each page is read when it is used.

        A damaged or missing copy is decoded and written again, with a warning.
        """
        file = self._files[sample]
        _, size, checksum = file.stem.split("-")
        height, width = map(int, size.split("x"))
        with suppress(OSError, ValueError):  # the file is missing or truncated
            pixels = np.asarray(np.memmap(file, np.uint8, "r", shape=4 * height * width))
            image, mask = pixels[: -height * width].reshape(height, width, 3), pixels[-height * width :]
            if file in self._checked or _checksum(pixels) == checksum:
                self._checked.add(file)
                return image, mask.reshape(height, width)
        log.warning("%s: the decoded copy of %s is damaged or missing; it is decoded again", file, sample.image)
        image, mask = self._read(sample)
        if _checksum(_joined(image, mask)) == checksum:  # else the data set has changed since the start
            with suppress(OSError):  # the cache may be read-only
                _write(file, _joined(image, mask))
        return image, mask

    def read(self, sample: "Sample") -> Pixels:
        """A copy of :meth:`view`."""
        image, mask = self.view(sample)
        return np.array(image), np.array(mask)

    def _missing(self, samples: "Sequence[Sample]") -> "list[Sample]":
        """The samples that have no file in the cache; the files of the others are recorded."""
        there = {file.name.partition("-")[0]: file for file in self.folder.glob("*.u8")}
        found = {sample: there.get(_digest(sample)) for sample in samples}  # a sample that is listed twice counts once
        self._files |= {sample: file for sample, file in found.items() if file}
        return [sample for sample, file in found.items() if file is None]

    def _lock(self) -> Any:
        lock = FileLock(self.folder / ".lock")
        try:
            return lock.acquire(blocking=False)
        except Timeout:
            log.info("waiting for another process that decodes into %s", self.folder)
            return lock.acquire()

    def _build(self, missing: "list[Sample]", pool: Callable[[], Any] | None) -> None:
        (self.folder / "cache.json").write_text(json.dumps(self._of, indent=2), encoding="utf-8")
        size, free = sum(map(_size, missing)), shutil.disk_usage(self.folder).free
        if size > free:
            raise ValueError(
                f"data.cache: {self.folder} would take {_gb(size)}, and {_gb(free)} are free; accepted: "
                "data.cache_root on another disk, or data.cache=null"
            )
        log.info("decoding %d images to %s, %s of %s that are free", len(missing), self.folder, _gb(size), _gb(free))
        with pool() if pool else nullcontext() as executor:
            run: Any = executor.map if executor else map
            done = run(partial(_decode, read=self._read, folder=self.folder), missing)
            for sample, file in zip(missing, track(done, f"Decoding to {self.folder}", len(missing)), strict=True):
                self._files[sample] = file


def _decode(sample: "Sample", read: "Callable[[Sample], Pixels]", folder: Path) -> Path:
    """Decode a sample and write it; returns the file."""
    digest = _digest(sample)  # before reading: a file that changes meanwhile is decoded again the next time
    image, mask = read(sample)
    pixels = _joined(image, mask)
    file = folder / f"{digest}-{mask.shape[0]}x{mask.shape[1]}-{_checksum(pixels)}.u8"
    _write(file, pixels)
    return file


def _write(file: Path, pixels: np.ndarray) -> None:
    with replacing(file) as stream:
        stream.write(pixels.tobytes())


def _joined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.concatenate([image.ravel(), mask.ravel()])


def _digest(sample: "Sample") -> str:
    """Digest of a sample: its files' paths, sizes and times of change, and how they are read."""
    files = [(os.path.abspath(f), f.stat().st_size, f.stat().st_mtime_ns) for f in (sample.image, sample.label)]
    return sha256(json.dumps([files, sample.train_ids, sample.exif]).encode()).hexdigest()[:24]


def _size(sample: "Sample") -> int:
    with Image.open(sample.label) as label:  # image and label have the same size
        return 4 * label.size[0] * label.size[1]


def _checksum(pixels: np.ndarray) -> str:
    """CRC-32 of the sums of pages of 4096 bytes: a changed or missing page shows, at a tenth of the time."""
    whole = pixels.size // 4096 * 4096
    sums = pixels[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    return f"{zlib.crc32(pixels[whole:].data, zlib.crc32(sums.tobytes())):08x}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
