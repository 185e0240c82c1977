"""Images and masks decoded once, in a file that is mapped into memory: a training reads its crops' windows from there.

A cache is a folder that trainings share. ``pixels.u8`` holds a record for each sample, RGB (H, W, 3) and then the mask
(H, W); ``index.jsonl`` a line for each record, written after it, with where it lies and which files it was made of.
Both files only grow, and space is never used again: whoever reads is disturbed by no one who builds, a kill loses the
records in hand, and a lock is needed only to add some. ``cache.json`` says of what the cache is.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
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

_FORMAT = 1  # of the two files
_ALIGNMENT = 64  # of records, in bytes
Pixels = tuple[np.ndarray, np.ndarray]
"""Image and mask, as ``read_sample`` gives them."""


@dataclass(frozen=True)
class _Record:
    """A line of the index."""

    key: str
    offset: int
    shape: tuple[int, int]  # (H, W)
    checksum: int
    stamps: list[list[int]]  # size and time of change (ns) of the image and of the label
    contents: list[int]  # CRC-32 of the two files: the same where only the time has changed

    @property
    def end(self) -> int:
        return self.offset + _size(self.shape)


class DecodedCache:
    """The decoded samples of a data set.

    Size, time of change and the index are checked whenever samples are added, the checksum of a record when a process
    reads it for the first time (1 ms for 1024x2048; all of them at the start would be the whole file).

    Args:
        root: folder of all caches.
        of: what the pixels depend on beside the files, plain values; among them ``root``, the folder of the data set.
            With the versions of the decoders it makes the cache's name.
        read: decodes a sample; what it raises passes.
        resident: read all samples into memory when they are added, instead of each page when it is needed.
    """

    def __init__(
        self, root: Path, of: Mapping[str, Any], read: "Callable[[Sample], Pixels]", resident: bool = False
    ) -> None:
        self._of = {"format": _FORMAT, "opencv": cv2.__version__, "pillow": PIL.__version__, **of}
        digest = sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()
        self.folder = root / f"{Path(of['root']).name}-{digest[:12]}"
        self._read, self._resident = read, resident
        self._file, self._index = self.folder / "pixels.u8", self.folder / "index.jsonl"
        self._records: dict[str, _Record] = {}
        self._checked: set[int] = set()  # offsets
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # for a process that is spawned: a mapping is no data

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        there = self._file.exists() and self._file.stat().st_size
        self._pixels = np.asarray(np.memmap(self._file, np.uint8, "r")) if there else np.empty(0, np.uint8)

    def add(self, samples: "Sequence[Sample]", pool: Callable[[], Any] | None = None) -> None:
        """Decode those that are not there, or whose files have changed; another process that does is waited for.

        Args:
            samples: of files that exist and whose headers are in order.
            pool: makes an executor of processes to share the work; None: no process but this one.

        Raises:
            ValueError: what ``read`` raises; a disk, or for a resident cache a memory, that is too small.
            OSError: the cache cannot be written; the message names it.
        """
        self._load()
        if self._missing(samples):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._load()
                if missing := self._missing(samples):
                    self._build(missing, pool)
        self._map()
        if self._resident:
            size = sum(_size(self._records[_key(sample)].shape) for sample in samples)
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if size > memory:
                raise ValueError(f"data.cache: got ram, which takes {_gb(size)} of {_gb(memory)}; accepted: memmap")
            for sample in track(samples, f"Reading {self.folder}", transient=True):
                self.view(sample)

    def view(self, sample: "Sample") -> Pixels:
        """Image, RGB uint8 (H, W, 3), and mask, uint8 (H, W), not to be written to; read where they are used."""
        record = self._records[_key(sample)]
        image, mask = self._arrays(record)
        if record.offset not in self._checked:
            if _checksum(image, mask) != record.checksum:
                return self._repaired(sample, record)
            self._checked.add(record.offset)
        return image, mask

    def read(self, sample: "Sample") -> Pixels:
        """A copy of :meth:`view`."""
        image, mask = self.view(sample)
        return np.array(image), np.array(mask)

    def _arrays(self, record: _Record) -> Pixels:
        height, width = record.shape
        pixels = self._pixels[record.offset : record.end]
        return pixels[: -height * width].reshape(height, width, 3), pixels[-height * width :].reshape(height, width)

    def _repaired(self, sample: "Sample", record: _Record) -> Pixels:
        log.warning("%s: what it holds of %s is damaged, and decoded again", self._file, sample.image)
        image, mask = self._read(sample)
        if _checksum(image, mask) == record.checksum:  # else the files have changed since the start
            with suppress(OSError):  # a cache that may only be read
                _write(self._file, record.offset, image, mask)
        return image, mask

    def _load(self) -> None:
        """Read the index. Lines that are damaged or cut off count as not written, like records beyond the end."""
        lines = self._index.read_text(encoding="utf-8", errors="replace").splitlines() if self._index.exists() else []
        size = self._file.stat().st_size if self._file.exists() else 0
        records = [record for line in lines if (record := _parse(line))]
        self._end = max([size, *(record.end for record in records)])  # where the next record may lie
        self._records = {record.key: record for record in records if record.end <= size}

    def _missing(self, samples: "Sequence[Sample]") -> "list[Sample]":
        found = {_key(sample): sample for sample in samples}  # one that is listed twice is decoded once
        return [
            sample for key, sample in found.items()
            if key not in self._records or self._records[key].stamps != _stamps(sample)
        ]  # fmt: skip

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(self.folder / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            log.info("another process decodes into %s, which is waited for", self.folder)
            lock.acquire(blocking=True)
        try:
            yield
        finally:
            lock.release()

    def _build(self, missing: "list[Sample]", pool: Callable[[], Any] | None) -> None:
        if not (self.folder / "cache.json").exists():
            with replacing(self.folder / "cache.json") as stream:
                stream.write(json.dumps(self._of, indent=2).encode())
        with pool() if pool else nullcontext() as executor, self._index.open("a+b", buffering=0) as index:
            run: Any = executor.map if executor else map
            if index.tell() and self._index.read_bytes()[-1:] != b"\n":
                index.write(b"\n")  # after a line that a kill cut off

            def note(record: _Record) -> None:
                line = json.dumps(asdict(record))
                with _naming(self._index):
                    index.write(f"{zlib.crc32(line.encode()):08x} {line}\n".encode())
                self._records[record.key] = record

            known = [sample for sample in missing if _key(sample) in self._records]
            for sample, (stamps, contents) in zip(known, run(_sources, known), strict=True):
                record = self._records[_key(sample)]
                if record.contents == contents:  # touched, or copied: not changed
                    note(replace(record, stamps=stamps))
            if not (missing := self._missing(missing)):
                return
            shapes = [_header(sample) for sample in missing]
            sizes = [-(-_size(shape) // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
            first = -(-self._end // _ALIGNMENT) * _ALIGNMENT
            offsets = (first + np.cumsum([0, *sizes[:-1]])).tolist()
            free = shutil.disk_usage(self.folder).free
            if sum(sizes) > free:
                raise ValueError(
                    f"data.cache: {self.folder} would take {_gb(sum(sizes))}, and {_gb(free)} are free; accepted: "
                    "data.cache_root on another disk, or data.cache=null"
                )
            log.info("decoding %d images to %s, %s of %s that are free", len(missing), self.folder, _gb(sum(sizes)),
                     _gb(free))  # fmt: skip
            self._file.touch()
            done = run(partial(_decode, read=self._read, file=self._file), missing, offsets, shapes)
            for record in track(done, f"Decoding to {self.folder}", total=len(missing)):
                note(record)


def _decode(
    sample: "Sample", offset: int, shape: tuple[int, int], read: "Callable[[Sample], Pixels]", file: Path
) -> _Record:
    """Decode a sample, and write it."""
    stamps, contents = _sources(sample)  # before: files that change meanwhile are seen the next time
    image, mask = read(sample)
    if mask.shape != shape:  # there is no room for more
        raise ValueError(f"{sample.image}, {sample.label}: changed while they were read; accepted: start again")
    _write(file, offset, image, mask)
    return _Record(_key(sample), offset, (mask.shape[0], mask.shape[1]), _checksum(image, mask), stamps, contents)


def _write(file: Path, offset: int, image: np.ndarray, mask: np.ndarray) -> None:
    with _naming(file), file.open("r+b", buffering=0) as stream:
        stream.seek(offset)
        for array in (image, mask):
            left = array.reshape(-1).data
            while left:  # a write may take a part, as at the end of a disk
                left = left[stream.write(left) :]


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{file} cannot be written: {error.strerror}") from error


def _parse(line: str) -> _Record | None:
    checksum, _, text = line.partition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    fields = json.loads(text)
    return _Record(**fields | {"shape": tuple(fields["shape"])})


def _key(sample: "Sample") -> str:
    files = [os.path.abspath(file) for file in (sample.image, sample.label)]
    return json.dumps([*files, sample.train_ids, sample.exif])


def _stamps(sample: "Sample") -> list[list[int]]:
    return [[stat.st_size, stat.st_mtime_ns] for stat in (sample.image.stat(), sample.label.stat())]


def _sources(sample: "Sample") -> tuple[list[list[int]], list[int]]:
    stamps = _stamps(sample)
    return stamps, [zlib.crc32(file.read_bytes()) for file in (sample.image, sample.label)]


def _header(sample: "Sample") -> tuple[int, int]:
    """Height and width of the label, which has those of the image."""
    with Image.open(sample.label) as label:
        return label.size[1], label.size[0]


def _size(shape: tuple[int, int]) -> int:
    return 4 * shape[0] * shape[1]


def _checksum(*arrays: np.ndarray) -> int:
    """CRC-32 of the sums of pages of 4096 bytes: a changed or missing page shows, at a tenth of the time."""
    found = 0
    for array in arrays:
        flat = array.reshape(-1)
        whole = flat.size // 4096 * 4096
        sums = flat[:whole].view(np.uint64).reshape(-1, 512).sum(1)
        found = zlib.crc32(flat[whole:].data, zlib.crc32(sums.tobytes(), found))
    return found


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
