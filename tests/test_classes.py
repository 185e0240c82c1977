import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bisenet.classes import ClassTable, SegmentationClass


@st.composite
def tables(draw: st.DrawFn) -> ClassTable:
    """Any table: ids scattered over the file's values, train ids in any order, some classes with several ids."""
    ids = draw(st.lists(st.integers(0, 255), min_size=4, max_size=20, unique=True))
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=8))
    groups = [tuple(ids[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    groups = [group for group in groups if group]
    learned = draw(st.integers(2, len(groups)))
    order: list[int | None] = [*draw(st.permutations(range(learned))), *[None] * (len(groups) - learned)]
    colors = draw(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=len(groups), max_size=len(groups)))
    entries = [
        SegmentationClass(f"class {i}", group, train_id, color, draw(st.sampled_from([None, "flat", "void"])))
        for i, (group, train_id, color) in enumerate(zip(groups, order, colors, strict=True))
    ]
    return ClassTable("drawn", tuple(entries))


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
def test_round_trip_and_files_of_train_ids(table: ClassTable) -> None:
    assert ClassTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    same, accepted = table.train_id_table, [*range(table.num_classes), 255]
    assert np.flatnonzero(same.known).tolist() == accepted
    assert same.encode[accepted].tolist() == accepted
    assert same.names == table.names


def test_tables_have_the_ids_of_their_files() -> None:
    city, camvid, coco, ade = (ClassTable.load(name) for name in ("cityscapes", "camvid", "coco_stuff", "ade20k"))
    assert city.decode[:19].tolist() == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert (np.flatnonzero(city.known).tolist(), city.decode[255]) == ([*range(34), 255], 0)
    assert dict(zip(city.names, city.palette.tolist(), strict=False))["person"] == [220, 20, 60]
    assert {*city.categories} == {"flat", "construction", "object", "nature", "sky", "human", "vehicle"}
    assert camvid.encode[:12].tolist() == [*range(11), 255]
    assert (camvid.known[11], camvid.known[12], camvid.decode[255]) == (True, False, 11)
    removed = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # from COCO; they have no train id, as in the reference
    assert coco.decode[:171].tolist() == [value for value in range(182) if value not in removed]
    assert np.flatnonzero(~coco.known).tolist() == [*removed, *range(182, 255)]
    assert [coco.names[i] for i in (0, 11, 79, 80, 170)] == ["person", "stop sign", "toothbrush", "banner", "wood"]
    assert len(np.unique(coco.palette[:171], axis=0)) == 171
    assert (ade.decode[:150].tolist(), ade.encode[0]) == ([*range(1, 151)], 255)
    assert [ade.names[i] for i in (0, 12, 20, 149)] == ["wall", "person", "car", "flag"]
    for array in (city.encode, city.decode, city.palette, city.known):
        with pytest.raises(ValueError, match="read-only"):  # tables are shared
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
        ValueError, match=r"^classes: got 'citiscapes', accepted: ade20k \| camvid \| celebamask \| cityscapes"
    ):
        ClassTable.load("citiscapes")


def _class(**changes: Any) -> dict[str, Any]:
    return {"name": "sky", "ids": [1], "train_id": 0, "color": [0, 0, 255], **changes}


ROAD = _class(name="road", ids=[2], train_id=1)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ignore_index": 1, "classes": [_class(), ROAD]}, r"ignore_index: got 1, accepted: 255"),
        ({"classes": [_class(), _class(name="road", train_id=1)]}, "classes: got the id 1 more than once"),
        ({"classes": [_class(ids=[3, 3]), ROAD]}, "got the id 3 more than once"),
        ({"classes": [_class(), _class(name="road", ids=[2])]}, "got the train_id 0 more than once"),
        ({"classes": [_class(), _class(ids=[2], train_id=1)]}, "got the name 'sky' more than once"),
        ({"classes": [_class(), _class(name="road", ids=[2], train_id=2)]}, r"train_ids \[0, 2\], accepted: 0 to 1"),
        ({"classes": [_class(train_id=-1), ROAD]}, r"train_ids \[-1, 1\]"),
        ({"classes": [_class(train_id="0")]}, r"classes\[0\]: \(sky\) train_id: got '0', accepted: an integer or null"),
        ({"classes": [_class(color=[0, 0, 256])]}, r"\(sky\) color: got \[0, 0, 256\], accepted: red, green and blue"),
        ({"classes": [_class(color=[0, 0])]}, r"classes\[0\]: \(sky\) color: got \[0, 0\]"),
        ({"classes": [_class(color=[0, 0, 0.5])]}, r"color: got \[0, 0, 0.5\]"),
        ({"classes": [ROAD, _class(ids=[256])]}, r"classes\[1\]: \(sky\) ids: got \[256\], accepted: at least one"),
        ({"classes": [_class(ids=[])]}, r"ids: got \[\]"),
        ({"classes": [_class(ids=[True])]}, r"ids: got \[True\]"),
        ({"classes": [_class(train_id=None)]}, r"got 0 to learn, accepted: 2 to 255"),
        ({"classes": [_class()]}, "got 1 to learn, accepted: 2 to 255 .give the background a line of its own"),
        ({"classes": [_class(name=str(i), ids=[i], train_id=i) for i in range(256)]}, "got 256 to learn"),
        ({"classes": [_class(colour=[0, 0, 0])]}, r"classes\[0\]: got an unexpected keyword argument 'colour'"),
        ({"classes": [_class(ignore=True)]}, "unexpected keyword argument 'ignore'"),
        ({"classes": [_class(id=1)]}, "unexpected keyword argument 'id'"),
        ({"classes": [{"id": 1, "name": "sky", "ignore": 1}]}, r"classes\[0\]: ignore: got 1, accepted: true or false"),
        ({"classes": [_class(), {"name": "road", "id": 2}]}, "all classes have a train_id or none has one"),
        ({"classes": ["road"]}, r"classes\[0\]: .*not a mapping"),
        ({"classes": [_class(), _class(name=True)]}, r"classes\[1\]: name: got True, accepted: text, in quotes"),
        ({"classes": [{"ids": [1], "train_id": 0}]}, r"classes\[0\]: missing 1 required positional argument: 'name'"),
        ({"clases": [_class()]}, r"got \['clases', 'name'\], accepted: the keys name and classes, or a list"),
        ("sky", r"got \['sky'\], accepted: the keys name and classes"),
        (None, r"got \[None\], accepted"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_entry(table: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", **table} if isinstance(table, dict) else table))
    with pytest.raises(ValueError, match=f"mine.yaml: .*{message}"):
        ClassTable.load(path)


def test_files_are_read_with_a_byte_order_mark_and_named_if_broken(tmp_path: Path) -> None:
    rows = "[{id: 0, name: rest}, {id: 1, name: lane}]"
    for name, text in (("marked.yaml", rows), ("marked.json", json.dumps(yaml.safe_load(rows)))):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert ClassTable.load(tmp_path / name).names == ("rest", "lane")
    for name, text in (("broken.yaml", "classes: [}"), ("broken.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}.*\Z"):
            ClassTable.load(tmp_path / name)
