"""Sweeps that continue and comparisons of runs: on fake run directories, and as a user starts them."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import command, composed
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf
from test_callbacks import read_wandb
from test_experiment import FAST, results, rows, same

from bisenet import compare, conf_dir, sweep

CALLBACK = "+callbacks.kill={_target_: kill.Kill}"


def fake(folder: Path, *overrides: str, split: str = "val", scored: dict[str, Any] | None = None, mode: str = "RUN",
         **scores: float) -> Path:  # fmt: skip
    """A run directory with what comparisons read: configuration, overrides, scores for each protocol (percent; none: it
    is not finished) and what is ``scored`` beside them.
    """
    cfg = OmegaConf.create(
        {"name": "fake", "seed": 0, "init_seed": "${seed}", "data_seed": "${seed}", "repeat": 1,
         "run_dir": "${hydra:runtime.output_dir}", "model": {"name": "x"}, "loss": {"aux_weight": 1.0},
         "protocol": {name: {} for name in scores}}
    )  # fmt: skip
    choices = {"trainer": "default"}
    for key, value in (override.split("=", 1) for override in overrides):
        if not Path(conf_dir(), key).is_dir():
            OmegaConf.update(cfg, key, yaml.safe_load(value))
        elif key != "without":  # Hydra records single choices only
            choices[key] = value
    hydra = {"runtime": {"choices": choices}, "mode": mode, "overrides": {"task": list(overrides)},
             "job": {"config": {"override_dirname": {"exclude_keys": []}}}}  # fmt: skip
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(cfg, folder / ".hydra" / "config.yaml")
    OmegaConf.save({"hydra": hydra}, folder / ".hydra" / "hydra.yaml")
    if scores:
        road = {"classes": {"road": {"iou": 0.9}}} | (scored or {})
        protocols = {name: {"miou": score / 100} | road for name, score in scores.items()}
        (folder / "results.json").write_text(json.dumps({"split": split, "protocols": protocols}))
    return folder


def compared(folder: Path, by: list[str] | None = None) -> dict[str, Any]:
    runs, missing = sweep.read_runs([str(folder)], by)
    return compare.compare(runs, missing=missing)


def counts(seed: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    true = np.full((30, 2), 500)
    tp = generator.binomial(true, np.random.default_rng(0).uniform(0.3, 0.8, (30, 1)) + shift)
    return np.arange(30), np.stack([tp, tp + (true - tp)[:, ::-1], true], axis=1)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of two models, the second one a little worse, with counts; another seed is not finished."""
    tmp_path = tmp_path_factory.mktemp("models")
    for model, shift in (("bisenetv1", 0.05), ("bisenetv2", 0.0)):
        for seed, noise in ((1, 0.0), (2, 0.4), (3, -0.3)):
            run = fake(tmp_path / f"model={model},seed={seed}", f"model={model}", f"seed={seed}",
                       ss=70 + 100 * shift + noise, mscf=73 + 100 * shift + 1.01 * noise)  # fmt: skip
            for protocol, gain in (("ss", 0), ("mscf", 0.03)):
                index, per_image = counts(seed, shift + gain)
                np.savez(run / f"counts_val_{protocol}.npz", image_index=index, per_image=per_image)
    fake(tmp_path / "model=bisenetv1,seed=4", "model=bisenetv1", "seed=4")
    planned = [f"model={model},seed={seed}" for model in ("bisenetv1", "bisenetv2") for seed in (1, 2, 3, 4)]
    OmegaConf.save(OmegaConf.create({"jobs": planned, "config": {}}), tmp_path / "sweep.yaml")
    return tmp_path


