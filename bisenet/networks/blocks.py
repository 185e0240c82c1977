"""What both families are made of: the output type, the frame of a network, convolution + norm + activation.

Shapes: B images of H x W pixels, C channels, feature maps of h x w. H/8 stands for the height at stride 8, which is
rounded up: every layer with stride 2 makes ceil(h / 2) of h.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

_M = TypeVar("_M", bound=nn.Module)

Generation = Literal["current", "older"]
"""Which published code a network repeats: `current`, or `older` (2018 to 2020)."""

Norm = Literal["bn", "inplace_abn"]
"""`bn`: batch norm and ReLU. `inplace_abn`: what InPlaceABN computes, |weight| + eps as scale and leaky ReLU 0.01."""


class SegmentationOutput(NamedTuple):
    """Logits (B, n_classes, H/s, W/s) of every head, each at the stride s of its head."""

    logits: Tensor
    """The main head."""
    aux: tuple[Tensor, ...]
    """The auxiliary heads; () in eval mode and of a network without them."""


def require_choice(argument: str, value: str, choices: object) -> None:
    """Raise ValueError unless `value`, given as `argument`, is one of the strings of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{argument}={value!r}: expected one of {', '.join(get_args(choices))}")


class SegmentationNetwork(nn.Module, ABC):
    """A network whose heads sit on feature maps: `head_names[i]` is the submodule that reads `features(image)[i]`."""

    head_names: tuple[str, ...]
    """Main head first, then the auxiliary ones, in the order of the outputs."""
    align_corners: bool
    """How the logits are to be upsampled bilinearly to the size of the image."""

    @abstractmethod
    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map a normalised image (B, 3, H, W) to the feature maps that the heads read, the main head's first."""

    def forward(self, image: Tensor) -> SegmentationOutput:
        """Map a normalised image (B, 3, H, W), H and W at least 64, to logits.

        Raises ValueError on a batch of one in training where batch norm would see one value per channel.
        """
        heads = self.head_names if self.training else self.head_names[:1]
        features = self.features(image)[: len(heads)]
        logits, *aux = [
            by_strips(getattr(self, head), feature, stride=1, halo=1, share=64, training=self.training)
            for head, feature in zip(heads, features, strict=True)
        ]
        return SegmentationOutput(logits, tuple(aux))


STRIP = 2**22
"""Pixels of the strips in which images of more than twice as many pass through the layers of high resolution."""


