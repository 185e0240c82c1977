"""The losses against a few lines of float64 composition, and at the edges of their contract."""

import math
import threading
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bisenet import losses
from bisenet.losses import (
    CrossEntropy,
    DeepSupervision,
    OhemCrossEntropy,
    enet_class_weights,
    ohem_cross_entropy,
)
from bisenet.networks import SegmentationOutput

IGNORE = 255


def oracle(logits: Tensor, target: Tensor, *, threshold: float, min_kept: float | int, normalizer: str, align: bool):
    """Loss and number kept: upsample, -log softmax, sort, average what is kept. Differentiable, in float64."""
    full = F.interpolate(logits.double(), target.shape[-2:], mode="bilinear", align_corners=align)
    valid = target != IGNORE
    label = target.long().masked_fill(~valid, 0)
    losses = (-full.log_softmax(1)).gather(1, label[:, None])[:, 0][valid].sort(descending=True).values
    n_min = min_kept if isinstance(min_kept, int) else math.floor(len(losses) * min_kept + 1e-9)
    kept = max(int((losses > -math.log(threshold)).sum()), min(n_min, len(losses)))
    return losses[:kept].sum() / max(kept, n_min if normalizer == "at_least_n_min" else 0, 1), kept


def ohem(logits: Tensor, target: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    settings = {"threshold": 0.7, "min_kept": 0.0625, "normalizer": "kept", "align_corners": False, **changes}
    return ohem_cross_entropy(logits, target, **settings)


def cross_entropy(case: "Case", class_weights: Any = None) -> tuple[Tensor, Tensor]:
    return CrossEntropy(class_weights).double()(*case)


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


class Case(NamedTuple):
    """Logits that follow blocky labels with some confidence: a few classes, a share of ignored pixels."""

    logits: Tensor
    target: Tensor


def make_case(
    *, images=2, classes=19, size=(5, 7), full_size=(37, 53), confidence=4.0, ignored=0.2, seed=0, dtype=torch.float64
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    small = torch.randint(classes, (images, *size), generator=draw)
    noise = torch.randn(images, classes, *size, generator=draw, dtype=torch.float64)
    logits = confidence * F.one_hot(small, classes).movedim(-1, 1) + noise
    target = F.interpolate(small[:, None].double(), full_size, mode="nearest")[:, 0].to(torch.uint8)
    target[torch.rand(target.shape, generator=draw) < ignored] = IGNORE
    return Case(logits.to(dtype).requires_grad_(), target)


sides = st.integers(1, 12)
full_sides = st.one_of(st.integers(1, 40), st.integers(60, 140))
cases = st.builds(
    make_case,
    images=st.integers(0, 3),
    classes=st.integers(2, 30),
    size=st.tuples(sides, sides),
    full_size=st.tuples(full_sides, full_sides),
    confidence=st.sampled_from([0.0, 4.0, 9.0, 20.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.97, 1.0]),
    seed=st.integers(0, 2**16),
)


def fits(case: Case, rule: dict[str, Any]) -> bool:
    """Whether as many pixels exist as the rule divides by."""
    return rule["normalizer"] == "kept" or rule["min_kept"] <= case.target.numel()


rules = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([1e-9, 0.1, 0.7, 1.0]),
        "min_kept": st.one_of(st.sampled_from([0.0, 0.0625, 0.5, 1.0]), st.integers(0, 12_000)),
        "normalizer": st.sampled_from(["kept", "at_least_n_min"]),
    }
)


@given(cases, rules, st.booleans())
def test_value_count_and_gradient_equal_the_oracle(case, rule, align):
    assume(fits(case, rule))
    loss, kept = ohem(*case, **rule, align_corners=align)
    true_loss, true_kept = oracle(*case, **rule, align=align)
    assert kept.item() == true_kept
    assert kept.dtype == torch.int64
    torch.testing.assert_close(loss, true_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(loss, case.logits), gradient(true_loss, case.logits), rtol=1e-8, atol=1e-12)


class Elsewhere(Tensor):
    """A tensor on the CPU that says it is on another device, as far as the loss looks."""

    device = SimpleNamespace(type="elsewhere")  # type: ignore[assignment]


