"""Whole runs through the scripts, as a user starts them: train, evaluate, load, kill and resume."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, command, composed
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

import bisenet
from bisenet import callbacks, checkpoint, experiment, launch, report
from bisenet.classes import ClassTable
from bisenet.inference import Protocol
from bisenet.module import SegmentationModule
from bisenet.networks import BiSeNetV2

pytestmark = pytest.mark.usefixtures("no_figures")
FAST = ["debug=fast", "data.batch_size=2", "~callbacks.progress", "trainer.accelerator=cpu",
        "model.network.width_multiplier=0.25", "protocol=[ss,half]"]  # fmt: skip


def train(cwd: Path, folder: str, *overrides: str, **environment: Any) -> subprocess.CompletedProcess[str]:
    return command("train", *FAST, f"hydra.run.dir={folder}", *overrides, cwd=cwd, **environment)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes: list[str]) -> Path:
    """An undisturbed run of six steps with dropout, validations at 3 and 6 and checkpoints in between."""
    cwd = tmp_path_factory.mktemp("runs")
    done = train(cwd, "run", *scenes, "+callbacks.kill={_target_: kill.Kill}", figures=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return cwd / "run"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(stream)]


def results(run: Path) -> dict[str, Any]:
    """What ``results.json`` holds, without the times."""

    def timeless(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: timeless(v) for k, v in node.items() if not k.endswith("seconds")}
        return node

    return timeless(json.loads((run / "results.json").read_text()))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def require_same_run(run: Path, other: Path) -> None:
    """Bit for bit, but for times."""
    files = sorted(file.name for file in (other / "checkpoints").iterdir())
    assert files == sorted(file.name for file in (run / "checkpoints").iterdir())
    for file in files:
        ours, theirs = (torch.load(r / "checkpoints" / file, weights_only=True) for r in (run, other))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(ours.get(key), theirs.get(key)), (file, key)
        assert same(*(read.get("callbacks", {}).get("WeightAverage") for read in (ours, theirs)))
    assert rows(run) == rows(other)
    assert results(run) == results(other)


def test_a_run_directory_holds_what_a_reader_needs(finished: Path) -> None:
    for name in ("provenance.json", "metrics.csv", "results.json", ".hydra/config.yaml", "checkpoints/last.ckpt",
                 "checkpoints/best.ckpt"):  # fmt: skip
        assert (finished / name).is_file(), name
    assert {p.name for p in (finished / "figures").glob("*.png")} == {
        "curves.png", "iou_per_class.png", "confusion_ss.png", "confusion_half.png", "predictions.png"}  # fmt: skip
    found = results(finished)
    assert (found["step"], found["split"]) == (6, "val")
    assert list(found["protocols"]) == ["ss", "half"]
    single = found["protocols"]["ss"]
    assert (found["protocol"], found["miou"]) == ("ss", single["miou"])
    assert 0 <= single["miou"] <= 1
    assert single["definition"] == json.loads(json.dumps(asdict(Protocol())))
    assert (single["n_images"], len(single["classes"])) == (3, 19)
    assert set(single["categories"]) == set(ClassTable.load("cityscapes").categories)
    table = (finished / "results.md").read_text()
    assert f"| mIoU | {100 * single['miou']:.2f} | {100 * found['protocols']['half']['miou']:.2f} |" in table
    assert "(ss on val, last weights, step 6)" in table
    assert "fp32 on cpu" in table
    assert (found["precision"], found["device"]) == ("fp32", "cpu")
    best = found["best_on_val"]
    assert best["selected_on"] == "val"
    assert best["protocols"]["ss"]["miou"] >= single["miou"]  # the split that selects is the one reported here
    provenance = json.loads((finished / "provenance.json").read_text())
    assert provenance["seeds"] == {"seed": 0, "init_seed": 0, "data_seed": 0}
    assert provenance["versions"]["torch"] == torch.__version__
    counts = np.load(finished / "counts_val_ss.npz")
    assert counts["per_image"].shape == (3, 3, 19)
    assert (counts["per_image"][:, 2].sum(0) == counts["confusion"].sum(1)).all()


def test_metrics_are_logged_under_their_names(finished: Path) -> None:
    logged = rows(finished)
    heads = ["head", "aux2", "aux3", "aux4", "aux5_4"]
    names = {"train/loss", "val/ss/miou", *(f"train/loss/{h}" for h in heads), *(f"train/kept/{h}" for h in heads),
             *(f"lr/{g}" for g in ("output_decay", "output_no_decay", "decay", "no_decay"))}  # fmt: skip
    assert names <= set(logged[0])
    assert [row["step"] for row in logged if row["train/loss"]] == [str(step) for step in range(6)]
    assert len([row for row in logged if row["val/ss/miou"]]) == 2
    rates = [(float(r["lr/decay"]), float(r["lr/output_decay"])) for r in logged if r["lr/decay"]]
    assert all(output == pytest.approx(10 * base, rel=1e-5) for base, output in rates)  # float32
    assert rates[0][0] == pytest.approx(5e-4)  # the warmup starts at a tenth


def test_evaluating_the_checkpoint_repeats_the_number(finished: Path) -> None:
    done = command("evaluate", f"checkpoint={finished}", "hydra.run.dir=again", "accelerator=cpu", cwd=finished.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    again = results(finished.parent / "again")
    assert again["protocols"] == results(finished)["protocols"]
    assert again["step"] == 6


def test_evaluations_are_in_fp32_unless_asked_for_otherwise_whatever_the_training_was(
    scenes: list[str], tmp_path: Path
) -> None:
    """So that there is one number: within the training, and of its checkpoint."""
    cfg = composed(*FAST, *scenes, "trainer.max_steps=3", "trainer.val_check_interval=2", "precision=bf16",
                   "data.workers=0", f"run_dir={tmp_path / 'run'}")  # fmt: skip
    trained = experiment.train(cfg)
    found: dict[str, Any] = {}
    for name in ("fp32", "fp16"):
        overrides = ["workers=0", "accelerator=cpu"] + (["precision=fp16"] if name == "fp16" else [])
        again = composed(f"checkpoint={tmp_path / 'run'}", f"run_dir={tmp_path / name}", *overrides, name="evaluate")
        found[name] = experiment.evaluate(again)
    assert [r["precision"] for r in (trained, found["fp32"], found["fp16"])] == ["fp32", "fp32", "bf16"]
    for protocol in ("ss", "half"):
        first, second, other = (np.load(tmp_path / folder / f"counts_val_{protocol}.npz") for folder in ("run", *found))
        assert all(np.array_equal(first[key], second[key]) for key in first)
        assert not np.array_equal(first["confusion"], other["confusion"])


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], 0),
        pytest.param(["protocol=[ss,half]"], 1, marks=pytest.mark.slow),
        pytest.param(["data.report_split=test"], 1, marks=pytest.mark.slow),
        pytest.param(["trainer.val_check_interval=2"], 1, marks=pytest.mark.slow),
    ],
    ids=["the same", "more protocols", "another split", "an earlier step"],
)
def test_what_the_last_validation_scored_is_not_scored_again(
    overrides: list[str], passes: int, scenes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(experiment.Trainer, "test", _counted(experiment.Trainer.test, calls))
    cfg = composed("debug=fast", *scenes, "trainer.max_steps=3", "trainer.accelerator=cpu", "~callbacks.progress",
                   "model.network.width_multiplier=0.25", "data.workers=0", f"run_dir={tmp_path}",
                   *overrides)  # fmt: skip
    found = experiment.train(cfg)
    best_is_another = found["best_on_val"]["step"] != found["step"]
    assert len(calls) == passes + best_is_another
    split = found["split"]
    for name, scores in found["protocols"].items():
        counts = np.load(tmp_path / f"counts_{split}_{name}.npz")
        assert len(counts["image_index"]) == scores["n_images"] == {"val": 3, "test": 2}[split]


def _counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return counting


class SaveCounts(Callback):
    """What each protocol counted, from the process that knows it to a file."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.set_num_threads(1)  # a forked process must not touch the thread pool of its parent

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        if trainer.is_global_zero:
            for name, (scores, _) in pl_module.evaluation.items():
                report.write_counts(Path(f"{self.prefix}_{name}.npz"), scores)


