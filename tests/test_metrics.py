"""The scores against a restatement in numpy, torchmetrics, the official Cityscapes evaluator, and across ranks."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from bisenet.classes import ClassTable
from bisenet.metrics import SegmentationMetric, SegmentationScores


def make_images(images=5, classes=7, size=(13, 17), seed=0, accuracy=0.6) -> tuple[Tensor, Tensor]:
    """Predictions, and labels of which some are ignored; each image shows a few of the classes."""
    draw = np.random.default_rng(seed)
    target = np.stack([draw.choice(draw.permutation(classes)[:4], size) for _ in range(images)])
    prediction = np.where(draw.random(target.shape) < accuracy, target, draw.integers(classes, size=target.shape))
    target[draw.random(target.shape) < 0.2] = 255
    return torch.from_numpy(prediction), torch.from_numpy(target.astype(np.uint8))


def scores_of(prediction: Tensor, target: Tensor, classes=7, batch=2) -> SegmentationScores:
    metric = SegmentationMetric(classes)
    for index in torch.arange(len(target)).split(batch):
        metric.update(prediction[index], target[index], index)
    return metric.compute()


image_sets = st.builds(
    make_images, images=st.integers(1, 5), seed=st.integers(0, 2**16), accuracy=st.sampled_from([0.0, 0.6, 1.0])
)


@given(image_sets)
def test_scores_equal_their_definitions(images):
    prediction, target = (t.numpy() for t in images)
    valid = target != 255
    iou, precision, recall, f1, share = [], [], [], [], []
    for c in range(7):
        p, t = (prediction == c) & valid, target == c
        iou.append((p & t).sum() / (p | t).sum() if (p | t).any() else math.nan)
        precision.append((p & t).sum() / p.sum() if p.any() else math.nan)
        recall.append((p & t).sum() / t.sum() if t.any() else math.nan)
        f1.append((p & t).sum() / ((p.sum() + t.sum()) / 2) if (p | t).any() else math.nan)
        share.append(t.sum() / valid.sum())
    scores = scores_of(*images)
    ours = scores.iou, scores.precision, scores.recall, scores.f1
    np.testing.assert_allclose(ours, (iou, precision, recall, f1), rtol=1e-12)
    assert scores.miou == pytest.approx(np.mean([x for x in iou if x == x]), rel=1e-12)
    assert scores.mean_accuracy == pytest.approx(np.mean([x for x in recall if x == x]), rel=1e-12)
    assert scores.fw_iou == pytest.approx(sum(s * x for s, x in zip(share, iou, strict=True) if s), rel=1e-12)
    assert scores.pixel_accuracy == pytest.approx((prediction == target)[valid].mean(), rel=1e-12)
    assert scores.absent == tuple(c for c in range(7) if iou[c] != iou[c])
    assert scores.n_images == len(target)


@given(image_sets, st.integers(1, 5), st.randoms(use_true_random=False))
def test_batches_and_order_change_nothing(images, batch, random):
    prediction, target = images
    order = random.sample(range(len(target)), len(target))
    metric = SegmentationMetric(7)
    for index in torch.tensor(order).split(batch):
        metric.update(prediction[index], target[index].long(), index)
    for ours, expected in zip(metric.compute(), scores_of(prediction, target), strict=True):
        np.testing.assert_array_equal(ours, expected)


@given(image_sets)
def test_counts_are_exact_per_image_and_sum_to_the_matrix(images):
    prediction, target = images
    scores = scores_of(*images)
    expected = multiclass_confusion_matrix(prediction, target.long(), num_classes=7, ignore_index=255)
    np.testing.assert_array_equal(scores.confusion, expected)
    sums = scores.confusion.diagonal(), scores.confusion.sum(0), scores.confusion.sum(1)
    np.testing.assert_array_equal(scores.per_image.sum(0), sums)
    assert scores.confusion.dtype == scores.per_image.dtype == np.int64
    for i, rows in enumerate(scores.per_image):
        np.testing.assert_array_equal(rows, scores_of(prediction[i : i + 1], target[i : i + 1]).per_image[0])


def test_a_class_that_is_only_predicted_counts_as_zero_and_one_that_never_occurs_not_at_all():
    prediction = torch.tensor([[[0, 0, 1, 3]]])
    target = torch.tensor([[[0, 1, 1, 255]]], dtype=torch.uint8)
    scores = scores_of(prediction, target, classes=4)
    np.testing.assert_allclose(scores.iou, [0.5, 0.5, math.nan, math.nan])  # 3 was predicted on an ignored pixel only
    assert (scores.miou, scores.fw_iou, scores.absent) == (0.5, 0.5, (2, 3))
    scores = scores_of(torch.tensor([[[0, 0, 1, 2]]]), torch.tensor([[[0, 1, 1, 1]]]), classes=4)
    np.testing.assert_allclose(scores.iou, [1 / 2, 1 / 3, 0.0, math.nan])
    assert scores.miou == pytest.approx(5 / 18)
    assert scores.mean_accuracy == pytest.approx((1 + 1 / 3) / 2)


def test_official_cityscapes_evaluator_agrees(tmp_path: Path):
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="compares with the official evaluation; pip install cityscapesscripts",
    )
    classes = ClassTable.load("cityscapes")
    prediction, target = make_images(images=3, classes=16, size=(40, 60))  # the last three never occur
    files: dict[str, list[str]] = {"prediction": [], "target": []}
    for what, maps in (("prediction", prediction), ("target", target)):
        for i, train_ids in enumerate(maps.numpy().astype(np.uint8)):
            files[what].append(str(tmp_path / f"{what}_{i}_labelIds.png"))
            Image.fromarray(classes.decode[train_ids]).save(files[what][-1])
    vars(official.args).update(evalInstLevelScore=False, JSONOutput=False, quiet=True)
    result = official.evaluateImgLists(files["prediction"], files["target"], official.args)
    scores = scores_of(prediction, target, classes=19)
    assert scores.absent == (16, 17, 18)
    assert 0.0 in scores.iou  # predicted, never true
    np.testing.assert_array_equal(scores.iou, [result["classScores"][name] for name in classes.names])
    assert f"{scores.miou:.12f}" == f"{result['averageScoreClasses']:.12f}"
    table = scores.to_dict(classes.names, classes.categories)
    official_categories = {k: v for k, v in result["categoryScores"].items() if k != "void"}
    assert {name: entry["iou"] for name, entry in table["categories"].items()} == official_categories
    assert f"{table['category_miou']:.12f}" == f"{result['averageScoreCategories']:.12f}"


def test_mistakes_within_a_category_are_none_for_it():
    prediction, target = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[1, 0, 2, 255]]])
    scores = scores_of(prediction, target, classes=4)
    assert scores.category_iou(["a", "a", "b", None]) == {"a": pytest.approx(2 / 3), "b": 0.0}
    assert math.isnan(scores.category_iou(["a", "a", "a", "c"])["c"])
    assert "categories" not in scores.to_dict("wxyz", [None] * 4)


def test_to_dict_is_json_with_none_for_what_is_undefined():
    names = list("abcd")
    table = scores_of(torch.tensor([[[0, 0, 1, 3]]]), torch.tensor([[[0, 1, 1, 255]]]), classes=4).to_dict(names)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    second, third = table["classes"]["b"], table["classes"]["c"]
    assert second == {"iou": 0.5, "precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "pixels": 2}
    assert third == {"iou": None, "precision": None, "recall": None, "f1": None, "pixels": 0}
    assert (table["miou"], table["absent"], table["n_images"]) == (0.5, ["c", "d"], 1)
    assert table["mean_f1"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error", "ignore:The ``compute`` method")
def test_nothing_to_count_is_undefined_and_reset_forgets():
    metric = SegmentationMetric(3)
    ignored = torch.full((1, 2, 2), 255)
    for n_images in (0, 1):
        scores = metric.compute()
        assert (scores.n_images, scores.absent) == (n_images, (0, 1, 2))
        assert np.isnan((scores.miou, scores.fw_iou, scores.pixel_accuracy, scores.mean_accuracy)).all()
        metric.update(torch.zeros(1, 2, 2, dtype=torch.uint8), ignored, torch.tensor([5]))
    metric.reset()
    metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 0]]]), torch.tensor([7]))
    scores = metric.compute()
    assert scores.image_index.tolist() == [7]
    assert scores.confusion.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("prediction", "target", "index", "message"),
    [
        ([[[0, -1]]], [[[0, 1]]], [0], r"prediction holds \[-1\].*0 to 6$"),
        ([[[0, 7]]], [[[0, 255]]], [0], r"prediction holds \[7\].*0 to 6$"),
        ([[[0, 1]]], [[[254, 255]]], [0], r"target holds \[254\].*0 to 6 and ignore_index 255"),
        ([[[0, 1]]], [[[0, 1]], [[0, 1]]], [0], r"\(1, 1, 2\) \(2, 1, 2\) \(1,\)"),
        ([[[0, 1]]], [[[0, 1]]], [0, 1], r"\(1, 1, 2\) \(1, 1, 2\) \(2,\)"),
    ],
)
def test_wrong_values_and_shapes_are_named(prediction, target, index, message):
    with pytest.raises(ValueError, match=message):
        SegmentationMetric(7).update(*map(torch.tensor, (prediction, target, index)))


def _evaluate_on_a_rank(rank: int, images_of_rank: list[list[int]], folder: Path) -> None:
    torch.set_num_threads(1)  # a forked process must not touch the thread pool of its parent
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(images_of_rank))
    prediction, target = make_images()
    metric = SegmentationMetric(7)
    for index in images_of_rank[rank]:
        metric.update(prediction[[index]], target[[index]], torch.tensor([index]))
    try:
        result = metric.compute()
    except ValueError as error:
        result = str(error)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def evaluate_on_ranks(images_of_rank: list[list[int]], folder: Path) -> list[SegmentationScores | str]:
    """What each rank computes when it is given these images, or the message of its ValueError."""
    mp.start_processes(_evaluate_on_a_rank, (images_of_rank, folder), len(images_of_rank), start_method="fork")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(len(images_of_rank))]


@pytest.mark.parametrize("images_of_rank", [[[0, 2, 4], [3, 1]], [[4, 3, 2, 1, 0], []]], ids=["uneven", "one idle"])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_any_number_of_ranks_gives_the_same_scores(images_of_rank, tmp_path):
    for result in evaluate_on_ranks(images_of_rank, tmp_path):
        for ours, expected in zip(result, scores_of(*make_images()), strict=True):
            np.testing.assert_array_equal(ours, expected)


def test_an_image_counted_twice_is_refused_by_its_index(tmp_path):
    prediction, target = make_images()
    metric = SegmentationMetric(7)
    for index in ([0, 1], [4, 1], [4]):
        metric.update(prediction[index], target[index], torch.tensor(index))
    with pytest.raises(ValueError, match=r"images \[1, 4\] were counted more than once.*sampler"):
        metric.compute()
    for message in evaluate_on_ranks([[0, 2, 4], [1, 3, 0]], tmp_path):
        assert "images [0] were counted more than once" in message