def test_groups_are_what_was_overridden_differently_but_for_seeds(two_models: Path) -> None:
    runs, missing = sweep.read_runs([str(two_models)])
    assert {run.name: run.group for run in runs}["model=bisenetv2,seed=3"] == {"model": "bisenetv2"}
    assert missing.keys() == {"model=bisenetv1,seed=4", "model=bisenetv2,seed=4"}
    assert "not finished" in missing["model=bisenetv1,seed=4"]
    assert missing["model=bisenetv2,seed=4"] == "not begun"

    summary = compared(two_models)
    groups = summary["protocols"]["ss"]["groups"]
    assert {name: (g["n"], round(g["mean"], 6)) for name, g in groups.items()} == {
        "bisenetv1": (3, 75.033333), "bisenetv2": (3, 70.033333)}  # fmt: skip
    (found,) = summary["protocols"]["ss"]["comparisons"]
    assert found["difference"] == pytest.approx(5)
    assert found["low"] < 5 < found["high"]
    assert found["images"]["low"] > 0  # the counts say the same
    assert found["verdict"].startswith("bisenetv1 is better than bisenetv2 by 5.00: 95% interval")
    assert summary["missing"] == missing


def test_protocols_are_compared_within_the_same_runs(two_models: Path) -> None:
    summary = compared(two_models)
    gains = {entry["group"]: entry for entry in summary["within_runs"]}
    assert gains["bisenetv1"]["difference"] == pytest.approx(3, abs=0.001)
    assert (gains["bisenetv1"]["first"], gains["bisenetv1"]["second"], gains["bisenetv1"]["n"]) == ("mscf", "ss", 3)
    assert gains["bisenetv1"]["high"] - gains["bisenetv1"]["low"] < 0.02  # paired: the spread of the seeds cancels
    assert gains["bisenetv1"]["p"] < 1e-5
    assert gains["bisenetv1"]["images"]["low"] > 0


def test_a_folder_a_glob_and_the_runs_themselves_are_the_same_runs(two_models: Path) -> None:
    whole, _ = sweep.read_runs([str(two_models)])
    by_glob, missing = sweep.read_runs([f"{two_models}/*seed=[1-3]"])
    listed, _ = sweep.read_runs([str(run.folder) for run in (*whole, whole[0])])
    assert [r.folder for r in by_glob] == [r.folder for r in whole] == [r.folder for r in listed]
    assert not missing


def test_runs_group_by_any_key(two_models: Path) -> None:
    for key, groups in (("seed", {"1", "2", "3"}), ("loss.aux_weight", {"1.0"}), ("trainer", {"default"})):
        assert compared(two_models, [key])["protocols"]["ss"]["groups"].keys() == groups
    both = compared(two_models, ["model", "trainer"])["protocols"]["ss"]["groups"]
    assert list(both) == ["model=bisenetv1, trainer=default", "model=bisenetv2, trainer=default"]
    for key in ("protocol.ss", "no.such.key"):
        with pytest.raises(ValueError, match=f"by: got '{key}'"):
            sweep.read_runs([str(two_models)], by=[key])


