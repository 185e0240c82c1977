"""Several processes: the same numbers, the same weights, one report; and an end when one of them fails."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, command, composed
from test_experiment import FAST, rows, same, train
from torch import nn

from bisenet import experiment, launch
from bisenet.callbacks import LossScale

TWO = ["strategy=ddp", "trainer.devices=2", "data.batch_size=4"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for images without ignored pixels, of which the validation split has an odd number."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 5, "test": 1}.items():
        for folder in (root / split, root / f"{split}annot"):
            folder.mkdir()
        for number in range(count):
            mask = np.repeat(np.repeat(rng.integers(0, 11, (4, 8), np.uint8), 24, 0), 24, 1)
            image = np.stack([20 * mask, 255 - 20 * mask, rng.integers(0, 255, mask.shape, np.uint8)], 2)
            cv2.imwrite(str(root / split / f"{number}.png"), image)
            cv2.imwrite(str(root / f"{split}annot" / f"{number}.png"), mask)
    return ["data=camvid", "data.batch_size=4", "data.report_split=val", f"data.root={root}"]


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path, images: list[str]) -> None:
    cfg = composed("model=bisenetv1_diss", "init_seed=5", "data=camvid")
    start = experiment.build_segmenter(cfg, experiment.build_data(cfg)).network
    torch.save(start.state_dict(), tmp_path / "start.pth")  # which the first process reads, for both
    settings = [*images, "data.limit=null", "model=bisenetv1_diss", "loss=cross_entropy", "augment.crop.scale=[1,1]",
                "finetune_from=start.pth", "+callbacks.freeze={_target_: probe.FreezeNorm}",
                "+callbacks.weights={_target_: probe.SaveWeights}"]  # fmt: skip
    for folder, devices in {"one": [], "two": TWO}.items():
        done = command("train", "debug=fast", "trainer.accelerator=cpu", "~callbacks.progress", *settings,
                      *devices, f"hydra.run.dir={folder}", cwd=tmp_path)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    key = "train/loss"
    np.testing.assert_allclose([float(r[key]) for r in two if r[key]], [float(r[key]) for r in one if r[key]], 1e-4)
    first, second = (torch.load(tmp_path / "two" / f"rank_{rank}.pt") for rank in (0, 1))
    assert same(first, second)
    counted = np.load(tmp_path / "two" / "counts_val_ss.npz")
    assert counted["image_index"].tolist() == [0, 1, 2, 3, 4]

    # The checkpoint explains the number: one process evaluates it to the same counts.
    again = command("evaluate", "checkpoint=two", "hydra.run.dir=again", "accelerator=cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = np.load(tmp_path / "again" / "counts_val_ss.npz")
    assert all(np.array_equal(repeated[name], counted[name]) for name in counted.files)


@pytest.mark.slow
def test_jobs_of_a_sweep_may_use_several_processes(tmp_path: Path, scenes: list[str]) -> None:
    done = command("train", "-m", "debug=fast", "trainer.accelerator=cpu", "~callbacks.progress", *scenes, *TWO,
                  "model.network.width_multiplier=0.25", "seed=1,2", "trainer.max_steps=3", "hydra.sweep.dir=sweep",
                  "+callbacks.weights={_target_: probe.SaveWeights}",
                  cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for seed in ("1", "2"):
        assert json.loads((tmp_path / "sweep" / f"seed={seed}" / "results.json").read_text())["step"] == 3
        assert json.loads((tmp_path / "sweep" / f"seed={seed}" / "provenance.json").read_text())["seeds"][
            "seed"
        ] == int(seed)
        first, second = (torch.load(tmp_path / "sweep" / f"seed={seed}" / f"rank_{rank}.pt") for rank in (0, 1))
        assert same(first, second)  # running statistics included, though each process saw other images


@pytest.mark.slow
def test_the_processes_end_with_the_job(tmp_path: Path, scenes: list[str]) -> None:
    """Told to end, interrupted, or killed: nothing trains on, and nobody complains."""
    codes = {signal.SIGTERM: launch.ENDED, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    for number, how in enumerate(codes):
        run = tmp_path / f"run{number}"
        job_command = [sys.executable, str(ROOT / "scripts" / "train.py"), "debug=fast", "strategy=ddp",
                   "trainer.devices=2", "trainer.accelerator=cpu", *scenes, f"hydra.run.dir={run}",
                   "trainer.max_steps=1000"]  # fmt: skip
        with subprocess.Popen(job_command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
            wait_until(lambda run=run: (run / "metrics.csv").exists(), "it trains")
            job.send_signal(how)
            _, stderr = job.communicate()
        wait_until(lambda: not running(tmp_path), "all processes have ended")
        assert job.returncode == codes[how]
        assert b"Traceback" not in stderr
        assert (how == signal.SIGTERM) <= (run / "checkpoints" / "last.ckpt").exists()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.2)


def running(folder: Path) -> list[Path]:
    """The processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found += [process] if (process / "cwd").readlink() == folder else []
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_error(tmp_path: Path, scenes: list[str]) -> None:
    done = train(tmp_path, "run", *scenes, *TWO, "+callbacks.fail={_target_: probe.Fail}")
    assert done.returncode == 1
    assert "ChildProcessError: process 1 of 2: RuntimeError: the second process cannot go on" in done.stderr
    assert "in on_train_batch_start" in (tmp_path / "run" / "train.log").read_text()  # the traceback stays with the run


