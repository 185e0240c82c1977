"""Pictures, folders, globs, videos and cameras in; overlays, masks and ids out."""

import glob
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Self

import cv2
import numpy as np
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from bisenet.classes import ClassTable
from bisenet.config import PredictConfig
from bisenet.inference import Segmenter
from bisenet.visualize import legend, legend_columns, overlay

log = logging.getLogger(__name__)

KINDS = ("overlay", "palette", "train_ids", "label_ids")
"""What can be written: a switch of PredictConfig and a folder of the output each."""

_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
_CODEC = "mp4v"  # the one for .mp4 that opencv-python can encode; it has no H.264
_LEGEND_ROWS = 4  # of a video, whose frames all have one size; with more classes the largest of a frame are named


@dataclass(frozen=True)
class Source:
    """One picture or one stream of frames."""

    origin: Path | int
    """A file, or the index of a camera."""
    name: Path
    """Where its outputs go, relative to the folder of their kind and without suffix."""

    @property
    def is_stream(self) -> bool:
        """Many frames rather than one."""
        return isinstance(self.origin, int) or self.origin.suffix.lower() in _VIDEOS

    def targets(self, kinds: Sequence[str], folder: Path) -> dict[str, Path]:
        """What is written for each kind: a file; for the masks of a stream, a folder of numbered files."""
        suffixes = {"overlay": ".mp4" if self.is_stream else ".jpg"}
        default = "" if self.is_stream else ".png"
        return {kind: folder / kind / f"{self.name}{suffixes.get(kind, default)}" for kind in kinds}


def find_sources(given: str, *, beside: Path) -> list[Source]:
    """What an ``input`` names, ordered by path.

    Args:
        given: a picture, a video, a folder (all pictures and videos below it), a glob (``**`` goes through folders),
            or the index of a camera.
        beside: folder of the outputs; what lies there is no input.

    Raises:
        FileNotFoundError: nothing there.
    """
    path = Path(given).expanduser()
    if given.isdecimal() and not path.exists():
        return [Source(int(given), Path(f"camera{given}"))]
    if path.is_dir():
        base, files = path, [p for p in path.rglob("*") if p.suffix.lower() in _PICTURES | _VIDEOS]
    elif path.is_file():
        base, files = path.parent, [path]
    else:
        plain = list(path.parts[:-1])
        while any(map(glob.has_magic, plain)):
            plain.pop()
        base, files = Path(*plain), [Path(p) for p in glob.glob(str(path), recursive=True)]
    outputs = Path(os.path.realpath(beside))
    kept = (p for p in files if p.is_file() or not p.exists())  # a link to nothing is named when it is read
    files = sorted(p for p in kept if outputs not in Path(os.path.realpath(p)).parents)
    if not files:
        raise FileNotFoundError(
            f"input: nothing at {given!r}; accepted: a picture ({' '.join(sorted(_PICTURES))}), a video "
            f"({' '.join(sorted(_VIDEOS))}), a folder of them, a glob such as 'pictures/*.png', or a camera's index"
        )
    names = [p.relative_to(base).with_suffix("") for p in files]
    taken = Counter(names)
    return [Source(p, p.relative_to(base) if taken[name] > 1 else name) for p, name in zip(files, names, strict=True)]


def require_free(sources: Sequence[Source], cfg: PredictConfig, folder: Path) -> None:
    """Raise FileExistsError where an output exists and ``overwrite`` is not set, ValueError where two would be one."""
    targets = [target for source in sources for target in source.targets(_kinds(cfg), folder).values()]
    times = Counter(targets)
    folders = {
        target for source in sources if source.is_stream for target in source.targets(_kinds(cfg), folder).values()
    }
    for target in targets:
        if times[target] > 1 or not folders.isdisjoint(target.parents):
            raise ValueError(f"input: several files would be written to {target}; accepted: predict them one by one")
    existing = [str(target) for target in targets if target.exists()]
    if existing and not cfg.overwrite:
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        raise FileExistsError(
            f"output: {', '.join(existing[:3])}{more} exist; accepted: another output, or overwrite=true"
        )