def test_what_cannot_be_compared_is_refused(two_models: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sweep.read_runs([str(tmp_path / "nowhere")])
    runs, _ = sweep.read_runs([str(two_models)])
    for metric in ("iou", "seconds", "definition.stride", "classes.road.pixels", "classes.road"):
        for run in runs:
            run.results["protocols"]["ss"] |= {"seconds": 0.5, "definition": {"stride": 0.5}}
            run.results["protocols"]["ss"]["classes"]["road"]["pixels"] = 7
        with pytest.raises(ValueError, match=f"metric: got '{metric}'"):
            compare.compare(runs, metric=metric)
    with pytest.raises(ValueError, match="baseline: got 'v3', accepted: bisenetv1, bisenetv2"):
        compare.compare(runs, baseline="v3")
    with pytest.raises(ValueError, match="values: got 'bisenetv1'"):
        compare.compare(runs, values={"bisenetv1": [70.0]})
    runs[0].results["protocols"]["ss"]["definition"] = {"scales": [2.0]}
    with pytest.raises(ValueError, match="of the group 'bisenetv1' were scored by other definitions under ss"):
        compare.compare(runs)
    runs[0].results["split"] = "test"
    with pytest.raises(ValueError, match="of the group 'bisenetv1' were scored on other splits"):
        compare.compare(runs)


def test_any_score_can_be_compared(two_models: Path) -> None:
    summary = compare.compare(sweep.read_runs([str(two_models)])[0], metric="classes.road.iou")
    found = summary["protocols"]["ss"]
    assert found["groups"]["bisenetv1"]["mean"] == pytest.approx(90)
    assert found["comparisons"][0]["images"] is None  # the counts are those of the mean
    assert found["comparisons"][0]["p"] is None
    assert "spread" in found["comparisons"][0]["verdict"]


def test_runs_are_repetitions_only_where_nothing_else_differs(two_models: Path) -> None:
    """The lr was swept as well, and a user groups by the model: two rates with a seed are not that seed, twice."""
    summary = compared(two_models, ["name"])
    assert {name: (g["n"], g["variance"]) for name, g in summary["protocols"]["ss"]["groups"].items()} == {
        "fake": (6, None)}  # fmt: skip
    assert summary["notes"] == [
        "fake: its runs also differ in model (bisenetv1, bisenetv2): their spread is not of seeds alone"]  # fmt: skip


@pytest.mark.parametrize(
    ("camvid", "cityscapes", "how"),
    [
        ({"scored": {"n_images": 5}}, {"scored": {"n_images": 9}}, "on other images or classes"),
        ({"scored": {"definition": {"window": 360}}}, {"scored": {"definition": {"window": 1024}}},
         "by other definitions"),
        ({"split": "test"}, {"split": "val"}, "on other splits"),
    ],
)  # fmt: skip
def test_scores_of_other_images_are_not_compared(
    camvid: dict[str, Any], cityscapes: dict[str, Any], how: str, tmp_path: Path
) -> None:
    for data, found in (("camvid", camvid), ("cityscapes", cityscapes)):
        for seed in (1, 2):
            run = fake(tmp_path / f"{data},{seed}", f"data={data}", f"seed={seed}", ss=70.0 + seed, **found)
            index, per_image = counts(seed, 0)
            np.savez(run / f"counts_{found.get('split', 'val')}_ss.npz", image_index=index, per_image=per_image)
    summary = compared(tmp_path)
    assert list(summary["protocols"]["ss"]["groups"]) == ["camvid", "cityscapes"]
    assert summary["protocols"]["ss"]["comparisons"] == []
    assert summary["notes"] == [f"camvid and cityscapes are not compared: they were scored {how}"]
    compare.write(summary, tmp_path)
    assert summary["notes"][0] in (tmp_path / "summary.md").read_text()
    with pytest.raises(ValueError, match=f"were scored {how}"):
        compared(tmp_path, ["name"])


def test_a_damaged_run_is_named_and_costs_the_others_nothing(tmp_path: Path) -> None:
    """Hydra or a training was killed while it wrote, or the disk was full."""
    damage = {".hydra/config.yaml": ["name: x\nmodel:\n  na", "name: x\nmodel: {na"], ".hydra/hydra.yaml": [""],
              "results.json": ['{"split": "val", "proto', '{"miou": 0.7}']}  # fmt: skip
    wrong = [(file, content) for file, contents in damage.items() for content in contents]
    for seed in range(len(wrong) + 1):
        fake(tmp_path / f"seed={seed}", f"seed={seed}", ss=70.0)
    for seed, (file, content) in enumerate(wrong, 1):
        (tmp_path / f"seed={seed}" / file).write_text(content)
    runs, missing = sweep.read_runs([str(tmp_path)])
    assert [run.name for run in runs] == ["seed=0"]
    for seed, (file, _) in enumerate(wrong, 1):
        assert f"its {file.split('/')[0]} is" in missing[f"seed={seed}"]


def test_what_ends_up_the_same_makes_no_groups(tmp_path: Path) -> None:
    """A logger, and defaults that are said."""
    said = ["logger=wandb", "trainer=default", "loss.aux_weight=1.0", "logger.wandb.mode=online"]
    for seed, override in enumerate(said):
        fake(tmp_path / str(seed), f"seed={seed}", override, ss=70.0 + seed, mscf=72.0)
    assert list(compared(tmp_path)["protocols"]["ss"]["groups"]) == ["all runs"]
    by_protocol, _ = sweep.read_runs([str(tmp_path)], by=["protocol"])
    assert {run.group["protocol"] for run in by_protocol} == {"ss+mscf"}


def test_overrides_that_are_no_single_value_group_as_they_were_said(tmp_path: Path) -> None:
    for seed, width in enumerate((64, 128)):
        fake(tmp_path / str(seed), f"model.network={{width: {width}}}", ss=70.0)
    runs, _ = sweep.read_runs([str(tmp_path)])
    assert [run.group for run in runs] == [{"model.network": f"{{width: {width}}}"} for width in (64, 128)]


def test_verdicts_are_honest() -> None:
    def verdict(**groups: list[float]) -> list[str]:
        return [entry["verdict"] for entry in compare.compare([], values=groups)["protocols"]["ss"]["comparisons"]]

    (same_runs,) = verdict(a=[78.4, 78.9, 78.1, 78.6], b=[78.5, 78.8, 78.2, 78.3])
    found = re.fullmatch(
        r"a and b: no evidence of a difference: 95% interval -0\.\d\d to \+0\.\d\d; "
        r"(\d+) seeds per group would resolve 0\.5",
        same_runs,
    )
    assert found
    assert 5 < int(found[1]) < 30
    assert verdict(v1=[78.45], diss=[78.48]) == [
        "v1 and diss: nothing can be said about seeds with one run of either"]  # fmt: skip
    # One of three comparisons stands alone and falls when it is one of three.
    family = verdict(a=[70.0, 70.5, 70.2], b=[70.9, 71.2, 70.8], c=[70.2, 70.9, 71.3])
    assert family[0].startswith("a and b: no evidence of a difference when corrected for 3 comparisons (p = ")


def test_repetitions_are_no_seeds(tmp_path: Path) -> None:
    for seed, repeat, score in ((1, 1, 70.0), (1, 2, 70.2), (2, 1, 71.0), (2, 2, 71.2)):
        fake(tmp_path / f"repeat={repeat},seed={seed}", f"seed={seed}", f"repeat={repeat}", ss=score)
    (group,) = compared(tmp_path)["protocols"]["ss"]["groups"].values()
    assert (group["n"], len(group["runs"])) == (2, 4)
    assert (group["min"], group["max"]) == (pytest.approx(70.1), pytest.approx(71.1))
    assert group["variance"]["repeat_sd"] == pytest.approx(0.02**0.5)
    assert group["variance"]["seed_sd"] == pytest.approx(0.49**0.5)


def test_repetitions_of_a_single_seed_are_reported(tmp_path: Path) -> None:
    for repeat in (1, 2, 3):
        fake(tmp_path / f"repeat={repeat}", f"repeat={repeat}", ss=70.0)
    summary = compared(tmp_path)
    (group,) = summary["protocols"]["ss"]["groups"].values()
    assert group["variance"] == {"seed_sd": None, "repeat_sd": 0, "p": None}
    compare.write(summary, tmp_path)
    expected = "* all runs: sd of repetitions of a seed 0.000 (3 runs of one seed)"
    assert expected in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("mode", ["RUN", "RunMode.MULTIRUN"])
def test_folds_are_no_repetitions(mode: str, tmp_path: Path) -> None:
    for fold in ("a", "b"):
        for seed in (1, 2):
            fake(tmp_path / f"{fold},{seed}", f"data.root={fold}", f"seed={seed}", mode=mode, ss=70.0 + seed)
    assert {name: g["n"] for name, g in compared(tmp_path)["protocols"]["ss"]["groups"].items()} == {"a": 2, "b": 2}
    pooled = compared(tmp_path, ["model.name"])
    assert pooled["notes"] == [
        "x: its runs also differ in data.root (a, b): their spread is not of seeds alone"]  # fmt: skip


def test_folds_of_other_images_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for fold, images in (("a", 5), ("b", 6)):
        fake(tmp_path / fold, f"data.root={fold}", ss=70.0, scored={"n_images": images})
    with pytest.raises(ValueError, match=r"as with by=\[model\.name,data\.root\]"):
        compared(tmp_path, ["model.name"])


def test_data_and_initialisation_seeds_are_seeds(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        fake(tmp_path / f"data_seed={seed}", f"data_seed={seed}", ss=70.0 + seed)
    (group,) = compared(tmp_path)["protocols"]["ss"]["groups"].values()
    assert group["n"] == 3


def test_seeds_that_are_crossed_share_what_they_share(tmp_path: Path) -> None:
    for model, worth in (("bisenetv1", 1.0), ("bisenetv2", 0.0)):
        for init in (1, 2, 3):
            for data in (1, 2):
                fake(tmp_path / f"{model},{init},{data}", f"model={model}", f"init_seed={init}", f"data_seed={data}",
                     ss=70 + worth + init + 0.1 * data, half=71 + worth + init + 0.2 * data)  # fmt: skip
    summary = compared(tmp_path)
    found = summary["protocols"]["ss"]
    assert {(g["n"], len(g["runs"])) for g in found["groups"].values()} == {(2, 6)}
    assert found["comparisons"][0]["n"] == [2, 2]
    assert {entry["n"] for entry in summary["within_runs"]} == {2}
    assert summary["notes"][0] == (
        "bisenetv1: its 6 pairs of init_seed and data_seed share seeds and count as 2 (n), which errs on the safe side"
    )


def test_tricks_are_ranked_against_the_full_recipe(tmp_path: Path) -> None:
    """A sweep over ``without`` ends with it; in whatever order tricks are named."""
    for number, (arm, worth) in enumerate({"": 0, "ohem": 2, "flip": 1, "jitter": -1, "flip,ohem": 3}.items()):
        for seed, noise in ((1, 0.0), (2, 0.1)):
            fake(tmp_path / f"{number},{seed}", f"without=[{arm}]", f"seed={seed}", ss=70.0 - worth + noise)
    fake(tmp_path / "again", "without=[ohem,flip]", "seed=3", ss=67.05)
    sweep.summarize(tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())["protocols"]["ss"]
    assert found["groups"]["without flip+ohem"]["n"] == 3
    ranked = {entry["first"]: round(entry["difference"], 6) for entry in found["comparisons"]}
    assert list(ranked.items()) == [
        ("without jitter", 1), ("without flip", -1), ("without ohem", -2), ("without flip+ohem", -3)]  # fmt: skip
    assert {entry["second"] for entry in found["comparisons"]} == {"full recipe"}


def test_a_table_in_a_pipe_has_whole_numbers_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model=bisenetv1_with_a_long_name, without decay_split+output_lr"
    compare.show(compare.compare([], values={name: [70.123, 71.0], "b": [69.0, 69.5]}))
    shown = capsys.readouterr().out
    assert "…" not in shown
    row = next(line for line in shown.splitlines() if f"{name} - b" in line)
    assert "+1.31" in row


def test_the_summary_is_written_again_and_the_same(two_models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written() -> list[bytes]:
        return [(two_models / f"summary.{kind}").read_bytes() for kind in ("json", "md", "png")]

    sweep.summarize(two_models)
    first = written()
    sweep.summarize(two_models)
    assert written() == first
    text = (two_models / "summary.md").read_text()
    assert "| bisenetv1 | 3 | 75.03 |" in text
    assert "missing: model=bisenetv2,seed=4: not begun" in text
    assert "model=bisenetv2,seed=4: not begun" in capsys.readouterr().out.replace("\n", " ")


def test_published_scores_go_through_the_command(tmp_path: Path) -> None:
    values = "values={reference: [74.28,72.96,73.73,74.39,73.77]}"
    done = command("compare", values, "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "73.83" in done.stdout
    assert "| reference | 5 | 73.83 | 0.57 | 73.12 to 74.53 | 72.96 | 74.39 | 1.18 |" in (
        tmp_path / "out" / "summary.md").read_text()  # fmt: skip
    again = command("compare", values, "hydra.run.dir=out", cwd=tmp_path)
    assert "holds a run already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "runs: got none"),
        ({"values": {"a": [0.74, 0.73]}}, "values.a: got [0.74, 0.73]"),
        ({"values": {"a": [0.7, 71]}}, "values.a: got [0.7, 71]"),
        ({"values": {"a": []}}, "values.a: got []"),
        ({"values": [1]}, "values: got [1]"),
        ({"values": {"a": [70.0]}, "difference": 0}, "difference: got 0"),
    ],
)
def test_a_comparison_without_sense_is_refused(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        compare.compare([], **arguments)
    assert named in str(raised.value)


# ---------------------------------------------------------------- continuing


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        ("seed=1", "seed=1"),
        ("model=bisenetv1,without=[ohem,flip]", "model=bisenetv1,without=ohem+flip"),
        ("without=[]", "without=nothing"),
        ("", "run"),
    ],
)
def test_a_job_has_a_readable_folder(overrides: str, folder: str) -> None:
    assert sweep.job_dir(overrides) == folder


def test_names_of_jobs_stay_apart() -> None:
    overrides = [
        *(f"{'x' * 300}={number}" for number in range(20)),
        "data.root=d/ok",
        "data.root=d-ok",
        "data.root=d ok",
    ]
    names = {sweep.job_dir(override) for override in overrides}
    assert len(names) == len(overrides)
    assert max(map(len, names)) <= 200


def test_a_job_continues_only_with_its_own_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "seed=1"
    (run / ".hydra").mkdir(parents=True)
    OmegaConf.save(composed("seed=1"), run / ".hydra" / "config.yaml")
    node = OmegaConf.create({"runtime": {"output_dir": str(run)}, "mode": "MULTIRUN", "overrides": {"task": ["seed=1"]},
                             "job": {"config": {"override_dirname": {"exclude_keys": []}}}})  # fmt: skip
    monkeypatch.setattr(sweep.HydraConfig, "get", lambda: node)
    continued = sweep.job(composed("seed=1", "data.workers=0", "data.root=/elsewhere", "sweep.name=x"))
    assert continued is not None
    assert continued.resume == str(run)
    with pytest.raises(ValueError, match=r"trainer\.max_steps: 2000 there, 7 now") as refused:
        sweep.job(composed("seed=1", "trainer.max_steps=7", "loss=cross_entropy"))
    assert "loss.criterion._target_: bisenet.losses.OhemCrossEntropy there" in str(refused.value)
    assert "data.root" not in str(refused.value)
    with pytest.raises(ValueError, match="resume: got 'a' in a multirun"):
        sweep.job(composed("resume=a"))
    (run / "results.json").write_text('{"split": "val", "protocols": {}}')
    assert sweep.job(composed("seed=1")) is None


def test_the_ablation_has_every_trick() -> None:
    """But for SyncBN, which a single device does not have."""
    tricks = {file.stem for file in Path(conf_dir(), "without").glob("*.yaml")} - {"sync_bn"}
    params: Any = OmegaConf.load(Path(conf_dir(), "experiment", "ablation_tricks.yaml"))
    found = re.findall(r"\[([^]]*)\]", re.sub(r"\s", "", params.hydra.sweeper.params.without))
    groups = [set(group.split(",")) - {""} for group in found]
    one_out, one_in = [{trick} for trick in tricks], [tricks - {trick} for trick in tricks]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, [set(), *one_out, *one_in, tricks]))


