"""A data set is walked to its end: exact counts, every file with a problem named, a verdict."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_config import composed
from test_data import MAKERS, camvid_folders, cityscapes_tree, listed_set, picture, save

from bisenet import config, experiment
from bisenet.classes import ClassTable
from bisenet.config import CheckDataConfig, DataConfig
from bisenet.data.check import walk
from bisenet.data.datamodule import list_samples
from bisenet.data.samples import IncompleteSplit

ROOT = Path(__file__).parents[1]
CAMVID = ClassTable.load("camvid")


def checked(data: DataConfig, out: Path, **options: Any) -> tuple[bool, dict[str, Any]]:
    cfg = CheckDataConfig(data=data, **{"workers": 0, **options})
    out.mkdir()
    fit = experiment.check_data(cfg, out)
    assert Image.open(out / "check_data.png").size[0] > 500
    found = json.loads((out / "check_data.json").read_text())
    assert found["fit"] is fit
    return fit, found


@pytest.mark.parametrize("name", MAKERS)
def test_a_sound_data_set_is_counted_exactly(name: str, tmp_path: Path) -> None:
    data = MAKERS[name](tmp_path / "set", {"train": 5, "val": 2})
    fit, found = checked(data, tmp_path / "out")
    assert fit
    assert list(found["splits"]) == ["train", "val"]
    table, images, masks = ClassTable.load(data.classes), [], []
    for number in range(5):
        image, label = picture(number, ids=34 if name == "cityscapes" else 12)
        images.append(image)
        masks.append(table.encode[label])
    split = found["splits"]["train"]
    assert (split["pairs"], split["fit"], split["sizes"]) == (5, 5, {"40x56": 5})
    assert split["ignored_share"] == pytest.approx(np.mean(np.array(masks) == 255))
    for train_id, class_name in enumerate(table.names):
        counted = split["classes"][class_name]
        assert counted["pixels"] == np.sum(np.array(masks) == train_id)
        assert counted["images"] == sum(int((mask == train_id).any()) for mask in masks)
    if name != "listed":  # whose pictures are JPEG
        pixels = np.array(images).reshape(-1, 3) / 255
        assert found["suggested"]["mean"] == pytest.approx(pixels.mean(0), abs=1e-4)
        assert found["suggested"]["std"] == pytest.approx(pixels.std(0), abs=1e-4)


def test_the_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"train": 9})
    save(tmp_path / "trainannot" / "0003.png", np.full((40, 56), 77, np.uint8))
    alone, together = (walk(data, CAMVID, ["train"], workers)["train"].to_dict() for workers in (0, 2))
    assert alone == together
    assert alone["fit"] == 8


def test_every_file_with_a_problem_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "set"
    data = camvid_folders(root, {"train": 9, "val": 1})
    labels, images = root / "trainannot", root / "train"
    (labels / "0000.png").unlink()
    (labels / "0001.png").unlink()
    save(labels / "0002.png", np.full((40, 56), 77, np.uint8))  # an id outside the table
    save(labels / "0003.png", np.zeros((40, 55), np.uint8))  # another size
    save(labels / "0004.png", np.zeros((40, 56), np.uint16))
    whole = (images / "0005.png").read_bytes()
    (images / "0005.png").write_bytes(whole[: len(whole) // 2])
    (images / "0006.png").write_text("hello")
    save(labels / "0007.png", np.full((40, 56), 11, np.uint8))  # void all over
    fit, found = checked(data, tmp_path / "out")
    assert not fit
    train = found["splits"]["train"]
    assert (train["pairs"], train["fit"]) == (9, 2)
    assert len(train["problems"]) == 7
    for number in range(7):
        assert sum(f"000{number}.png" in problem for problem in train["problems"]) == 1
    assert "[77]" in " ".join(train["problems"])
    assert found["splits"]["val"]["problems"] == []
    assert any("1 labels are ignored all over" in w and "0007.png" in w for w in found["warnings"])


def test_lists_and_the_cityscapes_tree_name_all_that_is_missing(tmp_path: Path) -> None:
    listed = listed_set(tmp_path / "listed", {"train": 4, "val": 1})
    (tmp_path / "listed" / "pictures" / "train1.jpg").unlink()
    (tmp_path / "listed" / "labels" / "train2.png").unlink()
    city = cityscapes_tree(tmp_path / "city", {"train": 4, "val": 1})
    for number, name in ((1, "zurich"), (2, "aachen")):
        (tmp_path / "city/gtFine/train" / name / f"{name}_{number:06d}_000019_gtFine_labelIds.png").unlink()
    for data, missing in ((listed, ("train1.jpg", "train2.png")), (city, ("zurich_000001", "aachen_000002"))):
        with pytest.raises(IncompleteSplit, match=r"1 more such; scripts/check_data\.py names them all") as raised:
            list_samples(data, "train")
        assert len(raised.value.samples) == 2
        fit, found = checked(data, tmp_path / f"out_{data.name}")
        assert not fit
        problems = found["splits"]["train"]["problems"]
        assert all(any(name in problem for problem in problems) for name in missing)
        train = found["splits"]["train"]
        assert (len(problems), train["pairs"], train["fit"]) == (2, 4, 2)


def test_a_split_that_is_not_there_or_holds_nothing_to_learn_is_unfit(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path / "set", {"train": 2})
    fit, found = checked(data, tmp_path / "out")
    assert not fit
    assert "has no split 'val'" in found["splits"]["val"]["problems"][0]
    assert checked(data, tmp_path / "only_train", splits=["train"])[0]
    for number in range(2):
        save(tmp_path / "set" / "trainannot" / f"000{number}.png", np.full((40, 56), 11, np.uint8))
    assert not checked(data, tmp_path / "void", splits=["train"])[0]
    data.root = str(tmp_path / "nowhere")
    fit, found = checked(data, tmp_path / "nothing")
    assert not fit
    assert found["suggested"] is None
    assert "nowhere is not a folder" in found["splits"]["train"]["problems"][0]


def test_a_pair_is_counted_once_however_much_of_it_is_missing(tmp_path: Path) -> None:
    data = listed_set(tmp_path / "set", {"train": 3, "val": 1})
    (tmp_path / "set" / "pictures" / "train1.jpg").unlink()
    (tmp_path / "set" / "labels" / "train1.png").unlink()
    train = checked(data, tmp_path / "out")[1]["splits"]["train"]
    assert (len(train["problems"]), train["pairs"], train["fit"]) == (2, 3, 2)
    data.root = str(tmp_path / "nowhere")
    train = checked(data, tmp_path / "nothing")[1]["splits"]["train"]
    assert (len(train["problems"]), train["pairs"], train["fit"]) == (1, 0, 0)


def test_pictures_that_are_listed_twice_are_told(tmp_path: Path) -> None:
    data = listed_set(tmp_path / "set", {"train": 3, "val": 1})
    lines = (tmp_path / "set" / "train.csv").read_text()
    (tmp_path / "set" / "train.csv").write_text(lines + lines.splitlines()[0])
    fit, found = checked(data, tmp_path / "out")
    assert fit
    assert found["splits"]["train"]["pairs"] == 4
    assert any("train: 1 pictures are listed, and count, more than once: " in told for told in found["warnings"])


def test_what_may_surprise_is_said(tmp_path: Path) -> None:
    data = listed_set(tmp_path / "set", {"train": 3, "val": 1})
    lines = (tmp_path / "set" / "train.csv").read_text()
    (tmp_path / "set" / "val.csv").write_text(lines.splitlines()[0])
    for number in range(3):
        label = picture(number, ids=12)[1]
        label[label == 8] = 3
        save(tmp_path / "set" / "labels" / f"train{number}.png", label)
    fit, found = checked(data, tmp_path / "out")
    assert fit
    told = "\n".join(found["warnings"])
    assert "train: 1 classes never occur and cannot be learnt: Car" in told
    assert "val: 1 of its pictures are trained on" in told


def test_the_configuration_is_checked() -> None:
    cfg = composed("data=camvid", "workers=-1", name="check_data")
    with pytest.raises(ValueError, match="workers: got -1"):
        config.check(cfg)
    config.check(composed(name="check_data"))


def test_the_script_ends_with_an_error_unless_the_data_are_fit(tmp_path: Path) -> None:
    camvid_folders(tmp_path / "set", {"train": 3, "val": 1, "test": 1})
    (tmp_path / "set" / "train" / "0001.png").write_text("hello")
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), "data=camvid", "data.root=set", "workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "0001.png cannot be decoded" in done.stdout + done.stderr
    assert "NOT fit to train on" in done.stdout + done.stderr


@pytest.mark.data
def test_camvid_is_fit(camvid: Path, tmp_path: Path) -> None:
    cfg = composed("data=camvid", f"data.root={camvid}", name="check_data")
    fit, found = checked(config.typed(cfg).data, tmp_path / "out", workers=2)
    assert fit, found["splits"]
    assert found["suggested"]["mean"] == pytest.approx(cfg.data.mean, abs=0.05)
