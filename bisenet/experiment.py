"""The one composition root: build, train, evaluate and load an experiment from its configuration."""

import copy
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain, count
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from bisenet import checkpoint, config, pretrained, report
from bisenet import predict as prediction
from bisenet.callbacks import (
    BestCheckpoint,
    LastCheckpoint,
    LossScale,
    PredictionPanel,
    ProgressBar,
    StepClock,
    WeightAverage,
    csv_logger,
    finishing_wandb,
    log_scores,
)
from bisenet.classes import ClassTable
from bisenet.config import (
    CheckDataConfig,
    DataConfig,
    EvaluateConfig,
    LossConfig,
    ModelConfig,
    PredictConfig,
    ProtocolConfig,
    SchedulerConfig,
    TrainConfig,
)
from bisenet.data import SegmentationDataModule
from bisenet.data.check import walk
from bisenet.data.check import warnings as warn_about
from bisenet.inference import Segmenter
from bisenet.losses import CrossEntropy, DeepSupervision, OhemCrossEntropy, enet_class_weights
from bisenet.module import SegmentationModule
from bisenet.optim import CountingGradScaler, constant, describe_groups, parameter_groups, warmup_cosine, warmup_poly

log = logging.getLogger(__name__)

_PRECISION = {"fp32": "32-true", "fp16": "bf16-mixed", "bf16": "bf16-mixed"}  # fp16 on a CPU is bf16
_PASSED = {"model.network": ("n_classes",), "optimizer.algorithm": ("params",)}