def begin(*overrides: str) -> list[str]:
    """What happens before the jobs of a multirun, in the working directory; the jobs that it has planned."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_configuration("train", list(overrides), run_mode=RunMode.MULTIRUN)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sweep.SweepCallback, "folder", None)
            try:
                sweep.SweepCallback().on_multirun_start(cfg)
            except SystemExit as stop:
                raise ValueError(str(stop)) from stop
            assert sweep.SweepCallback.folder is not None
            return list(OmegaConf.load(sweep.SweepCallback.folder / "sweep.yaml").jobs)


def test_seeds_can_be_added_to_any_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "sweeps" / "x"
    assert begin("seed=1", "sweep.name=x") == ["seed=1"]
    (folder / "seed=1").mkdir()
    (folder / "seed=1" / "provenance.json").touch()  # it has begun
    assert begin("seed=1,2,3", "sweep.name=x") == ["seed=1", "seed=2", "seed=3"]
    for seed in (2, 3):
        (folder / f"seed={seed}").mkdir()
    assert begin("seed=4", "sweep.name=x") == ["seed=1", "seed=2", "seed=3", "seed=4"]
    assert begin("seed=1", "repeat=2", "sweep.name=x")[3:] == ["repeat=1,seed=1", "repeat=2,seed=1"]
    with pytest.raises(ValueError, match=r"loss\.aux_weight: 1\.0 there, 0\.5 now"):
        begin("seed=1", "loss.aux_weight=0.5", "sweep.name=x")
    with pytest.raises(ValueError, match="repeat: got 0, accepted: an integer of at least 1"):
        begin("repeat=0", "sweep.name=x")


def test_jobs_that_never_were_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped extension, which Hydra refuses after it was planned; and names with a plus."""
    monkeypatch.chdir(tmp_path)
    assert begin("seed=1,2", "sweep.name=x") == ["seed=1", "seed=2"]
    for seed in (1, 2):
        (tmp_path / "outputs" / "sweeps" / "x" / f"seed={seed}").mkdir()
        (tmp_path / "outputs" / "sweeps" / "x" / f"seed={seed}" / "provenance.json").touch()
    assert "model=bisenetv9,seed=1" in begin("seed=1,2", "model=bisenetv2,bisenetv9", "sweep.name=x")
    assert begin("seed=1,2", "sweep.name=x") == ["seed=1", "seed=2"]
    assert begin("+model.network.dropout=0.1,0.2", "sweep.name=plus") == [
        "+model.network.dropout=0.1", "+model.network.dropout=0.2"]  # fmt: skip


