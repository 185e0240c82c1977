"""A cache changes no sample, is shared without harm, decodes what is missing or changed, and notices damage."""

import itertools
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import albumentations as A
import numpy as np
import pytest
import torch
from conftest import CLASSES, DATASETS, ROOT, composed, make_camvid, random_image, save
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from bisenet.classes import ClassTable
from bisenet.data import ColorJitter, ScaleCrop, SegmentationDataModule
from bisenet.data.cache import DecodedCache
from bisenet.data.datasets import Sample, read_sample
from bisenet.experiment import build_all, data_of
from bisenet.launch import pool

CAMVID = ClassTable.load("camvid")


def module(dataset: Any, cache: str | None, **changes: Any) -> SegmentationDataModule:
    arguments = {"classes": "camvid", "augment": [ScaleCrop((32, 48)), ColorJitter()], "batch_size": 2, "workers": 0,
                 "cache_root": dataset.root / "cache", **changes}  # fmt: skip
    return SegmentationDataModule(lambda _: dataset, dataset.root, seed=0, cache=cache, **arguments)  # type: ignore


class Reader:
    """Decodes, and knows what it has decoded."""

    def __init__(self, table: ClassTable = CAMVID) -> None:
        self.table, self.decoded = table, list[str]()

    def __call__(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        self.decoded.append(sample.image.stem)
        return read_sample(sample, self.table)


def opened(root: Path, samples: list[Sample], **changes: Any) -> tuple[DecodedCache, list[str]]:
    """A cache of these samples, and what had to be decoded for it; what it reads is checked."""
    reader = Reader()
    cache = DecodedCache(root / "cache", {"root": str(root)}, reader, **changes)
    cache.add(samples)
    decoded = list(reader.decoded)
    for sample in samples:
        for cached, array in zip(cache.view(sample), read_sample(sample, CAMVID), strict=True):
            assert np.array_equal(cached, array)
    return cache, decoded


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    return make_camvid(tmp_path, {"train": 3}).samples("train")


ALL = ["0000", "0001", "0002"]


# Samples


@pytest.fixture(scope="module")
def recipes() -> list[DictConfig]:
    return [composed(f"augment={path.stem}") for path in (ROOT / "conf" / "augment").glob("*.yaml")]


@pytest.mark.parametrize(("name", "cache"), [*((name, "memmap") for name in DATASETS), ("camvid", "ram")])
def test_samples_are_the_same_bit_for_bit(name: str, cache: str, recipes: list[DictConfig], tmp_path: Path) -> None:
    """In training, with every recipe of conf/augment, and in evaluation."""
    dataset = DATASETS[name](tmp_path, {"train": 3, "val": 2})
    for number, recipe in enumerate(recipes):
        augment = build_all(recipe, "augment")
        sides = [module(dataset, kind, classes=CLASSES[name], augment=augment) for kind in (None, cache)]
        for ours, cached in itertools.islice(zip(*(side.train_dataloader() for side in sides), strict=True), 3):
            assert all(torch.equal(ours[key], cached[key]) for key in ours)
        if number == 0:
            for ours, cached in zip(*(side.evaluation_dataloader("val") for side in sides), strict=True):
                assert all(torch.equal(ours[key], cached[key]) for key in ours)
            assert len({str(side.class_counts("train")) for side in sides}) == 1
            for ours, cached in zip(*(side.examples("val", 2) for side in sides), strict=True):
                assert all(np.array_equal(a, b) and b.flags.writeable for a, b in zip(ours, cached, strict=True))


@given(sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=5))
def test_images_may_have_any_sizes(sizes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("sizes")
    samples = []
    for number, size in enumerate(sizes):
        image, label = random_image(number, size=size)
        samples.append(Sample(save(root / f"{number}.png", image), save(root / f"label{number}.png", label)))
    cache, decoded = opened(root, samples)
    assert len(decoded) == len(samples)
    assert not any(array.flags.writeable for sample in samples for array in cache.view(sample))
    found = [file.stat().st_size for file in cache.folder.glob("*.u8")]
    assert sorted(found) == sorted(4 * h * w for h, w in sizes)


def test_a_transform_that_writes_to_its_image_harms_no_one(tmp_path: Path) -> None:
    class Blacken(A.ImageOnlyTransform):
        def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
            img[:] //= 2
            return img

    dataset = make_camvid(tmp_path, {"train": 2})
    sides = [module(dataset, kind, augment=[Blacken(p=1)]) for kind in (None, "memmap")]
    for ours, cached in itertools.islice(zip(*(side.train_dataloader() for side in sides), strict=True), 4):
        assert torch.equal(ours["image"], cached["image"])


def test_a_checkpoint_does_not_decide_where_an_evaluation_writes(tmp_path: Path) -> None:
    """It may come from others."""
    trained = OmegaConf.to_container(composed("data.cache=memmap", f"data.cache_root={tmp_path}/theirs").data)
    read: Any = SimpleNamespace(data_node=lambda: trained, classes=ClassTable.load("cityscapes"), path=tmp_path)
    assert data_of(composed(name="evaluate"), read, None)._cache is None
    asked = data_of(composed("cache=ram", f"cache_root={tmp_path}/ours", name="evaluate"), read, None)._cache
    assert asked
    assert asked.folder.parent == tmp_path / "ours"


def test_an_error_in_a_file_is_the_same(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 3})
    save(tmp_path / "trainannot" / "0001.png", np.full((40, 56), 77, np.uint8))
    messages = []
    for cache, workers in ((None, 0), ("memmap", 0), ("memmap", 1), ("ram", 0)):
        with pytest.raises(ValueError, match=r"0001\.png holds the ids \[77\]") as error:
            module(dataset, cache, workers=workers).setup("fit")
        messages.append(str(error.value))
    assert len(set(messages)) == 1
    save(tmp_path / "trainannot" / "0001.png", random_image(1)[1])
    module(dataset, "memmap").samples("train")


