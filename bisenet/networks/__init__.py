"""The two families of bilateral segmentation networks.

A network maps a normalised float image (B, 3, H, W) to a `SegmentationOutput`, at the strides of its heads and before
the last bilinear upsampling, which belongs to the loss (training) or to inference. It knows nothing of optimizers,
losses, configuration or files, and downloads nothing.
"""

from bisenet.networks.bisenetv1 import BiSeNetV1
from bisenet.networks.bisenetv2 import BiSeNetV2
from bisenet.networks.blocks import SegmentationOutput

__all__ = ["BiSeNetV1", "BiSeNetV2", "SegmentationOutput"]