def test_an_experiment_of_ones_own_changes_the_runs_that_have_the_trick(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "short.yaml").write_text(
        "# @package _global_\nscheduler: {warmup_steps: 50}\nloss: {criterion: {min_kept: 0.1}}\n"
    )
    said = [f"hydra.searchpath=[{tmp_path}]", "experiment=[camvid_small,short]"]
    full, warmup, ohem = (composed(*said, f"without=[{trick}]") for trick in ("", "warmup", "ohem"))
    assert [cfg.scheduler.warmup_steps for cfg in (full, warmup, ohem)] == [50, 0, 50]
    assert [cfg.loss.criterion.min_kept for cfg in (full, warmup, ohem)] == [0.1, 0.1, 1.0]
    assert composed("debug=fast", "without=[warmup]").scheduler.warmup_steps == 0  # nor does debugging turn it on


def multirun(cwd: Path, *overrides: str, **environment: Any) -> Any:
    return command("train", "-m", *FAST, *overrides, cwd=cwd, **environment)


def test_a_failed_job_costs_the_others_nothing(scenes: list[str], tmp_path: Path) -> None:
    """Two deterministic repetitions, each good and impossible; then once more, and once more otherwise."""
    overrides = [*scenes, "loss.criterion.threshold=0.7,3", "repeat=2", "trainer.deterministic=true", "sweep.name=two"]
    folder = tmp_path / "outputs" / "sweeps" / "two"
    done = multirun(tmp_path, *overrides)
    assert done.returncode == 1
    assert "job loss.criterion.threshold=3,repeat=2 failed: loss.criterion.threshold: got 3" in done.stdout
    good = [folder / f"loss.criterion.threshold=0.7,repeat={repeat}" for repeat in (1, 2)]
    assert results(good[0]) == results(good[1])
    weights = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in good]
    assert same(*weights)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["missing"].keys() == {f"loss.criterion.threshold=3,repeat={repeat}" for repeat in (1, 2)}
    assert summary["protocols"]["ss"]["groups"]["0.7"]["n"] == 1
    assert "not finished" in done.stdout

    before = [(file, file.stat().st_mtime_ns) for run in good for file in run.rglob("*") if file.suffix != ".log"]
    again = multirun(tmp_path, *overrides)
    assert again.stdout.count("is finished already") == 2
    assert [
        (file, file.stat().st_mtime_ns) for run in good for file in run.rglob("*") if file.suffix != ".log"
    ] == before
    assert json.loads((folder / "summary.json").read_text()) == summary

    changed = multirun(tmp_path, *overrides, "optimizer.lr=0.3")
    assert changed.returncode == 1
    assert "optimizer.lr: 0.005 there, 0.3 now" in changed.stderr
    assert len(list(folder.glob("*/"))) == 4


