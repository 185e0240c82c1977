"""Exported files give the network's predictions, and are models like any other."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import shaken

import bisenet
from bisenet import checkpoint, runtimes
from bisenet.classes import ClassTable
from bisenet.data.scenes import render_scene
from bisenet.export import Export
from bisenet.inference import Protocol, Segmenter
from bisenet.networks import BiSeNetV1, BiSeNetV2
from bisenet.networks.blocks import fold

for package in ("onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "ncnn", "pnnx"):
    pytest.importorskip(package, reason="takes the extra `export`")

NODE = {"_target_": "bisenet.networks.BiSeNetV2", "width_multiplier": 0.125, "aux": False}
PROTOCOLS = {"ss": Protocol(), "ms": Protocol((0.5, 1), flip=True)}
SCENE = render_scene(0, "train", 0, (64, 128))[0]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network of random weights."""
    path = tmp_path_factory.mktemp("source") / "last.ckpt"
    torch.manual_seed(1)  # of whose labels 998 of 1000 are the same in fp16
    network: Any = shaken(checkpoint.build(NODE, n_classes=11))
    with torch.no_grad():  # else one class is everywhere
        logits = network(torch.from_numpy(SCENE).permute(2, 0, 1)[None] / 128 - 1).logits
        network.head.conv_out[1].bias -= logits.mean((0, 2, 3))
    table = ClassTable.load("camvid")
    segmenter = Segmenter(network, table, (0.41, 0.42, 0.43), (0.3, 0.31, 0.32), PROTOCOLS)
    data = {"name": "camvid", "root": "/nowhere/camvid"}
    parts = checkpoint.portable(NODE, segmenter, data)
    checkpoint.write(path, network.state_dict(), 7, parts, {"name": "small", "data": data})
    return path


def export(source: Path, folder: Path, *formats: str, images: Any = (), **options: Any) -> list[dict[str, Any]]:
    read = checkpoint.read(source)
    return Export(formats, folder, **options).run(read, read.segmenter(), read.hyper_parameters, images)


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logits in every format that runs on a CPU, of any size."""
    folder = tmp_path_factory.mktemp("exported")
    export(source, folder, "onnx", "openvino", "ncnn", "torch_export", output="logits", license="MIT")
    return folder


FILES = ("model.onnx", "model.xml", "model.ncnn.param")


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_a_model_like_any_other(source: Path, exported: Path, name: str) -> None:
    network, model = bisenet.load(source), bisenet.load(exported / name)
    assert model.classes == network.classes
    assert model.normalization == network.normalization
    assert model.protocols == network.protocols
    assert checkpoint.read(exported / name).step == 7
    image = render_scene(0, "val", 1, (98, 130))[0]
    images = torch.from_numpy(np.stack([image, image[::-1].copy()])).permute(0, 3, 1, 2)
    assert len(np.unique(network.predict(image))) > 2, "labels of one class would say nothing"
    for protocol in PROTOCOLS:
        ours, theirs = (x.predictions(images, [protocol])[protocol].train_ids for x in (network, model))
        assert (ours == theirs).double().mean() > 0.999


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_stands_in_it(exported: Path, name: str) -> None:
    facts = runtimes.open_file(exported / name).facts
    assert facts["export"]["license"] == "MIT"
    assert facts["export"]["output"] == "logits"
    assert facts["export"]["size_multiple"] == 32
    assert facts["bisenet"]["classes"]["classes"][0] == {
        "name": "Sky", "ids": [0], "train_id": 0, "color": [128, 128, 128], "category": None}  # fmt: skip
    assert facts["hyper_parameters"]["data"]["name"] == "camvid"


def test_every_export_says_how_far_it_is(exported: Path) -> None:
    for found in json.loads((exported / "export.json").read_text()):
        assert found["equal_labels"] >= 0.999
        assert 0 < found["largest_difference_of_logits"] < 0.01
        assert found["bytes"] == sum(Path(file).stat().st_size for file in found["files"])


@pytest.mark.parametrize("output", ["mask", pytest.param("probabilities", marks=pytest.mark.slow)])
def test_a_fixed_file_of_normalised_images(source: Path, tmp_path: Path, output: str) -> None:
    options: dict[str, Any] = {"output": output, "normalization": "outside", "batch": 2, "size": [64, 128]}
    export(source, tmp_path, "onnx", "openvino", **options)
    network = bisenet.load(source)
    images = torch.from_numpy(np.stack([SCENE] * 3)).permute(0, 3, 1, 2)  # one more than the batch
    for name in ("model.onnx", "model.xml"):
        model = bisenet.load(tmp_path / name)
        assert (model(images) == network(images)).double().mean() > 0.999
        with pytest.raises(ValueError, match=r"64 x 128 .* 32 x 128"):
            model.predict(SCENE[:32])


@pytest.mark.slow
def test_half_precision_halves_the_file(source: Path, exported: Path, tmp_path: Path) -> None:
    found = export(source, tmp_path, "openvino", "ncnn", dtype="fp16", output="logits")
    assert all(entry["equal_labels"] >= 0.99 for entry in found)
    for name in ("model.bin", "model.ncnn.bin"):
        assert (tmp_path / name.replace("model", "model_fp16")).stat().st_size < 0.6 * (exported / name).stat().st_size


@pytest.mark.slow
def test_int8_is_calibrated_and_says_what_it_costs(source: Path, tmp_path: Path) -> None:
    images = [render_scene(0, "train", number, (64, 128))[0] for number in range(3)]
    with pytest.raises(ValueError, match="images of the training"):
        export(source, tmp_path, "onnx", dtype="int8")
    found = export(source, tmp_path, "onnx", "openvino", images=images, dtype="int8", least_agreement=0.3)
    for entry, name in zip(found, ("model_int8.onnx", "model_int8.xml"), strict=True):
        assert 0.3 < entry["equal_labels"] < 1  # something was rounded
        assert bisenet.load(tmp_path / name).predict(SCENE).shape == (64, 128)


def test_a_file_that_disagrees_is_refused_and_not_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: torch.nn.Module) -> torch.nn.Module:
        folded = fold(network)
        next(p for p in folded.parameters() if p.dim() == 4).data.mul_(-1)
        return folded

    monkeypatch.setattr("bisenet.export.fold", wrong)
    with pytest.raises(ValueError, match=r"format=torch_export: refused: 0\.\d+ of the labels"):
        export(source, tmp_path, "torch_export")
    assert [file.name for file in tmp_path.iterdir()] == ["export.json"]


@pytest.mark.parametrize(
    "make",
    [BiSeNetV1, partial(BiSeNetV1, generation="older", norm="inplace_abn"), partial(BiSeNetV2, width_multiplier=0.25)],
)
def test_folding_changes_nothing(make: Any) -> None:
    network = shaken(make(5))
    folded, x = fold(network), torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        assert torch.allclose(folded(x)[0], network(x).logits, atol=1e-4)
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) <= 1  # V2's context embedding normalises what no convolution made
    assert not any(name.startswith("aux") for name, _ in folded.named_parameters())


def test_a_model_folder(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path, "folder", license="mit")
    folder = tmp_path / "model"
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "example.png"}
    assert np.array_equal(bisenet.load(folder).predict(SCENE), bisenet.load(source).predict(SCENE))
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "| 0 | Sky | [128, 128, 128] |" in card
    assert "/nowhere" not in card + (folder / "config.json").read_text()  # where data lie is nobody's business
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("BiSeNetV2", "os.system"))
    with pytest.raises(ValueError, match=r"os\.system"):
        bisenet.load(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match="damaged model folder"):
        bisenet.load(folder)


def test_the_references_names(source: Path, tmp_path: Path) -> None:
    export(source, tmp_path, "reference")
    model = bisenet.load(tmp_path / "model_final.pth", data={"classes": "camvid", "mean": [0.41, 0.42, 0.43],
                                                             "std": [0.3, 0.31, 0.32]})  # fmt: skip
    assert np.array_equal(model.predict(SCENE), bisenet.load(source).predict(SCENE))


@pytest.mark.slow
def test_tensorrt_is_given_the_shapes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for trtexec writes what it was called with."""
    tool = tmp_path / "trtexec"
    tool.write_text('#!/bin/sh\nfor a; do case $a in --saveEngine=*) echo "$@" > "${a#*=}";; esac; done\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = export(source, tmp_path, "tensorrt", dtype="fp16", size=[64, 128])[0]
    assert found["equal_labels"] >= 0.99
    called = (tmp_path / "model_fp16.engine").read_text()
    assert "--minShapes=image:1x3x64x128" in called
    assert "--maxShapes=image:4x3x64x128 --stronglyTyped" in called


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"format": "tflite"}, "format: .*tflite"),
        ({"format": "ncnn", "output": "mask"}, "output: .*mask"),
        ({"format": "ncnn", "dtype": "int8"}, "dtype: .*int8"),
        ({"size": [64]}, "size: "),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Export(**{"format": "onnx", "folder": tmp_path, **options})


