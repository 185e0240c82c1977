"""The command line: every shipped option composes and builds, every mistake is named before anything expensive."""

import os
import random
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import PYTHONPATH, ROOT, command, composed
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

from bisenet import cli, conf_dir, experiment, launch, report
from bisenet.data import SegmentationDataModule

CONF = Path(conf_dir())
OPTIONS = [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml"))]
NEEDED = {"data=listed": ["data.root=mine", "data.classes=camvid"]}
CONF_GROUPS = {p.name for p in CONF.iterdir() if p.is_dir()}
LISTS = ("protocol", "callbacks", "logger", "without")


@cache
def recipe(name: str) -> DictConfig:
    """Not to be written to."""
    return composed(f"experiment={name}")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_builds(option: str, tmp_path: Path) -> None:
    """Everything but loggers, which write when they are built."""
    group, _, name = option.partition("=")
    default = "default," if group == "callbacks" and name != "default" else ""
    chosen = f"{group}=[{default}{name}]" if group in LISTS else option
    cfg = composed(
        chosen, *NEEDED.get(option, []), f"run_dir={tmp_path}", "trainer.accelerator=cpu", "trainer.devices=1"
    )
    OmegaConf.to_container(cfg, resolve=True)
    data = experiment.build_data(cfg)
    module = experiment.build_module(cfg, data, experiment.build_segmenter(cfg, data))
    module.configure_optimizers()
    if group in ("callbacks", "trainer", "strategy", "precision", "debug", "experiment"):
        cfg.logger = {}
        experiment.build_trainer(cfg, None)


def test_every_experiment_says_what_it_is() -> None:
    for file in (CONF / "experiment").glob("*.yaml"):
        first, *header = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert first == "# @package _global_", file.name
        assert any(f"experiment={file.stem}" in line or "demo.sh" in line for line in header), file.name
        assert any(word in line for line in header for word in ("mIoU", "ot run", "README")), file.name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("trainer.max_stepz=3", "'trainer.max_stepz': did you mean max_steps? keys of trainer: _target_, accelerator"),
        ("modle=bisenetv1", "'modle': did you mean model? keys of the configuration: model, data"),
        ("loss.criterion.thresold=3", "did you mean threshold? keys of loss.criterion: _target_, threshold"),
        ("model.network.widht=3", "did you mean width_multiplier?"),
        ("lr=3", "did you mean optimizer.lr? keys of the configuration: model, data"),
        ("loss.treshold=3", "did you mean loss.criterion.threshold? keys of loss: _target_, aux_weight, criterion"),
        ("loss=cross_entropy loss.criterion.min_kept=3", "keys of loss.criterion: _target_, class_weights, impl"),
        ("model=bisenetv3", "did you mean bisenetv2? options of model: bisenetv1, bisenetv1_diss"),
        ("experiment=demi", "did you mean demo?"),
        ("optimizer.algorithm.lr=3", "optimizer.algorithm.lr has another name now: optimizer.lr"),
        ("trainer.val_interval=3", "has another name now: trainer.val_check_interval"),
        ("loss.threshold=0.5", "has another name now: loss.criterion.threshold"),
        ("data.synthetic.size=[3,4]", "has another name now: data.dataset.size"),
        ("~callbacks.nothing", "'callbacks.nothing' does not exist"),
        ("seed=[1", "seed=[1"),
        ("name=../mine", "name: got '../mine', accepted: letters, digits"),
        ("resume=nowhere", "resume: got 'nowhere', accepted: the directory of a run"),
        ("callbacks=null", "callbacks: got null, accepted: an option, a list of them, or [] for none: default"),
        ("without=[null]", "without: got [null], accepted"),
        ("+experiment=demo", "accepted: experiment=<option>"),
        ("+seed=3", "'seed=3'"),
        ("name=über", "name=über: "),
        ("hydra.output_subdir=null", "hydra.output_subdir: got None, accepted: .hydra"),
        ("hydra.job.chdir=true", "hydra.job.chdir: got true, accepted: false"),
        ("-m hydra.sweep.subdir=x seed=1", "hydra.sweep.subdir: got 'x'"),
        ("--multirun --cfg job", "Only one of --run, --multirun, --cfg"),
        ("--config-dir mine experiment=stray", "experiment/stray.yaml changes nothing, accepted: a file with the line"),
        ("--config-dir mine experiment=on", "name: got True, accepted: letters"),
    ],
)
def test_a_mistake_is_answered_at_once_by_one_line(arguments: str, named: str, tmp_path: Path) -> None:
    """Before torch is imported, which takes seconds."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "stray.yaml").write_text("seed: 4\n")
    (tmp_path / "mine" / "experiment" / "on.yaml").write_text("# @package _global_\nname: on\n")
    done = command("train", *arguments.split(" "), cwd=tmp_path, bare=True)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 2  # the answer, and how to see more


def test_the_traceback_is_there_for_those_who_ask() -> None:
    program = [sys.executable, "-m", "bisenet.cli", "train", "trainer.max_stepz=3"]
    environment = os.environ | {"HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["loss.criterion.threshold=3"], "loss.criterion.threshold: got 3, accepted: a probability"),
        (["model.network.generation=new"], "model.network: generation='new'"),
        (["+model.network.depth=3"], "width_multiplier"),
        (["+optimizer.beta=3"], "accepted: lr, momentum"),
        (["optimizer.lr=-1"], "optimizer: Invalid learning rate: -1"),
        (["scheduler.warmup_steps=2000"], "scheduler.warmup_steps: got 2000, accepted: fewer than the 2000 steps"),
        (["data.batch_size=0"], "data.batch_size: got 0, accepted: an integer of at least 1"),
        (["augment.crop.scale=[2,0.5]"], "augment.crop.scale: got"),
        (["protocol.ss.merge=max"], "merge: got 'max'"),
        (["model.network._target_=bisenet.networks.Nothing"], "bisenet.networks.Nothing"),
        (["parameter_groups.decay.kind=bias"], "parameter_groups.decay.kind: got 'bias'"),
        (["model.output_layers=[heads]"], "parameter_groups.output_decay.layers: no layers ['heads']"),
        (["+trainer.max_stepz=3"], "trainer: lightning.pytorch.Trainer"),
        (["callbacks.last.every_n_steps=0"], "callbacks.last.every_n_steps: got 0"),
        (["loss.criterion.class_weights=[1,2]"], "loss.criterion.class_weights: got [1, 2]"),
        (["protocol=[]"], "protocol: got none"),
        (["callbacks=[]", "debug=fast"], "callbacks.last: got {'every_n_steps': 2}, accepted: a node with a _target_"),
        (["protocol.ss=x"], "protocol.ss: got x, accepted: a node with a _target_"),
        (["loss.criterion=x"], "loss.criterion: got 'x', accepted: (logits"),
        (["finetune_from=3"], "finetune_from: "),
        (["logger.csv=true"], "logger.csv: got True"),
        (["seed=-1"], "seed: got -1"),
        (["seed=1 2"], "seed: got 1 2"),
        (["data.batch_size=1"], "a batch of 1 image in training"),
        (
            ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "model=bisenetv1"],
            "a batch of 1 image in training",
        ),
        (["model.pretrained=nowhere.pth"], "model.pretrained"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_before_any_data_is_read(
    overrides: list[str], named: str, tmp_path: Path
) -> None:
    cfg = composed(*overrides, f"run_dir={tmp_path}", "data=cityscapes" if "data." not in overrides[0] else "seed=1",
                   "trainer.accelerator=cpu")  # fmt: skip
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        experiment.train(cfg)
    assert named in str(raised.value)
    assert not (tmp_path / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train", "--help"], "bisenetv2"),
        (["train", "--cfg", "job"], "bisenetv2"),
        (["predict", "--help"], "label_ids"),
        (["check-data", "--cfg", "job"], "synthetic"),
        (["--help"], "compare"),
    ],
)
def test_help_and_cfg_do_not_import_torch(arguments: list[str], shown: str) -> None:
    done = command(*arguments, cwd=ROOT, bare=True)
    assert shown in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "compare", "check_data", "benchmark"])
def test_a_script_does_what_the_command_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = Mock()
    monkeypatch.setattr(cli, name, called)
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    called.assert_called_once()


def test_every_name_of_an_earlier_version_leads_to_one_that_there_is() -> None:
    cfg = composed("callbacks=[default,ema]", "data=camvid")
    for new in cli.RENAMED.values():
        key = new.split(" ")[-1] if "callbacks.ema" in new else new.split(" ")[0].lstrip("~")
        assert key in CONF_GROUPS or OmegaConf.select(cfg, key, default=cfg) is not cfg, new


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["protocol=[ss]"], "ss"),
        (["protocol=[mscf]", "data=camvid"], "mscf"),  # the window belongs to the data
        (["protocol=[ss]", "data=ade20k"], "ss"),  # so does the size that images are brought to
        (["protocol.ss.scales=[0.5]"], "ss-scales-0.5"),
        (["protocol.ss.short_side=512"], "ss-short_side-512"),
        (["protocol=[mscf]", "protocol.mscf.flip=false", "protocol.mscf.stride=0.5"], "mscf-flip-false-stride-0.5"),
        (["protocol=[ssc]", "protocol.ssc.window=[128,64]"], "ssc-window-128-64"),
    ],
)
def test_a_changed_preset_does_not_pass_under_its_name(overrides: list[str], name: str) -> None:
    cfg = composed(*overrides, "callbacks=[default,early_stopping]")
    assert list(cfg.protocol) == [name]
    assert cfg.callbacks.early_stopping.monitor == cfg.callbacks.best.monitor == f"val/{name}/miou"


def test_learning_by_heart_takes_any_data_where_it_lies() -> None:
    for option in ("data=cityscapes", "data=listed"):
        needed = NEEDED.get(option, [])
        assert composed("debug=overfit", option, *needed).data.root == composed(option, *needed).data.root
    demo = composed("experiment=demo", "debug=overfit").data
    assert (demo.root, demo.dataset.train, demo.dataset.scene) == ("data/shapes", 8, "shapes")


@pytest.mark.parametrize("trick", sorted(p.stem for p in (CONF / "without").glob("*.yaml")))
def test_every_trick_is_on_in_some_recipe_and_off_without_it(trick: str) -> None:
    def leaves(node: Any, path: str = "") -> dict[str, Any]:
        if not isinstance(node, dict):
            return {path: node}
        return {k: v for key, value in node.items() for k, v in leaves(value, f"{path}.{key}".lstrip(".")).items()}

    off = leaves(OmegaConf.to_container(OmegaConf.load(CONF / "without" / f"{trick}.yaml")))
    without = composed("experiment=cityscapes_bisenetv2", f"without=[{trick}]")
    assert all(OmegaConf.select(without, key) == value for key, value in off.items())
    assert any(OmegaConf.select(recipe("cityscapes_bisenetv2"), key) != value for key, value in off.items())


RECIPES = {
    "cityscapes_bisenetv1": [[1024, 1024], [0.75, 2], 1e-2, 5e-4, 80000, 0.1, 0.0625, "16-mixed"],
    "cityscapes_bisenetv2": [[512, 1024], [0.25, 2], 5e-3, 5e-4, 150000, 0.1, 0.0625, "16-mixed"],
    "cityscapes_bisenetv2_older": [[512, 1024], [0.25, 2], 5e-2, 5e-4, 151000, 0.1, 0.0625, "16-mixed"],
    **{f"cityscapes_bisenetv1_{name}": [[1024, 1024], [0.75, 1, 1.25, 1.5, 1.75, 2], 1e-2, 5e-4, 80000, 1e-3, 524288,
                                        "32-true"] for name in ("older", "diss")},
    "coco_stuff_bisenetv1": [[512, 512], [0.5, 2], 1e-2, 1e-4, 90000, 0.1, 0.0625, "16-mixed"],
    "coco_stuff_bisenetv2": [[640, 640], [0.75, 2], 5e-3, 1e-4, 180000, 0.1, 0.0625, "16-mixed"],
    "ade20k_bisenetv1": [[512, 512], [0.5, 2], 4e-2, 1e-4, 40000, 0.1, 0.0625, "16-mixed"],
    "ade20k_bisenetv2": [[640, 640], [0.5, 2], 5e-3, 1e-4, 160000, 0.1, 0.0625, "16-mixed"],
}  # fmt: skip
"""Crop, scale, learning rate, weight decay, steps, warmup ratio, OHEM's least, precision: configs/ of the reference."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name: str) -> None:
    cfg = recipe(name)
    assert RECIPES[name] == [
        cfg.augment.crop.size, cfg.augment.crop.scale, cfg.optimizer.lr, cfg.optimizer.weight_decay,
        cfg.trainer.max_steps, cfg.scheduler.warmup_ratio, cfg.loss.criterion.min_kept, cfg.trainer.precision
    ]  # fmt: skip
    assert (cfg.optimizer.momentum, cfg.loss.criterion.threshold, cfg.loss.aux_weight) == (0.9, 0.7, 1)
    assert (cfg.scheduler.power, cfg.scheduler.warmup, cfg.scheduler.warmup_steps) == (0.9, "exponential", 1000)
    assert (cfg.augment.flip.p, cfg.data.batch_size) == (0.5, 16)
    assert name.startswith(f"{cfg.data.classes}_{cfg.model.name}")
    assert (cfg.model.network.get("structure") == "one_path") == ("diss" in name)
    assert (cfg.model.output_layers == []) == (name == "cityscapes_bisenetv2_older")


