"""Callbacks that every run has: the progress bar, the clock, the checkpoint that can be resumed, the CSV history."""

import csv
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from bisenet.optim import CountingGradScaler


class StepClock(Callback):
    """Logs ``time/step`` (seconds of a whole step) and ``time/data`` (the part of it spent waiting for a batch)."""

    def __init__(self) -> None:
        self.step_seconds = self.data_seconds = 0.0
        self._idle_since = perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The wait for the first batch begins."""
        self._idle_since = perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no part of a step."""
        self._idle_since = perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch has arrived."""
        self.data_seconds = perf_counter() - self._idle_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is done (on a GPU: launched)."""
        now = perf_counter()
        self.step_seconds = now - self._idle_since
        self._idle_since = now
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

    Saved after a validation, else at the end of a step, and with the state of torch's random generators, which is
    restored when the first step of the resumed run begins: building loaders and validating draw from them too.

    Args:
        path: the file; replaced atomically.
        every: steps between two saves.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self._rng: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """State of the generators, now."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first step begins."""
        self._rng = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generators once."""
        if self._rng is not None and trainer.is_global_zero:  # the state is that of the first process
            torch.set_rng_state(self._rng["cpu"].cpu())
            for device, state in enumerate(self._rng["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(state.cpu(), device)
        self._rng = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows: Lightning would skip it after a resumption."""
        assert trainer.val_check_batch is not None
        validation_follows = trainer.global_step % int(trainer.val_check_batch) == 0
        if trainer.global_step % self.every == 0 and not validation_follows:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of this validation in the state of the other callbacks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last weights are the result."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # the history on disk is never behind the weights
        trainer.save_checkpoint(self.path)


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
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]
        history = [row for row in rows if int(row["step"]) < (resumed_step or 0)]
    logger = CSVLogger(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)
    logger.experiment.metrics.extend(history)
    logger.save()
    aside.unlink(missing_ok=True)
    return logger
