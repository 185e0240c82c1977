"""The LightningModule: glue between any network and Lightning. It knows no architecture, data set or configuration."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn
from torchmetrics import SumMetric

from bisenet.inference import Segmenter
from bisenet.metrics import SegmentationMetric, SegmentationScores

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[nn.Module], tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]


class SegmentationModule(LightningModule):
    """Trains and evaluates a network with the loss, metric and optimizer that it is given, and logs.

    Logged are ``train/loss``, ``train/loss/<head>`` and ``train/kept/<head>`` (share of the valid pixels that the loss
    keeps), each as the mean over accumulated batches and devices, and ``val/<protocol>/miou``.

    Args:
        segmenter: network, normalisation, protocols and class table. A validation uses the first protocol, a test all.
        loss: loss over all heads, such as :class:`bisenet.losses.DeepSupervision`. Only a training needs it and the
            arguments below.
        optimizer: function from the network to its optimizer and scheduler; the scheduler is stepped every step.
        portable: plain values that checkpoints carry for prediction, see :mod:`bisenet.checkpoint`.
        config: configuration of the experiment in plain values; Lightning stores it as hyperparameters.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        loss: nn.Module | None = None,
        optimizer: OptimizerFactory | None = None,
        portable: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(dict(config or {}))
        self.segmenter = segmenter
        self.loss = loss
        self.optimizer_factory = optimizer
        self.portable = dict(portable or {})
        self.protocols = list(segmenter.protocols)
        # Lists in the order of the protocols: names of submodules may not contain dots, names of protocols may.
        self.metrics = nn.ModuleList(SegmentationMetric(segmenter.classes.num_classes) for _ in self.protocols)
        self.seconds = nn.ModuleList(SumMetric() for _ in self.protocols)
        self.evaluation: dict[str, tuple[SegmentationScores, float]] = {}
        """Protocol -> scores of the last finished evaluation, and its seconds of prediction, summed over all ranks."""
        self.validated_step: int | None = None
        """Step of the validation that ``evaluation`` holds; None: it holds a test, or nothing."""
        self._accumulated: list[Tensor] = []  # logged scalars of the current step, batch by batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch: ``image`` (B, 3, H, W) uint8, ``mask`` (B, H, W) uint8 -> scalar."""
        network = self.segmenter.network
        output = network(self.segmenter.normalize(batch["image"]))
        assert self.loss is not None, "a module without a loss only evaluates"
        loss = self.loss(output, batch["mask"], align_corners=bool(network.align_corners))
        if (self.global_step + 1) % self.trainer.log_every_n_steps != 0:  # type: ignore[attr-defined]
            return loss.total  # logging would make the host wait for the device
        valid = (batch["mask"] != self.segmenter.classes.ignore_index).sum().clamp(min=1)
        scalars = torch.stack([loss.total, *loss.heads, *(kept / valid for kept in loss.kept)])
        self._accumulated.append(scalars.detach())
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            heads: tuple[str, ...] = network.head_names  # type: ignore[assignment]
            names = ["train/loss", *(f"train/{kind}/{head}" for kind in ("loss", "kept") for head in heads)]
            means = torch.stack(self._accumulated).mean(0)
            self.log_dict(dict(zip(names, means, strict=True)), sync_dist=True)  # means over the devices
            self._accumulated.clear()
        return loss.total

    def on_fit_start(self) -> None:
        """Send buffers that the first process has computed from the data, such as class weights, to all processes."""
        self._share_buffers()

    def on_train_start(self) -> None:
        """Keep the optimizer's own ``fused`` and ``foreach``, which a loaded checkpoint has overwritten."""
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group.update({key: optimizer.defaults[key] for key in {"fused", "foreach"} & optimizer.defaults.keys()})

    def on_validation_epoch_start(self) -> None:
        """Reset counts that an interrupted evaluation may have left; evaluate with the buffers of the first process."""
        for metric in (*self.metrics, *self.seconds):
            metric.reset()  # type: ignore[operator]
        self._share_buffers()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self._count(batch, self.protocols[:1])

    def on_validation_epoch_end(self) -> None:
        self.evaluation = self._scores(self.protocols[:1])
        ((name, (scores, _)),) = self.evaluation.items()
        self.log(f"val/{name}/miou", scores.miou)
        if not self.trainer.sanity_checking:
            self.validated_step = self.global_step
            log.info("step %d: val/%s/miou %.4f", self.global_step, name, scores.miou)

    # A test evaluates a split with all protocols; the caller reports its scores.
    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._count(batch, self.protocols)

    def on_test_epoch_end(self) -> None:
        self.evaluation = self._scores(self.protocols)
        self.validated_step = None

    def _share_buffers(self) -> None:
        """Send the first process's buffers to all; each process has running statistics of its own."""
        if distributed.is_initialized():
            for buffer in self.buffers():
                distributed.broadcast(buffer, src=0)

    def _count(self, batch: dict[str, Tensor], protocols: list[str]) -> None:
        predictions = self.segmenter.predictions(batch["image"], protocols)
        for name, metric, seconds in zip(protocols, self.metrics, self.seconds, strict=False):
            metric.update(predictions[name].train_ids, batch["mask"], batch["index"])  # type: ignore[operator]
            seconds.update(predictions[name].seconds)  # type: ignore[operator]

    def _scores(self, protocols: list[str]) -> dict[str, tuple[SegmentationScores, float]]:
        counters: Any = zip(protocols, self.metrics, self.seconds, strict=False)
        return {name: (metric.compute(), seconds.compute().item()) for name, metric, seconds in counters}

    def configure_optimizers(self) -> dict[str, Any]:
        assert self.optimizer_factory is not None, "a module without an optimizer only evaluates"
        optimizer, scheduler = self.optimizer_factory(self.segmenter.network)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the checkpoint what prediction needs beside the weights."""
        checkpoint["bisenet"] = self.portable
