"""Synthetic scenes: a pure function, all classes, label and image of one geometry, written once and safely."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bisenet.classes import ClassTable
from bisenet.data import synthetic
from bisenet.data.cityscapes import list_cityscapes
from bisenet.data.samples import read_sample
from bisenet.data.synthetic import render_scene, write_synthetic

CITYSCAPES = ClassTable.load("cityscapes")
SMALL = (64, 128)
SET = {"counts": {"train": 4, "val": 3, "test": 0}, "size": SMALL, "seed": 0}


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synthetic")
    write_synthetic(root, **SET)
    return root


@given(
    seed=st.integers(0, 2**63),
    split=st.sampled_from(synthetic.SPLITS),
    number=st.integers(0, 10**6),
    height=st.integers(32, 100),
    width=st.integers(64, 200),
)
@example(seed=0, split="train", number=0, height=32, width=64)
@example(seed=0, split="train", number=1, height=300, width=64)
@example(seed=0, split="train", number=2, height=32, width=600)
def test_scene_is_a_pure_function_for_every_size(seed: int, split: str, number: int, height: int, width: int) -> None:
    size = (2 * height, 2 * width)
    image, label = render_scene(seed, split, number, size)
    assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
    assert (label.shape, label.dtype) == (size, np.uint8)
    assert CITYSCAPES.known[label].all()
    again = render_scene(seed, split, number, size)
    assert np.array_equal(image, again[0])
    assert np.array_equal(label, again[1])


def test_seed_split_and_number_each_give_another_scene() -> None:
    scenes = [render_scene(*key, SMALL)[0] for key in ((0, "val", 0), (1, "val", 0), (0, "train", 0), (0, "val", 1))]
    assert len({scene.tobytes() for scene in scenes}) == 4


@pytest.mark.parametrize("number", range(4))
def test_scene_looks_alike_at_every_size(number: int) -> None:
    small, large = (render_scene(0, "val", number, size)[1] for size in ((128, 256), (512, 1024)))
    assert (small == large[2::4, 2::4]).mean() > 0.9


@pytest.mark.parametrize("number", range(4))
def test_label_has_the_geometry_of_the_image(number: int) -> None:
    """Colours change more across the borders of the label than across those of the label moved by some pixels."""
    image, label = render_scene(0, "val", number, (256, 512))
    change = np.abs(np.diff(image.astype(float), axis=1)).sum(2)

    def contrast(moved: int) -> float:
        shifted = np.roll(label, moved, axis=1)
        return change[:, 8:-8][np.diff(shifted.astype(int), axis=1)[:, 8:-8] != 0].mean()

    assert contrast(0) > 1.3 * max(contrast(moved) for moved in (-6, -3, 3, 6))


def test_every_class_occurs_often_enough_to_be_learned() -> None:
    masks = [CITYSCAPES.encode[render_scene(0, "val", number, (128, 256))[1]] for number in range(50)]
    shares = np.stack([np.bincount(mask.ravel(), minlength=256)[:19] / mask.size for mask in masks])
    assert (shares.mean(0) > 0.003).all(), dict(zip(CITYSCAPES.names, shares.mean(0), strict=True))
    assert ((shares > 0.002).mean(0) > 0.3).all(), dict(zip(CITYSCAPES.names, (shares > 0.002).mean(0), strict=True))
    assert any((mask == CITYSCAPES.ignore_index).any() for mask in masks)


@pytest.mark.parametrize("size", [(62, 128), (64, 126), (65, 128), (64, 129)])
def test_wrong_sizes_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*even numbers from 64x128"):
        write_synthetic(tmp_path, **{**SET, "size": size})
    assert files(tmp_path) == {}


@pytest.mark.parametrize(("counts", "message"), [({"tain": 3}, "'tain'"), ({"train": -1}, "-1"), ({"val": 0}, "not 0")])
def test_wrong_counts_are_refused(counts: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_synthetic(tmp_path, **{**SET, "counts": counts})
    assert files(tmp_path) == {}


def test_set_is_read_as_cityscapes(complete: Path) -> None:
    for split, count in (("train", 4), ("val", 3)):
        samples = list_cityscapes(complete, split)
        assert len(samples) == count
        read = {image.tobytes() + mask.tobytes() for image, mask in (read_sample(s, CITYSCAPES) for s in samples)}
        scenes = [render_scene(0, split, number, SMALL) for number in range(count)]
        assert read == {image.tobytes() + CITYSCAPES.encode[label].tobytes() for image, label in scenes}


def test_processes_change_nothing_in_the_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_SCENES_PER_PROCESS", 2)
    for cores in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        write_synthetic(tmp_path / str(cores), **SET)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_complete_set_is_left_as_it_is(complete: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*")}
    write_synthetic(complete, **SET)
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*")} == before


@pytest.mark.parametrize("survivors", [0, 1, 2, 7, 14])
def test_interrupted_set_is_completed(
    survivors: int, complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = iter(range(100))
    publish = synthetic._publish

    def fail(path: Path, content: bytes) -> None:
        if next(writes) > survivors:
            raise KeyboardInterrupt
        publish(path, content)

    monkeypatch.setattr(synthetic, "_publish", fail)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path, **SET)
    monkeypatch.undo()
    assert not (tmp_path / "synthetic.json").exists()
    with pytest.raises(ValueError, match="size"):  # another set must not be mixed with what is there
        write_synthetic(tmp_path, **{**SET, "size": (64, 130)})
    write_synthetic(tmp_path, **SET)
    assert files(tmp_path) == files(complete)


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        synthetic._publish(tmp_path / "a.png", b"content")
    assert not (tmp_path / "a.png").exists()


def test_several_may_write_the_same_set_at_once(complete: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_synthetic(tmp_path, **SET), range(4)))
    assert files(tmp_path) == files(complete)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"size": (64, 130)}, r"size \[64, 128\], not \[64, 130\]"),
        ({"counts": {"train": 5, "val": 3}}, "counts .*'train': 4.*'train': 5"),
    ],
)
def test_another_set_is_refused_and_kept(other: dict[str, object], message: str, complete: Path) -> None:
    before = files(complete)
    with pytest.raises(ValueError, match=message) as error:
        write_synthetic(complete, **{**SET, **other})  # type: ignore[arg-type]
    assert str(complete) in str(error.value)
    assert files(complete) == before


def test_set_of_another_generator_is_refused(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "GENERATOR", synthetic.GENERATOR + 1)
    message = rf"generator {synthetic.GENERATOR - 1}, not {synthetic.GENERATOR}.*another data\.root; or delete"
    with pytest.raises(ValueError, match=message):
        write_synthetic(complete, **SET)


def test_real_cityscapes_is_never_written_into(tmp_path: Path) -> None:
    real = tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    with pytest.raises(ValueError, match=r"no synthetic\.json"):
        write_synthetic(tmp_path, **SET)
    assert files(tmp_path) == {str(real.relative_to(tmp_path)): b"real"}


def test_manifest_says_what_the_set_is(complete: Path) -> None:
    assert json.loads((complete / "synthetic.json").read_text()) == {
        "generator": synthetic.GENERATOR,
        "seed": 0,
        "size": [64, 128],
        "counts": {"train": 4, "val": 3, "test": 0},
    }
    image = cv2.imread(str(list_cityscapes(complete, "val")[0].image), cv2.IMREAD_UNCHANGED)
    assert image is not None
    assert image.shape == (64, 128, 3)


def test_shapes_are_few_large_areas_and_another_set(tmp_path: Path, complete: Path) -> None:
    image, label = synthetic.render_scene(0, "train", 0, (64, 128), "shapes")
    again = synthetic.render_scene(0, "train", 0, (64, 128), "shapes")
    assert (image == again[0]).all()
    assert (label == again[1]).all()
    areas = np.unique(label, return_counts=True)[1] / label.size
    assert len(areas) == 4
    assert areas.min() > 0.02
    with pytest.raises(ValueError, match="generator"):
        write_synthetic(complete, **SET, scene="shapes")
