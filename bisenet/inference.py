"""From an image to a prediction: protocols, normalisation, views, and how they are merged.

A *view* is the image resized to one scale. The network sees a view whole or in overlapping windows, each as it is or
mirrored; each of these inputs is a *tile*. A tile that several protocols need is forwarded once. Scales are relative to
the image's own size, or to the size that ``short_side`` gives it first.

Shapes: B batch, C classes, (H, W) the image, (h, w) a view or a tile of it.
"""

# pyright: strict, reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bisenet.networks.blocks import accelerate

if TYPE_CHECKING:
    from bisenet.classes import ClassTable

_TINY, _HUGE = math.ulp(0.0), sys.float_info.max  # the smallest and the largest positive float
_SCORES_AT_A_TIME = 2**27  # scores of one whole view that are upsampled together: 512 MiB in float32
_AUTOCAST = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MERGES = ("mean_prob", "log_prob", "reference")

Size = tuple[int, int]  # height and width in pixels


def _require(*checks: tuple[str, object, bool, str]) -> None:
    """Raise ValueError for the first (name, value, is accepted, what is accepted) that is not accepted."""
    for name, value, ok, accepted in checks:
        if not ok:
            raise ValueError(f"{name}: got {value!r}, accepted: {accepted}")


def _are_numbers(values: Any, low: float, high: float = math.inf, *, whole: bool = False) -> bool:
    """Whether ``values`` is a sequence of at least one number, all of them in [low, high]."""
    kinds = (int,) if whole else (int, float)
    return hasattr(values, "__len__") and len(values) > 0 and all(type(v) in kinds and low <= v <= high for v in values)


@dataclass(frozen=True)
class Protocol:
    """How an image becomes a prediction. The protocol's name is part of the name of every score."""

    scales: Sequence[float] = (1.0,)
    """The image is resized by each factor; the views are merged."""
    flip: bool = False
    """Also predict from the mirrored view of each scale."""
    size_multiple: int = 32
    """Whole views are resized to the next multiple of this, in pixels."""
    crop: bool = False
    """Cut each view into overlapping windows instead of showing it whole."""
    window: Sequence[int] | None = None
    """(height, width) of the windows in pixels; smaller views are padded. Set to None if ``crop`` is false."""
    short_side: int | None = None
    """The image is first resized so that its shorter side has this many pixels; None: it keeps its size."""
    stride: float = 2 / 3
    """Distance between windows as a share of the window, rounded up to pixels."""
    merge: str = "mean_prob"
    """``mean_prob`` averages the probabilities of views and overlaps, ``log_prob`` their logarithms; ``reference`` sums
    overlaps without averaging, each window as exp(p + p mirrored) where ``flip`` is set. For whole views ``reference``
    is ``mean_prob``."""

    def __post_init__(self) -> None:
        for name in ("scales", "window"):  # tuples, so that a protocol hashes
            value: Any = getattr(self, name) if self.crop or name == "scales" else None
            object.__setattr__(self, name, tuple(value) if hasattr(value, "__iter__") else value)
        in_pixels = _are_numbers(self.window, 32, whole=True) and len(self.window or ()) == 2
        short, multiple = self.short_side, self.size_multiple
        _require(
            ("scales", self.scales, _are_numbers(self.scales, _TINY, _HUGE), "at least one positive factor"),
            ("flip", self.flip, type(self.flip) is bool, "true or false"),
            ("crop", self.crop, type(self.crop) is bool, "true or false"),
            ("size_multiple", multiple, _are_numbers([multiple], 1, whole=True), "an integer of at least 1"),
            ("window", self.window, in_pixels or not self.crop, "[height, width] in pixels, each at least 32"),
            ("short_side", short, short is None or _are_numbers([short], 32, whole=True), "null or at least 32 pixels"),
            ("stride", self.stride, _are_numbers([self.stride], _TINY, 1), "a share of the window in (0, 1]"),
            ("merge", self.merge, self.merge in _MERGES, " | ".join(_MERGES)),
        )


class Tile(NamedTuple):
    """A rectangle of a view, as network input. Outside the view it is 0, the mean colour after normalisation."""

    top: int
    left: int
    bottom: int
    right: int
    mirrored: bool = False

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left


class View(NamedTuple):
    """Two sizes that the image is resized to, one after the other."""

    start: Size
    """The size that the protocol's scales are relative to."""
    size: Size
    """The size that the network sees, whole or in windows."""


class Prediction(NamedTuple):
    """Prediction for a batch of images under one protocol."""

    train_ids: Tensor
    """(B, H, W) int64."""
    seconds: float
    """Time of network and merging. A tile that protocols share counts in full for each of them."""