def test_recipes_of_cityscapes_differ_in_more() -> None:
    """Jitter, its pivot, SyncBN, the first transform, what is done with an image too small, mean red, protocols."""
    now, older = ["crop", "pad", 0.3257], ["jitter", "enlarge", 0.485, ["ss", "mscf_older"]]
    every = ["ss", "ssc", "msf", "mscf"]
    rows = {
        "bisenetv1": [0.4, 74, False, *now, every],
        "bisenetv2": [0.4, 74, True, *now, every],
        "bisenetv2_older": [0.4, 74, False, *now, ["ss"]],
        "bisenetv1_older": [0.5, None, True, *older],
        "bisenetv1_diss": [0.5, None, True, *older],
        "bisenetv2_paper": [0.0, 74, True, *now, ["half"]],
    }
    for name, row in rows.items():
        cfg = recipe(f"cityscapes_{name}")
        jitter = cfg.augment.jitter
        assert jitter.brightness == jitter.contrast == jitter.saturation
        found = [jitter.brightness, jitter.pivot, cfg.trainer.sync_batchnorm, next(iter(cfg.augment)),
                 cfg.augment.crop.too_small, cfg.data.mean[0], list(cfg.protocol)]  # fmt: skip
        assert found == row, name


def test_recipes_say_which_weights_they_start_from() -> None:
    for file in (CONF / "experiment").glob("*.yaml"):
        pretrained = recipe(file.stem).model.pretrained
        if file.stem.split("_")[0] not in ("cityscapes", "coco", "ade20k") or file.stem == "cityscapes_bisenetv2_older":
            assert pretrained is None, file.stem
        else:
            assert Path(pretrained).name == ("backbone_v2.pth" if "v2" in file.stem else "resnet18-f37072fd.pth")
    assert composed("experiment=cityscapes_bisenetv2", "model.pretrained=null").model.pretrained is None
    assert composed("experiment=cityscapes_bisenetv2", "model=bisenetv2_large").model.pretrained is None


