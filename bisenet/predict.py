"""Images, folders, globs, videos and cameras in; overlays, masks and ids out."""

import glob
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

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

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
_CODEC = "mp4v"  # the one for .mp4 that opencv-python can encode; it has no H.264
_LEGEND_ROWS = 4  # of a video, whose frames all have one size; with more classes the largest of a frame are named


class UnusableInput(ValueError):
    """An image or video that cannot be read or segmented; the message names it."""


class TooLarge(UnusableInput):
    """An image of more pixels than are accepted."""


@dataclass(frozen=True)
class Source:
    """One image or one stream of frames."""

    origin: Path | int
    """A file, or the index of a camera."""
    name: Path
    """Where its outputs go, relative to the folder of their kind and without suffix."""

    @property
    def is_stream(self) -> bool:
        """Many frames rather than one."""
        return isinstance(self.origin, int) or self.origin.suffix.lower() in _VIDEOS

    def open(self) -> cv2.VideoCapture:
        """The stream."""
        return cv2.VideoCapture(self.origin if isinstance(self.origin, int) else str(self.origin))

    def announced(self, key: int) -> float:
        """What a video file says of itself, a number of OpenCV's ``CAP_PROP``; 0 for a camera or where it is silent."""
        if isinstance(self.origin, int):
            return 0.0
        capture = self.open()
        value = capture.get(key)
        capture.release()
        return max(value, 0.0)


def find_sources(given: str, exclude: Path) -> list[Source]:
    """What an ``input`` names, ordered by path. Hidden files (``.name``) are none, unless named themselves.

    Args:
        given: an image, a video, a folder (all images and videos below it), a glob (``**`` goes through folders), or
            the index of a camera.
        exclude: folder of the outputs; what lies there is no input.

    Raises:
        FileNotFoundError: nothing there.
    """
    path = Path(given).expanduser()
    if given.isdecimal() and not path.exists():
        return [Source(int(given), Path(f"camera{given}"))]
    if path.is_dir():
        base, files = path, [p for p in path.rglob("*") if not re.search(r"(^|/)\.", p.relative_to(path).as_posix())]
    elif path.is_file():
        base, files = path.parent, [path]
    else:
        plain = list(path.parts[:-1])
        while any(map(glob.has_magic, plain)):
            plain.pop()
        base, files = Path(*plain), [Path(p) for p in glob.glob(str(path), recursive=True)]
    outputs = Path(os.path.realpath(exclude))
    kept = (p for p in files if p.is_file() or not p.exists())  # a link to nothing is named when it is read
    files = sorted(p for p in kept if outputs not in Path(os.path.realpath(p)).parents)
    if path.is_dir():
        others = Counter(p.suffix.lower() or p.name for p in files if p.suffix.lower() not in _IMAGES | _VIDEOS)
        if others:
            listed = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(8))
            log.warning("%s: %d files of other formats are left out (%s)", path, others.total(), listed)
        files = [p for p in files if p.suffix.lower() in _IMAGES | _VIDEOS]
    if not files:
        raise FileNotFoundError(
            f"input: nothing at {given!r}; accepted: an image ({' '.join(sorted(_IMAGES))}), a video "
            f"({' '.join(sorted(_VIDEOS))}), a folder of them, a glob such as 'images/*.png', or a camera's index"
        )
    names = [p.relative_to(base).with_suffix("") for p in files]
    times = Counter(names)
    return [Source(p, p.relative_to(base) if times[name] > 1 else name) for p, name in zip(files, names, strict=True)]


