"""Segment images, folders, globs, videos, cameras and streams; write overlays, masks and ids."""

import glob
import itertools
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import KW_ONLY, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlparse

import cv2
import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from rich.progress import MofNCompleteColumn, Progress

from bisenet.report import legend, legend_columns, overlay

if TYPE_CHECKING:
    from bisenet.classes import ClassTable
    from bisenet.inference import Segmenter

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
_KINDS = ("overlay", "palette", "train_ids", "label_ids")
_HEADER_LOCK = threading.Lock()  # a header is read without Pillow's limit, which all threads share
_CODEC = "mp4v"  # the one for .mp4 that opencv-python can encode; it has no H.264
_LEGEND_ROWS = 4  # at most, below a video; if more classes exist, those with most pixels in the frame are named


class UnusableInput(ValueError):
    """An image or video that cannot be read or segmented; the message names it."""


class TooLarge(UnusableInput):
    """An image of more pixels than are accepted."""


@dataclass(frozen=True)
class Source:
    """One image or one stream of frames."""

    origin: Path | int | str
    """A file, the index of a camera, or the address of a stream."""
    name: Path
    """Path of its outputs in the folder of their kind; without suffix, unless two sources would then share it."""

    @property
    def is_stream(self) -> bool:
        """Whether it has many frames: a video, camera or stream."""
        return not isinstance(self.origin, Path) or self.origin.suffix.lower() in _VIDEOS

    def __str__(self) -> str:
        """Kind and origin for messages, without the user and password of an address."""
        kind = "stream" if isinstance(self.origin, str) else "camera" if isinstance(self.origin, int) else "video"
        return f"{kind} {re.sub('//[^/]*@', '//', str(self.origin))}" if self.is_stream else str(self.origin)


def find_sources(given: str, exclude: Sequence[Path]) -> list[Source]:
    """Return the sources that ``given`` names, ordered by path. Hidden files (``.name``) in a folder are skipped.

    Args:
        given: an image, a video, a folder (all images and videos below it), a glob (``**`` matches nested folders), the
            index of a camera, or the address of a stream (``rtsp://``, ``http://``), which is read as a video.
        exclude: files and folders of the outputs, which are not taken as inputs.

    Raises:
        FileNotFoundError: no source is found.
        ValueError: a glob with ``..`` after its first wildcard.
    """
    if (url := urlparse(given)).netloc:
        return [Source(given, Path(re.sub(r"[^\w.-]+", "-", f"{url.hostname}{url.path}").strip("-.")))]
    path = Path(given).expanduser()
    if given.isdecimal() and not path.exists():
        return [Source(int(given), Path(f"camera{given}"))]
    if path.is_dir():
        base, files = path, [p for p in path.rglob("*") if not re.search(r"(^|/)\.", p.relative_to(path).as_posix())]
    elif path.is_file():
        base, files = path.parent, [path]
    else:
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])
        base, files = Path(*plain), [Path(p) for p in glob.glob(str(path), recursive=True)]
    found = sorted(p for p in files if p.is_file() or not p.exists())  # broken links stay: reading reports them
    outputs = {os.path.realpath(p) for p in exclude}
    files = [p for p in found if outputs.isdisjoint(map(str, ((q := Path(os.path.realpath(p))), *q.parents)))]
    if path.is_dir():
        others = Counter(p.suffix.lower() or p.name for p in files if p.suffix.lower() not in _IMAGES | _VIDEOS)
        if others:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
            log.warning("%s: %d files of other formats are left out (%s)", path, others.total(), listed)
        files = [p for p in files if p.suffix.lower() in _IMAGES | _VIDEOS]
    if not files:
        there = "only what lies among the outputs" if found else "nothing"
        raise FileNotFoundError(
            f"input: {there} at {given!r}; accepted: an image ({' '.join(sorted(_IMAGES))}), a video "
            f"({' '.join(sorted(_VIDEOS))}), a folder of them, a glob such as 'images/*.png', a camera's index, or a "
            "stream (rtsp://, http://)"
        )
    names = [p.relative_to(base).with_suffix("") for p in files]
    if any(".." in name.parts for name in names):
        raise ValueError(f"input: got {given!r}, accepted: a glob without '..' after its first wildcard")
    times = Counter(names)
    return [Source(p, p.relative_to(base) if times[name] > 1 else name) for p, name in zip(files, names, strict=True)]


