"""The one composition root: build, train, evaluate and load an experiment from its configuration."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from bisenet import checkpoint, config, report
from bisenet.callbacks import LastCheckpoint, ProgressBar, StepClock, csv_logger
from bisenet.classes import ClassTable
from bisenet.config import EvaluateConfig, LossConfig, SchedulerConfig, TrainConfig
from bisenet.data import SegmentationDataModule
from bisenet.inference import Segmenter
from bisenet.losses import CrossEntropy, DeepSupervision, OhemCrossEntropy
from bisenet.metrics import SegmentationScores
from bisenet.module import SegmentationModule
from bisenet.optim import constant, describe_groups, parameter_groups, warmup_cosine, warmup_poly

log = logging.getLogger(__name__)

_PRECISION = {"fp32": "32-true", "fp16": "16-mixed", "bf16": "bf16-mixed"}
_PASSED = {"model.network": ("n_classes",), "optimizer.algorithm": ("params",)}


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
    _quiet()

    data = SegmentationDataModule(typed.data, typed.augment, seed=typed.data_seed)
    module = build(cfg, data.table)  # first, since it is quick: what cannot be built needs no data
    data.prepare_data()
    data.setup()

    last = run_dir / "checkpoints" / "last.ckpt"
    continued = resumed and last.exists()
    if not resumed:
        report.write_json(run_dir / "provenance.json", provenance(typed))
    best = ModelCheckpoint(
        run_dir / "checkpoints", filename="best", monitor=module.miou_key, mode="max", enable_version_counter=False
    )
    clock = StepClock()
    trainer = Trainer(
        default_root_dir=run_dir,
        max_steps=typed.trainer.max_steps,
        max_epochs=-1,
        val_check_interval=min(typed.trainer.val_interval, typed.trainer.max_steps),
        check_val_every_n_epoch=None,
        log_every_n_steps=typed.trainer.log_interval,
        accelerator=typed.trainer.accelerator,
        devices=1,
        precision=_PRECISION[typed.precision.name],  # type: ignore[arg-type]
        use_distributed_sampler=False,  # ours already is
        num_sanity_val_steps=0 if continued else 2,
        logger=[
            csv_logger(run_dir, resumed_step=checkpoint.read(last).step if continued else 0 if resumed else None),
            *(config.instantiate(f"logger.{name}", node) for name, node in cfg.logger.items()),
        ],
        callbacks=[
            clock,
            *([ProgressBar(clock, every=typed.trainer.log_interval)] if typed.trainer.progress else []),
            *(config.instantiate(f"callbacks.{name}", node) for name, node in cfg.callbacks.items()),
            best,
            LastCheckpoint(last, every=typed.trainer.checkpoint_interval),
        ],
        enable_progress_bar=typed.trainer.progress,
        enable_model_summary=False,
    )
    log.info("run directory: %s", run_dir)
    started = time.perf_counter()
    seed_everything(typed.init_seed, verbose=False)  # dropout; independent of how the network was built
    try:
        trainer.fit(module, data, ckpt_path=last if continued else None, weights_only=True)
    except (KeyboardInterrupt, SystemExit):
        log.warning("interrupted; to continue: python scripts/train.py resume=%s", run_dir)
        raise
    results = {
        "name": typed.name,
        "step": trainer.global_step,
        "train_seconds": round(time.perf_counter() - started, 1),  # since the last start of a run that was resumed
        **_evaluate(trainer, module, data, typed.data.report_split, run_dir),
    }
    if best.best_model_path:
        chosen = checkpoint.read(best.best_model_path)
        results["best_on_val"] = {
            "selected_on": typed.data.val_split,
            "step": chosen.step,
            **_best_on_val(trainer, module, data, results, chosen),
        }
    report.write_json(run_dir / "results.json", results)
    _show(results)
    log.info("figures: %s", run_dir / "figures")
    return results


def evaluate(cfg: EvaluateConfig, run_dir: Path) -> dict[str, Any]:
    """Evaluate a checkpoint as its own configuration says, but for what ``cfg`` sets otherwise.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file that is no checkpoint of ours, or a data set that does not fit it.
    """
    _quiet()
    read = checkpoint.read(cfg.checkpoint)
    trained = config.restore(read.config)
    typed: TrainConfig = config.typed(trained)
    typed.data.root = cfg.data_root or typed.data.root
    typed.data.workers = typed.data.workers if cfg.workers is None else cfg.workers
    split = cfg.split or typed.data.report_split

    data = SegmentationDataModule(typed.data, typed.augment, seed=typed.data_seed, table=read.classes)
    module = build(trained, read.classes)
    module.segmenter.network.load_state_dict(read.weights)
    trainer = Trainer(
        accelerator=cfg.accelerator,
        devices=1,
        precision=_PRECISION[typed.precision.name],  # type: ignore[arg-type]
        use_distributed_sampler=False,
        logger=False,
        callbacks=[RichProgressBar(leave=True)],
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    results = {
        "name": typed.name,
        "step": read.step,
        "checkpoint": str(read.path),
        **_evaluate(trainer, module, data, split, run_dir),
    }
    report.write_json(run_dir / "provenance.json", provenance(typed))
    report.write_json(run_dir / "results.json", results)
    _show(results)
    return results


def load(path: str | PathLike[str]) -> Segmenter:
    """The trained model of a checkpoint file or a run directory, in evaluation mode on the CPU."""
    read = checkpoint.read(path)
    segmenter = _segmenter(config.restore(read.config), read.classes)
    segmenter.network.load_state_dict(read.weights)
    return segmenter.eval()


def build(cfg: DictConfig, classes: ClassTable) -> SegmentationModule:
    """Network, loss and optimizer of a configuration; the initial weights depend on ``init_seed`` alone."""
    typed: TrainConfig = config.typed(cfg)
    segmenter = _segmenter(cfg, classes)
    rate = partial(_SCHEDULES[typed.scheduler.name], **_schedule_arguments(typed.scheduler, typed.trainer.max_steps))

    def groups(network: nn.Module) -> list[dict[str, Any]]:
        algorithm = cfg.optimizer.algorithm
        return parameter_groups(network, typed.optimizer.groups, lr=algorithm.lr, weight_decay=algorithm.weight_decay)

    def optimizer(network: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        built = config.instantiate("optimizer.algorithm", cfg.optimizer.algorithm, params=groups(network))
        return built, torch.optim.lr_scheduler.LambdaLR(built, rate)

    optimizer(segmenter.network)  # raises now what would otherwise wait until the data have been read
    log.info("parameter groups:\n%s", describe_groups(groups(segmenter.network)))
    loss = DeepSupervision(_criterion(typed.loss, classes), typed.loss.aux_weight)
    return SegmentationModule(segmenter, loss, optimizer, config.plain(cfg))


def _segmenter(cfg: DictConfig, classes: ClassTable) -> Segmenter:
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU; the caller's generators are not ours
        torch.manual_seed(cfg.init_seed)
        network = config.instantiate("model.network", cfg.model.network, n_classes=classes.num_classes)
    if missing := [name for name in ("head_names", "align_corners") if not hasattr(network, name)]:
        raise ValueError(f"model.network: {type(network).__name__} has no {missing}; see bisenet.networks.blocks")
    return Segmenter(network, classes, list(cfg.data.mean), list(cfg.data.std), config.typed(cfg.protocol))


def _criterion(loss: LossConfig, classes: ClassTable) -> nn.Module:
    if loss.name == "cross_entropy":
        return CrossEntropy(classes.ignore_index, loss.impl)
    return OhemCrossEntropy(loss.threshold, loss.min_kept, loss.normalizer, classes.ignore_index, loss.impl)


_SCHEDULES: dict[str, Callable[..., float]] = {"poly": warmup_poly, "cosine": warmup_cosine, "constant": constant}


def _schedule_arguments(scheduler: SchedulerConfig, max_steps: int) -> dict[str, Any]:
    arguments = {f: getattr(scheduler, f) for f in ("warmup_steps", "warmup_ratio", "warmup")}
    if scheduler.name != "constant":
        arguments["total_steps"] = max_steps
    if scheduler.name == "poly":
        arguments["power"] = scheduler.power
    return arguments


def _evaluate(
    trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, split: str, run_dir: Path
) -> dict[str, Any]:
    """Evaluate on a split; write figures and per-image counts."""
    scores = _scores(trainer, module, data, split)
    classes = module.segmenter.classes
    figures = run_dir / "figures"
    figures.mkdir(exist_ok=True)
    table = scores.to_dict(classes.names)
    if (run_dir / "metrics.csv").exists():
        report.plot_curves(run_dir / "metrics.csv", figures / "curves.png")
    report.plot_iou(table, classes, figures / "iou_per_class.png")
    report.plot_confusion(scores.confusion, classes.names, figures / "confusion.png")
    shown = [data.picture(split, index) for index in _spread(scores.n_images, 4)]
    report.plot_predictions(
        [image for image, _ in shown],
        [mask for _, mask in shown],
        [module.segmenter.predict(image) for image, _ in shown],
        classes,
        figures / "predictions.png",
    )
    report.write_counts(run_dir / f"counts_{split}_{module.segmenter.protocol.name}.npz", scores)
    return {
        "miou": scores.miou,
        "split": split,
        "protocol": module.segmenter.protocol.name,
        "scores": table,
    }


def _scores(
    trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, split: str
) -> SegmentationScores:
    trainer.test(module, dataloaders=data.evaluation_dataloader(split), verbose=False)
    assert module.scores is not None
    return module.scores


def _best_on_val(
    trainer: Trainer,
    module: SegmentationModule,
    data: SegmentationDataModule,
    last: dict[str, Any],
    best: checkpoint.Checkpoint,
) -> dict[str, Any]:
    """Scores of the checkpoint that was best on the validation split, on the split that is reported."""
    if best.step == last["step"]:
        return {"miou": last["miou"], "scores": last["scores"]}
    module.segmenter.network.load_state_dict(best.weights)
    scores = _scores(trainer, module, data, last["split"])
    return {"miou": scores.miou, "scores": scores.to_dict(module.segmenter.classes.names)}


def _spread(n: int, most: int) -> list[int]:
    """At most so many indices, evenly over n."""
    return sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})


def _show(results: dict[str, Any]) -> None:
    console = Console()
    console.print(report.class_table(results["scores"]))
    where = f"{results['protocol']} on {results['split']}"
    console.print(f"mIoU {100 * results['miou']:.2f} ({where}, last weights, step {results['step']})")
    if best := results.get("best_on_val"):
        console.print(f"mIoU {100 * best['miou']:.2f} ({where}, best on {best['selected_on']}, step {best['step']})")


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
    for message in (
        r".*LeafSpec.* is deprecated",  # within Lightning
        r"Experiment logs directory .* exists and is not empty",  # the history was set aside before
        r"Checkpoint directory .* exists and is not empty",
        r"The '.*_dataloader' does not have many workers",
        r"Found .* module\(s\) in eval mode",
    ):
        warnings.filterwarnings("ignore", message=message)
