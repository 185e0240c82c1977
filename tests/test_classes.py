import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bisenet.classes import ClassTable, SegmentationClass

BUILTIN = ("cityscapes", "camvid", "coco_stuff", "ade20k")


@st.composite
def tables(draw: st.DrawFn) -> ClassTable:
    """Any table: ids scattered over the file's values, train ids in any order, some classes with several ids."""
    ids = draw(st.lists(st.integers(0, 255), min_size=2, max_size=20, unique=True))
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
    groups = [tuple(ids[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    groups = [group for group in groups if group]
    learned = draw(st.integers(1, len(groups)))
    order: list[int | None] = [*draw(st.permutations(range(learned))), *[None] * (len(groups) - learned)]
    colors = draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=len(groups), max_size=len(groups)))
    entries = [
        SegmentationClass(f"class {i}", group, train_id, color, draw(st.sampled_from([None, "flat", "void"])))
        for i, (group, train_id, color) in enumerate(zip(groups, order, colors, strict=True))
    ]
    return ClassTable("drawn", tuple(entries), draw(st.integers(learned, 255)))


@given(tables())
def test_lookups_agree_with_the_table(table: ClassTable) -> None:
    for entry in table.classes:
        for value in entry.ids:
            assert table.known[value]
            assert table.encode[value] == (table.ignore_index if entry.train_id is None else entry.train_id)
        if entry.train_id is not None:
            assert table.names[entry.train_id] == entry.name
            assert table.decode[entry.train_id] == entry.ids[0]
            assert tuple(table.palette[entry.train_id]) == entry.color
    assert table.known.sum() == sum(len(entry.ids) for entry in table.classes)
    assert (table.encode[~table.known] == table.ignore_index).all()
    assert not table.palette[table.num_classes :].any()
    train_ids = np.arange(table.num_classes)
    assert (table.encode[table.decode[train_ids]] == train_ids).all()


@given(tables())
def test_plain_python_round_trip(table: ClassTable) -> None:
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@given(tables())
def test_files_of_train_ids_need_no_translation(table: ClassTable) -> None:
    same = table.train_id_table
    accepted = [*range(table.num_classes), table.ignore_index]
    assert np.flatnonzero(same.known).tolist() == accepted
    assert same.encode[accepted].tolist() == accepted
    assert (same.names, same.ignore_index) == (table.names, table.ignore_index)


def test_cityscapes_is_the_official_table() -> None:
    table = ClassTable.load("cityscapes")
    assert table.num_classes == 19
    assert table.decode[:19].tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert np.flatnonzero(table.known).tolist() == [*range(34), 255]
    assert table.decode[255] == 0  # unlabeled
    assert dict(zip(table.names, table.palette.tolist(), strict=False))["person"] == [220, 20, 60]
    assert {entry.category for entry in table.classes if entry.train_id is not None} == {
        "flat", "construction", "object", "nature", "sky", "human", "vehicle"
    }  # fmt: skip


def test_camvid_stores_void_as_11() -> None:
    table = ClassTable.load("camvid")
    assert table.encode[:13].tolist() == [*range(11), 255, 255]
    assert (table.known[11], table.known[12], table.decode[255]) == (True, False, 11)


def test_coco_stuff_has_the_ids_of_its_files() -> None:
    """The files hold 0 to 181 and 255; the eleven classes that COCO removed have no train id, as in the reference."""
    table = ClassTable.load("coco_stuff")
    removed = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
    assert table.decode[:171].tolist() == [value for value in range(182) if value not in removed]
    assert np.flatnonzero(~table.known).tolist() == [*removed, *range(182, 255)]
    assert [table.names[i] for i in (0, 11, 79, 80, 170)] == ["person", "stop sign", "toothbrush", "banner", "wood"]
    assert table.encode[255] == table.ignore_index
    assert len(np.unique(table.palette[:171], axis=0)) == 171


def test_ade20k_counts_from_1_and_ignores_0() -> None:
    table = ClassTable.load("ade20k")
    assert table.decode[:150].tolist() == [*range(1, 151)]
    assert table.encode[0] == table.ignore_index
    assert [table.names[i] for i in (0, 12, 20, 149)] == ["wall", "person", "car", "flag"]
    assert table.palette[:2].tolist() == [[120, 120, 120], [180, 120, 120]]


@pytest.mark.parametrize("name", BUILTIN)
def test_lookups_cannot_be_changed_by_who_shares_them(name: str) -> None:
    table = ClassTable.load(name)
    for array in (table.encode, table.decode, table.palette, table.known):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_own_tables(tmp_path: Path) -> None:
    listed = [
        {"id": 4, "name": "lane", "color": [1, 2, 3], "ignore": False},
        {"id": 9, "name": "void", "color": [0, 0, 0], "ignore": True},
        {"id": 0, "name": "rest", "color": [9, 9, 9], "ignore": False},
    ]
    (tmp_path / "lanes.json").write_text(json.dumps(listed))
    table = ClassTable.load(tmp_path / "lanes.json")
    assert (table.name, table.names, table.decode[:2].tolist()) == ("lanes", ("lane", "rest"), [4, 0])

    (tmp_path / "lanes.yaml").write_text(yaml.safe_dump(table.to_dict()))
    assert ClassTable.load(tmp_path / "lanes.yaml") == table


def test_colours_and_ignore_may_be_left_out() -> None:
    """Colours are then those of PASCAL VOC, by train id + 1, and black for what is ignored."""
    rows = [{"id": 7, "name": "void", "ignore": True}, *({"id": i, "name": str(i)} for i in range(3))]
    table = ClassTable.from_dict({"name": "bare", "classes": rows})
    assert (table.names, table.encode[7]) == (("0", "1", "2"), 255)
    assert table.palette[:4].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 0]]


