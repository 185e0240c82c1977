"""Class tables: the single source for head size, label mapping, palette, metrics and exported ids of a data set."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import yaml

_TABLES = {path.stem: path for path in sorted(Path(__file__).with_name("class_tables").glob("*.yaml"))}


@dataclass(frozen=True)
class SegmentationClass:
    """One row of a class table; a ValueError names the value that is not what the field says."""

    name: str
    ids: tuple[int, ...]
    """Values in [0, 255] that stand for the class in label files; lists become tuples."""
    train_id: int | None
    """Channel of the network's output, or None for a class that is ignored."""
    color: tuple[int, int, int]
    """RGB in [0, 255]."""
    category: str | None = None
    """Group of classes (Cityscapes), or None."""

    def __post_init__(self) -> None:
        for key, value in {"name": self.name, "category": self.category or ""}.items():
            if not isinstance(value, str):
                raise ValueError(f"{key}: got {value!r}, accepted: text, in quotes where YAML takes it for true (on)")
        for key, sizes, accepted in (("ids", range(1, 257), "at least one"), ("color", (3,), "red, green and blue")):
            values = tuple(given) if isinstance(given := getattr(self, key), list | tuple) else (given,)
            if len(values) not in sizes or not all(type(value) is int and 0 <= value <= 255 for value in values):
                raise ValueError(f"({self.name}) {key}: got {given!r}, accepted: {accepted}, integers in [0, 255]")
            object.__setattr__(self, key, values)
        if self.train_id is not None and type(self.train_id) is not int:
            raise ValueError(f"({self.name}) train_id: got {self.train_id!r}, accepted: an integer or null")


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set: file id, train id, name and colour of each, ignored ones included.

    Fewer than two classes to learn, a name or id used twice, or train ids that are not 0..n-1 are a ValueError.
    """

    name: str
    classes: tuple[SegmentationClass, ...]
    ignore_index: ClassVar[int] = 255
    """Value of ignored pixels in mask tensors (uint8)."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"name: got {self.name!r}, accepted: text")
        train_ids = [entry.train_id for entry in self._learned]
        ids = [value for entry in self.classes for value in entry.ids]
        for key, values in {"name": [entry.name for entry in self.classes], "id": ids, "train_id": train_ids}.items():
            if repeated := [value for value, times in Counter(values).items() if times > 1]:
                raise ValueError(f"classes: got the {key} {repeated[0]!r} more than once")
        if not 2 <= len(train_ids) <= 255:
            accepted = "2 to 255 (give the background a line of its own)"
            raise ValueError(f"classes: got {len(train_ids)} to learn, accepted: {accepted}")
        if train_ids != [*range(len(train_ids))]:
            raise ValueError(f"classes: got the train_ids {train_ids}, accepted: 0 to {len(train_ids) - 1}, each once")

    @cached_property
    def _learned(self) -> list[SegmentationClass]:
        """In the order of their train ids."""
        return sorted((e for e in self.classes if e.train_id is not None), key=lambda entry: entry.train_id or 0)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each train id, in order."""
        return tuple(entry.name for entry in self._learned)

    @cached_property
    def categories(self) -> tuple[str | None, ...]:
        """Category of each train id, in order."""
        return tuple(entry.category for entry in self._learned)

    @property
    def num_classes(self) -> int:
        """Number of train ids, the channels of the network's output."""
        return len(self._learned)

    @cached_property
    def palette(self) -> np.ndarray:
        """Train id -> RGB, uint8 (256, 3); black for everything that is not a train id."""
        return _lookup(np.zeros((256, 3), np.uint8), {entry.train_id: entry.color for entry in self._learned})

    @cached_property
    def encode(self) -> np.ndarray:
        """File id -> train id, uint8 (256,); ``ignore_index`` for ignored and for unknown ids."""
        mapping = {value: entry.train_id for entry in self._learned for value in entry.ids}
        return _lookup(np.full(256, self.ignore_index, np.uint8), mapping)

    @cached_property
    def known(self) -> np.ndarray:
        """Which file ids the table accepts, bool (256,)."""
        return _lookup(np.zeros(256, np.bool_), {value: True for entry in self.classes for value in entry.ids})

    @cached_property
    def decode(self) -> np.ndarray:
        """Train id -> the first file id of its class, uint8 (256,); all else -> the first ignored id, or 255."""
        void = next((entry.ids[0] for entry in self.classes if entry.train_id is None), self.ignore_index)
        return _lookup(np.full(256, void, np.uint8), {entry.train_id: entry.ids[0] for entry in self._learned})

    @cached_property
    def encode_color(self) -> np.ndarray:
        """Colour -> train id + 1, uint16 (2**24,) by red * 2**16 + green * 2**8 + blue; 0: a colour of no class.

        Memory is taken only where classes lie. Ignored classes give ``ignore_index + 1`` and may share a colour.

        Raises:
            ValueError: a colour of several classes that are not all ignored; label files in colours are ambiguous then.
        """
        owners = dict[int, SegmentationClass]()
        for entry in self.classes:
            red, green, blue = entry.color
            other = owners.setdefault(red << 16 | green << 8 | blue, entry)
            if other.train_id != entry.train_id:
                raise ValueError(
                    f"class table {self.name!r}: the classes {other.name!r} and {entry.name!r} share the color "
                    f"{list(entry.color)}; label files in colours need one for each class that is not ignored"
                )
        codes = {code: 1 + int(self.encode[entry.ids[0]]) for code, entry in owners.items()}
        return _lookup(np.zeros(2**24, np.uint16), codes)

    @cached_property
    def train_id_table(self) -> "ClassTable":
        """The same classes for label files that already hold train ids and ``ignore_index``."""
        rows = [{**asdict(entry), "ids": [entry.train_id]} for entry in self._learned]
        ignored = SegmentationClass("ignored", (self.ignore_index,), None, (0, 0, 0))
        return ClassTable(f"{self.name} (train ids)", (*(SegmentationClass(**row) for row in rows), ignored))

    def to_dict(self) -> dict[str, Any]:
        """Plain Python (what :meth:`from_dict` and the YAML files hold), fit for a checkpoint."""
        rows = [{**asdict(entry), "ids": [*entry.ids], "color": [*entry.color]} for entry in self.classes]
        return {"name": self.name, "ignore_index": self.ignore_index, "classes": rows}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Build a table from plain Python: ``name`` and ``classes``.

        A class holds ``name``, ``ids`` (or a single ``id``) and optionally ``color``, ``category``, and either
        ``train_id`` (null: ignored) or ``ignore`` (false by default; classes that are not ignored are then numbered in
        order). Without a ``color``, ignored classes are black and the others take that of their train id + 1 in PASCAL
        VOC's map. A mistake is a ValueError that names the class by its position.
        """
        given = list(table) if isinstance(table, Mapping) else [table]
        if not {"name", "classes"} <= {*given} <= {"name", "classes", "ignore_index"}:
            raise ValueError(f"got {given}, accepted: the keys name and classes, or a list of classes")
        rows, classes = table["classes"], list[SegmentationClass]()
        if table.get("ignore_index", 255) != cls.ignore_index:
            raise ValueError(f"ignore_index: got {table['ignore_index']!r}, accepted: 255, or mark ids by ignore: true")
        if not isinstance(rows, list) or len({"train_id" in row for row in rows if isinstance(row, Mapping)}) > 1:
            raise ValueError("classes: accepted: a list, in which all classes have a train_id or none has one")
        for position, row in enumerate(rows):
            try:
                classes.append(_parse_class({**row}, sum(entry.train_id is not None for entry in classes)))
            except (TypeError, ValueError) as error:
                mistake = str(error).removeprefix("SegmentationClass.__init__() ")
                raise ValueError(f"classes[{position}]: {mistake}") from None
        return cls(table["name"], tuple(classes))

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Load a table that comes with the package by its name, or one of your own by its path.

        A file is YAML or JSON in the form of :meth:`from_dict`, or only the list of its classes; the file's name is
        then the table's. A mistake is a ValueError that names file and class.
        """
        path = _TABLES.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            accepted = f"{' | '.join(_TABLES)}, or the path of a YAML or JSON file"
            raise ValueError(f"classes: got {str(name_or_path)!r}, accepted: {accepted}")
        try:
            text = path.read_text(encoding="utf-8-sig")
            table = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            return cls.from_dict({"name": path.stem, "classes": table} if isinstance(table, list) else table)
        except yaml.MarkedYAMLError as error:  # its own message has several lines, and shows those of the file
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ValueError(f"class table {path}, line {line}: {error.problem}") from None
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"class table {path}: {error}") from None


def _lookup(array: np.ndarray, values: Mapping[Any, Any]) -> np.ndarray:
    for key, value in values.items():
        array[key] = value
    array.flags.writeable = False  # shared by everyone who holds the table
    return array


def _parse_class(row: dict[str, Any], next_train_id: int) -> SegmentationClass:
    """Read one class of :meth:`ClassTable.from_dict`; the constructor refuses unknown keys."""
    if "ids" not in row:
        row["ids"] = row.pop("id", [])
    if "train_id" not in row:
        row["train_id"] = None if (ignore := row.pop("ignore", False)) else next_train_id
        if not isinstance(ignore, bool):
            raise ValueError(f"ignore: got {ignore!r}, accepted: true or false")
    if "color" not in row:  # PASCAL VOC's map gives the bits of a number to red, green and blue in turn
        number = row["train_id"] + 1 if isinstance(row["train_id"], int) else 0
        row["color"] = [sum((number >> 3 * bit + rgb & 1) << 7 - bit for bit in range(3)) for rgb in range(3)]
    return SegmentationClass(**row)
