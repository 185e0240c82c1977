"""Training augmentation: random scale, crop, flip and colour jitter, on uint8 arrays."""

import os
from typing import Any

import cv2
import numpy as np

from bisenet.config import AugmentConfig

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

import albumentations as A

_MEAN = (1 / 3, 1 / 3, 1 / 3)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL


def training_transform(augment: AugmentConfig, ignore_index: int) -> A.Compose:
    """The pipeline of a recipe: ``image`` (H, W, 3) and ``mask`` (H, W), both uint8, to the size of the crop.

    Call ``set_random_seed`` before each sample: the result is a pure function of that seed and the sample.
    """
    scale_crop = ScaleCrop(
        crop=(augment.crop[0], augment.crop[1]),
        scales=tuple(augment.scale),
        choice=augment.scale_mode == "choice",
        enlarge=augment.too_small == "enlarge",
        ignore_index=ignore_index,
    )
    flip = A.HorizontalFlip(p=augment.flip)
    jitter = ColorJitter(augment.brightness, augment.contrast, augment.saturation, augment.contrast_pivot)
    return A.Compose([jitter, flip, scale_crop] if augment.order == "jitter_first" else [scale_crop, flip, jitter])


class ScaleCrop(A.DualTransform):
    """Resize by a random factor and crop at a random place, computing only the pixels that are kept.

    The pixels are those of resizing the whole picture, image bilinear and mask nearest, then cropping. In both a pixel
    is the square around its centre, so that the mask stays on the image at every scale.

    Args:
        crop: (height, width) of the result.
        scales: [low, high] of a uniform factor, or the factors to choose from.
        choice: choose among ``scales``.
        enlarge: resize a scaled picture that is smaller than the crop once more, until it fits, instead of padding it
            on all sides (image with 0, mask with ``ignore_index``).
        ignore_index: the mask's value for padding.
    """

    def __init__(
        self, crop: tuple[int, int], scales: tuple[float, ...], choice: bool, enlarge: bool, ignore_index: int
    ) -> None:
        super().__init__(p=1)
        self.crop = crop
        self.scales = scales
        self.choice = choice
        self.enlarge = enlarge
        self.ignore_index = ignore_index

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the size of the scaled picture, and the corner of the window in it."""
        height, width = params["shape"][:2]
        crop_height, crop_width = self.crop
        scale = self.py_random.choice(self.scales) if self.choice else self.py_random.uniform(*self.scales)
        height, width = max(1, round(scale * height)), max(1, round(scale * width))
        grow = max(crop_height / height, crop_width / width)
        if self.enlarge and grow > 1:
            height, width = max(crop_height, round(grow * height)), max(crop_width, round(grow * width))
        corner = self._draw_start(height, crop_height), self._draw_start(width, crop_width)
        return {"scaled_size": (height, width), "corner": corner}

    def _draw_start(self, length: int, crop: int) -> int:
        """Where the window starts; before 0 if the picture is the smaller one, which it then has in its middle."""
        return self.py_random.randint(0, length - crop) if length >= crop else (length - crop) // 2

    def apply(self, img: np.ndarray, *, scaled_size: tuple[int, int], corner: tuple[int, int], **_: Any) -> np.ndarray:
        """Resample the image."""
        return self._window(img, scaled_size, corner, cv2.INTER_LINEAR, fill=0)

    def apply_to_mask(
        self, mask: np.ndarray, *, scaled_size: tuple[int, int], corner: tuple[int, int], **_: Any
    ) -> np.ndarray:
        """Resample the mask."""
        return self._window(mask, scaled_size, corner, cv2.INTER_NEAREST, fill=self.ignore_index)

    def _window(
        self, source: np.ndarray, scaled_size: tuple[int, int], corner: tuple[int, int], interpolation: int, fill: int
    ) -> np.ndarray:
        top, left = (max(start, 0) for start in corner)  # of the part that lies on the picture
        rows = min(corner[0] + self.crop[0], scaled_size[0]) - top
        columns = min(corner[1] + self.crop[1], scaled_size[1]) - left
        step_y, step_x = source.shape[0] / scaled_size[0], source.shape[1] / scaled_size[1]
        # Pixel centres lie at + 0.5, at both scales.
        to_source = np.array([[step_x, 0, (left + 0.5) * step_x - 0.5], [0, step_y, (top + 0.5) * step_y - 0.5]])
        inside = cv2.warpAffine(
            source,
            to_source,
            (columns, rows),
            flags=interpolation | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        if (rows, columns) == self.crop:
            return inside
        padded = np.full((*self.crop, *source.shape[2:]), fill, source.dtype)
        above, before = top - corner[0], left - corner[1]
        padded[above : above + rows, before : before + columns] = inside
        return padded


class ColorJitter(A.ImageOnlyTransform):
    """Brightness, then contrast, then saturation, each by a random factor in [max(0, 1 - x), 1 + x].

    Args:
        brightness: x of the factor.
        contrast: x of the factor.
        saturation: x of the factor.
        pivot: grey value that contrast keeps in place. None does as PIL's enhancers: the pivot is the mean grey of the
            picture, and grey is the luma. With a number, saturation takes the mean of the channels for grey, as the
            current generation of the reference.
    """

    def __init__(self, brightness: float, contrast: float, saturation: float, pivot: float | None) -> None:
        super().__init__(p=1)
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.pivot = pivot

    def get_params(self) -> dict[str, Any]:
        """Draw the three factors."""
        ranges = (self.brightness, self.contrast, self.saturation)
        return {"factors": tuple(self.py_random.uniform(max(0, 1 - x), 1 + x) for x in ranges)}

    def apply(self, img: np.ndarray, *, factors: tuple[float, float, float], **_: Any) -> np.ndarray:
        """Adjust the image; the mask stays as it is."""
        brightness, contrast, saturation = factors
        grey, pivot = _MEAN, self.pivot
        levels = brightness * np.arange(256)
        if pivot is None:
            grey, pivot = _LUMA, np.dot(cv2.mean(cv2.LUT(img, _to_uint8(levels)))[:3], _LUMA)
        img = cv2.LUT(img, _to_uint8(pivot + contrast * (levels.clip(0, 255) - pivot)))
        return cv2.transform(img, saturation * np.eye(3) + (1 - saturation) * np.array([grey, grey, grey]))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)
