"""The composition root: builds all objects of a configuration, trains, evaluates, and writes the run directory."""

import inspect
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_method, instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from bisenet import checkpoint, report
from bisenet.callbacks import BestCheckpoint, CheckpointFiles, EndOnSignal, WeightAverage, log_scores
from bisenet.data import SegmentationDataModule
from bisenet.inference import Segmenter
from bisenet.launch import PRACTICAL, differences, read_results
from bisenet.losses import enet_class_weights
from bisenet.module import SegmentationModule
from bisenet.optim import parameter_groups

log = logging.getLogger(__name__)


# ---------------------------------------------------------------- building


def build(cfg: DictConfig, key: str, **passed: Any) -> Any:
    """Build the node of the configuration at a key.

    Args:
        cfg: the configuration.
        key: dotted.
        passed: arguments of the constructor that no configuration holds.

    Raises:
        ValueError: the constructor refuses an argument, or there is no node; the message begins with the key.
    """
    return _build(OmegaConf.select(cfg, key), key, passed)


def build_all(cfg: DictConfig, key: str) -> dict[str, Any]:
    """Build the named nodes below a key, each as :func:`build` does: name -> object."""
    nodes = OmegaConf.select(cfg, key) or {}
    if not isinstance(nodes, Mapping):
        raise ValueError(f"{key}: got {nodes}, accepted: nodes by name")
    return {name: _build(node, f"{key}.{name}", {}) for name, node in nodes.items()}