def test_a_mistake_that_stopped_all_jobs_can_be_corrected(tmp_path: Path) -> None:
    """Nothing was trained, so nothing binds; the second command is as wrong, to be answered at once."""
    for threshold in ("3", "4"):
        done = multirun(tmp_path, "seed=1,2", "sweep.name=wrong", f"loss.criterion.threshold={threshold}")
        assert done.returncode == 1
        assert f"job seed=2 failed: loss.criterion.threshold: got {threshold}" in done.stdout
    stored = OmegaConf.load(tmp_path / "outputs" / "sweeps" / "wrong" / "seed=1" / ".hydra" / "config.yaml")
    assert OmegaConf.select(stored, "loss.criterion.threshold") == 4


@pytest.mark.slow
def test_a_killed_sweep_ends_as_an_undisturbed_one(scenes: list[str], tmp_path: Path) -> None:
    """Five seeds, SIGKILL between two checkpoints of the third."""
    summaries = []
    for name in ("calm", "killed"):
        overrides = [*scenes, CALLBACK, "seed=1,2,3,4,5", f"sweep.name={name}"]
        folder = tmp_path / "outputs" / "sweeps" / name
        if name == "killed":
            done = multirun(tmp_path, *overrides, KILL_AT="batch_end:5", KILL_RUN="seed=3")
            assert done.returncode == -signal.SIGKILL
            assert {run.name for run in folder.glob("seed=*")} == {"seed=1", "seed=2", "seed=3"}
            assert not (folder / "seed=3" / "results.json").exists()
        done = multirun(tmp_path, *overrides)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("is finished already") == (2 if name == "killed" else 0)
        summaries.append((folder / "summary.json").read_bytes())
        assert f"{json.loads(summaries[-1])['protocols']['ss']['groups']['all runs']['mean']:.2f}" in done.stdout
    assert summaries[0] == summaries[1]
    for seed in range(1, 6):
        calm, killed = (tmp_path / "outputs" / "sweeps" / name / f"seed={seed}" for name in ("calm", "killed"))
        assert results(calm) == results(killed)
        assert rows(calm) == rows(killed)
        ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (calm, killed))
        assert same(ours["state_dict"], theirs["state_dict"])
        assert same(ours["optimizer_states"], theirs["optimizer_states"])


