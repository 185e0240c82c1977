"""Files that hold what was trained: ours in both formats, the reference's, pretrained backbones; and what attacks.

Files of the reference are made from the names and shapes recorded of it (tests/data/networks), with values that depend
on them alone, so that the logits recorded of the reference itself are what a loaded file has to give.
"""

import ast
import contextlib
import hashlib
import logging
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import composed
from omegaconf import OmegaConf
from test_networks import RECORDED, REFERENCES, filling, images, logits_of
from torch import Tensor, nn

import bisenet
from bisenet import checkpoint
from bisenet.checkpoint import DATASETS, build, fetch, load_backbone, require_known
from bisenet.classes import ClassTable, SegmentationClass
from bisenet.inference import Protocol, Segmenter
from bisenet.networks import BiSeNetV1, BiSeNetV2

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "data" / "before_the_house.ckpt"
SMALL = {"_target_": "bisenet.networks.BiSeNetV2", "width_multiplier": 0.125, "aux": False}
FACTS = {"name": "a", "mean": [0.1] * 3, "std": [0.2] * 3, "eval_window": [64, 64], "eval_short_side": None}
DATA = {"classes": "cityscapes", "mean": [0.1] * 3, "std": [0.2] * 3}


def published(name: str, n_classes: int = 19) -> dict[str, Tensor]:
    """A state dict as the reference writes it, but for the values."""
    with np.load(RECORDED / f"{name}.npz") as recorded:
        shapes = {line.split(" ", 1)[0]: ast.literal_eval(line.split(" ", 1)[1]) for line in recorded["state"].tolist()}
    for shape in shapes.values():
        if shape[:1] == [19]:
            shape[0] = n_classes
    return {key: filling(key, tuple(shape)) for key, shape in shapes.items()}


def table(n_classes: int) -> ClassTable:
    classes = (SegmentationClass(f"class {i}", (i,), i, (i, 255 - i, 7)) for i in range(n_classes))
    return ClassTable("generic", tuple(classes))


def small_segmenter() -> Segmenter:
    torch.manual_seed(0)
    protocols = {"mscf": Protocol((0.5, 1.0), flip=True, crop=True, window=(64, 32)), "ss": Protocol()}
    return Segmenter(build(SMALL, n_classes=5), table(5), [0.1, 0.2, 0.3], [0.4] * 3, protocols).eval()


