"""Protocols, views, their merging, and images in, train ids out."""

import json
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import shaken
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from bisenet import conf_dir, inference
from bisenet.classes import ClassTable
from bisenet.inference import Protocol, Segmenter, predict, resize
from bisenet.networks import BiSeNetV1, BiSeNetV2, SegmentationOutput, blocks
from bisenet.networks.blocks import accelerate

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


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": []}, {"scales": 0.5}, {"scales": [0]}, {"scales": [float("inf")]}, {"scales": "1"}, {"flip": "no"},
        {"crop": 1, "window": [32, 32]}, {"size_multiple": 0}, {"size_multiple": 1.5}, {"crop": True}, {"stride": 0},
        {"crop": True, "window": [32, 31]}, {"crop": True, "window": [64]}, {"short_side": 31}, {"merge": "mean"},
    ],
)  # fmt: skip
def test_a_protocol_names_what_it_does_not_accept(wrong: dict[str, Any]) -> None:
    key = "window" if wrong.get("crop") is True else next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{key}: got .*, accepted: "):
        Protocol(**wrong)


def test_a_protocol_is_a_plain_value() -> None:
    protocol = Protocol(scales=[0.5, 1], crop=True, window=[64, 32])
    assert protocol == Protocol(**json.loads(json.dumps(asdict(protocol))))
    assert hash(protocol) == hash(Protocol((0.5, 1), crop=True, window=(64, 32)))
    assert Protocol(window=[64, 32]).window is None  # without crop, as in the files of conf/protocol


# ---------------------------------------------------------------- protocols, restated


class Seen(NamedTuple):
    """A piece of a view that the network was shown."""

    short_side: int | None
    view: tuple[int, int]
    box: tuple[int, int, int, int]
    mirrored: bool


def restated(network: Patches, image: Tensor, protocol: Protocol) -> tuple[Tensor, set[Seen]]:
    """A protocol as its description says it, a piece at a time, in float64: scores, and what was shown."""
    shown: set[Seen] = set()
    height, width = image.shape[-2:]
    activation = torch.log_softmax if protocol.merge == "log_prob" else torch.softmax

    def logits(piece: Tensor, view: tuple[int, int], box: tuple[int, int, int, int], mirrored: bool) -> Tensor:
        shown.add(Seen(protocol.short_side, view, box, mirrored))
        out = network(piece.flip(-1) if mirrored else piece).logits
        out = interpolate(out, piece.shape[-2:], mode="bilinear", align_corners=network.align_corners)
        return out.flip(-1) if mirrored else out

    start = image
    if protocol.short_side is not None:
        long = int(protocol.short_side / min(height, width) * max(height, width))  # as the reference rounds
        resized = (long, protocol.short_side) if height > width else (protocol.short_side, long)
        start = interpolate(image, resized, mode="bilinear", align_corners=False)
    total = image.new_zeros(())
    for scale in protocol.scales:
        h, w = (max(1, int(scale * side)) for side in start.shape[-2:])
        if not protocol.crop:
            h, w = (-(-side // protocol.size_multiple) * protocol.size_multiple for side in (h, w))
            view = interpolate(start, (h, w), mode="bilinear", align_corners=True)
            for mirrored in [False, True][: 1 + protocol.flip]:
                full = logits(view, (h, w), (0, 0, h, w), mirrored)
                full = interpolate(full, (height, width), mode="bilinear", align_corners=True)
                total = total + activation(full, 1)
            continue
        assert protocol.window is not None
        ch, cw = protocol.window
        view = interpolate(start, (h, w), mode="bilinear", align_corners=True)
        canvas = image.new_zeros(1, 3, max(h, ch), max(w, cw))
        up, left = (canvas.shape[2] - h) // 2, (canvas.shape[3] - w) // 2
        canvas[:, :, up : up + h, left : left + w] = view
        probability, times = image.new_zeros(()), image.new_zeros(canvas.shape[2:])
        for y0 in range(0, canvas.shape[2] - ch + math.ceil(protocol.stride * ch), math.ceil(protocol.stride * ch)):
            for x0 in range(0, canvas.shape[3] - cw + math.ceil(protocol.stride * cw), math.ceil(protocol.stride * cw)):
                y, x = min(y0, canvas.shape[2] - ch), min(x0, canvas.shape[3] - cw)
                box = (y - up, x - left, y - up + ch, x - left + cw)
                chip = canvas[:, :, y : y + ch, x : x + cw]
                p = activation(logits(chip, (h, w), box, False), 1)
                if protocol.flip:
                    p = p + activation(logits(chip, (h, w), box, True), 1)
                if protocol.flip and protocol.merge == "reference":
                    p = p.exp()
                padding = (x, canvas.shape[3] - cw - x, y, canvas.shape[2] - ch - y)
                probability = probability + pad(p, padding)
                times[y : y + ch, x : x + cw] += 1
        assert (times > 0).all()
        if protocol.merge != "reference":
            probability = probability / times
        probability = probability[:, :, up : up + h, left : left + w]
        total = total + interpolate(probability, (height, width), mode="bilinear", align_corners=True)
    return total, shown


protocols_ = st.builds(
    Protocol,
    scales=st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.25, 1.5, 1.75]), min_size=1, max_size=3, unique=True),
    flip=st.booleans(),
    size_multiple=st.sampled_from([8, 32]),
    short_side=st.sampled_from([None, None, 32, 48]),
    crop=st.booleans(),
    window=st.just([32, 32]),
    stride=st.sampled_from([0.5, 2 / 3, 5 / 6, 1.0]),
    merge=st.sampled_from(["mean_prob", "log_prob", "reference"]),
)
sides = st.integers(20, 120)
window_sides = st.sampled_from([32, 40, 57, 64, 130])


