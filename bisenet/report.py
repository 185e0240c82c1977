"""What remains of a run for people to look at: figures, tables and JSON files."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.console import Group
from rich.table import Table

from bisenet.classes import ClassTable
from bisenet.visualize import prediction_grid

if TYPE_CHECKING:
    from bisenet.metrics import SegmentationScores  # imports torch, which comparing runs does not need

Series = tuple[np.ndarray, np.ndarray]  # steps and values, equally long, only where logged and finite

_DPI = 120
_COLOURS = ("#20639b", "#e07a1f", "#3c9d6b", "#c0392b", "#7d5ba6", "#5f6b76")


# ---------------------------------------------------------------- figures


def plot_curves(metrics_csv: Path, out: Path) -> None:
    """Draw loss, learning rates and validation mIoU over the steps of a run.

    Args:
        metrics_csv: what Lightning's CSVLogger writes: ``step``, ``train/loss``, ``train/loss/<head>``,
            ``lr/<group>``, ``val/<protocol>/miou``; blank where nothing was logged. Missing curves are left out.
        out: PNG file.
    """
    series = _read_series(metrics_csv)
    figure = Figure(figsize=(11, 3.4), dpi=_DPI, layout="constrained")
    loss, rate, score = figure.subplots(1, 3)

    _panel(loss, "training loss")
    heads = _named(series, "train/loss/")
    if "train/loss" in series:
        steps, values = series["train/loss"]
        loss.plot(steps, values, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
        loss.plot(steps, _smooth(values), _marker(values), linewidth=2, label="total", zorder=3)
        loss.set_ylim(0, 1.1 * max(_smooth(values).max(), 1e-9))  # a spike does not flatten the rest
    for name, (steps, values) in heads if len(heads) > 1 else ():
        loss.plot(steps, _smooth(values), _marker(values), linewidth=1, label=name)

    _panel(rate, "learning rate")
    rates: dict[bytes, tuple[list[str], Series]] = {}  # groups of the same rate share a curve
    for name, curve in _named(series, "lr/"):
        rates.setdefault(curve[1].tobytes(), ([], curve))[0].append(name)
    for names, (steps, values) in rates.values():
        rate.plot(steps, values, _marker(values), linewidth=1.8, label=",\n".join(names))
        if (values > 0).any():
            rate.set_yscale("log", nonpositive="clip")

    _panel(score, "validation mIoU")
    score.set_ylim(0, 1)
    for name, (steps, values) in _named(series, "val/", "miou"):
        score.plot(steps, values, "o-", markersize=4, linewidth=1.8, label=name or "single scale")
        best = int(np.argmax(values))
        at = (steps[best], values[best])
        score.annotate(f"{at[1]:.3f}", at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)

    for axes in (loss, rate, score):
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
            axes.set_xlim(left=0)
        else:
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", color="0.6")
    _save(figure, out)


def plot_step_time(seconds: Mapping[str, float], out: Path) -> None:
    """Draw where the time of a training step goes as bars.

    Args:
        seconds: ``step``, the whole, and its parts; what they leave of the whole is drawn as "other".
        out: PNG file.
    """
    parts = {name: 1000 * value for name, value in seconds.items() if name != "step"}
    whole = 1000 * seconds["step"]
    parts["other"] = max(whole - sum(parts.values()), 0.0)
    figure = Figure(figsize=(7.5, 0.9 + 0.34 * len(parts)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    _panel(axes, f"a training step: {whole:.1f} ms", "milliseconds")
    axes.grid(visible=False, axis="y")
    axes.barh(list(parts), list(parts.values()), color=_COLOURS[0])
    for at, value in enumerate(parts.values()):
        axes.text(value, at, f" {value:.1f} ms, {100 * value / whole:.0f} %", va="center", fontsize=8.5, color="0.25")
    axes.set_xlim(0, 1.25 * max(parts.values()))
    axes.invert_yaxis()
    _save(figure, out)


def plot_iou(columns: Mapping[str, Mapping[str, Any]], classes: ClassTable, out: Path) -> None:
    """Draw the IoU of each class, and their mean: bars in the classes' colours, or several columns side by side.

    Args:
        columns: name of a protocol or checkpoint -> ``SegmentationScores.to_dict()``; classes without an IoU in any of
            them are listed below.
        classes: their table.
        out: PNG file.
    """
    ious = {name: [scores["classes"][name]["iou"] for scores in columns.values()] for name in classes.names}
    values: dict[str, list[Any]] = {n: [iou and 100 * iou for iou in row] for n, row in ious.items()}
    shown = [name for name, row in values.items() if any(value is not None for value in row)]
    row, size = (0.24, 8.5) if len(shown) <= 40 else (0.15, 6.5)
    figure = Figure(figsize=(7.5, 1.3 + row * len(shown)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    _panel(axes, f"IoU of {len(shown)} classes", "intersection over union, %")
    labels = [f"{label}: mIoU {percent(scores['miou'])}" for label, scores in columns.items()]
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(columns))]
    if len(columns) == 1:
        axes.set_title(f"{labels[0]} over {len(shown)} classes", fontsize=11, loc="left")
        axes.grid(visible=False, axis="y")
        palette, colours = dict(zip(classes.names, classes.palette / 255, strict=False)), ["0.2"]
        bars = [values[name][0] for name in shown]
        axes.barh(shown, bars, color=[palette[name] for name in shown], edgecolor="0.35", linewidth=0.5)
        for at, value in enumerate(bars):
            text = axes.text(value + 0.8, at, f"{value:.1f}", va="center", fontsize=size, color="0.25")
            text.set_in_layout(False)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # over the line of the mean
    else:
        for number, (label, colour) in enumerate(zip(labels, colours, strict=True)):
            dots = [math.nan if (value := values[name][number]) is None else value for name in shown]
            marker = "osD^vPX*"[number % 8]
            axes.plot(dots, shown, marker, color=colour, markersize=5, alpha=0.85, label=label)
        figure.legend(loc="outside upper left", ncols=min(3, len(columns)), frameon=False, fontsize=8)
    for scores, colour in zip(columns.values(), colours, strict=True):
        if scores["miou"] is not None:
            axes.axvline(100 * scores["miou"], color=colour, linestyle="--", linewidth=1.0, zorder=1)
    axes.tick_params("y", labelsize=size)
    axes.set_xlim(0, 106)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    if absent := [name for name in values if name not in shown]:
        note = _listed("absent, left out of the mean: ", absent, 110)
        figure.supxlabel(note, fontsize=8, color="0.35", x=0.02, ha="left")
    _save(figure, out)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], out: Path) -> None:
    """Draw a confusion matrix, each row as shares of the pixels of its true class.

    Args:
        confusion: pixels, int64 (C, C), by true class (row) and predicted class (column); empty rows stay blank.
        names: of the C classes.
        out: PNG file.
    """
    count = len(names)
    totals = confusion.sum(1, keepdims=True)
    shares = np.ma.masked_array(confusion / np.maximum(totals, 1), np.broadcast_to(totals == 0, confusion.shape))
    side = min(max(3.2 + 0.36 * count, 4.5), 11.0)
    figure = Figure(figsize=(side + 0.6, side), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.93")
    # The square root makes the confusions, which are a few percent each, visible beside the diagonal.
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.015, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1", "5", "20", "50", "100"], fontsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    axes.set_title("share of the true class's pixels, %", fontsize=11, loc="left")
    ticks = range(0, count, -(-count // 70))  # as many names as can be read
    labels, size = [names[tick] for tick in ticks], 9 if count <= 25 else 6.5
    axes.set_xticks(ticks, labels, rotation=90 if count > 4 else 0, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true", fontsize=10)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count <= 25:
        for row, column in zip(*np.nonzero(shares.filled(0) >= 0.005), strict=True):
            share = float(shares[row, column])
            colour = "white" if share > 0.35 else "0.2"
            text = axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
            text.set_in_layout(False)  # lies inside anyway, and measuring hundreds takes seconds
    _save(figure, out)


def plot_data(findings: Mapping[str, Any], classes: ClassTable, out: Path) -> None:
    """Draw how often each class occurs in a data set: its share of the pixels, and of the pictures that hold it.

    Args:
        findings: what ``check_data.json`` holds; the first split is drawn as bars, the others as marks.
        classes: its class table.
        out: PNG file.
    """
    count, names = classes.num_classes, classes.names
    row, size = (0.24, 8.5) if count <= 40 else (0.15, 6.5)
    figure = Figure(figsize=(10.5, 1.6 + row * count), dpi=_DPI, layout="constrained")
    share, occurrence = figure.subplots(1, 2, sharey=True)
    _panel(share, "share of the labelled pixels, %", "")
    _panel(occurrence, "share of the pictures that hold the class, %", "")
    positions, handles = np.arange(count), []
    for number, (split, found) in enumerate(findings["splits"].items()):
        ignored = f"{100 * found['ignored_share']:.1f} % ignored"
        label = f"{split}: {found['fit']:,} of {found['pairs']:,} pairs fit, {ignored}"
        entries = [found["classes"][name] for name in names]
        for axes, values in (
            (share, np.array([100 * entry["share"] for entry in entries])),
            (occurrence, np.array([100 * entry["images"] / max(found["fit"], 1) for entry in entries])),
        ):
            values = np.where(values > 0, values, np.nan)  # nothing is drawn where a class does not occur
            if number == 0:
                axes.barh(positions, values, color=classes.palette[:count] / 255, edgecolor="0.35", linewidth=0.5)
                handle = Patch(facecolor="0.85", edgecolor="0.35", label=f"bars, {label}")
            else:
                colour = _COLOURS[number % len(_COLOURS)]
                (handle,) = axes.plot(values, positions, "d", color=colour, markersize=5, label=label)
                handle.set(markeredgecolor="white", markeredgewidth=0.6)
        handles.append(handle)
    present = [entry["share"] for found in findings["splits"].values() for entry in found["classes"].values()]
    lowest = min((100 * value for value in present if value), default=1)
    share.set_xscale("log")
    share.set_xlim(10 ** np.floor(np.log10(lowest) - 0.05), 100)
    share.xaxis.set_major_formatter("{x:g}")
    occurrence.set_xlim(0, 102)
    share.set_yticks(positions, names, fontsize=size)
    share.set_ylim(count - 0.4, -0.6)
    for axes in (share, occurrence):
        axes.grid(visible=False, axis="y")
    figure.legend(handles=handles, loc="outside lower center", fontsize=8.5, frameon=False)
    _save(figure, out)


def plot_predictions(
    images: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: ClassTable,
    out: Path,
) -> None:
    """Draw rows of image, RGB uint8 (H, W, 3), truth and prediction, uint8 (H, W) of train ids, as a PNG file."""
    _save(prediction_grid(images, truths, predictions, classes.palette, classes.names), out, photographs=True)


def plot_groups(protocols: Mapping[str, Mapping[str, Mapping[str, Any]]], unit: str, out: Path) -> None:
    """Draw every run as a dot, and mean and 95 % interval of each group as a bar, one panel for each protocol.

    Args:
        protocols: name -> group -> ``runs`` (name -> score), ``mean``, and ``low`` and ``high`` or None.
        unit: label of the scores.
        out: PNG file.
    """
    names = list(dict.fromkeys(name for groups in protocols.values() for name in groups))
    labels = [name if len(name) <= 44 else f"{name[:43]}…" for name in names]
    columns = min(len(protocols), 4)
    lines = -(-len(protocols) // columns)
    size = (0.08 * max(map(len, labels)) + 3.4 * columns, lines * (1.2 + 0.38 * len(names)))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for axes in panels[len(protocols) :]:
        axes.set_visible(False)
    for axes, (protocol, groups) in zip(panels, protocols.items(), strict=False):
        _panel(axes, protocol, unit)
        for name, group in groups.items():
            at = names.index(name)
            colour = _COLOURS[at % len(_COLOURS)]
            if group["low"] is not None:
                axes.plot([group["low"], group["high"]], [at, at], color=colour, linewidth=7, alpha=0.25)
            axes.plot(list(group["runs"].values()), [at] * len(group["runs"]), "o", color=colour, markersize=4)
            axes.plot(group["mean"], at, "|", color="0.15", markersize=16, markeredgewidth=1.6)
    panels[0].set_yticks(range(len(names)), labels, fontsize=8.5)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    _save(figure, out)


def _panel(axes: Axes, title: str, abscissa: str = "step") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    axes.set_xlabel(abscissa, fontsize=9)
    axes.set_prop_cycle(color=_COLOURS)


def _save(figure: Figure, out: Path, photographs: bool = False) -> None:
    """Write a PNG file; photographs in 256 colours, which is a third of the size and the same to the eye."""
    drawn = BytesIO()
    figure.draw_without_rendering()  # rotated labels move what the layout has placed; the second time it fits
    figure.savefig(drawn, dpi=_DPI)
    picture = Image.open(drawn).convert("RGB")
    if photographs:
        sample = picture.resize((picture.width // 3, picture.height // 3), Image.Resampling.NEAREST)
        picture = picture.quantize(palette=sample.quantize(256, kmeans=2), dither=Image.Dither.NONE)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out, "PNG", optimize=True)


def _read_series(metrics_csv: Path) -> dict[str, Series]:
    """Every column of a metrics file over the steps done, which ``step`` counts from 0."""
    with metrics_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series = {}
    for name in rows[0] if rows else ():
        points = [(_float(row.get("step")) + 1, _float(row.get(name))) for row in rows]
        points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
        if points:
            series[name] = tuple(np.array(points).T)
    return series


def _named(series: Mapping[str, Series], start: str, end: str = "") -> list[tuple[str, Series]]:
    """The series whose names start and end so, by what stands between."""
    return [
        (name.removeprefix(start).removesuffix(end).strip("/"), curve)
        for name, curve in series.items()
        if name.startswith(start) and name.endswith(end)
    ]


def _float(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over a twentieth of the values, without the bias to its start."""
    keep = 1 - 1 / max(len(values) / 20, 1)
    smooth, average, weight = np.empty(len(values)), 0.0, 0.0
    for index, value in enumerate(values):
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smooth[index] = average / weight
    return smooth


