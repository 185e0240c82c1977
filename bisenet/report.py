"""What remains of a run for people to look at: figures, masks in colour, tables, JSON files and provenance.

Every ``plot`` function writes a PNG file, ``out``. Images are RGB uint8 (H, W, 3), masks hold train ids, uint8 (H, W);
a palette is RGB by train id, uint8 (256, 3). Tables have a column for each protocol or checkpoint, which holds what
``SegmentationScores.to_dict`` gives and, if known, the ``seconds`` it took.
"""

import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import cv2
import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, Group
from rich.table import Table

from bisenet.files import replacing

if TYPE_CHECKING:  # comparing runs needs neither of them, nor torch
    from bisenet.classes import ClassTable
    from bisenet.metrics import SegmentationScores

Series = tuple[np.ndarray, np.ndarray]  # steps and values, equally long, only where logged and finite

_DPI = 120
_COLOURS = ("#20639b", "#e07a1f", "#3c9d6b", "#c0392b", "#7d5ba6", "#5f6b76")
_STYLE: Any = {
    "axes.titlesize": 11, "axes.labelsize": 9, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.7", "grid.color": "0.9",
    "axes.prop_cycle": cycler(color=_COLOURS), "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
}  # fmt: skip
_EDGE = (245, 245, 245)
_CELL = 440  # width in pixels of an image among predictions


