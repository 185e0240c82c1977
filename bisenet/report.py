"""Reports of a run: figures, coloured masks, tables, JSON files and provenance.

Every ``plot`` function writes a PNG file, ``out``. Images are RGB uint8 (H, W, 3), masks hold train ids, uint8 (H, W);
a palette is RGB by train id, uint8 (256, 3). Tables have a column for each protocol or checkpoint. The argument
``columns`` maps its label to the result of ``SegmentationScores.to_dict`` and, if known, the ``seconds`` it took.
"""

import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
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
from matplotlib.ticker import PercentFormatter
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console, Group
from rich.table import Table

from bisenet.files import replacing

if TYPE_CHECKING:  # bisenet.metrics imports torch, which comparing runs does not need
    from bisenet.classes import ClassTable
    from bisenet.metrics import SegmentationScores

_Arrays = Sequence[np.ndarray]
_Series = tuple[np.ndarray, np.ndarray]  # steps done and values, without missing and non-finite ones

_COLOURS = ("#20639b", "#e07a1f", "#3c9d6b", "#c0392b", "#7d5ba6", "#5f6b76")
_STYLE: Any = {
    "axes.titlesize": 11, "axes.labelsize": 9, "axes.grid": True, "axes.axisbelow": True, "axes.edgecolor": "0.7",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "0.9", "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.prop_cycle": cycler(color=_COLOURS),
}  # fmt: skip
_CELL = 440  # width in pixels of each image that plot_predictions shows