def test_a_data_set_of_ones_own_needs_only_samples(samples: list[Sample], tmp_path: Path) -> None:
    own = SimpleNamespace(root=tmp_path, samples=lambda split: samples)
    loaded = module(own, "memmap")
    assert loaded.samples("train+val") == [*samples, *samples]
    assert len(list(loaded.evaluation_dataloader("train"))) == 3


def test_what_the_pixels_depend_on_makes_another_cache(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(**changes: Any) -> Path:
        loaded = module(SimpleNamespace(root=tmp_path), "memmap", **changes)
        assert loaded._cache
        return loaded._cache.folder

    folders = [folder(), folder(classes="cityscapes")]
    monkeypatch.setattr("bisenet.data.cache.cv2.__version__", "6.0")
    folders.append(folder())
    assert len(set(folders)) == 3
    assert {path.parent for path in folders} == {tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"^cache: got 'disk', accepted: memmap \| ram \| null"):
        module(SimpleNamespace(root=tmp_path), "disk")


def test_a_cache_passes_to_a_process_that_is_spawned(samples: list[Sample], tmp_path: Path) -> None:
    cache, _ = opened(tmp_path, samples)
    cache._read = partial(read_sample, table=CAMVID)
    content = pickle.dumps(cache.view)
    assert len(content) < 10_000
    for sample in samples:
        assert np.array_equal(pickle.loads(content)(sample)[0], cache.view(sample)[0])


# What is decoded


def test_only_what_is_new_or_has_changed_is_decoded(samples: list[Sample], tmp_path: Path) -> None:
    assert opened(tmp_path, samples[:1])[1] == ["0000"]
    before, decoded = opened(tmp_path, samples)
    assert decoded == ["0001", "0002"]
    assert opened(tmp_path, samples)[1] == []
    old = before.read(samples[1])
    os.utime(samples[2].label, ns=(1, 1))  # touched
    assert opened(tmp_path, samples)[1] == ["0002"]
    save(samples[1].image, random_image(9)[0])  # a file of the same size, or nearly
    assert opened(tmp_path, samples)[1] == ["0001"]
    save(samples[1].label, np.full((40, 56), 3, np.uint8))
    assert opened(tmp_path, samples)[1] == ["0001"]
    for size in ((20, 30), (80, 90)):
        for file, pixels in zip((samples[0].image, samples[0].label), random_image(4, size=size), strict=True):
            save(file, pixels)
        assert opened(tmp_path, samples)[1] == ["0000"]
    assert all(np.array_equal(a, b) for a, b in zip(before.view(samples[1]), old, strict=True))  # who reads, reads on


def test_a_changed_pixel_is_seen_in_a_file_of_the_same_size(samples: list[Sample], tmp_path: Path) -> None:
    image = save(tmp_path / "image.bmp", random_image(0)[0])
    bitmap = replace(samples[0], image=image)
    opened(tmp_path, [bitmap])
    content = bytearray(image.read_bytes())
    content[-1] ^= 1
    image.write_bytes(content)
    assert opened(tmp_path, [bitmap])[1] == ["image"]


@pytest.mark.parametrize("kind", ["flipped", "page", "truncated", "empty", "gone", "other"])
@given(place=st.floats(0, 0.999), draw=st.integers(0, 7))
def test_damaged_pixels_are_noticed_and_mended(
    kind: str, place: float, draw: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp(kind)
    samples = make_camvid(root, {"train": 3}).samples("train")
    cache, _ = opened(root, samples)
    file = sorted(cache.folder.glob("*.u8"))[draw % 3]
    content = bytearray(file.read_bytes())
    at = int(place * len(content))
    if kind == "flipped":
        content[at] ^= 1 << draw
    elif kind == "page":
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == "truncated":
        del content[at:]
    elif kind == "other":
        content = bytearray(np.random.default_rng(draw).bytes(len(content)))
    file.write_bytes(content if kind != "empty" else b"")
    if kind == "gone":
        file.unlink()
    opened(root, samples)
    again, decoded = opened(root, samples)  # from now on it is whole
    assert decoded == []
    assert not again._read.decoded  # type: ignore[attr-defined]


def test_a_cache_that_may_only_be_read_is_read(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = opened(tmp_path, samples)
    file = next(cache.folder.glob("*.u8"))
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("bisenet.data.cache._write", Mock(side_effect=PermissionError("of someone else")))
    assert opened(tmp_path, samples)[1] == []


# Several processes, kills, full disks


def build(root: Path, samples: list[Sample], seconds: float, log: Path) -> None:
    """Decode, slowly, in two processes, and note what."""
    cache = DecodedCache(root / "cache", {"root": str(root)}, partial(slow, seconds=seconds, log=log))
    cache.add(samples, partial(pool, 2))
    for sample in samples:
        assert np.array_equal(cache.view(sample)[0], read_sample(sample, CAMVID)[0])


def slow(sample: Sample, seconds: float, log: Path) -> tuple[np.ndarray, np.ndarray]:
    time.sleep(seconds)
    with log.open("a") as stream:
        stream.write(f"{os.getpid()} {sample.image.stem}\n")
    return read_sample(sample, CAMVID)


def noted(log: Path) -> list[tuple[int, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def test_several_trainings_at_once_decode_each_image_once(tmp_path: Path) -> None:
    samples = make_camvid(tmp_path, {"train": 12}).samples("train")
    context = multiprocessing.get_context("fork")
    arguments = [(tmp_path, part, 0.02, tmp_path / "log") for part in (samples, samples, samples[4:])]
    builders = [context.Process(target=build, args=each) for each in arguments]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert sorted(name for _, name in noted(tmp_path / "log")) == [sample.image.stem for sample in samples]


def test_a_builder_that_is_killed_is_continued(tmp_path: Path) -> None:
    samples, log = make_camvid(tmp_path, {"train": 40}).samples("train"), tmp_path / "log"
    builder = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path, samples, 0.05, log))
    builder.start()
    while len(list((tmp_path / "cache").glob("*/*.u8"))) < 8:
        time.sleep(0.01)
    os.kill(builder.pid or 0, signal.SIGKILL)
    builder.join()
    time.sleep(0.2)  # for its processes, which end with it and may not have been waited for yet
    stats = [Path("/proc", str(pid), "stat") for pid, _ in noted(log)]
    assert all(not stat.exists() or stat.read_text().split()[2] == "Z" for stat in stats)
    _, decoded = opened(tmp_path, samples)
    assert 0 < len(decoded) <= 32
    assert opened(tmp_path, samples)[1] == []


def test_a_disk_that_is_too_small_is_refused_before(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bisenet.data.cache.shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    with pytest.raises(ValueError, match=r"data\.cache: .* GB, and .* GB are free; accepted: data\.cache_root"):
        opened(tmp_path, samples)
    monkeypatch.undo()
    assert opened(tmp_path, samples)[1] == ALL


def test_a_disk_that_is_full_is_named(samples: list[Sample], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"\.u8 cannot be written: File too large"):
            opened(tmp_path, samples)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert opened(tmp_path, samples)[1] == ALL


def test_what_a_cache_is_of_stands_in_it(samples: list[Sample], tmp_path: Path) -> None:
    cache, _ = opened(tmp_path, samples)
    assert json.loads((cache.folder / "cache.json").read_text())["root"] == str(tmp_path)
    assert re.fullmatch(rf"{tmp_path.name}-[0-9a-f]{{12}}", cache.folder.name)
