"""Training augmentation that albumentations lacks: the reference's scale-and-crop and its colour jitter, for uint8."""

import math
from collections.abc import Sequence
from typing import Any

import albumentations as A  # which bisenet.data keeps from asking the network for a newer version
import cv2
import numpy as np

_MEAN = (1 / 3, 1 / 3, 1 / 3)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL
_SIDES = {"round": round, "ceil": math.ceil, "floor": math.floor}


class ScaleCrop(A.DualTransform):
    """Resize by a random factor and crop at a random place, computing only the pixels that are kept.

    The pixels are those of resizing the whole image, bilinear, and the whole mask, nearest, then cropping. In both a
    pixel is the square around its centre, so that the mask stays on the image at every scale.

    Args:
        size: (height, width) of the result in pixels, each at least 32.
        scale: (low, high) of a uniform factor, or the factors to choose from.
        mode: ``uniform`` or ``choice``.
        too_small: a scaled image smaller than ``size`` is padded on all sides (``pad``: image 0, mask 255, ignored), or
            resized once more until it fits (``enlarge``).
        sides: how the sides of the scaled image are made whole pixels: ``round``; ``ceil`` as the reference's current
            generation, or ``floor`` as its older one.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self, size: Sequence[int], scale: Sequence[float] = (0.5, 2.0), mode: str = "uniform", too_small: str = "pad",
        sides: str = "round",
    ) -> None:  # fmt: skip
        super().__init__(p=1)
        whole = _numbers(size, 32) and len(size) == 2 and all(isinstance(side, int) for side in size)
        _require(whole, "size", size, "[height, width] in pixels, each at least 32")
        _require(mode in ("uniform", "choice"), "mode", mode, "uniform | choice")
        _require(too_small in ("pad", "enlarge"), "too_small", too_small, "pad | enlarge")
        _require(sides in _SIDES, "sides", sides, " | ".join(_SIDES))
        _require(_numbers(scale, 1e-9) and len(scale) > 0, "scale", scale, "positive factors")
        ordered = mode == "choice" or (len(scale) == 2 and scale[0] <= scale[1])
        _require(ordered, "scale", scale, "[low, high] with low <= high where mode is uniform")
        self.size, self.scale, self.mode, self.too_small = (size[0], size[1]), tuple(scale), mode, too_small
        self.sides = sides

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the size of the scaled image, and the corner of the window in it: below 0 where the image is padded."""
        source = params["shape"][:2]
        factor = self.py_random.choice(self.scale) if self.mode == "choice" else self.py_random.uniform(*self.scale)
        scaled = [max(1, _SIDES[self.sides](factor * length)) for length in source]
        grow = max(crop / length for crop, length in zip(self.size, scaled, strict=True))
        if self.too_small == "enlarge" and grow > 1:
            scaled = [int(grow * length + 1) for length in scaled]
        room = [length - crop for crop, length in zip(self.size, scaled, strict=True)]
        return {"scaled": scaled, "corner": [self.py_random.randint(0, r) if r >= 0 else r // 2 for r in room]}

    def apply(self, img: np.ndarray, *, scaled: list[int], corner: list[int], **_: Any) -> np.ndarray:
        """Resample the image."""
        return self._window(img, scaled, corner, cv2.INTER_LINEAR, fill=0)

    def apply_to_mask(self, mask: np.ndarray, *, scaled: list[int], corner: list[int], **_: Any) -> np.ndarray:
        """Resample the mask."""
        return self._window(mask, scaled, corner, cv2.INTER_NEAREST, fill=255)

    def _window(
        self, source: np.ndarray, scaled: list[int], corner: list[int], interpolation: int, fill: int
    ) -> np.ndarray:
        top, left = (max(start, 0) for start in corner)  # of the part that lies on the image
        rows = min(corner[0] + self.size[0], scaled[0]) - top
        columns = min(corner[1] + self.size[1], scaled[1]) - left
        step_y, step_x = source.shape[0] / scaled[0], source.shape[1] / scaled[1]
        # Pixel centres lie at + 0.5, at both scales.
        to_source = np.array([[step_x, 0, (left + 0.5) * step_x - 0.5], [0, step_y, (top + 0.5) * step_y - 0.5]])
        flags = interpolation | cv2.WARP_INVERSE_MAP
        inside = cv2.warpAffine(source, to_source, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        if (rows, columns) == self.size:
            return inside
        padded = np.full((*self.size, *source.shape[2:]), fill, source.dtype)
        above, before = top - corner[0], left - corner[1]
        padded[above : above + rows, before : before + columns] = inside
        return padded


class ColorJitter(A.ImageOnlyTransform):
    """Brightness, then contrast, then saturation, each by a random factor in [max(0, 1 - x), 1 + x].

    Args:
        brightness, contrast, saturation: x of each factor, at least 0.
        pivot: grey value in [0, 255] that contrast leaves unchanged; saturation then uses the mean of the channels as
            grey, like the reference's current generation. None: as PIL's enhancers, the pivot is the mean grey of the
            image, and grey is the luma.
        truncate: truncate grey levels to integers after each of the three adjustments, as the reference does, instead
            of rounding after the last two; the image gets darker by one and a half levels on average.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, pivot: float | None = 74.0,
        truncate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(p=1)
        for name, value in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
            _require(_numbers([value], 0), name, value, "a number of at least 0")
        is_grey = pivot is None or (_numbers([pivot], 0) and pivot <= 255)
        _require(is_grey, "pivot", pivot, "null or a grey value in [0, 255]")
        self.brightness, self.contrast, self.saturation, self.pivot = brightness, contrast, saturation, pivot
        self.truncate = truncate

    def get_params(self) -> dict[str, Any]:
        """Draw the three factors."""
        ranges = (self.brightness, self.contrast, self.saturation)
        return {"factors": tuple(self.py_random.uniform(max(0, 1 - x), 1 + x) for x in ranges)}

    def apply(self, img: np.ndarray, *, factors: tuple[float, float, float], **_: Any) -> np.ndarray:
        """Adjust the image; the mask stays as it is."""
        brightness, contrast, saturation = factors
        grey, pivot, whole = _MEAN, self.pivot, np.floor if self.truncate else np.rint
        levels = (brightness * np.arange(256)).clip(0, 255)
        if self.truncate:
            levels = whole(levels)
        if pivot is None:
            grey, pivot = _LUMA, np.dot(cv2.mean(cv2.LUT(img, whole(levels).astype(np.uint8)))[:3], _LUMA)
            pivot = np.rint(pivot) if self.truncate else pivot  # PIL's is whole
        img = cv2.LUT(img, whole(pivot + contrast * (levels - pivot)).clip(0, 255).astype(np.uint8))
        mix = saturation * np.eye(3) + (1 - saturation) * np.array([grey, grey, grey])
        shift = 0.0005 - 0.5 if self.truncate else 0  # OpenCV rounds
        return cv2.transform(img, np.c_[mix, [shift, shift, shift]], img)  # in place: new memory takes as long


def _numbers(values: Any, least: float) -> bool:
    return isinstance(values, Sequence) and all(isinstance(v, int | float) and least <= v < math.inf for v in values)


def _require(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {value}, accepted: {accepted}")