def read_image(path: Path, max_pixels: float = 1e8) -> np.ndarray:
    """An image as RGB uint8 (H, W, 3), upright as its camera says.

    Grey is repeated, alpha is left out, 16 bits are scaled to 8.

    Raises:
        UnusableInput: no image, a damaged one, one of another depth, or one of more than ``max_pixels``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UnusableInput(f"{path} cannot be read: {error}") from error
    return decode_image(content, path, max_pixels)


def decode_image(content: bytes, path: Path | str, max_pixels: float) -> np.ndarray:
    """As :func:`read_image`, from the bytes of a file; ``path`` stands in messages."""
    try:
        width, height, count = _header(content)
        if width * height > max_pixels:
            size = f"{width} x {height}, {width * height / 1e6:.0f} megapixels"
            raise TooLarge(f"{path} has {size}; accepted: up to {max_pixels / 1e6:g}, unless max_pixels says more")
        # It refuses truncated files, which imread completes. OpenCV 5.0 makes noise of a 16-bit TIFF as COLOR_RGB.
        flags = cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if count else None
    except cv2.error as error:
        raise UnusableInput(f"{path} cannot be read: {error}") from error
    if image is None:
        raise UnusableInput(f"{path} cannot be decoded: no image, or a truncated or damaged one")
    if count > 1:
        log.warning("%s holds several images; the first is taken", path)
    if image.dtype == np.uint16:
        image = np.rint(image / 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UnusableInput(f"{path} holds {image.dtype} values; accepted: 8 or 16 bits per channel")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _header(content: bytes) -> tuple[int, int, int]:
    """Width, height and number of images (of a TIFF at most 2) of a file, decoding nothing; zeros for other files."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow's own does not name the size
    try:
        if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):  # of more depths than Pillow decodes
            tags = ImageFileDirectory_v2(content[: 16 if b"+" in content[:4] else 8])
            (stream := BytesIO(content)).seek(tags.next)
            tags.load(stream)
            return tags[256], tags[257], 1 + (tags.next > 0)
        with Image.open(BytesIO(content)) as image:
            return *image.size, getattr(image, "n_frames", 1)
    except Exception:  # damaged bytes fail in any way
        return 0, 0, 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@dataclass
