"""A data set is walked to its end: exact counts, every file with a problem named, a verdict."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import CLASSES, DATASETS, SIZE, make_camvid, make_cityscapes, make_listed, random_image, save

from bisenet.classes import ClassTable
from bisenet.data import CamVid
from bisenet.data.check import check
from bisenet.data.datasets import IncompleteSplit

CAMVID, CITYSCAPES = ClassTable.load("camvid"), ClassTable.load("cityscapes")


def checked(dataset: Any, table: ClassTable = CAMVID, splits: tuple[str, ...] = ("train",), workers: int = 0) -> Any:
    return check(dataset, table, splits, "train", workers)


@pytest.mark.parametrize("name", DATASETS)
def test_a_sound_data_set_is_counted_exactly(name: str, tmp_path: Path) -> None:
    table = ClassTable.load(CLASSES[name])
    found = checked(DATASETS[name](tmp_path, {"train": 5, "val": 2}), table, ("train", "val"))
    pairs = [random_image(number, ids=34 if name == "cityscapes" else 12) for number in range(5)]
    masks = table.encode[np.stack([label for _, label in pairs])]
    split = found["splits"]["train"]
    assert (found["fit"], split["pairs"], split["fit"], split["sizes"]) == (True, 5, 5, {"40x56": 5})
    assert split["ignored_share"] == pytest.approx(np.mean(masks == 255))
    for train_id, class_name in enumerate(table.names):
        counted = split["classes"][class_name]
        assert counted["pixels"] == np.sum(masks == train_id)
        assert counted["images"] == np.sum((masks == train_id).any(axis=(1, 2)))
    if name != "listed":  # whose images are JPEG
        pixels = np.array([image for image, _ in pairs]).reshape(-1, 3) / 255
        assert found["suggested"]["mean"] == pytest.approx(pixels.mean(0), abs=1e-4)
        assert found["suggested"]["std"] == pytest.approx(pixels.std(0), abs=1e-4)


def test_every_file_with_a_problem_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 9, "val": 1})
    labels, images = tmp_path / "trainannot", tmp_path / "train"
    (labels / "0000.png").unlink()
    (labels / "0001.png").unlink()
    save(labels / "0002.png", np.full(SIZE, 77, np.uint8))  # an id outside the table
    save(labels / "0003.png", np.zeros((40, 55), np.uint8))  # another size
    save(labels / "0004.png", np.zeros(SIZE, np.uint16))
    (images / "0005.png").write_bytes((images / "0005.png").read_bytes()[:3000])
    (images / "0006.png").write_text("hello")
    save(labels / "0007.png", np.full(SIZE, 11, np.uint8))  # void all over
    save(images / "0008.png", random_image(8)[0] // 16)  # nearly black
    found, together = (checked(dataset, splits=("train", "val"), workers=workers) for workers in (0, 2))
    assert found == together
    train = found["splits"]["train"]
    assert (found["fit"], train["pairs"], train["fit"], len(train["problems"])) == (False, 9, 2, 7)
    assert all(sum(f"000{number}.png" in problem for problem in train["problems"]) == 1 for number in range(7))
    assert found["splits"]["val"]["problems"] == []
    for warning, name in {"1 labels are ignored all over": "0007.png", "1 images are black": "0008.png"}.items():
        assert any(warning in line and name in line for line in found["warnings"])
    save(images / "0007.png", random_image(7)[0] // 16)
    assert "all images are black" in checked(dataset)["splits"]["train"]["problems"][-1]


def test_all_that_is_missing_is_named_and_a_pair_counts_once(tmp_path: Path) -> None:
    listed, city = make_listed(tmp_path / "l", {"train": 4}), make_cityscapes(tmp_path / "c", {"train": 4})
    lost = {"train1.jpg", "train1.png", "train2.png", "zurich_000001_000019_gtFine_labelIds.png"}
    for file in [file for file in tmp_path.rglob("*") if file.name in lost]:
        file.unlink()
    cases = ((listed, CAMVID, ("train1.jpg", "train2.png"), 3), (city, CITYSCAPES, ("zurich_000001",), 1))
    for dataset, table, names, problems in cases:
        with pytest.raises(IncompleteSplit, match="does not exist"):
            dataset.samples("train")
        train = checked(dataset, table)["splits"]["train"]
        assert all(any(name in problem for problem in train["problems"]) for name in names)
        assert (len(train["problems"]), train["pairs"], train["fit"]) == (problems, 4, 4 - len(names))


def test_a_split_that_is_not_there_or_holds_nothing_to_learn_is_unfit(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path / "set", {"train": 2})
    found = checked(dataset, splits=("train", "val"))
    assert not found["fit"]
    assert "val.txt does not exist; expected one of" in found["splits"]["val"]["problems"][0]
    for label in (tmp_path / "set" / "trainannot").glob("*"):
        save(label, np.full(SIZE, 11, np.uint8))
    assert not checked(dataset)["fit"]
    found = checked(CamVid(tmp_path / "nowhere"))
    assert (found["fit"], found["suggested"], found["splits"]["train"]["pairs"]) == (False, None, 0)


def test_what_may_surprise_is_said(tmp_path: Path) -> None:
    dataset = make_listed(tmp_path, {"train": 3, "val": 1})
    lines = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(lines + lines.splitlines()[0])
    (tmp_path / "val.csv").write_text(lines.splitlines()[0])
    for number in range(3):
        label = random_image(number)[1]
        save(tmp_path / "labels" / f"train{number}.png", np.where(label == 8, 3, label).astype(np.uint8))
    found = checked(dataset, splits=("train", "val"))
    warnings = "\n".join(found["warnings"])
    assert (found["fit"], found["splits"]["train"]["pairs"]) == (True, 4)
    assert "train: 1 images are listed, and count, more than once: " in warnings
    assert "train: 1 classes never occur and cannot be learnt: Car" in warnings
    assert "val: 1 of its images are trained on" in warnings


def test_a_process_that_is_killed_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = Mock(side_effect=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr("bisenet.data.check.check_headers", killed)  # which forked processes inherit
    with pytest.raises(BrokenProcessPool):
        checked(make_camvid(tmp_path, {"train": 9}), workers=2)


def test_any_error_of_a_file_is_a_problem_of_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bisenet.data.check.read_sample", Mock(side_effect=MemoryError("little")))
    (problem,) = checked(make_camvid(tmp_path, {"train": 1}))["splits"]["train"]["problems"]
    assert "0000.png" in problem
    assert "MemoryError: little" in problem


@pytest.mark.data
def test_camvid_is_fit(camvid: Path) -> None:
    found = checked(CamVid(camvid), splits=("train", "val", "test"), workers=2)
    assert found["fit"], found["splits"]
    assert found["suggested"]["mean"] == pytest.approx([0.4116, 0.4249, 0.4322], abs=0.05)