def by_strips(
    layers: Callable[[Tensor], Tensor], x: Tensor, *, stride: int, halo: int, share: int = 1, training: bool
) -> Tensor:
    """Return `layers(x)` for (B, C, h, w), a strip of rows at a time where x is large, to bound memory.

    A strip is seen with `halo` rows on both sides: a multiple of `stride`, the total stride of the layers, and not less
    than the radius of their receptive field, so that every value is computed from the same values. `share` is how many
    pixels of the image one of x stands for. Nothing is cut in training, where norms see the whole, and in an export.
    """
    if training or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
        return layers(x)
    height, width = x.shape[2:]
    if len(x) * height * width * share <= 2 * STRIP:
        return layers(x)
    rows = max(STRIP // (len(x) * width * share * stride), 1) * stride
    parts: list[Tensor] = []
    for top in range(0, height, rows):
        first = max(top - halo, 0)
        part = layers(x[:, :, first : top + rows + halo])
        parts.append(part[:, :, (top - first) // stride :][:, :, : math.ceil(min(rows, height - top) / stride)].clone())
    return torch.cat(parts, dim=2)


@torch.inference_mode(False)
@torch.no_grad()
def fold(network: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """Return a copy in evaluation mode without auxiliary heads, its batch norms folded into the convolutions before.

    What follows what is seen on an image of 64 x 64, by which the copy is compared with the network in the end. Raises
    ValueError for a network of one's own that cannot be copied, folded, or run on such an image.
    """
    try:
        copied = deepcopy(network).eval()
        parameter = next(copied.parameters())
        image = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64).to(parameter.device, parameter.dtype)
        expected = copied(image)[0]
        for module in list(copied.modules()):
            for name, norm in list(module.named_children()):
                if isinstance(norm, PositiveBatchNorm):
                    setattr(module, name, norm.plain())
        if not (pairs := _foldable(copied, image)):
            raise ValueError("no batch norm follows a convolution")
        for conv, norm in pairs:
            copied.set_submodule(
                conv, fuse_conv_bn_eval(_of(copied, conv, nn.Conv2d), _of(copied, norm, nn.BatchNorm2d))
            )
            copied.set_submodule(norm, nn.Identity())
        copied.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        difference = (copied(image)[0] - expected).abs().max() / expected.abs().max()
    except Exception as error:  # code of others
        raise ValueError(f"{type(network).__name__} cannot be folded: {type(error).__name__}: {error}") from error
    if not difference <= (1e-3 if parameter.dtype == torch.float32 else 0.1):
        raise ValueError(f"{type(network).__name__} cannot be folded: it predicts something else then")
    return copied


def _foldable(network: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions and of the norms that get their outputs, each called once; drops children never called.

    Hooks of these modules tell. Tracing by torch.fx would change how modules are called in all threads.
    """
    calls: Counter[str] = Counter()
    made: dict[int, tuple[str, Tensor, int]] = {}  # outputs of convolutions; a version tells what was changed in place
    pairs: list[tuple[str, str]] = []

    def note(name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        calls[name] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = name, output, output._version
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and id(given[0]) in made:
            conv, tensor, version = made[id(given[0])]
            if tensor._version == version:
                pairs.append((conv, name))

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in network.named_modules() if name]
    network(image)
    for hook in hooks:
        hook.remove()
    for name, _ in list(network.named_children()):
        if not any(f"{called}.".startswith(f"{name}.") for called in calls):
            setattr(network, name, nn.Identity())
    return [(conv, norm) for conv, norm in pairs if calls[conv] == calls[norm] == 1]


def _of(network: nn.Module, name: str, kind: type[_M]) -> _M:
    module = network.get_submodule(name)
    assert isinstance(module, kind)
    return module


def accelerate(network: nn.Module) -> nn.Module:
    """Return a network that predicts the same on a CPU and is faster: folded, in `channels_last`.

    A network of one's own for which that does not work is returned itself, with a line for debugging.
    """
    try:
        return fold(network, torch.channels_last)
    except ValueError as error:
        log.debug("predicts as it is: %s", error)
        return network


class PositiveBatchNorm(nn.Module):
    """The batch norm of InPlaceABN (arXiv 1712.02616): (B, C, h, w) scaled by |weight| + eps, which is never negative.

    Its state dict has the names of InPlaceABN: weight, bias, running_mean, running_var. The statistics live in a batch
    norm of their own, so that `SyncBatchNorm.convert_sync_batchnorm` replaces that one and the rule for the scale
    survives.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.statistics = nn.BatchNorm2d(channels, affine=False)
        self.register_state_dict_post_hook(_flatten_statistics)
        self.register_load_state_dict_pre_hook(_nest_statistics)

    def plain(self) -> nn.BatchNorm2d:
        """Return a batch norm that computes the same in evaluation mode."""
        norm = nn.BatchNorm2d(len(self.weight), eps=self.statistics.eps).to(self.weight).eval()
        scale = self.weight.detach().abs() + self.statistics.eps
        norm.load_state_dict({**self.state_dict(), "weight": scale}, strict=False)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs() + self.statistics.eps
        return torch.addcmul(self.bias[:, None, None], self.statistics(x), scale[:, None, None])


def _flatten_statistics(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    state.pop(f"{prefix}statistics.num_batches_tracked")
    for name in ("running_mean", "running_var"):
        state[f"{prefix}{name}"] = state.pop(f"{prefix}statistics.{name}")


def _nest_statistics(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    # Only a norm without momentum reads the number of batches, so that any will do.
    state[f"{prefix}statistics.num_batches_tracked"] = torch.tensor(0)
    for name in ("running_mean", "running_var"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}statistics.{name}"] = state.pop(f"{prefix}{name}")


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the norm layer alone, as it stands where no activation follows."""
    return PositiveBatchNorm(channels) if norm == "inplace_abn" else nn.BatchNorm2d(channels)


def make_activation(norm: Norm) -> nn.Module:
    """Return the activation that follows a norm of this kind."""
    return nn.LeakyReLU(0.01, inplace=True) if norm == "inplace_abn" else nn.ReLU(inplace=True)


class ConvNormAct(nn.Module):
    """Convolution without bias, norm, activation: (B, in_channels, h, w) -> (B, out_channels, h/stride, w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, norm: Norm = "bn") -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = make_norm(norm, out_channels)
        self.act = make_activation(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def after_conv(self, x: Tensor, following: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `following(act(bn(x)))` for an output x of the convolution.

        In training only x is kept: the backward pass normalises again, which saves memory. The numbers stay the same,
        those of dropout as well. `following` may hold no batch norm, which would count twice.
        """

        def layers(x: Tensor) -> Tensor:
            return following(self.act(self.bn(x)))

        if not self.training or torch.compiler.is_compiling():  # a compiler chooses for itself what it keeps
            return layers(x)
        return checkpoint(layers, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _counting_once(self.bn)))


@contextmanager
def _counting_once(norm: nn.Module) -> Generator[None]:
    """A norm sees a batch for the second time, and keeps its running statistics as they are."""
    before = [buffer.clone() for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(norm.buffers(), before, strict=True):
            buffer.copy_(value)


def pool_globally(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Average (B, C, h, w) over its pixels to (B, C, 1, 1), which `norm`, a layer or a block with a norm, sees next.

    Raises ValueError where that norm has to estimate a variance from a batch of one. A SyncBatchNorm sees the images of
    the other devices too, a norm in eval mode estimates nothing, and None normalises nothing.
    """
    estimates = norm is not None and any(isinstance(m, nn.BatchNorm2d) and m.training for m in norm.modules())
    if estimates and x.shape[0] == 1:
        raise ValueError(
            "a batch of 1 image in training: after global pooling, batch norm sees one value per channel, which has no "
            "variance. Accepted: at least 2 images per device, synchronised batch norm, or norm layers in eval mode"
        )
    return x.mean((2, 3), keepdim=True)


def resize_nearest(x: Tensor, like: Tensor) -> Tensor:
    """Resize (B, C, h, w) to the height and width of `like`."""
    return F.interpolate(x, like.shape[2:], mode="nearest")