def read_image(path: Path, max_pixels: float = 1e8) -> np.ndarray:
    """Read an image as RGB uint8 (H, W, 3), rotated as its EXIF orientation says.

    Grey is repeated to three channels, alpha is dropped, 16 bits are scaled to 8.

    Raises:
        TooLarge: it has more than ``max_pixels`` pixels.
        UnusableInput: it cannot be read or decoded, or has another bit depth.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error}") from error
    return decode_image(content, path, max_pixels)


def decode_image(content: bytes, path: Path | str, max_pixels: float) -> np.ndarray:
    """Decode the bytes of a file as :func:`read_image` does; ``path`` names it in messages."""
    try:
        with _HEADER_LOCK:
            width, height, count = _header(content)
        if width * height > max_pixels:
            size = f"{width} x {height}, {width * height / 1e6:.0f} megapixels"
            raise TooLarge(f"{path} has {size}; accepted: up to {max_pixels / 1e6:g}, unless max_pixels says more")
        # imdecode refuses truncated files, imread fills them up. With IMREAD_COLOR_RGB, OpenCV 5.0 turns a 16-bit TIFF
        # into noise.
        flags = cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if count else None
    except cv2.error as error:
        raise UnusableInput(f"{path} cannot be read: {error}") from error
    if image is None:
        raise UnusableInput(f"{path} cannot be decoded: no image, or a truncated or damaged one")
    if count > 1:
        log.warning("%s holds several images; the first is taken", path)
    if image.dtype == np.uint16:
        if (largest := image.max()) < 2**12:
            log.warning("%s: nearly black, its 16-bit values end at %d; scale 12-bit data to 16 bits", path, largest)
        image = np.rint(image / 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UnusableInput(f"{path} holds {image.dtype} values; accepted: 8 or 16 bits per channel")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _header(content: bytes) -> tuple[int, int, int]:
    """Return width, height and number of images of a file without decoding it; zeros if it is not an image.

    For a TIFF the number is 1, or 2 for any more.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the message of Pillow's limit lacks the size
    try:
        if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # TIFF; Pillow refuses some bit depths
            tags = ImageFileDirectory_v2(content[: 16 if b"+" in content[:4] else 8])
            (stream := BytesIO(content)).seek(tags.next)
            tags.load(stream)
            return tags[256], tags[257], 1 + (tags.next > 0)
        with Image.open(BytesIO(content)) as image:
            return *image.size, getattr(image, "n_frames", 1)
    except Exception:  # damaged bytes raise exceptions of many types
        return 0, 0, 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@dataclass