@given(cases, rules)
def test_the_path_without_host_synchronisation_is_the_same_function(case, rule):
    assume(fits(case, rule))
    loss, kept = ohem(*case, **rule)
    there, kept_there = ohem(case.logits.as_subclass(Elsewhere), case.target, **rule, impl="torch")
    assert kept_there == kept
    torch.testing.assert_close(there.as_subclass(Tensor), loss, rtol=1e-9, atol=1e-12)
    found = gradient(there, case.logits).as_subclass(Tensor)
    torch.testing.assert_close(found, gradient(loss, case.logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(8, 8), (64, 64)], ids=["upsampled", "full size"])
def test_off_the_host_nothing_reads_data_back(size):
    """Tensors on the meta device have no data: whatever needs a number on the host raises."""
    logits = torch.empty(2, 19, *size, device="meta", dtype=torch.float16, requires_grad=True)
    target = torch.empty(2, 64, 64, device="meta", dtype=torch.uint8)
    loss, kept = ohem(logits, target)
    assert (loss.shape, kept.shape, gradient(loss, logits).shape) == ((), (), logits.shape)


def test_off_the_host_an_unknown_label_gives_nan_in_value_and_gradient():
    case = make_case()
    case.target[0, 3, 4] = 19
    loss, _ = ohem(case.logits.as_subclass(Elsewhere), case.target, impl="torch")
    assert loss.isnan()
    assert gradient(loss, case.logits).isnan().any()


@pytest.mark.parametrize("rule", [{}, {"threshold": 1e-9}, {"min_kept": 12, "normalizer": "at_least_n_min"}], ids=str)
@pytest.mark.parametrize("full_size", [(9, 11), (3, 4)], ids=["upsampled", "full size"])
def test_gradcheck(rule, full_size):
    case = make_case(images=1, classes=3, size=(3, 4), full_size=full_size, confidence=2.0)
    assert torch.autograd.gradcheck(lambda logits: ohem(logits, case.target, **rule)[0], case.logits)


@given(cases, st.integers(0, 3000))
def test_the_older_rule_is_a_mean_over_at_least_n_min_pixels(case, n_min):
    """The reference of 2018 sorted all pixels, ignored ones at loss 0, and took the hard ones or the first n_min."""
    n_min = min(n_min, case.target.numel())
    full = F.interpolate(case.logits, case.target.shape[-2:], mode="bilinear", align_corners=True)
    losses = F.cross_entropy(full, case.target.long(), ignore_index=IGNORE, reduction="none").flatten()
    ordered = torch.cat([losses.sort(descending=True).values, losses.new_zeros(n_min + 1)])
    hard = ordered[ordered > -math.log(0.7)]
    expected = hard.mean() if ordered[n_min] > -math.log(0.7) else ordered[:n_min].sum() / max(n_min, 1)
    loss, _ = ohem(*case, min_kept=n_min, normalizer="at_least_n_min", align_corners=True)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


@given(cases)
def test_keeping_all_is_the_mean_and_keeping_more_never_raises_the_loss(case):
    mean, valid = cross_entropy(case)
    everything, kept = ohem(*case, min_kept=1.0)
    torch.testing.assert_close(everything, mean, rtol=1e-9, atol=1e-12)
    assert kept == valid == (case.target != IGNORE).sum()
    series = [ohem(*case, threshold=1e-9, min_kept=share)[0].item() for share in (0.1, 0.3, 0.6, 1.0)]
    if series[0]:  # with fewer than ten valid pixels a tenth is none, and the loss 0
        assert all(a >= b - 1e-9 for a, b in pairwise(series))


def test_min_kept_as_a_fraction_is_exact():
    case = make_case(images=1, size=(10, 10), full_size=(20, 10), ignored=0.0)
    case.target[0, 10:] = IGNORE
    for percent in range(101):
        assert ohem(*case, threshold=1e-9, min_kept=percent / 100)[1] == percent


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("full_size", [(37, 53), (5, 7)], ids=["upsampled", "full size"])
def test_labels_outside_the_classes_are_named(dtype, full_size):
    case = make_case(full_size=full_size)
    target = case.target.to(dtype)
    target[0, :2, 0] = torch.tensor([200, 19], dtype=dtype)
    for loss in (OhemCrossEntropy(), CrossEntropy()):
        with pytest.raises(ValueError, match=r"\[19, 200\].*0 to 18.*255"):
            loss(case.logits, target)
    if dtype == torch.int64:
        target[0, :2, 0] = -1
        with pytest.raises(ValueError, match=r"\[-1\]"):
            ohem(case.logits, target)