def test_two_ranks_score_as_one_where_images_do_not_divide(tmp_path: Path) -> None:
    """Three images of two sizes on two processes, under two protocols."""
    root = tmp_path / "data"
    cfg = composed("protocol=[ss,ssc]", f"data.root={root}", "data.dataset.train=1", "data.dataset.val=3",
                   "data.dataset.test=1", "data.dataset.size=[64,128]", "data.eval_window=[32,32]", "data.workers=0",
                   "model.network.width_multiplier=0.25")  # fmt: skip
    data = experiment.build_data(cfg)
    data.prepare_data()
    image, label = (next(root.rglob(f"val/*/*{kind}.png")) for kind in ("_leftImg8bit", "_labelIds"))
    for file in (image, label):
        with Image.open(file) as image:
            image.crop((0, 0, 70, 50)).save(file)
    module = SegmentationModule(experiment.build_segmenter(cfg, data))
    found = []
    for strategy, devices in (("ddp_fork", 2), ("auto", 1)):
        trainer = Trainer(accelerator="cpu", strategy=strategy, devices=devices, use_distributed_sampler=False,
                          logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False, callbacks=[SaveCounts(tmp_path / strategy)])  # fmt: skip
        trainer.test(module, datamodule=data, verbose=False)
        found.append([np.load(tmp_path / f"{strategy}_{name}.npz") for name in ("ss", "ssc")])
    for two, one in zip(*found, strict=True):
        assert one["image_index"].tolist() == [0, 1, 2]
        assert all(np.array_equal(one[key], two[key]) for key in one)


