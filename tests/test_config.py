"""Configuration: every shipped option composes and builds, every mistake is named before anything expensive."""

import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from bisenet import config

ROOT = Path(__file__).parents[1]
CONF = Path(config.conf_dir())
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir())
OPTIONS = [f"{p.parent.name}={p.stem}" for p in sorted(CONF.glob("*/*.yaml"))]
IN_RUN_DIR = {  # keys that Hydra itself fills in when a job runs
    "logger=tensorboard": "logger.tensorboard.save_dir",
    "logger=wandb": "logger.wandb.save_dir",
    "debug=profile": "callbacks.profile.folder",
}
BASES = {"optimizer=groups"}  # a fragment that the group's options share


def composed(*overrides: str, name: str = "train") -> DictConfig:
    config.register()
    with initialize_config_dir(CONF.as_posix(), version_base="1.3"):
        return compose(name, list(overrides))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from values(value, f"{path}.{key}" if path else key)
    else:
        yield path, node


@pytest.mark.parametrize("option", sorted(set(OPTIONS) - BASES))
def test_every_option_composes_to_a_sound_configuration(option: str) -> None:
    cfg = composed(option)
    if option in IN_RUN_DIR:
        OmegaConf.update(cfg, IN_RUN_DIR[option], "out")
    config.check(cfg)
    config.check_targets(cfg, {"model.network": ("n_classes",), "optimizer.algorithm": ("params",)})
    assert config.plain(config.restore(config.plain(cfg))) == config.plain(cfg)


def test_every_group_has_an_option() -> None:
    assert set(GROUPS) == {option.split("=")[0] for option in OPTIONS}


def test_every_experiment_says_what_it_is() -> None:
    for file in (CONF / "experiment").glob("*.yaml"):
        first, *header = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert first == "# @package _global_", file.name
        assert any(f"experiment={file.stem}" in line or "demo.sh" in line for line in header), file.name


