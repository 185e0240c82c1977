"""BiSeNetV2: a detail branch, a semantic branch and their guided aggregation (arXiv 2004.02147, sections 3 and 4).

Submodules are named as in the reference, github.com/CoinCheung/BiSeNet, whose checkpoints of both generations load.

Shapes: B images of H x W pixels, n = n_classes, w = width_multiplier; sizes at a stride round up.

Departs: some parts follow the reference rather than the paper, so that its weights load: a ReLU after the depthwise
convolutions of the gather-and-expansion layers, a norm and a ReLU in the last layer of the context embedding, a ReLU
after the aggregation; in the generation `current`, nearest upsampling in the aggregation, and a nearest x2 with a 3x3
layer in the booster heads.
Departs: the paper gives BiSeNetV2-Large a width multiplier of 2 and a depth multiplier of 3 and leaves open what the
second one multiplies. Here width scales every channel count of both branches and of the aggregation, not the inner
width of the heads; depth multiplies the repeats of the stride 1 gather-and-expansion layers (1, 1 and 3 in stages 3, 4
and 5), because the paper wants the semantic branch deep and the detail branch shallow. At 1024 x 2048 and 19 classes
that makes 332.3 GMACs, against 98.4 of the plain network.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bisenet.networks.blocks import (
    ConvNormAct,
    Generation,
    SegmentationNetwork,
    by_strips,
    pool_globally,
    require_choice,
)

EXPANSION = 6
"""Channels inside a gather-and-expansion layer per channel of its input (section 5.1)."""


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its norm, as items of a Sequential."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class DetailBranch(nn.Sequential):
    """Wide and shallow (section 4.1): image (B, 3, H, W) -> (B, 128w, H/8, W/8)."""

    def __init__(self, wide: int, wider: int) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int, layers: int) -> nn.Sequential:
            further = (ConvNormAct(out_channels, out_channels, 3) for _ in range(layers - 1))
            return nn.Sequential(ConvNormAct(in_channels, out_channels, 3, stride=2), *further)

        self.S1 = stage(3, wide, layers=2)
        self.S2 = stage(wide, wide, layers=3)
        self.S3 = stage(wide, wider, layers=3)

    def forward(self, input: Tensor) -> Tensor:
        layers = [layer for layer in self.modules() if isinstance(layer, ConvNormAct)]
        x = layers[0].conv(input)
        for layer, following in pairwise(layers):
            x = layer.after_conv(x, following.conv)
        return layers[-1].act(layers[-1].bn(x))


class Stem(nn.Module):
    """Downsample by convolution and max pooling, joined (figure 4a): image (B, 3, H, W) -> (B, channels, H/4, W/4)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv = ConvNormAct(3, channels, 3, stride=2)
        self.left = nn.Sequential(ConvNormAct(channels, squeezed, 1), ConvNormAct(squeezed, channels, 3, stride=2))
        self.right = nn.MaxPool2d(3, stride=2, padding=1)
        self.fuse = ConvNormAct(2 * channels, channels, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)  # (B, channels, H/2, W/2)
        return self.fuse(torch.cat([self.left(x), self.right(x)], dim=1))


