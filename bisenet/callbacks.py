"""Around the training loop: progress bar, clock, resumable checkpoint, averaged weights, profile, and the loggers."""

import csv
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bisenet import report
from bisenet.classes import ClassTable
from bisenet.module import SegmentationModule
from bisenet.optim import CountingGradScaler
from bisenet.visualize import overlay

log = logging.getLogger(__name__)


def _ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch; the others only accumulate gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepClock(Callback):
    """Logs ``time/step`` (seconds of a whole step) and ``time/data`` (the part of it spent waiting for batches)."""

    def __init__(self) -> None:
        self.step_seconds = self.data_seconds = 0.0
        self._step = self._data = 0.0  # of the step that has begun
        self._idle_since = perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch begins."""
        self._idle_since = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no part of a step."""
        self._idle_since = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch has arrived."""
        self._data += perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done (on a GPU: launched)."""
        now = perf_counter()
        self._step += now - self._idle_since
        self._idle_since = now
        if _ends_step(trainer, batch_idx):
            self.step_seconds, self.data_seconds = self._step, self._data
            self._step = self._data = 0.0
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict({"time/step": self.step_seconds, "time/data": self.data_seconds})


class LossScale(Callback):
    """Logs ``precision/scale`` and ``precision/overflows`` (steps skipped so far) where fp16 gradients are scaled."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the scaler when scalars are written, since that waits for the device."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if isinstance(scaler, CountingGradScaler) and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log_dict({"precision/scale": scaler.get_scale(), "precision/overflows": scaler.overflows})


class ProgressBar(RichProgressBar):
    """Progress over the steps of the run, with loss, learning rate, time per step, time waiting for data, last mIoU.

    Args:
        clock: measures the times.
        every: steps between two readings of the loss (each is a synchronisation with a GPU).
    """

    def __init__(self, clock: StepClock, every: int) -> None:
        super().__init__(refresh_rate=2, leave=True, theme=RichProgressBarTheme(metrics_format=".4g"))
        self.clock = clock
        self.every = every
        self._shown: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        """The bar spans the run from step 0, resumed or not."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands to the right of the bar."""
        if trainer.global_step % self.every == 0 or not self._shown:
            metrics = trainer.callback_metrics
            if "train/loss" in metrics:
                self._shown["loss"] = metrics["train/loss"].item()
                self._shown["lr"] = trainer.optimizers[0].param_groups[-1]["lr"]
            self._shown |= {"s/step": self.clock.step_seconds, "s/data": self.clock.data_seconds}
            self._shown |= {key: value.item() for key, value in metrics.items() if key.endswith("/miou")}
        return self._shown


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` so that a run killed at any moment continues as if nothing had happened.

    Saved after a validation, else at the end of a step, and with the state of torch's random generators in every
    process, which is restored when the first step of the resumed run begins: building loaders and validating draw from
    them too.

    Args:
        path: the file; replaced atomically.
        every: steps between two saves.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._rng: list[dict[str, torch.Tensor]] | None = None
        self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """State of the generators of each process, now, and whether the training was stopped early."""
        own = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        rng = [own]
        if distributed.is_initialized():
            rng *= distributed.get_world_size()
            distributed.all_gather_object(rng, own)  # Lightning calls this in every process
        return {"rng": rng, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first step begins."""
        self._rng = state_dict["rng"]
        self._stopped = state_dict["stopped"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that was stopped early and killed in its evaluation does not go on: Lightning forgets the stop."""
        trainer.should_stop = self._stopped

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generators once."""
        if self._rng is not None:
            own = self._rng[trainer.global_rank]
            torch.set_rng_state(own["cpu"].cpu())
            if "cuda" in own and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"].cpu())
        self._rng = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows: Lightning would skip it after a resumption."""
        assert trainer.val_check_batch is not None
        validation_follows = (batch_idx + 1) % int(trainer.val_check_batch) == 0
        due = _ends_step(trainer, batch_idx) and trainer.global_step % self.every == 0
        if due and not validation_follows:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of this validation in the state of the other callbacks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last weights are the result."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        assert trainer.model is not None
        if broken := [name for name, p in trainer.model.named_parameters() if not torch.isfinite(p).all()]:
            raise FloatingPointError(
                f"after step {trainer.global_step} {broken[0]} and {len(broken) - 1} more parameters are not finite: "
                f"lower optimizer.algorithm.lr or lengthen scheduler.warmup_steps; {self.path} stays as it was"
            )
        self._stopped = trainer.should_stop
        for logger in trainer.loggers:
            logger.save()  # the history on disk is never behind the weights
        trainer.save_checkpoint(self.path)


class BestCheckpoint(ModelCheckpoint):
    """Writes ``best.ckpt`` at every validation with a higher score than all before.

    A run continues wherever its directory lies by then, while Lightning's checkpoint looks for its files where they
    were written, and forgets the best score when they are elsewhere.

    Args:
        folder: where to write.
        monitor: the score.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(folder, filename="best", monitor=monitor, mode="max", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there, with the files that lie here."""
        assert self.dirpath is not None
        written, here = state_dict["dirpath"], str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(key): item for key, item in value.items()}
            return here + value.removeprefix(written) if isinstance(value, str) and value.startswith(written) else value

        super().load_state_dict({key: moved(value) for key, value in state_dict.items()})


class WeightAverage(Callback):
    """Exponential moving average of a network, buffers included, updated after every step and kept in checkpoints.

    Departs from Lightning's ``EMAWeightAveraging``, which validates the average in place of the weights and leaves it
    in the checkpoint under their name: here the weights stay the result, and the average is reported beside them.

    Args:
        network: whose average; not changed.
        decay: weight of the old average in each step, in (0, 1). The first step copies.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = network
        self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the averaged network."""
        return self._average.module.state_dict()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average lives where the network does."""
        self._average.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after a step of the optimizer."""
        if _ends_step(trainer, batch_idx):
            self._average.update_parameters(self.network)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of its updates."""
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._average.load_state_dict(state_dict)


class StepProfile(Callback):
    """Shows where the time of a step goes: ``profile.png``, and ``trace.json`` for chrome://tracing or Perfetto.

    The picture shows medians of ``time/network``, ``time/loss``, ``time/backward`` and ``time/optimizer``, which are
    logged as well, beside ``time/step`` and ``time/data``. A GPU is waited for at the end of each part, which costs a
    little. The trace is recorded after the steps that are measured, since recording slows them down.

    Args:
        folder: where to write.
        warmup: steps that are not measured.
        steps: steps that are measured.
        traced: steps that are recorded.
    """

    _PARTS: tuple[str, ...] = ("data", "network", "loss", "backward", "optimizer")

    def __init__(self, folder: str, warmup: int = 5, steps: int = 20, traced: int = 3) -> None:
        self.folder = Path(folder)
        self.first, self.last = warmup, warmup + steps  # steps measured: first < step <= last
        self.end = self.last + traced
        self._trace: torch.profiler.profile | None = None
        self._seconds: list[dict[str, float]] = []
        self._parts = dict.fromkeys(self._PARTS, 0.0)
        self._since = self._begun = perf_counter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Measure the calls of the network and of the loss."""
        if stage != "fit":
            return
        assert isinstance(pl_module, SegmentationModule)
        if trainer.max_steps < self.end:
            raise ValueError(f"trainer.max_steps: got {trainer.max_steps}, accepted: at least {self.end} to profile")
        for part, module in (("network", pl_module.segmenter.network), ("loss", pl_module.loss)):
            module.register_forward_pre_hook(lambda *_: self._begin())
            module.register_forward_hook(lambda *_, part=part: self._finish(part))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step begins."""
        self._since = self._begun = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch has arrived; record from here on if it is time."""
        self._finish("data")
        if trainer.global_step == self.last and self._trace is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
            self._trace.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """The backward pass begins."""
        self._begin()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward pass is done."""
        self._finish("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The optimizer begins; clipping the gradient and the schedule count with it."""
        self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up a step; draw the picture and write the trace when there are enough."""
        if not _ends_step(trainer, batch_idx):
            self._begin()
            return
        self._finish("optimizer")
        if self.first < trainer.global_step <= self.last:
            self._seconds.append({**self._parts, "step": perf_counter() - self._begun})
            parts = {f"time/{part}": self._parts[part] for part in self._PARTS if part != "data"}
            pl_module.log_dict(parts)
        if trainer.global_step == self.last:
            medians = {key: float(np.median([step[key] for step in self._seconds])) for key in self._seconds[0]}
            report.plot_step_time(medians, self.folder / "profile.png")
        if trainer.global_step == self.end and self._trace is not None:
            self._trace.stop()
            self._trace.export_chrome_trace(str(self.folder / "trace.json"))
            self._trace = None
            log.info("profile: %s", self.folder)
        self._parts = dict.fromkeys(self._PARTS, 0.0)
        self._since = self._begun = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no part of a step."""
        self._since = self._begun = perf_counter()

    def _begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._since = perf_counter()

    def _finish(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = perf_counter()
        self._parts[part] += now - self._since
        self._since = now


# ---------------------------------------------------------------- loggers


def csv_logger(folder: Path, resumed_step: int | None = None) -> CSVLogger:
    """Lightning's CSV logger, writing ``folder/metrics.csv``.

    Lightning deletes an existing file when a folder is opened again. A resumed run keeps its history up to the step it
    resumes from; what came after was lost with the weights and will be logged again.
    """
    file = folder / "metrics.csv"
    aside = file.with_suffix(".csv.aside")
    history: list[dict[str, Any]] = []
    if rank_zero_only.rank != 0:
        return CSVLogger(folder.parent, name="", version=folder.name)  # writes nothing in other processes
    if resumed_step is not None and file.exists():
        file.replace(aside)
    if aside.exists():  # also after a kill that came between the two moments when it has this name
        with aside.open(newline="") as stream:
            rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(stream)]
        # The last row may have been cut off by the kill.
        history = [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) < (resumed_step or 0)]
    logger = CSVLogger(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)
    logger.experiment.metrics.extend(history)
    logger.save()
    aside.unlink(missing_ok=True)
    return logger


def wandb_logger(save_dir: str, mode: str, **init: Any) -> WandbLogger:
    """Lightning's W&B logger, in which neither a missing key nor a missing network stops a run.

    Online without a key that works it logs offline instead and says so. The runs of a directory that is resumed
    are one run (``wandb.init(resume="auto")``).

    Args:
        save_dir: the run directory; its last part is the name of the run. W&B writes to ``wandb/`` in it.
        mode: ``offline``, ``online`` or ``disabled``.
        **init: further arguments of ``wandb.init``, as ``project``, ``group``, ``tags``, ``entity``.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("offline", "online", "disabled"):
        raise ValueError(f"mode: got {mode!r}, accepted: offline | online | disabled")
    import wandb  # a second, which only its users should pay

    if mode == "online":
        try:
            why = "" if wandb.login(prompt=False) else "no API key"
        except wandb.Error as error:
            why = str(error)
        if why:
            mode = "offline"
            log.warning("W&B: %s; logging offline to %s/wandb, from where `wandb sync` uploads it", why, save_dir)
    name = Path(save_dir).name
    return WandbLogger(save_dir=save_dir, **{"name": name, "resume": "auto", **init}, mode=mode)


@contextmanager
def finishing_wandb() -> Iterator[None]:
    """End the W&B run that was begun within, as a failed one when an exception passes: jobs may share a process."""

    def run() -> Any:
        return getattr(sys.modules.get("wandb"), "run", None)

    before = run()
    try:
        yield
    except BaseException:
        if run() is not before:
            run().finish(exit_code=1)
        raise
    if run() is not before:
        run().finish()


class PredictionPanel(Callback):
    """After every validation, gives pictures and the table of classes to the loggers that can show them.

    W&B gets pictures with two masks, "prediction" and "truth", to be switched on and off by class; TensorBoard gets
    picture, truth and prediction side by side. Others get nothing. Each picture has a name of its own,
    ``val/predictions/<number>``: W&B shows several under one name wrongly unless they are of one size.

    Args:
        pictures: image, RGB uint8 (H, W, 3), and mask, uint8 (H, W), of train ids; always the same ones.
        classes: names and colours them.
    """

    _WIDEST = 1024  # pixels; wider pictures are thinned out

    def __init__(self, pictures: Sequence[tuple[np.ndarray, np.ndarray]], classes: ClassTable) -> None:
        self.pictures = pictures
        self.classes = classes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the pictures with the weights that were validated."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, SegmentationModule)
        for name, (scores, _) in pl_module.evaluation.items():
            table = scores.to_dict(self.classes.names, self.classes.categories)
            log_scores(trainer.loggers, f"val/{name}", table, trainer.global_step)
        predictions = [pl_module.segmenter.predict(image) for image, _ in self.pictures]
        self._show(trainer.loggers, predictions, trainer.global_step)

    def _show(self, loggers: Sequence[Logger], predictions: Sequence[np.ndarray], step: int) -> None:
        shown = []
        for (image, truth), prediction in zip(self.pictures, predictions, strict=True):
            thin = -(-image.shape[1] // self._WIDEST)
            shown.append([np.ascontiguousarray(array[::thin, ::thin]) for array in (image, truth, prediction)])
        labels = {**dict(enumerate(self.classes.names)), self.classes.ignore_index: "ignored"}
        for logger in loggers:
            for number, (image, truth, prediction) in enumerate(shown):
                name = f"val/predictions/{number}"
                if isinstance(logger, WandbLogger):
                    masks = {
                        kind: {"mask_data": mask, "class_labels": labels}
                        for kind, mask in {"prediction": prediction, "truth": truth}.items()
                    }
                    logger.log_image(name, [image], step, masks=[masks])
                elif isinstance(logger, TensorBoardLogger):
                    beside = [overlay(image, mask, self.classes.palette, alpha=0.7) for mask in (truth, prediction)]
                    logger.experiment.add_image(name, np.hstack([image, *beside]), step, dataformats="HWC")


def log_scores(loggers: Sequence[Logger], prefix: str, scores: Mapping[str, Any], step: int) -> None:
    """Give the table of classes to the loggers that can show it, as ``<prefix>/classes``.

    Args:
        loggers: of any kind.
        prefix: which evaluation, as ``val/ss``.
        scores: ``SegmentationScores.to_dict()``.
        step: optimisation steps done.
    """
    columns = ["class", "iou", "precision", "recall", "f1", "pixels"]
    rows = [[name, *(entry[key] for key in columns[1:])] for name, entry in scores["classes"].items()]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(f"{prefix}/classes", columns, rows, step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"{prefix}/classes", report.markdown_table({prefix: scores}), step)