def test_what_exists_stays(exported: Path) -> None:
    with pytest.raises(FileExistsError, match=r"model\.onnx"):
        Export("onnx", exported)


def spoil(folder: Path, kind: str) -> Path:
    file = folder / "model.onnx"
    if kind == "bytes":
        file.write_bytes(b"\0" * 200)
    elif kind == "foreign":
        import onnx

        onnx.save(onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 17]> g (float[1] x) => (float[1] y) '
                                          "{ y = Identity(x) }"), file)  # fmt: skip
    elif kind == "outside":  # weights that lie elsewhere on the reader's disk
        import onnx

        model = onnx.load(file)
        weights = model.graph.initializer[0]
        weights.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "../secret", "length": str(len(weights.raw_data))}.items():
            weights.external_data.add(key=key, value=value)
        (folder.parent / "secret").write_bytes(weights.raw_data)
        weights.ClearField("raw_data")
        file.write_bytes(model.SerializeToString())
    elif kind == "weights":
        file = folder / "model.xml"
        (folder / "model.bin").write_bytes(b"")
    elif kind == "missing":
        file = folder / "model.xml"
        (folder / "model.bin").unlink()
    elif kind == "param":
        file = folder / "model.ncnn.param"
        file.write_text("7767517\nnonsense")
    else:
        file = folder / "model.ncnn.param"
        facts = json.loads((folder / "model.ncnn.json").read_text())
        facts["export"]["batch"] = 10**12
        (folder / "model.ncnn.json").write_text(json.dumps(facts))
    return file


@pytest.mark.parametrize("kind", ["bytes", "foreign", "outside", "weights", "missing", "param", "facts"])
def test_a_damaged_or_foreign_file_is_named(exported: Path, tmp_path: Path, kind: str) -> None:
    for file in exported.glob("model.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = spoil(tmp_path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path / "model")) as error:
        bisenet.load(file)
    assert "\n" not in str(error.value)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nowhere_to_be_found .*bisenet\[export\]"):
        runtimes.import_extra("nowhere_to_be_found", "export")


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.h5: accepted: .*\.onnx"):
        runtimes.open_file(tmp_path / "model.h5")