def _marker(values: np.ndarray) -> str:
    """A single value is a dot, since a line needs two."""
    return "o" if len(values) == 1 else "-"


def _listed(start: str, names: Sequence[str], width: int) -> str:
    """The names in one line, cut with their number where they are too many."""
    line = start + ", ".join(names)
    return line if len(line) <= width else f"{line[:width].rsplit(',', 1)[0]} and more ({len(names)} in all)"


# ---------------------------------------------------------------- tables

_SUMMARY = {
    "miou": "mIoU",
    "category_miou": "mIoU of categories",
    "fw_iou": "frequency-weighted IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "mean_f1": "mean F1",
    "n_images": "images",
    "seconds": "seconds",
}
_UNIT = "scores in %"
_HEADER = 14  # characters in a line of a header, where a table is too wide


def score_table(columns: Mapping[str, Mapping[str, Any]], width: int) -> Group:
    """Scores side by side for the terminal: the means, then the IoU of each class and category.

    Where they are too many for one table, several stand below each other; headers are folded, numbers never cut.

    Args:
        columns: name of a protocol or checkpoint -> ``SegmentationScores.to_dict()``, with ``seconds`` if known.
        width: characters in a line of the terminal.
    """
    sections = _sections(columns)
    rows = [(name, cells) for section in sections for name, cells in section.items()]
    numbers = [max(len(cells[at]) for _, cells in rows) for at in range(len(columns))]
    widths = [max(number, len(label)) for number, label in zip(numbers, columns, strict=True)]
    names = max(len(name) for name in (_UNIT, *(name for name, _ in rows)))

    def fit(*inner: int) -> bool:
        return sum(3 + wide for wide in inner) + 1 <= width  # two blanks and a border each

    if not fit(names, *widths):
        widths = [max(number, min(wide, _HEADER)) for number, wide in zip(numbers, widths, strict=True)]
        names = max(min(names, width - max(widths) - 7), 1)
    blocks: list[list[int]] = [[]]
    for at, wide in enumerate(widths):
        if blocks[-1] and not fit(names, wide, *(widths[before] for before in blocks[-1])):
            blocks.append([])
        blocks[-1].append(at)
    labels, tables = list(columns), []
    for block in blocks:
        table = Table()
        table.add_column(_UNIT, width=names, overflow="fold")
        for at in block:
            table.add_column(labels[at], justify="right", width=widths[at], overflow="fold")
        for section in sections:
            for name, cells in section.items():
                table.add_row(name, *(cells[at] for at in block), style="dim" if set(cells) == {"-"} else None)
            table.add_section()
        tables.append(table)
    return Group(*tables)


