"""From a picture to a prediction: normalisation, views, and how they are merged.

Shapes: B batch, C classes, (H, W) the picture, (h, w) a view of it.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bisenet.classes import ClassTable
from bisenet.config import ProtocolConfig


def view_size(size: tuple[int, int], scale: float, multiple: int) -> tuple[int, int]:
    """(height, width) of a view: ``int(scale * size)``, rounded up to the multiple."""
    height, width = (max(multiple, math.ceil(int(scale * side) / multiple) * multiple) for side in size)
    return height, width


def resize(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Bilinear resize of (B, C, h, w); nothing happens when the size is right already."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


def predict_scores(network: nn.Module, image: Tensor, protocol: ProtocolConfig) -> Tensor:
    """Scores whose argmax is the prediction of the protocol.

    Whole views are resized with align_corners=True, as are their scores to the size of the picture; in between the
    logits are upsampled to the view as the network's generation does it.

    Args:
        network: returns ``SegmentationOutput``; has ``align_corners``.
        image: (B, 3, H, W) float, normalised.
        protocol: scales, flip and size multiple.

    Returns:
        (B, C, H, W): the logits when there is one view, else the mean softmax of the views.
    """
    height, width = image.shape[-2:]

    def scores(view: Tensor) -> Tensor:
        logits = network(view).logits.float()
        logits = resize(logits, (view.shape[-2], view.shape[-1]), align_corners=bool(network.align_corners))
        return resize(logits, (height, width), align_corners=True)

    views = [resize(image, view_size((height, width), s, protocol.size_multiple), align_corners=True)
             for s in protocol.scales]  # fmt: skip
    if len(views) == 1 and not protocol.flip:
        return scores(views[0])
    merged = torch.zeros((), device=image.device)
    for view in views:
        merged = merged + scores(view).softmax(dim=1)
        if protocol.flip:
            merged = merged + scores(view.flip(-1)).flip(-1).softmax(dim=1)
    return merged / (len(views) * (1 + protocol.flip))


class Segmenter(nn.Module):
    """A network with everything that turns raw pictures into train ids: normalisation, protocol and class table.

    Args:
        network: returns ``SegmentationOutput`` before the last upsampling; has ``align_corners``.
        classes: class table of the data set it was trained on.
        mean: RGB mean in [0, 1].
        std: RGB standard deviation in (0, 1].
        protocol: how a picture becomes a prediction.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: ClassTable,
        mean: Sequence[float],
        std: Sequence[float],
        protocol: ProtocolConfig,
    ) -> None:
        super().__init__()
        self.network = network
        self.classes = classes
        self.protocol = protocol
        # In units of raw pixels, so that normalising a uint8 picture is one subtraction and one multiplication.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> float32, zero mean and unit variance over the data set."""
        return (image.float() - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, H, W) int64 train ids."""
        return predict_scores(self.network, self.normalize(image), self.protocol).argmax(dim=1)

    @torch.inference_mode()
    def predict(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Segment one picture of any size.

        Args:
            rgb: (H, W, 3) uint8, channels in the order red, green, blue.

        Returns:
            (H, W) uint8 train ids; ``classes.names`` and ``classes.palette`` say what they mean.

        Raises:
            ValueError: another shape or dtype.
        """
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
            raise ValueError(f"predict takes an RGB picture (H, W, 3) of dtype uint8, got {rgb.shape} of {rgb.dtype}")
        was_training = self.training
        self.eval()
        image = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].to(self.mean.device)
        mask = self(image)[0].to("cpu", torch.uint8).numpy()
        self.train(was_training)
        return mask