def windows(size: Size, window: Sequence[int], stride: float) -> list[Tile]:
    """Return tiles of the window's size that cover a view.

    They lie ``ceil(stride * window)`` apart, and the last one is shifted to end at the border. A view smaller than the
    window is centred in it.
    """
    spans: list[list[tuple[int, int]]] = []
    for side, length in zip(size, window, strict=True):
        spare = max(side - length, 0)
        margin = max(length - side, 0) // 2
        step = math.ceil(stride * length)
        starts = [min(i * step, spare) - margin for i in range(math.ceil(spare / step) + 1)]
        spans.append([(start, start + length) for start in starts])
    return [Tile(top, left, bottom, right) for top, bottom in spans[0] for left, right in spans[1]]


def views(protocol: Protocol, size: Size) -> Iterator[tuple[View, list[Tile]]]:
    """Yield each view of an image with its tiles.

    A whole view has the size ``int(scale * size)``, rounded up to a multiple of ``size_multiple``.

    Departs: with ``short_side`` the reference also rounds the longer side of a square image, which may become a pixel
    shorter; ours stays square.
    """
    start, multiple = size, 1 if protocol.window else protocol.size_multiple
    if (short := protocol.short_side) is not None:
        height, width = (short if side == min(size) else int(short / min(size) * side) for side in size)
        start = height, width
    for scale in protocol.scales:
        height, width = (max(multiple, math.ceil(int(scale * side) / multiple) * multiple) for side in start)
        tiles = [Tile(0, 0, height, width)]
        if protocol.window:
            tiles = windows((height, width), protocol.window, protocol.stride)
        sides = [False, True] if protocol.flip else [False]
        yield View(start, (height, width)), [tile._replace(mirrored=side) for tile in tiles for side in sides]