# ---------------------------------------------------------------- figures


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw loss, learning rates and validation mIoU over the steps of a run, as far as they were logged.

    ``metrics_csv`` is what Lightning's CSVLogger writes: ``step``, ``train/loss``, ``train/loss/<head>``,
    ``lr/<group>``, ``val/<protocol>/miou``; blank where nothing was logged.
    """
    series = _read_series(metrics_csv)
    figure, ((loss, rate, score),) = _figure((11, 3.4), 1, 3)
    loss.set_title("training loss")
    if "train/loss" in series:
        steps, values = series["train/loss"]
        loss.plot(steps, values, alpha=0.25, linewidth=0.8, color=_COLOURS[0])
        loss.plot(steps, _smooth(values), "-o"[len(values) == 1], linewidth=2, label="total", zorder=3)
        loss.set_ylim(0, 1.1 * max(_smooth(values).max(), 1e-9))  # a spike does not flatten the rest
    heads = _named(series, "train/loss/")
    for name, (steps, values) in heads.items() if len(heads) > 1 else ():
        loss.plot(steps, _smooth(values), "-o"[len(values) == 1], linewidth=1, label=name)

    rate.set_title("learning rate")
    rates: dict[bytes, tuple[list[str], Series]] = {}  # groups of the same rate share a curve
    for name, curve in _named(series, "lr/").items():
        rates.setdefault(curve[1].tobytes(), ([], curve))[0].append(name)
    for names, (steps, values) in rates.values():
        rate.plot(steps, values, "-o"[len(values) == 1], label=",\n".join(names))
        if (values > 0).any():
            rate.set_yscale("log", nonpositive="clip")

    score.set_title("validation mIoU")
    score.set_ylim(0, 1)
    for name, (steps, values) in _named(series, "val/", "/miou").items():
        score.plot(steps, values, "o-", markersize=4, label=name)
        best = steps[np.argmax(values)], values.max()
        score.annotate(f"{best[1]:.3f}", best, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)

    for axes in (loss, rate, score):
        axes.set_xlabel("step")
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
            axes.set_xlim(left=0)
        else:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color="0.6")
    _save(figure, out)


def plot_iou(columns: Mapping[str, Mapping[str, Any]], classes: "ClassTable", out: Path) -> None:
    """Draw the IoU of each class, and their mean as a dashed line: the first column as bars, the others as marks.

    Classes without an IoU in any column are listed below.
    """
    means = [scores["miou"] for scores in columns.values()]
    table = [[scores["classes"][name]["iou"] for name in classes.names] for scores in columns.values()]
    percents = 100 * np.array(table, float)  # None becomes NaN
    known = np.isfinite(percents).any(0)
    labels = [f"{label}: mIoU {percent(mean)}" for label, mean in zip(columns, means, strict=True)]
    panel = {"IoU, %": dict(zip(labels, percents[:, known], strict=True))}
    figure, (axes,) = _class_figure(panel, classes, np.flatnonzero(known).tolist())
    for number, mean in enumerate(means):
        if mean is not None:
            axes.axvline(100 * mean, color=_colour(number) if number else "0.2", linestyle="--", linewidth=1, zorder=1)
    if len(columns) == 1:
        for row, value in enumerate(percents[0, known]):
            text = axes.text(value + 0.8, row, f"{value:.1f}", va="center", fontsize=7.5, color="0.25")
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # over the line of the mean
    axes.set_xlim(0, 106)
    if absent := [classes.names[index] for index in np.flatnonzero(~known)]:
        note = shorten(f"{len(absent)} absent, left out of the mean: {', '.join(absent)}", 110, placeholder=" ...")
        figure.supxlabel(note, fontsize=8, color="0.35", x=0.02, ha="left")
    _save(figure, out)


def plot_data(findings: Mapping[str, Any], classes: "ClassTable", out: Path) -> None:
    """Draw how often each class occurs in a data set: its share of the pixels, and of the images that hold it.

    ``findings`` is what ``check_data.json`` holds; the first split is drawn as bars, the others as marks.
    """
    shares: dict[str, Any] = {}
    occurrences: dict[str, Any] = {}
    for split, found in findings["splits"].items():
        ignored = f"{100 * found['ignored_share']:.1f} % ignored"
        label = f"{split}: {found['fit']:,} of {found['pairs']:,} pairs fit, {ignored}"
        entries = [found["classes"][name] for name in classes.names]
        shares[label] = np.array([100 * e["share"] or np.nan for e in entries])  # nothing is drawn where none occurs
        occurrences[label] = np.array([100 * e["images"] / max(found["fit"], 1) or np.nan for e in entries])
    panels = {"share of the labelled pixels, %": shares, "share of the images that hold the class, %": occurrences}
    figure, (pixels, images) = _class_figure(panels, classes, range(classes.num_classes))
    pixels.set_xscale("log")
    pixels.set_xlim(10 ** np.floor(np.log10(min(1, *map(np.nanmin, shares.values()))) - 0.05), 100)
    pixels.xaxis.set_major_formatter("{x:g}")
    images.set_xlim(0, 102)
    _save(figure, out)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix, each row as shares of the pixels of its true class; blank where that never occurs.

    ``confusion`` counts pixels, int64 (C, C), by true class (row) and predicted class (column).
    """
    count, totals = len(names), confusion.sum(1, keepdims=True)
    shares = np.ma.masked_array(confusion / np.maximum(totals, 1), np.broadcast_to(totals == 0, confusion.shape))
    side = min(max(3.2 + 0.36 * count, 4.5), 11.0)
    figure, ((axes,),) = _figure((side + 0.6, side))
    axes.set(title="share of the true class's pixels, %", xlabel="predicted", ylabel="true", facecolor="0.93")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    # The square root makes the confusions, which are a few percent each, visible beside the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.015, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100"], fontsize=8)
    ticks = range(0, count, -(-count // 70))  # as many names as can be read
    labels, size = [names[tick] for tick in ticks], 9 if count <= 25 else 6.5
    axes.set_xticks(ticks, labels, rotation=90 if count > 4 else 0, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    for row, column in np.argwhere(shares.filled(0) >= 0.005) if count <= 25 else ():
        share = float(shares[row, column])
        colour = "white" if share > 0.35 else "0.2"
        text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
        text.set_in_layout(False)  # lies inside anyway, and measuring hundreds takes seconds
    _save(figure, out)


def plot_predictions(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: "ClassTable",
    out: Path,
) -> None:
    """Draw a row for each image: image, truth, prediction; below, the classes that occur. The sizes may differ.

    What is no class in the truth is ignored, and shown striped.
    """
    if not len(images) == len(truths) == len(predictions) > 0:
        counts = f"{len(images)} images, {len(truths)} truths, {len(predictions)} predictions"
        raise ValueError(f"images, truths, predictions: got {counts}, accepted: equally many, at least one")
    names, palette = (*classes.names, "ignored"), classes.palette.copy()
    palette[classes.num_classes :] = 55
    width, seen = 3 * (_CELL + 6), set()
    parts: list[np.ndarray] = [np.full((26, width, 3), 255, np.uint8)]
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        seen |= {min(index, classes.num_classes) for index in (*np.unique(truth), *np.unique(prediction))}
        striped = hatch(colorize(truth, palette), truth >= classes.num_classes)
        size = (_CELL, round(_CELL * len(image) / image.shape[1]))
        cells = [cv2.resize(cell, size, interpolation=cv2.INTER_AREA)
                 for cell in (image, striped, colorize(prediction, palette))]  # fmt: skip
        parts.append(np.hstack([np.pad(cell, ((0, 6), (3, 3), (0, 0)), constant_values=255) for cell in cells]))
    drawn = Image.fromarray(np.vstack([*parts, legend(names, palette, sorted(map(int, seen)), width)]))
    for number, title in enumerate(("image", "truth", "prediction")):
        ImageDraw.Draw(drawn).text((width * (2 * number + 1) / 6, 13), title, (30, 30, 30), _font(16), anchor="mm")
    colours = drawn.resize((drawn.width // 3, drawn.height // 3), Image.Resampling.NEAREST).quantize(256, kmeans=2)
    out.parent.mkdir(parents=True, exist_ok=True)  # 256 colours are a third of the size and the same to the eye
    drawn.quantize(palette=colours, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)


def plot_groups(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str, out: Path) -> None:
    """Draw every run as a dot, and mean and 95 % interval of each group as a bar, one panel for each protocol.

    ``protocols`` maps name -> group -> ``runs`` (name -> score), ``mean``, and ``low`` and ``high`` or None; ``unit``
    is the label of the scores.
    """
    names = list(dict.fromkeys(name for groups in protocols.values() for name in groups))
    labels = [name if len(name) <= 44 else f"{name[:43]}…" for name in names]
    columns = min(len(protocols), 4)
    lines = -(-len(protocols) // columns)
    size = (0.08 * max(map(len, labels)) + 3.4 * columns, lines * (1.2 + 0.38 * len(names)))
    figure, panels = _figure(size, lines, columns, sharey=True)
    for axes in panels.flat[len(protocols) :]:
        axes.set_visible(False)
    for axes, (protocol, groups) in zip(panels.flat, protocols.items(), strict=False):
        axes.set(title=protocol, xlabel=unit)
        for name, group in groups.items():
            row, colour = names.index(name), _colour(names.index(name))
            if group["low"] is not None:
                axes.plot([group["low"], group["high"]], [row, row], color=colour, linewidth=7, alpha=0.25)
            axes.plot(list(group["runs"].values()), [row] * len(group["runs"]), "o", color=colour, markersize=4)
            axes.plot(group["mean"], row, "|", color="0.15", markersize=16, markeredgewidth=1.6)
    panels.flat[0].set_yticks(range(len(names)), labels)
    panels.flat[0].set_ylim(len(names) - 0.4, -0.6)
    _save(figure, out)


def _class_figure(
    panels: Mapping[str, Mapping[str, np.ndarray]], classes: "ClassTable", shown: Sequence[int]
) -> tuple[Figure, Any]:
    """Panels (title -> label -> values) with a row for each class: bars for the first label, marks for the others."""
    rows, (height, size) = np.arange(len(shown)), (0.24, 8.5) if len(shown) <= 40 else (0.15, 6.5)  # inches, points
    figure, (grid,) = _figure((4.5 + 3 * len(panels), 1.6 + height * len(shown)), 1, len(panels), sharey=True)
    for axes, (title, columns) in zip(grid, panels.items(), strict=True):
        axes.set_title(title)
        axes.grid(visible=False, axis="y")
        (first, values), *others = columns.items()
        axes.barh(rows, values, color=classes.palette[shown] / 255, edgecolor="0.35", linewidth=0.5)
        handles: list[Any] = [Patch(facecolor="0.85", edgecolor="0.35", label=first)]
        for number, (label, values) in enumerate(others, 1):
            handles += axes.plot(values, rows, "dosD^vPX"[number % 8], color=_colour(number), mec="white", label=label)
    grid[0].set_yticks(rows, [classes.names[index] for index in shown], fontsize=size)
    grid[0].set_ylim(len(shown) - 0.4, -0.6)
    figure.legend(handles=handles, loc="outside upper left", ncols=-(-len(handles) // 6), frameon=False, fontsize=8.5)
    return figure, grid


def _figure(size: tuple[float, float], *grid: int, sharey: bool = False) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        return figure, figure.subplots(*grid, squeeze=False, sharey=sharey)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _save(figure: Figure, out: Path) -> None:
    drawn = BytesIO()
    figure.draw_without_rendering()  # rotated labels move what the layout has placed; the second time it fits
    figure.savefig(drawn, dpi=_DPI)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").save(out, "PNG", optimize=True)


def _read_series(metrics_csv: Path) -> dict[str, Series]:
    """Every column of a metrics file over the steps done, which ``step`` counts from 0."""

    def number(cell: Any) -> float:
        try:
            return float(cell)
        except (TypeError, ValueError):
            return math.nan

    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([number(row.get("step")) + 1 for row in rows])
    columns = {name: np.array([number(row.get(name)) for row in rows]) for name in (rows[0] if rows else ())}
    known = {name: np.isfinite(steps) & np.isfinite(values) for name, values in columns.items()}
    return {name: (steps[known[name]], values[known[name]]) for name, values in columns.items() if known[name].any()}


def _named(series: Mapping[str, Series], start: str, end: str = "") -> dict[str, Series]:
    """The series whose names start and end so, by what stands between."""
    found = [name for name in series if isinstance(name, str) and name.startswith(start) and name.endswith(end)]
    return {name.removeprefix(start).removesuffix(end): series[name] for name in found}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a twentieth of the values, without the bias to its start."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    averages = accumulate(values, lambda average, value: keep * average + (1 - keep) * value, initial=0.0)
    return np.array(list(averages)[1:]) / (1 - keep ** np.arange(1, len(values) + 1))


# ---------------------------------------------------------------- masks


def colorize(mask: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The mask in the colours of the palette, as an image."""
    return palette[mask]


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.5, *, edges: bool = False
) -> np.ndarray:
    """Lay a coloured mask over its image.

    ``alpha`` is the weight of the colours in [0, 1]; ``edges`` are thin light lines where classes meet.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: got {alpha}, accepted: 0 to 1")
    mixed = np.rint((1 - alpha) * image.astype(np.float32) + alpha * colorize(mask, palette)).astype(np.uint8)
    if edges:
        width = 1 + max(mask.shape) // 1200
        mixed[cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((1 + width, 1 + width), np.uint8)) > 0] = _EDGE
    return mixed


def hatch(image: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The image with dark diagonal stripes where ``ignored``, bool (H, W), is set."""
    rows, columns = np.indices(ignored.shape)
    stripe = max(ignored.shape[0] // 40, 1)
    stripes = np.where((rows + columns) // stripe % 2 == 0, np.uint8(30), np.uint8(80))
    return np.where(ignored[..., None], stripes[..., None], image)


def legend_columns(names: Sequence[str], width: int) -> int:
    """How many entries a line of :func:`legend` holds."""
    return max(1, int(width // _entry(names, width)[1]))


def legend(
    names: Sequence[str], palette: np.ndarray, shown: Sequence[int], width: int, rows: int | None = None
) -> np.ndarray:
    """Colour and name of classes, line by line: an image, dark on white.

    Args:
        names: of all classes, by train id; they decide how wide a column is.
        palette: train id -> RGB.
        shown: train ids of the entries, in order.
        width: of the image in pixels; sets the size of the letters.
        rows: number of lines, for images of equal height; None: as many as the entries need.
    """
    font, entry = _entry(names, width)
    size, columns, line = round(font.size), legend_columns(names, width), round(1.6 * font.size)
    rows = -(-len(shown) // columns) if rows is None else rows
    image = Image.new("RGB", (width, rows * line + size // 2), "white")
    draw = ImageDraw.Draw(image)
    for position, index in enumerate(shown):
        row, column = divmod(position, columns)
        left, top = round(column * entry + size / 2), row * line + size // 2
        fill = tuple(palette[index].tolist())
        draw.rectangle((left, top, left + 1.4 * size, top + size), fill, outline=(90, 90, 90))
        draw.text((left + 1.9 * size, top + size / 2), _short(names[index]), (30, 30, 30), font, anchor="lm")
    return np.asarray(image)


def _entry(names: Sequence[str], width: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """Letters and width of a column in pixels."""
    font = _font(min(max(width // 60, 11), 26))
    return font, 3.2 * font.size + max(font.getlength(_short(name)) for name in names)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."


# ---------------------------------------------------------------- tables

_SUMMARY = {"miou": "mIoU", "category_miou": "mIoU of categories", "fw_iou": "frequency-weighted IoU",
            "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy", "mean_f1": "mean F1",
            "n_images": "images", "seconds": "seconds"}  # fmt: skip
_UNIT = "scores in %"
_HEADER = 14  # characters in a line of a header


def score_table(columns: Mapping[str, Mapping[str, Any]], width: int) -> Group:
    """Scores side by side for the terminal: the means, then the IoU of each class and category.

    Where they are too many for one table of this ``width`` in characters, several stand below each other; headers are
    folded, numbers never cut.
    """
    sections = _sections(columns)
    rows = [(name, cells) for section in sections for name, cells in section.items()]
    numbers = max(len(cell) for _, cells in rows for cell in cells)
    wide = max(numbers, min(_HEADER, max(map(len, columns))))
    names = max(len(_UNIT), *(len(name) for name, _ in rows))
    names = max(min(names, width - wide - 7), 1)  # two blanks and a border for each column
    step = max((width - names - 4) // (wide + 3), 1)
    labels, tables = list(columns), []
    for start in range(0, len(labels), step):
        table = Table()
        table.add_column(_UNIT, width=names, overflow="fold")
        for label in labels[start : start + step]:
            table.add_column(label, justify="right", width=wide, overflow="fold")
        for section in sections:
            for name, cells in section.items():
                table.add_row(name, *cells[start : start + step], style="dim" if set(cells) == {"-"} else None)
            table.add_section()
        tables.append(table)
    return Group(*tables)


def data_table(findings: Mapping[str, Any]) -> Table:
    """How often each class occurs in each split (what ``check_data.json`` holds) for the terminal."""
    splits = findings["splits"]
    table = Table(caption_justify="left", show_footer=True)
    table.add_column("class", footer="pairs (fit)\nsizes\nignored", no_wrap=True)
    for split, found in splits.items():
        sizes = next(iter(found["sizes"])) if len(found["sizes"]) == 1 else f"{len(found['sizes'])} sizes"
        footer = f"{found['pairs']:,} ({found['fit']:,})\n{sizes}\n{100 * found['ignored_share']:.1f} %"
        table.add_column(f"{split}\npixels", footer=footer, justify="right")
        table.add_column("\nimages", justify="right")
    for name in next(iter(splits.values()))["classes"]:
        entries = [found["classes"][name] for found in splits.values()]
        cells = [cell for e in entries for cell in (f"{100 * e['share']:.3f} %", f"{e['images']:,}")]
        table.add_row(name, *cells, style=None if all(e["pixels"] for e in entries) else "dim")
    return table


def markdown_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """What :func:`score_table` shows, as a Markdown table."""
    lines = [f"| {_UNIT} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(cells)} |" for section in _sections(columns) for name, cells in section.items()]
    return "\n".join(lines) + "\n"


def _sections(columns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, list[str]]]:
    """Rows of name -> one cell for each column: the means, the classes, the categories."""

    def cell(key: str, value: float | None) -> str:
        formats = {"n_images": "{}", "seconds": "{:.1f}"}
        return percent(value) if value is None or key not in formats else formats[key].format(value)

    scores = list(columns.values())
    means = {key: title for key, title in _SUMMARY.items() if any(key in column for column in scores)}
    sections = [{title: [cell(key, column.get(key)) for column in scores] for key, title in means.items()}]
    for key, prefix in (("classes", "IoU "), ("categories", "category IoU ")):
        names = dict.fromkeys(name for column in scores for name in column.get(key, ()))
        ious = {name: [column.get(key, {}).get(name, {}).get("iou") for column in scores] for name in names}
        sections.append({prefix + name: [percent(iou) for iou in row] for name, row in ious.items()})
    return [section for section in sections if section]


def percent(score: float | None) -> str:
    """A score in [0, 1] in percent; None is a dash."""
    return "-" if score is None else f"{100 * score:.2f}"


# ---------------------------------------------------------------- files


def write_json(path: Path, content: Any, *, replace: bool = False) -> None:
    """Write a JSON file; as :func:`write_text`."""
    write_text(path, json.dumps(content, indent=2) + "\n", replace=replace)


def write_text(path: Path, text: str, *, replace: bool = False) -> None:
    """Write a file, whole or not at all.

    Raises:
        FileExistsError: it is there already, and ``replace``, for what can be made again, is not set.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists; nothing is overwritten")
    with replacing(path) as stream:
        stream.write(text.encode())


def write_counts(path: Path, scores: "SegmentationScores") -> None:
    """Write the counts behind the scores as a NumPy archive, so that runs can be compared image by image.

    It holds ``image_index`` (n,), ``per_image`` (n, 3, C): true positives, predicted and true pixels, and ``confusion``
    (C, C), truth by prediction; all int64.
    """
    np.savez_compressed(path, image_index=scores.image_index, per_image=scores.per_image, confusion=scores.confusion)


def provenance(seeds: Mapping[str, int]) -> dict[str, Any]:
    """What a number depends on beside its configuration: code, versions, hardware, seeds."""
    import torch  # which comparing runs does not need

    def git(*arguments: str) -> str | None:  # reads a checkout of another owner too
        command = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    packages = ("bisenet", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "albumentations", "numpy",
                "opencv-python-headless")  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()}
        | {name: found.version for name in packages for found in [*distributions(name=name)][:1]},
        "hardware": {
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
        },
        "seeds": dict(seeds),
    }


# ---------------------------------------------------------------- results


def score_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a run side by side: of each protocol, of the last weights and of those best on val."""
    columns = dict(results["protocols"])
    best = results.get("best_on_val", {})
    if best and best["step"] != results["step"]:
        columns |= {f"{name} (best on val)": scores for name, scores in best["protocols"].items()}
    return columns


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write and show what ``results.json`` holds; that file comes last: with it a run is finished."""
    steps = [f"{results.get('checkpoint', 'checkpoints/last.ckpt')} ({_step(results)})"]
    if best := results.get("best_on_val"):
        steps.append(f"best on val: checkpoints/best.ckpt ({_step(best)})")
    steps += [f"split {results['split']}", f"{results['precision']} on {results['device']}"]
    text = f"- {results['name']}: {', '.join(steps)}\n\n{markdown_table(score_columns(results))}"
    write_text(folder / "results.md", text, replace=True)
    write_json(folder / "results.json", results)
    show_results(results)


def show_results(results: Mapping[str, Any]) -> None:
    """Print the scores as a table, and each mean IoU in a line."""
    console = Console()
    console.print(score_table(score_columns(results), console.width))
    weights = Path(results["checkpoint"]).name if "checkpoint" in results else "last weights"
    stages = [(results, f"{weights}, {_step(results)}")]
    if best := results.get("best_on_val"):
        stages.append((best, f"best on {best['selected_on']}, {_step(best)}"))
    if ema := results.get("ema"):
        stages.append((ema, f"moving average of the weights, decay {ema['decay']}"))
    for found, label in stages:
        for name, scores in found["protocols"].items():
            console.print(f"mIoU {percent(scores['miou'])} ({name} on {results['split']}, {label})")


def _step(results: Mapping[str, Any]) -> str:
    return "unknown step" if results["step"] is None else f"step {results['step']}"


def show_data(findings: Mapping[str, Any]) -> None:
    """Print what ``check_data.json`` holds: a table, warnings and problems, and the suggested normalisation."""
    console = Console()
    console.print(data_table(findings))
    for kind in ("warnings", "problems"):
        lines = findings["warnings"] if kind == "warnings" else [
            problem for split in findings["splits"].values() for problem in split["problems"]]  # fmt: skip
        for line in lines:
            console.print(f"{kind.removesuffix('s')}: {line}", markup=False, highlight=False)
    if suggested := findings["suggested"]:
        print(f"measured over {suggested['split']}: 'data.mean={suggested['mean']}' 'data.std={suggested['std']}'")