class Predictions:
    """Images or videos to segment, and the outputs to write. Creating it checks everything that needs no model.

    Args:
        input: an image, a video, a folder, a glob, a camera's index or a stream, see :func:`find_sources`.
        folder: where the outputs go.
        overlay: write the image blended with the class colours: ``overlay/<name>.jpg``, for a video ``.mp4``.
        palette: write a PNG with a colour palette whose values are the train ids: ``palette/<name>.png``. For a video
            this and the following are a folder ``<name>`` of numbered frames.
        train_ids: write a grey PNG of train ids: ``train_ids/<name>.png``.
        label_ids: write a grey PNG of the data set's own ids: ``label_ids/<name>.png``; for Cityscapes the format that
            its benchmark takes.
        legend: name the classes below each overlay, and all of them in ``legend.png``.
        alpha: weight of the colours in the overlay, in [0, 1].
        overwrite: replace outputs that exist.
        max_frames: stop each video, camera or stream after this many frames; None: at its end or with Ctrl-C.
        max_pixels: an image or frame of more pixels is refused before it is decoded.

    Raises:
        FileNotFoundError: no input is found.
        FileExistsError: an output exists and ``overwrite`` is not set.
        ValueError: a value that is not accepted, or two inputs with one output.
    """

    input: str | int | Path
    folder: Path
    _: KW_ONLY
    overlay: bool = True
    palette: bool = False
    train_ids: bool = False
    label_ids: bool = False
    legend: bool = True
    alpha: float = 0.5
    overwrite: bool = False
    max_frames: int | None = None
    max_pixels: float = 1e8

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("overlay", bool(self.kinds), "true, unless palette, train_ids or label_ids is"),
            ("alpha", 0 <= self.alpha <= 1, "a number in [0, 1]"),
            ("max_frames", self.max_frames is None or self.max_frames >= 1, "null or at least 1"),
            ("max_pixels", self.max_pixels >= 1, "a number of at least 1"),
        ):
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted: {accepted}")
        self.folder = Path(self.folder).expanduser()
        outputs = [self.folder / name for name in (*_KINDS, "legend.png")]
        self.sources = find_sources(str(self.input), exclude=outputs)
        targets = [target for source in self.sources for target in self.targets(source).values()]
        folders = {target for source in self.sources if source.is_stream for target in self.targets(source).values()}
        times = Counter(targets)
        if doubled := [target for target in targets if times[target] > 1 or not folders.isdisjoint(target.parents)]:
            raise ValueError(f"input: several would be written to {doubled[0]}; accepted: predict them one by one")
        existing = [str(target) for target in targets if target.exists()]
        if existing and not self.overwrite:
            raise FileExistsError(
                f"output: {len(existing)} exist, such as {existing[0]}; accepted: another output, or overwrite=true"
            )

    @property
    def kinds(self) -> list[str]:
        """The kinds of output that are written, each to a folder of this name."""
        return [kind for kind in _KINDS if getattr(self, kind)]

    def targets(self, source: Source) -> dict[str, Path]:
        """Return the output of each kind: a file, or a folder of numbered files for the masks of a stream."""
        suffixes = {"overlay": ".mp4" if source.is_stream else ".jpg"}
        default = "" if source.is_stream else ".png"
        return {kind: self.folder / kind / f"{source.name}{suffixes.get(kind, default)}" for kind in self.kinds}

    def run(self, segmenter: "Segmenter") -> list[str]:
        """Segment every source and write its outputs. Reading, segmenting and writing overlap, each in its own thread.

        If a video is truncated, the frames before that are kept. Ctrl-C ends a camera or a stream.

        Returns:
            One message for each source that could not be read or segmented, which names the source. The outputs of all
            other sources are written.
        """
        classes = segmenter.classes
        if self.legend and (self.overwrite or not (self.folder / "legend.png").exists()):
            drawn = legend(classes.names, classes.palette, range(classes.num_classes), width=1024)
            _write_file(self.folder / "legend.png", _encode(drawn, ".png"))
        problems: dict[Source, str] = {}
        frames, network_seconds, started = 0, 0.0, time.perf_counter()

        @contextmanager
        def skipping(source: Source) -> Generator[None]:
            try:
                yield
            except UnusableInput as error:
                problems[source] = str(error)
                log.error("skipped: %s", error)
                progress.advance(bar, not source.is_stream)

        def read() -> Iterator[tuple[Source, np.ndarray, float]]:
            for source in self.sources:
                with skipping(source):
                    for rgb, rate in self._frames(source, progress):
                        yield source, rgb, rate
                        if source in problems:
                            break

        def segment() -> Iterator[tuple[Source, np.ndarray, np.ndarray, float]]:
            nonlocal network_seconds
            for source, rgb, rate in _ahead(read(), reader):
                if source in problems:
                    continue
                with skipping(source):
                    before = time.perf_counter()
                    mask = _segment(segmenter, rgb, source)
                    network_seconds += time.perf_counter() - before
                    yield source, rgb, mask, rate

        with (
            Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress,
            ThreadPoolExecutor(1, "reader") as reader,
            ThreadPoolExecutor(1, "network") as network,
        ):
            bar = progress.add_task("frames", total=len(self.sources))
            try:
                for source, items in itertools.groupby(_ahead(segment(), network), lambda item: item[0]):
                    with closing(_Outputs(source, classes, self)) as outputs, skipping(source):
                        for _, rgb, mask, rate in items:
                            outputs.write(rgb, mask, rate)
                            frames += 1
                            progress.advance(bar)
            except KeyboardInterrupt:
                if isinstance(self.sources[0].origin, Path):  # a camera or a stream is the only source
                    raise
        seconds = time.perf_counter() - started
        log.info(
            "%d of %d inputs, %d frames in %.1f s: %.2f frames per second, the network alone %.2f; written to %s",
            len(self.sources) - len(problems), len(self.sources), frames, seconds, frames / seconds,
            frames / network_seconds if network_seconds else 0, self.folder,
        )  # fmt: skip
        return list(problems.values())

    def _frames(self, source: Source, progress: Progress) -> Iterator[tuple[np.ndarray, float]]:
        """Yield the frames of a source, RGB uint8 (H, W, 3), each with the frames per second (0 for an image)."""
        if isinstance(source.origin, Path) and not source.is_stream:
            yield read_image(source.origin, self.max_pixels), 0.0
            return
        capture, number = cv2.VideoCapture(source.origin if isinstance(source.origin, int) else str(source.origin)), 0
        pixels = capture.get(cv2.CAP_PROP_FRAME_WIDTH) * capture.get(cv2.CAP_PROP_FRAME_HEIGHT)
        announced, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        announced = min(announced, self.max_frames or announced)
        progress.tasks[0].total += max(announced - 1, 0)  # type: ignore[operator]
        try:
            if pixels > self.max_pixels:
                raise UnusableInput(f"{source} has {pixels / 1e6:.0f} megapixels; accepted: {self.max_pixels / 1e6:g}")
            while number != self.max_frames and (decoded := capture.read())[0]:
                yield cv2.cvtColor(decoded[1], cv2.COLOR_BGR2RGB), rate if 0 < rate < 1000 else 25.0
                number += 1
        finally:
            capture.release()
        if number == 0:
            raise UnusableInput(f"{source} cannot be read: not there, damaged, or of an unknown codec")
        if number < announced:
            log.warning("%s ended after %d of the %d frames that it announces", source, number, announced)