# ---------------------------------------------------------------- figures


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw loss, learning rates and validation mIoU over the steps of a run, as far as they were logged.

    ``metrics_csv`` is a file of ``callbacks.MetricsFile`` with the columns ``step``, ``train/loss``,
    ``train/loss/<head>``, ``lr/<group>`` and ``val/<protocol>/miou``; a cell is blank if nothing was logged.
    """
    series = _read_series(metrics_csv)
    figure, ((loss, rate, score),) = _figure((11, 3.4), 1, 3)
    loss.set_title("training loss")
    for name, (steps, values) in _named(series, "train/loss").items():
        smooth, total = _smooth(values), not name
        loss.plot(steps, smooth, linewidth=1 + total, label=name.strip("/") or "total", zorder=2 + total)
        if total:
            loss.plot(steps, values, alpha=0.25, linewidth=0.8, color=_COLOURS[0])
            loss.set_ylim(0, 1.1 * max(smooth.max(), 1e-9))  # of the smoothed loss: a spike must not flatten the rest

    rate.set_title("learning rate")
    groups: dict[bytes, list[str]] = {}  # groups with the same rates share a curve
    for name, (_, values) in _named(series, "lr/").items():
        groups.setdefault(values.tobytes(), []).append(name)
    for names in groups.values():
        steps, values = series[f"lr/{names[0]}"]
        rate.plot(steps, values, label=",\n".join(names))
        if (values > 0).any():
            rate.set_yscale("log", nonpositive="clip")

    score.set_title("validation mIoU")
    score.set_ylim(0, 1)
    for name, (steps, values) in _named(series, "val/", "/miou").items():
        score.plot(steps, values, label=f"{name}, best {values.max():.3f}")

    for axes in (loss, rate, score):
        axes.set_xlabel("step")
        for line in axes.lines:
            line.set_marker("o" if len(line.get_xdata()) < 20 else "")  # a line through one point is invisible
            line.set_markersize(4)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
            axes.set_xlim(left=0)
        else:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color="0.6")
    _save(figure, out)


def plot_iou(columns: Mapping[str, Mapping[str, Any]], classes: "ClassTable", out: Path) -> None:
    """Draw the IoU of each class (first column: bars, others: marks), and the mean of each column as a dashed line.

    Classes without an IoU in any column are listed below.
    """
    table = [[scores["classes"][name]["iou"] for name in classes.names] for scores in columns.values()]
    percents = 100 * np.array(table, float)  # None becomes NaN
    known = np.isfinite(percents).any(0)
    labels = [f"{label}: mIoU {percent(scores['miou'])}" for label, scores in columns.items()]
    panel = {"IoU, %": dict(zip(labels, percents[:, known], strict=True))}
    figure, (axes,) = _class_figure(panel, classes, np.flatnonzero(known).tolist())
    for number, scores in enumerate(columns.values()):
        if scores["miou"] is not None:
            colour = _colour(number) if number else "0.2"
            axes.axvline(100 * scores["miou"], color=colour, linestyle="--", linewidth=1, zorder=1)
    if len(columns) == 1:
        for row, value in enumerate(percents[0, known]):
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # hides the line of the mean
            axes.text(value + 0.8, row, f"{value:.1f}", va="center", fontsize=7.5, color="0.25", bbox=box)
    axes.set_xlim(0, 106)
    if absent := [classes.names[index] for index in np.flatnonzero(~known)]:
        note = shorten(f"{len(absent)} absent, left out of the mean: {', '.join(absent)}", 110, placeholder=" ...")
        figure.supxlabel(note, fontsize=8, color="0.35", x=0.02, ha="left")
    _save(figure, out)


def plot_data(findings: Mapping[str, Any], classes: "ClassTable", out: Path) -> None:
    """Draw how often each class occurs in a data set: its share of the pixels, and the share of images that contain it.

    ``findings`` is the content of ``check_data.json``; the first split is drawn as bars, the others as marks.
    """
    shares: dict[str, Any] = {}
    occurrences: dict[str, Any] = {}
    for split, found in findings["splits"].items():
        ignored = f"{100 * found['ignored_share']:.1f} % ignored"
        label = f"{split}: {found['fit']:,} of {found['pairs']:,} pairs fit, {ignored}"
        entries = [found["classes"][name] for name in classes.names]
        shares[label] = np.array([100 * e["share"] or np.nan for e in entries])  # NaN is not drawn
        occurrences[label] = np.array([100 * e["images"] / max(found["fit"], 1) or np.nan for e in entries])
    panels = {"share of the labelled pixels, %": shares, "share of the images that hold the class, %": occurrences}
    figure, (pixels, images) = _class_figure(panels, classes, range(classes.num_classes))
    pixels.set_xscale("log")
    pixels.set_xlim(10 ** np.floor(np.log10(np.nanmin([1, *np.concatenate([*shares.values()])])) - 0.05), 100)
    pixels.xaxis.set_major_formatter("{x:g}")
    images.set_xlim(0, 102)
    _save(figure, out)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix, each row as shares of the pixels of its true class; blank if that class never occurs.

    ``confusion`` counts pixels, int64 (C, C), by true class (row) and predicted class (column).
    """
    count, totals = len(names), confusion.sum(1, keepdims=True)
    shares = np.where(totals > 0, confusion / np.maximum(totals, 1), np.nan)
    side = min(max(3.2 + 0.36 * count, 4.5), 11.0)
    figure, ((axes,),) = _figure((side + 0.6, side), 1, 1)
    axes.set(title="share of the true class's pixels, %", xlabel="predicted", ylabel="true", facecolor="0.93")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    # The square root makes the confusions, which are a few percent each, visible beside the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    percents = PercentFormatter(1, decimals=0, symbol="")
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.015, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1], format=percents)
    ticks = range(0, count, -(-count // 70))  # at most 70 names are readable
    labels, size = [names[tick] for tick in ticks], 9 if count <= 25 else 6.5
    axes.set_xticks(ticks, labels, rotation=90 if count > 4 else 0, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    for row, column in np.argwhere(shares >= 0.005) if count <= 25 else ():
        share = shares[row, column]
        colour = "white" if share > 0.35 else "0.2"
        text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
        text.set_in_layout(False)  # it lies inside the axes; measuring hundreds takes seconds
    _save(figure, out)


def plot_predictions(images: _Arrays, truths: _Arrays, predictions: _Arrays, classes: "ClassTable", out: Path) -> None:
    """Draw a row for each image: image, truth, prediction; below, the classes that occur. Image sizes may differ.

    Ignored pixels, those whose value in the truth is not a class, are shown striped.
    """
    names, palette = (*classes.names, "ignored"), classes.palette.copy()
    palette[classes.num_classes :] = 40
    width, seen = 3 * (_CELL + 6), set[int]()
    parts: list[Any] = [np.full((26, width, 3), 255, np.uint8)]
    for image, truth, prediction in zip(images, truths, predictions, strict=True):
        seen |= {min(int(index), classes.num_classes) for index in (*np.unique(truth), *np.unique(prediction))}
        stripes = np.indices(truth.shape).sum(0) // max(len(truth) // 40, 1) % 2 == 0
        coloured = palette[truth]
        coloured[(truth >= classes.num_classes) & stripes] = 85
        size = (_CELL, round(_CELL * len(image) / image.shape[1]))
        cells = [cv2.resize(cell, size, interpolation=cv2.INTER_AREA)
                 for cell in (image, coloured, palette[prediction])]  # fmt: skip
        parts.append(np.hstack([np.pad(cell, ((0, 6), (3, 3), (0, 0)), constant_values=255) for cell in cells]))
    drawn = Image.fromarray(np.vstack([*parts, legend(names, palette, sorted(seen), width)]))
    for number, title in enumerate(("image", "truth", "prediction")):
        ImageDraw.Draw(drawn).text((width * (2 * number + 1) / 6, 13), title, (30, 30, 30), _font(16), anchor="mm")
    out.parent.mkdir(parents=True, exist_ok=True)
    # With 256 colours the file has a third of the size and looks the same.
    drawn.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)


def plot_groups(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str, out: Path) -> None:
    """Draw one panel for each protocol: every run as a dot, the mean of a group as a tick, its 95 % interval as a bar.

    ``protocols`` maps name -> group -> ``runs`` (name -> score), ``mean``, and ``low`` and ``high`` or None; ``unit``
    is the label of the scores.
    """
    names = list(dict.fromkeys(name for groups in protocols.values() for name in groups))
    columns = min(len(protocols), 4)
    lines = -(-len(protocols) // columns)
    longest = min(max(map(len, names)), 44)
    size = (0.08 * longest + 3.4 * columns, lines * (1.2 + 0.38 * len(names)))
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
    panels.flat[0].set_yticks(range(len(names)), [name if len(name) <= 44 else f"{name[:43]}…" for name in names])
    panels.flat[0].set_ylim(len(names) - 0.4, -0.6)
    _save(figure, out)


_SETTINGS = ("size", "batch", "precision", "runtime")  # keys of a benchmark row, besides "model"


def plot_speed(rows: Sequence[Mapping[str, Any]], where: str, out: Path) -> None:
    """Draw mIoU over images per second, with a mark for each row of a benchmark whose ``miou`` is known.

    Colours stand for models, shapes for the combinations of other settings that differ. Settings that all rows share
    are named on the x axis, after ``where``: the hardware and what was timed.
    """
    known = [row for row in rows if row["miou"] is not None]
    values = {key: list(dict.fromkeys(str(row[key]) for row in known)) for key in _SETTINGS}
    common = [f"{key} {found[0]}" for key, found in values.items() if len(found) == 1]
    varying = [key for key, found in values.items() if len(found) > 1]
    names = list(dict.fromkeys(row["model"] for row in known))
    settings = list(dict.fromkeys(", ".join(str(row[key]) for key in varying) for row in known))
    figure, ((axes,),) = _figure((8, 5), 1, 1)
    axes.set(xlabel=f"images per second ({', '.join([where, *common])})", ylabel="mIoU, %", xscale="log")
    for row in known:
        marker = "osD^vPX*"[settings.index(", ".join(str(row[key]) for key in varying)) % 8]
        colour = _colour(names.index(row["model"]))
        axes.plot(
            row["images_per_second"], 100 * row["miou"], marker, color=colour, markersize=7, markeredgecolor="white"
        )
    handles: list[Any] = [Patch(color=_colour(number), label=name) for number, name in enumerate(names)]
    for number, setting in enumerate(settings if varying else ()):
        handles += axes.plot([], [], "osD^vPX*"[number % 8], color="0.4", label=setting)
    figure.legend(handles=handles, loc="outside upper left", frameon=False, fontsize=8.5, ncols=3)
    axes.margins(0.1, 0.2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    _save(figure, out)


def _class_figure(
    panels: Mapping[str, Mapping[str, np.ndarray]], classes: "ClassTable", shown: Sequence[int]
) -> tuple[Figure, Any]:
    """Draw panels with a row for each class in ``shown``: bars for the first label, marks for the others.

    ``panels`` maps title -> label -> values, one for each row. Returns the figure and its axes.
    """
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


def _figure(size: tuple[float, float], rows: int, columns: int, sharey: bool = False) -> tuple[Figure, Any]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _save(figure: Figure, out: Path) -> None:
    figure.draw_without_rendering()  # rotated labels shift the layout; it fits when drawn a second time
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", pil_kwargs={"optimize": True})


def _read_series(metrics_csv: Path) -> dict[str, _Series]:
    """Read each column of a metrics file that has values; the column ``step`` counts from 0, the result from 1."""
    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series: dict[str, _Series] = {}
    for name in rows[0] if rows else ():
        points = np.array([(float(row["step"]) + 1, float(row[name])) for row in rows if row[name]]).reshape(-1, 2)
        if len(points := points[np.isfinite(points[:, 1])]):
            series[name] = points[:, 0], points[:, 1]
    return series


def _named(series: Mapping[str, _Series], start: str, end: str = "") -> dict[str, _Series]:
    """Return the series whose names have this start and end, by the part of the name in between."""
    found = [name for name in series if name.startswith(start) and name.endswith(end)]
    return {name.removeprefix(start).removesuffix(end): series[name] for name in found}


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average with a window of a twentieth of the values, corrected for its start from 0."""
    from scipy.signal import lfilter  # slow to import, and only needed here

    keep = 1 - 1 / max(len(values) / 20, 1)
    return np.asarray(lfilter([1 - keep], [1, -keep], values)) / (1 - keep ** np.arange(1, len(values) + 1))


# ---------------------------------------------------------------- masks


def overlay(
    image: np.ndarray, mask: np.ndarray, palette: np.ndarray, alpha: float = 0.5, *, edges: bool = False
) -> np.ndarray:
    """Lay a coloured mask over its image.

    ``alpha`` is the weight of the colours in [0, 1]; ``edges`` draws thin light lines between classes.
    """
    mixed = np.rint((1 - alpha) * image.astype(np.float32) + alpha * palette[mask]).astype(np.uint8)
    if edges:
        width = 1 + max(mask.shape) // 1200
        mixed[cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((1 + width, 1 + width), np.uint8)) > 0] = 245
    return mixed


def legend_columns(names: Sequence[str], width: int) -> int:
    """Return how many entries a line of :func:`legend` holds."""
    return max(1, int(width // _entry(names, width)[1]))


def legend(
    names: Sequence[str], palette: np.ndarray, shown: Sequence[int], width: int, rows: int | None = None
) -> np.ndarray:
    """Draw colour and name of the classes ``shown`` (train ids), line by line, as an image with dark text on white.

    The longest of all ``names`` sets the width of a column, the image's ``width`` in pixels the font size. ``rows`` is
    the number of lines, for images of equal height; None: as many as the entries need.
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
    """Return the font, and the width of a column of :func:`legend` in pixels."""
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


def score_table(columns: Mapping[str, Mapping[str, Any]], width: int) -> Group:
    """Return scores side by side for the terminal: the means, then the IoU of each class and category.

    Columns that do not fit into ``width`` characters go to further tables below. Headers are folded, numbers never cut.
    """
    sections, labels, tables = _sections(columns), list(columns), []
    names = max(len(name) for section in sections for name in section)
    numbers = max(len(cell) for section in sections for cells in section.values() for cell in cells)
    wide = max(numbers, min(14, max(map(len, labels))))
    step = max((width - names - 4) // (wide + 3), 1)  # two blanks and a border for each column
    for start in range(0, len(labels), step):
        table = Table()
        table.add_column(_UNIT, overflow="fold")
        for label in labels[start : start + step]:
            table.add_column(label, justify="right", width=wide, overflow="fold")
        for section in sections:
            for name, cells in section.items():
                table.add_row(name, *cells[start : start + step], style="dim" if set(cells) == {"-"} else None)
            table.add_section()
        tables.append(table)
    return Group(*tables)


def markdown_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the scores that :func:`score_table` shows as one Markdown table."""
    rows = [[name, *cells] for section in _sections(columns) for name, cells in section.items()]
    return markdown([_UNIT, *columns], rows)


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is aligned left, as text, and the others right, as numbers."""
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _sections(columns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, list[str]]]:
    """Return the rows (name -> one cell for each column) of means, classes and categories, if there are any."""
    scores = list(columns.values())
    means = {key: title for key, title in _SUMMARY.items() if any(key in column for column in scores)}
    sections = [{title: [_cell(key, column.get(key)) for column in scores] for key, title in means.items()}]
    for key, prefix in (("classes", "IoU "), ("categories", "category IoU ")):
        entries = [column.get(key, {}) for column in scores]
        names = dict.fromkeys(name for entry in entries for name in entry)
        rows = {name: [percent(entry.get(name, {}).get("iou")) for entry in entries] for name in names}
        sections.append({prefix + name: cells for name, cells in rows.items()})
    return [section for section in sections if section]


def _cell(key: str, value: float | None) -> str:
    formats = {"n_images": "d", "seconds": ".1f"}
    return percent(value) if value is None or key not in formats else format(value, formats[key])


def percent(score: float | None) -> str:
    """Format a score in [0, 1] as a percentage without sign; None becomes a dash."""
    return "-" if score is None else f"{100 * score:.2f}"


# ---------------------------------------------------------------- files


def write_json(path: Path, content: Any) -> None:
    """Write or replace a JSON file, as :func:`write_text` does."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write or replace a file in UTF-8, whole or not at all; callers see to it that no run is overwritten."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_counts(path: Path, scores: "SegmentationScores") -> None:
    """Write the counts behind the scores as a NumPy archive, so that runs can be compared image by image."""
    np.savez_compressed(path, image_index=scores.image_index, per_image=scores.per_image, confusion=scores.confusion)


def provenance(seeds: Mapping[str, int]) -> dict[str, Any]:
    """Return what a result depends on besides its configuration: code, versions, hardware, seeds."""
    import torch  # slow to import, and not needed to compare runs

    def git(*arguments: str) -> str | None:  # safe.directory: the checkout may belong to another user
        command = ["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    packages = "bisenet torch lightning torchmetrics hydra-core omegaconf albumentations numpy opencv-python-headless"
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version()}
        | {name: found.version for name in packages.split() for found in [*distributions(name=name)][:1]},
        "hardware": {"machine": platform.machine(), "cpu": _processor(), "cpu_cores": os.cpu_count(),
                     "threads": torch.get_num_threads(), "cuda": torch.version.cuda,
                     "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]},
        "seeds": dict(seeds),
    }  # fmt: skip


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


# ---------------------------------------------------------------- results


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """Write ``results.md``, then ``results.json``, and print them; a run with ``results.json`` counts as finished."""
    lines = [f"{results['name']}: {results['precision']} on {results['device']}", *_result_lines(results)]
    text = "".join(f"- {line}\n" for line in lines) + f"\n{markdown_table(_result_columns(results))}"
    write_text(folder / "results.md", text)
    write_json(folder / "results.json", results)
    show_results(results)


def show_results(results: Mapping[str, Any]) -> None:
    """Print the content of ``results.json``: the scores as a table, then each mean IoU on a line."""
    console = Console()
    console.print(score_table(_result_columns(results), console.width))
    for line in _result_lines(results):
        console.print(line)


def _result_columns(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a score table: each protocol with the last weights, then with those best on val."""
    best = results.get("best_on_val") or results
    further = best["protocols"] if best["step"] != results["step"] else {}
    return {**results["protocols"], **{f"{name} (best on val)": scores for name, scores in further.items()}}


def _result_lines(results: Mapping[str, Any]) -> list[str]:
    weights = Path(results["checkpoint"]).name if "checkpoint" in results else "last weights"
    stages = [(results, f"{weights}, step {'unknown' if results['step'] is None else results['step']}")]
    if best := results.get("best_on_val"):
        stages.append((best, f"best on {best['selected_on']}, step {best['step']}"))
    if ema := results.get("ema"):
        stages.append((ema, f"moving average of the weights, decay {ema['decay']}"))
    return [f"mIoU {percent(scores['miou'])} ({name} on {results['split']}, {label})"
            for found, label in stages for name, scores in found["protocols"].items()]  # fmt: skip


def show_data(findings: Mapping[str, Any]) -> None:
    """Print the content of ``check_data.json``: a table, warnings, problems, and the suggested normalisation."""
    console, splits = Console(), findings["splits"]
    table = Table(show_footer=True)
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
    console.print(table)
    problems = [problem for found in splits.values() for problem in found["problems"]]
    for kind, lines in (("warning", findings["warnings"]), ("problem", problems)):
        for line in lines:
            console.print(f"{kind}: {line}", markup=False, highlight=False)
    if suggested := findings["suggested"]:
        print(f"measured over {suggested['split']}: 'data.mean={suggested['mean']}' 'data.std={suggested['std']}'")