class Predictions:
    """Images or videos to segment, and what is written of them. Everything is checked before a model is needed.

    Args:
        input: an image, a video, a folder, a glob or a camera's index, see :func:`find_sources`.
        folder: where the outputs go.
        overlay: the image under the colours of its classes: ``overlay/<name>.jpg``, of a video ``.mp4``.
        palette: coloured PNG whose values are the train ids: ``palette/<name>.png``; of a video a folder of frames, as
            the following.
        train_ids: grey PNG of train ids: ``train_ids/<name>.png``.
        label_ids: grey PNG of the data set's own ids: ``label_ids/<name>.png``; of Cityscapes what its benchmark takes.
        legend: name the classes below each overlay, and all of them in ``legend.png``.
        alpha: weight of the colours in the overlay, in [0, 1].
        overwrite: replace outputs that exist.
        max_frames: stop each video or camera after so many frames; None: at its end, for a camera Ctrl-C.
        max_pixels: a larger image is refused before it is decoded.

    Raises:
        FileNotFoundError: no input there.
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
        self.sources = find_sources(str(self.input), exclude=self.folder)
        targets = [target for source in self.sources for target in self.targets(source).values()]
        folders = {target for source in self.sources if source.is_stream for target in self.targets(source).values()}
        times = Counter(targets)
        if doubled := [target for target in targets if times[target] > 1 or not folders.isdisjoint(target.parents)]:
            raise ValueError(
                f"input: several files would be written to {doubled[0]}; accepted: predict them one by one"
            )
        existing = [str(target) for target in targets if target.exists()]
        if existing and not self.overwrite:
            more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
            raise FileExistsError(
                f"output: {', '.join(existing[:3])}{more} exist; accepted: another output, or overwrite=true"
            )

    @property
    def kinds(self) -> list[str]:
        """What is written, a folder each."""
        return [kind for kind in ("overlay", "palette", "train_ids", "label_ids") if getattr(self, kind)]

    def targets(self, source: Source) -> dict[str, Path]:
        """What is written of each kind: a file; of the masks of a stream, a folder of numbered files."""
        suffixes = {"overlay": ".mp4" if source.is_stream else ".jpg"}
        default = "" if source.is_stream else ".png"
        return {kind: self.folder / kind / f"{source.name}{suffixes.get(kind, default)}" for kind in self.kinds}

    def run(self, segmenter: "Segmenter") -> list[str]:
        """Segment every source and write.

        A stream ends early where its file does; what came before is kept. Ctrl-C ends a camera.

        Returns:
            One message for each source that could not be read or segmented, naming it; all others are written.
        """
        classes = segmenter.classes
        if self.legend and (self.overwrite or not (self.folder / "legend.png").exists()):
            drawn = legend(classes.names, classes.palette, range(classes.num_classes), width=1024)
            _write_file(self.folder / "legend.png", _encode(drawn, ".png"))
        problems: list[str] = []
        frames, network_seconds, started = 0, 0.0, time.perf_counter()
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            lengths = [self._length(source) for source in self.sources]
            bar = progress.add_task("frames", total=None if None in lengths else sum(filter(None, lengths)))
            for source in self.sources:
                try:
                    with closing(_Outputs(source, classes, self)) as outputs:
                        for rgb in self._frames(source):
                            before = time.perf_counter()
                            mask = _segment(segmenter, rgb, source)
                            network_seconds += time.perf_counter() - before
                            outputs.write(rgb, mask)
                            frames += 1
                            progress.advance(bar)
                except UnusableInput as error:
                    problems.append(str(error))
                    log.error("skipped: %s", error)
                    progress.advance(bar, 0 if source.is_stream else 1)
                except KeyboardInterrupt:
                    if not isinstance(source.origin, int):
                        raise
        seconds = time.perf_counter() - started
        log.info(
            "%d of %d inputs, %d frames in %.1f s: %.2f frames per second, the network alone %.2f; written to %s",
            len(self.sources) - len(problems), len(self.sources), frames, seconds, frames / seconds,
            frames / network_seconds if network_seconds else 0, self.folder,
        )  # fmt: skip
        return problems

    def _length(self, source: Source) -> int | None:
        """Number of frames as far as it is known."""
        if isinstance(source.origin, int):
            return self.max_frames
        frames = int(source.announced(cv2.CAP_PROP_FRAME_COUNT)) if source.is_stream else 1
        return frames if self.max_frames is None else min(frames, self.max_frames)

    def _frames(self, source: Source) -> Iterator[np.ndarray]:
        """RGB uint8 (H, W, 3) each."""
        if isinstance(source.origin, Path) and not source.is_stream:
            yield read_image(source.origin, self.max_pixels)
            return
        capture, number = source.open(), 0
        name = f"{'camera' if isinstance(source.origin, int) else 'video'} {source.origin}"
        try:
            while (self.max_frames is None or number < self.max_frames) and (decoded := capture.read())[0]:
                yield cv2.cvtColor(decoded[1], cv2.COLOR_BGR2RGB)
                number += 1
        finally:
            capture.release()
        if number == 0:
            raise UnusableInput(f"{name} cannot be read: not there, damaged, or of an unknown codec")
        if (announced := self._length(source)) is not None and number < announced:
            log.warning("%s ended after %d of the %d frames that it announces", name, number, announced)


def _segment(segmenter: "Segmenter", rgb: np.ndarray, source: Source) -> np.ndarray:
    try:
        return segmenter.predict(rgb)
    except (RuntimeError, MemoryError) as error:  # of the allocator or the device; a smaller image may fit
        line = str(error).partition("\n")[0] or type(error).__name__
        size = f"{rgb.shape[0]} x {rgb.shape[1]} pixels"
        raise UnusableInput(f"{source.origin} cannot be segmented ({size}): {line}") from error


class _Outputs:
    """What is written of one source. Files have another name at first; an interrupted video keeps its frames."""

    def __init__(self, source: Source, classes: "ClassTable", options: Predictions) -> None:
        self.source, self.classes, self.options, self.targets = source, classes, options, options.targets(source)
        self.video: cv2.VideoWriter | None = None
        self.number = 0
        for kind, target in self.targets.items() if source.is_stream and options.overwrite else ():
            for frame in target.glob("[0-9]*.png") if kind != "overlay" else ():
                frame.unlink()  # a longer video may have been here

    def close(self) -> None:
        """Finish the video."""
        if self.video is not None:
            self.video.release()
            os.replace(_draft(self.targets["overlay"]), self.targets["overlay"])

    def write(self, rgb: np.ndarray, mask: np.ndarray) -> None:
        """Write one frame: RGB uint8 (H, W, 3) and train ids, uint8 (H, W)."""
        for kind, target in self.targets.items():
            if kind == "overlay" and self.source.is_stream:
                self._write_frame(self._draw(rgb, mask), target)
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

    def _write_frame(self, frame: np.ndarray, target: Path) -> None:
        height, width = (side + side % 2 for side in frame.shape[:2])  # the codec halves the colours
        if self.video is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            rate = self.source.announced(cv2.CAP_PROP_FPS)
            rate = rate if 0 < rate < 1000 else 25.0
            video = cv2.VideoWriter(str(_draft(target)), cv2.VideoWriter.fourcc(*_CODEC), rate, (width, height))
            if not video.isOpened():
                raise OSError(f"{target} cannot be written: OpenCV has no encoder for {_CODEC} here, or no place")
            self.video, self.size = video, (height, width)
        if (height, width) != self.size:  # OpenCV would leave the frame out and say nothing
            raise UnusableInput(f"{self.source.origin}: frame {self.number} has another size than the first")
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
    _draft(target).write_bytes(content)
    os.replace(_draft(target), target)
