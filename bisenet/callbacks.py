"""Callbacks and loggers of a training: clock, progress bar, exact resumption, averaged weights, metrics.csv."""

import csv
import io
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bisenet.files import remove_drafts, replacing
from bisenet.launch import ENDED, ENDING_SIGNALS
from bisenet.report import markdown_table, overlay, write_json

log = logging.getLogger(__name__)


def is_logged(trainer: Trainer) -> bool:
    """Whether the scalars of the step that has just ended are written."""
    return trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this batch; the others only accumulate gradients."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StepClock(Callback):
    """Logs ``time/step`` (seconds of a whole step) and ``time/data`` (the part of it spent waiting for batches).

    It must be the last callback: the time of callbacks after it would count as waiting.

    It warns once, when 50 steps have spent more than a tenth of their time waiting; with a GPU, only the time in which
    the GPU is idle counts. The first 50 steps of a process are left out: workers start, libraries choose algorithms.
    """

    def __init__(self) -> None:
        self._step = self._data = 0.0  # seconds of the current step, and those of them spent waiting
        self._idle_since = perf_counter()
        self._steps, self._warned = 0, False
        self._stretch = np.zeros(2)  # the same two, summed over up to 50 steps
        self._busy: Callable[[], bool] = lambda: False  # whether the GPU still computes the previous batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock: neither a validation nor the time before the first step belongs to a step."""
        self._idle_since = perf_counter()

    on_train_start = on_validation_end

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        waited = perf_counter() - self._idle_since
        self._data += waited
        self._stretch[1] += 0 if self._busy() else waited

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, which is done (on a GPU: launched)."""
        now = perf_counter()
        self._step += now - self._idle_since
        self._idle_since = now
        if pl_module.device.type == "cuda":
            done = torch.cuda.current_stream().record_event()
            self._busy = lambda: not done.query()
        if ends_step(trainer, batch_idx):
            if is_logged(trainer):
                pl_module.log_dict({"time/step": self._step, "time/data": self._data})
            self._judge(trainer)
            self._step = self._data = 0.0

    def _judge(self, trainer: Trainer) -> None:
        self._steps += 1
        self._stretch[0] += self._step
        if self._steps % 50 == 0:
            step, data = self._stretch
            if self._steps > 50 and data > 0.1 * step and not self._warned and trainer.is_global_zero:
                loader: Any = trainer.train_dataloader
                log.warning("%.0f %% of the last 50 steps went into waiting for data: give data.workers=<more than %d> "
                            "or data.cache=memmap, with which images are decoded once",
                            100 * data / step, loader.num_workers)  # fmt: skip
                self._warned = True
            self._stretch[:] = 0


class LossScale(Callback):
    """Logs ``precision/scale`` and ``precision/overflows`` (steps skipped so far) where fp16 gradients are scaled.

    The scale falls when, and only when, a step is skipped because a gradient overflowed. Scales are compared on the
    device and read only at steps that are logged, so that no other step waits for the device.
    """

    def __init__(self) -> None:
        self._overflows: torch.Tensor | int = 0
        self._before = torch.ones(())

    @staticmethod
    def _scale(trainer: Trainer, pl_module: LightningModule) -> torch.Tensor | None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return None if scaler is None else scaler.scale(torch.ones((), device=pl_module.device))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (scale := self._scale(trainer, pl_module)) is not None:
            self._before = scale

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (scale := self._scale(trainer, pl_module)) is not None:
            self._overflows = self._overflows + (scale < self._before)
            if is_logged(trainer):
                pl_module.log_dict({"precision/scale": scale.item(), "precision/overflows": float(self._overflows)})

    def state_dict(self) -> dict[str, Any]:
        return {"overflows": int(self._overflows)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._overflows = state_dict["overflows"]


class ProgressBar(RichProgressBar):
    """Progress over the steps of the run, with loss, learning rate, time per step, time waiting for data, last mIoU.

    Args:
        refresh_rate: batches between two updates of the bar. Numbers change only at steps that are logged, since
            reading them waits for the GPU; the score changes after a validation.
    """

    def __init__(self, refresh_rate: int = 2) -> None:
        super().__init__(refresh_rate, leave=True, theme=RichProgressBarTheme(metrics_format=".4g"))
        self._shown: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        """Batches of the whole run from step 0, also in a resumed run."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the new score."""
        super().on_validation_end(trainer, pl_module)
        self._shown |= {key: score.item() for key, score in trainer.callback_metrics.items() if key.endswith("/miou")}

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if is_logged(trainer) or not self._shown:
            metrics = trainer.callback_metrics
            names = {"train/loss": "loss", "time/step": "s/step", "time/data": "s/data"}
            names |= {key: key for key in metrics if key.endswith("/miou")}
            self._shown = {name: metrics[key].item() for key, name in names.items() if key in metrics}
            if self._shown:
                self._shown["lr"] = trainer.optimizers[0].param_groups[-1]["lr"]
        return self._shown