@pytest.mark.slow
def test_a_mistake_is_told_without_a_traceback_whatever_the_number_of_processes(tmp_path: Path) -> None:
    done = train(tmp_path, "run", *TWO, "data=cityscapes", "data.root=nowhere")
    assert done.returncode == 1
    assert "process 0 of 2: FileNotFoundError: data.root: nowhere is not a folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_processes_continue_as_if_nothing_had_happened(tmp_path: Path, scenes: list[str]) -> None:
    """With dropout, whose generator each process has for itself."""
    settings = [*scenes, *TWO, "+callbacks.kill={_target_: kill.Kill}",
                "+callbacks.weights={_target_: probe.SaveWeights}"]  # fmt: skip
    assert train(tmp_path, "finished", *settings).returncode == 0
    killed = train(tmp_path, "killed", *settings, KILL_AT="batch_end:3", KILL_RANK="1")
    assert killed.returncode == 1
    assert "process 1 of 2 was killed by SIGKILL" in killed.stderr
    told = train(tmp_path, "killed", *settings, KILL_AT="batch_start:4", KILL_RANK="1", KILL_WITH="SIGTERM")
    assert told.returncode == launch.ENDED
    assert torch.load(tmp_path / "killed" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    done = command("train", "resume=killed", "trust=[kill,probe]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        ours, theirs = (torch.load(tmp_path / run / f"rank_{rank}.pt") for run in ("killed", "finished"))
        assert same(ours, theirs)
    assert rows(tmp_path / "killed") == rows(tmp_path / "finished")


@pytest.mark.slow
def test_torchruns_of_several_nodes_train_one_run(tmp_path: Path, scenes: list[str]) -> None:
    """Here both on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:29517"]  # fmt: skip
    overrides = [*FAST, *scenes, "strategy=ddp", "trainer.num_nodes=2", "data.batch_size=4", "hydra.run.dir=run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen([*torchrun, str(ROOT / "scripts" / "train.py"), *overrides], cwd=tmp_path, env=environment,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]  # fmt: skip
    for node in nodes:
        _, stderr = node.communicate(timeout=300)
        assert node.returncode == 0, stderr[-3000:]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["step"] == 6


def test_a_process_whose_parent_has_ended_ends() -> None:
    program = "from bisenet import launch; launch.end_with(1 << 30); print('goes on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_the_number_of_processes_is_that_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    asked = (1, 3, "2", [0, 1], "0,1", "1,", "auto", -1)
    assert [launch.processes_here(devices, "gpu") for devices in asked] == [1, 3, 2, 2, 2, 1, 4, 4]
    assert launch.processes_here("auto", "cpu") == 1
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has started us
    assert launch.processes_here(8, "gpu") == 1


def test_several_nodes_need_torchrun(tmp_path: Path) -> None:
    done = command("train", "strategy=ddp", "trainer.num_nodes=2", "trainer.devices=2", cwd=tmp_path)
    assert "ValueError: trainer.num_nodes: got 2, accepted: 1, unless torchrun" in done.stderr


@pytest.mark.parametrize("model", ["bisenetv1", "bisenetv1_ushape", "bisenetv2", "older"])
def test_synchronised_batch_norm_takes_the_place_of_every_batch_norm_and_leaves_no_trace(model: str) -> None:
    older = ["model=bisenetv1_diss", "model.network.generation=older", "model.network.norm=inplace_abn"]
    cfg = composed(*(older if model == "older" else [f"model={model}"]))
    data = experiment.build_data(cfg)
    network = experiment.build_segmenter(cfg, data).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in converted.modules())
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in converted.modules())
    assert same(dict(converted.state_dict()), before)
    experiment.build_segmenter(cfg, data).network.load_state_dict(converted.state_dict())


def test_overflows_are_counted_and_the_count_survives_a_checkpoint() -> None:
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    logged: dict[str, float] = {}
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), global_step=0, log_every_n_steps=1)
    module: Any = SimpleNamespace(device="cpu", log_dict=logged.update)
    counter = LossScale()
    for factor in (1.0, float("inf"), 1.0, float("nan"), float("inf"), 1.0):
        optimizer.zero_grad()
        counter.on_train_batch_start(trainer, module, None, 0)
        scaler.scale(parameter * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        counter.on_train_batch_end(trainer, module, None, None, 0)
    assert logged == {"precision/overflows": 3.0, "precision/scale": scaler.get_scale()}
    resumed = LossScale()
    resumed.load_state_dict(counter.state_dict())
    assert resumed.state_dict() == {"overflows": 3}
