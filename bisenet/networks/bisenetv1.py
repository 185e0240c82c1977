"""BiSeNetV1: a spatial path for detail and a context path for the field of view (arXiv 1808.00897, section 3).

Submodules are named as in the reference, github.com/CoinCheung/BiSeNet, whose checkpoints of both generations load.

Shapes: B images of H x W pixels, n = n_classes; sizes at a stride round up.

Departs: two parts follow the reference rather than the paper, so that its weights load. The attention refinement starts
with a 3x3 convolution to 128 channels, and the three layers of the spatial path are followed by a fourth, 1x1.
Departs: the generation `current` computes the fusion attention with one convolution and a norm, as the reference does
for TensorRT; `older` has the two 1x1 convolutions of the paper.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from typing import Literal

import torch
from torch import Tensor, nn

from bisenet.networks.blocks import (
    ConvNormAct,
    Generation,
    Norm,
    SegmentationNetwork,
    by_strips,
    make_norm,
    pool_globally,
    require_choice,
    resize_nearest,
)
from bisenet.networks.resnet import ResNet18

Structure = Literal["two_path", "one_path", "u_shape"]


class AttentionRefinement(nn.Module):
    """Project a backbone feature, then weigh its channels by their global context: (B, C, h, w) -> (B, 128, h, w)."""

    def __init__(self, in_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, 128, 3, norm=norm)
        self.conv_atten = nn.Conv2d(128, 128, 1, bias=False)
        self.bn_atten = make_norm(norm, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        pooled = pool_globally(x, self.bn_atten)  # (B, 128, 1, 1)
        return x * self.bn_atten(self.conv_atten(pooled)).sigmoid()


class ContextPath(nn.Module):
    """ResNet-18; its deep features are refined by attention, joined with the global context and upsampled to stride 8.

    Maps an image to the backbone's feature at stride 8, the context at stride 8 and the context at stride 16.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.resnet = ResNet18(norm)
        self.arm16 = AttentionRefinement(256, norm)
        self.arm32 = AttentionRefinement(512, norm)
        self.conv_head32 = ConvNormAct(128, 128, 3, norm=norm)
        self.conv_head16 = ConvNormAct(128, 128, 3, norm=norm)
        self.conv_avg = ConvNormAct(512, 128, 1, norm=norm)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature8, feature16, feature32 = self.resnet(image)
        pooled = self.conv_avg(pool_globally(feature32, self.conv_avg))  # (B, 128, 1, 1)
        context32 = self.arm32(feature32) + pooled  # (B, 128, H/32, W/32)
        context16 = self.conv_head32(resize_nearest(context32, feature16))  # (B, 128, H/16, W/16)
        context8 = self.conv_head16(resize_nearest(self.arm16(feature16) + context16, feature8))  # (B, 128, H/8, W/8)
        return feature8, context8, context16


class TopDownPath(nn.Module):
    """ResNet-18 and a plain u-shaped decoder, without attention, global context and fusion: strides 8, 16 and 32."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.resnet = ResNet18(norm)
        self.lateral8 = ConvNormAct(128, 128, 1, norm=norm)
        self.lateral16 = ConvNormAct(256, 128, 1, norm=norm)
        self.lateral32 = ConvNormAct(512, 128, 1, norm=norm)
        self.smooth8 = ConvNormAct(128, 128, 3, norm=norm)
        self.smooth16 = ConvNormAct(128, 128, 3, norm=norm)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        feature8, feature16, feature32 = self.resnet(image)
        top32 = self.lateral32(feature32)
        top16 = self.smooth16(self.lateral16(feature16) + resize_nearest(top32, feature16))
        top8 = self.smooth8(self.lateral8(feature8) + resize_nearest(top16, feature8))
        return top8, top16, top32


class SpatialPath(nn.Sequential):
    """A few wide layers that keep the detail: image (B, 3, H, W) -> (B, 128, H/8, W/8)."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(3, 64, 7, stride=2, norm=norm)
        self.conv2 = ConvNormAct(64, 64, 3, stride=2, norm=norm)
        self.conv3 = ConvNormAct(64, 64, 3, stride=2, norm=norm)
        self.conv_out = ConvNormAct(64, 128, 1, norm=norm)