@finishing_wandb()
def train(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Train, evaluate the last weights and the best on val, and write the run directory.

    Args:
        cfg: what ``conf/train.yaml`` composes, checked; with ``resume`` set, what :func:`config.resumed` gives.
        run_dir: where everything goes; with ``resume`` set, the run continues from its last checkpoint there.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: configuration or data cannot work; raised before the first step.
        FloatingPointError: the loss became infinite or not a number.
    """
    resumed = cfg.resume is not None
    if resumed and (run_dir / "results.json").exists():
        log.info("%s is finished already", run_dir)
        results = json.loads((run_dir / "results.json").read_text())
        _show(results)
        return results
    config.check_targets(cfg, _PASSED)
    typed: TrainConfig = config.typed(cfg)
    typed.data.report_split = typed.evaluation.split or typed.data.report_split
    _require_device("trainer.accelerator", typed.trainer.accelerator, typed.trainer.devices)
    _quiet()

    data = SegmentationDataModule(typed.data, typed.augment, seed=typed.data_seed)
    module = build(cfg, data.table)  # first, since it is quick: what cannot be built needs no data
    _rehearse(cfg, module)
    last = run_dir / "checkpoints" / "last.ckpt"
    continued = resumed and last.exists()
    resumed_step = checkpoint.read(last).step if continued else 0 if resumed else None
    if rank_zero_only.rank == 0:  # the others are given what it has: weights by DDP, buffers by the module
        if resumed and not continued and (run_dir / "provenance.json").exists():
            log.warning("%s has no checkpoint yet: the run begins again", run_dir)
        if not continued:
            load_pretrained(module.segmenter.network, typed.model)
            if typed.finetune_from is not None:
                checkpoint.finetune(module.segmenter.network, typed.finetune_from)
        data.prepare_data()
        data.setup()
        if typed.loss.class_weights == "enet" and not continued:  # a checkpoint brings its own
            weights = enet_class_weights(data.class_counts(typed.data.train_split))
            module.loss.criterion.class_weights.copy_(torch.tensor(weights))  # type: ignore[union-attr, operator]
            named = zip(data.table.names, weights, strict=True)
            log.info("class weights: %s", ", ".join(f"{name} {weight:.2f}" for name, weight in named))
    if typed.trainer.compile:
        module.segmenter.network.compile()
    origin = provenance(typed)
    best = BestCheckpoint(run_dir / "checkpoints", module.miou_key)
    decay = typed.trainer.ema_decay
    average = None if decay is None else WeightAverage(module.segmenter.network, decay)
    loggers = _loggers(cfg, resumed_step)
    for logger in loggers:
        logger.log_hyperparams(config.plain(cfg) | {"provenance": origin})
    clock = StepClock()
    shown = loggers and rank_zero_only.rank == 0  # by the first process
    pictures = _pictures(data, typed.data.val_split) if shown else []
    callbacks = [
        clock,
        LossScale(),
        *([ProgressBar(clock, every=typed.trainer.log_interval)] if typed.trainer.progress else []),
        *(config.instantiate(f"callbacks.{name}", node) for name, node in cfg.callbacks.items()),
        *([PredictionPanel(pictures, data.table)] if loggers else []),
        *([average] if average else []),
        best,
        LastCheckpoint(last, every=typed.trainer.checkpoint_interval),
    ]
    trainer = _trainer(typed, run_dir, callbacks, [csv_logger(run_dir, resumed_step), *loggers], sanity=not continued)
    if not (run_dir / "provenance.json").exists() and trainer.is_global_zero:
        report.write_json(run_dir / "provenance.json", origin)
    log.info("run directory: %s", run_dir)
    if typed.deterministic and _on_gpu(typed):
        log.info("deterministic=true costs time on a GPU: kernels/ohem/bench_step.py measures how much")
    started = time.perf_counter()
    # For dropout; independent of how the network was built.
    seed_everything((typed.init_seed + trainer.global_rank) % 2**32, verbose=False)
    try:
        trainer.fit(module, data, ckpt_path=last if continued else None, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        how = f"python scripts/train.py resume={run_dir}" if typed.sweep.name is None else "the same command"
        log.warning("interrupted; to continue: %s", how)
        raise
    results: dict[str, Any] = {
        "name": typed.name,
        "step": trainer.global_step,
        "train_seconds": round(time.perf_counter() - started, 1),  # since the last start of a run that was resumed
    }
    results |= _evaluate(trainer, module, data, typed.data.report_split, run_dir)
    if best.best_model_path:
        chosen = checkpoint.read(best.best_model_path)
        results["best_on_val"] = {
            "selected_on": typed.data.val_split,
            "step": chosen.step,
            "protocols": _best_on_val(trainer, module, data, results, chosen),
        }
    if average:
        module.segmenter.network.load_state_dict(average.weights)
        trainer.test(module, dataloaders=data.evaluation_dataloader(results["split"]), verbose=False)
        results["ema"] = {"decay": decay, "protocols": _protocols(module)}
    if trainer.is_global_zero:
        if average:
            checkpoint.write(last.with_name("ema.ckpt"), average.weights, results["step"], module.config, data.table)
        for stage, found in {"last": results, **{key: results.get(key) for key in ("best_on_val", "ema")}}.items():
            for name, scores in found["protocols"].items() if found else ():
                log_scores(loggers, f"final/{stage}/{results['split']}/{name}", scores, results["step"])
        _write(results, run_dir)
        log.info("figures: %s", run_dir / "figures")
    return results


def evaluate(cfg: EvaluateConfig, run_dir: Path) -> list[dict[str, Any]]:
    """Evaluate checkpoints as their own configurations say, but for what ``cfg`` sets otherwise.

    One checkpoint's files go to ``run_dir``; those of several to a folder each, and what puts them side by side to
    ``run_dir``.

    Returns:
        What ``results.json`` holds, for each checkpoint.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file that :func:`read_models` refuses, a data set that does not fit it, or several checkpoints
            with different classes, pictures or definitions of a protocol. Raised before the first evaluation.
    """
    _require_device("accelerator", cfg.accelerator)
    _quiet()
    read = read_models(cfg.checkpoints, cfg.data)
    for other in read[1:]:
        if other.classes.names != read[0].classes.names:
            raise ValueError(
                f"checkpoint: {other.path} predicts the classes of {other.classes.name}, {read[0].path} those of "
                f"{read[0].classes.name}; accepted: the same classes, to be put side by side"
            )
    jobs = [_evaluation(cfg, one) for one in read]
    _require_comparable(read, jobs)
    results: dict[str, dict[str, Any]] = {}
    for label, one, (trainer, module, data, typed) in zip(_labels(cfg.checkpoints), read, jobs, strict=True):
        folder, origin = run_dir / label, provenance(typed)  # before: the code may be edited meanwhile
        results[label] = {"name": typed.name, "step": one.step, "checkpoint": str(one.path)}
        results[label] |= _evaluate(trainer, module, data, typed.data.report_split, folder)
        report.write_json(folder / "provenance.json", origin)
        _write(results[label], folder)
    if len(results) > 1:
        columns = _columns(results)
        console = Console()
        console.print(report.score_table(columns, console.width))
        report.write_text(run_dir / "results.md", _markdown(results))
        report.plot_iou(columns, read[0].classes, run_dir / "figures" / "iou_per_class.png")
    return list(results.values())


def _trainer(
    cfg: TrainConfig, run_dir: Path, callbacks: list[Callback], loggers: list[Logger], sanity: bool
) -> Trainer:
    """The training loop; ``sanity``: with a short validation before it."""
    return Trainer(
        default_root_dir=run_dir,
        max_steps=cfg.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=cfg.trainer.accumulate,
        val_check_interval=min(cfg.trainer.val_interval, cfg.trainer.max_steps) * cfg.trainer.accumulate,
        check_val_every_n_epoch=None,
        gradient_clip_val=cfg.trainer.gradient_clip,
        log_every_n_steps=cfg.trainer.log_interval,
        accelerator=cfg.trainer.accelerator,
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        **_strategy(cfg),
        **_precision(cfg),
        use_distributed_sampler=False,  # ours already is
        deterministic=cfg.deterministic,
        num_sanity_val_steps=2 if sanity else 0,
        logger=loggers,
        callbacks=callbacks,
        enable_progress_bar=cfg.trainer.progress,
        enable_model_summary=False,
    )


_Evaluation = tuple[Trainer, SegmentationModule, SegmentationDataModule, TrainConfig]


def _evaluation(cfg: EvaluateConfig, read: checkpoint.Checkpoint) -> _Evaluation:
    """All that evaluating a checkpoint takes, the data checked."""
    trained = _restore(read)
    if cfg.protocol:
        trained.protocol = cfg.protocol
    trained.evaluation.split = cfg.evaluation.split or trained.evaluation.split
    trained.evaluation.max_pixels_per_batch = cfg.evaluation.max_pixels_per_batch
    typed: TrainConfig = config.typed(trained)
    typed.data.root = cfg.data_root or typed.data.root
    typed.data.workers = typed.data.workers if cfg.workers is None else cfg.workers
    typed.trainer.accelerator = cfg.accelerator
    typed.data.report_split = typed.evaluation.split or typed.data.report_split
    data = SegmentationDataModule(typed.data, typed.augment, seed=typed.data_seed, table=read.classes)
    data.setup("test")
    module = build(trained, read.classes)
    module.segmenter.network.load_state_dict(read.weights)
    name = cfg.precision.name
    module.segmenter.precision = "bf16" if name == "fp16" and not _on_gpu(typed) else name
    trainer = Trainer(
        accelerator=typed.trainer.accelerator,
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[RichProgressBar(leave=True)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    return trainer, module, data, typed


def _require_comparable(read: Sequence[checkpoint.Checkpoint], jobs: Sequence[_Evaluation]) -> None:
    """Refuse to put side by side what is not measured on the same pictures, or calls two protocols by one name."""
    known: dict[str, tuple[Any, Any, Path]] = {}  # key -> value, as it is shown, and whose
    for one, (_, module, data, typed) in zip(read, jobs, strict=True):
        split = typed.data.report_split
        files = [(sample.image.resolve(), sample.label.resolve()) for sample in data.samples(split)]
        pictures = files, f"{len(files)} pictures of {typed.data.root}"
        measured: dict[str, tuple[Any, Any]] = {"evaluation.split": (split, split), "data_root": pictures}
        for name, protocol in module.segmenter.protocols.items():
            measured |= {f"protocol.{name}.{key}": (value, value) for key, value in asdict(protocol).items()}
        for key, (value, shown) in measured.items():
            first, first_shown, path = known.setdefault(key, (value, shown, one.path))
            if value != first:
                raise ValueError(
                    f"{key}: got {shown} for {one.path}, other than {first_shown} for {path}; accepted: the same for "
                    f"all that are put side by side ({key}=... sets it)"
                )


def _labels(paths: Sequence[Path]) -> list[str]:
    """What tells absolute paths apart, as names of folders, no two alike; of a single path nothing."""
    if len(paths) == 1:
        return [""]
    parts = [path.parts for path in paths]
    while all(parts) and len({part[:1] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while all(parts) and len({part[-1:] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    labels: list[str] = []
    for part in parts:
        name = "_".join(part).removesuffix(".ckpt") or "checkpoint"
        labels.append(next(free for free in chain([name], (f"{name}_{n}" for n in count(2))) if free not in labels))
    return labels


def read_models(
    paths: Sequence[str | PathLike[str]], data: str | DataConfig | None = None
) -> list[checkpoint.Checkpoint]:
    """What :func:`read_model` reads, of several files; ``data`` is that of all published weights among them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as :func:`read_model`, but ``data`` is needed where any of them is published.
    """
    found = [checkpoint.read_any(path) for path in paths]
    if data is not None and all(isinstance(one, checkpoint.Checkpoint) for one in found):
        raise ValueError(f"data: {found[0].path} knows the data set it was trained on; accepted: no data here")
    return [one if isinstance(one, checkpoint.Checkpoint) else _completed(one, data) for one in found]


def read_model(path: str | PathLike[str], data: str | DataConfig | None = None) -> checkpoint.Checkpoint:
    """A checkpoint of ours, or published weights completed to one by the data set that they were trained on.

    Args:
        path: a run directory, a ``.ckpt`` of it, or a state dict of the reference, of either generation.
        data: option of ``conf/data``, or a data set; only for the latter, which knows neither classes nor
            normalisation. Older BiSeNetV1 was always normalised as ImageNet, whatever ``data`` says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither of both; ``data`` missing, not needed or with another number of classes.
    """
    return read_models([path], data)[0]


def _completed(found: checkpoint.Published, data: str | DataConfig | None) -> checkpoint.Checkpoint:
    if data is None:
        raise ValueError(
            f"data: {found.path} holds weights for {found.n_classes} classes and nothing else; accepted: the data set "
            "they were trained on, as data=cityscapes (its class table and normalisation)"
        )
    cfg = config.compose("train", f"model={found.model}", *([f"data={data}"] if isinstance(data, str) else []))
    if isinstance(data, DataConfig):
        cfg["data"] = data
    cfg.data.update(found.normalisation)
    cfg.model.network.update(found.network)
    classes = ClassTable.load(cfg.data.classes)
    if classes.num_classes != found.n_classes:
        raise ValueError(
            f"data.classes: {cfg.data.classes!r} has {classes.num_classes} classes, the weights of {found.path} are "
            f"for {found.n_classes}; accepted: a data set or class table with {found.n_classes}"
        )
    config.check(cfg)
    return checkpoint.Checkpoint(found.path, config.plain(cfg), classes, None, found.weights)


def load(
    path: str | PathLike[str],
    data: str | DataConfig | None = None,
    protocol: Mapping[str, ProtocolConfig] | None = None,
) -> Segmenter:
    """The trained model of a file that :func:`read_model` reads, in evaluation mode on the CPU.

    It predicts under the first ``protocol``; None, or an empty one: the first of the training.
    """
    read = read_model(path, data)
    cfg = _restore(read)
    if protocol:
        cfg.protocol = dict(protocol)
    segmenter = _segmenter(cfg, read.classes)
    segmenter.network.load_state_dict(read.weights)
    return segmenter.eval()


def _restore(read: checkpoint.Checkpoint) -> DictConfig:
    try:
        return config.restore(read.config)
    except ValueError as error:
        raise ValueError(f"checkpoint {read.path}: {error}") from error


def predict(cfg: PredictConfig, run_dir: Path) -> list[str]:
    """Segment pictures and videos, and write what ``cfg`` asks for.

    Returns:
        One message for each input that could not be read; all others are written.

    Raises:
        FileNotFoundError: no checkpoint or no input there.
        FileExistsError: an output exists and ``overwrite`` is not set.
        ValueError: see :func:`read_model`; no GPU where one is asked for.
    """
    folder = run_dir if cfg.output is None else Path(cfg.output).expanduser()
    sources = prediction.find_sources(cfg.input, beside=folder)
    prediction.require_free(sources, cfg, folder)
    _require_device("accelerator", cfg.accelerator)
    device = "cuda" if cfg.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    return prediction.run(load(cfg.checkpoint, cfg.data, cfg.protocol).to(device), sources, cfg, folder)


def check_data(cfg: CheckDataConfig, run_dir: Path) -> bool:
    """Walk a data set as training would read it; write ``check_data.json`` and a figure, show a table.

    Returns:
        Whether it is fit to train on: every file is what it should be, and there is something to learn.
    """
    classes = ClassTable.load(cfg.data.classes)
    used = (cfg.data.train_split, cfg.data.val_split, cfg.data.report_split)
    splits = list(dict.fromkeys(cfg.splits or used))
    workers = (os.cpu_count() or 1) if cfg.workers is None else cfg.workers
    found = walk(cfg.data, classes, splits, workers)

    measured = cfg.data.train_split if cfg.data.train_split in found else splits[0]
    mean, std = found[measured].mean_and_std()
    result = {
        "data": cfg.data.name,
        "root": str(Path(cfg.data.root).expanduser().resolve()),
        "class_table": classes.name,
        "fit": all(findings.valid and not findings.problems for findings in found.values()),
        "configured": {"mean": list(cfg.data.mean), "std": list(cfg.data.std)},
        "suggested": {"mean": mean, "std": std, "split": measured} if found[measured].images else None,
        "warnings": warn_about(found, cfg.data.train_split),
        "splits": {split: findings.to_dict() for split, findings in found.items()},
    }
    report.write_json(run_dir / "check_data.json", result)
    report.plot_data(result, classes, run_dir / "check_data.png")
    console = Console()
    console.print(report.data_table(result))
    for warning in result["warnings"]:
        log.warning(warning)
    for problem in (problem for findings in found.values() for problem in findings.problems):
        log.error(problem)
    if result["suggested"]:
        log.info("measured over %s: 'data.mean=%s' 'data.std=%s'", measured, mean, std)
    log.info("%s to train on; %s", "fit" if result["fit"] else "NOT fit", run_dir / "check_data.json")
    return bool(result["fit"])


def build(cfg: DictConfig, classes: ClassTable) -> SegmentationModule:
    """Network, loss and optimizer of a configuration; the initial weights depend on ``init_seed`` alone."""
    typed: TrainConfig = config.typed(cfg)
    segmenter = _segmenter(cfg, classes)
    rate = partial(_SCHEDULES[typed.scheduler.name], **_schedule_arguments(typed.scheduler, typed.trainer.max_steps))

    def optimizer(network: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        built = config.instantiate("optimizer.algorithm", cfg.optimizer.algorithm, params=_groups(cfg, network))
        return built, torch.optim.lr_scheduler.LambdaLR(built, rate)

    loss = DeepSupervision(_criterion(typed.loss, classes), typed.loss.aux_weight)
    carried = config.plain(cfg) | {"protocol": {name: asdict(p) for name, p in segmenter.protocols.items()}}
    return SegmentationModule(segmenter, loss, optimizer, carried)


def _groups(cfg: DictConfig, network: nn.Module) -> list[dict[str, Any]]:
    typed, algorithm = config.typed(cfg.optimizer), cfg.optimizer.algorithm
    try:
        return parameter_groups(network, typed.groups, lr=algorithm.lr, weight_decay=algorithm.weight_decay)
    except ValueError as error:
        layers = list(cfg.model.output_layers)
        raise ValueError(f"optimizer.groups, where model.output_layers is {layers}: {error}") from error


def _rehearse(cfg: DictConfig, module: SegmentationModule) -> None:
    """Log the parameter groups; raise what would otherwise wait until the data have been read."""
    network = module.segmenter.network
    module.optimizer_factory(network)
    log.info("parameter groups:\n%s", describe_groups(_groups(cfg, network)))
    typed: TrainConfig = config.typed(cfg)
    parts = typed.trainer.accumulate * typed.trainer.devices * typed.trainer.num_nodes
    if typed.data.batch_size == parts and not _strategy(typed).get("sync_batchnorm"):
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # can it learn from one image at a time?
                copy.deepcopy(network).train()(torch.zeros(1, 3, *typed.augment.crop))
        except ValueError as error:
            raise ValueError(
                f"data.batch_size: got {typed.data.batch_size}, one image for each of {parts} (devices x "
                f"trainer.accumulate), with augment.crop {list(typed.augment.crop)}: {error}"
            ) from error


def load_pretrained(network: nn.Module, model: ModelConfig) -> None:
    """Load what ``model.pretrained`` names into the network's backbone, or log that it starts from scratch.

    Raises:
        ValueError: no such module, no such file, another digest, or weights that do not fit; it says what to do.
    """
    if model.pretrained is None:
        log.info("pretrained weights: none, the network starts from scratch")
        return
    try:
        backbone = network.get_submodule(model.backbone)
    except AttributeError as error:
        raise ValueError(
            f"model.backbone: got {model.backbone!r}, accepted: a module of the network ({error})"
        ) from None
    try:
        pretrained.load_backbone(backbone, pretrained.fetch(model.pretrained, model.pretrained_sha256))
    except ValueError as error:
        raise ValueError(f"model.pretrained: {error}") from error


def _segmenter(cfg: DictConfig, classes: ClassTable) -> Segmenter:
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU; the caller's generators are not ours
        torch.manual_seed(cfg.init_seed)
        network = config.instantiate("model.network", cfg.model.network, n_classes=classes.num_classes)
    if missing := [name for name in ("head_names", "align_corners") if not hasattr(network, name)]:
        raise ValueError(f"model.network: {type(network).__name__} has no {missing}; see bisenet.networks.blocks")
    protocols = config.protocols(config.typed(cfg.protocol), config.typed(cfg.data))
    most = cfg.evaluation.max_pixels_per_batch
    return Segmenter(network, classes, list(cfg.data.mean), list(cfg.data.std), protocols, most)


def _require_device(key: str, accelerator: str, devices: int = 1) -> None:
    """Raise a ValueError where there are no such devices, or not as many."""
    gpus = torch.cuda.device_count()
    if accelerator == "gpu" and not gpus:
        raise ValueError(f"{key}: got 'gpu', which is not available here; accepted: auto | cpu")
    if accelerator != "cpu" and 0 < gpus < devices:
        raise ValueError(
            f"{key}: got {accelerator!r} for {devices} devices, accepted: cpu, or the {gpus} GPUs there are"
        )


def _on_gpu(cfg: TrainConfig) -> bool:
    return cfg.trainer.accelerator == "gpu" or (cfg.trainer.accelerator == "auto" and torch.cuda.is_available())


def _strategy(cfg: TrainConfig) -> dict[str, Any]:
    """Arguments of the Trainer that say how devices work together."""
    if cfg.strategy.name == "single":
        return {}
    # Each process keeps its own running statistics; evaluations and checkpoints use those of the first one.
    ddp = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    several = cfg.trainer.devices * cfg.trainer.num_nodes > 1
    return {"strategy": ddp, "sync_batchnorm": cfg.strategy.sync_batchnorm and several and _on_gpu(cfg)}


def _precision(cfg: TrainConfig) -> dict[str, Any]:
    """Arguments of the Trainer that say how it computes."""
    if cfg.precision.name == "fp16" and _on_gpu(cfg):
        return {"plugins": [MixedPrecision("16-mixed", "cuda", CountingGradScaler("cuda"))]}
    return {"precision": _PRECISION[cfg.precision.name]}


def _criterion(loss: LossConfig, classes: ClassTable) -> nn.Module:
    weights = loss.class_weights
    if weights == "enet":
        weights = [1.0] * classes.num_classes  # until the labels have been counted, or a checkpoint is loaded
    if weights is not None and len(weights) != classes.num_classes:
        accepted = f"one for each of the {classes.num_classes} classes of {classes.name}"
        raise ValueError(f"loss.class_weights: got {len(weights)} weights, accepted: {accepted}")
    if loss.name == "cross_entropy":
        return CrossEntropy(classes.ignore_index, weights, loss.impl)
    assert loss.threshold is not None
    assert loss.normalizer is not None
    return OhemCrossEntropy(loss.threshold, loss.min_kept, loss.normalizer, classes.ignore_index, weights, loss.impl)


def _loggers(cfg: DictConfig, resumed_step: int | None) -> list[Logger]:
    """The loggers of the configuration; a resumed TensorBoard forgets what came after the checkpoint."""

    def passed(node: DictConfig) -> dict[str, Any]:
        return {"purge_step": resumed_step} if node._target_.endswith("TensorBoardLogger") else {}

    return [config.instantiate(f"logger.{name}", node, **passed(node)) for name, node in cfg.logger.items()]


_SCHEDULES: dict[str, Callable[..., float]] = {"poly": warmup_poly, "cosine": warmup_cosine, "constant": constant}


def _schedule_arguments(scheduler: SchedulerConfig, max_steps: int) -> dict[str, Any]:
    arguments = {f: getattr(scheduler, f) for f in ("warmup_steps", "warmup_ratio", "warmup")}
    if scheduler.name != "constant":
        arguments["total_steps"] = max_steps
    if scheduler.name == "poly":
        arguments["power"] = scheduler.power
    return arguments


def _evaluate(
    trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, split: str, folder: Path
) -> dict[str, Any]:
    """Evaluate on a split, unless the last validation just did; write figures and per-image counts."""
    started = time.perf_counter()
    validated = split == data.data.val_split and module.validated_step == trainer.global_step
    if not (validated and len(module.protocols) == 1):
        trainer.test(module, dataloaders=data.evaluation_dataloader(split), verbose=False)
    seconds = time.perf_counter() - started
    protocols = _protocols(module)
    device = trainer.strategy.root_device
    if trainer.is_global_zero:
        module.to(device)  # Lightning has brought it back to the CPU
        _illustrate(module, protocols, data, split, folder)
        module.cpu()
    first, scores = next(iter(protocols.items()))
    return {
        "split": split,
        "protocol": first,
        "miou": scores["miou"],
        "precision": module.segmenter.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "evaluation_seconds": round(seconds, 1),
        "protocols": protocols,
    }


def _illustrate(
    module: SegmentationModule, protocols: dict[str, Any], data: SegmentationDataModule, split: str, folder: Path
) -> None:
    segmenter, classes = module.segmenter, module.segmenter.classes
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    if (folder / "metrics.csv").exists():
        report.plot_curves(folder / "metrics.csv", figures / "curves.png")
    report.plot_iou(protocols, classes, figures / "iou_per_class.png")
    for name, (scores, _) in module.evaluation.items():
        report.plot_confusion(scores.confusion, classes.names, figures / f"confusion_{name}.png")
        report.write_counts(folder / f"counts_{split}_{name}.npz", scores)
    shown = _pictures(data, split)
    report.plot_predictions(
        [image for image, _ in shown],
        [mask for _, mask in shown],
        [segmenter.predict(image) for image, _ in shown],
        classes,
        figures / "predictions.png",
    )


def _protocols(module: SegmentationModule) -> dict[str, Any]:
    """The last evaluation in plain values, by protocol."""
    classes = module.segmenter.classes
    return {
        name: {
            **scores.to_dict(classes.names, classes.categories),
            "seconds": round(seconds, 3),  # of prediction; what protocols share is charged to each
            "definition": asdict(module.segmenter.protocols[name]),
        }
        for name, (scores, seconds) in module.evaluation.items()
    }


def _best_on_val(
    trainer: Trainer,
    module: SegmentationModule,
    data: SegmentationDataModule,
    last: dict[str, Any],
    best: checkpoint.Checkpoint,
) -> dict[str, Any]:
    """Scores of the checkpoint that was best on the validation split, on the split that is reported."""
    if best.step == last["step"]:
        return last["protocols"]
    module.segmenter.network.load_state_dict(best.weights)
    trainer.test(module, dataloaders=data.evaluation_dataloader(last["split"]), verbose=False)
    return _protocols(module)


def _pictures(data: SegmentationDataModule, split: str, most: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most so many pictures with their masks, evenly over a split; always the same ones."""
    n = len(data.samples(split))
    return [data.picture(split, index) for index in sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})]