def run(segmenter: Segmenter, sources: Sequence[Source], cfg: PredictConfig, folder: Path) -> list[str]:
    """Segment every source and write what ``cfg`` asks for below the folder.

    A stream ends early where its file does; what came before is kept. Ctrl-C ends a camera.

    Returns:
        One message for each source that could not be read or segmented, naming it; all others are written.
    """
    if cfg.legend and (cfg.overwrite or not (folder / "legend.png").exists()):
        classes = segmenter.classes
        key = legend(classes.names, classes.palette, range(classes.num_classes), width=1024)
        _write_file(folder / "legend.png", _encode(key, ".png"))
    problems: list[str] = []
    frames, network_seconds, started = 0, 0.0, time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        lengths = [_length(source, cfg.max_frames) for source in sources]
        bar = progress.add_task("frames", total=None if None in lengths else sum(filter(None, lengths)))
        for source in sources:
            try:
                with _Writer(source, segmenter.classes, cfg, folder) as writer:
                    for rgb in _frames(source, cfg.max_frames):
                        before = time.perf_counter()
                        mask = _segment(segmenter, rgb, source)
                        network_seconds += time.perf_counter() - before
                        writer.write(rgb, mask)
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
        len(sources) - len(problems), len(sources), frames, seconds, frames / seconds,
        frames / network_seconds if network_seconds else 0, folder,
    )  # fmt: skip
    return problems


class UnusableInput(ValueError):
    """A picture or video that cannot be read or segmented; the message names it."""


def _segment(segmenter: Segmenter, rgb: np.ndarray, source: Source) -> np.ndarray:
    try:
        return segmenter.predict(rgb)
    except (RuntimeError, MemoryError) as error:  # of the allocator or the device; a smaller picture may fit
        size = f"{rgb.shape[0]} x {rgb.shape[1]} pixels"
        line = str(error).partition("\n")[0] or type(error).__name__
        raise UnusableInput(f"{source.origin} cannot be segmented ({size}): {line}") from error


def read_picture(path: Path) -> np.ndarray:
    """A picture as RGB uint8 (H, W, 3), upright as its camera says.

    Grey is repeated, alpha is left out, 16 bits are scaled to 8.

    Raises:
        UnusableInput: no picture, a damaged one, or one of another depth.
    """
    try:
        data = np.fromfile(path, np.uint8)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH
        picture = cv2.imdecode(data, flags) if data.size else None  # refuses truncated files, which imread completes
    except (OSError, cv2.error) as error:
        raise UnusableInput(f"{path} cannot be read: {error}") from error
    if picture is None:
        raise UnusableInput(f"{path} cannot be decoded: no picture, or a truncated or damaged one")
    if picture.dtype == np.uint16:
        return np.rint(picture / 257).astype(np.uint8)
    if picture.dtype != np.uint8:
        raise UnusableInput(f"{path} holds {picture.dtype} values; accepted: 8 or 16 bits per channel")
    return picture


def _frames(source: Source, most: int | None) -> Iterator[np.ndarray]:
    """RGB uint8 (H, W, 3) each."""
    if not source.is_stream:
        assert isinstance(source.origin, Path)
        yield read_picture(source.origin)
        return
    capture = _open(source.origin)
    name = f"camera {source.origin}" if isinstance(source.origin, int) else f"video {source.origin}"
    number = 0
    try:
        while most is None or number < most:
            decoded, frame = capture.read()
            if not decoded:
                break
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise UnusableInput(f"{name} cannot be read: not there, damaged, or of an unknown codec")
    announced = _length(source, most)
    if announced is not None and number < announced:
        log.warning("%s ended after %d of the %d frames that it announces", name, number, announced)


def _open(origin: Path | int) -> cv2.VideoCapture:
    return cv2.VideoCapture(origin if isinstance(origin, int) else str(origin))


def _length(source: Source, most: int | None) -> int | None:
    """Number of frames as far as it is known."""
    if not source.is_stream:
        return 1
    if isinstance(source.origin, int):
        return most
    capture = _open(source.origin)
    announced = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    capture.release()
    return announced if most is None else min(announced, most)