class FeatureFusion(nn.Module):
    """Mix detail and context, each (B, 128, h, w), to x (B, 256, h, w), and return x + x * channel attention."""

    def __init__(self, generation: Generation, norm: Norm) -> None:
        super().__init__()
        self.convblk = ConvNormAct(256, 256, 1, norm=norm)
        self.bn: nn.Module | None = None
        if generation == "current":
            self.conv = nn.Conv2d(256, 256, 1, bias=False)
            self.bn = make_norm(norm, 256)
        else:
            self.conv1 = nn.Conv2d(256, 64, 1, bias=False)
            self.conv2 = nn.Conv2d(64, 256, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        x = self.convblk(torch.cat([detail, context], dim=1))
        pooled = pool_globally(x, self.bn)  # (B, 256, 1, 1)
        scores = self.conv2(self.conv1(pooled).relu()) if self.bn is None else self.bn(self.conv(pooled))
        return x + x * scores.sigmoid()


class Head(nn.Sequential):
    """A 3x3 layer and the classifier: (B, in_channels, h, w) -> logits (B, n, h, w)."""

    def __init__(self, in_channels: int, mid_channels: int, n_classes: int, generation: Generation, norm: Norm) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, mid_channels, 3, norm=norm)
        self.conv_out = nn.Conv2d(mid_channels, n_classes, 1, bias=generation == "current")


class BiSeNetV1(SegmentationNetwork):
    """BiSeNetV1 with ResNet-18, and two control structures without its spatial path.

    - `n_classes`: channels of the logits.
    - `structure`: `two_path` is the paper's; in `one_path` the backbone's feature at stride 8 takes the place of the
      spatial path; `u_shape` is a plain top-down decoder, without attention, global pooling and fusion.
    - `generation`: `older` has two 1x1 convolutions as fusion attention, heads without bias, and `align_corners=True`.
    - `norm`: `inplace_abn` for older weights trained with InPlaceABN; `bn` for all others.
    - `aux`: whether the auxiliary heads exist.

    The heads conv_out, conv_out16 and conv_out32 have strides 8, 8 and 16, or 8, 16 and 32 with `u_shape`.
    Raises ValueError for an argument outside these choices.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        structure: Structure = "two_path",
        generation: Generation = "current",
        norm: Norm = "bn",
        aux: bool = True,
    ) -> None:
        super().__init__()
        require_choice("structure", structure, Structure)
        require_choice("generation", generation, Generation)
        require_choice("norm", norm, Norm)
        self.structure = structure
        self.align_corners = generation == "older"
        self.head_names = ("conv_out", "conv_out16", "conv_out32") if aux else ("conv_out",)

        self.cp = TopDownPath(norm) if structure == "u_shape" else ContextPath(norm)
        if structure == "two_path":
            self.sp = SpatialPath(norm)
        if structure != "u_shape":
            self.ffm = FeatureFusion(generation, norm)
        self.conv_out = Head(128 if structure == "u_shape" else 256, 256, n_classes, generation, norm)
        if aux:
            self.conv_out16 = Head(128, 64, n_classes, generation, norm)
            self.conv_out32 = Head(128, 64, n_classes, generation, norm)
        initialise(self)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.structure == "u_shape":
            return self.cp(image)
        feature8, context8, context16 = self.cp(image)
        detail = feature8  # (B, 128, H/8, W/8)
        if self.structure == "two_path":
            detail = by_strips(self.sp, image, stride=8, halo=16, training=self.training)
        return self.ffm(detail, context8), context8, context16


def initialise(network: BiSeNetV1) -> None:
    """Set all weights except the backbone's, which `resnet.initialise` sets; the norms keep weight 1 and bias 0.

    | layer        | weight                                              | bias |
    |--------------|-----------------------------------------------------|------|
    | convolutions | normal, variance 1 / fan_in                         | 0    |
    | norms        | 1                                                   | 0    |
    """
    backbone = set(network.cp.resnet.modules())
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module not in backbone:
            nn.init.kaiming_normal_(module.weight, a=1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