@pytest.mark.parametrize("classes", [19, 255, 256, 300])
def test_label_types_agree_and_never_wrap(classes):
    """In uint8, 256 would become 0 and 300 would become 44; 255 is ignored also where there are more classes."""
    case = make_case(classes=classes, ignored=0.0)
    case.target[0, :3] = torch.tensor([[255], [156], [44]]).clamp(max=classes - 1)
    full = F.interpolate(case.logits, (37, 53), mode="bilinear")
    expected = F.cross_entropy(full, case.target.long(), ignore_index=IGNORE)
    for target in (case.target, case.target.long()):
        loss, kept = CrossEntropy()(case.logits, target)
        torch.testing.assert_close(loss, expected)
        assert kept == (case.target != IGNORE).sum()


def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was():
    case = make_case(images=3, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            loss, _ = ohem(*case)
            results.append((loss, gradient(loss, case.logits)))
            with torch.inference_mode():
                assert ohem(*case)[0] == loss
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_a_loss_first_computed_in_inference_mode_trains_afterwards():
    """The interpolation weights are kept from call to call."""
    case = make_case(size=(6, 11), full_size=(41, 59))
    with torch.inference_mode():
        validation, _ = ohem(*case)
    loss, _ = ohem(*case)
    assert loss == validation
    assert gradient(loss, case.logits).any()


def test_shapes_and_types_that_do_not_fit_are_named():
    logits, target = make_case()
    with pytest.raises(ValueError, match=r"\(2, 19, 5, 7\) and target \(1, 37, 53\)"):
        ohem(logits, target[:1])
    with pytest.raises(ValueError, match=r"\(2, 1, 37, 53\)"):
        ohem(logits, target[:, None])
    with pytest.raises(ValueError, match=r"float32.*uint8 and torch\.int64"):
        ohem(logits, target.float())


def test_more_pixels_asked_for_than_there_are_are_refused_where_the_loss_is_divided_by_them():
    """An older V1 recipe with a small crop: 524,288 of 3,922 pixels, and a loss 134 times too small."""
    case = make_case()
    older = {"min_kept": 524_288, "normalizer": "at_least_n_min"}
    with pytest.raises(ValueError, match=r"min_kept: got 524288 with .*, accepted: at most .*, here 3922, or a share"):
        OhemCrossEntropy(**older)(*case)
    assert ohem(*case, **{**older, "min_kept": 3922})[1] <= 3922
    assert ohem(*case, min_kept=524_288)[1] == (case.target != IGNORE).sum()  # the mean over all of them
    assert ohem(*make_case(images=0), **older)[0] == 0


@given(cases, st.integers(0, 2**16))
def test_weighted_cross_entropy_is_that_of_torch(case, seed):
    weights = torch.rand(case.logits.shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
    loss, kept = cross_entropy(case, weights.tolist())
    full = F.interpolate(case.logits, case.target.shape[-2:], mode="bilinear")
    expected = F.cross_entropy(full, case.target.long(), weights.double(), ignore_index=IGNORE)
    assert kept.item() == (case.target != IGNORE).sum()
    if kept:  # torch divides by 0 where nothing counts
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradient(loss, case.logits), gradient(expected, case.logits), rtol=1e-8, atol=1e-12)
    else:
        assert loss.item() == 0


@given(cases, rules)
def test_class_weights_do_not_select(case, rule):
    """They change the mean over the same pixels, which the sort of the unweighted losses selects."""
    assume(fits(case, rule))
    _, kept = ohem(*case, **rule)
    weights = torch.linspace(0.5, 2, case.logits.shape[1], dtype=torch.float64)
    loss, kept_weighted = ohem(*case, **rule, class_weights=weights)
    assert kept_weighted == kept
    full = F.interpolate(case.logits, case.target.shape[-2:], mode="bilinear")
    valid = case.target != IGNORE
    label = case.target.long().masked_fill(~valid, 0)
    losses, order = F.cross_entropy(full, label, reduction="none")[valid].sort(descending=True)
    chosen = weights[label[valid][order[:kept]]]
    n_min = rule["min_kept"] if isinstance(rule["min_kept"], int) else 0
    divisor = max(int(kept), n_min if rule["normalizer"] == "at_least_n_min" else 0, 1)
    if kept and (kept == len(losses) or losses[kept - 1] - losses[kept] > 1e-9):  # no tie at the cut
        expected = (chosen * losses[:kept]).sum() / chosen.sum() * kept / divisor
        torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-12)