def _frame_rate(source: Source) -> float:
    """Frames per second; 25 where nothing is known."""
    rate = 0.0
    if not isinstance(source.origin, int):
        capture = _open(source.origin)
        rate = capture.get(cv2.CAP_PROP_FPS)
        capture.release()
    return rate if 0 < rate < 1000 else 25.0


class _Writer:
    """The outputs of one source. A file has another name while it is written; an interrupted video keeps its frames."""

    def __init__(self, source: Source, classes: ClassTable, cfg: PredictConfig, folder: Path) -> None:
        self.source = source
        self.classes = classes
        self.cfg = cfg
        self.targets = source.targets(_kinds(cfg), folder)
        self.video: cv2.VideoWriter | None = None
        self.number = 0

    def __enter__(self) -> Self:
        if self.source.is_stream and self.cfg.overwrite:  # a longer video may have been here
            for kind, target in self.targets.items():
                for frame in target.glob("[0-9]*.png") if kind != "overlay" else ():
                    frame.unlink()
        return self

    def __exit__(self, *_: object) -> None:
        if self.video is not None:
            self.video.release()
            os.replace(_draft(self.targets["overlay"]), self.targets["overlay"])

    def write(self, rgb: np.ndarray, mask: np.ndarray) -> None:
        """Write one frame: RGB uint8 (H, W, 3) and train ids, uint8 (H, W)."""
        for kind, target in self.targets.items():
            if kind == "overlay":
                self._write_overlay(rgb, mask, target)
                continue
            ids = Image.fromarray(self.classes.decode[mask] if kind == "label_ids" else mask)
            if kind == "palette":
                ids.putpalette(self.classes.palette.tobytes())  # the values stay the train ids
            encoded = BytesIO()
            ids.save(encoded, "PNG")
            file = target / f"{self.number:06d}.png" if self.source.is_stream else target
            _write_file(file, encoded.getvalue())
        self.number += 1

    def _write_overlay(self, rgb: np.ndarray, mask: np.ndarray, target: Path) -> None:
        names, palette = self.classes.names, self.classes.palette
        picture = overlay(rgb, mask, palette, self.cfg.alpha, edges=True)
        if self.cfg.legend:
            counts = np.bincount(mask.ravel(), minlength=len(names))
            rows = None
            if self.source.is_stream:
                columns = legend_columns(names, rgb.shape[1])
                rows = min(-(-len(names) // columns), _LEGEND_ROWS)
                largest = np.argsort(-counts, kind="stable")[: rows * columns]
                shown = range(len(names)) if len(names) <= rows * columns else [i for i in largest if counts[i]]
            else:
                shown = np.flatnonzero(counts)
            key = legend(names, palette, sorted(map(int, shown)), rgb.shape[1], rows)
            picture = np.vstack([picture, key])
        if self.source.is_stream:
            self._write_frame(picture, target)
        else:
            _write_file(target, _encode(picture, ".jpg"))

    def _write_frame(self, picture: np.ndarray, target: Path) -> None:
        height, width = (side + side % 2 for side in picture.shape[:2])  # the codec halves the colours
        if self.video is None:
            target.parent.mkdir(parents=True, exist_ok=True)
            codec = cv2.VideoWriter.fourcc(*_CODEC)
            video = cv2.VideoWriter(str(_draft(target)), codec, _frame_rate(self.source), (width, height))
            if not video.isOpened():
                raise OSError(f"{target} cannot be written: OpenCV has no encoder for {_CODEC} here, or no place")
            self.video, self.size = video, (height, width)
        if (height, width) != self.size:  # OpenCV would leave the frame out and say nothing
            raise UnusableInput(f"{self.source.origin}: frame {self.number} has another size than the first")
        below, right = height - picture.shape[0], width - picture.shape[1]
        picture = cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REPLICATE)
        self.video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))


class _Speed(ProgressColumn):
    """Frames per second."""

    def render(self, task: Task) -> Text:
        """Draw it."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} fps", style="progress.data.speed")


def _kinds(cfg: PredictConfig) -> list[str]:
    return [kind for kind in KINDS if getattr(cfg, kind)]


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
