"""Callbacks for the tests of several processes."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from bisenet.module import SegmentationModule


class FreezeNorm(Callback):
    """Batch norm with the statistics it has, so that a step does not depend on how a batch is shared out."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        for layer in pl_module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()


class Fail(Callback):
    """Fails in the second process only."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_rank == 1:
            raise RuntimeError("the second process cannot go on")


class SaveWeights(Callback):
    """Each process leaves the weights and buffers that it has validated, as rank_<n>.pt."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationModule)
        state = pl_module.segmenter.network.state_dict()
        torch.save(state, f"{trainer.default_root_dir}/rank_{trainer.global_rank}.pt")
