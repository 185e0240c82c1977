"""The LightningModule: glue around any network. It knows no architecture, no data set and no configuration."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, distributed, nn
from torchmetrics import SumMetric

from bisenet import checkpoint
from bisenet.config import miou_key
from bisenet.inference import Segmenter
from bisenet.losses import DeepSupervision
from bisenet.metrics import SegmentationMetric, SegmentationScores

log = logging.getLogger(__name__)

OptimizerFactory = Callable[[nn.Module], tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]


class SegmentationModule(LightningModule):
    """Calls the network, the loss, the metric and the optimizer that it is given, and logs.

    Logged: ``train/loss``, ``train/loss/<head>``, ``train/kept/<head>`` (share of the valid pixels that the loss
    keeps), ``lr/<group>``, ``val/<protocol>/miou``. Of accumulated batches, the mean.

    Args:
        segmenter: network, normalisation, protocols and class table. The first protocol scores the validations, a
            test takes all.
        loss: loss over all heads.
        optimizer: called with the network, gives optimizer and scheduler (stepped every step).
        config: plain values that a checkpoint carries.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        loss: DeepSupervision,
        optimizer: OptimizerFactory,
        config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.loss = loss
        self.optimizer_factory = optimizer
        self.config = config
        classes = segmenter.classes
        self.protocols = list(segmenter.protocols)
        # Lists, in the order of the protocols, since a module's name may not hold a dot.
        self.metrics = nn.ModuleList(
            SegmentationMetric(classes.num_classes, classes.ignore_index) for _ in self.protocols
        )
        self.seconds = nn.ModuleList(SumMetric() for _ in self.protocols)
        self.evaluation: dict[str, tuple[SegmentationScores, float]] = {}
        """Scores of the last evaluation that ended, by protocol, and seconds of prediction, summed over the ranks."""
        self.validated_step: int | None = None
        """Step of the last validation that ended, if it is what ``evaluation`` holds."""
        self.miou_key = miou_key(segmenter.protocols)
        self._accumulated: list[Tensor] = []  # scalars of the batches of the step that has begun

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """One batch: image (B, 3, H, W) uint8, mask (B, H, W) uint8 -> loss."""
        network = self.segmenter.network
        output = network(self.segmenter.normalize(batch["image"]))
        loss = self.loss(output, batch["mask"], align_corners=bool(network.align_corners))
        if not self._written(self.global_step + 1):
            return loss.total  # a number that is logged from the host would make it wait for the device
        valid = (batch["mask"] != self.segmenter.classes.ignore_index).sum().clamp(min=1)
        scalars = torch.stack([loss.total, *loss.heads, *(kept / valid for kept in loss.kept)])
        self._accumulated.append(scalars.detach())
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            heads: tuple[str, ...] = network.head_names  # type: ignore[assignment]
            names = ["train/loss", *(f"train/{kind}/{head}" for kind in ("loss", "kept") for head in heads)]
            logged: dict[str, Any] = dict(zip(names, torch.stack(self._accumulated).mean(0), strict=True))
            logged |= {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
            self.log_dict(logged, sync_dist=True)  # means over the devices
            self._accumulated.clear()
        return loss.total

    def _written(self, step: int) -> bool:
        """Whether the scalars of a step are written."""
        return step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop a run that cannot recover, at the steps that read the loss anyway and at the last one."""
        read = self._written(self.global_step) or self.global_step == self.trainer.max_steps
        if read and not torch.isfinite(outputs["loss"]):
            raise FloatingPointError(
                f"the loss is {outputs['loss'].item()} at step {self.global_step}: lower optimizer.algorithm.lr, "
                "lengthen scheduler.warmup_steps, or use precision=fp32"
            )

    def on_fit_start(self) -> None:
        """What the first process has read of the data, such as class weights, holds for all."""
        self._share_buffers()

    def on_validation_epoch_start(self) -> None:
        """Forget what an interrupted evaluation may have counted; evaluate what a checkpoint would hold."""
        for _, metric, seconds in self._counters(self.protocols):
            metric.reset()
            seconds.reset()
        self._share_buffers()

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Predict under the first protocol and count."""
        self._count(batch, self.protocols[:1])

    def on_validation_epoch_end(self) -> None:
        """Reduce the counts to scores."""
        self.evaluation = self._scores(self.protocols[:1])
        (scores, _), *_ = self.evaluation.values()
        self.log(self.miou_key, scores.miou)
        if not self.trainer.sanity_checking:
            self.validated_step = self.global_step
            log.info("step %d: %s %.4f", self.global_step, self.miou_key, scores.miou)

    # A test is the evaluation of a split under all protocols; its numbers are reported by the caller.
    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Predict under all protocols and count."""
        self._count(batch, self.protocols)

    def on_test_epoch_end(self) -> None:
        """Reduce the counts to scores."""
        self.evaluation = self._scores(self.protocols)
        self.validated_step = None

    def _share_buffers(self) -> None:
        if distributed.is_initialized():  # each process has its own running statistics
            for buffer in self.buffers():
                distributed.broadcast(buffer, src=0)

    def _count(self, batch: dict[str, Tensor], protocols: list[str]) -> None:
        found = self.segmenter.predictions(batch["image"], protocols)
        for name, metric, seconds in self._counters(protocols):
            metric.update(found[name].train_ids, batch["mask"], batch["index"])
            seconds.update(found[name].seconds)

    def _scores(self, protocols: list[str]) -> dict[str, tuple[SegmentationScores, float]]:
        return {n: (metric.compute(), seconds.compute().item()) for n, metric, seconds in self._counters(protocols)}

    def _counters(self, protocols: list[str]) -> list[tuple[str, SegmentationMetric, SumMetric]]:
        return list(zip(protocols, self.metrics, self.seconds, strict=False))  # type: ignore[arg-type]

    def configure_optimizers(self) -> dict[str, Any]:
        """Parameter groups, and a scheduler that steps with the optimizer."""
        optimizer, scheduler = self.optimizer_factory(self.segmenter.network)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint_: dict[str, Any]) -> None:
        """A checkpoint explains itself: configuration and class table travel with the weights."""
        checkpoint.attach(checkpoint_, self.config, self.segmenter.classes)
