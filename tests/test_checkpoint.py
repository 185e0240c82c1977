"""Weights that were published without a configuration: recognised, completed, evaluated, written back, and refused.

Files are made from the names and shapes recorded of the reference (tests/data/networks), with values that depend on
them alone, so that the logits recorded of the reference itself are what a loaded file has to give.
"""

import ast
import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_config import composed
from test_networks import RECORDED, REFERENCES, deterministic, filling, images, logits_of, reference_network
from torch import Tensor

import bisenet
from bisenet import checkpoint, config, experiment
from bisenet.config import DataConfig
from bisenet.networks import BiSeNetV1, BiSeNetV2
from bisenet.pretrained import load_backbone

IMAGENET = [0.485, 0.456, 0.406]


def published(name: str, n_classes: int = 19) -> dict[str, Tensor]:
    """A state dict as the reference writes it, but for the values."""
    with np.load(RECORDED / f"{name}.npz") as recorded:
        shapes = {line.split(" ", 1)[0]: ast.literal_eval(line.split(" ", 1)[1]) for line in recorded["state"].tolist()}
    for shape in shapes.values():
        if shape[:1] == [19]:
            shape[0] = n_classes
    return {key: filling(key, tuple(shape)) for key, shape in shapes.items()}


def table(path: Path, n_classes: int) -> Path:
    """A class table of so many classes, beside the file."""
    classes = [{"id": i, "name": f"class {i}", "ignore": False, "color": [i, 255 - i, 7]} for i in range(n_classes)]
    file = path.with_name(f"table{n_classes}.yaml")
    file.write_text(yaml.safe_dump({"name": "generic", "classes": classes}))
    return file


def data_set(classes: str | Path = "cityscapes") -> DataConfig:
    return DataConfig(name="any", format="cityscapes", root="nowhere", classes=str(classes), mean=[0.1] * 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model_final.pth"


# --- recognised ------------------------------------------------------------------------------------------------------


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
    assert (model.mean.flatten() / 255).tolist() == pytest.approx(IMAGENET if older_v1 else [0.3257, 0.3690, 0.3223])
    with torch.no_grad(), np.load(RECORDED / f"{name}.npz") as recorded:
        (logits,) = logits_of(model.network.double(), images(3, 64, 96, torch.float64))
        expected = recorded["eval"]
    np.testing.assert_allclose(logits[:, ::6, ::13, ::17], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "n_classes"), [("bisenetv1", 171), ("bisenetv2", 150)])
def test_the_number_of_classes_is_that_of_the_file(name: str, n_classes: int, file: Path) -> None:
    torch.save(published(name, n_classes), file)
    model = bisenet.load(file, data=data_set(table(file, n_classes)))
    assert model.classes.num_classes == n_classes
    assert (model.mean == 0.1 * 255).all()
    rgb = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    assert model.predict(rgb).shape == (70, 90)
    with pytest.raises(ValueError, match=rf"data\.classes: 'cityscapes' has 19 classes.* for {n_classes}; accepted"):
        bisenet.load(file, data="cityscapes")


@pytest.mark.parametrize(
    ("model", "network"),
    [
        ("bisenetv1_ushape", BiSeNetV1(5, structure="u_shape", generation="older", aux=False)),
        ("bisenetv1_diss", BiSeNetV1(5, structure="one_path")),
        ("bisenetv2", BiSeNetV2(5, width_multiplier=0.25, aux=False)),
        ("bisenetv2_large", BiSeNetV2(5, width_multiplier=0.25, depth_multiplier=3, generation="older")),
    ],
)
def test_our_own_variants_written_as_bare_weights_come_back(model: str, network: Any, file: Path) -> None:
    torch.save(network.state_dict(), file)
    found = checkpoint.read_any(file)
    assert isinstance(found, checkpoint.Published)
    assert found.model == model
    twin = bisenet.load(file, data=data_set(table(file, 5))).network
    assert twin.head_names == network.head_names
    assert twin.align_corners == network.align_corners
    image = images(1, 64, 64)
    assert torch.equal(twin(image).logits, network.eval()(image).logits)


