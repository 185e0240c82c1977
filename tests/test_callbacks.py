"""Runs with everything switched on, and what their loggers recorded, read back from disk."""

import csv
import json
import math
import re
import resource
import struct
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import TRAIN_FAST, command, composed
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_experiment import same
from torch import nn

import bisenet
from bisenet import callbacks, checkpoint, experiment
from bisenet.classes import ClassTable
from bisenet.data.datasets import TrainingSet
from bisenet.module import SegmentationModule
from bisenet.networks import SegmentationOutput

pytestmark = pytest.mark.usefixtures("no_figures")
TABLE = ClassTable.load("cityscapes")
SMALL = ["debug=fast", "data=shapes", "~callbacks.progress", "trainer.accelerator=cpu",
         "model.network.width_multiplier=0.25"]  # fmt: skip


class Plain(nn.Module):
    """A network without batch statistics, so that accumulated batches add up exactly."""

    head_names = ("head",)
    align_corners = False

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, n_classes, 8, stride=8)

    def forward(self, x: torch.Tensor) -> SegmentationOutput:
        return SegmentationOutput(self.head(x), ())


PLAIN = ["model=plain", "loss=cross_entropy"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.root={tmp_path_factory.mktemp('data') / 'shapes'}"


def composed_small(*overrides: str) -> DictConfig:
    cfg = composed(*SMALL, *(override for override in overrides if override != "model=plain"))
    if "model=plain" in overrides:
        cfg.model.network = {"_target_": "test_callbacks.Plain"}
        cfg.model.output_layers = []
    return cfg


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return experiment.train(composed_small(*overrides, f"run_dir={folder}"))


def built(*overrides: str) -> SegmentationModule:
    cfg = composed(*overrides, "run_dir=out")
    data = experiment.build_data(cfg)
    return experiment.build_module(cfg, data, experiment.build_segmenter(cfg, data))


LOGGERS = ["logger=[csv,wandb,tensorboard]"]


def csv_rows(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


# ---------------------------------------------------------------- progress


def test_the_progress_bar_shows_the_run_and_ends_with_the_last_score(
    tmp_path: Path, shapes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = [override for override in SMALL if override != "~callbacks.progress"]
    results = experiment.train(composed(*small, shapes, "trainer.log_every_n_steps=3", f"run_dir={tmp_path / 'run'}"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training")]
    step = results["step"]
    assert f"{step}/{step}" in line
    assert f"val/ss/miou: {results['miou']:.4g}" in line


# ---------------------------------------------------------------- metrics.csv


def test_metrics_of_a_step_stand_in_one_row_and_new_columns_keep_the_old_rows(tmp_path: Path) -> None:
    logger = callbacks.MetricsFile(tmp_path / "metrics.csv")
    for step in range(4):
        for metrics in ({"loss": step + 0.5}, {"epoch": 0, "lr": 0.1}, *([{"miou": 0.25}] if step == 2 else [])):
            logger.log_metrics(metrics, step)
            logger.flush() if step == 3 else None  # as with a checkpoint in the middle of a step
    logger.finalize("success")
    rows = csv_rows(logger.path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["loss"] for row in rows] == ["0.5", "1.5", "2.5", "3.5"]
    assert [row["miou"] for row in rows] == ["", "", "0.25", ""]
    assert {row["lr"] for row in rows} == {"0.1"}
    assert "epoch" not in rows[0]


def test_rows_are_appended(tmp_path: Path) -> None:
    logger = callbacks.MetricsFile(tmp_path / "metrics.csv")
    files = set()
    for step in range(5):
        logger.log_metrics({"loss": 1.0}, step)
        files |= {path.stat().st_ino for path in tmp_path.iterdir()}
    assert len(files) == 1


def test_a_resumed_history_goes_on_where_it_is_logged_again(tmp_path: Path) -> None:
    """What came after the checkpoint is dropped, and so is a row that was cut off, lest it pass for an earlier one."""
    file = tmp_path / "metrics.csv"
    for rest in ("3", "1"):
        before = f"step,train/loss\n0,3.5\n1,3.25\n2,3.0\n{rest}"
        file.write_text(before)
        logger = callbacks.MetricsFile(file)
        logger.flush()
        assert file.read_text() == before  # nothing was logged yet
        logger.log_metrics({"train/loss": 9.0}, 2)
        logger.finalize("success")
        assert [row["train/loss"] for row in csv_rows(file)] == ["3.5", "3.25", "9.0"]
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_step_is_in_the_history_before_a_checkpoint_holds_it(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, save = {}, callbacks.CheckpointFiles.save_checkpoint

    def look(self: Any, checkpoint: dict[str, Any], path: Any, **_: Any) -> None:
        if Path(path).name == "last.ckpt":
            seen[checkpoint["global_step"]] = [row["train/loss"] for row in csv_rows(tmp_path / "metrics.csv")]
        save(self, checkpoint, path)

    monkeypatch.setattr(callbacks.CheckpointFiles, "save_checkpoint", look)
    run(tmp_path, shapes, *PLAIN)  # saves at 2, 4 and after the validations at 3 and 6
    final = [row["train/loss"] for row in csv_rows(tmp_path / "metrics.csv")]
    assert (all(final), len(final)) == (True, 6)
    assert seen == {step: final[:step] for step in (2, 3, 4, 6)}


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_harms_nothing(tmp_path: Path) -> None:
    files, target = callbacks.CheckpointFiles(), tmp_path / "last.ckpt"
    for number in range(3):
        files.save_checkpoint({"number": number}, target)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as a full disk
    try:
        with pytest.raises(OSError, match=r"last\.ckpt cannot be written: File too large"):
            files.save_checkpoint({"large": torch.zeros(1000)}, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: torch.load(path) for path in tmp_path.iterdir()} == {
        "last.ckpt": {"number": 2}, "previous.ckpt": {"number": 1}}  # fmt: skip


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    shapes: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [shapes, *PLAIN, "callbacks.last.every_n_steps=1",
                 "+callbacks.spoil={_target_: test_callbacks.Spoil, name: head.weight, step: 4}"]  # fmt: skip
    folder, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(FloatingPointError):
        run(folder, *overrides)
    monkeypatch.setattr(Spoil, "on_train_batch_start", lambda *_: None)
    calm = run(tmp_path / "calm", *overrides)
    previous = last.with_name("previous.ckpt")
    assert [checkpoint.read(file).step for file in (last, previous)] == [4, 3]
    last.write_bytes(last.read_bytes()[:-1000])
    last.with_name(".best.ckpt.draft").touch()
    again = run(folder, *overrides, f"resume={folder}")
    assert f"the run goes on from {previous}" in caplog.text
    assert again["protocols"]["ss"]["classes"] == calm["protocols"]["ss"]["classes"]
    assert same(checkpoint.read(folder).weights, checkpoint.read(tmp_path / "calm").weights)
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}

    for _ in range(2):  # of a run whose training is over, too
        (folder / "results.json").unlink()
        last.write_bytes(b"")
        with nullcontext() if previous.exists() else pytest.raises(ValueError, match=r"last\.ckpt cannot be read"):
            assert run(folder, *overrides, f"resume={folder}")["step"] == checkpoint.read(last).step == 6


# ---------------------------------------------------------------- what is not finite


class Spoil(Callback):
    """Makes a parameter or buffer of the network infinite before a step, in one process."""

    def __init__(self, name: str, step: int, rank: int = 0) -> None:
        self.name, self.step, self.rank = name, step, rank

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            network = pl_module.segmenter.network
            dict([*network.named_parameters(), *network.named_buffers()])[self.name].fill_(math.inf)


@pytest.mark.parametrize(("scaler", "bad"), [(None, 1), (object(), 20)], ids=["fp32", "fp16"])
def test_a_loss_that_is_not_finite_is_noticed_one_step_later(scaler: Any, bad: int, tmp_path: Path) -> None:
    """Where gradients are scaled, one that stays so."""
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=1,
                                   is_global_zero=False, strategy=SimpleNamespace(barrier=lambda: None))  # fmt: skip
    guard = callbacks.NonFinite(tmp_path / "nonfinite.json")
    losses = [1.0] + [math.nan] * (bad - 1) + [2.0] + [math.inf] * bad
    for trainer.global_step, loss in enumerate([*losses, 3.0], 1):
        with pytest.raises(FloatingPointError, match=f"at step {len(losses)}: ") if loss == 3 else nullcontext():
            guard.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]


def test_a_run_that_diverges_names_its_images_and_can_be_repeated(
    shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [shapes, *PLAIN, *TRAIN_FAST, "trainer.max_steps=6", "trainer.log_every_n_steps=20", "data.limit=4",
                 "callbacks.last.every_n_steps=1", "trainer.accumulate_grad_batches=2", "scheduler.warmup_steps=2",
                 "+callbacks.spoil={_target_: test_callbacks.Spoil, name: head.weight, step: 4}"]  # fmt: skip
    drawn, sample = [], TrainingSet.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSet, "__getitem__", lambda self, item: drawn.append(item) or sample(self, item))
        with pytest.raises(FloatingPointError, match="loss is infinite or not a number at step 5: ") as ended:
            run(tmp_path / "run", *overrides)
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert found["step"] == 5
    assert [entry["seed"] for entry in found["samples"]] == [[0, draw] for draw, _ in drawn[16:20]]  # 4 in each step
    assert all(Path(entry["image"]).exists() and Path(entry["label"]).exists() for entry in found["samples"])
    assert all(0 <= entry["range"][0] <= entry["range"][1] <= 255 for entry in found["samples"])
    assert checkpoint.read(tmp_path / "run").step == 4

    words = str(ended.value).partition("the same command with ")[2].split()
    assert words[0] == "debug=replay"
    with pytest.raises(RuntimeError, match="returned nan values"):  # the operation is named
        run(tmp_path / "again", *overrides, *words)
    repaired = run(tmp_path / "healthy", *overrides, *words, "~callbacks.spoil")
    assert repaired["step"] == 5  # and no further


@pytest.mark.parametrize("name", ["detail.S1.0.bn.running_var", "detail.S1.0.bn.weight"])
def test_no_checkpoint_takes_up_what_is_not_finite(name: str, shapes: str, tmp_path: Path) -> None:
    """An infinite running variance leaves the loss of a training step finite."""
    with pytest.raises(FloatingPointError, match=r"not a number|hold infinities or NaN"):
        run(tmp_path, shapes, f"+callbacks.spoil={{_target_: test_callbacks.Spoil, name: {name}, step: 2}}")
    for file in (tmp_path / "checkpoints").glob("*.ckpt"):
        read = checkpoint.read(file)
        assert read.step == 2
        assert all(tensor.isfinite().all() for tensor in read.weights.values())


@pytest.mark.slow
def test_all_processes_end_when_the_loss_of_one_is_not_finite(shapes: str, tmp_path: Path) -> None:
    spoil = "+callbacks.spoil={_target_: test_callbacks.Spoil, name: head.conv_out.1.weight, step: 2, rank: 1}"
    done = command("train", *SMALL, shapes, "strategy=ddp", "trainer.devices=2", spoil, "hydra.run.dir=run",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert "FloatingPointError: the loss is infinite or not a number at step 3" in done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert [entry["rank"] for entry in found["samples"]] == [0, 0, 1, 1]


# ---------------------------------------------------------------- Weights & Biases, read back


class Recorded(NamedTuple):
    """An offline run of W&B: what would be uploaded."""

    folder: Path
    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    exit_code: int

    def last(self, key: str) -> Any:
        return [row[key] for row in self.history if key in row][-1]


def records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    content = file.read_bytes()
    assert content.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


def read_wandb(run_dir: Path) -> Recorded:
    found: list[Any] = []
    deadline = time.monotonic() + 60  # W&B's process writes on for a moment after a run has been finished
    while not any(record.WhichOneof("record_type") == "exit" for record in found) and time.monotonic() < deadline:
        time.sleep(0.1)
        found = [record for file in run_dir.glob("wandb/offline-run-*/*.wandb") for record in records(file)]
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    (started,) = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    history = []
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind == "config":
            settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                keys, node = list(item.nested_key) or [item.key], row
                for key in keys[:-1]:
                    node = node.setdefault(key, {})
                node[keys[-1]] = json.loads(item.value_json)
            history.append(row)
    (exit_code,) = [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]
    return Recorded(file.parent / "files", started, settings, history, exit_code)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, shapes: str) -> Path:
    """Six steps with all that can be switched on; seed 3, since the fixture must not show what is true by default."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run(folder, shapes, *LOGGERS, "sweep.name=sweep", "seed=3", "data.batch_size=4",
        "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=6", "callbacks=[default,ema]",
        "callbacks.ema.decay=0.5", "trainer.gradient_clip_val=0.5", "trainer.deterministic=true",
        "loss.criterion.class_weights=enet")  # fmt: skip
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    return folder


@pytest.fixture(scope="module")
def recorded(everything: Path) -> Recorded:
    return read_wandb(everything)


def test_runs_of_a_sweep_are_grouped_with_the_seed_as_tag(recorded: Recorded) -> None:
    assert (recorded.run.project, recorded.run.run_group, list(recorded.run.tags)) == ("bisenet", "sweep", ["seed=3"])
    assert recorded.run.display_name == "all"  # the folder of the run
    assert recorded.exit_code == 0


def test_the_whole_configuration_and_the_commit_are_there(recorded: Recorded, everything: Path) -> None:
    stored = checkpoint.read(everything).hyper_parameters
    assert {key: recorded.config[key] for key in stored} == stored
    assert recorded.config["provenance"]["commit"] == json.loads((everything / "provenance.json").read_text())["commit"]


def test_scalars_are_those_of_the_csv_file(recorded: Recorded, everything: Path) -> None:
    rows = [{k: float(v) for k, v in row.items() if v} for row in csv_rows(everything / "metrics.csv")]
    names = ("train/loss", "lr/decay", "lr/output_no_decay", "train/kept/head", "train/kept/aux5_4", "time/data",
             "val/ss/miou")  # fmt: skip
    for name in names:
        expected = {row["step"]: row[name] for row in rows if name in row}
        found = {row["trainer/global_step"]: row[name] for row in recorded.history if name in row}
        assert found == pytest.approx(expected)
        assert len(found) == (2 if name == "val/ss/miou" else 6)
    assert all(0 < row["train/kept/head"] <= 1 for row in rows if "train/kept/head" in row)


def test_images_carry_masks_with_class_names(recorded: Recorded) -> None:
    labels = {**{str(i): name for i, name in enumerate(TABLE.names)}, "255": "ignored"}
    table = recorded.config["_wandb"].get("mask/class_labels", {})
    for number in range(2):  # each under a name of its own: W&B wants those of one name to be of one size
        shown = recorded.last(f"val/predictions/{number}")
        assert (shown["count"], shown["_type"]) == (1, "images/separated")
        for kind in ("prediction", "truth"):
            (mask,) = [Image.open(recorded.folder / masks[kind]["path"]) for masks in shown["all_masks"]]
            assert mask.size == (128, 64)
            assert table.get(f"val/predictions/{number}_wandb_delimeter_{kind}", {}).get("value") == labels
        assert [Image.open(recorded.folder / name).size for name in shown["filenames"]] == [(128, 64)]


def test_every_evaluation_leaves_a_table_of_classes(recorded: Recorded, everything: Path) -> None:
    results = json.loads((everything / "results.json").read_text())
    for key, scores in {
        "val/ss/classes": None,
        "final/last/val/ss/classes": results["protocols"]["ss"],
        "final/best_on_val/val/ss/classes": results["best_on_val"]["protocols"]["ss"],
        "final/ema/val/ss/classes": results["ema"]["protocols"]["ss"],
    }.items():
        table = json.loads((recorded.folder / recorded.last(key)["path"]).read_text())
        assert table["columns"][:2] == ["class", "iou"]
        assert [row[0] for row in table["data"]] == list(TABLE.names)
        if scores:
            assert [row[1] for row in table["data"]] == [scores["classes"][name]["iou"] for name in TABLE.names]
    tables = [row for row in recorded.history if "val/ss/classes" in row]
    assert [row["trainer/global_step"] for row in tables] == [3, 6]


def test_a_job_that_fails_ends_its_run_as_failed(shapes: str, tmp_path: Path) -> None:
    import wandb

    with pytest.raises(FloatingPointError):
        run(tmp_path, shapes, *PLAIN, *LOGGERS,
            "optimizer.lr=1e30")  # fmt: skip
    assert wandb.run is None  # the next job of this process begins its own
    assert read_wandb(tmp_path).exit_code == 1


def test_the_environment_may_switch_wandb_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")  # which WandbLogger by itself passes over
    assert composed("logger=wandb").logger.wandb.mode == "disabled"


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_has_scalars_images_and_tables(everything: Path) -> None:
    events = EventAccumulator(str(everything / "tensorboard"), {"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    assert len(events.Scalars("train/loss")) == 6
    assert len(events.Scalars("val/ss/miou")) == 2
    images = events.Images("val/predictions/1")
    assert [(image.step, image.width, image.height) for image in images] == [(3, 3 * 128, 64), (6, 384, 64)]
    assert "final/ema/val/ss/classes/text_summary" in events.Tags()["tensors"]


# ---------------------------------------------------------------- training options


def test_the_average_is_reported_apart_and_can_be_loaded(everything: Path) -> None:
    results = json.loads((everything / "results.json").read_text())
    assert results["ema"]["decay"] == 0.5
    assert results["ema"]["protocols"]["ss"]["n_images"] == results["protocols"]["ss"]["n_images"]
    last, average = (checkpoint.read(everything / "checkpoints" / f"{name}.ckpt") for name in ("last", "ema"))
    assert (average.step, average.hyper_parameters) == (last.step, last.hyper_parameters)
    assert last.weights.keys() == average.weights.keys()
    assert not torch.equal(last.weights["head.conv_out.1.weight"], average.weights["head.conv_out.1.weight"])
    assert bisenet.load(average.path).predict(np.zeros((64, 128, 3), np.uint8)).shape == (64, 128)


def test_the_best_checkpoint_moves_with_its_run(tmp_path: Path) -> None:
    score = torch.tensor(0.5)
    written = callbacks.BestCheckpoint(str(tmp_path / "there"), "miou", mode="max")
    written.best_model_path = written.kth_best_model_path = str(tmp_path / "there" / "best.ckpt")
    written.best_model_score = written.kth_value = score
    written.best_k_models = {written.best_model_path: score}
    moved = callbacks.BestCheckpoint(str(tmp_path / "here"), "miou", mode="max")
    (tmp_path / "here").mkdir()
    best = str(tmp_path / "here" / "best.ckpt")
    Path(best).touch()
    moved.load_state_dict(written.state_dict())
    assert (moved.best_model_path, moved.kth_best_model_path, moved.best_k_models) == (best, best, {best: score})
    assert (moved.best_model_score, moved.kth_value) == (score, score)


def test_what_is_logged_of_accumulated_batches_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is kept is a share of the valid pixels: ignored ones, such as padding, count nowhere."""
    module = built("loss.criterion.min_kept=1.0", "model.network.width_multiplier=0.25")
    trainer = SimpleNamespace(log_every_n_steps=1, accumulate_grad_batches=2, global_step=0)
    logged: dict[str, Any] = {}
    monkeypatch.setattr(type(module), "trainer", property(lambda _: trainer))
    monkeypatch.setattr(module, "log_dict", lambda scalars, **_: logged.update(scalars))
    losses = []
    for part in range(2):
        assert not logged
        batch = {"image": torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), "mask": torch.full((2, 64, 64), part)}
        batch["mask"][:, : 16 * (1 + part)] = TABLE.ignore_index
        losses.append(module.training_step(batch, part).item())
    assert logged["train/loss"].item() == pytest.approx(sum(losses) / 2)
    assert logged["train/kept/head"].item() == pytest.approx(1)


def test_the_average_follows_its_recursion() -> None:
    network, step = nn.Linear(2, 1), SimpleNamespace(accumulate_grad_batches=2)
    module: Any = SimpleNamespace(segmenter=SimpleNamespace(network=network), device="cpu")
    average = callbacks.WeightAverage(decay=0.75)
    average.setup(step, module, "fit")  # type: ignore[arg-type]
    expected = None
    for batch in range(10):
        nn.init.normal_(network.weight)
        average.on_train_batch_end(step, module, None, None, batch)  # type: ignore[arg-type]
        if batch % 2:  # the batches in between do not step
            now = network.weight.detach().clone()
            expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(average.weights["weight"], expected)
    restored = callbacks.WeightAverage(decay=0.75)
    restored.setup(step, module, "fit")  # type: ignore[arg-type]
    restored.load_state_dict(average.state_dict())
    assert torch.equal(restored.weights["weight"], average.weights["weight"])


def test_accumulated_batches_are_the_step_of_one_large_batch(shapes: str, tmp_path: Path) -> None:
    weights, logged = [], []
    for parts in (1, 2):
        folder = tmp_path / str(parts)
        run(folder, shapes, *PLAIN, "data.batch_size=4", "augment.crop.scale=[1,1]",
            f"trainer.accumulate_grad_batches={parts}", "trainer.max_steps=3",
            "trainer.val_check_interval=2")  # fmt: skip
        weights.append(checkpoint.read(folder).weights["head.weight"])
        logged.append([(row["step"], bool(row["train/loss"])) for row in csv_rows(folder / "metrics.csv")])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)  # no pixel is ignored in these scenes
    assert logged[0] == logged[1]


def test_class_weights_of_the_training_split_travel_with_the_checkpoint(everything: Path) -> None:
    state = torch.load(everything / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weights = state["loss.criterion.class_weights"]
    assert weights.max() == pytest.approx(1 / math.log(1.02), rel=1e-5)  # a class that does not occur
    assert weights.min() < 10


def test_early_stopping_ends_a_run_that_then_stays_ended(shapes: str, tmp_path: Path) -> None:
    overrides = [shapes, *PLAIN, "callbacks=[default,early_stopping]",
                 "callbacks.early_stopping.patience=1", "+callbacks.early_stopping.min_delta=1.0",
                 "trainer.val_check_interval=2", "trainer.max_steps=20"]  # fmt: skip
    first = run(tmp_path, *overrides)
    assert first["step"] == 4  # the second validation is no better by 1
    (tmp_path / "results.json").unlink()  # as if it had been killed in the final evaluation
    again = run(tmp_path, *overrides, f"resume={tmp_path}")
    assert (again["step"], again["protocols"]["ss"]["miou"]) == (4, first["protocols"]["ss"]["miou"])


def test_the_training_step_reads_nothing_back() -> None:
    """On the meta device every synchronisation with the host is an error; so is a number on its way to a GPU, which
    waits for it: those are logged at the steps that are written only."""
    module = built("loss.criterion.class_weights=enet", *SMALL).to("meta")
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=10, accumulate_grad_batches=1)
    module._trainer = trainer  # type: ignore[assignment]
    logged: dict[str, Any] = {}
    module.log_dict = lambda scalars, sync_dist: logged.update(scalars)  # type: ignore[assignment, method-assign]
    batch = {"image": torch.zeros(2, 3, 64, 128, dtype=torch.uint8, device="meta"),
             "mask": torch.zeros(2, 64, 128, dtype=torch.uint8, device="meta")}  # fmt: skip
    assert module.training_step(batch, 0).device.type == "meta"
    assert not logged
    trainer.global_step = 9
    assert module.training_step(batch, 9).device.type == "meta"
    assert all(logged[f"train/kept/{name}"].device.type == "meta" for name in module.segmenter.network.head_names)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("share", "device", "busy", "warned"),
    [(0.05, "cpu", True, 0), (0.3, "cpu", True, 1), (0.3, "cuda", True, 0), (0.3, "cuda", False, 1)],
)
def test_waiting_for_data_is_told_once_and_not_of_the_first_steps(
    share: float,
    device: str,
    busy: bool,
    warned: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    monkeypatch.setattr("bisenet.callbacks.perf_counter", lambda: now)
    trainer: Any = SimpleNamespace(global_step=1, log_every_n_steps=10, accumulate_grad_batches=2, is_global_zero=True,
                                   train_dataloader=SimpleNamespace(num_workers=3))  # fmt: skip
    event = SimpleNamespace(query=lambda: not busy)  # whether a GPU is done with the step before
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: event))
    clock, module = callbacks.StepClock(), MagicMock(device=torch.device(device))
    clock.on_train_start(trainer, module)
    for batch in range(400):
        now += 5 if batch < 100 else share
        clock.on_train_batch_start(trainer, module, None, batch)
        now += 1 - share
        clock.on_train_batch_end(trainer, module, None, None, batch)
        if batch == 198:
            assert not caplog.records
            now += 1000
            clock.on_validation_end(trainer, module)
    assert len(caplog.records) == warned
    for record in caplog.records:
        assert re.match(r"30 % of .* data\.workers=<more than 3> or data\.cache=memmap", record.getMessage())