def _build(node: Any, key: str, passed: dict[str, Any]) -> Any:
    with naming(key):
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ValueError(f"got {node}, accepted: a node with a _target_")
        make = instantiate(node, _convert_="all", _partial_=True)
        try:
            return make(**passed)
        except TypeError as error:
            accepted = ", ".join(name for name in inspect.signature(make.func).parameters if name not in passed)
            raise ValueError(f"{node['_target_']}: {error}; accepted: {accepted}") from error


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Turn an error within into a one-line ValueError that begins with a key of the configuration."""
    try:
        yield
    except OSError:  # its message names the file
        raise
    except Exception as error:
        inner = re.search(r"full_key: (\S+)", str(error))
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        message = re.sub(r" full_key: \S+", "", " ".join(str(cause).split()))
        if not isinstance(cause, ValueError | InstantiationException):
            message = f"{type(cause).__name__}: {message}"
        join = "." if re.match(r"[a-z_]+(\.[a-z_]+)?: ", message) else ": "  # the constructor has named its argument
        raise ValueError(f"{inner[1] if inner else key}{join}{message}") from error


def build_data(cfg: DictConfig) -> SegmentationDataModule:
    """The data set with its augmentation."""
    return build(cfg, "data", augment=list(build_all(cfg, "augment").values()), seed=cfg.data_seed)


def build_segmenter(cfg: DictConfig, data: SegmentationDataModule) -> Segmenter:
    """Network, normalisation and protocols; the initial weights depend on ``init_seed`` alone."""
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU; the caller's random state stays
        torch.manual_seed(cfg.init_seed)
        network = build(cfg, "model.network", n_classes=data.table.num_classes)
    if missing := [name for name in ("head_names", "align_corners") if not hasattr(network, name)]:
        raise ValueError(f"model.network: {type(network).__name__} has no {missing}; see bisenet.networks.blocks")
    protocols = build_all(cfg, "protocol")
    if not protocols:
        raise ValueError("protocol: got none, accepted: at least one, such as protocol=ss or protocol=[ss,mscf]")
    return Segmenter(network, data.table, data.mean, data.std, protocols, cfg.max_pixels_per_batch)


def build_module(cfg: DictConfig, data: SegmentationDataModule, segmenter: Segmenter) -> SegmentationModule:
    """Loss, optimizer and scheduler around a segmenter; the parameter groups are logged."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    weights = OmegaConf.select(cfg, "loss.criterion.class_weights")
    classes = data.table.num_classes
    if weights == "enet":
        cfg.loss.criterion.class_weights = [1.0] * classes  # replaced once the labels have been counted
    elif weights is not None and (not isinstance(weights, Sequence) or len(weights) != classes):
        raise ValueError(f"loss.criterion.class_weights: got {weights}, accepted: one for each of {classes} classes")
    rules = build_all(cfg, "parameter_groups")

    def optimizer(network: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        with naming("parameter_groups"):
            groups = parameter_groups(network, rules, cfg.optimizer.lr, cfg.optimizer.get("weight_decay", 0.0))
        takes_fused = "fused" in inspect.signature(get_method(cfg.optimizer["_target_"])).parameters
        # A fused optimizer unscales fp16 gradients itself, so that the step does not wait for the GPU. Lightning
        # cannot clip such gradients.
        fused = groups[0]["params"][0].is_cuda and takes_fused and cfg.trainer.gradient_clip_val is None
        given = {"fused": True} if fused and not {"fused", "foreach", "differentiable"} & cfg.optimizer.keys() else {}
        built = build(cfg, "optimizer", params=groups, **given)
        return built, build(cfg, "scheduler", optimizer=built)

    for group in optimizer(segmenter.network)[0].param_groups:  # a trial, which finds mistakes before data is read
        size = sum(parameter.numel() for parameter in group["params"])
        log.info("parameter group %s: %d tensors, %s parameters, lr %g, weight decay %g", group["name"],
                 len(group["params"]), f"{size:,}", group["lr"], group["weight_decay"])  # fmt: skip
    portable = checkpoint.portable(config["model"]["network"], segmenter, config["data"])
    return SegmentationModule(segmenter, build(cfg, "loss"), optimizer, portable, config)


def build_trainer(cfg: DictConfig, last: Path | None, *ours: Callback) -> Trainer:
    """Lightning's Trainer with callbacks and loggers.

    Args:
        cfg: the configuration.
        last: checkpoint that the run continues from; None: it begins.
        ours: callbacks beside those of the configuration.
    """
    callbacks = [*ours, *build_all(cfg, "callbacks").values()]
    for node in cfg.logger.values():
        if last and OmegaConf.is_dict(node) and "purge_step" in node:  # TensorBoard
            node.purge_step = checkpoint.read(last).step
    if not torch.cuda.is_available() and cfg.trainer.sync_batchnorm:
        log.info("trainer.sync_batchnorm: without effect, since torch has it for GPUs only")
        cfg.trainer.sync_batchnorm = False
    passed: dict[str, Any] = {"num_sanity_val_steps": 0} if last else {}
    bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    loggers = list(build_all(cfg, "logger").values()) or [DummyLogger()]  # callbacks may read trainer.logger
    return build(
        cfg,
        "trainer",
        callbacks=callbacks,
        logger=loggers,
        enable_progress_bar=bar,
        plugins=[cluster(), CheckpointFiles()],
        **passed,
    )


def cluster() -> ClusterEnvironment:
    """Ranks from torchrun's variables, if there are any; never Slurm's, with which Lightning would requeue the job."""
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else LightningEnvironment()


def require_enough_images(cfg: DictConfig, network: nn.Module, processes: int) -> None:
    """Raise a ValueError if each batch is a single image, and the network cannot train on one (batch norm)."""
    parts = cfg.trainer.accumulate_grad_batches * processes
    if cfg.data.batch_size == parts and not cfg.trainer.sync_batchnorm:
        with naming("data.batch_size"), torch.no_grad():
            deepcopy(network).train()(torch.zeros(1, 3, 64, 64))


def load_weights(cfg: DictConfig, network: nn.Module) -> None:
    """Load the weights that a new training starts from, or log that it starts from scratch."""
    model = cfg.model
    if model.pretrained is None:
        log.info("pretrained weights: none, the network starts from scratch")
    else:
        with naming("model.pretrained"):
            checkpoint.load_backbone(network, model.backbone, model.pretrained, model.pretrained_sha256)
    if cfg.finetune_from is not None:
        with naming("finetune_from"):
            checkpoint.finetune(network, cfg.finetune_from)


def choose_layout(cfg: DictConfig, last: str | Path | None, network: nn.Module) -> None:
    """Put a network's weights into the memory layout of the training. ``auto`` becomes true or false in ``cfg``.

    ``auto`` keeps the layout of a checkpoint that is continued, since another layout rounds differently. Otherwise it
    means channels_last on a GPU in half precision and on a CPU with AVX-512. It follows this rule rather than a timing,
    which could choose differently for the same command.
    """
    if cfg.channels_last == "auto":
        if last:
            cfg.channels_last = checkpoint.read(last).hyper_parameters.get("channels_last", False)
        elif cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
            cfg.channels_last = cfg.trainer.precision != "32-true"
        else:
            cfg.channels_last = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        log.info("channels_last: %s", cfg.channels_last)
    elif type(cfg.channels_last) is not bool:
        raise ValueError(f"channels_last: got {cfg.channels_last}, accepted: auto | true | false")
    if cfg.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---------------------------------------------------------------- training


def train(config: dict[str, Any] | DictConfig) -> dict[str, Any]:
    """Train, evaluate the last weights and the best on val, and write the run directory.

    Args:
        config: as ``conf/train.yaml`` composes it. All files are written to ``run_dir``; if ``resume`` is set, the run
            continues from its last checkpoint there.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: configuration or data cannot work; raised before the first step.
        FloatingPointError: the loss became infinite or not a number.
    """
    plain: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)  # also lists that resolvers return
    cfg: Any = OmegaConf.create(plain)
    run_dir = Path(cfg.run_dir)
    if cfg.resume is not None and (results := read_results(run_dir)) is not None:
        log.info("%s is finished already", run_dir)
        report.show_results(results)
        return results
    ending = EndOnSignal()
    with ending.listening(), ending_wandb():
        return _train(cfg, run_dir, ending)