def test_what_was_matched_renamed_and_dropped_is_reported(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"module.{k}": v for k, v in published("older_bisenetv1_diss").items()}
    with caplog.at_level(logging.INFO):
        torch.save(state, file)
        checkpoint.read_any(file)
        assert "160 renamed ('module.' taken off), 160 tensors matched, nothing dropped, nothing missing" in caplog.text
        assert "generation=older, norm=inplace_abn" in caplog.text
        del state["module.conv_out16.conv_out.weight"]  # one auxiliary head is of no use without its classifier
        torch.save(state | {"module.loss.weight": torch.zeros(19)}, file)
        found = checkpoint.read_any(file)
    assert isinstance(found, checkpoint.Published)
    assert not found.network["aux"]
    assert caplog.records[-1].levelname == "WARNING"
    for dropped in ("conv_out32.conv_out.weight", "conv_out16.conv.conv.weight", "loss.weight"):
        assert dropped in caplog.text
        assert dropped not in found.weights


# --- refused ---------------------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_are_refused_by_name(file: Path) -> None:
    def refused(content: object, message: str) -> None:
        torch.save(content, file)
        with pytest.raises(ValueError, match=re.escape(str(file))) as raised:
            bisenet.load(file, data="cityscapes")
        assert message in str(raised.value)

    v1, v2 = published("bisenetv1"), published("bisenetv2")
    refused({}, "no state dict")
    refused({"epoch": 3, "model": v1}, "no state dict")
    refused(Path("code"), "cannot be read as tensors and plain values: it wants pathlib.")
    refused({k: v for k, v in v1.items() if k.startswith("cp.")}, "neither a BiSeNetV1")
    refused({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "conv1.weight")
    refused({k: v for k, v in v2.items() if "S5_5.conv_last" not in k}, "segment.S5_5.conv_last.conv.weight")
    refused(v1 | {"sp.conv2.conv.weight": torch.zeros(64, 64, 5, 5)}, "sp.conv2.conv.weight [64, 64, 5, 5] for [64, ")


@pytest.mark.parametrize("kind", ["network", "system", "script", "pickle", "empty", "text", "truncated"])
def test_a_file_that_holds_more_than_tensors_is_refused_without_advice_to_run_it(kind: str, file: Path) -> None:
    class System:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("true",)

    torch.save({"a": torch.zeros(3)}, file)
    whole = file.read_bytes()
    expected = {"network": "it wants torch.nn.modules.linear.Linear, which is code; accepted: a state dict saved by",
                "system": "it wants posix.system, which is code", "script": "it wants TorchScript, which is code",
                "pickle": "UnpicklingError: Unsupported operand", "empty": "EOFError", "text": "KeyError: 101",
                "truncated": "RuntimeError: PytorchStreamReader failed"}  # fmt: skip
    if kind == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    elif kind in ("network", "system"):
        torch.save(torch.nn.Linear(2, 2) if kind == "network" else System(), file)
    else:
        content = {"pickle": pickle.dumps({"a": 3}), "empty": b"", "text": b"hello", "truncated": whole[:100]}
        file.write_bytes(content[kind])
    for reader in (checkpoint.read_any, lambda path: load_backbone(torch.nn.Linear(2, 2), path)):
        with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read")) as raised:
            reader(file)
        assert expected[kind] in str(raised.value)
        assert not re.search("weights_only|\x1b|\n", str(raised.value))


def test_a_checkpoint_is_found_below_the_home_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    with pytest.raises(FileNotFoundError, match=rf"no file {re.escape(str(file))}; accepted: a \.ckpt or \.pth file"):
        checkpoint.locate(f"~/{file.name}")
    file.touch()
    assert checkpoint.locate(f"~/{file.name}") == file


def test_data_are_asked_for_exactly_where_they_are_needed(file: Path) -> None:
    torch.save(published("bisenetv2"), file)
    with pytest.raises(ValueError, match="weights for 19 classes and nothing else; accepted: the data set"):
        bisenet.load(file)
    with pytest.raises(ValueError, match="not written by bisenet: it holds the weights of a bisenetv2 alone"):
        checkpoint.read(file)
    complete = experiment.read_model(file, "cityscapes")
    content: dict[str, Any] = {"global_step": 3, "state_dict": {}}
    checkpoint.attach(content, complete.config, complete.classes)
    torch.save(content, file)
    assert experiment.read_model(file).step == 3
    with pytest.raises(ValueError, match="knows the data set it was trained on"):
        experiment.read_model(file, "cityscapes")


# --- evaluated, trained from -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"data.root={tmp_path_factory.mktemp('scenes') / 'scenes'}",
        "data.synthetic={train: 2, val: 2, test: 1, size: [64, 128]}",
        "data.workers=0",
    ]