@pytest.mark.slow
def test_a_sweep_is_one_group_of_wandb_with_its_summary(scenes: list[str], tmp_path: Path) -> None:
    done = multirun(tmp_path, *scenes, "without=[],[ohem,flip]", "seed=1", "sweep.name=x", "logger=[csv,wandb]")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "outputs" / "sweeps" / "x"
    jobs = {name: read_wandb(folder / f"seed=1,without={name}") for name in ("nothing", "ohem+flip")}
    assert [list(job.run.tags) for job in jobs.values()] == [
        ["seed=1", "without=[]"], ["seed=1", "without=[ohem,flip]"]]  # fmt: skip
    assert jobs["ohem+flip"].config["loss"]["criterion"]["threshold"] == 1.0
    summary = read_wandb(folder)
    assert {run.run.run_group for run in (*jobs.values(), summary)} == {"x"}
    assert (summary.run.display_name, list(summary.run.tags), summary.exit_code) == ("summary", ["summary"], 0)
    table = json.loads((summary.folder / summary.last("summary/Groups, ss")["path"]).read_text())
    assert [row[:2] for row in table["data"]] == [["full recipe", "1"], ["without flip+ohem", "1"]]
    assert summary.last("summary/figure")["count"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local", "hydra.launcher.timeout_min=10"]]
)
def test_launchers_run_and_continue_a_sweep(launcher: list[str], scenes: list[str], tmp_path: Path) -> None:
    name, *options = launcher
    pytest.importorskip(f"hydra_plugins.hydra_{name.removesuffix('_local')}_launcher", reason="needs bisenet[sweeps]")
    overrides = [*scenes, "seed=1,2", "sweep.name=x", f"hydra/launcher={name}", *options]
    done = multirun(tmp_path, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = tmp_path / "outputs" / "sweeps" / "x" / "summary.json"
    assert json.loads(summary.read_text())["protocols"]["ss"]["groups"]["all runs"]["n"] == 2
    before = summary.read_bytes()
    assert multirun(tmp_path, *overrides).returncode == 0
    assert summary.read_bytes() == before
