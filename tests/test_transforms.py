import os
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
        height, width = max(crop[0], round(grow * height)), max(crop[1], round(grow * width))
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
    assert got_image.shape == (*crop, 3)
    assert got_mask.shape == crop

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


def test_padding_surrounds_the_image_and_is_ignored() -> None:
    image, mask = np.full((40, 60, 3), 9, np.uint8), np.full((40, 60), 3, np.uint8)
    got_image, got_mask = augment(ScaleCrop([64, 96], [0.5, 0.5]), image, mask)
    inside = np.zeros((64, 96), bool)
    inside[22:42, 33:63] = True
    assert np.array_equal(got_mask, np.where(inside, 3, IGNORE))
    assert np.array_equal(got_image[..., 0], np.where(inside, 9, 0))


def test_windows_reach_every_place() -> None:
    image, mask = noise(0, (33, 34))
    seen = {augment(ScaleCrop([32, 32], [1, 1]), image, mask, seed)[0].tobytes() for seed in range(100)}
    assert seen == {image[top : top + 32, left : left + 32].tobytes() for top in range(2) for left in range(3)}


@pytest.mark.parametrize("mode", ["uniform", "choice"])
def test_scales_come_from_where_the_argument_says(mode: str) -> None:
    image, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
    transform = ScaleCrop([64, 64], [0.5, 1.5], mode)
    sides = {int((augment(transform, image, mask, seed)[1] == 0)[32].sum()) for seed in range(80)}
    assert min(sides) in range(20, 23)
    assert max(sides) in range(58, 61)
    assert (sides == {20, 60}) is (mode == "choice")
    assert mode == "choice" or len(sides) > 20


@given(seeds, st.booleans(), st.sampled_from([74.0, None]))
def test_result_is_a_function_of_seed_and_sample(seed: int, jitter_first: bool, pivot: float | None) -> None:
    steps = [ScaleCrop([32, 48]), A.HorizontalFlip(p=0.5), ColorJitter(pivot=pivot)][:: -1 if jitter_first else 1]
    first, second = noise(seed, (50, 60)), noise(seed + 1, (40, 80))
    results = [augment(steps, *sample, seed) for sample in (first, second, first)]  # what went before does not matter
    for got, expected in zip(results[0], results[2], strict=True):
        assert np.array_equal(got, expected)


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


@given(seeds, st.sampled_from([74.0, None]))
def test_jitter_off_is_identity(seed: int, pivot: float | None) -> None:
    image, mask = noise(seed, (40, 40))
    got = augment([ScaleCrop([40, 40], [1, 1]), ColorJitter(0, 0, 0, pivot)], image, mask, seed)
    assert np.array_equal(got[0], image)
    assert np.array_equal(got[1], mask)


@pytest.mark.parametrize(("key", "low", "high"), [("brightness", 60, 140), ("contrast", 89.6, 110.4)])
def test_jitter_uses_the_whole_range(key: str, low: float, high: float) -> None:
    image, mask = np.full((32, 32, 3), 100, np.uint8), np.zeros((32, 32), np.uint8)
    jitter = ColorJitter(**{"brightness": 0, "contrast": 0, "saturation": 0, key: 0.4})
    levels = [int(augment(jitter, image, mask, seed)[0][0, 0, 0]) for seed in range(200)]
    assert low - 1 <= min(levels) < low + 3
    assert high - 3 < max(levels) <= high + 1


@pytest.mark.parametrize("jitter_first", [True, False])
def test_contrast_without_pivot_is_about_what_the_order_shows_it(jitter_first: bool) -> None:
    # A black half: about the mean of the whole image it becomes grey, about that of a black crop it stays black.
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 48:] = 200
    mask = (image[..., 0] > 0).astype(np.uint8)
    steps = [ScaleCrop([32, 32], [1, 1]), ColorJitter(0, 0.5, 0, pivot=None)][:: -1 if jitter_first else 1]
    results = [augment(steps, image, mask, seed) for seed in range(60)]
    levels = {int(got_image.max()) for got_image, got_mask in results if not got_mask.any()}
    assert (levels == {0}) is not jitter_first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScaleCrop([16, 64]), r"size: got \[16, 64\], accepted: \[height, width\] in pixels, each at least 32"),
        (lambda: ScaleCrop(64), "size: got 64"),  # type: ignore[arg-type]
        (lambda: ScaleCrop([64, 64], [2, 1]), r"scale: got \[2, 1\], accepted: \[low, high\]"),
        (lambda: ScaleCrop([64, 64], [0, 1], "choice"), "scale: got .*, accepted: positive factors"),
        (lambda: ScaleCrop([64, 64], mode="some"), r"mode: got some, accepted: uniform \| choice"),
        (lambda: ScaleCrop([64, 64], too_small="cut"), r"too_small: got cut, accepted: pad \| enlarge"),
        (lambda: ColorJitter(contrast=-1), "contrast: got -1, accepted: a number of at least 0"),
        (lambda: ColorJitter(pivot=256), "pivot: got 256, accepted: null or a grey value"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_import_asks_no_network() -> None:
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
