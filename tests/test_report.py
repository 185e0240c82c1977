"""Figures are real images for every odd input; masks keep their colours; tables and files say what was measured."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from bisenet import report
from bisenet.classes import ClassTable, SegmentationClass
from bisenet.data.scenes import render_scene
from bisenet.metrics import SegmentationMetric, SegmentationScores
from bisenet.report import overlay

CITYSCAPES = ClassTable.load("cityscapes")


def table(count: int) -> ClassTable:
    """A table of `count` classes in grey."""
    names = (f"class {index}" for index in range(count))
    return ClassTable("grey", tuple(SegmentationClass(n, (i,), i, (i, i, i)) for i, n in enumerate(names)))


def scores(classes: int, largest: int, seed: int = 0) -> SegmentationScores:
    """Of two random images; the classes from `largest` on are absent."""
    rng = np.random.default_rng(seed)
    metric = SegmentationMetric(classes)
    truth = rng.integers(0, largest, (2, 32, 32))
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, largest, truth.shape))
    metric.update(torch.from_numpy(prediction), torch.from_numpy(truth), torch.arange(2))
    return metric.compute()


def drawn(path: Path) -> np.ndarray:
    """The pixels of a figure that is small and not blank."""
    assert path.stat().st_size < 300_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert len(np.unique(pixels @ (65536, 256, 1))) > 10
    return pixels


# ---------------------------------------------------------------- masks as images


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_overlay_lies_between_image_and_colours(height: int, width: int, seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    image, mask = rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 256, (height, width), np.uint8)
    colours = CITYSCAPES.palette[mask]
    mixed = overlay(image, mask, CITYSCAPES.palette, alpha)
    assert (mixed.shape, mixed.dtype) == (image.shape, np.uint8)
    assert (mixed >= np.minimum(image, colours)).all()
    assert (mixed <= np.maximum(image, colours)).all()
    assert np.array_equal(overlay(image, mask, CITYSCAPES.palette, 0.0), image)
    assert np.array_equal(overlay(image, mask, CITYSCAPES.palette, 1.0), colours)


# ---------------------------------------------------------------- figures


def test_predictions_of_differing_sizes_are_drawn(tmp_path: Path) -> None:
    scenes = [render_scene(0, "val", number, size) for number, size in enumerate([(256, 512)] * 3 + [(128, 130)])]
    truths = [CITYSCAPES.encode[label] for _, label in scenes]
    predictions = [np.where(truth == 255, 0, truth).astype(np.uint8) for truth in truths]
    report.plot_predictions([image for image, _ in scenes], truths, predictions, CITYSCAPES, tmp_path / "p.png")
    pixels = drawn(tmp_path / "p.png").astype(int)
    for index in (0, 8, 10):  # road, vegetation, sky: the colours survive the reduction to 256
        near = np.abs(pixels - CITYSCAPES.palette[index]).max(2) <= 3
        assert near.mean() > 0.01
    assert ((pixels == 85).all(2).sum() > 20) == any((truth == 255).any() for truth in truths)  # stripes: ignored


FULL = """epoch,step,train/loss,train/loss/main,train/loss/aux,lr/decay,lr/no_decay,lr/heads,val/ss/miou
0,9,7.1,3.0,4.1,0.01,0.01,0.1,
0,9,,,,,,,0.1
0,19,5.0,2.0,3.0,0.02,0.02,0.2,
0,19,,,,,,,0.3
"""


@pytest.mark.parametrize(
    "text",
    [
        FULL,
        "",
        "step,train/loss\n",
        "step,train/loss\n3,1.5\n",
        "step,val/ss/miou\n3,0.5\n",
        "step,train/loss\n1,nan\n2,inf\n",
        "step,train/loss,lr/all\n1,0.0,0.0\n2,0.0,0.0\n",
    ],
    ids=["full", "empty", "header", "one-row", "only-val", "not-finite", "zeros"],
)
def test_curves_of_any_metrics_file_are_drawn(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    report.plot_curves(tmp_path / "metrics.csv", tmp_path / "figures" / "curves.png")
    pixels = drawn(tmp_path / "figures" / "curves.png")
    assert pixels.shape[1] > 2 * pixels.shape[0]
    if text == FULL:
        series = report._read_series(tmp_path / "metrics.csv")
        assert [values.tolist() for values in series["train/loss"]] == [[10, 20], [7.1, 5.0]]
        assert [values.tolist() for values in series["val/ss/miou"]] == [[10, 20], [0.1, 0.3]]


def test_smoothing_averages_without_a_bias_to_the_start() -> None:
    values = np.r_[np.full(100, 3.0), np.tile([0.0, 1.0], 200)]
    smooth = report._smooth(values)
    assert smooth[:100] == pytest.approx(3)
    assert smooth[-1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("classes", "largest"), [(2, 2), (19, 17), pytest.param(171, 160, marks=pytest.mark.slow)])
def test_scores_are_drawn_for_few_and_many_classes(classes: int, largest: int, tmp_path: Path) -> None:
    known, found = CITYSCAPES if classes == 19 else table(classes), scores(classes, largest)
    report.plot_iou({"ss": found.to_dict(known.names)}, known, tmp_path / "iou.png")
    report.plot_confusion(found.confusion, known.names, tmp_path / "confusion.png")
    iou, confusion = drawn(tmp_path / "iou.png"), drawn(tmp_path / "confusion.png")
    assert len(iou) > 15 * largest  # a row for each class that occurs
    assert max(confusion.shape) < 1500
    border = np.concatenate([confusion[0], confusion[-1], confusion[:, 0], confusion[:, -1]])
    assert (border == border[0]).all()  # nothing is cut off
    if classes == 19:
        bars = [(iou == colour).all(2).any() for colour in CITYSCAPES.palette[:19] if np.ptp(colour) > 60]
        assert bars == [index < largest for index in range(19) if np.ptp(CITYSCAPES.palette[index]) > 60]


@pytest.mark.parametrize("count", [2, 13])
def test_protocols_are_drawn_side_by_side(count: int, tmp_path: Path) -> None:
    columns = {f"protocol {i}": scores(19, 17 + i % 3, seed=i).to_dict(CITYSCAPES.names) for i in range(count)}
    report.plot_iou(columns, CITYSCAPES, tmp_path / "iou.png")
    assert len(drawn(tmp_path / "iou.png")) > 15 * 19


def test_scores_of_nothing_are_drawn(tmp_path: Path) -> None:
    nothing = SegmentationMetric(19)
    ignored = torch.full((1, 4, 4), 255)
    nothing.update(torch.zeros_like(ignored), ignored, torch.tensor([0]))
    found = nothing.compute()
    report.plot_iou({"ss": found.to_dict(CITYSCAPES.names)}, CITYSCAPES, tmp_path / "iou.png")
    report.plot_confusion(found.confusion, CITYSCAPES.names, tmp_path / "confusion.png")
    assert drawn(tmp_path / "iou.png").size < drawn(tmp_path / "confusion.png").size


def test_confusion_is_coloured_by_the_share_of_the_true_class(tmp_path: Path) -> None:
    """Rows count alike, however many pixels they hold; the diagonal of a perfect prediction is dark."""
    report.plot_confusion(np.array([[1000, 0], [0, 1]]), ("common", "rare"), tmp_path / "a.png")
    report.plot_confusion(np.array([[1, 0], [0, 1000]]), ("common", "rare"), tmp_path / "b.png")
    assert np.array_equal(drawn(tmp_path / "a.png"), drawn(tmp_path / "b.png"))


# ---------------------------------------------------------------- tables and files


def test_tables_hold_every_class_of_every_column() -> None:
    columns = {
        "ss": scores(19, 17).to_dict(CITYSCAPES.names, CITYSCAPES.categories) | {"seconds": 1.5},
        "other": scores(19, 18, seed=1).to_dict(CITYSCAPES.names),
    }
    console = Console(file=(terminal := StringIO()), width=120)
    console.print(report.score_table(columns, console.width))
    markdown = report.markdown_table(columns)
    for shown in (terminal.getvalue(), markdown):
        assert all(f"IoU {name} " in shown for name in (*CITYSCAPES.names, "flat", "vehicle"))
        for found in columns.values():
            assert f"{100 * found['miou']:.2f}" in shown
            assert f"{100 * found['classes']['road']['iou']:.2f}" in shown
    lines = markdown.splitlines()
    assert lines[0] == "| scores in % | ss | other |"
    assert {line.count("|") for line in lines} == {4}
    assert f"| IoU motorcycle | - | {100 * columns['other']['classes']['motorcycle']['iou']:.2f} |" in lines
    assert "| IoU bicycle | - | - |" in lines
    assert "| images | 2 | 2 |" in lines
    assert "| seconds | 1.5 | - |" in lines


@pytest.mark.parametrize("width", [30, 80, 400])
def test_a_table_that_is_too_wide_is_divided_and_no_digit_is_lost(width: int) -> None:
    labels = ["ss", "half", "mscf", "mscf_older", "outputs_camvid_small_2026-01-31_12-00-00 mscf (best on val)"]
    columns: dict[str, dict[str, Any]] = {
        label: scores(19, 17, seed=i).to_dict(CITYSCAPES.names, CITYSCAPES.categories) | {"seconds": 98765.43 + i}
        for i, label in enumerate(labels)
    }
    console = Console(file=(terminal := StringIO()), width=width)
    console.print(report.score_table(columns, console.width))
    shown = terminal.getvalue()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for i, found in enumerate(columns.values()):
        assert f" {98765.43 + i:.1f} " in shown
        assert all(f" {100 * row['iou']:.2f} " in shown for row in found["classes"].values() if row["iou"] is not None)
    if width > 30:
        assert shown.count("frequency-weighted IoU") == (1 if width == 400 else 2)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    report.write_json(path, {"miou": 0.5, "absent": []})
    with pytest.raises(TypeError):
        report.write_json(path, {"miou": object()})
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == {"miou": 0.5, "absent": []}


def test_counts_give_the_scores_again(tmp_path: Path) -> None:
    found = scores(19, 19)
    report.write_counts(tmp_path / "counts.npz", found)
    with np.load(tmp_path / "counts.npz") as counts:
        tp, predicted, true = counts["per_image"].sum(0)
        assert np.allclose(tp / (predicted + true - tp), found.iou)
        assert np.array_equal(counts["confusion"], found.confusion)
        assert counts["image_index"].tolist() == [0, 1]
