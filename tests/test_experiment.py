"""Whole runs through the scripts, as a user starts them: train, evaluate, load, kill and resume."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_config import composed

import bisenet
from bisenet import checkpoint, config, experiment
from bisenet.classes import ClassTable

ROOT = Path(__file__).parents[1]
FAST = ["debug=fast", "trainer.progress=false", "trainer.accelerator=cpu", "model.network.width_multiplier=0.25"]
VARIANTS = ["bisenetv1", "bisenetv1_diss", "bisenetv1_ushape", "bisenetv2", "bisenetv2_large"]


def script(name: str, *overrides: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / name), *overrides]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=600
    )


def train(cwd: Path, folder: str, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return script("train.py", *FAST, f"hydra.run.dir={folder}", *overrides, cwd=cwd, **environment)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny synthetic set; written by the first run that uses it."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    return [f"data.root={root}", "data.synthetic={train: 6, val: 3, test: 2, size: [64, 128]}"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes: list[str]) -> Path:
    """An undisturbed run of six steps with dropout, validations at 3 and 6 and checkpoints in between."""
    cwd = tmp_path_factory.mktemp("runs")
    done = train(cwd, "run", *scenes, "+callbacks.kill={_target_: kill.Kill}")
    assert done.returncode == 0, done.stderr[-3000:]
    return cwd / "run"


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as stream:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(stream)]


def results(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "results.json").read_text()).items() if k != "train_seconds"}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_run_directory_holds_what_a_reader_needs(finished: Path) -> None:
    for name in ("provenance.json", "metrics.csv", "results.json", ".hydra/config.yaml", "checkpoints/last.ckpt",
                 "checkpoints/best.ckpt"):  # fmt: skip
        assert (finished / name).is_file(), name
    assert {p.name for p in (finished / "figures").glob("*.png")} == {
        "curves.png", "iou_per_class.png", "confusion.png", "predictions.png"}  # fmt: skip
    found = results(finished)
    assert found["step"] == 6
    assert (found["protocol"], found["split"]) == ("ss", "val")
    assert 0 <= found["miou"] <= 1
    assert found["best_on_val"]["selected_on"] == "val"
    assert found["best_on_val"]["miou"] >= found["miou"]  # the split that selects is the split that is reported here
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
    done = script(
        "evaluate.py", f"checkpoint={finished}", "hydra.run.dir=again", "accelerator=cpu", cwd=finished.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = results(finished.parent / "again")
    assert again["scores"] == results(finished)["scores"]
    assert again["step"] == 6


def test_a_checkpoint_predicts_with_nothing_else(finished: Path) -> None:
    model = bisenet.load(finished)
    assert model.classes == ClassTable.load("cityscapes")
    mask = model.predict(np.random.default_rng(0).integers(0, 256, (75, 131, 3), dtype=np.uint8))
    assert mask.shape == (75, 131)
    assert not model.training
    assert checkpoint.read(finished).config["model"]["name"] == "bisenetv2"


@pytest.mark.parametrize(
    ("kill_at", "workers"),
    [
        ("batch_start:1", 0),  # before the first checkpoint
        ("batch_end:3", 2),  # a step whose validation has not begun
        pytest.param("validation:3", 0, marks=pytest.mark.slow),
        ("batch_start:3", 2),  # right after a validation
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
    done = script("train.py", f"resume={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    for file in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(r / "checkpoints" / file, weights_only=True) for r in (run, finished))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert same(ours[key], theirs[key]), (file, key)
    assert rows(run) == rows(finished)
    assert results(run) == results(finished)


def test_resuming_a_finished_run_shows_it_and_changes_nothing(finished: Path) -> None:
    def files() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in finished.rglob("*.*") if p.is_file() and p.suffix != ".log"}

    before = files()
    done = script("train.py", f"resume={finished}", cwd=finished.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished already" in done.stdout
    assert before.items() <= files().items()


def test_nothing_that_exists_is_overwritten(finished: Path, scenes: list[str]) -> None:
    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in finished.rglob("*.*") if p.is_file() and p.suffix != ".log"}

    before = files()
    done = train(finished.parent, "run", *scenes, "seed=1")
    assert done.returncode != 0
    assert "holds a run already" in done.stderr
    assert files() == before
    typo = script("train.py", "resume=rum", cwd=finished.parent)
    assert typo.returncode != 0
    assert "resume: got 'rum'" in typo.stderr
    assert not (finished.parent / "rum").exists()


def test_an_evaluation_does_not_invent_the_data(finished: Path) -> None:
    done = script("evaluate.py", f"checkpoint={finished}", "data_root=nowhere", cwd=finished.parent)
    assert done.returncode != 0
    assert "nowhere is not a folder" in done.stderr
    assert not (finished.parent / "nowhere").exists()


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["current", "older"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_both_generations_runs(
    variant: str, generation: str, scenes: list[str], tmp_path: Path
) -> None:
    steps = ["trainer.max_steps=20", "trainer.val_interval=10", "optimizer.algorithm.lr=1e-3"]
    cfg = composed("debug=fast", *scenes, *steps, f"model={variant}", f"model.network.generation={generation}",
                   "trainer.progress=false", "trainer.accelerator=cpu")  # fmt: skip
    config.check(cfg)
    (tmp_path / "run").mkdir()
    assert experiment.train(cfg, tmp_path / "run")["step"] == 20


@pytest.mark.data
def test_camvid_trains_and_reports_the_test_split(camvid: Path, tmp_path: Path) -> None:
    cfg = composed("debug=fast", "data=camvid", f"data.root={camvid}", "data.batch_size=2", "data.workers=0",
                   "trainer.progress=false", "trainer.accelerator=cpu")  # fmt: skip
    (tmp_path / "run").mkdir()
    found = experiment.train(cfg, tmp_path / "run")
    assert (found["split"], found["scores"]["n_images"]) == ("test", 8)
    assert found["best_on_val"]["selected_on"] == "val"


def test_another_seed_gives_other_weights_and_the_same_seed_the_same() -> None:
    def weights(*overrides: str) -> torch.Tensor:
        module = experiment.build(composed(*overrides), ClassTable.load("cityscapes"))
        return torch.cat([p.flatten() for p in module.segmenter.network.parameters()])

    assert torch.equal(weights("seed=1"), weights("seed=2", "init_seed=1"))
    assert not torch.equal(weights("seed=1"), weights("seed=2"))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.root=nowhere", "data=cityscapes"], "nowhere"),
        (["data.classes=pets"], "pets"),
        (["optimizer.groups.decay.layers=[heads]"], "heads"),
        (["model.network.generation=new"], "new"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(
    overrides: list[str], named: str, scenes: list[str], tmp_path: Path
) -> None:
    cfg = composed("debug=fast", *scenes, *overrides, "trainer.accelerator=cpu", "trainer.progress=false")
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        experiment.train(cfg, tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_a_loss_that_is_not_finite_stops_the_run(scenes: list[str], tmp_path: Path) -> None:
    cfg = composed("debug=fast", *scenes, "optimizer.algorithm.lr=1e30", "trainer.progress=false",
                   "trainer.accelerator=cpu")  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"optimizer\.algorithm\.lr"):
        experiment.train(cfg, tmp_path)


def test_files_that_are_no_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bisenet.load(tmp_path / "nowhere")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        bisenet.load(tmp_path / "text.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt was not written by bisenet"):
        bisenet.load(tmp_path / "other.ckpt")
    torch.save(Path("code"), tmp_path / "code.ckpt")
    with pytest.raises(ValueError, match=r"code\.ckpt"):
        bisenet.load(tmp_path / "code.ckpt")
