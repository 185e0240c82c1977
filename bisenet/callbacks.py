"""Around the training loop: clock, progress bar, checkpoints that resume exactly, averaged weights, loggers."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bisenet.report import markdown_table, overlay

log = logging.getLogger(__name__)


def is_logged(trainer: Trainer) -> bool:
    """Whether the scalars of the step that has just ended are written."""
    return trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch; the others only accumulate gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepClock(Callback):
    """Logs ``time/step`` (seconds of a whole step) and ``time/data`` (the part of it spent waiting for batches)."""

    def __init__(self) -> None:
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
        if ends_step(trainer, batch_idx):
            if is_logged(trainer):
                pl_module.log_dict({"time/step": self._step, "time/data": self._data})
            self._step = self._data = 0.0


class LossScale(Callback):
    """Logs ``precision/scale`` and ``precision/overflows`` (steps skipped so far) where fp16 gradients are scaled.

    The scale falls when, and only when, a step is skipped because a gradient overflowed. It is compared on the device,
    and read where scalars are written: nothing waits in between.
    """

    def __init__(self) -> None:
        self._overflows: torch.Tensor | int = 0
        self._before = torch.ones(())

    @staticmethod
    def _scale(trainer: Trainer, pl_module: LightningModule) -> torch.Tensor | None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=pl_module.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The scale before the step."""
        if (scale := self._scale(trainer, pl_module)) is not None:
            self._before = scale

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step that was skipped."""
        if (scale := self._scale(trainer, pl_module)) is not None:
            self._overflows = self._overflows + (scale < self._before)
            if is_logged(trainer):
                pl_module.log_dict({"precision/scale": scale.item(), "precision/overflows": float(self._overflows)})

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"overflows": int(self._overflows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a count."""
        self._overflows = state_dict["overflows"]


