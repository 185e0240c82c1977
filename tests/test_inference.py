"""Views, their merging, and pictures in, train ids out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import interpolate

from bisenet.classes import ClassTable
from bisenet.config import ProtocolConfig
from bisenet.inference import Segmenter, predict_scores, view_size
from bisenet.networks import BiSeNetV2, SegmentationOutput

CLASSES = ClassTable.load("camvid")


class Patches(nn.Module):
    """A network that classifies every 8x8 patch by its colour; odd sizes lose the rest, as strides do."""

    align_corners = False
    head_names = ("head",)

    def __init__(self, n_classes: int = 11) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, n_classes, 8, 8, bias=False)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> SegmentationOutput:
        self.seen.append(tuple(image.shape))
        return SegmentationOutput(self.conv(image), ())


@given(st.integers(1, 600), st.integers(1, 600), st.floats(0.1, 2), st.sampled_from([1, 8, 32]))
def test_a_view_is_the_scaled_size_rounded_up(height: int, width: int, scale: float, multiple: int) -> None:
    for side, viewed in zip((height, width), view_size((height, width), scale, multiple), strict=True):
        assert viewed % multiple == 0
        assert int(scale * side) <= viewed < max(int(scale * side), 1) + multiple


@given(st.integers(20, 100), st.integers(20, 100), st.sampled_from([[1.0], [0.5, 1.0], [0.75]]), st.booleans())
def test_scores_are_the_mean_softmax_of_the_views(height: int, width: int, scales: list[float], flip: bool) -> None:
    torch.manual_seed(height)
    network, image = Patches(), torch.randn(2, 3, height, width)
    expected = []
    for scale in scales:
        size = tuple(-(-int(scale * side) // 32) * 32 or 32 for side in (height, width))
        view = interpolate(image, size, mode="bilinear", align_corners=True)
        for mirrored in [False, True][: 1 + flip]:
            logits = network(view.flip(-1) if mirrored else view).logits
            full = interpolate(logits, size, mode="bilinear", align_corners=False)
            full = interpolate(full, (height, width), mode="bilinear", align_corners=True)
            expected.append((full.flip(-1) if mirrored else full).softmax(1))
    scores = predict_scores(network, image, ProtocolConfig("x", scales, flip))
    assert scores.shape == (2, 11, height, width)
    one_view = len(expected) == 1
    torch.testing.assert_close(scores.softmax(1) if one_view else scores, torch.stack(expected).mean(0))


def test_single_scale_forwards_one_view_once() -> None:
    network = Patches()
    predict_scores(network, torch.zeros(1, 3, 360, 480), ProtocolConfig("ss"))
    assert network.seen == [(1, 3, 384, 480)]


def test_normalisation_is_that_of_the_data_set() -> None:
    segmenter = Segmenter(Patches(), CLASSES, [0.2, 0.4, 0.6], [0.1, 0.2, 0.5], ProtocolConfig("ss"))
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(segmenter.normalize(image), (image / 255 - mean) / std)


@given(st.integers(1, 130), st.integers(1, 130))
def test_a_picture_of_any_size_is_segmented(height: int, width: int) -> None:
    segmenter = Segmenter(Patches(), CLASSES, [0.4] * 3, [0.3] * 3, ProtocolConfig("ss"))
    rgb = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = segmenter.predict(rgb)
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    assert mask.max() < CLASSES.num_classes
    assert np.array_equal(mask, segmenter.predict(rgb))


def test_predicting_leaves_the_mode_alone_and_does_not_touch_statistics() -> None:
    segmenter = Segmenter(BiSeNetV2(11), CLASSES, [0.4] * 3, [0.3] * 3, ProtocolConfig("ss")).train()
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    segmenter.predict(np.zeros((64, 64, 3), np.uint8))
    assert segmenter.training
    assert all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)),
                                   np.zeros((0, 8, 3), np.uint8)])  # fmt: skip
def test_what_is_no_rgb_picture_is_refused(wrong: np.ndarray) -> None:
    segmenter = Segmenter(Patches(), CLASSES, [0.4] * 3, [0.3] * 3, ProtocolConfig("ss"))
    with pytest.raises(ValueError, match="RGB picture"):
        segmenter.predict(wrong)
