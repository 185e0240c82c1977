"""Masks as pictures: pure functions from arrays to arrays, and one grid of them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

_EDGE = (245, 245, 245)


def colorize(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colour a mask.

    Args:
        mask: train ids, uint8 (H, W).
        palette: train id -> RGB, uint8 (256, 3).

    Returns:
        RGB uint8 (H, W, 3).
    """
    return palette[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.5, *, edges: bool = False
) -> np.ndarray:
    """Lay a coloured mask over its image.

    Args:
        image: RGB uint8 (H, W, 3).
        mask: train ids, uint8 (H, W).
        palette: train id -> RGB, uint8 (256, 3).
        alpha: weight of the colours in [0, 1].
        edges: draw thin light lines where classes meet.

    Returns:
        RGB uint8 (H, W, 3).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, accepted: 0 to 1")
    mixed = (1 - alpha) * image.astype(np.float32) + alpha * colorize(mask, palette)
    mixed = np.rint(mixed).astype(np.uint8)
    if edges:
        width = 1 + max(mask.shape) // 1200
        mixed[cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((1 + width, 1 + width), np.uint8)) > 0] = _EDGE
    return mixed


def legend_columns(names: Sequence[str], width: int) -> int:
    """How many entries a line of :func:`legend` holds."""
    return max(1, int(width // _entry(names, width)[1]))


def legend(
    names: Sequence[str], palette: np.ndarray, shown: Sequence[int], width: int, rows: int | None = None
) -> np.ndarray:
    """Colour and name of classes, line by line.

    Args:
        names: of all classes, by train id; they decide how wide a column is.
        palette: train id -> RGB, uint8 (256, 3).
        shown: train ids of the entries, in order.
        width: of the picture in pixels; sets the size of the letters.
        rows: number of lines, for pictures of equal height; None: as many as the entries need.

    Returns:
        RGB uint8 (h, width, 3), dark on white.
    """
    size, entry = _entry(names, width)
    columns, line = legend_columns(names, width), round(1.6 * size)
    rows = -(-len(shown) // columns) if rows is None else rows
    picture = Image.new("RGB", (width, rows * line + size // 2), "white")
    draw, font = ImageDraw.Draw(picture), _font(size)
    for position, index in enumerate(shown):
        row, column = divmod(position, columns)
        left, top = round(column * entry + size / 2), row * line + size // 2
        color = tuple(int(c) for c in palette[index])
        draw.rectangle((left, top, left + 1.4 * size, top + size), fill=color, outline=(90, 90, 90))
        draw.text((left + 1.9 * size, top + size / 2), _short(names[index]), (30, 30, 30), font, anchor="lm")
    return np.asarray(picture)


def _entry(names: Sequence[str], width: int) -> tuple[int, float]:
    """Size of the letters and width of a column, in pixels."""
    size = min(max(width // 60, 11), 26)
    font = _font(size)
    return size, 3.2 * size + max(font.getlength(_short(name)) for name in names)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."


def hatch(picture: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The picture, RGB uint8 (H, W, 3), with dark diagonal stripes where `ignored`, bool (H, W), is set."""
    rows, columns = np.indices(ignored.shape)
    stripe = max(ignored.shape[0] // 40, 1)
    stripes = np.where((rows + columns) // stripe % 2 == 0, np.uint8(30), np.uint8(80))
    return np.where(ignored[..., None], stripes[..., None], picture)


def prediction_grid(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    palette: np.ndarray,
    names: Sequence[str],
) -> Figure:
    """One row per picture: image, truth, prediction; below, the classes that occur. The sizes may differ.

    Args:
        images: RGB uint8 (H, W, 3) each.
        truths: train ids, uint8 (H, W) each; what is not an index of `names` is ignored and shown striped.
        predictions: train ids, uint8 (H, W) each.
        palette: train id -> RGB, uint8 (256, 3).
        names: of the classes, by train id.
    """
    if not len(images) == len(truths) == len(predictions) > 0:
        counts = f"{len(images)} images, {len(truths)} truths, {len(predictions)} predictions"
        raise ValueError(f"prediction grid: got {counts}, accepted: equally many, at least one")
    seen = np.unique(np.concatenate([np.unique(mask) for mask in (*truths, *predictions)]))
    present = [int(index) for index in seen if index < len(names)]
    handles = [Patch(facecolor=palette[index] / 255, edgecolor="0.4", label=names[index]) for index in present]
    if len(present) < len(seen):
        handles.append(Patch(facecolor="0.12", edgecolor="0.5", hatch="////", label="ignored"))

    width, columns = 11.0, 6
    heights = [width / 3 * len(image) / image.shape[1] for image in images]
    legend = 0.21 * -(-len(handles) // columns) + 0.1
    figure = Figure(figsize=(width, sum(heights) + 0.06 * len(images) + 0.3 + legend), dpi=120)
    total = figure.get_figheight()
    grid = figure.subplots(
        len(images), 3, squeeze=False, gridspec_kw={"height_ratios": heights, "wspace": 0.015, "hspace": 0.03}
    )
    figure.subplots_adjust(left=0.005, right=0.995, top=1 - 0.3 / total, bottom=legend / total)
    for row, image, truth, prediction in zip(grid, images, truths, predictions, strict=True):
        shown = (image, hatch(colorize(truth, palette), truth >= len(names)), colorize(prediction, palette))
        for axes, picture in zip(row, shown, strict=True):
            _show(axes, picture)
    for axes, title in zip(grid[0], ("image", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=11, pad=4)
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
        borderaxespad=0.2,
        handlelength=1.4,
        labelspacing=0.35,
    )
    return figure


def _show(axes: Axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="antialiased", aspect="auto")
    axes.set_axis_off()