class ProgressBar(RichProgressBar):
    """Progress over the steps of the run, with loss, learning rate, time per step, time waiting for data, last mIoU.

    Args:
        refresh_rate: batches between two updates. The numbers are read, which waits for a GPU, when they are logged.
    """

    def __init__(self, refresh_rate: int = 2) -> None:
        super().__init__(refresh_rate, leave=True, theme=RichProgressBarTheme(metrics_format=".4g"))
        self._shown: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        """The bar spans the run from step 0, resumed or not."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands to the right of the bar."""
        if is_logged(trainer) or not self._shown:
            metrics = trainer.callback_metrics
            names = {"train/loss": "loss", "time/step": "s/step", "time/data": "s/data"}
            names |= {key: key for key in metrics if key.endswith("/miou")}
            self._shown = {name: metrics[key].item() for key, name in names.items() if key in metrics}
            self._shown |= {"lr": trainer.optimizers[0].param_groups[-1]["lr"]} if self._shown else {}
        return self._shown


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` so that a run killed at any moment continues as if nothing had happened.

    Lightning's ``ModelCheckpoint(save_last=True)`` forgets the random generators, an early stop, and a validation that
    was due. Here the file is saved after a validation, else at the end of a step, with the state of torch's generators
    in every process. The state is restored when the first step of the resumed run begins: building loaders and
    validating draw from them too.

    Args:
        path: the file; replaced atomically.
        every_n_steps: steps between two saves.
    """

    def __init__(self, path: str | Path, every_n_steps: int = 250) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: got {every_n_steps}, accepted: an integer of at least 1")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._generators: list[dict[str, torch.Tensor]] | None = None
        self._stopped = self._within_step = False

    def state_dict(self) -> dict[str, Any]:
        """State of the generators of each process, now, and whether the training was stopped early."""
        own = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            own["cuda"] = torch.cuda.get_rng_state()
        generators = [own]
        if distributed.is_initialized():
            generators *= distributed.get_world_size()
            distributed.all_gather_object(generators, own)  # Lightning calls this in every process
        return {"rng": generators, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the first step begins."""
        self._generators = state_dict["rng"]
        self._stopped = state_dict["stopped"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A training that was stopped early and killed in its evaluation does not go on: Lightning forgets the stop."""
        trainer.should_stop = self._stopped

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generators once."""
        if self._generators is not None:
            own = self._generators[trainer.global_rank]
            torch.set_rng_state(own["cpu"].cpu())
            if "cuda" in own and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"].cpu())
        self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows: Lightning would skip it after a resumption."""
        validation_follows = (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        self._within_step = not ends_step(trainer, batch_idx)  # of accumulated gradients, which no checkpoint holds
        due = trainer.global_step % self.every_n_steps == 0
        if due and not validation_follows and not self._within_step:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the score of this validation in the state of the other callbacks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._within_step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last weights are the result."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert trainer.model is not None
        if broken := [name for name, p in trainer.model.named_parameters() if not torch.isfinite(p).all()]:
            raise FloatingPointError(
                f"after step {trainer.global_step} {broken[0]} and {len(broken) - 1} more parameters are not finite: "
                f"lower optimizer.lr or lengthen scheduler.warmup_steps; {self.path} stays as it was"
            )
        self._stopped = trainer.should_stop
        for logger in trainer.loggers:
            logger.save()  # the history on disk is never behind the weights
        trainer.save_checkpoint(self.path)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best score, which continues wherever the run's directory lies by then.

    Lightning's own looks for its files where they were written, and forgets the best score when they are elsewhere.

    Args:
        dirpath: where to write.
        monitor: the score.
        **kwargs: of ``ModelCheckpoint``.
    """

    def __init__(self, dirpath: str, monitor: str, **kwargs: Any) -> None:
        super().__init__(dirpath, monitor=monitor, enable_version_counter=False, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there, with the files that lie here."""
        written, here = state_dict["dirpath"], str(self.dirpath)

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {moved(key): item for key, item in value.items()}
            return here + value.removeprefix(written) if isinstance(value, str) and value.startswith(written) else value

        super().load_state_dict({key: moved(value) for key, value in state_dict.items()})


class WeightAverage(Callback):
    """Exponential moving average of the network, buffers included, updated after every step and kept in checkpoints.

    Departs from Lightning's ``EMAWeightAveraging``, which validates the average in place of the weights and leaves it
    in the checkpoint under their name: here the weights stay the result, and the average is reported beside them.

    Args:
        decay: weight of the old average in each step, in (0, 1). The first step copies.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay: got {decay}, accepted: a number in (0, 1)")
        self.decay = decay
        self._average: AveragedModel

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """State dict of the averaged network."""
        return self._average.module.state_dict()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Make a place for the average, before a checkpoint fills it."""
        if stage == "fit":
            average = get_ema_multi_avg_fn(self.decay)
            self._average = AveragedModel(pl_module.segmenter.network, multi_avg_fn=average, use_buffers=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average lives where the network does."""
        self._average.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update after a step of the optimizer."""
        if ends_step(trainer, batch_idx):
            self._average.update_parameters(pl_module.segmenter.network)

    def state_dict(self) -> dict[str, Any]:
        """The average and the number of its updates."""
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from there."""
        self._average.load_state_dict(state_dict)


class PredictionPanel(Callback):
    """After every validation, gives images and the table of classes to the loggers that can show them.

    W&B gets images with two masks, "prediction" and "truth", to be switched on and off by class; TensorBoard gets
    image, truth and prediction side by side. Others get nothing. Each image has a name of its own,
    ``val/predictions/<number>``: W&B shows several under one name wrongly unless they are of one size.

    Args:
        images: how many, evenly over the validation split; always the same ones.
    """

    _WIDEST = 1024  # pixels; wider images are thinned out

    def __init__(self, images: int = 4) -> None:
        self.images = images

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Predict the images with the weights that were validated."""
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
        if trainer.sanity_checking or not trainer.is_global_zero or not loggers:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes, step = pl_module.segmenter.classes, trainer.global_step
        for name, (scores, _) in pl_module.evaluation.items():
            log_scores(loggers, f"val/{name}", scores.to_dict(classes.names, classes.categories), step)
        labels = {**dict(enumerate(classes.names)), classes.ignore_index: "ignored"}
        for number, sample in enumerate(data.examples(data.val_split, self.images)):
            thin = -(-sample[0].shape[1] // self._WIDEST)
            arrays = (*sample, pl_module.segmenter.predict(sample[0]))
            image, truth, mask = (np.ascontiguousarray(array[::thin, ::thin]) for array in arrays)
            kinds = {"prediction": mask, "truth": truth}
            masks = {kind: {"mask_data": of, "class_labels": labels} for kind, of in kinds.items()}
            beside = [overlay(image, of, classes.palette, alpha=0.7) for of in (truth, mask)]
            name = f"val/predictions/{number}"
            for logger in loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(name, [image], step, masks=[masks])
                else:
                    logger.experiment.add_image(name, np.hstack([image, *beside]), step, dataformats="HWC")


def log_scores(loggers: Sequence[Logger], prefix: str, scores: Mapping[str, Any], step: int) -> None:
    """Give the table of classes to the loggers that can show it, as ``<prefix>/classes``.

    Args:
        loggers: of any kind.
        prefix: which evaluation, as ``val/ss``.
        scores: ``SegmentationScores.to_dict()``.
        step: optimisation steps done.
    """
    columns = ["iou", "precision", "recall", "f1", "pixels"]
    rows = [[name, *(entry[key] for key in columns)] for name, entry in scores["classes"].items()]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(f"{prefix}/classes", ["class", *columns], rows, step=step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(f"{prefix}/classes", markdown_table({prefix: scores}), step)


class MetricsFile(Logger):
    """Writes ``metrics.csv``: one row for each step at which anything was logged, in the order of the steps.

    Lightning's CSVLogger deletes the file of a run that is resumed. This one keeps it up to the first step that is
    logged again: what came after the checkpoint was lost with the weights.

    Args:
        path: the file. Rows are appended; for a new column it is rewritten and replaced atomically.
    """

    name = version = ""  # type: ignore[assignment]  # Lightning asks

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: dict[int, dict[str, Any]] | None = None
        self._columns: list[str] = []
        self._end = 0, 0  # where the last row in the file begins, and its step

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they lie beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step."""
        assert step is not None
        if self._rows is None:
            self._rows = {number: row for number, row in self._read().items() if number < step}
        row = self._rows.setdefault(step, {"step": step})
        row.update({key: value for key, value in metrics.items() if key != "epoch"})  # a training is counted in steps

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as stream:
            rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(stream)]
        return {int(row["step"]): row for row in rows if row.get("step", "").isdecimal()}  # the last may be cut off

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._rows:
            return
        (begin, step), last = self._end, max(self._rows)
        if set(self._rows[last]) <= set(self._columns) and last >= step:
            with self.path.open("r+", newline="") as stream:
                stream.seek(begin) if last == step else stream.seek(0, os.SEEK_END)
                self._end = stream.tell(), last
                csv.DictWriter(stream, self._columns).writerow(self._rows[last])
                stream.truncate()
            return
        self._columns = ["step", *sorted({key for row in self._rows.values() for key in row} - {"step"})]
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            for number, row in self._rows.items():
                self._end = stream.tell(), number
                writer.writerow(row)
        os.replace(draft, self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what was logged last."""
        self.save()
