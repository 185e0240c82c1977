from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from bisenet.data import ColorJitter, ScaleCrop  # before albumentations

import albumentations as A  # isort: skip

IGNORE = 255

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(8, 90), st.integers(8, 90))
crops = st.tuples(st.integers(32, 64), st.integers(32, 64))


def noise(seed: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """An image without any structure, and a mask of 19 classes."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (*size, 3), np.uint8), draw.integers(0, 19, size, np.uint8)


def augment(
    transforms: A.BasicTransform | Sequence[A.BasicTransform], image: np.ndarray, mask: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    transform = A.Compose(list(transforms) if isinstance(transforms, Sequence) else [transforms])
    transform.set_random_seed(seed)
    result = transform(image=image, mask=mask)
    return result["image"], result["mask"]


def fitted(size: tuple[int, int], crop: tuple[int, int], scale: float, enlarge: bool) -> tuple[int, int]:
    """Size of the scaled image."""
    height, width = (max(1, round(scale * length)) for length in size)
    grow = max(crop[0] / height, crop[1] / width)
    if enlarge and grow > 1:
        height, width = int(grow * height + 1), int(grow * width + 1)
    return height, width


def nearest(length: int, scaled: int) -> tuple[np.ndarray, np.ndarray]:
    """The source pixel nearest to the centre of each scaled pixel: the first and the second of two that are as near."""
    doubled = (2 * np.arange(scaled) + 1) * length
    return (doubled - 1) // (2 * scaled), doubled // (2 * scaled)


@given(seeds, sizes, crops, st.floats(0.25, 2.5), st.booleans())
def test_window_is_the_crop_of_the_whole_image_resized(
    seed: int, size: tuple[int, int], crop: tuple[int, int], scale: float, enlarge: bool
) -> None:
    image, mask = noise(seed, size)
    transform = ScaleCrop(crop, [scale, scale], too_small="enlarge" if enlarge else "pad")
    got_image, got_mask = augment(transform, image, mask, seed)
    height, width = fitted(size, crop, scale, enlarge)
    whole_image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).astype(int)
    whole_masks = [
        mask[np.ix_(rows, columns)] for rows in nearest(size[0], height) for columns in nearest(size[1], width)
    ]
    rows, columns = max(0, crop[0] - height), max(0, crop[1] - width)
    before = (rows + 1) // 2, (columns + 1) // 2
    padding = ((before[0], rows - before[0]), (before[1], columns - before[1]))
    whole_image = np.pad(whole_image, (*padding, (0, 0)))
    whole_masks = np.array([np.pad(whole, padding, constant_values=IGNORE) for whole in whole_masks])
    windows = [
        (top, left)
        for top in range(whole_image.shape[0] - crop[0] + 1)
        for left in range(whole_image.shape[1] - crop[1] + 1)
        if abs(whole_image[top : top + crop[0], left : left + crop[1]] - got_image).max() <= 2
    ]
    assert len(windows) >= 1
    top, left = windows[0]
    assert (whole_masks[:, top : top + crop[0], left : left + crop[1]] == got_mask).any(axis=0).all()


@given(seeds, st.floats(0.25, 2.5), st.booleans(), st.sampled_from(["pad", "enlarge"]))
def test_mask_stays_on_the_image(seed: int, scale: float, upright: bool, too_small: str) -> None:
    # Between two pixels of a stripe pattern the image passes the middle grey where the nearest pixel changes.
    stripes = np.repeat(np.random.default_rng(seed).integers(0, 2, 80, np.uint8)[:, None], 60, axis=1)
    mask = stripes if upright else np.ascontiguousarray(stripes.T)
    image = np.repeat(200 * mask[..., None], 3, axis=2)
    transforms = [ScaleCrop([32, 40], [scale, scale], too_small=too_small), A.HorizontalFlip(p=0.5)]
    got_image, got_mask = augment(transforms, image, mask, seed)
    clear = (abs(got_image[..., 0].astype(int) - 100) > 3) & (got_mask != IGNORE)
    assert clear.any()
    assert np.array_equal((got_image[..., 0] > 100)[clear], got_mask[clear] == 1)


def test_windows_reach_every_place() -> None:
    image, mask = noise(0, (33, 34))
    seen = {augment(ScaleCrop([32, 32], [1, 1]), image, mask, seed)[0].tobytes() for seed in range(100)}
    assert seen == {image[top : top + 32, left : left + 32].tobytes() for top in range(2) for left in range(3)}


def test_scales_come_from_where_the_arguments_say() -> None:
    def sides(mode: str) -> set[int]:
        transform = ScaleCrop([64, 64], [0.5, 1.5], mode)
        return {transform.get_params_dependent_on_data({"shape": (40, 40)}, {})["scaled"][0] for _ in range(400)}

    def scaled(sides: str) -> list[int]:
        transform = ScaleCrop([64, 64], [0.3, 0.3], sides=sides)
        return transform.get_params_dependent_on_data({"shape": (45, 42)}, {})["scaled"]

    assert sides("choice") == {20, 60}
    assert sides("uniform") == {*range(20, 61)}
    assert [scaled(sides) for sides in ("round", "ceil", "floor")] == [[14, 13], [14, 13], [13, 12]]


@given(seeds, st.floats(0, 2), st.floats(0, 2), st.floats(0, 2))
def test_jitter_is_brightness_then_contrast_then_saturation(
    seed: int, brightness: float, contrast: float, saturation: float
) -> None:
    image, _ = noise(seed, (12, 12))
    factors = (brightness, contrast, saturation)
    got = ColorJitter(0, 0, 0, pivot=74).apply(image, factors=factors).astype(float)
    expected = (image * brightness).clip(0, 255)
    expected = (74 + (expected - 74) * contrast).clip(0, 255)
    grey = expected.mean(axis=2, keepdims=True)
    expected = (grey + (expected - grey) * saturation).clip(0, 255)
    # Each step rounds by half a level, and the next one stretches that.
    assert abs(got - expected).max() <= 0.5 + (0.5 + 0.5 * contrast) * (1 + 2 * abs(saturation - 1)) + 1e-3


@given(seeds, st.floats(0.5, 1.5), st.floats(0.5, 1.5), st.floats(0.5, 1.5))
def test_without_pivot_jitter_is_that_of_pil(seed: int, brightness: float, contrast: float, saturation: float) -> None:
    image, _ = noise(seed, (30, 30))
    got = ColorJitter(0, 0, 0, pivot=None).apply(image, factors=(brightness, contrast, saturation))
    expected = Image.fromarray(image)
    expected = ImageEnhance.Brightness(expected).enhance(brightness)
    expected = ImageEnhance.Contrast(expected).enhance(contrast)
    expected = ImageEnhance.Color(expected).enhance(saturation)
    assert abs(got.astype(int) - np.asarray(expected)).max() <= 5  # PIL cuts fractions off at each step
    got = ColorJitter(0, 0, 0, None, truncate=True).apply(image, factors=(brightness, contrast, saturation))
    assert abs(got.astype(int) - np.asarray(expected)).max() <= 3
    assert abs(got.astype(int) - np.asarray(expected)).mean() <= 0.6


@given(seeds, st.floats(0.6, 1.4), st.floats(0.6, 1.4), st.floats(0.6, 1.4))
def test_truncating_jitter_is_that_of_the_reference(seed: int, brightness: float, contrast: float, rate: float) -> None:
    """CoinCheung/BiSeNet, lib/data/transform_cv2.py: two tables and a matrix, the fractions cut off at each."""
    image, _ = noise(seed, (30, 30))
    got = ColorJitter(0, 0, 0, 74, truncate=True).apply(image, factors=(brightness, contrast, rate)).astype(int)
    expected = np.array([i * brightness for i in range(256)]).clip(0, 255).astype(np.uint8)[image]
    expected = np.array([74 + (i - 74) * contrast for i in range(256)]).clip(0, 255).astype(np.uint8)[expected]
    mix = np.full((3, 3), 1 - rate, np.float32) + np.eye(3, dtype=np.float32) * 3 * rate
    expected = np.clip(expected.reshape(-1, 3) @ mix / 3, 0, 255).astype(np.uint8).reshape(image.shape)
    assert abs(got - expected).max() <= 1
    assert abs(got - expected).mean() < 0.5  # a rate near 1 leaves values a rounding error away from an integer


@given(seeds, st.sampled_from([74.0, None]))
def test_jitter_off_is_identity(seed: int, pivot: float | None) -> None:
    image, mask = noise(seed, (40, 40))
    got = augment([ScaleCrop([40, 40], [1, 1]), ColorJitter(0, 0, 0, pivot)], image, mask, seed)
    assert np.array_equal(got[0], image)
    assert np.array_equal(got[1], mask)


def test_jitter_uses_the_whole_range() -> None:
    factors = np.array([jitter.get_params()["factors"] for jitter in [ColorJitter(0.4, 0.2, 1.5)] for _ in range(400)])
    assert factors.min(0) == pytest.approx([0.6, 0.8, 0], abs=0.03)
    assert factors.max(0) == pytest.approx([1.4, 1.2, 2.5], abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleCrop([16, 64]), r"size: got \[16, 64\], accepted: \[height, width\] in pixels, each at least 32"),
        (lambda: ScaleCrop(64), "size: got 64"),  # type: ignore[arg-type]
        (lambda: ScaleCrop([64.5, 64]), r"size: got \[64\.5, 64\], accepted: \[height"),  # type: ignore[list-item]
        (lambda: ScaleCrop([64, 64], [2, 1]), r"scale: got \[2, 1\], accepted: \[low, high\]"),
        (lambda: ScaleCrop([64, 64], [0, 1], "choice"), "scale: got .*, accepted: positive factors"),
        (lambda: ScaleCrop([64, 64], sides="up"), r"sides: got up, accepted: round \| ceil \| floor"),
        (lambda: ScaleCrop([64, 64], mode="some"), r"mode: got some, accepted: uniform \| choice"),
        (lambda: ScaleCrop([64, 64], too_small="cut"), r"too_small: got cut, accepted: pad \| enlarge"),
        (lambda: ColorJitter(contrast=-1), "contrast: got -1, accepted: a number of at least 0"),
        (lambda: ColorJitter(pivot="mid"), "pivot: got mid, accepted: null or a grey value"),  # type: ignore[arg-type]
        (lambda: ColorJitter(pivot=256), "pivot: got 256, accepted: null or a grey value"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