def _ahead(items: Iterator[_T], thread: Executor) -> Iterator[_T]:
    """Yield the items; while the caller uses one, ``thread`` computes the next."""
    following = thread.submit(next, items, None)
    while (item := following.result()) is not None:
        following = thread.submit(next, items, None)
        yield item


def _segment(segmenter: "Segmenter", rgb: np.ndarray, source: Source) -> np.ndarray:
    try:
        return segmenter.predict(rgb)
    except (RuntimeError, MemoryError) as error:  # out of memory, or a device error; a smaller image may fit
        line = str(error).partition("\n")[0] or type(error).__name__
        size = f"{rgb.shape[0]} x {rgb.shape[1]} pixels"
        raise UnusableInput(f"{source} cannot be segmented ({size}): {line}") from error


class _Outputs:
    """Writes the outputs of one source. Files get their name once complete; an interrupted video keeps its frames."""

    def __init__(self, source: Source, classes: "ClassTable", options: Predictions) -> None:
        self.source, self.classes, self.options, self.targets = source, classes, options, options.targets(source)
        self.video: cv2.VideoWriter | None = None
        self.number = 0
        for kind, target in self.targets.items() if source.is_stream and options.overwrite else ():
            for frame in target.glob("[0-9]*.png") if kind != "overlay" else ():
                frame.unlink()  # frames of an earlier, longer video would remain

    def close(self) -> None:
        """Finish the video, if there is one, and give it its name."""
        if self.video is not None:
            self.video.release()
            os.replace(_draft(self.targets["overlay"]), self.targets["overlay"])

    def write(self, rgb: np.ndarray, mask: np.ndarray, rate: float) -> None:
        """Write one frame: RGB uint8 (H, W, 3) and train ids, uint8 (H, W); ``rate`` is in frames per second."""
        for kind, target in self.targets.items():
            if kind == "overlay" and self.source.is_stream:
                self._write_frame(self._draw(rgb, mask), target, rate)
            elif kind == "overlay":
                _write_file(target, _encode(self._draw(rgb, mask), ".jpg"))
            else:
                ids = Image.fromarray(self.classes.decode[mask] if kind == "label_ids" else mask)
                if kind == "palette":
                    ids.putpalette(self.classes.palette.tobytes())  # the values stay the train ids
                ids.save(encoded := BytesIO(), "PNG")
                file = target / f"{self.number:06d}.png" if self.source.is_stream else target
                _write_file(file, encoded.getvalue())
        self.number += 1

    def _draw(self, rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
        names, palette = self.classes.names, self.classes.palette
        drawn = overlay(rgb, mask, palette, self.options.alpha, edges=True)
        if not self.options.legend:
            return drawn
        counts = np.bincount(mask.ravel(), minlength=len(names))
        rows, shown = None, np.flatnonzero(counts)
        if self.source.is_stream:
            columns = legend_columns(names, rgb.shape[1])
            rows = min(-(-len(names) // columns), _LEGEND_ROWS)
            largest = np.argsort(-counts, kind="stable")[: rows * columns]
            shown = np.arange(len(names)) if len(names) <= rows * columns else largest[counts[largest] > 0]
        return np.vstack([drawn, legend(names, palette, sorted(map(int, shown)), rgb.shape[1], rows)])

    def _write_frame(self, frame: np.ndarray, target: Path, rate: float) -> None:
        height, width = (side + side % 2 for side in frame.shape[:2])  # the codec needs even sides
        if self.video is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            video = cv2.VideoWriter(str(_draft(target)), cv2.VideoWriter.fourcc(*_CODEC), rate, (width, height))
            if not video.isOpened():
                raise OSError(f"{target} cannot be written: OpenCV has no encoder for {_CODEC}, or cannot write there")
            self.video, self.size = video, (height, width)
        if (height, width) != self.size:  # OpenCV would drop the frame silently
            raise UnusableInput(f"{self.source}: frame {self.number} has another size than the first")
        below, right = height - frame.shape[0], width - frame.shape[1]
        frame = cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE)
        self.video.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))


def _encode(rgb: np.ndarray, suffix: str) -> bytes:
    quality = [cv2.IMWRITE_JPEG_QUALITY, 92] if suffix == ".jpg" else []
    done, encoded = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), quality)
    assert done
    return encoded.tobytes()


def _draft(target: Path) -> Path:
    return target.with_name(f".{os.getpid()}.{target.name}")


def _write_file(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _draft(target).write_bytes(content)
        os.replace(_draft(target), target)
    except OSError as error:  # the error of a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(target)) from error