def test_resuming_takes_the_stored_configuration_and_names_what_may_not_change(tmp_path: Path) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    OmegaConf.save(composed("seed=5"), tmp_path / "run" / ".hydra" / "config.yaml")
    done = command("train", "resume=run", "trainer.max_steps=10", cwd=tmp_path)
    assert "ValueError: resume: trainer.max_steps may not change; accepted beside resume: data.root" in done.stderr
    done = command("train", "resume=run", "hydra.run.dir=elsewhere", cwd=tmp_path)
    assert "where the run that is resumed lies" in done.stderr


class Built(BaseException):
    """Ends a command where its training would begin."""


def built(*_: Any, **__: Any) -> None:
    raise Built


VALUES = ["null", "-1", "0", "1", "2.5", "1000000000", "1e40", "nan", "-inf", "true", "on", "[]", "[1,2]", "[null,a]",
          "{a: 1}", "''", "'ü\\'\"='", "a b", "${nothing}", "${seed", "../x", "x" * 300, "auto", "cpu", "$", "ü", "1,2",
          "???", "{_target_: os.getcwd}", "{_target_: no.thing}"]  # fmt: skip


def random_override(draw: random.Random, keys: list[str]) -> str:
    """One value in two is of a wrong kind; the others are misspelt, deleted, added, or no override at all."""
    key, value = draw.choice(keys), draw.choice(VALUES)
    place = draw.randrange(len(key))
    misspelt = key[:place] + draw.choice("aéz_.@-/ ") + key[place:]
    group, option = draw.choice(OPTIONS).split("=")
    others = [f"{misspelt}={value}", f"~{key}", f"~{key}={value}", f"+{key}={value}", f"++{key}={value}",
              f"+{key}.extra={value}", f"++{key}.extra={value}", f"{group}={option}", f"{group}=[{option}]",
              f"{group}={value}", f"~{group}", f"+{group}={option}", f"{group}@{key}={option}",
              "".join(draw.choices("abc=.[]{}~+,'$", k=6))]  # fmt: skip
    return draw.choice([f"{key}={value}", draw.choice(others)])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_any_override_ends_in_one_line_or_in_what_builds(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never in a trace. 20 for each seed; nothing is read, drawn or trained."""

    def keys_of(node: Any, path: str = "") -> list[str]:
        inner = node.items() if isinstance(node, dict) else ()
        return [path] * bool(path) + [k for key, value in inner for k in keys_of(value, f"{path}.{key}".lstrip("."))]

    keys, draw = keys_of(OmegaConf.to_container(composed())), random.Random(seed)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(
        "HYDRA_FULL_ERROR", ""
    )  # the command sets it, and Hydra disables loggers: undone for other tests
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    monkeypatch.setattr(Trainer, "fit", built)
    monkeypatch.setattr(launch, "run", built)
    monkeypatch.setattr(report, "provenance", dict)
    for name in ("prepare_data", "setup"):
        monkeypatch.setattr(SegmentationDataModule, name, lambda self: None)
    wrong = {}
    for number in range(20):
        override = random_override(draw, keys)
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # which would disable loggers of other tests
        given = ["trainer.accelerator=cpu", f"hydra.run.dir={number}", override]
        monkeypatch.setattr(sys, "argv", ["bisenet train", *quiet, *given])
        try:
            cli.train_task()
            wrong[override] = "nothing was done"
        except Built:
            pass
        except SystemExit as answer:
            if str(answer).count("\n") != 1:
                wrong[override] = str(answer)
        except Exception as error:
            wrong[override] = repr(error)
    assert not wrong


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    done = command("train", "seed=7", "--cfg", "job", "optimizer.lr=3", "-p", "seed", cwd=tmp_path, bare=True)
    assert done.stdout.strip() == "7", done.stderr


def test_a_terminal_that_is_not_utf_8_shows_the_tables(tmp_path: Path) -> None:
    """As does the command from a checkout."""
    program = [sys.executable, ROOT / "scripts" / "compare.py", "values={a: [70.1,72.0], b: [74.1,71.0]}"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "71.05" in done.stdout, done.stderr


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @cli.entry("compare")
    def interrupted(_: DictConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["bisenet compare", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        interrupted()
    assert end.value.code == 130