class NonFinite(Callback):
    """Ends a training whose loss, weights or running statistics are infinite or not a number.

    The loss is checked on the device after every batch, and the result is read one batch later, so that nothing waits
    for it. Where fp16 gradients are scaled, such steps are skipped, and only 20 in a row end the training. Weights and
    running statistics are checked before every checkpoint, so that none holds such a value. The step's images and the
    seeds of their augmentation are written to a file.

    Args:
        path: the file, JSON.
        until: end the training at this step, as ``debug=replay`` does after the step in question; None: do not.

    Raises:
        FloatingPointError: when the training ends for such a value; the message says what to do.
    """

    def __init__(self, path: str | Path, until: int | None = None) -> None:
        self.path = Path(path)
        self.until = until
        self._in_row: torch.Tensor | int = 0
        self._read: Callable[[], int] = lambda: 0
        self._step = 0  # step of the result that is read next

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check this loss on the device, and read the result for the loss before."""
        wrong = (~torch.isfinite(outputs["loss"])).int()
        if distributed.is_initialized():
            distributed.all_reduce(wrong, distributed.ReduceOp.MAX)  # all processes end, or none
        self._in_row = (self._in_row + 1) * wrong  # losses in a row that are not finite
        self._check_loss(trainer, pl_module)
        self._read = _read_later(self._in_row)
        self._step = trainer.global_step + (not ends_step(trainer, batch_idx))
        if trainer.global_step == self.until:
            trainer.should_stop = True

    def _check_loss(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipping = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._read() >= (20 if skipping else 1):
            self._end(trainer, self._step, "the loss is infinite or not a number")

    on_validation_start = on_train_end = _check_loss

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """End the training before a checkpoint would hold a value that is not finite."""
        wrong = [name for name, tensor in checkpoint["state_dict"].items() if not torch.isfinite(tensor).all()]
        if trainer.strategy.reduce_boolean_decision(bool(wrong), all=False):
            named = f"{wrong[0]} and {len(wrong) - 1} more tensors" if wrong else "tensors of another process"
            self._end(trainer, trainer.global_step, f"{named} hold infinities or NaN")

    def _end(self, trainer: Trainer, step: int, what: str) -> None:
        if trainer.is_global_zero:
            write_json(self.path, {"reason": what, "step": step, "samples": _drawn(trainer, step)})
        trainer.strategy.barrier()  # else the error of another process could end this one before it has written
        last = self.path.parent / "checkpoints" / "last.ckpt"
        again = f"debug=replay callbacks.nonfinite.until={step}" + (f" ckpt_path={last}" if last.exists() else "")
        raise FloatingPointError(
            f"{what} at step {step}: lower optimizer.lr, lengthen scheduler.warmup_steps, or use precision=fp32; the "
            f"images are named in {self.path}; to find the operation, the same command with {again}"
        )


def _read_later(number: torch.Tensor) -> Callable[[], int]:
    """A function that returns the present value of a scalar, and waits for no work that the GPU is given later."""
    copied = number.to("cpu", non_blocking=number.is_cuda)
    if not number.is_cuda:
        return lambda: int(copied)
    done = torch.cuda.Event()
    done.record()

    def read() -> int:
        done.synchronize()
        return int(copied)

    return read


def _drawn(trainer: Trainer, step: int) -> list[dict[str, Any]]:
    """Images, labels, augmentation seeds and value ranges of a step (counted from 1), in all processes."""
    loader: Any = trainer.train_dataloader
    batches, parts, found = copy(loader.batch_sampler), trainer.accumulate_grad_batches, []
    for start in range((step - 1) * parts, step * parts):
        for rank in range(trainer.world_size):
            batches.start, batches.rank = start, rank
            for draw, index in next(iter(batches)):
                sample, batch = loader.dataset.samples[index], loader.dataset[draw, index]
                image, ids = batch["image"], batch["mask"].unique().tolist()
                found.append({"rank": rank, "image": str(sample.image), "label": str(sample.label),
                              "seed": [loader.dataset.seed, draw], "range": [int(image.min()), int(image.max())],
                              "train_ids": ids})  # fmt: skip
    return found


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints atomically, and keeps the replaced ``last.ckpt`` as ``previous.ckpt``.

    Departs from Lightning, which writes to ``$TMPDIR`` and moves the file. From another file system the move is a copy,
    which a kill or a full disk can leave incomplete, and Lightning ignores a missing write permission.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; an ``OSError`` names the file."""
        path, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)  # in memory: into a file, it may answer a full disk with a RuntimeError
        keep = path.name == "last.ckpt" and path.exists()
        with replacing(path, path.with_name("previous.ckpt") if keep else None) as stream:
            stream.write(content.getbuffer())


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` so that a run killed at any moment continues as if nothing had happened.

    Lightning's ``ModelCheckpoint(save_last=True)`` forgets the random generators, an early stop, and a validation that
    was due. Here the file is saved after every validation, and at the end of other steps when a save is due, with the
    state of torch's random generators in every process. The state is restored only when the first step of the resumed
    run begins, since building loaders and validating draw from the generators too.

    Args:
        path: the file; replaced atomically.
        every_n_steps: steps between two saves.
    """

    def __init__(self, path: str | Path, every_n_steps: int = 250) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps: got {every_n_steps}, accepted: an integer of at least 1")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self.save_now = False
        """Save at the end of the current step even if no save is due."""
        self._generators: list[dict[str, torch.Tensor]] | None = None
        self._stopped = self._within_step = False

    def state_dict(self) -> dict[str, Any]:
        """State of the random generators in each process, and whether the training was stopped early."""
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
        """Restore an early stop, which Lightning forgets, and tidy up the files that a killed process has left."""
        trainer.should_stop = self._stopped
        previous = self.path.with_name("previous.ckpt")
        trainer.strategy.barrier()  # until all processes have read the checkpoint
        if trainer.is_global_zero:
            remove_drafts(self.path.parent)
            if trainer.ckpt_path == previous:  # last.ckpt is damaged, or a kill came between the two renames
                os.replace(previous, self.path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the random generators at the first step."""
        if self._generators is not None:
            own = self._generators[trainer.global_rank]
            torch.set_rng_state(own["cpu"].cpu())
            if "cuda" in own and torch.cuda.is_available():
                torch.cuda.set_rng_state(own["cuda"].cpu())
        self._generators = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if due, unless a validation follows: a resumed run would skip that validation."""
        validation_follows = (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        self._within_step = not ends_step(trainer, batch_idx)  # checkpoints hold no accumulated gradients
        due = self.save_now or trainer.global_step % self.every_n_steps == 0
        if due and not validation_follows and not self._within_step:
            # Lightning logs a step's scalars only after all hooks; MetricsFile writes a row once if it comes twice.
            logged = trainer._logger_connector.metrics["log"] if is_logged(trainer) else {}
            self._save(trainer, {key: value.item() for key, value in logged.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, once the other callbacks hold its score."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._within_step:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last weights, which are the result of the training."""
        self._save(trainer)

    def _save(self, trainer: Trainer, row: Mapping[str, float] | None = None) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._stopped = trainer.should_stop
        for logger in trainer.loggers:  # write rows first, so that no checkpoint is ahead of the metrics on disk
            if isinstance(logger, MetricsFile):
                if row:
                    logger.log_metrics(row, trainer.global_step - 1)
                logger.flush()
            logger.save()
        trainer.save_checkpoint(self.path)


class EndOnSignal(Callback):
    """On SIGTERM or SIGUSR1, saves the current step of a training and exits with ``ENDED`` of :mod:`bisenet.launch`.

    If a validation follows the step, it runs before the save. Outside the training, as in the final evaluation, nothing
    is to be saved, and the process exits at once. So it does at another signal a second or more after the first; an
    earlier one is ignored, since ``timeout`` sends its signal twice.

    Departs from Lightning, which saves nothing, exits with 0, and under Slurm requeues the job itself.
    """

    def __init__(self) -> None:
        self._told_at: float | None = None
        self._trains = self._ends = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals within the ``with`` block; the handlers before are restored."""
        before = [(number, signal.getsignal(number)) for number in ENDING_SIGNALS]
        self._listen()
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in ENDING_SIGNALS:
            signal.signal(number, self._tell)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handler again: Lightning has replaced it by its own."""
        self._listen()

    on_test_start = on_sanity_check_start

    def _tell(self, *_: Any) -> None:
        if self._told_at is not None and perf_counter() > self._told_at + 1:
            os._exit(ENDED)
        if self._told_at is None:
            self._told_at = perf_counter()
            if not self._trains:
                raise SystemExit(ENDED)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal waits for the end of a step."""
        self._listen()
        self._trains = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agree with the other processes to end after this step, and ask :class:`LastCheckpoint` to save it."""
        if ends_step(trainer, batch_idx):
            told = trainer.strategy.reduce_boolean_decision(self._told_at is not None, all=False)
            if told and not self._ends:
                log.warning("told to end: step %d is saved; a second signal ends at once", trainer.global_step)
                self._ends = True
                for callback in trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, LastCheckpoint):
                        callback.save_now = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Exit before the next step: the last one has been saved."""
        if self._ends:
            raise SystemExit(ENDED)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exit after the last step of the training, which has been saved."""
        self._trains = False
        if self._told_at is not None:
            raise SystemExit(ENDED)


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best score, also for a run directory that has been moved.

    Lightning's own looks for its files where they were written, and forgets the best score if they are not there.

    Args:
        dirpath: folder of the checkpoints.
        monitor: name of the score.
        **kwargs: other arguments of ``ModelCheckpoint``.
    """

    def __init__(self, dirpath: str, monitor: str, **kwargs: Any) -> None:
        super().__init__(dirpath, monitor=monitor, enable_version_counter=False, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, with the files in ``dirpath`` in place of the recorded ones."""
        folder = Path(str(self.dirpath))
        paths = {key: str(folder / Path(state_dict[key]).name) for key in ("best_model_path", "kth_best_model_path")}
        scores = {str(folder / Path(path).name): score for path, score in state_dict["best_k_models"].items()}
        if Path(paths["best_model_path"]).is_file():  # else the checkpoint is of another run (ckpt_path)
            super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": scores})


class WeightAverage(Callback):
    """Exponential moving average of the network, buffers included, updated after every step and kept in checkpoints.

    Departs from Lightning's ``EMAWeightAveraging``, which validates the average in place of the weights and stores it
    under their name. Here the weights stay the result, and the average is reported beside them.

    Args:
        decay: weight of the old average in each update, in (0, 1). The first update copies the network.
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
        """Create the average, into which a checkpoint may then be loaded."""
        if stage == "fit":
            average = get_ema_multi_avg_fn(self.decay)
            self._average = AveragedModel(pl_module.segmenter.network, multi_avg_fn=average, use_buffers=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the network's device."""
        self._average.to(pl_module.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if ends_step(trainer, batch_idx):
            self._average.update_parameters(pl_module.segmenter.network)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average.load_state_dict(state_dict)


class PredictionPanel(Callback):
    """After every validation, sends predictions and scores by class to the loggers that can show them.

    W&B gets images with two masks, "prediction" and "truth", whose classes can be switched on and off; TensorBoard gets
    image, truth and prediction side by side. Other loggers get nothing. Each image has a name of its own,
    ``val/predictions/<number>``, since W&B shows images of different sizes under one name wrongly.

    Args:
        images: number of images, spread evenly over the validation split; always the same ones.
    """

    _WIDEST = 1024  # pixels; of wider images only every n-th row and column is shown

    def __init__(self, images: int = 4) -> None:
        self.images = images

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
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
    """Send a table of the scores by class, ``<prefix>/classes``, to the loggers that can show it.

    Args:
        loggers: loggers of any kind; those other than W&B and TensorBoard get nothing.
        prefix: name of the evaluation, such as ``val/ss``.
        scores: as :meth:`bisenet.metrics.SegmentationScores.to_dict` returns them.
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

    A row is appended when its step is over or saved. For a new column, and when a run is resumed, the whole file is
    replaced; rows from the first step that is logged again onward are dropped. Lightning's CSVLogger deletes the file.

    Args:
        path: the file.
    """

    name = version = ""  # type: ignore[assignment]  # Lightning requires both

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = []  # of the file, once it has been written
        self._row: dict[str, Any] = {}
        self._written: dict[str, Any] = {}

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``.hydra/config.yaml`` holds the hyperparameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add numbers to the row of a step."""
        if step != self._row.get("step"):
            self.flush()
            self._row = {"step": step}
        self._row.update({key: value for key, value in metrics.items() if key != "epoch"})  # rows are counted in steps

    @rank_zero_only
    def flush(self) -> None:
        """Write the current row and sync the file to disk."""
        row, before = dict(self._row), self._written
        if row == before:
            return
        self._written = row
        if set(row) <= set(self._columns) and row["step"] != before["step"]:
            with self.path.open("a", newline="") as stream:
                csv.DictWriter(stream, self._columns).writerow(row)
                stream.flush()
                os.fsync(stream.fileno())
            return
        rows = [*self._rows_before(row["step"]), row]
        self._columns = ["step", *sorted({key for each in rows for key in each} - {"step"})]
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        with replacing(self.path) as stream:
            stream.write(text.getvalue().encode())

    def _rows_before(self, step: int) -> list[dict[str, str]]:
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # a kill may have cut the last line off
        return [row for row in csv.DictReader(whole) if int(row["step"]) < step]

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.flush()