# ---------------------------------------------------------------- debugging


def test_a_profile_leaves_a_table_and_a_trace(shapes: str, tmp_path: Path) -> None:
    run(tmp_path, shapes, *PLAIN, "debug=profile", "trainer.max_steps=8", "augment.crop.size=[64,128]",
        "data.workers=0")  # fmt: skip
    assert "run_training_batch" in (tmp_path / "profile" / "fit-profile.txt").read_text()
    trace = next((tmp_path / "profile").glob("fit*.json"))
    assert any("convolution" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bisenetv1", "bisenetv1_diss", "bisenetv1_ushape", "bisenetv2", "bisenetv2_large"])
def test_every_variant_learns_two_images_by_heart(variant: str, shapes: str, tmp_path: Path) -> None:
    cfg = composed("debug=overfit", shapes, f"model={variant}", "~callbacks.progress", "trainer.accelerator=cpu",
                   f"run_dir={tmp_path}")  # fmt: skip
    assert experiment.train(cfg)["protocols"]["ss"]["miou"] > 0.95
    main = f"train/loss/{bisenet.load(tmp_path).network.head_names[0]}"  # type: ignore[index]
    losses = [float(row[main]) for row in csv_rows(tmp_path / "metrics.csv") if row[main]]
    assert losses[-1] < 0.05


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_weights(shapes: str, tmp_path: Path) -> None:
    weights = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run(folder, shapes, *PLAIN, f"compile={compiled}")
        weights.append(checkpoint.read(folder).weights)
    assert weights[0].keys() == weights[1].keys()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