def test_a_checkpoint_predicts_with_nothing_else(finished: Path) -> None:
    model = bisenet.load(finished)
    assert model.classes == ClassTable.load("cityscapes")
    mask = model.predict(np.random.default_rng(0).integers(0, 256, (75, 131, 3), dtype=np.uint8))
    assert mask.shape == (75, 131)
    assert not model.training
    assert checkpoint.read(finished).hyper_parameters["model"]["name"] == "bisenetv2"


@pytest.mark.parametrize(
    ("kill_at", "workers"),
    [
        pytest.param("batch_start:1", 0, marks=pytest.mark.slow),  # before the first checkpoint
        ("batch_end:3", 2),  # a step whose validation has not begun
        pytest.param("validation:3", 0, marks=pytest.mark.slow),
        pytest.param("batch_start:3", 2, marks=pytest.mark.slow),  # right after a validation
        pytest.param("batch_end:5", 2, marks=pytest.mark.slow),
        pytest.param("validation:6", 0, marks=pytest.mark.slow),
        pytest.param("test:6", 0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    finished: Path, scenes: list[str], tmp_path: Path, kill_at: str, workers: int
) -> None:
    killed = train(
        tmp_path, "run", *scenes, "+callbacks.kill={_target_: kill.Kill}", f"data.workers={workers}", KILL_AT=kill_at
    )
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert not (run / "results.json").exists()
    done = command("train", f"resume={run}", "trust=[kill]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    require_same_run(run, finished)


@pytest.mark.parametrize(
    ("at", "told"),
    [
        ("batch_start:4", "SIGUSR1"),
        pytest.param("batch_start:1", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("validation:3", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("batch_end:5", "SIGUSR1", marks=pytest.mark.slow),
        pytest.param("test:6", "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_end_loses_nothing_and_the_same_command_continues_it(
    finished: Path, scenes: list[str], tmp_path: Path, at: str, told: str
) -> None:
    overrides = [*scenes, "+callbacks.kill={_target_: kill.Kill}", "data.workers=2"]
    ended = train(tmp_path, "run", *overrides, KILL_AT=at, KILL_WITH=told)
    assert ended.returncode == launch.ENDED, ended.stderr[-3000:]
    assert "bisenet train resume=" in ended.stdout
    run, step = tmp_path / "run", int(at.split(":")[1])
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert step <= saved <= step + 1  # the step that was going on, or the next one
    assert not (run / "results.json").exists()
    done = train(tmp_path, "run", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    require_same_run(run, finished)


def test_a_second_signal_ends_at_once_and_the_first_one_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends its signal to the process and to its group."""
    now, codes = [0.0], []
    monkeypatch.setattr(callbacks, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "_exit", codes.append)
    ending, trainer = callbacks.EndOnSignal(), Trainer(logger=False, enable_checkpointing=False)
    with ending.listening():
        ending.on_train_start(trainer, LightningModule())
        for now[0] in (0.0, 0.1, 0.2):
            signal.raise_signal(signal.SIGTERM)
        assert codes == []
        now[0] = 2.0
        signal.raise_signal(signal.SIGUSR1)
        assert codes == [launch.ENDED]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", ["batch_end:5", "test:6"])
def test_a_killed_run_continues_with_everything_switched_on(
    finished_with_everything: tuple[Path, list[str]], tmp_path: Path, kill_at: str
) -> None:
    finished, overrides = finished_with_everything
    killed = train(tmp_path, "run", *overrides, KILL_AT=kill_at)
    assert killed.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    done = command("train", f"resume={run}", "trust=[kill]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    require_same_run(run, finished)
    ids = {file.stem for file in run.glob("wandb/offline-run-*/*.wandb")}
    assert len(ids) == 1  # both processes wrote the same run


@pytest.fixture(scope="module")
def finished_with_everything(tmp_path_factory: pytest.TempPathFactory, scenes: list[str]) -> tuple[Path, list[str]]:
    """Accumulation, clipping, averaged and class weights, early stopping, channels_last, all loggers; undisturbed."""
    overrides = [
        *scenes, "+callbacks.kill={_target_: kill.Kill}", "callbacks=[default,early_stopping,ema]",
        "logger=[csv,wandb,tensorboard]", "data.batch_size=4", "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.5", "callbacks.ema.decay=0.5",
        "loss.criterion.class_weights=enet", "channels_last=true",
    ]  # fmt: skip
    cwd = tmp_path_factory.mktemp("everything")
    done = train(cwd, "run", *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return cwd / "run", overrides


def test_resuming_a_finished_run_shows_it_and_changes_nothing(finished: Path) -> None:
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.rglob("*.*") if p.is_file() and p.suffix != ".log"}

    before = files()
    done = command("train", f"resume={finished}", "trust=[kill]", cwd=finished.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished already" in done.stdout
    assert before.items() <= files().items()


def test_nothing_that_exists_is_overwritten(finished: Path, scenes: list[str]) -> None:
    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in finished.rglob("*.*") if p.is_file() and p.suffix != ".log"}

    before = files()
    kill = "+callbacks.kill={_target_: kill.Kill}"
    for override, reason in {"seed=1": "seed: 0 there, 1 now", "resume=null": "which holds a run already"}.items():
        done = train(finished.parent, "run", *scenes, kill, override)
        assert done.returncode == 1
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
        assert files() == before
    typo = command("train", "resume=rum", cwd=finished.parent, bare=True)
    assert typo.returncode != 0
    assert typo.stderr.startswith("ValueError: resume: got 'rum'")
    assert not (finished.parent / "rum").exists()


def test_a_directory_in_which_a_mistake_was_made_can_be_used_again(scenes: list[str], tmp_path: Path) -> None:
    wrong = train(tmp_path, "first", *scenes, "loss.criterion.threshold=2")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("ValueError: loss.criterion.threshold: got 2, accepted")
    assert "Traceback" not in wrong.stderr
    assert train(tmp_path, "first", *scenes, "trainer.max_steps=3").returncode == 0
    assert results(tmp_path / "first")["step"] == 3


@pytest.fixture
def unevaluated(finished: Path, scenes: list[str], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the run, moved, without its results, and the overrides that continue it."""
    run = shutil.copytree(finished, tmp_path / "moved")
    (run / "results.json").unlink()
    shutil.copytree(scenes[0].partition("=")[2], tmp_path / "scenes")
    return run, [*FAST, *scenes, "+callbacks.kill={_target_: kill.Kill}", f"data.root={tmp_path / 'scenes'}",
                 f"run_dir={run}"]  # fmt: skip


def test_a_checkpoint_of_another_configuration_is_not_continued(unevaluated: tuple[Path, list[str]]) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: 2 there, 4 now") as refused:
        experiment.train(composed(*unevaluated[1], "data.batch_size=4", "seed=1", "trainer.max_steps=8"))
    for line in ("  seed: 0 there, 1 now", "trainer.max_steps: 6 there, 8 now", "finetune_from=<run>"):
        assert line in str(refused.value)
    assert "callbacks" not in str(refused.value)  # whose files have moved with the run


def test_a_run_does_not_continue_on_other_data(unevaluated: tuple[Path, list[str]]) -> None:
    run, overrides = unevaluated
    with min(run.parent.rglob("train/*/*labelIds.png")).open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"split 'train' of .* has changed: 4 samples.* there, 4 samples.* now"):
        experiment.train(composed(*overrides))


def test_a_run_whose_results_are_damaged_is_evaluated_again(
    unevaluated: tuple[Path, list[str]], finished: Path
) -> None:
    run, overrides = unevaluated
    (run / "results.json").write_text('{"split": ')
    experiment.train(composed(*overrides))
    require_same_run(run, finished)


@pytest.mark.parametrize(
    ("override", "processor", "expected"),
    [("auto", "AVX512", True), ("auto", "AVX2", False), ("false", "AVX512", False), ("true", "AVX2", True)],
)
def test_the_layout_follows_the_processor_unless_told_otherwise(
    override: str, processor: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    network, cfg = BiSeNetV2(4, width_multiplier=0.25), composed("trainer.accelerator=cpu", f"channels_last={override}")
    experiment.choose_layout(cfg, None, network)
    weight = network.detail.S2.get_parameter("0.conv.weight")
    assert cfg.channels_last == weight.is_contiguous(memory_format=torch.channels_last) == expected


def test_a_run_that_is_continued_keeps_its_layout(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cfg = composed("trainer.accelerator=cpu")
    experiment.choose_layout(cfg, checkpoint.newest(finished), BiSeNetV2(4, width_multiplier=0.25))
    assert cfg.channels_last is False
    with pytest.raises(ValueError, match="channels_last: got yes_please, accepted: auto"):
        experiment.choose_layout(composed("channels_last=yes_please"), None, BiSeNetV2(4))


def test_a_run_from_before_layouts_is_continued(
    unevaluated: tuple[Path, list[str]], finished: Path, tmp_path: Path
) -> None:
    run, _ = unevaluated
    config, last = run / ".hydra" / "config.yaml", run / "checkpoints" / "last.ckpt"
    config.write_text("".join(line for line in config.open() if not line.startswith("channels_last")))
    content = torch.load(last, weights_only=True)
    del content["hyper_parameters"]["channels_last"]
    content["hyper_parameters"]["max_pixels_per_batch"] = 4194304
    torch.save(content, last)
    done = command("train", f"resume={run}", "trust=[kill]", f"data.root={tmp_path / 'scenes'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(run)["miou"] == results(finished)["miou"]


def test_a_longer_training_is_no_continuation_but_a_run_from_these_weights(
    unevaluated: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A checkpoint brings its schedule along, in which the learning rate has run out."""
    run, overrides = unevaluated
    longer = [*overrides, "trainer.max_steps=8", f"run_dir={tmp_path / 'longer'}"]
    with pytest.raises(ValueError, match=r"scheduler\.total_steps: 6 there, 8 now[^$]*finetune_from=<run>"):
        experiment.train(composed(*longer, f"ckpt_path={run / 'checkpoints' / 'last.ckpt'}"))
    assert experiment.train(composed(*longer, f"finetune_from={run}"))["step"] == 8


def test_a_new_run_takes_up_the_training_of_another(unevaluated: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, overrides = unevaluated
    last = run / "checkpoints" / "last.ckpt"
    with min(run.parent.rglob("train/*/*labelIds.png")).open("ab") as file:
        file.write(b" ")  # it may have other data, and selects a best of its own
    cfg = composed(*overrides, f"ckpt_path={last}", f"run_dir={tmp_path / 'new'}")
    assert experiment.train(cfg)["protocols"].keys() == {"ss", "half"}


def test_one_process_at_a_time_works_in_a_directory(finished: Path, scenes: list[str], tmp_path: Path) -> None:
    owner = f"in use by process {os.getpid()} on {socket.gethostname()}"
    with launch.alone_in(finished):
        for arguments in (
            ["train", f"resume={finished}", "trust=[kill]"],
            ["evaluate", "checkpoint=x", f"hydra.run.dir={finished}"],
            ["predict", f"checkpoint={finished}", f"input={finished}/figures", f"output={finished}"],
        ):
            refused = command(*arguments, cwd=tmp_path)
            assert refused.returncode == 1
            assert owner in refused.stderr
            assert "Traceback" not in refused.stderr
    job = tmp_path / "sweep" / "seed=1"
    job.mkdir(parents=True)
    with launch.alone_in(job):
        left = command("train", "-m", *FAST, *scenes, "seed=1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert left.returncode == 0, left.stderr[-3000:]
    assert owner in left.stdout
    assert not (job / "checkpoints").exists()


@pytest.mark.slow
def test_commands_of_the_same_second_have_their_own_directories(tmp_path: Path) -> None:
    """The year stands for the second."""
    compare = [sys.executable, str(ROOT / "scripts" / "compare.py"), "values={a: [1, 2, 3]}",
               "hydra.run.dir='out/${now:%Y}'"]  # fmt: skip
    together = [subprocess.Popen(compare, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in together] == [0, 0]
    assert len(list(tmp_path.glob("out/*/summary.json"))) == 2


@pytest.mark.parametrize("asked", ["--help", "--cfg=job", "--cfg=all"])
def test_who_asks_for_a_configuration_makes_no_directory(asked: str, tmp_path: Path) -> None:
    assert command("evaluate", asked, "checkpoint=x", cwd=tmp_path, bare=True).returncode == 0
    assert not list(tmp_path.iterdir())


def test_an_evaluation_does_not_invent_the_data(finished: Path) -> None:
    done = command("evaluate", f"checkpoint={finished}", "data_root=nowhere", cwd=finished.parent)
    assert done.returncode != 0
    assert "nowhere is not a folder" in done.stderr
    assert not (finished.parent / "nowhere").exists()


@pytest.mark.data
def test_camvid_trains_and_reports_the_test_split(camvid: Path, tmp_path: Path) -> None:
    cfg = composed("debug=fast", "data=camvid", f"data.root={camvid}", "data.limit=null", "data.batch_size=2",
                   "~callbacks.progress", "trainer.accelerator=cpu", "model.network.width_multiplier=0.25",
                   f"run_dir={tmp_path}")  # fmt: skip
    found = experiment.train(cfg)
    assert (found["split"], found["protocols"]["ss"]["n_images"]) == ("test", 8)
    assert found["best_on_val"]["selected_on"] == "val"


def test_another_seed_gives_other_weights_and_the_same_seed_the_same() -> None:
    def weights(*overrides: str) -> torch.Tensor:
        cfg = composed(*overrides)
        segmenter = experiment.build_segmenter(cfg, experiment.build_data(cfg))
        return torch.cat([p.flatten() for p in segmenter.network.parameters()])

    assert torch.equal(weights("seed=1"), weights("seed=2", "init_seed=1"))
    assert not torch.equal(weights("seed=1"), weights("seed=2"))


@pytest.mark.parametrize("interval", [1, 20])
def test_a_run_that_diverges_stops_and_has_no_result(interval: int, scenes: list[str], tmp_path: Path) -> None:
    """Also where the loss is not read on the way."""
    cfg = composed(*FAST, *scenes, "optimizer.lr=1e30", f"trainer.log_every_n_steps={interval}", f"run_dir={tmp_path}")
    with pytest.raises(FloatingPointError, match=r"optimizer\.lr"):
        experiment.train(cfg)
    assert not (tmp_path / "results.json").exists()
    for file in (tmp_path / "checkpoints").glob("last.ckpt"):
        assert all(value.isfinite().all() for value in checkpoint.read(file).weights.values())