def resize(x: Tensor, size: Size, *, align_corners: bool) -> Tensor:
    """Resize (B, C, h, w) bilinearly; returns ``x`` itself if it has that size."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


@torch.no_grad()
def predict(
    network: nn.Module, image: Tensor, protocols: Sequence[Protocol], max_pixels_per_batch: int | None = None
) -> list[Prediction]:
    """Predict under several protocols in one pass, and return one prediction for each, in order.

    Three resizes surround the network:

    - The image is resized to ``short_side`` with align_corners=False, and to the view with align_corners=True.
    - Logits are upsampled to the tile with the network's ``align_corners``.
    - Whole views are resized to the image before the softmax, views in windows after it, with align_corners=True.

    A protocol of one whole view needs no softmax.

    Memory: first the network's own. Then the logits of all tiles at the network's stride, and float32 scores
    (B, C, H, W) of the image, of the largest view, and of two windows (for whole views, of the image once more). A
    single view in windows that has the image's size uses the scores of the image as its own.

    Args:
        network: returns ``SegmentationOutput``; has ``align_corners``.
        image: (B, 3, H, W) float, normalised.
        protocols: the protocols.
        max_pixels_per_batch: tiles of one view are batched up to this many pixels, but at least one tile. None: one
            tile at a time on a CPU, where batches are no faster, and up to 2**22 pixels elsewhere.
    """
    size: Size = (image.shape[-2], image.shape[-1])
    align_corners = bool(network.align_corners)
    most = (1 if image.device.type == "cpu" else 2**22) if max_pixels_per_batch is None else max_pixels_per_batch
    users: dict[View, list[tuple[int, list[Tile]]]] = {}
    for i, protocol in enumerate(protocols):
        for view, tiles in views(protocol, size):
            users.setdefault(view, []).append((i, tiles))
    seconds = [0.0] * len(protocols)
    logits: dict[View, dict[Tile, Tensor]] = {}
    for view, wanted in users.items():
        started = _now(image)
        resized = resize(resize(image, view.start, align_corners=False), view.size, align_corners=True)
        logits[view] = _forward(network, resized, [tiles for _, tiles in wanted], most)
        passed = _now(image) - started
        for i, tiles in dict(wanted).items():
            seconds[i] += passed * _pixels(tiles) / _pixels(logits[view])
    found: list[Prediction] = []
    for protocol, before in zip(protocols, seconds, strict=True):
        started = _now(image)
        train_ids = _merge(protocol, size, logits, align_corners=align_corners)
        found.append(Prediction(train_ids, before + _now(image) - started))
    return found


def _pixels(tiles: Iterable[Tile]) -> int:
    return sum(math.prod(tile.size) for tile in tiles)


def _now(tensor: Tensor) -> float:
    """Return the clock in seconds, after the tensor's device has finished its work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _forward(network: nn.Module, view: Tensor, wanted: Iterable[Iterable[Tile]], max_pixels: int) -> dict[Tile, Tensor]:
    """Return the logits of every tile that is wanted, at the network's stride; each tile is forwarded once."""
    distinct = list(dict.fromkeys(tile for tiles in wanted for tile in tiles))
    logits: dict[Tile, Tensor] = {}
    for size in dict.fromkeys(tile.size for tile in distinct):
        tiles = [tile for tile in distinct if tile.size == size]
        most = max(1, max_pixels // (len(view) * math.prod(size)))
        for first in range(0, len(tiles), most):
            batch = tiles[first : first + most]
            output = network(torch.cat([_cut(view, tile) for tile in batch])).logits.float().contiguous()
            logits.update(zip(batch, output.split(len(view)), strict=True))
    return logits


def _cut(view: Tensor, tile: Tile) -> Tensor:
    height, width = view.shape[-2:]
    piece = F.pad(view, (-tile.left, tile.right - width, -tile.top, tile.bottom - height))  # negative padding cuts
    return piece.flip(-1) if tile.mirrored else piece


def _classify(logits: Tensor, view: Size, size: Size, *, align_corners: bool) -> Tensor:
    """Train ids (B, H, W) of one whole view: the argmax of its logits, upsampled to the view, then to the image.

    Upsampling treats each class independently. Taking some classes at a time bounds memory and changes no bit.
    """
    most = max(1, _SCORES_AT_A_TIME // (len(logits) * max(math.prod(view), math.prod(size))))

    def maximum(first: int) -> tuple[Tensor, Tensor]:
        part = resize(logits[:, first : first + most], view, align_corners=align_corners)
        values, indices = resize(part, size, align_corners=True).max(dim=1)
        return values, indices + first

    best, train_ids = maximum(0)
    for first in range(most, logits.shape[1], most):
        values, indices = maximum(first)
        train_ids = torch.where(values > best, indices, train_ids)  # the first of equal values, as argmax
        best = torch.maximum(best, values)
    return train_ids


def _merge(
    protocol: Protocol, size: Size, logits: Mapping[View, Mapping[Tile, Tensor]], *, align_corners: bool
) -> Tensor:
    """Train ids (B, H, W) of a protocol, from the logits of all its tiles."""
    shown = list(views(protocol, size))
    first, tiles = shown[0]
    some = logits[first][tiles[0]]
    if len(shown) == len(tiles) == 1 and not protocol.crop:
        return _classify(some, first.size, size, align_corners=align_corners)
    sizes = [view.size for view, _ in shown]
    tile_scores = _reused_memory(some, [tile.size for _, tiles in shown for tile in tiles])
    view_scores = _reused_memory(some, sizes if protocol.crop else [size])
    is_one = protocol.crop and sizes == [size]

    def score(view: View, tile: Tile) -> Tensor:
        x = _upsample(logits[view][tile], tile_scores(tile.size), align_corners=align_corners)
        if not protocol.crop and tile.size != size:
            x = _upsample(x, view_scores(size), align_corners=True)
        x = (torch.log_softmax if protocol.merge == "log_prob" else torch.softmax)(x, 1, out=x)
        return x.flip(-1) if tile.mirrored else x

    total = view_scores(size).zero_() if is_one else some.new_zeros(*some.shape[:2], *size)
    for view, tiles in shown:
        if not protocol.crop:
            for tile in tiles:
                total += score(view, tile)
            continue
        height, width = view.size
        summed, times = total if is_one else view_scores(view.size).zero_(), some.new_zeros(height, width)
        for tile in (tile for tile in tiles if not tile.mirrored):
            inside = (..., slice(max(tile.top, 0), tile.bottom), slice(max(tile.left, 0), tile.right))
            within = (..., slice(max(-tile.top, 0), height - tile.top), slice(max(-tile.left, 0), width - tile.left))
            part = score(view, tile._replace(mirrored=protocol.flip))  # mirrored first: the flip copies it
            if protocol.flip:
                part += score(view, tile)
            if protocol.merge == "reference" and protocol.flip:
                part = part.exp_()
            summed[inside] += part[within]
            times[inside] += 1
        if protocol.merge != "reference":
            summed /= times
        if not is_one:  # one class at a time needs little memory and changes no bit
            for into, part in zip(total.split(1, dim=1), summed.split(1, dim=1), strict=True):
                into += resize(part, size, align_corners=True)
    return total.max(dim=1).indices  # on a CPU several times as fast as argmax


def _reused_memory(like: Tensor, sizes: Iterable[Size]) -> Callable[[Size], Tensor]:
    """Return a function from (h, w), one of ``sizes``, to a tensor (B, C, h, w); all these tensors share memory.

    Allocating new memory for every tile would take as long as computing what is written there.
    """
    batch, classes = like.shape[:2]
    memory = like.new_empty(batch * classes * max(map(math.prod, sizes)))
    return lambda size: memory[: batch * classes * math.prod(size)].view(batch, classes, *size)


def _upsample(x: Tensor, out: Tensor, *, align_corners: bool) -> Tensor:
    """As :func:`resize`, but always writes to ``out``, whose size is the new one."""
    return torch.ops.aten.upsample_bilinear2d.out(x, out.shape[-2:], align_corners, None, None, out=out)


class Segmenter(nn.Module):
    """A network with everything that turns raw images into train ids: normalisation, protocols and class table.

    Args:
        network: returns ``SegmentationOutput`` before the last upsampling; has ``align_corners``.
        classes: class table of the data set it was trained on.
        mean, std: of RGB values, mean in [0, 1] and standard deviation in (0, 1].
        protocols: name -> how an image becomes a prediction; the first is the one that :meth:`forward` and
            :meth:`predict` use. Names become part of scores and files.
        max_pixels_per_batch: bound on the pixels forwarded at a time, as in :func:`predict`; None: by the device.
        precision: of every prediction, also during training: ``fp32``, or mixed precision with ``fp16`` or ``bf16``.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: "ClassTable",
        mean: Sequence[float],
        std: Sequence[float],
        protocols: Mapping[str, Protocol],
        max_pixels_per_batch: int | None = None,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        most = max_pixels_per_batch
        names_ok = len(protocols) > 0 and all(re.fullmatch(r"\w[\w.-]*", name) for name in protocols)
        _require(
            ("mean", mean, _are_numbers(mean, 0, 1) and len(mean) == 3, "three values in [0, 1]"),
            ("std", std, _are_numbers(std, _TINY, 1) and len(std) == 3, "three values in (0, 1]"),
            ("protocol", list(protocols), names_ok, "at least one, each a name of letters, digits, '_', '-' and '.'"),
            ("max_pixels_per_batch", most, most is None or _are_numbers([most], 1, whole=True), "null or at least 1"),
            ("precision", precision, precision in _AUTOCAST, " | ".join(_AUTOCAST)),
        )
        self.network = network
        self.classes = classes
        self.normalization = {"mean": list(mean), "std": list(std)}
        self.protocols = dict(protocols)
        self.max_pixels_per_batch = max_pixels_per_batch
        self.precision = precision
        self._faster: tuple[object, nn.Module] | None = None  # in a tuple, so that it is not registered as a submodule
        # In units of raw pixels, so that normalising a uint8 image is one subtraction and one multiplication.
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def normalize(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> float32, zero mean and unit variance over the data set."""
        return (image.float() - self.mean) / self.std

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 RGB -> (B, H, W) int64 train ids, under the first protocol."""
        first = next(iter(self.protocols))
        return self.predictions(image, [first])[first].train_ids

    def predictions(self, image: Tensor, names: Iterable[str]) -> dict[str, Prediction]:
        """(B, 3, H, W) uint8 RGB -> a prediction for each of the named protocols."""
        named = {name: self.protocols[name] for name in names}
        with torch.autocast(image.device.type, _AUTOCAST[self.precision], enabled=self.precision != "fp32"):
            found = predict(self._network(), self.normalize(image), list(named.values()), self.max_pixels_per_batch)
        return dict(zip(named, found, strict=True))

    def _network(self) -> nn.Module:
        """Return the network that predicts: on a CPU, in fp32 and evaluation mode, an accelerated copy of the network.

        The copy is made again when a weight has changed. In all other cases it is the network itself: folded weights
        round differently in half precision, GPUs were not measured, and the copy would not call hooks.
        """
        network, on_cpu = self.network, self.mean.device.type == "cpu"
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
        compiled = network._compiled_call_impl is not None
        if network.training or not on_cpu or self.precision != "fp32" or compiled or hooked:
            self._faster = None
            return network
        tensors = [*network.parameters(), *network.buffers()]
        versions = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        # Not every write to a tensor raises its version: fused optimizers do not, nor does `.data`.
        values = [tensor.detach()[(0,) * tensor.ndim] for tensor in tensors if tensor.ndim > 1]
        values = torch.stack(values).tolist() if values else []
        known = id(network), network.align_corners, values, versions
        if self._faster is None or self._faster[0] != known:
            self._faster = known, accelerate(network)
        return self._faster[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_faster": None}  # a copy makes its own

    @torch.inference_mode()
    def predict(self, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Segment one image of any size: (H, W, 3) uint8 RGB -> (H, W) uint8 train ids, as ``classes`` names them."""
        if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or 0 in rgb.shape:
            raise ValueError(f"predict takes an RGB image (H, W, 3) of dtype uint8, got {rgb.shape} of {rgb.dtype}")
        modes = {module: module.training for module in self.modules()}  # some may be frozen while others train
        self.eval()
        try:
            image = torch.as_tensor(np.ascontiguousarray(rgb)).permute(2, 0, 1)[None].to(self.mean.device)
            return self(image)[0].to("cpu", torch.uint8).numpy()
        finally:
            for module, mode in modes.items():
                module.training = mode