def data_table(findings: Mapping[str, Any]) -> Table:
    """How often each class occurs in each split (what ``check_data.json`` holds) for the terminal."""
    splits = findings["splits"]
    table = Table(caption_justify="left", show_footer=True)
    table.add_column("class", footer="pairs (fit)\nsizes\nignored", no_wrap=True)
    for split, found in splits.items():
        sizes = list(found["sizes"].items())
        shown = sizes[0][0] if len(sizes) == 1 else f"{len(sizes)} sizes"
        footer = f"{found['pairs']:,} ({found['fit']:,})\n{shown}\n{100 * found['ignored_share']:.1f} %"
        table.add_column(f"{split}\npixels", footer=footer, justify="right")
        table.add_column("\npictures", justify="right")
    for name in next(iter(splits.values()))["classes"]:
        entries = [found["classes"][name] for found in splits.values()]
        cells = [cell for e in entries for cell in (f"{100 * e['share']:.3f} %", f"{e['images']:,}")]
        table.add_row(name, *cells, style=None if all(e["pixels"] for e in entries) else "dim")
    return table


def markdown_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """What :func:`score_table` shows, as a Markdown table."""
    lines = [f"| {_UNIT} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, cells in (row for section in _sections(columns) for row in section.items()):
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sections(columns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, list[str]]]:
    """Rows of name -> one cell for each column: the means, the classes, the categories."""
    scores = list(columns.values())
    means = {
        title: [_cell(key, column.get(key)) for column in scores]
        for key, title in _SUMMARY.items()
        if any(key in column for column in scores)
    }
    sections = [means]
    for key, prefix in (("classes", "IoU "), ("categories", "category IoU ")):
        names = list(dict.fromkeys(name for column in scores for name in column.get(key, ())))
        sections.append(
            {
                prefix + name: [percent(column.get(key, {}).get(name, {}).get("iou")) for column in scores]
                for name in names
            }
        )
    return [section for section in sections if section]


def percent(score: float | None) -> str:
    """A score in [0, 1] in percent; None is a dash."""
    return "-" if score is None else f"{100 * score:.2f}"


def _cell(key: str, value: float | None) -> str:
    formats = {"n_images": "{}", "seconds": "{:.1f}"}
    return percent(value) if value is None or key not in formats else formats[key].format(value)


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
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_counts(path: Path, scores: "SegmentationScores") -> None:
    """Write the counts behind the scores as a NumPy archive, so that runs can be compared image by image.

    It holds ``image_index`` (n,), ``per_image`` (n, 3, C): true positives, predicted and true pixels, and ``confusion``
    (C, C), truth by prediction; all int64.
    """
    np.savez_compressed(path, image_index=scores.image_index, per_image=scores.per_image, confusion=scores.confusion)
