"""A picture and its label file: what may be in them, and how they become arrays."""

import struct
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from bisenet.classes import ClassTable

_PNG_HEADER = struct.Struct(">8s4x4sIIBB")  # signature, (length), "IHDR", width, height, bits per channel, colour type
_GREY, _RGB, _PALETTE = 0, 2, 3
_COLOUR_TYPES = {_GREY: "greyscale", _RGB: "RGB", _PALETTE: "palette", 4: "greyscale + alpha", 6: "RGBA"}
_ACCEPTED_LABEL = "an 8-bit greyscale or palette PNG of class ids, or an 8-bit RGB PNG in the colors of the class table"


@dataclass(frozen=True)
class Sample:
    """A picture and its label, on disk."""

    image: Path
    label_file: Path | None
    """None: the picture belongs to a split without labels, which can be predicted but not scored."""
    train_ids: bool = False
    """The label file holds train ids instead of the ids of the class table."""

    @property
    def label(self) -> Path:
        """The label file; a ValueError where there is none."""
        if self.label_file is None:
            raise ValueError(f"{self.image} has no label, so it can be neither trained on nor scored")
        return self.label_file


class IncompleteSplit(FileNotFoundError):
    """Files of a split are missing: ``problems`` names each of them, ``samples`` is what is complete of ``pairs``."""

    def __init__(self, problems: list[str], samples: list[Sample], pairs: int) -> None:
        more = f" (and {len(problems) - 1} more such; scripts/check_data.py names them all)" if problems[1:] else ""
        super().__init__(problems[0] + more)
        self.problems = problems
        self.samples = samples
        self.pairs = pairs


def read_sample(sample: Sample, table: ClassTable) -> tuple[np.ndarray, np.ndarray]:
    """Decode one sample.

    Returns:
        The image, RGB uint8 (H, W, 3), and the mask, uint8 (H, W), of train ids and ``table.ignore_index``.

    Raises:
        ValueError: a file that is damaged or of the wrong kind, sizes that differ, or ids outside the table. The
            message names the file, what was found and what is accepted.
    """
    image = _read_image(sample.image)
    mask = read_mask(sample, table)
    _require_same_size(sample, image.shape[:2], mask.shape)
    return image, mask


def read_mask(sample: Sample, table: ClassTable) -> np.ndarray:
    """The mask of :func:`read_sample` alone, with its errors."""
    return _read_mask(sample.label, table.train_id_table if sample.train_ids else table)


def check_headers(sample: Sample) -> None:
    """Raise the errors of :func:`read_sample` that show without decoding: kind of file, sizes. About 0.2 ms."""
    try:
        with Image.open(sample.image) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise ValueError(f"{sample.image} cannot be decoded: no image, or a damaged one") from None
    label_height, label_width, _ = _label_header(sample.label)
    _require_same_size(sample, (height, width), (label_height, label_width))


def _require_same_size(sample: Sample, image: tuple[int, ...], label: tuple[int, ...]) -> None:
    if image != label:
        raise ValueError(
            f"sizes differ (height x width): {sample.image} has {image[0]} x {image[1]}, "
            f"its label {sample.label} has {label[0]} x {label[1]}"
        )


def _read_image(path: Path) -> np.ndarray:
    # imdecode refuses truncated files, where imread returns a JPEG that is grey from some row on. A label knows nothing
    # of the camera's orientation, so neither may the image.
    data = np.fromfile(path, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
    if image is None:
        raise ValueError(f"{path} cannot be decoded: no image, or a truncated or damaged one")
    return image


def _label_header(path: Path) -> tuple[int, int, int]:
    """Height, width and PNG colour type of a label file of an accepted kind."""
    with path.open("rb") as file:
        start = file.read(_PNG_HEADER.size)
    if len(start) < _PNG_HEADER.size or not start.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"label {path} is not a PNG; accepted: {_ACCEPTED_LABEL}")
    _, _, width, height, bits, colour_type = _PNG_HEADER.unpack(start)
    # Of a palette any depth will do; elsewhere decoders stretch the values of fewer bits.
    if colour_type != _PALETTE and (bits, colour_type) not in ((8, _GREY), (8, _RGB)):
        kind = _COLOUR_TYPES.get(colour_type, f"colour type {colour_type}")
        raise ValueError(f"label {path} holds {bits}-bit {kind} pixels; accepted: {_ACCEPTED_LABEL}")
    return height, width, colour_type


def _read_mask(path: Path, table: ClassTable) -> np.ndarray:
    _, _, colour_type = _label_header(path)
    try:
        with Image.open(path) as file:
            label = np.asarray(file)  # of a palette PNG the indices, where OpenCV gives colours
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged PNGs
        raise ValueError(f"label {path} cannot be decoded: {error}") from None
    if colour_type == _RGB:
        return _from_colors(path, label, table)
    unknown = cv2.LUT(label, (~table.known).view(np.uint8))
    if cv2.countNonZero(unknown):
        ids = np.unique(label[unknown != 0]).tolist()
        accepted = ", ".join(map(str, np.flatnonzero(table.known)))
        raise ValueError(f"label {path} holds the ids {ids}; class table {table.name!r} accepts: {accepted}")
    return cv2.LUT(label, table.encode)


def _from_colors(path: Path, label: np.ndarray, table: ClassTable) -> np.ndarray:
    """The mask of a label (H, W, 3) in the colours of the table."""
    red, green, blue = label.astype(np.uint32).transpose(2, 0, 1)
    found = table.encode_color[red << 16 | green << 8 | blue]
    if not found.all():
        colors = np.unique(label[found == 0], axis=0)
        accepted = ", ".join(f"{entry.name} {list(entry.color)}" for entry in table.classes)
        more = f" and {len(colors) - 5} more" if len(colors) > 5 else ""
        raise ValueError(
            f"label {path} is an RGB file with the colors {colors[:5].tolist()}{more}; "
            f"class table {table.name!r} accepts: {accepted}"
        )
    return (found - 1).astype(np.uint8)