def _train(cfg: DictConfig, run_dir: Path, ending: EndOnSignal) -> dict[str, Any]:
    quiet()
    for key in ("seed", "init_seed", "data_seed"):
        if type(cfg[key]) is not int or not 0 <= cfg[key] < 2**32:
            raise ValueError(f"{key}: got {cfg[key]}, accepted: an integer in [0, 2**32)")
    run_dir.mkdir(parents=True, exist_ok=True)
    last = checkpoint.newest(run_dir) if cfg.resume is not None else None
    from_labels = OmegaConf.select(cfg, "loss.criterion.class_weights") == "enet"
    data = build_data(cfg)
    segmenter = build_segmenter(cfg, data)
    choose_layout(cfg, last or cfg.ckpt_path, segmenter.network)
    module = build_module(cfg, data, segmenter)
    if last:
        require_same_training(last, module)
    elif cfg.ckpt_path is not None:  # its optimizer state replaces what the configuration says
        require_same_training(Path(cfg.ckpt_path), module, ["optimizer", "scheduler", "parameter_groups"])
    trainer = build_trainer(cfg, last, ending)
    require_enough_images(cfg, segmenter.network, trainer.world_size)
    if trainer.is_global_zero and last and (run_dir / "results.json").exists():
        log.warning("%s/results.json is damaged: the last checkpoint is evaluated again", run_dir)
        (run_dir / "results.json").unlink()
    if cfg.resume is not None and last is None and (run_dir / "provenance.json").exists():
        log.warning("%s has no checkpoint yet: the run begins again", run_dir)
    if trainer.is_global_zero and last is None:  # DDP and the module send weights and buffers to the other processes
        load_weights(cfg, segmenter.network)
        data.prepare_data()
        data.setup()
        if from_labels:
            weights = enet_class_weights(data.class_counts(data.train_split))
            log.info("class weights: %s", dict(zip(data.table.names, weights, strict=True)))
            module.loss.criterion.class_weights.copy_(torch.tensor(weights))  # type: ignore
    if cfg.compile:
        segmenter.network.compile()
    origin = report.provenance({key: cfg[key] for key in ("seed", "init_seed", "data_seed")})
    for logger in trainer.loggers:
        logger.log_hyperparams({"provenance": origin})
    if trainer.is_global_zero and not (run_dir / "provenance.json").exists():
        report.write_json(run_dir / "provenance.json", origin)
    log.info("run directory: %s", run_dir)
    started = time.perf_counter()
    seed_everything((cfg.init_seed + trainer.global_rank) % 2**32, verbose=False)  # for dropout
    trainer.fit(module, data, ckpt_path=last or cfg.ckpt_path, weights_only=True)
    results = {
        "name": cfg.name,
        "step": trainer.global_step,
        "train_seconds": round(time.perf_counter() - started, 1),  # of a resumed run, since its last start
    }
    results |= score(trainer, module, data, data.report_split, run_dir)
    others = score_other_weights(trainer, module, data, results, run_dir / "checkpoints" / "ema.ckpt")
    results |= others
    if trainer.is_global_zero:
        for stage, found in {"last": results, **others}.items():
            for name, scores in found["protocols"].items():
                log_scores(trainer.loggers, f"final/{stage}/{results['split']}/{name}", scores, results["step"])
        report.write_results(results, run_dir)
        log.info("figures: %s", run_dir / "figures")
    return results


