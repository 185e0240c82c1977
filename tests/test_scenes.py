"""Synthetic scenes: a pure function, all classes, label and image of one geometry, written once and safely."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bisenet.classes import ClassTable
from bisenet.data import Synthetic, scenes
from bisenet.data.scenes import render_scene, write_synthetic

CITYSCAPES = ClassTable.load("cityscapes")
SMALL = (64, 128)
SET: dict[str, Any] = {"counts": {"train": 4, "val": 3}, "size": SMALL, "seed": 0}


KEYS = st.tuples(st.integers(0, 2**63), st.sampled_from(("train", "val")), st.integers(0, 10**6))
SIZES = st.tuples(st.integers(32, 100), st.integers(64, 200)).map(lambda half: (2 * half[0], 2 * half[1]))


def files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and date of each."""
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


@given(KEYS, SIZES, st.sampled_from(("street", "shapes")))
@example((0, "train", 1), (600, 128), "street")
@example((0, "train", 2), (64, 1200), "street")
def test_scene_is_a_pure_function_for_every_size(key: tuple[int, str, int], size: tuple[int, int], kind: str) -> None:
    (image, label), again = (render_scene(*key, size, kind) for _ in range(2))
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((*size, 3), np.uint8, size, np.uint8)
    assert CITYSCAPES.known[label].all()
    assert np.array_equal(image, again[0])
    assert np.array_equal(label, again[1])


def test_seed_split_number_and_kind_each_give_another_scene() -> None:
    places = ((0, "val", 0), (1, "val", 0), (0, "train", 0), (0, "val", 1))
    drawn = {render_scene(*place, SMALL, kind)[0].tobytes() for place in places for kind in ("street", "shapes")}
    assert len(drawn) == 8


@pytest.mark.parametrize("number", range(4))
def test_label_has_the_geometry_of_the_image_and_looks_alike_at_every_size(number: int) -> None:
    """Colours change more across the borders of the label than across those of the label moved by some pixels."""
    image, label = render_scene(0, "val", number, (256, 512))
    assert (label[1::2, 1::2] == render_scene(0, "val", number, (128, 256))[1]).mean() > 0.9
    change = np.abs(np.diff(image.astype(float), axis=1)).sum(2)[:, 8:-8]
    borders = [np.diff(np.roll(label, moved, 1).astype(int), axis=1)[:, 8:-8] != 0 for moved in (0, -6, -3, 3, 6)]
    here, *elsewhere = [change[border].mean() for border in borders]
    assert here > 1.3 * max(elsewhere)


def test_every_class_occurs_often_enough_to_be_learned() -> None:
    masks = np.stack([CITYSCAPES.encode[render_scene(0, "val", number, (128, 256))[1]] for number in range(50)])
    shares = np.stack([np.bincount(mask.ravel(), minlength=256) / mask.size for mask in masks])
    assert ((shares[:, :19] > 0.002).mean(0) > 0.3).all()
    assert shares[:, CITYSCAPES.ignore_index].any()


@pytest.mark.parametrize(
    ("name", "wrong"), [*(("size", size) for size in ((62, 128), (64, 126), (65, 128))), ("val", -1), ("scene", "sea")]
)
def test_wrong_parameters_are_named(name: str, wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}.*: got .*, accepted"):
        Synthetic(tmp_path, **{name: wrong})


def test_interrupted_set_is_completed_and_another_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic(tmp_path, **SET)
    complete = files(tmp_path)
    for path in sorted(tmp_path.rglob("*.png"))[:7]:
        path.unlink()
    write_synthetic(tmp_path, **SET)
    written = files(tmp_path)
    assert {name: content for name, (content, _) in written.items()} == {n: c for n, (c, _) in complete.items()}
    write_synthetic(tmp_path, **SET)
    for name, other in {"seed": 1, "size": (64, 130), "counts": {"train": 5}, "scene": "shapes"}.items():
        with pytest.raises(ValueError, match=rf"{tmp_path} .*{name}"):
            write_synthetic(tmp_path, **{**SET, name: other})
    monkeypatch.setattr(scenes, "GENERATOR", 0)
    with pytest.raises(ValueError, match=rf"{tmp_path} .*generator"):
        write_synthetic(tmp_path, **SET)
    assert files(tmp_path) == written
    (tmp_path / "synthetic.json").unlink()  # as in a folder of real data
    with pytest.raises(ValueError, match=str(tmp_path)):
        write_synthetic(tmp_path, **SET)


@pytest.mark.slow
def test_many_scenes_are_the_same_even_where_two_write_them_at_once(tmp_path: Path) -> None:
    many = {**SET, "counts": {"train": 45, "val": 1}}  # shared out over processes
    code = f"from bisenet.data.scenes import *; write_synthetic(Path({str(tmp_path)!r}), **{many})"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(files(tmp_path)) == 2 * 46 + 1  # and the manifest
    for split, number in (("train", 0), ("train", 44), ("val", 0)):
        image, label = render_scene(0, split, number, SMALL)
        for drawn, folder, kind in ((image[..., ::-1], "leftImg8bit", ""), (label, "gtFine", "gtFine_labelIds")):
            (path,) = (tmp_path / folder / split).glob(f"*/*_{number:06d}_*_{kind or folder}.png")
            assert np.array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), drawn)  # pyright: ignore