def content_of(segmenter: Segmenter, **portable: Any) -> dict[str, Any]:
    """A checkpoint of ours as Lightning saves it, with parts of what it carries replaced."""
    state = {f"segmenter.network.{name}": tensor for name, tensor in segmenter.network.state_dict().items()}
    data = {"name": "mine", "mean": [0.1], "root": "nowhere"}
    entry = checkpoint.portable(SMALL, segmenter, data) | portable
    return {"state_dict": state, "global_step": 3, "bisenet": entry, "hyper_parameters": {"of": ["a later", "version"]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model_final.pth"


# --- ours ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_what_was_saved_whatever_its_training_keys_are(file: Path) -> None:
    segmenter, rgb = small_segmenter(), np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    torch.save(content_of(segmenter), file)
    found = checkpoint.read(file)
    assert (found.step, found.data["name"], found.hyper_parameters) == (3, "mine", {"of": ["a later", "version"]})
    loaded = bisenet.load(file)
    assert loaded.protocols == segmenter.protocols
    assert torch.equal(loaded.mean, segmenter.mean)
    assert np.array_equal(loaded.predict(rgb), segmenter.predict(rgb))
    other = found.segmenter({"half": Protocol((0.5,))})
    assert list(other.protocols) == ["half"]

    (file.parent / "run" / "checkpoints").mkdir(parents=True)
    last = file.parent / "run" / "checkpoints" / "last.ckpt"
    checkpoint.write(last, segmenter.network.state_dict(), 7, content_of(segmenter)["bisenet"], {})
    assert checkpoint.read(file.parent / "run").step == 7
    for place in (file.parent / "run", last.parent, last):
        assert np.array_equal(bisenet.load(place).predict(rgb), segmenter.predict(rgb))


def test_a_checkpoint_of_before_the_house_predicts_and_knows_its_data_set() -> None:
    image = np.kron(np.random.default_rng(1).integers(0, 256, (7, 9, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    with np.load(OLD.with_suffix(".npz")) as recorded:
        assert (bisenet.load(OLD).predict(image) == recorded["prediction"]).mean() >= 0.999  # exactly, where recorded
    read = checkpoint.read(OLD)
    assert read.step == 6
    data = read.hyper_parameters["data"]
    assert data["dataset"] == {"_target_": "bisenet.data.Cityscapes"}
    assert (data["root"], data["classes"], data["val_split"], data["limit"]) == (
        "data/cityscapes",
        "cityscapes",
        "val",
        4,
    )
    assert read.protocols["mscf"]["window"] == [64, 64]


def test_loading_imports_nothing_of_training() -> None:
    code = f"import sys, bisenet; bisenet.load({str(OLD)!r}); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    modules = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    heavy = {"lightning", "hydra", "omegaconf", "torchmetrics", "matplotlib", "albumentations", "torch._dynamo"}
    assert not heavy & set(modules.stdout.split())


# --- attacks ---------------------------------------------------------------------------------------------------------


def attacks(marker: Path) -> list[dict[str, Any]]:
    """Network nodes that would write the marker, read a file or reveal the environment."""
    (marker.parent / "payload.py").write_text(f"open({str(marker)!r}, 'w')\nclass Net: pass\n")
    (marker.parent / "hubconf.py").write_text(f"def net():\n    open({str(marker)!r}, 'w')\n")
    np.save(marker.parent / "code.npy", np.array([Touch(marker)], object), allow_pickle=True)
    torch.save(Touch(marker), marker.parent / "code.pt")
    folder = str(marker.parent)
    deep: Any = "x"
    for _ in range(30):
        deep = [deep] * 30  # few bytes, since each list is stored once
    calls = [
        {"_target_": "torch.hub.load", "repo_or_dir": folder, "model": "net", "source": "local"},
        {"_target_": "torch.load", "f": f"{folder}/code.pt", "weights_only": False},
        {"_target_": "numpy.load", "file": f"{folder}/code.npy", "allow_pickle": True},
        {"_target_": "torch.distributed.run.main", "args": [f"{folder}/payload.py"]},
        {"_target_": "payload.Net"},
        {"_target_": "bisenet.checkpoint.build"},
        {"_target_": "bisenet.networks.bisenetv2.nn.Module"},
        {"_target_": ["bisenet.networks.BiSeNetV2"]},
        {"_target_": deep},
        {},
    ]
    nested = [SMALL | {"aux": call} for call in calls[:4]] + [SMALL | {"aux": [[call]]} for call in calls[:1]]
    plain = [
        {"generation": "${oc.env:HOME}"}, {"aux": deep}, {"depth_multiplier": 10**6},
        {"width_multiplier": float("nan")},
        {"aux": [[[[1]]]]}, {"aux": [0] * 2000}, {"generation": "x" * 5000}, {"_args_": [1]}, {"colour": 3},
    ]  # fmt: skip
    return [*calls, *nested, *(SMALL | arguments for arguments in plain), SMALL | {"width_multiplier": 64}]


class Touch:
    """Pickled, a program that makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def test_no_node_of_a_file_runs_anything_or_is_resolved(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    marker = file.parent / "marker"
    monkeypatch.syspath_prepend(file.parent)
    monkeypatch.setenv("HOME", "secret")
    for node in attacks(marker):
        torch.save(content_of(small_segmenter(), network=node), file)
        started = time.perf_counter()
        with pytest.raises(ValueError, match=re.escape(str(file))) as raised:
            bisenet.load(file)
        assert time.perf_counter() - started < 5
        assert "secret" not in str(raised.value)
        assert len(str(raised.value)) < 1000
        assert not marker.exists(), node
    assert "payload" not in sys.modules


def test_a_class_of_ones_own_is_built_with_trust_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "mynet.py").write_text(
        "from subprocess import Popen\nfrom torch.hub import load\nfrom bisenet.networks import BiSeNetV2\n"
        "class Net(BiSeNetV2):\n    def __init__(self, n_classes, width):\n"
        "        super().__init__(n_classes, width_multiplier=width, aux=False)\n"
    )
    monkeypatch.syspath_prepend(file.parent)
    segmenter = small_segmenter()
    torch.save(content_of(segmenter, network={"_target_": "mynet.Net", "width": 0.125}), file)
    for trust in ((), ["my"], ["mynet.Net"], ["other"]):
        with pytest.raises(ValueError, match=r"got 'mynet\.Net', accepted: .*trust=\[mynet\]"):
            bisenet.load(file, trust=trust)
    rgb = np.zeros((64, 64, 3), np.uint8)
    for trust in (["mynet"], "mynet"):
        assert np.array_equal(bisenet.load(file, trust=trust).predict(rgb), segmenter.predict(rgb))
    for name in ("Popen", "load", "nothing"):  # what it imports is not what is trusted
        with pytest.raises(ValueError, match=f"mynet.{name}"):
            build({"_target_": f"mynet.{name}", "args": "true"}, ["mynet"])
    with pytest.raises(ValueError, match=r"mynet\.Net\.width: got \{'_target_'"):
        build({"_target_": "mynet.Net", "width": {"_target_": "os.getcwd"}}, ["mynet"], n_classes=2)


def test_a_data_set_is_built_under_the_same_rule() -> None:
    for name in ("torch.hub.load", "bisenet.networks.BiSeNetV2", "bisenet.data.datamodule.Path"):
        with pytest.raises(ValueError, match=rf"got '{name}', accepted: bisenet\.data\.Cityscapes"):
            partial(build, {"_target_": name, "_partial_": True}, (), DATASETS)("root")
    with pytest.raises(ValueError, match=r"lists\.train: got"):
        build({"_target_": "bisenet.data.Listed", "lists": {"train": "${oc.env:HOME}"}}, (), DATASETS, "root")


@pytest.mark.parametrize(
    "portable",
    [
        {"format": 3}, {"network": None}, {"classes": {}}, {"protocols": {"../ss": {}}}, {"protocols": 3},
        {"protocols": {"ss": {"x": 1}}}, {"data": {"mean": [0.1], "std": [1]}}, {"data": {}}, {"format": None},
        {"data": {**FACTS, "eval_window": "${oc.env:HOME}"}}, {"protocols": {"ss": {"merge": "${x:y}"}}},
        {"classes": {"name": "a", "classes": [{"name": reduce(lambda x, _: [x] * 30, range(30), 1)}]}},
    ],
)  # fmt: skip
def test_a_checkpoint_that_makes_no_sense_is_refused_by_name(portable: dict[str, Any], file: Path) -> None:
    torch.save(content_of(small_segmenter(), **portable), file)
    with pytest.raises(ValueError, match=re.escape(str(file))):
        bisenet.load(file)


@pytest.mark.parametrize("state", [None, [], {}, {"a": 3}, {3: torch.zeros(2)}, {"a": torch.eye(3).to_sparse()}])
def test_weights_that_are_none_are_refused_by_name(state: Any, file: Path) -> None:
    torch.save(content_of(small_segmenter()) | {"state_dict": state}, file)
    for read in (bisenet.load, partial(checkpoint.finetune, BiSeNetV2(5))):
        with pytest.raises(ValueError, match=rf"{file} is no checkpoint of bisenet, or .*: it has no state_dict"):
            read(file)
    torch.save({"bisenet": {}}, file)
    with pytest.raises(ValueError, match="it has no state_dict"):
        bisenet.load(file)
    torch.save(content_of(small_segmenter()) | {"bisenet": {}}, file)
    with pytest.raises(ValueError, match=rf"{file} is no checkpoint of bisenet, or a damaged one: it has no 'config'"):
        bisenet.load(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "does not say what it was trained on"), ({"root": "a"}, "does not say what it was trained on"),
        ({"root": "${oc.env:HOME}", "dataset": {}}, r"data.root: got '\$\{oc.env:HOME\}', accepted from a file"),
        ({"root": "a", "dataset": {}, "workers": {"_target_": "os.getcwd"}}, "data.workers: got {'_target_'"),
    ],
)  # fmt: skip
def test_the_data_set_of_a_file_is_plain(data: Any, message: str, file: Path) -> None:
    torch.save(content_of(small_segmenter()) | {"hyper_parameters": {"data": data}}, file)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        checkpoint.read(file).data_node()


def test_a_run_that_is_resumed_names_only_what_is_known_or_trusted(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "ournet.py").write_text("from torch.hub import load\ndef make(): pass\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    stored = OmegaConf.to_container(composed("logger=[csv,wandb]", "experiment=camvid"), resolve=False)
    stored = {**stored, "optimizer": {"_target_": "torch.optim.Adam"}}  # type: ignore[dict-item]
    require_known(stored)
    foreign = ["torch.hub.load", "bisenet.launch.run", "hydra.utils.get_method", "ournet.Net", "ournet.make",
               "torch.optim.lr_scheduler.warnings.warn", "${oc.env:HOME}", 3]  # fmt: skip
    nodes = [{"_target_": name} for name in foreign] + [{"a": "${oc.env:HOME}"}, {"a": "x${${b}:HOME}"}]
    for node in nodes:
        with pytest.raises(ValueError, match=r"^_target_: got .*, accepted: what conf/ names; .* trust="):
            require_known({**stored, "callbacks": {"mine": [{"deep": node}]}})
    require_known([nodes[3], nodes[4], nodes[-2]], trust=["ournet", "oc.env"])
    with pytest.raises(ValueError, match=r"got ournet\.load, accepted: a name that a trusted module defines itself"):
        require_known({"_target_": "ournet.load"}, trust=["ournet"])


def test_one_flipped_bit_is_noticed(file: Path) -> None:
    whole, image = OLD.read_bytes(), np.zeros((32, 32, 3), np.uint8)
    expected = bisenet.load(OLD).predict(image)
    with zipfile.ZipFile(OLD) as archive:
        entries = {entry.filename.partition("/")[2]: entry.header_offset for entry in archive.infolist()}
    offsets = np.random.default_rng(0).integers(0, len(whole), 12).tolist()
    for offset in (*offsets, entries["data.pkl"] + 30_000, entries["data/0"] + 300):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        file.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            assert np.array_equal(bisenet.load(file).predict(image), expected), offset  # a bit of the padding
    with pytest.raises(ValueError, match="is damaged: the checksum differs"):
        bisenet.load(file)


def test_weights_that_only_claim_to_be_large_are_refused(file: Path) -> None:
    content = content_of(small_segmenter())
    wide = build(SMALL | {"width_multiplier": 1.0}, n_classes=5).state_dict()
    wide = {f"segmenter.network.{name}": torch.zeros(()).expand(tensor.shape) for name, tensor in wide.items()}
    content["bisenet"]["network"] = SMALL | {"width_multiplier": 1.0}
    torch.save(content | {"state_dict": wide}, file)
    with pytest.raises(ValueError, match="claim more memory than the file has bytes"):
        bisenet.load(file)


def test_an_archive_that_grows_is_refused_before_it_is_unpacked(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps({}))
        with archive.open("bomb/data/0", "w", force_zip64=True) as entry:
            for _ in range(64):
                entry.write(bytes(2**22))
    started = time.perf_counter()
    for reader in (bisenet.load, lambda path: load_backbone(nn.Linear(2, 2), "", str(path))):
        with pytest.raises(ValueError, match=r"its entry bomb/data\.pkl is compressed; accepted: stored ones"):
            reader(file)
    assert time.perf_counter() - started < 1
    torch.save({"a": torch.zeros(3)}, file)
    file.write_bytes(b"PK\3\4" + bytes(60) + file.read_bytes())  # another reader would find other entries
    with pytest.raises(ValueError, match="do not begin with the file"):
        bisenet.load(file)
    monkeypatch.setattr(checkpoint, "LARGEST_FILE", 100)
    with pytest.raises(ValueError, match=r"bytes, accepted: at most 100 \(bisenet\.checkpoint\.LARGEST_FILE\)"):
        bisenet.load(file)


@pytest.mark.parametrize("kind", ["network", "system", "script", "pickle", "empty", "text", "truncated"])
def test_a_file_that_holds_more_than_tensors_is_refused_without_advice_to_run_it(kind: str, file: Path) -> None:
    torch.save({"a": torch.zeros(3)}, file)
    whole = file.read_bytes()
    expected = {"network": "it wants torch.nn.modules.linear.Linear, which is code; accepted: a state dict saved by",
                "system": "it wants posix.mkdir, which is code", "script": "is compressed; accepted: stored ones",
                "pickle": "UnpicklingError: Unsupported operand", "empty": "EOFError", "text": "KeyError: 101",
                "truncated": "RuntimeError: PytorchStreamReader failed"}  # fmt: skip
    if kind == "script":
        torch.jit.script(nn.Linear(2, 2)).save(str(file))
    elif kind in ("network", "system"):
        torch.save(nn.Linear(2, 2) if kind == "network" else Touch(file.parent / "marker"), file)
    else:
        content = {"pickle": pickle.dumps({"a": 3}), "empty": b"", "text": b"hello", "truncated": whole[:100]}
        file.write_bytes(content[kind])
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read")) as raised:
        bisenet.load(file)
    assert expected[kind] in str(raised.value)
    assert not re.search("weights_only|\x1b|\n", str(raised.value))


# --- weights of the reference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_a_published_file_gives_the_logits_of_the_reference_and_is_written_back_exactly(name: str, file: Path) -> None:
    older, state = name.startswith("older"), published(name)
    prefix = "module." if older else ""  # of DataParallel; and PyTorch of 2018 wrote no zip
    torch.save({prefix + k: v for k, v in state.items()}, file, _use_new_zipfile_serialization=not older)
    model = bisenet.load(file, data="cityscapes")
    written = model.network.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key].to(written[key].dtype)) for key in state)
    assert model.classes.names[0] == "road"
    older_v1 = name.startswith("older_bisenetv1")
    expected_mean = [0.485, 0.456, 0.406] if older_v1 else [0.3257, 0.3690, 0.3223]
    assert (model.mean.flatten() / 255).tolist() == pytest.approx(expected_mean)
    with torch.no_grad(), np.load(RECORDED / f"{name}.npz") as recorded:
        (logits,) = logits_of(model.network.double(), images(3, 64, 96, torch.float64))
        expected = recorded["eval"]
    np.testing.assert_allclose(logits[:, ::6, ::13, ::17], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_data_set_is_that_of_the_person_who_loads(file: Path) -> None:
    torch.save(published("bisenetv1", 171), file)
    model = bisenet.load(file, DATA | {"classes": table(171), "eval_short_side": 64})
    assert model.classes.num_classes == 171
    assert (model.mean == 0.1 * 255).all()
    assert model.protocols == {"ss": Protocol(short_side=64)}
    for data, message in {
        "cityscapes": r"data\.classes: 'cityscapes' has 19, accepted for .*: 171",
        "nowhere": r"data: got 'nowhere', accepted: .*camvid",
        None: "weights for 171 classes and nothing else; accepted: the data set",
    }.items():
        with pytest.raises(ValueError, match=message):
            bisenet.load(file, data)
    with pytest.raises(ValueError, match="data: got no std"):
        bisenet.load(file, {"classes": "cityscapes", "mean": [0.1] * 3})
    with pytest.raises(ValueError, match="knows the data set it was trained on; accepted: no data here"):
        bisenet.load(OLD, data="cityscapes")
    with pytest.raises(FileNotFoundError, match=r"no file .*; accepted: a \.ckpt or \.pth file"):
        bisenet.load(file.parent)
    assert bisenet.read_data("demo")["classes"] == bisenet.read_data("synthetic")["classes"]


@pytest.mark.parametrize(
    ("structure", "make"),
    [
        ("u_shape", partial(BiSeNetV1, structure="u_shape", generation="older", aux=False)),
        ("one_path", partial(BiSeNetV1, structure="one_path")),
        (None, partial(BiSeNetV2, width_multiplier=0.25, aux=False)),
        (None, partial(BiSeNetV2, width_multiplier=0.25, depth_multiplier=3, generation="older")),
    ],
)
def test_our_own_variants_written_as_bare_weights_come_back(structure: str | None, make: Any, file: Path) -> None:
    network = make(5)
    torch.save(network.state_dict(), file)
    read = checkpoint.read(file, DATA | {"classes": table(5)})
    assert read.network.get("structure") == structure
    twin = read.segmenter().network
    assert (twin.head_names, twin.align_corners) == (network.head_names, network.align_corners)
    image = images(1, 64, 64)
    assert torch.equal(twin(image).logits, network.eval()(image).logits)


def test_what_was_matched_renamed_and_dropped_is_reported(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = {f"module.{k}": v for k, v in published("older_bisenetv1_diss").items()}
    torch.save(state, file)
    checkpoint.read(file, DATA)
    assert "160 renamed ('module.' taken off), 160 tensors matched, nothing dropped, nothing missing" in caplog.text
    assert "generation=older, norm=inplace_abn" in caplog.text
    del state["module.conv_out16.conv_out.weight"]  # one auxiliary head is of no use without its classifier
    torch.save(state | {"module.loss.weight": torch.zeros(19)}, file)
    found = checkpoint.read(file, DATA)
    assert not found.network["aux"]
    assert caplog.records[-1].levelname == "WARNING"
    for dropped in ("conv_out32.conv_out.weight", "conv_out16.conv.conv.weight", "loss.weight"):
        assert dropped in caplog.text
        assert dropped not in found.weights


def test_files_that_do_not_fit_are_refused_by_name(file: Path) -> None:
    v1, v2 = published("bisenetv1"), published("bisenetv2")
    for content, message in (
        ({}, "no tensors by name"),
        ({"epoch": 3, "model": v1}, "no tensors by name"),
        ({k: v for k, v in v1.items() if k.startswith("cp.")}, "nor is it a state dict of the reference"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight"),
        ({k: v for k, v in v2.items() if "S5_5.conv_last" not in k}, "segment.S5_5.conv_last.conv.weight"),
        (v1 | {"sp.conv2.conv.weight": torch.zeros(64, 64, 5, 5)}, "sp.conv2.conv.weight [64, 64, 5, 5] for [64, "),
        (v1 | {"conv_out.conv_out.weight": torch.tensor(1.0)}, "conv_out.conv_out.weight"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=re.escape(str(file))) as raised:
            bisenet.load(file, DATA)
        assert message in str(raised.value)


# --- weights to start from -------------------------------------------------------------------------------------------


def test_finetuning_keeps_all_but_the_classifiers(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = BiSeNetV2(19, width_multiplier=0.25).state_dict()
    ours = {f"segmenter.network.{name}": value for name, value in source.items()}
    for content in (source, {"state_dict": ours, "bisenet": {}}):
        torch.save(content, file)
        for n_classes in (19, 7):
            network = BiSeNetV2(n_classes, width_multiplier=0.25)
            checkpoint.finetune(network, file)
            kept = {name for name, value in network.state_dict().items() if torch.equal(value, source[name])}
            fresh = {f"{head}.conv_out.1.{kind}" for head in network.head_names for kind in ("weight", "bias")}
            assert set(network.state_dict()) - kept == (set() if n_classes == 19 else fresh)
    assert all(name in caplog.text for name in fresh)
    with pytest.raises(ValueError, match=r"finetune_from: .*model_final\.pth does not fit BiSeNetV2 before its heads"):
        checkpoint.finetune(BiSeNetV2(19, width_multiplier=0.5), file)
    torch.save(BiSeNetV1(4, generation="older", norm="inplace_abn").state_dict(), file)
    with pytest.raises(ValueError, match=r"model\.network\.norm differ"):
        checkpoint.finetune(BiSeNetV1(4, generation="older"), file)


def randomized(module: nn.Module) -> dict[str, Tensor]:
    return {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in module.state_dict().items()}


def resnet18(zipped: bool, folder: Path) -> Path:
    """torchvision's file with its classifier, in both ages: the older one is no zip archive and counts no batches."""
    content = {**randomized(BiSeNetV1(19).cp.resnet), "fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}
    content = {key: value for key, value in content.items() if zipped or "num_batches" not in key}
    torch.save(content, folder / "resnet18.pth", _use_new_zipfile_serialization=zipped)
    return folder / "resnet18.pth"


def backbone_v2(folder: Path) -> Path:
    """The reference's file: a state dict for each branch."""
    network = BiSeNetV2(19)
    content = {name: randomized(network.get_submodule(name)) for name in ("detail", "segment")}
    torch.save(content, folder / "backbone_v2.pth")
    return folder / "backbone_v2.pth"


@pytest.mark.parametrize(
    ("make", "backbone", "zipped"),
    [
        (BiSeNetV1, "cp.resnet", True),
        (partial(BiSeNetV1, structure="u_shape"), "cp.resnet", False),
        (partial(BiSeNetV1, generation="older", norm="inplace_abn"), "cp.resnet", True),
        (partial(BiSeNetV1, generation="older", norm="inplace_abn"), "cp.resnet", False),
        (BiSeNetV2, "", True),
        (partial(BiSeNetV2, generation="older"), "", True),
    ],
)
def test_pretrained_weights_fill_the_backbone_and_nothing_else(
    make: Any, backbone: str, zipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network = make(19)
    file = resnet18(zipped, tmp_path) if backbone else backbone_v2(tmp_path)
    given = torch.load(file, weights_only=True)
    given = given if backbone else {f"{branch}.{key}": v for branch, part in given.items() for key, v in part.items()}
    before = {key: value.clone() for key, value in network.state_dict().items()}
    load_backbone(network, backbone, str(file))
    for key, value in network.state_dict().items():
        source = given.get(key.removeprefix(f"{backbone}.")) if key.startswith(backbone) else None
        assert "num_batches" in key or torch.equal(value, before[key] if source is None else source), key
    if backbone:
        assert "100 of its 102 tensors fit ResNet18; unused: fc.weight, fc.bias" in caplog.text


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    wide = BiSeNetV2(19, width_multiplier=2.0)
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"backbone_v2\.pth: \d+ of its \d+ tensors fit .*; unused: detail\.S1.*null"):
        load_backbone(wide, "", str(backbone_v2(tmp_path)))
    assert all(torch.equal(wide.state_dict()[key], value) for key, value in before.items())
    for content in ({"conv.weight": torch.rand(3)}, {}, [torch.rand(3)], torch.rand(3)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth: 0 of its \d tensors fit"):
            load_backbone(wide, "", str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match=r"backbone: got 'cp\.resnet', accepted: a module of the network"):
        load_backbone(wide, "cp.resnet", "nowhere.pth")


# --- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_a_url_is_downloaded_once_and_a_wrong_download_is_not_kept(cache: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    source = folder / "weights.pth"
    source.write_bytes(b"content")
    file = fetch(f"{address}/weights.pth?download=1")
    assert (file, file.read_bytes()) == (cache / "weights.pth", b"content")
    source.unlink()
    assert fetch(f"{address}/weights.pth?download=1") == file
    assert fetch(str(file)) == fetch(file.as_uri()) == file
    (folder / "resnet18-f37072fd.pth").write_bytes(b"<html>please log in</html>")
    with pytest.raises(ValueError, match=r"cannot be downloaded: invalid hash"):
        fetch(f"{address}/resnet18-f37072fd.pth")
    assert list(cache.iterdir()) == [file]


def test_the_digest_in_the_name_or_given_is_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain = tmp_path / "resnet-eighteen.pth"
    plain.write_bytes(b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    fetch(str(plain))
    assert digest in caplog.text  # nobody knows it
    named = plain.rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    for given in (None, digest, digest[:12]):
        assert fetch(str(named), given) == named
    with pytest.raises(ValueError, match=rf"{named.name} has the sha256 {digest}, accepted after .*sha256: 00000000"):
        fetch(str(named), "0" * 8)
    with pytest.raises(ValueError, match="sha256: got 'abc', accepted: null, or 8 to 64 hexadecimal digits"):
        fetch(str(named), "abc")
    named.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"the end of its name: {digest[:8]}\.\.\."):
        fetch(str(named))


def test_what_cannot_be_had_says_what_to_do(cache: Path, server: tuple[str, Path]) -> None:
    for url in (f"{server[0]}/lost.pth", "http://127.0.0.1:9/lost.pth"):
        with pytest.raises(ValueError, match=rf"lost\.pth cannot be downloaded: .*Put the file into {cache}.* null"):
            fetch(url)
    with pytest.raises(ValueError, match=r"nowhere\.pth', which is no file; accepted: a path, a URL, or null"):
        fetch("nowhere.pth")