def tiny(**options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return BiSeNetV2(19, width_multiplier=0.25, **options).state_dict()


@pytest.mark.parametrize("aux", [True, False])
def test_published_weights_are_evaluated(aux: bool, file: Path, scenes: list[str], tmp_path: Path) -> None:
    torch.save(tiny(aux=aux), file)
    cfg = composed("data=synthetic", f"checkpoint={file}", "accelerator=cpu", *scenes, name="evaluate")
    config.check(cfg)
    typed = config.typed(cfg)
    experiment.SegmentationDataModule(typed.data, composed().augment, seed=0).prepare_data()
    (found,) = experiment.evaluate(typed, tmp_path)
    assert found["step"] is None
    assert found["checkpoint"] == str(file)
    assert json.loads((tmp_path / "results.json").read_text())["step"] is None


def test_finetuning_keeps_all_but_the_classifiers(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tiny()
    torch.save(state, file)
    for n_classes in (19, 7):
        network = BiSeNetV2(n_classes, width_multiplier=0.25)
        with caplog.at_level(logging.INFO):
            checkpoint.finetune(network, file)
        kept = {name for name, value in network.state_dict().items() if torch.equal(value, state[name])}
        fresh = set() if n_classes == 19 else {
            f"{head}.conv_out.1.{kind}" for head in network.head_names for kind in ("weight", "bias")
        }  # fmt: skip
        assert set(network.state_dict()) - kept == fresh
        assert all(name in caplog.text for name in fresh)
    with pytest.raises(ValueError, match=r"finetune_from: .*model_final\.pth does not fit BiSeNetV2 before its heads"):
        checkpoint.finetune(BiSeNetV2(19, width_multiplier=0.5), file)
    torch.save(BiSeNetV1(4, generation="older", norm="inplace_abn").state_dict(), file)
    with pytest.raises(ValueError, match=r"model\.network\.norm differ"):
        checkpoint.finetune(BiSeNetV1(4, generation="older"), file)


def test_training_starts_from_what_finetune_from_names(file: Path, scenes: list[str], tmp_path: Path) -> None:
    torch.save({name: value + 0.5 for name, value in tiny().items()}, file)
    cfg = composed("debug=fast", *scenes, "trainer.max_steps=1", "trainer.val_interval=1", "scheduler.warmup_steps=0",
                   "optimizer.algorithm.lr=0", "model.network.width_multiplier=0.25", "trainer.progress=false",
                   "trainer.accelerator=cpu", f"finetune_from={file}")  # fmt: skip
    config.check(cfg)
    experiment.train(cfg, tmp_path)
    trained = checkpoint.read(tmp_path).weights
    for name, value in tiny().items():
        if name.endswith("weight"):
            torch.testing.assert_close(trained[name], value + 0.5)
    cfg.finetune_from = "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        experiment.train(cfg, tmp_path / "other")


@pytest.mark.skipif("REFERENCE_ROOT" not in os.environ, reason="REFERENCE_ROOT names no checkout of the reference")
@pytest.mark.parametrize("name", REFERENCES)
def test_a_file_that_the_reference_saves_predicts_as_the_reference(name: str, file: Path) -> None:
    theirs = deterministic(reference_network(name)).eval()
    torch.save(theirs.state_dict(), file)
    ours = bisenet.load(file, data="cityscapes").network.double()
    image = images(2, 96, 64, torch.float64)
    with torch.no_grad():
        (actual,), expected = logits_of(ours, image), logits_of(theirs, image)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