def require_same_training(file: Path, module: SegmentationModule, nodes: Sequence[str] = ()) -> None:
    """Raise a ValueError if a checkpoint was written under another configuration than a module's.

    Args:
        file: the checkpoint.
        module: the module, whose hyperparameters are its configuration.
        nodes: compare only these nodes of the configuration; empty: compare all of it.
    """
    written, now = checkpoint.read(file).hyper_parameters, dict(module.hparams)
    there, here = (json.dumps(str(config.get("run_dir"))).strip('"') for config in (written, now))
    before = json.loads(json.dumps(written).replace(there, here))  # the directory may have been moved
    if nodes:
        before, now = ({node: config.get(node) for node in nodes} for config in (before, now))
    if found := differences(before, now, [*PRACTICAL, "resume", "sweep"]):
        raise ValueError(f"{file} was written under another configuration:\n{found}")


@contextmanager
def ending_wandb() -> Iterator[None]:
    """End the W&B run that was begun within, as failed after an exception; jobs of a sweep share one process."""
    code = 1
    try:
        yield
        code = 0
    finally:
        if (run := getattr(sys.modules.get("wandb"), "run", None)) is not None:
            run.finish(exit_code=code)


# ---------------------------------------------------------------- evaluation


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate a checkpoint on the data and with the protocols of its training, unless the configuration names others.

    Args:
        cfg: as ``conf/evaluate.yaml`` composes it.

    Returns:
        The content of ``results.json``.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file that :func:`bisenet.checkpoint.read` refuses, or a data set that does not fit it.
    """
    quiet()
    given: Any = None if cfg.data is None else OmegaConf.to_container(cfg.data, resolve=True)
    read = checkpoint.read(cfg.checkpoint, given)
    data = data_of(cfg, read, given)
    segmenter = read.segmenter(build_all(cfg, "protocol") or None, list(cfg.trust))
    if data.table.names != segmenter.classes.names:
        raise ValueError(
            f"data: has the classes {', '.join(data.table.names)}, the network of {read.path} those of "
            f"{segmenter.classes.name}; accepted: the same classes"
        )
    trainer = Trainer(
        accelerator=cfg.accelerator,
        devices=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        plugins=[cluster()],
        callbacks=[EndOnSignal()],
    )
    on_gpu = trainer.strategy.root_device.type == "cuda"
    segmenter.max_pixels_per_batch = cfg.max_pixels_per_batch
    precision = {"32-true": "fp32", "16-mixed": "fp16"}.get(cfg.trainer.precision, "bf16")
    segmenter.precision = "bf16" if precision == "fp16" and not on_gpu else precision
    split = cfg.split or data.report_split
    run_dir = Path(cfg.run_dir)
    report.write_json(run_dir / "provenance.json", report.provenance({}))  # first: the code may change meanwhile
    results = {"name": read.hyper_parameters.get("name", read.path.stem), "step": read.step}
    results |= {"checkpoint": str(read.path), **score(trainer, SegmentationModule(segmenter), data, split, run_dir)}
    if isinstance(read, checkpoint.ExportedCheckpoint):
        made = read.exported.facts["export"]
        results |= {"precision": made["precision"], "device": f"cpu, {read.exported.runtime}"}
        if made["precision"] == "int8" and (source := Path(made["checkpoint"])).exists():
            published = read.hyper_parameters["data"] if source.suffix == ".pth" else None
            network = SegmentationModule(
                checkpoint.read(source, published).segmenter(segmenter.protocols, list(cfg.trust))
            )
            trainer.test(network, dataloaders=data.evaluation_dataloader(split), verbose=False)
            results["cost"] = {name: found["miou"] - results["protocols"][name]["miou"]
                               for name, found in protocol_scores(network).items()}  # fmt: skip
    report.write_results(results, run_dir)
    for name, cost in results.get("cost", {}).items():
        print(f"int8 costs {100 * cost:.2f} points of mIoU ({name}): the network itself has "
              f"{report.percent(results['protocols'][name]['miou'] + cost)}")  # fmt: skip
    return results


def data_of(cfg: DictConfig, read: checkpoint.Checkpoint, given: Any) -> SegmentationDataModule:
    """The data set of an evaluation.

    Args:
        cfg: ``data_root``, ``workers``, ``cache`` and ``cache_root`` replace values of the node.
        read: the checkpoint, whose data set is used if none is given.
        given: node of a data set, or None. The cache in a checkpoint's node is ignored: no file decides where
            something is written.
    """
    node: Any = given or {k: v for k, v in read.data_node().items() if k not in ("cache", "cache_root")}
    names = {"root": "data_root", "workers": "workers", "cache": "cache", "cache_root": "cache_root"}
    cfg.data = node | {key: cfg[name] for key, name in names.items() if cfg.get(name) is not None}
    if given:
        return build(cfg, "data", augment=[], seed=0)
    node = OmegaConf.to_container(cfg.data)  # from a checkpoint, whose classes are not trusted
    dataset = partial(checkpoint.build, node.pop("dataset"), list(cfg.trust), checkpoint.DATASETS)
    known = inspect.signature(SegmentationDataModule).parameters
    kept: Any = {key: value for key, value in node.items() if key in known}
    try:
        return SegmentationDataModule(**kept | {"dataset": dataset, "classes": read.classes, "augment": [], "seed": 0})
    except TypeError as error:
        raise ValueError(f"{read.path}: data: {error}") from error


def score(
    trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, split: str, folder: Path
) -> dict[str, Any]:
    """Evaluate on a split, unless the last validation has just done so; write figures and counts by image.

    Returns:
        The part of ``results.json`` for one set of weights: split, scores by protocol, precision, device and seconds.
    """
    started = time.perf_counter()
    validated = split == data.val_split and module.validated_step == trainer.global_step
    if not (validated and len(module.protocols) == 1):
        trainer.test(module, dataloaders=data.evaluation_dataloader(split), verbose=False)
    seconds = time.perf_counter() - started
    protocols = protocol_scores(module)
    device = trainer.strategy.root_device
    if trainer.is_global_zero:
        module.to(device)  # Lightning has moved it to the CPU
        illustrate(module, protocols, data, split, folder)
        module.cpu()
    first = next(iter(protocols))
    return {
        "split": split,
        "protocol": first,
        "miou": protocols[first]["miou"],
        "precision": module.segmenter.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "evaluation_seconds": round(seconds, 1),
        "protocols": protocols,
    }


def illustrate(
    module: SegmentationModule, protocols: dict[str, Any], data: SegmentationDataModule, split: str, folder: Path
) -> None:
    """Write the figures of an evaluation and its counts by image to a folder."""
    segmenter, classes, figures = module.segmenter, module.segmenter.classes, folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    if (folder / "metrics.csv").exists():
        report.plot_curves(folder / "metrics.csv", figures / "curves.png")
    report.plot_iou(protocols, classes, figures / "iou_per_class.png")
    for name, (scores, _) in module.evaluation.items():
        report.plot_confusion(scores.confusion, classes.names, figures / f"confusion_{name}.png")
        report.write_counts(folder / f"counts_{split}_{name}.npz", scores)
    images, masks = zip(*data.examples(split, 4), strict=True)
    predictions = [segmenter.predict(image) for image in images]
    report.plot_predictions(images, masks, predictions, classes, figures / "predictions.png")


def protocol_scores(module: SegmentationModule) -> dict[str, Any]:
    """Protocol -> scores, seconds and definition of the last evaluation, in plain values."""
    classes = module.segmenter.classes
    return {
        name: {
            **scores.to_dict(classes.names, classes.categories),
            "seconds": round(seconds, 3),  # of prediction; work that protocols share counts for each
            "definition": asdict(module.segmenter.protocols[name]),
        }
        for name, (scores, seconds) in module.evaluation.items()
    }


def score_other_weights(
    trainer: Trainer, module: SegmentationModule, data: SegmentationDataModule, last: dict[str, Any], ema_file: Path
) -> dict[str, Any]:
    """Score the checkpoint that was best on the validation split, and the averaged weights, if they exist.

    Args:
        trainer, module, data: of the training; the module's weights are replaced.
        last: results of the last weights.
        ema_file: where the averaged weights are written as a checkpoint.

    Returns:
        ``best_on_val`` and ``ema``, each with ``protocols`` and where the weights come from.
    """

    def protocols(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
        module.segmenter.network.load_state_dict(weights)
        trainer.test(module, dataloaders=data.evaluation_dataloader(last["split"]), verbose=False)
        return protocol_scores(module)

    found: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BestCheckpoint) and callback.best_model_path:
            best = checkpoint.read(callback.best_model_path)
            scores = last["protocols"] if best.step == last["step"] else protocols(best.weights)
            found["best_on_val"] = {"selected_on": data.val_split, "step": best.step, "protocols": scores}
        elif isinstance(callback, WeightAverage):
            found["ema"] = {"decay": callback.decay, "protocols": protocols(callback.weights)}
            if trainer.is_global_zero:
                checkpoint.write(ema_file, callback.weights, last["step"], module.portable, dict(module.hparams))
    return found


def quiet() -> None:
    """Print Lightning's warnings once (by Hydra), log below warnings in the first process only, drop known warnings."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.WARNING)
    if rank_zero_only.rank != 0:
        logging.getLogger().setLevel(logging.WARNING)  # the first process speaks for all
    for message in (
        r".*LeafSpec.* is deprecated",  # within Lightning
        r"Experiment logs directory .* exists and is not empty",
        r"Checkpoint directory .* exists and is not empty",
        r"The '.*_dataloader' does not have many workers",
        r"Found .* module\(s\) in eval mode",
        r"`broadcast_buffers` is deprecated",  # torch 2.11 lacks the replacement
        r"It is recommended to use `self.log\(.*, sync_dist=True\)`",  # all devices have the same score
    ):
        warnings.filterwarnings("ignore", message=message)