def _columns(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Scores side by side, of runs by label: of each protocol, of the last weights and of those best on val."""
    columns: dict[str, Any] = {}
    for label, results in runs.items():
        columns |= {f"{label} {name}".strip(): found for name, found in results["protocols"].items()}
        for name, found in _best(results).get("protocols", {}).items():
            columns[f"{label} {name} (best on val)".strip()] = found
    return columns


def _best(results: dict[str, Any]) -> dict[str, Any]:
    """What the results say of the weights that were best on val; nothing, where those are the last ones."""
    best = results.get("best_on_val", {})
    return best if best.get("step") != results["step"] else {}


def _markdown(runs: Mapping[str, dict[str, Any]]) -> str:
    """What was evaluated and how, a line for each run, and the scores of all side by side."""
    lines = []
    for label, results in runs.items():
        told = [f"{results.get('checkpoint', 'checkpoints/last.ckpt')} ({_step(results)})"]
        if best := _best(results):
            told.append(f"best on val: checkpoints/best.ckpt ({_step(best)})")
        told += [f"split {results['split']}", f"{results['precision']} on {results['device']}"]
        lines.append(f"- {label or results['name']}: {', '.join(told)}")
    return "\n".join([*lines, "", report.markdown_table(_columns(runs))])


def _step(results: dict[str, Any]) -> str:
    return "unknown step" if results["step"] is None else f"step {results['step']}"


def _write(results: dict[str, Any], folder: Path) -> None:
    """The results as a table, and ``results.json``, last: with it a run is finished."""
    report.write_text(folder / "results.md", _markdown({"": results}), replace=True)
    report.write_json(folder / "results.json", results)
    _show(results)


def _show(results: dict[str, Any]) -> None:
    console = Console()
    console.print(report.score_table(_columns({"": results}), console.width))
    weights = Path(results["checkpoint"]).name if "checkpoint" in results else "last weights"
    stages = [(results, f"{weights}, {_step(results)}")]
    if best := results.get("best_on_val"):
        stages.append((best, f"best on {best['selected_on']}, {_step(best)}"))
    if ema := results.get("ema"):
        stages.append((ema, f"moving average of the weights, decay {ema['decay']}"))
    for found, weights in stages:
        for name, scores in found["protocols"].items():
            console.print(f"mIoU {report.percent(scores['miou'])} ({name} on {results['split']}, {weights})")


def provenance(cfg: TrainConfig) -> dict[str, Any]:
    """What a number depends on beside its configuration: code, versions, hardware, seeds."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages = ("torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "albumentations", "numpy",
                "opencv-python-headless")  # fmt: skip
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"bisenet": config.version(), "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "hardware": {
            "machine": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": cuda,
            "cuda": torch.version.cuda,
        },
        "seeds": {"seed": cfg.seed, "init_seed": cfg.init_seed, "data_seed": cfg.data_seed},
    }


def _quiet() -> None:
    """Leave the terminal to what matters: Lightning's warnings once (Hydra prints them), none for what is meant so."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.WARNING)
    if rank_zero_only.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process speaks for all
    for message in (
        r".*LeafSpec.* is deprecated",  # within Lightning
        r"Experiment logs directory .* exists and is not empty",  # the history was set aside before
        r"Checkpoint directory .* exists and is not empty",
        r"The '.*_dataloader' does not have many workers",
        r"Found .* module\(s\) in eval mode",
        r"`broadcast_buffers` is deprecated",  # what takes its place is not in torch 2.11
        r"It is recommended to use `self.log\(.*, sync_dist=True\)`",  # all devices have the same score
    ):
        warnings.filterwarnings("ignore", message=message)
