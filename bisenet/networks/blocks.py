"""Parts that both families share: the output type, the base class of a network, convolution + norm + activation.

Shapes: B images of H x W pixels, C channels, feature maps of h x w. H/8 stands for the height at stride 8, which is
rounded up: every layer with stride 2 turns height h into ceil(h / 2).
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
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

Generation = Literal["current", "older"]
"""Which version of the reference's code a network reproduces: `current`, or `older` (2018 to 2020)."""

Norm = Literal["bn", "inplace_abn"]
"""`bn`: batch norm and ReLU. `inplace_abn`: as InPlaceABN, with |weight| + eps as scale and leaky ReLU 0.01."""


class SegmentationOutput(NamedTuple):
    """Logits (B, n_classes, H/s, W/s) of every head, each at the stride s of its head."""

    logits: Tensor
    """The main head."""
    aux: tuple[Tensor, ...]
    """The auxiliary heads; () in eval mode, and for a network that has none."""


def require_choice(argument: str, value: str, choices: object) -> None:
    """Raise ValueError unless `value`, given as `argument`, is one of the strings of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(f"{argument}={value!r}: expected one of {', '.join(get_args(choices))}")


class SegmentationNetwork(nn.Module, ABC):
    """A network with one head per feature map: the submodule `head_names[i]` reads `features(image)[i]`."""

    head_names: tuple[str, ...]
    """Names of the main head and then of the auxiliary heads, in the order of the outputs."""
    align_corners: bool
    """`align_corners` of the bilinear upsampling of the logits to the size of the image."""

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
"""Image pixels in a strip. In evaluation, the high-resolution layers see images above twice this size in strips."""


def by_strips(
    layers: Callable[[Tensor], Tensor], x: Tensor, *, stride: int, halo: int, share: int = 1, training: bool
) -> Tensor:
    """Return `layers(x)` for (B, C, h, w), computed in strips of rows where x is large, to bound memory.

    - `stride`: total stride of the layers.
    - `halo`: extra rows above and below each strip: a multiple of `stride`, and at least the radius of the layers'
      receptive field, so that every output is computed from the same inputs as without strips.
    - `share`: pixels of the image per pixel of x.

    Training uses no strips, because a norm needs the statistics of the whole batch; neither does an export.
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
    """Return a copy in evaluation mode, without auxiliary heads, with batch norms folded into the convolutions.

    A forward pass on a 64 x 64 image shows which norm follows which convolution. The folded copy must predict the same
    for that image. Raises ValueError for a network that cannot be copied, folded, or run on such an image, which can
    happen with a user's own class.
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
            modules: list[Any] = [copied.get_submodule(name) for name in (conv, norm)]
            copied.set_submodule(conv, fuse_conv_bn_eval(*modules))
            copied.set_submodule(norm, nn.Identity())
        copied.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        difference = (copied(image)[0] - expected).abs().max() / expected.abs().max()
    except Exception as error:  # a user's own network may raise anything
        raise ValueError(f"{type(network).__name__} cannot be folded: {type(error).__name__}: {error}") from error
    if not difference <= (1e-3 if parameter.dtype == torch.float32 else 0.1):
        raise ValueError(f"{type(network).__name__} cannot be folded: the folded copy predicts something else")
    return copied


def _foldable(network: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Return pairs of names: a convolution and the batch norm that reads its output, each called exactly once.

    Also replaces children of the network that were never called (auxiliary heads) by `Identity`. Forward hooks record
    the calls, because tracing with torch.fx would change how modules are called in all threads.
    """
    calls: Counter[str] = Counter()
    made: dict[int, tuple[str, Tensor, int]] = {}  # outputs of convolutions; the version shows a change in place
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


def accelerate(network: nn.Module) -> nn.Module:
    """Return a copy that predicts the same, faster on a CPU: batch norms folded, memory format `channels_last`.

    A network that cannot be folded is returned unchanged, and the reason is logged at level DEBUG.
    """
    try:
        return fold(network, torch.channels_last)
    except ValueError as error:
        log.debug("predicts as it is: %s", error)
        return network


class PositiveBatchNorm(nn.Module):
    """The batch norm of InPlaceABN (arXiv 1712.02616): (B, C, h, w) scaled by |weight| + eps, which is never negative.

    Its state dict has the names of InPlaceABN: weight, bias, running_mean, running_var. The statistics live in an inner
    batch norm, so that `SyncBatchNorm.convert_sync_batchnorm` replaces only the inner norm and keeps |weight| + eps.
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
    # InPlaceABN stores no number of batches. Only a norm with momentum=None reads it, so any value will do.
    state[f"{prefix}statistics.num_batches_tracked"] = torch.tensor(0)
    for name in ("running_mean", "running_var"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}statistics.{name}"] = state.pop(f"{prefix}{name}")


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the norm layer of this kind, without an activation."""
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

        In training only x is kept for the backward pass, which computes the rest again to save memory. The numbers stay
        the same, dropout included. `following` must contain no batch norm, which would update its statistics twice.
        """

        def layers(x: Tensor) -> Tensor:
            return following(self.act(self.bn(x)))

        if not self.training or torch.compiler.is_compiling():  # a compiler chooses for itself what it keeps
            return layers(x)
        return checkpoint(layers, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _same_statistics(self.bn)))


@contextmanager
def _same_statistics(norm: nn.Module) -> Generator[None]:
    """Restore the running statistics of `norm` on leaving: it sees the same batch a second time."""
    before = [buffer.clone() for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(norm.buffers(), before, strict=True):
            buffer.copy_(value)


def pool_globally(x: Tensor, norm: nn.Module | None) -> Tensor:
    """Average (B, C, h, w) over its pixels to (B, C, 1, 1), the input of `norm`: a norm, a block with one, or None.

    Raises ValueError where a batch norm in training would have to estimate a variance from a batch of one. The check
    passes a SyncBatchNorm, which also sees the images of other devices, and norms in eval mode.
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
