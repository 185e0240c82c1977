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
NEEDED = {"data=listed": ["data.root=mine", "data.classes=classes.yaml"]}
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
    cfg = composed(option, *NEEDED.get(option, []))
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
        ("trainer.accumulate=3", "data.batch_size: got 4", "a multiple of 3 (devices x trainer.accumulate)"),
        ("trainer.gradient_clip=0", "trainer.gradient_clip: got 0.0", "positive"),
        ("trainer.ema_decay=1", "trainer.ema_decay: got 1.0", "(0, 1)"),
        ("data.limit=0", "data.limit: got 0", "at least 1"),
        ("data.synthetic.scene=sea", "data.synthetic.scene: got 'sea'", "street | shapes"),
        ("trainer.max_steps=0", "trainer.max_steps: got 0", "at least 1"),
        ("seed=-1", "seed: got -1", "[0, 2**32)"),
        ("model.pretrained_sha256=F37072FD", "model.pretrained_sha256: got 'F37072FD'", "8 to 64 hexadecimal digits"),
        ("data.train_split=train+extra data.format=listed", "data.lists", "missing: ['extra', 'train', 'val']"),
        ("protocol.ss.scales=[]", "protocol.ss.scales: got []", "at least one"),
        ("protocol.ss.merge=max", "protocol.ss.merge: got 'max'", "mean_prob | log_prob | reference"),
        ("protocol.ss.window=[64,64]", "protocol.ss.window: got [64, 64]", "crop is false"),
        ("protocol.ss.stride=0", "protocol.ss.stride: got 0.0", "(0, 1]"),
        ("+protocol.ss.foo=3", "unknown key protocol.ss.foo", "scales, flip"),
        ("protocol=[]", "protocol: got {}", "at least one protocol"),
        ("data.eval_window=[3]", "data.eval_window: got [3]", "at least 32"),
        ("data.eval_short_side=0", "data.eval_short_side: got 0", "at least 32"),
        ("protocol.ss.short_side=8", "protocol.ss.short_side: got 8", "at least 32"),
        ("evaluation.max_pixels_per_batch=0", "evaluation.max_pixels_per_batch: got 0", "at least 1"),
        ("+model.foo=3", "unknown key model.foo", "name, network, output_layers"),
        ("+data.synthetic.foo=3", "unknown key data.synthetic.foo", "train, val, test"),
        ("+foo=3", "unknown key foo", "name, seed"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_accepted(override: str, named: str, accepted: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        config.check(composed(*override.split(" ")))
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


@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [
        ("train.py", ["--help"], "bisenetv2"),
        ("train.py", ["--cfg", "job"], "bisenetv2"),
        ("predict.py", ["--help"], "label_ids"),
        ("check_data.py", ["--cfg", "job"], "synthetic"),
    ],
)
def test_help_and_cfg_do_not_import_torch(script: str, arguments: list[str], shown: str) -> None:
    program = f"""
import runpy, sys
sys.argv = ["{script}", *{arguments}]
try:
    runpy.run_path("scripts/{script}", run_name="__main__")
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


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


def protocol_names(*overrides: str) -> list[str]:
    cfg = composed(*overrides)
    config.check(cfg)
    return list(config.protocols(config.typed(cfg.protocol), config.typed(cfg.data)))


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["protocol=ss"], "ss"),
        (["protocol=mscf", "data=camvid"], "mscf"),  # the window belongs to the data
        (["protocol=ssc", "data=cityscapes", "protocol.ssc.window=[1024,1024]"], "ssc"),  # said, but nothing changed
        (["protocol=ss", "data=ade20k"], "ss"),  # so does the size that pictures are brought to
        (["protocol.ss.scales=[0.5]"], "ss-scales-0.5"),
        (["protocol.ss.short_side=512"], "ss-short_side-512"),
        (["protocol=mscf", "protocol.mscf.flip=false", "protocol.mscf.stride=0.5"], "mscf-flip-false-stride-0.5"),
        (["protocol=ssc", "protocol.ssc.window=[128,64]"], "ssc-window-128-64"),
        (["protocol=ssc", "protocol.ssc.merge=log_prob"], "ssc-merge-log_prob"),
    ],
)
def test_a_name_means_one_definition(overrides: list[str], name: str) -> None:
    assert protocol_names(*overrides) == [name]
    assert composed(*overrides, "callbacks=early_stopping").callbacks.early_stopping.monitor == f"val/{name}/miou"


def test_protocols_are_chosen_together_and_the_first_one_validates() -> None:
    assert protocol_names("protocol=all") == ["ss", "half", "ssc", "msf", "mscf", "mscf_older"]
    assert protocol_names("protocol=[msf,ss]") == ["msf", "ss"]
    evaluation = composed("checkpoint=[a,b]", "protocol=[msf,ss]", name="evaluate")
    config.check(evaluation)
    assert config.typed(evaluation).checkpoints == [Path("a").absolute(), Path("b").absolute()]
    assert composed("checkpoint=a", name="evaluate").protocol == {}  # those of the training


@pytest.mark.parametrize("checkpoint", ["[a,a/]", "3", "[]"])
def test_checkpoints_are_paths_that_differ(checkpoint: str) -> None:
    with pytest.raises(ValueError, match="checkpoint: got"):
        config.check(composed(f"checkpoint={checkpoint}", name="evaluate"))


def test_a_protocol_of_ones_own_keeps_its_name_until_it_is_changed(tmp_path: Path) -> None:
    (tmp_path / "protocol").mkdir()
    (tmp_path / "protocol" / "mine.yaml").write_text("mine: {scales: [1, 2], flip: true}")
    program = (
        "from bisenet import config\n"
        "@config.entry('train')\n"
        "def main(cfg):\n"
        "    print(*config.protocols(config.typed(cfg.protocol), config.typed(cfg.data)))\n"
        "main()\n"
    )
    for overrides, name in (
        (["protocol=mine"], "mine"),
        (["protocol=mine", "protocol.mine.flip=false"], "mine-flip-false"),
    ):
        folder = f"hydra.run.dir={tmp_path / name}"
        done = run("-c", program, "--config-dir", str(tmp_path), *overrides, folder)
        assert done.stdout.split() == [name], done.stderr


def test_recipes_are_the_published_ones() -> None:
    """The table of recipes, one row for each: crop, scale, rate, steps, warmup ratio, OHEM, precision; and then
    jitter, contrast's pivot, SyncBN, order, what is done with a picture too small, mean of the reds, protocols.
    """
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
    now, older = ["scale_crop_first", "pad", 0.3257], ["jitter_first", "enlarge", 0.485, ["ss", "mscf_older"]]
    every = ["ss", "ssc", "msf", "mscf"]
    further = {
        "cityscapes_bisenetv1": [0.4, 74, False, *now, every],
        "cityscapes_bisenetv2": [0.4, 74, True, *now, every],
        "cityscapes_bisenetv2_older": [0.4, 74, False, *now, ["ss"]],
        "cityscapes_bisenetv1_older": [0.5, None, True, *older],
        "cityscapes_bisenetv1_diss": [0.5, None, True, *older],
        "cityscapes_bisenetv2_paper": [0.0, 74, True, *now, ["half"]],
    }
    for experiment, row in further.items():
        cfg = composed(f"experiment={experiment}")
        augment = cfg.augment
        assert augment.brightness == augment.contrast == augment.saturation
        found = [augment.brightness, augment.contrast_pivot, cfg.strategy.sync_batchnorm, augment.order,
                 augment.too_small, cfg.data.mean[0], list(cfg.protocol)]  # fmt: skip
        assert found == row, experiment
    assert composed("experiment=cityscapes_bisenetv1_diss").model.network.structure == "one_path"
    assert composed("experiment=cityscapes_bisenetv2_older").model.output_layers == []


def test_recipes_of_other_data_are_the_published_ones() -> None:
    """configs/ of the reference: crop, scale, rate, steps, classes."""
    rows = {
        "coco_stuff_bisenetv1": (512, [0.5, 2.0], 1e-2, 90000, "coco_stuff"),
        "coco_stuff_bisenetv2": (640, [0.75, 2.0], 5e-3, 180000, "coco_stuff"),
        "ade20k_bisenetv1": (512, [0.5, 2.0], 4e-2, 40000, "ade20k"),
        "ade20k_bisenetv2": (640, [0.5, 2.0], 5e-3, 160000, "ade20k"),
    }
    for experiment, (crop, scale, rate, steps, classes) in rows.items():
        cfg = composed(f"experiment={experiment}")
        assert (cfg.augment.crop, cfg.augment.scale) == ([crop, crop], scale), experiment
        assert (cfg.optimizer.algorithm.lr, cfg.optimizer.algorithm.weight_decay) == (rate, 1e-4), experiment
        assert (cfg.trainer.max_steps, cfg.data.classes, cfg.data.batch_size) == (steps, classes, 16), experiment
        assert (cfg.precision.name, cfg.scheduler.warmup_steps, cfg.loss.min_kept) == ("fp16", 1000, 0.0625), experiment
        assert cfg.model.name == experiment.split("_")[-1]


def test_recipes_say_which_weights_they_start_from() -> None:
    for file in (CONF / "experiment").glob("*.yaml"):
        pretrained = composed(f"experiment={file.stem}").model.pretrained
        if file.stem.split("_")[0] not in ("cityscapes", "coco", "ade20k") or file.stem == "cityscapes_bisenetv2_older":
            assert pretrained is None, file.stem
        else:
            assert Path(pretrained).name == ("backbone_v2.pth" if "v2" in file.stem else "resnet18-f37072fd.pth")
    assert composed("experiment=cityscapes_bisenetv2", "model.pretrained=null").model.pretrained is None
    assert composed("experiment=cityscapes_bisenetv2", "model=bisenetv2_large").model.pretrained is None


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
