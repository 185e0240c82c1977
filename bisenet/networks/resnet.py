"""ResNet-18 without its classifier (arXiv 1512.03385), named as in torchvision, whose public weights load into it.

Shapes: B images of H x W pixels.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from torch import Tensor, nn

from bisenet.networks.blocks import Norm, by_strips, make_activation, make_norm


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in_channels, H, W) -> (B, out_channels, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = make_norm(norm, out_channels)
        self.act1 = make_activation(norm)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = make_norm(norm, out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, make_norm(norm, out_channels))
        self.act2 = nn.ReLU(inplace=True)  # a plain ReLU with either norm

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.act2(shortcut + residual)


class ResNet18(nn.Module):
    """Backbone: image (B, 3, H, W) -> features with 128, 256 and 512 channels at strides 8, 16 and 32."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(norm, 64)
        self.act = make_activation(norm)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1, norm), BasicBlock(64, 64, 1, norm))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2, norm), BasicBlock(128, 128, 1, norm))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2, norm), BasicBlock(256, 256, 1, norm))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2, norm), BasicBlock(512, 512, 1, norm))
        initialise(self)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def first(image: Tensor) -> Tensor:
            return self.layer1(self.maxpool(self.act(self.bn1(self.conv1(image)))))

        x = by_strips(first, image, stride=4, halo=24, training=self.training)  # (B, 64, H/4, W/4)
        feature8 = self.layer2(x)  # (B, 128, H/8, W/8)
        feature16 = self.layer3(feature8)  # (B, 256, H/16, W/16)
        feature32 = self.layer4(feature16)  # (B, 512, H/32, W/32)
        return feature8, feature16, feature32


def initialise(resnet: ResNet18) -> None:
    """Set the weights of a network without pretrained ones; the norms keep weight 1 and bias 0.

    | layer        | weight                                              | bias |
    |--------------|-----------------------------------------------------|------|
    | convolutions | normal, variance 2 / fan_out (He, for ReLU)         | none |
    | norms        | 1                                                   | 0    |

    Departs: the original code always starts from ImageNet weights. This is torchvision's initialisation.
    """
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
