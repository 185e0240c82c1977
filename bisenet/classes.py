"""Class tables: the single source for head size, label mapping, palette, metrics and exported ids of a data set."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml

_TABLES = Path(__file__).parent / "class_tables"
_ENTRY_KEYS = {"name", "id", "ids", "train_id", "ignore", "color", "category"}


@dataclass(frozen=True)
class SegmentationClass:
    """One row of a class table."""

    name: str
    ids: tuple[int, ...]
    """Values in [0, 255] that stand for the class in label files."""
    train_id: int | None
    """Channel of the network's output, or None for a class that is ignored."""
    color: tuple[int, int, int]
    """RGB in [0, 255]."""
    category: str | None = None
    """Group of classes (Cityscapes), or None."""


@dataclass(frozen=True)
class ClassTable:
    """The classes of a data set: file id, train id, name and colour of each, ignored ones included.

    Raises:
        ValueError: nothing to learn, a name or id used twice, train ids that are not 0..n-1, a value outside [0, 255],
            or an ``ignore_index`` that is also a train id. The message names the entry.
    """

    name: str
    classes: tuple[SegmentationClass, ...]
    ignore_index: int = 255
    """Value of ignored pixels in mask tensors (uint8)."""

    def __post_init__(self) -> None:
        for entry in self.classes:
            if not entry.ids:
                raise ValueError(f"class {entry.name!r}: got no id, accepted: at least one")
            for key, values in (("id", entry.ids), ("color", entry.color)):
                if wrong := [value for value in values if not 0 <= value <= 255]:
                    raise ValueError(f"class {entry.name!r}: got {key} {wrong[0]}, accepted: integers in [0, 255]")
        self._require_unique("name", ((entry.name, entry) for entry in self.classes))
        self._require_unique("id", ((value, entry) for entry in self.classes for value in entry.ids))
        self._require_unique("train_id", ((entry.train_id, entry) for entry in self._learned))
        if not 1 <= self.num_classes <= 255:
            raise ValueError(f"classes: got {self.num_classes} that are not ignored, accepted: 1 to 255")
        for entry in self._learned:
            if entry.train_id not in range(self.num_classes):
                raise ValueError(
                    f"class {entry.name!r}: got train_id {entry.train_id}, accepted: each of 0 to "
                    f"{self.num_classes - 1} once, because {self.num_classes} classes are not ignored"
                )
        if not self.num_classes <= self.ignore_index <= 255:
            raise ValueError(
                f"ignore_index: got {self.ignore_index}, accepted: {self.num_classes} to 255, outside of the train ids"
            )

    @staticmethod
    def _require_unique(key: str, values: Iterable[tuple[object, SegmentationClass]]) -> None:
        owners: dict[object, str] = {}
        for value, entry in values:
            if value in owners:
                raise ValueError(f"class {entry.name!r}: {key} {value!r} is taken by class {owners[value]!r}")
            owners[value] = entry.name

    @property
    def _learned(self) -> tuple[SegmentationClass, ...]:
        return tuple(entry for entry in self.classes if entry.train_id is not None)

    @property
    def num_classes(self) -> int:
        """Number of train ids, the channels of the network's output."""
        return len(self._learned)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each train id, in order."""
        return tuple(entry.name for entry in sorted(self._learned, key=lambda entry: entry.train_id or 0))

    @cached_property
    def categories(self) -> tuple[str | None, ...]:
        """Category of each train id, in order."""
        return tuple(entry.category for entry in sorted(self._learned, key=lambda entry: entry.train_id or 0))

    @cached_property
    def palette(self) -> np.ndarray:
        """Train id -> RGB, uint8 (256, 3); black for everything that is not a train id."""
        return self._lookup({entry.train_id: entry.color for entry in self._learned}, np.zeros((256, 3), np.uint8))

    @cached_property
    def encode(self) -> np.ndarray:
        """File id -> train id, uint8 (256,); ``ignore_index`` for ignored and for unknown ids."""
        mapping = {value: entry.train_id for entry in self._learned for value in entry.ids}
        return self._lookup(mapping, np.full(256, self.ignore_index, np.uint8))

    @cached_property
    def known(self) -> np.ndarray:
        """Which file ids the table accepts, bool (256,)."""
        return self._lookup({value: True for entry in self.classes for value in entry.ids}, np.zeros(256, np.bool_))

    @cached_property
    def decode(self) -> np.ndarray:
        """Train id -> the first file id of its class, uint8 (256,).

        Everything else becomes the first ignored id of the table (Cityscapes: 0, unlabeled), or ``ignore_index`` where
        the table ignores nothing.
        """
        void = next((entry.ids[0] for entry in self.classes if entry.train_id is None), self.ignore_index)
        return self._lookup({entry.train_id: entry.ids[0] for entry in self._learned}, np.full(256, void, np.uint8))

    @cached_property
    def encode_color(self) -> np.ndarray:
        """Colour -> train id + 1, uint16 (2**24,) by red * 2**16 + green * 2**8 + blue; 0: a colour of no class.

        Memory is taken only where classes lie. Ignored classes give ``ignore_index + 1`` and may share a colour.

        Raises:
            ValueError: a colour of several classes that are not all ignored; label files in colours are ambiguous then.
        """
        array, owners = np.zeros(2**24, np.uint16), dict[int, SegmentationClass]()
        for entry in self.classes:
            red, green, blue = entry.color
            code = red << 16 | green << 8 | blue
            other = owners.setdefault(code, entry)
            if other.train_id != entry.train_id:
                raise ValueError(
                    f"class table {self.name!r}: the classes {other.name!r} and {entry.name!r} share the color "
                    f"{list(entry.color)}; label files in colours need a color for each class that is not ignored"
                )
            array[code] = 1 + (self.ignore_index if entry.train_id is None else entry.train_id)
        array.flags.writeable = False
        return array

    @staticmethod
    def _lookup(mapping: Mapping[Any, Any], array: np.ndarray) -> np.ndarray:
        for key, value in mapping.items():
            array[key] = value
        array.flags.writeable = False  # shared by everyone who holds the table
        return array

    @cached_property
    def train_id_table(self) -> "ClassTable":
        """The same classes for label files that already hold train ids and ``ignore_index``."""
        learned = tuple(
            SegmentationClass(entry.name, (entry.train_id,), entry.train_id, entry.color, entry.category)
            for entry in self._learned
            if entry.train_id is not None
        )
        ignored = SegmentationClass("ignored", (self.ignore_index,), None, (0, 0, 0))
        return ClassTable(f"{self.name} (train ids)", (*learned, ignored), self.ignore_index)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python (what :meth:`from_dict` and the YAML files hold), fit for a checkpoint."""
        return {
            "name": self.name,
            "ignore_index": self.ignore_index,
            "classes": [
                {
                    "ids": list(entry.ids),
                    "name": entry.name,
                    "train_id": entry.train_id,
                    "color": list(entry.color),
                    "category": entry.category,
                }
                for entry in self.classes
            ],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Build a table from plain Python.

        ``table`` holds ``name``, ``classes`` and optionally ``ignore_index`` (255). A class holds ``name``, ``ids`` (or
        a single ``id``) and optionally ``color``, ``category``, and either ``train_id`` (null: ignored) or ``ignore``
        (false by default; the classes that are not ignored are then numbered in order). Without a ``color``, ignored
        classes are black and the others take the colour of their train id + 1 in PASCAL VOC's colour map.
        """
        if unknown := set(table) - {"name", "ignore_index", "classes"}:
            raise ValueError(f"got key {sorted(unknown)[0]!r}, accepted: name, ignore_index, classes")
        entries = _typed(table, "classes", Sequence, "a list of classes")
        if sum("train_id" in entry for entry in entries if isinstance(entry, Mapping)) not in (0, len(entries)):
            raise ValueError("classes: some have a train_id and some have not; accepted: all of them or none")
        classes: list[SegmentationClass] = []
        for position, entry in enumerate(entries):
            numbered = sum(previous.train_id is not None for previous in classes)
            try:
                classes.append(_parse_class(entry, next_train_id=numbered))
            except ValueError as error:
                raise ValueError(f"classes[{position}]: {error}") from None
        ignore_index = _typed({"ignore_index": 255, **table}, "ignore_index", int, "an integer in [0, 255]")
        return cls(_typed(table, "name", str, "text"), tuple(classes), ignore_index)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """Load a table that comes with the package by its name, or one of your own by its path.

        A file is YAML or JSON in the form of :meth:`from_dict`, or only the list of its classes; the file's name is
        then the table's.

        Raises:
            ValueError: no such table or file, or a mistake in it; the message names file and entry.
        """
        builtin = {path.stem: path for path in sorted(_TABLES.glob("*.yaml"))}
        path = builtin.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise ValueError(
                f"class table (data.classes): got {str(name_or_path)!r}, accepted: {' | '.join(builtin)} or the path "
                "of a YAML or JSON file"
            )
        try:
            text = path.read_text(encoding="utf-8")
            table = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            if isinstance(table, list):
                table = {"name": path.stem, "classes": table}
            if not isinstance(table, Mapping):
                raise ValueError(f"got {type(table).__name__}, accepted: a table with name and classes, or a list")
            return cls.from_dict(table)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"class table {path}: {error}") from None


def _typed(source: Mapping[str, Any], key: str, kind: type, accepted: str) -> Any:
    """``source[key]``, or a ValueError where it is missing or of another type."""
    value = source.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        got = repr(value) if key in source else "nothing"
        raise ValueError(f"{key}: got {got}, accepted: {accepted}")
    return value


def _integers(source: Mapping[str, Any], key: str) -> tuple[int, ...]:
    values = _typed(source, key, Sequence, "a list of integers")
    return tuple(_typed({key: value}, key, int, "a list of integers") for value in values)


def _parse_class(entry: Any, next_train_id: int) -> SegmentationClass:
    """Read one class of :meth:`ClassTable.from_dict`."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"got {entry!r}, accepted: keys among {', '.join(sorted(_ENTRY_KEYS))}")
    if unknown := set(entry) - _ENTRY_KEYS:
        raise ValueError(f"got key {sorted(map(str, unknown))[0]!r}, accepted: {', '.join(sorted(_ENTRY_KEYS))}")
    name = _typed(entry, "name", str, "text")
    if ("id" in entry) == ("ids" in entry) or {"train_id", "ignore"} <= set(entry):
        raise ValueError(f"({name}) accepted: one of id and ids, and at most one of train_id and ignore")
    ids = _integers(entry, "ids") if "ids" in entry else (_typed(entry, "id", int, "an integer"),)
    if "train_id" in entry:
        train_id = None if entry["train_id"] is None else _typed(entry, "train_id", int, "an integer or null")
    else:
        ignored = _typed({"ignore": False, **entry}, "ignore", bool, "true or false")
        train_id = None if ignored else next_train_id
    color = _integers(entry, "color") if "color" in entry else _voc_color(0 if train_id is None else train_id + 1)
    if len(color) != 3:
        raise ValueError(f"({name}) color: got {list(color)}, accepted: [red, green, blue]")
    category = None if entry.get("category") is None else _typed(entry, "category", str, "text or null")
    return SegmentationClass(name, ids, train_id, (color[0], color[1], color[2]), category)


def _voc_color(index: int) -> tuple[int, int, int]:
    """Colour ``index`` of PASCAL VOC's colour map, which gives the bits of the index to red, green and blue in turn."""
    red, green, blue = (sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3))
    return red, green, blue