@given(tables())
def test_colours_stand_for_classes_or_are_refused(table: ClassTable) -> None:
    claims: dict[tuple[int, int, int], set[int | None]] = {}
    for entry in table.classes:
        claims.setdefault(entry.color, set()).add(entry.train_id)
    if any(len(claim) > 1 for claim in claims.values()):
        with pytest.raises(ValueError, match="share the color"):
            _ = table.encode_color
        return
    assert np.count_nonzero(table.encode_color) == len(claims)
    for (red, green, blue), (train_id,) in claims.items():
        expected = table.ignore_index if train_id is None else train_id
        assert table.encode_color[red * 65536 + green * 256 + blue] == expected + 1


def test_unknown_table_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'citiscapes', accepted: ade20k \| camvid \| cityscapes \| coco_stuff or the path"
    ):
        ClassTable.load("citiscapes")


def _class(**changes: Any) -> dict[str, Any]:
    return {"name": "sky", "ids": [1], "train_id": 0, "color": [0, 0, 255], **changes}


ROAD = _class(name="road", ids=[2], train_id=1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ignore_index": 1, "classes": [_class(), ROAD]}, r"ignore_index: got 1, accepted: 2 to 255"),
        ({"ignore_index": 256, "classes": [_class()]}, r"ignore_index: got 256"),
        ({"ignore_index": "255", "classes": [_class()]}, r"ignore_index: got '255'"),
        ({"classes": [_class(), _class(name="road", train_id=1)]}, r"'road': id 1 is taken by class 'sky'"),
        ({"classes": [_class(ids=[3, 3])]}, r"'sky': id 3 is taken"),
        ({"classes": [_class(), _class(name="road", ids=[2])]}, r"'road': train_id 0 is taken by class 'sky'"),
        ({"classes": [_class(), _class(ids=[2], train_id=1)]}, r"'sky': name 'sky' is taken"),
        ({"classes": [_class(), _class(name="road", ids=[2], train_id=2)]}, r"'road': got train_id 2, .* 0 to 1 once"),
        ({"classes": [_class(train_id=-1)]}, r"'sky': got train_id -1"),
        ({"classes": [_class(color=[0, 0, 256])]}, r"'sky': got color 256, accepted: integers in \[0, 255\]"),
        ({"classes": [_class(color=[0, 0])]}, r"classes\[0\]: \(sky\) color: got \[0, 0\]"),
        ({"classes": [_class(color=[0, 0, 0.5])]}, r"color: got 0.5"),
        ({"classes": [_class(ids=[256])]}, r"'sky': got id 256, accepted"),
        ({"classes": [_class(ids=[-1])]}, r"'sky': got id -1"),
        ({"classes": [_class(ids=[])]}, r"'sky': got no id"),
        ({"classes": [_class(ids=[True])]}, r"ids: got True"),
        ({"classes": [_class(train_id=None)]}, r"got 0 that are not ignored, accepted: 1 to 255"),
        ({"classes": []}, r"got 0 that are not ignored"),
        ({"classes": [_class(colour=[0, 0, 0])]}, r"classes\[0\]: got key 'colour', accepted: category, color"),
        ({"classes": [_class(ignore=True)]}, r"at most one of train_id and ignore"),
        ({"classes": [_class(id=1)]}, r"one of id and ids"),
        ({"classes": [_class(), "road"]}, r"some have a train_id and some have not"),
        ({"classes": ["road"]}, r"classes\[0\]: got 'road'"),
        ({"classes": [_class(name=3)]}, r"classes\[0\]: name: got 3, accepted: text"),
        ({"classes": [{key: value for key, value in _class().items() if key != "name"}]}, r"name: got nothing"),
        ({"clases": [_class()]}, r"got key 'clases', accepted: name, ignore_index, classes"),
        ({}, r"classes: got nothing"),
        ("sky", r"got str, accepted: a table"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_entry(table: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **table} if isinstance(table, dict) else table))
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}"):
        ClassTable.load(path)


def test_at_most_255_classes() -> None:
    classes = tuple(SegmentationClass(str(i), (i,), i, (0, 0, 0)) for i in range(256))
    assert ClassTable("full", classes[:255]).num_classes == 255
    with pytest.raises(ValueError, match="got 256 that are not ignored, accepted: 1 to 255"):
        ClassTable("too full", classes)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    for name, text in (("broken.yaml", "classes: [}"), ("broken.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            ClassTable.load(tmp_path / name)