def test_enet_weights_follow_the_formula_of_the_paper():
    weights = enet_class_weights(np.array([0, 98, 2]))
    assert weights == pytest.approx([1 / math.log(1.02), 1 / math.log(2.0), 1 / math.log(1.04)])


@pytest.mark.parametrize("criterion", [OhemCrossEntropy(), CrossEntropy()])
@pytest.mark.parametrize("n_aux", [0, 3])
def test_deep_supervision_sums_heads_at_their_own_strides(criterion, n_aux):
    heads = [
        make_case(size=size, seed=i).logits for i, size in enumerate([(5, 7), (10, 13), (3, 4), (37, 53)][: n_aux + 1])
    ]
    target = make_case().target
    output = SegmentationOutput(heads[0], tuple(heads[1:]))
    result = DeepSupervision(criterion, aux_weight=0.4)(output, target, align_corners=True)
    alone = [criterion(head, target, True) for head in heads]
    assert result.heads == tuple(loss for loss, _ in alone)
    assert result.kept == tuple(kept for _, kept in alone)
    torch.testing.assert_close(result.total, alone[0][0] + 0.4 * sum(loss for loss, _ in alone[1:]))
    gradients = torch.autograd.grad(result.total, heads)
    for i, (head, (loss, _)) in enumerate(zip(heads, alone, strict=True)):
        torch.testing.assert_close(gradients[i], gradient(loss, head) * (1.0 if i == 0 else 0.4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.0}, r"threshold: got 0.0.*\(0, 1\]"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": math.nan}, "threshold"),
        ({"min_kept": 1.5}, r"min_kept: got 1.5.*\[0, 1\]"),
        ({"min_kept": -1}, "min_kept"),
        ({"min_kept": math.nan}, "min_kept"),
        ({"min_kept": 2**63}, r"min_kept: got 9223372036854775808.*\[0, 2\^63\)"),
        ({"normalizer": "mean"}, r"normalizer: got 'mean'.*kept \| at_least_n_min"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OhemCrossEntropy(**arguments)
    if "min_kept" in arguments:
        with pytest.raises(ValueError, match=message):
            ohem(*make_case(), **arguments)
    with pytest.raises(ValueError, match="aux_weight: got -1"):
        DeepSupervision(CrossEntropy(), aux_weight=-1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([-1.0, 1.0], r"class_weights: got \[-1.0, 1.0\], accepted"), ([0, 0], "not all 0"), ([1, math.inf], "finite"),
     ([], "not all 0"), ([1.0, 2.0], "class_weights: got 2, accepted: as many as classes, 19")],
)  # fmt: skip
def test_impossible_class_weights_are_refused(weights, message):
    for make in (CrossEntropy, OhemCrossEntropy):
        with pytest.raises(ValueError, match=message):
            make(class_weights=weights)(*make_case())
    with pytest.raises(ValueError, match="impl: got 'cuda' with class_weights"):
        CrossEntropy([1.0], "cuda")


def test_callers_on_several_threads_take_turns_and_leave_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    found = []

    def call():
        with losses._one_thread():
            found.append(torch.get_num_threads())
            time.sleep(0.01)

    try:
        torch.set_num_threads(4)
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (found, torch.get_num_threads()) == ([1] * 8, 4)
    finally:
        torch.set_num_threads(before)
