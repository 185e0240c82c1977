"""A callback for the tests: sends its own process a signal, at the hook and step that the environment names."""

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Kill(Callback):
    """KILL_AT=<hook>:<step>, KILL_WITH=<signal>, KILL_RUN=<part of the run's folder>, KILL_RANK=<the only process>;
    without the first nothing happens, so that the same configuration can be resumed.
    """

    def __init__(self) -> None:
        self.hook, _, self.step = os.environ.get("KILL_AT", "").partition(":")

    def _maybe(self, hook: str, trainer: Trainer) -> None:
        here = os.environ.get("KILL_RUN", "") in str(trainer.default_root_dir)
        here = here and os.environ.get("KILL_RANK", str(trainer.global_rank)) == str(trainer.global_rank)
        if here and hook == self.hook and trainer.global_step == int(self.step):
            os.kill(os.getpid(), signal.Signals[os.environ.get("KILL_WITH", "SIGKILL")])

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._maybe("batch_start", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._maybe("batch_end", trainer)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._maybe("validation", trainer)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._maybe("test", trainer)