@settings(max_examples=60)
@given(sides, sides, st.integers(2, 30), protocols_, window_sides, window_sides, st.booleans(), st.integers(0, 9))
def test_a_protocol_is_what_its_description_says(
    height: int, width: int, classes: int, protocol: Protocol, ch: int, cw: int, align_corners: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    network, image = Patches(classes), torch.randn(1, 3, height, width)
    network.align_corners = align_corners
    protocol = replace(protocol, window=(ch, cw))
    (found,) = predict(network, image, [protocol], 10_000)
    expected, _ = restated(network.double(), image.double(), protocol)
    best = expected.topk(2, dim=1)
    differ = found.train_ids != best.indices[:, 0]
    assert found.train_ids.shape == (1, height, width)
    assert differ.sum() <= max(1, 5e-4 * height * width)
    assert ((best.values[:, 0] - best.values[:, 1])[differ] < 1e-5).all()  # only where two classes tie in float32


@given(sides, sides, st.lists(protocols_, min_size=2, max_size=4), window_sides, st.integers(1, 30_000))
def test_what_protocols_share_is_forwarded_once_and_alters_none(
    height: int, width: int, protocols: list[Protocol], window: int, most: int
) -> None:
    torch.manual_seed(width)
    network, image = Patches(), torch.randn(1, 3, height, width)
    protocols = [replace(protocol, window=(window, window)) for protocol in protocols]
    views: set[Seen] = set()
    for protocol in protocols:
        views |= restated(network, image, protocol)[1]
    network.seen.clear()
    together = predict(network, image, protocols, most)
    pixels = [n * h * w for n, _, h, w in network.seen]
    assert sum(pixels) == sum((bottom - top) * (right - left) for *_, (top, left, bottom, right), _ in views)
    assert all(total <= most or n == 1 for total, (n, *_) in zip(pixels, network.seen, strict=True))
    for protocol, found in zip(protocols, together, strict=True):
        (alone,) = predict(network, image, [protocol], 10**9)
        assert (alone.train_ids != found.train_ids).sum() <= 1  # a tie in float
        assert found.seconds > 0


def all_presets(window: list[int]) -> dict[str, Protocol]:
    presets: dict[str, Protocol] = {}
    for name in ("ss", "half", "ssc", "msf", "mscf", "mscf_older"):
        node = yaml.safe_load(Path(conf_dir(), "protocol", f"{name}.yaml").read_text())[name]
        own = {key: value for key, value in node.items() if key not in ("_target_", "window", "short_side")}
        presets[name] = Protocol(**own, window=window)
    return presets


@pytest.mark.parametrize("generation", ["current", "older"])
def test_a_single_view_is_the_argmax_of_the_logits_bit_by_bit(generation: str) -> None:
    torch.manual_seed(0)
    network = BiSeNetV2(11, width_multiplier=0.25, generation=generation).eval()  # type: ignore[arg-type]
    image = torch.randn(2, 3, 72, 100)
    with torch.no_grad():
        view = interpolate(image, (96, 128), mode="bilinear", align_corners=True)
        logits = interpolate(network(view).logits, (96, 128), mode="bilinear", align_corners=network.align_corners)
        expected = interpolate(logits, (72, 100), mode="bilinear", align_corners=True).argmax(1)
        (found,) = predict(network, image, [Protocol()], 10**9)
        beside, _ = predict(network, image, [Protocol(), Protocol(flip=True)], 10**9)
    assert torch.equal(found.train_ids, expected)
    assert torch.equal(beside.train_ids, expected)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("classes", [2, 11, 171])
def test_taking_some_classes_at_a_time_bounds_memory_and_changes_no_label(
    classes: int, align_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, image = Patches(classes), torch.randn(2, 3, 70, 90)
    network.align_corners = align_corners
    network.conv.weight.data[-1] = network.conv.weight.data[0]  # two classes that tie
    (whole,) = predict(network, image, [Protocol()], 10**9)
    assert (whole.train_ids == 0).any()
    assert not (whole.train_ids == classes - 1).any()
    held: list[int] = []

    def spied(x: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
        resized = resize(x, size, align_corners=align_corners)
        held.append(resized.numel() if len(x) == 2 and x.shape[1] != 3 else 0)
        return resized

    monkeypatch.setattr(inference, "resize", spied)
    for most in (1, 2 * 96 * 96, 10 * 96 * 96):
        held.clear()
        monkeypatch.setattr(inference, "_SCORES_AT_A_TIME", most)
        (some,) = predict(network, image, [Protocol()], 10**9)
        assert torch.equal(some.train_ids, whole.train_ids)
        assert max(held) <= max(most, 2 * 96 * 96)


@pytest.mark.parametrize("make", [BiSeNetV1, partial(BiSeNetV1, structure="u_shape"), BiSeNetV2])
def test_a_large_image_passes_in_strips_and_has_the_same_labels(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, image, sizes = shaken(make(5)), torch.randn(1, 3, 331, 90), list[int]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    with torch.inference_mode():
        whole, largest = network(image).logits, max(sizes)
        sizes.clear()
        monkeypatch.setattr(blocks, "STRIP", 4000)
        strips = network(image).logits
    torch.testing.assert_close(strips, whole, rtol=0, atol=1e-4)
    assert torch.equal(strips.argmax(1), whole.argmax(1))
    assert max(sizes) < largest / 2
    assert network.train()(torch.cat([image] * 2)).logits.shape == (2, 5, 42, 12)  # whole, for the norms


_MEMORY = """
import resource, torch
from dataclasses import replace
from test_inference import all_presets
from bisenet.inference import predict
from bisenet.networks import BiSeNetV1, BiSeNetV2
name, classes, height, width, window = {case}
torch.manual_seed(0)
network = {{"v1": BiSeNetV1, "v2": BiSeNetV2}}[name](classes).eval()
presets = [replace(p, scales=[0.5, 1.75]) if len(p.scales) > 1 else p
           for p in all_presets(window=[window, window]).values()]  # the smallest and the largest view
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with torch.inference_mode():
    predict(network, torch.randn(1, 3, 64, 64), presets)
    before = peak()
    predict(network, torch.randn(1, 3, height, width), presets)
print((peak() - before) / 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", [("v2", 19, 1024, 2048, 1024), ("v1", 171, 640, 640, 640)], ids=lambda case: case[0])
def test_all_protocols_together_stay_within_four_gibibytes(case: tuple[str | int, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY.format(case=case)],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 4


# ---------------------------------------------------------------- the segmenter


def segmenter_of(network: nn.Module, **protocols: Protocol) -> Segmenter:
    return Segmenter(network, CLASSES, [0.4] * 3, [0.3] * 3, protocols or {"ss": Protocol()})


def test_the_first_protocol_predicts_and_each_can_be_asked_for() -> None:
    torch.manual_seed(0)
    segmenter = segmenter_of(Patches(), half=Protocol([0.5]), ss=Protocol())
    image = torch.randint(0, 256, (1, 3, 70, 90), dtype=torch.uint8)
    found = segmenter.predictions(image, ["ss", "half"])
    assert torch.equal(segmenter(image), found["half"].train_ids)
    assert not torch.equal(found["ss"].train_ids, found["half"].train_ids)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_predictions_have_their_own_precision_within_a_training(precision: str, dtype: torch.dtype) -> None:
    network = Patches()
    segmenter = Segmenter(network, CLASSES, [0.4] * 3, [0.3] * 3, {"ss": Protocol()}, precision=precision)
    image = torch.randint(0, 256, (1, 3, 70, 90), dtype=torch.uint8)
    computed: list[torch.dtype] = []
    network.conv.register_forward_hook(lambda _, __, out: computed.append(out.dtype))
    outside = segmenter(image)
    with torch.autocast("cpu", torch.bfloat16):
        inside = segmenter(image)
    assert computed == [dtype] * 2
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("make", [BiSeNetV1, partial(BiSeNetV1, generation="older", norm="inplace_abn"), BiSeNetV2])
def test_the_accelerated_copy_predicts_the_same(make: Any) -> None:
    torch.manual_seed(0)
    network = shaken(make(11))
    segmenter = segmenter_of(network, ss=Protocol(), msf=Protocol([0.75, 1.5], flip=True))
    image = torch.randint(0, 256, (2, 3, 97, 130), dtype=torch.uint8)
    names = ["ss", "msf"]
    found = segmenter.predictions(image, names)
    fast = segmenter._network()
    assert fast is not network
    assert sum(isinstance(module, nn.BatchNorm2d) for module in fast.modules()) <= 1
    weight = next(p for p in fast.parameters() if p.dim() == 4 and min(p.shape) > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    plain = predict(network, segmenter.normalize(image), [segmenter.protocols[name] for name in names])
    for name, expected in zip(names, plain, strict=True):
        assert (found[name].train_ids != expected.train_ids).sum() <= 2  # ties
        assert expected.train_ids.unique().numel() > 1


def test_predictions_follow_the_weights_and_are_no_part_of_the_model() -> None:
    torch.manual_seed(0)
    network = shaken(BiSeNetV2(5, width_multiplier=0.25))
    segmenter, image = segmenter_of(network), torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    keys, count = list(segmenter.state_dict()), len(list(segmenter.modules()))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def follows() -> nn.Module:
        x = segmenter.normalize(image)
        with torch.no_grad():
            torch.testing.assert_close(segmenter._network()(x)[0], network(x).logits, rtol=1e-3, atol=1e-3)
        assert segmenter._network() is segmenter._network()  # made once
        return segmenter._network()

    copies = [follows()]
    network.train()(segmenter.normalize(image)).logits.square().mean().backward()  # and its norms see other images
    copies.append(segmenter.eval() and follows())
    optimizer.step()
    copies.append(follows())
    network.load_state_dict(BiSeNetV2(5, width_multiplier=0.25).state_dict())
    copies.append(follows())
    segmenter.network = network = shaken(BiSeNetV2(5, width_multiplier=0.25))
    copies.append(follows())
    network.get_parameter("detail.S1.0.conv.weight").data.mul_(-1)  # which raises no version
    copies.append(follows())
    fused = torch.optim.SGD(network.parameters(), lr=0.1, fused=True)  # nor does this
    network(segmenter.normalize(image)).logits.square().mean().backward()
    fused.step()
    copies.append(follows())
    network.align_corners = not network.align_corners  # type: ignore[assignment]
    copies.append(follows())
    assert len(pickle.dumps(segmenter)) < 1.2 * len(pickle.dumps(network))
    assert len({id(copy) for copy in copies}) == len(copies)
    assert list(segmenter.state_dict()) == keys
    assert len(list(segmenter.modules())) == count


class Flattening(nn.Module):
    """A network that channels_last breaks."""

    align_corners, head_names = False, ("conv",)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 11, 8, 8), nn.BatchNorm2d(11)

    def forward(self, image: Tensor) -> SegmentationOutput:
        x = self.bn(self.conv(image))
        return SegmentationOutput(x.view(x.shape[0], -1).view(x.shape), ())


class Twisted(nn.Module):
    """Norms that cannot be folded: one follows an activation in place, one a convolution that is used twice."""

    align_corners, head_names = False, ("shared",)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(8)
        self.shared, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 11, 1), nn.BatchNorm2d(11)

    def forward(self, image: Tensor) -> SegmentationOutput:
        x = self.bn(self.relu(self.conv(image)))
        return SegmentationOutput(self.last_norm(self.last(self.shared(self.norm(self.shared(x))))), ())


def test_only_what_can_be_folded_is() -> None:
    torch.manual_seed(0)
    network = shaken(Twisted())
    folded = accelerate(network)
    assert [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["bn", "norm"]
    x = torch.randn(1, 3, 80, 70)
    torch.testing.assert_close(folded(x)[0], network(x).logits, rtol=1e-3, atol=1e-3)


def test_threads_may_predict_first_at_the_same_time() -> None:
    torch.manual_seed(0)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    segmenters = [segmenter_of(shaken(BiSeNetV2(5, width_multiplier=0.25))) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: segmenters[number % 2].predict(image), range(16)))
    for number, mask in enumerate(found):
        assert np.array_equal(mask, segmenters[number % 2].predict(image))


def test_a_network_with_hooks_calls_them() -> None:
    segmenter = segmenter_of(BiSeNetV2(5, width_multiplier=0.25).eval())
    segmenter(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    calls: list[object] = []
    segmenter.network.head.register_forward_hook(lambda *_: calls.append(None))  # type: ignore[union-attr]
    segmenter(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert calls == [None]


def test_what_cannot_be_accelerated_predicts_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for network, why in ((Patches(), "no batch norm follows"), (Flattening(), "view")):
        segmenter = segmenter_of(network.eval())
        assert segmenter._network() is network
        assert f"predicts as it is: {type(network).__name__}" in caplog.text
        assert why in caplog.text
        assert segmenter(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 64, 64)
    network = shaken(BiSeNetV2(11, width_multiplier=0.25))
    segmenter = segmenter_of(network)
    assert segmenter._network() is not network
    assert segmenter.train()._network() is network
    half = Segmenter(network.eval(), CLASSES, [0.4] * 3, [0.3] * 3, {"ss": Protocol()}, precision="bf16")
    assert half._network() is network


def test_on_a_cpu_the_network_sees_one_tile_at_a_time_unless_told() -> None:
    network, image = Patches(), torch.randn(1, 3, 64, 100)
    protocol = Protocol([1, 1.5], flip=True, crop=True, window=[32, 48])
    predict(network, image, [protocol])
    assert {shape[0] for shape in network.seen} == {1}
    network.seen.clear()
    predict(network, image, [protocol], 10 * 32 * 48)
    assert max(shape[0] for shape in network.seen) == 10


def test_normalisation_is_that_of_the_data_set() -> None:
    segmenter = Segmenter(Patches(), CLASSES, [0.2, 0.4, 0.6], [0.1, 0.2, 0.5], {"ss": Protocol()})
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.5]).view(3, 1, 1)
    torch.testing.assert_close(segmenter.normalize(image), (image / 255 - mean) / std)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "fp8"}, {"max_pixels_per_batch": 0}, {"mean": [0.1, 0.2]}, {"std": [0.1, 0, 1]},
        {"protocols": {}}, {"protocols": {"../ss": Protocol()}},
    ],
)  # fmt: skip
def test_a_segmenter_names_what_it_does_not_accept(wrong: dict[str, Any]) -> None:
    sound = {"mean": [0.4] * 3, "std": [0.3] * 3, "protocols": {"ss": Protocol()}}
    with pytest.raises(ValueError, match=f"^{next(iter(wrong)).removesuffix('s')}: got .*, accepted: "):
        Segmenter(Patches(), CLASSES, **(sound | wrong))


@given(st.integers(1, 130), st.integers(1, 130))
def test_an_image_of_any_size_is_segmented(height: int, width: int) -> None:
    segmenter = segmenter_of(Patches())
    rgb = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = segmenter.predict(rgb)
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    assert mask.max() < CLASSES.num_classes
    assert np.array_equal(mask, segmenter.predict(rgb))


def test_predicting_leaves_the_mode_alone_and_does_not_touch_statistics() -> None:
    segmenter = segmenter_of(BiSeNetV2(11)).train()
    before = {key: value.clone() for key, value in segmenter.state_dict().items()}
    frozen = segmenter.network.get_submodule("detail").eval()
    segmenter.predict(np.zeros((64, 64, 3), np.uint8))
    assert segmenter.training
    assert segmenter.network.get_submodule("segment").training
    assert not frozen.training
    segmenter.predictions = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        segmenter.predict(np.zeros((64, 64, 3), np.uint8))
    assert segmenter.training
    assert all(torch.equal(before[key], value) for key, value in segmenter.state_dict().items())


@pytest.mark.parametrize("wrong", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)),
                                   np.zeros((0, 8, 3), np.uint8)])  # fmt: skip
def test_what_is_no_rgb_image_is_refused(wrong: np.ndarray) -> None:
    segmenter = segmenter_of(Patches())
    with pytest.raises(ValueError, match="an RGB image"):
        segmenter.predict(wrong)