class GatherExpand(nn.Module):
    """Gather-and-expansion layer (figure 5b): gather, expand depthwise, project; keeps (B, channels, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        expanded = EXPANSION * channels
        self.conv1 = ConvNormAct(channels, channels, 3)
        self.dwconv = nn.Sequential(*conv_norm(channels, expanded, 3, groups=channels), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(*conv_norm(expanded, channels, 1))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.dwconv(self.conv1(x))))


class GatherExpandDown(nn.Module):
    """Gather-and-expansion layer with stride 2 (figure 5c): (B, in_channels, h, w) -> (B, out_channels, h/2, w/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        expanded = EXPANSION * in_channels
        self.conv1 = ConvNormAct(in_channels, in_channels, 3)
        self.dwconv1 = nn.Sequential(*conv_norm(in_channels, expanded, 3, stride=2, groups=in_channels))
        self.dwconv2 = nn.Sequential(*conv_norm(expanded, expanded, 3, groups=expanded), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(*conv_norm(expanded, out_channels, 1))
        self.shortcut = nn.Sequential(
            *conv_norm(in_channels, in_channels, 3, stride=2, groups=in_channels),
            *conv_norm(in_channels, out_channels, 1),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.shortcut(x) + self.conv2(self.dwconv2(self.dwconv1(self.conv1(x)))))


class ContextEmbedding(nn.Module):
    """Add the global context to every pixel (figure 4b); keeps the shape (B, channels, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv_gap = ConvNormAct(channels, channels, 1)
        self.conv_last = ConvNormAct(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        context = pool_globally(x, self.bn)  # (B, channels, 1, 1)
        context = self.conv_gap(self.bn(context))
        return self.conv_last(x + context)


class SemanticBranch(nn.Module):
    """Narrow and deep (section 4.2): image (B, 3, H, W) -> one feature per stage, the last with the global context."""

    def __init__(self, channels: tuple[int, int, int, int], squeezed: int, depth_multiplier: int) -> None:
        super().__init__()

        def stage(in_channels: int, out_channels: int, repeats: int) -> nn.Sequential:
            layers = [GatherExpand(out_channels) for _ in range(repeats * depth_multiplier)]
            return nn.Sequential(GatherExpandDown(in_channels, out_channels), *layers)

        c2, c3, c4, c5 = channels
        self.S1S2 = Stem(c2, squeezed)
        self.S3 = stage(c2, c3, repeats=1)
        self.S4 = stage(c3, c4, repeats=1)
        self.S5_4 = stage(c4, c5, repeats=3)
        self.S5_5 = ContextEmbedding(c5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        feature2 = by_strips(self.S1S2, image, stride=4, halo=8, training=self.training)  # (B, 16w, H/4, W/4)
        feature3 = self.S3(feature2)  # (B, 32w, H/8, W/8)
        feature4 = self.S4(feature3)  # (B, 64w, H/16, W/16)
        feature5 = self.S5_4(feature4)  # (B, 128w, H/32, W/32)
        return feature2, feature3, feature4, feature5, self.S5_5(feature5)


class GuidedAggregation(nn.Module):
    """Each branch gates the other, at strides 8 and 32 (section 4.3).

    Maps detail (B, 128w, H/8, W/8) and semantic (B, 128w, H/32, W/32) to (B, 128w, H/8, W/8).
    """

    def __init__(self, channels: int, generation: Generation) -> None:
        super().__init__()

        def separable() -> nn.Sequential:
            pointwise = nn.Conv2d(channels, channels, 1, bias=False)
            return nn.Sequential(*conv_norm(channels, channels, 3, groups=channels), pointwise)

        self.left1 = separable()
        self.left2 = nn.Sequential(*conv_norm(channels, channels, 3, stride=2), nn.AvgPool2d(3, stride=2, padding=1))
        self.right1 = nn.Sequential(*conv_norm(channels, channels, 3))
        self.right2 = separable()
        self.conv = nn.Sequential(*conv_norm(channels, channels, 3), nn.ReLU(inplace=True))
        older = partial(F.interpolate, mode="bilinear", align_corners=True)
        self.resize = older if generation == "older" else partial(F.interpolate, mode="nearest")

    def forward(self, detail: Tensor, semantic: Tensor) -> Tensor:
        size = detail.shape[2:]
        fine = self.left1(detail) * self.resize(self.right1(semantic), size).sigmoid()  # (B, 128w, H/8, W/8)
        coarse = self.left2(detail) * self.right2(semantic).sigmoid()  # (B, 128w, H/32, W/32)
        return self.conv(fine + self.resize(coarse, size))


class Head(nn.Module):
    """A 3x3 layer, dropout and the classifier: (B, in_channels, h, w) -> logits (B, n, h, w).

    `booster` is the stride of the feature that a booster head reads, or 0 for the main head. In the generation
    `current` a booster head upsamples its feature to (2h, 2w) with `booster**2` channels before the classifier.
    """

    def __init__(self, in_channels: int, width: int, n_classes: int, generation: Generation, booster: int = 0) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_channels, width, 3)
        self.drop = nn.Dropout(0.1)
        self.doubles = generation == "current" and booster > 0
        if generation == "older":
            self.conv_out = nn.Conv2d(width, n_classes, 1)
        elif not self.doubles:
            self.conv_out = nn.Sequential(nn.Identity(), nn.Conv2d(width, n_classes, 1))
        else:
            double = nn.Sequential(nn.Upsample(scale_factor=2), ConvNormAct(width, booster**2, 3))
            self.conv_out = nn.Sequential(double, nn.Conv2d(booster**2, n_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv.conv(x)
        if not self.doubles:
            return self.conv.after_conv(x, lambda x: self.conv_out(self.drop(x)))
        double, classifier = self.conv_out.children()
        upsample, layer = double.children()
        assert isinstance(layer, ConvNormAct)
        x = self.conv.after_conv(x, lambda x: layer.conv(upsample(self.drop(x))))
        return layer.after_conv(x, classifier)


class BiSeNetV2(SegmentationNetwork):
    """BiSeNetV2 with its four booster heads, and its large version.

    - `n_classes`: channels of the logits.
    - `width_multiplier`: scales the channels of both branches and the aggregation; at least 0.125.
    - `depth_multiplier`: scales the number of stride 1 gather-and-expansion layers; a whole number of at least 1.
    - `generation`: `older` aggregates bilinearly, has booster heads without upsampling, and `align_corners=True`.
    - `aux`: whether the booster heads exist.

    The main head has stride 8; aux2, aux3, aux4 and aux5_4 have strides 2, 4, 8 and 16 (`older`: 4, 8, 16 and 32).
    Raises ValueError for an argument outside these ranges.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        width_multiplier: float = 1.0,
        depth_multiplier: int = 1,
        generation: Generation = "current",
        aux: bool = True,
    ) -> None:
        super().__init__()
        require_choice("generation", generation, Generation)
        if width_multiplier < 1 / 8:
            raise ValueError(f"width_multiplier={width_multiplier}: expected at least 0.125")
        if depth_multiplier < 1 or depth_multiplier != int(depth_multiplier):
            raise ValueError(f"depth_multiplier={depth_multiplier}: expected a whole number of at least 1")
        self.align_corners = generation == "older"
        self.head_names = ("head", "aux2", "aux3", "aux4", "aux5_4") if aux else ("head",)

        c8, c16, c32, c64, c128 = (round(width_multiplier * channels) for channels in (8, 16, 32, 64, 128))
        self.detail = DetailBranch(c64, c128)
        self.segment = SemanticBranch((c16, c32, c64, c128), c8, int(depth_multiplier))
        self.bga = GuidedAggregation(c128, generation)
        self.head = Head(c128, 1024, n_classes, generation)
        if aux:
            self.aux2 = Head(c16, 128, n_classes, generation, booster=4)
            self.aux3 = Head(c32, 128, n_classes, generation, booster=8)
            self.aux4 = Head(c64, 128, n_classes, generation, booster=16)
            self.aux5_4 = Head(c128, 128, n_classes, generation, booster=32)
        initialise(self)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *stages, semantic = self.segment(image)
        detail = by_strips(self.detail, image, stride=8, halo=40, training=self.training)  # (B, 128w, H/8, W/8)
        return self.bga(detail, semantic), *stages


def initialise(network: BiSeNetV2) -> None:
    """Set all weights (section 5: "kaiming normal"). A new gather-and-expansion layer starts as its shortcut.

    | layer                                  | weight                                            | bias |
    |----------------------------------------|---------------------------------------------------|------|
    | convolutions                           | normal, variance 2 / fan_out, groups not counted  | 0    |
    | last norm of gather-and-expansion      | 0                                                 | 0    |
    | other norms                            | 1                                                 | 0    |
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, GatherExpand | GatherExpandDown):
            nn.init.zeros_(module.conv2.get_parameter("1.weight"))
