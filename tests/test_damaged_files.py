"""Every kind of file that is read, damaged in 200 seeded ways: the right result, or a clear message that names it."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import make_listed
from PIL import Image
from test_checkpoint import SMALL, content_of, small_segmenter, table

import bisenet
from bisenet import sweep
from bisenet.checkpoint import build
from bisenet.classes import ClassTable
from bisenet.data.datasets import Listed, list_samples, read_sample
from bisenet.predict import read_image

Reader = Callable[[Path], Any]
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A bit, a byte or a run of bytes changed, lost, doubled or cut off."""
    first, length = draw.randrange(len(content)), draw.choice([1, 4, 50])
    kind = draw.choice(["bit", "bit", "bytes", "lost", "doubled", "cut", "zeros"])
    rest = content[first + length :]
    return {
        "bit": content[:first] + bytes([content[first] ^ 1 << draw.randrange(8)]) + content[first + 1 :],
        "bytes": content[:first] + draw.randbytes(length) + rest,
        "zeros": content[:first] + bytes(length) + rest,
        "lost": content[:first] + rest,
        "doubled": content[: first + length] + content[first:],
        "cut": content[:first],
    }[kind]


def labels_of(file: Path, data: Any = None) -> Any:
    return bisenet.load(file, data).predict(IMAGE).tolist()


def checkpoint(file: Path) -> Reader:
    torch.save(content_of(small_segmenter()), file)
    return labels_of


def weights(file: Path) -> Reader:
    torch.save(build(SMALL, n_classes=5).state_dict(), file)
    return functools.partial(labels_of, data={"classes": table(5), "mean": [0.1] * 3, "std": [0.2] * 3})


def json_table(file: Path) -> Reader:
    file.write_text(json.dumps(table(3).to_dict()), encoding="utf-8")
    return ClassTable.load


def yaml_table(file: Path) -> Reader:
    file.write_text(yaml.safe_dump(table(3).to_dict()), encoding="utf-8")
    return ClassTable.load


def image(file: Path) -> Reader:
    assert cv2.imwrite(str(file), IMAGE)
    return lambda file: read_image(file, max_pixels=1e5).shape


def label(file: Path) -> Reader:
    Image.fromarray(IMAGE[..., 0] % 11).save(file)
    make_listed(file.parent, {"train": 1})
    (sample,) = list_samples(Listed(file.parent, {"train": "train.csv"}), "train")
    sample.label.unlink()
    sample.label.symlink_to(file)
    return lambda _: read_sample(sample, ClassTable.load("camvid"))[1].shape


def list_file(file: Path) -> Reader:
    make_listed(file.parent, {"train": 2})
    (file.parent / "train.csv").rename(file)
    return lambda file: list_samples(Listed(file.parent, {"train": file.name}), "train")


def results(file: Path) -> Reader:
    """Of a run: damaged, the run counts as not finished, and is named."""
    (file.parent / ".hydra").mkdir()
    (file.parent / ".hydra" / "config.yaml").write_text("{model: {name: a}, init_seed: 0, data_seed: 0}")
    job = {"config": {"override_dirname": {"exclude_keys": []}}}
    node = {"mode": "RUN", "runtime": {"choices": {}}, "overrides": {"task": []}, "job": job}
    (file.parent / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": node}))
    file.write_text(json.dumps({"split": "val", "protocols": {"ss": {"miou": 51.25}}}))

    def read(file: Path) -> Any:
        runs, missing = sweep.read_runs([str(file.parent)])
        if missing:
            raise ValueError(f"{file}: {missing}")
        return runs[0].results

    return read


EXACT = (checkpoint, weights)  # whose archive has checksums
KINDS = [
    (checkpoint, "a.ckpt"), (weights, "a.pth"), (json_table, "a.json"), (yaml_table, "a.yaml"), (list_file, "a.csv"),
    (label, "a.png"), (results, "results.json"), *((image, f"a.{s}") for s in ("png", "jpg", "bmp", "tiff", "webp")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=[f"{kind.__name__}-{name}" for kind, name in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_named_or_does_no_harm(kind: Callable[[Path], Reader], name: str, tmp_path: Path) -> None:
    read, draw, refused = kind(file := tmp_path / name), random.Random(name), 0
    whole, expected = file.read_bytes(), (found := read(file))
    for number in range(200):
        file.write_bytes(mutated(whole, draw))
        message = ""
        try:
            found = read(file)
        except (ValueError, OSError) as error:
            message = str(error)
            refused += 1
        assert found == expected or message or kind not in EXACT, number
        assert not message or (file.parent.name in message and len(message) < 5000), number
    assert refused > 20