@pytest.mark.parametrize(
    ("override", "named", "accepted"),
    [
        ("loss.threshold=3", "loss.threshold: got 3.0", "(0, 1]"),
        ("loss.min_kept=abc", "loss.min_kept: got 'abc'", "count"),
        ("loss.min_kept=1.5", "loss.min_kept: got 1.5", "[0, 1]"),
        ("loss.min_kept=true", "loss.min_kept: got True", "count"),
        ("loss.name=dice", "loss.name: got 'dice'", "ohem | cross_entropy"),
        ("data.batch_size=0", "data.batch_size: got 0", "at least 1"),
        ("data.format=voc", "data.format: got 'voc'", "synthetic | cityscapes | camvid | listed"),
        ("data.format=listed", "data.lists", "missing: ['train', 'val']"),
        ("data.std=[0.1,0,0.1]", "data.std: got [0.1, 0.0, 0.1]", "(0, 1]"),
        ("data.synthetic.size=[3]", "data.synthetic.size: got [3]", "at least 64"),
        ("augment.scale=[2,0.5]", "augment.scale: got [2.0, 0.5]", "low <= high"),
        ("augment.crop=[16,16]", "augment.crop: got [16, 16]", "at least 32"),
        ("optimizer.groups.decay.kind=bias", "optimizer.groups.decay.kind: got 'bias'", "weight | norm_bias | any"),
        ("optimizer.groups.decay.layers=head", "optimizer.groups.decay.layers: got 'head'", "list"),
        ("scheduler.warmup_steps=2000", "scheduler.warmup_steps: got 2000", "fewer than trainer.max_steps"),
        ("optimizer.algorithm.lr=abc", "optimizer.algorithm.lr: got 'abc'", "at least 0"),
        ("optimizer.algorithm.lr=-1", "optimizer.algorithm.lr: got -1", "at least 0"),
        ("loss.class_weights=[1,-1]", "loss.class_weights: got [1, -1]", "enet"),
        ("loss.class_weights=median", "loss.class_weights: got 'median'", "enet"),
        ("loss.name=cross_entropy", "loss.threshold: got 0.7", "only loss=ohem"),
        ("loss.threshold=null", "loss.threshold: got None", "(0, 1]"),
        ("trainer.accumulate=3", "data.batch_size: got 4", "trainer.accumulate, which is 3"),
        ("trainer.gradient_clip=0", "trainer.gradient_clip: got 0.0", "positive"),
        ("trainer.ema_decay=1", "trainer.ema_decay: got 1.0", "(0, 1)"),
        ("data.limit=0", "data.limit: got 0", "at least 1"),
        ("data.synthetic.scene=sea", "data.synthetic.scene: got 'sea'", "street | shapes"),
        ("trainer.max_steps=0", "trainer.max_steps: got 0", "at least 1"),
        ("seed=-1", "seed: got -1", "[0, 2**32)"),
        ("protocol.scales=[]", "protocol.scales: got []", "at least one"),
        ("+model.foo=3", "unknown key model.foo", "name, network, output_layers"),
        ("+data.synthetic.foo=3", "unknown key data.synthetic.foo", "train, val, test"),
        ("+foo=3", "unknown key foo", "name, seed"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_accepted(override: str, named: str, accepted: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        config.check(composed(override))
    assert named in str(raised.value)
    assert accepted in str(raised.value)


@pytest.mark.parametrize(
    ("override", "named", "accepted"),
    [
        ("+model.network.depth=3", "model.network", "width_multiplier"),
        ("model.network._target_=bisenet.networks.Nothing", "model.network._target_", "dotted path"),
        ("+optimizer.algorithm.beta=3", "optimizer.algorithm", "momentum"),
        ("+callbacks.mine={_target_: lightning.pytorch.callbacks.EarlyStopping}", "callbacks.mine", "monitor"),
        ("+callbacks.mine.patience=3", "callbacks.mine", "_target_"),
        ("+callbacks.mine={_target_: no.such.module}", "callbacks.mine._target_", "dotted path"),
    ],
)
def test_targets_are_bound_to_the_signature(override: str, named: str, accepted: str) -> None:
    cfg = composed(override)
    config.check(cfg)
    with pytest.raises(ValueError, match=named) as raised:
        config.check_targets(cfg, {"model.network": ("n_classes",), "optimizer.algorithm": ("params",)})
    assert accepted in str(raised.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.max_stepz=3", "trainer.max_stepz: trainer takes: max_steps"),
        ("trainer.max_steps=abc", "trainer.max_steps: accepted: int"),
        ("model=foo", "bisenetv1_diss"),
    ],
)
def test_a_typo_on_the_command_line_is_answered_at_once(override: str, named: str) -> None:
    started = time.perf_counter()
    done = run("scripts/train.py", override)
    assert done.returncode != 0
    assert named in done.stderr
    assert "torch" not in done.stderr
    assert time.perf_counter() - started < 10  # about a second on an idle machine; importing torch alone takes three


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_do_not_import_torch(arguments: list[str]) -> None:
    program = f"""
import runpy, sys
sys.argv = ["train.py", *{arguments}]
try:
    runpy.run_path("scripts/train.py", run_name="__main__")
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert "bisenetv2" in done.stdout


def test_seeds_follow_seed_unless_given() -> None:
    cfg = composed("seed=7", "data_seed=3")
    assert (cfg.seed, cfg.init_seed, cfg.data_seed) == (7, 7, 3)


@given(st.integers(-3, 10**6), st.integers(-3, 10**6))
def test_a_configuration_is_accepted_exactly_when_its_steps_can_work(max_steps: int, warmup_steps: int) -> None:
    cfg = composed(f"trainer.max_steps={max_steps}", f"scheduler.warmup_steps={warmup_steps}")
    if max_steps >= 1 and 0 <= warmup_steps < max_steps:
        config.check(cfg)
    else:
        with pytest.raises(ValueError, match=r"trainer.max_steps|scheduler.warmup_steps"):
            config.check(cfg)


def test_recipes_are_the_published_ones() -> None:
    """The table of recipes, one row for each: crop, scale, rate, steps, warmup ratio, OHEM, precision."""
    rows = {
        "cityscapes_bisenetv1": ([1024, 1024], [0.75, 2.0], 1e-2, 80000, 0.1, 0.0625, "fp16"),
        "cityscapes_bisenetv2": ([512, 1024], [0.25, 2.0], 5e-3, 150000, 0.1, 0.0625, "fp16"),
        "cityscapes_bisenetv2_older": ([512, 1024], [0.25, 2.0], 5e-2, 151000, 0.1, 0.0625, "fp16"),
        "cityscapes_bisenetv1_older": ([1024, 1024], [0.75, 1, 1.25, 1.5, 1.75, 2], 1e-2, 80000, 1e-3, 524288, "fp32"),
        "cityscapes_bisenetv1_diss": ([1024, 1024], [0.75, 1, 1.25, 1.5, 1.75, 2], 1e-2, 80000, 1e-3, 524288, "fp32"),
    }
    for experiment, row in rows.items():
        cfg = composed(f"experiment={experiment}")
        found = (cfg.augment.crop, cfg.augment.scale, cfg.optimizer.algorithm.lr, cfg.trainer.max_steps,
                 cfg.scheduler.warmup_ratio, cfg.loss.min_kept, cfg.precision.name)  # fmt: skip
        assert found == row, experiment
        assert (cfg.optimizer.algorithm.momentum, cfg.optimizer.algorithm.weight_decay) == (0.9, 5e-4)
        assert (cfg.loss.threshold, cfg.loss.aux_weight, cfg.scheduler.power, cfg.augment.flip) == (0.7, 1, 0.9, 0.5)
        assert (cfg.scheduler.warmup, cfg.scheduler.warmup_steps, cfg.data.batch_size) == ("exponential", 1000, 16)
    assert composed("experiment=cityscapes_bisenetv1_diss").model.network.structure == "one_path"
    assert composed("experiment=cityscapes_bisenetv2_older").model.output_layers == []


def test_resuming_takes_the_stored_configuration(tmp_path: Path) -> None:
    stored = composed("seed=5", "trainer.max_steps=7", "scheduler.warmup_steps=2")
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(stored, tmp_path / ".hydra" / "config.yaml")
    cfg = composed(f"resume={tmp_path}", "data.workers=0")
    resumed = config.resumed(cfg, [f"resume={tmp_path}", "data.workers=0"])
    assert (resumed.seed, resumed.trainer.max_steps, resumed.data.workers) == (5, 7, 0)
    assert resumed.resume == str(tmp_path)
    with pytest.raises(ValueError, match="resume: seed may not change"):
        config.resumed(cfg, [f"resume={tmp_path}", "seed=6"])
    with pytest.raises(ValueError, match="resume: got 'nowhere'"):
        config.resumed(composed("resume=nowhere"), ["resume=nowhere"])


def test_two_runs_in_the_same_second_have_their_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = []
    for _ in range(3):
        folders.append(config._run_dir(None, "x"))
        Path(folders[-1]).mkdir(parents=True)
    assert all(a != b for a, b in pairwise(folders))
