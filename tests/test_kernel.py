"""The fused kernel against the float64 oracle of the losses: on the CPU, where g++ compiles the same source (see
cuda_shim.h), and on a GPU (``pytest -m gpu``). Without a GPU the compiler for one must still accept it, without spills.
"""

import ctypes
import importlib
import io
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_losses import IGNORE, Case, fits, gradient, make_case, oracle
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bisenet import kernel, losses
from bisenet.losses import CrossEntropy, OhemCrossEntropy, Rule, _rule

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
RULE = {"threshold": 0.7, "min_kept": 0.0625, "normalizer": "kept", "align": False}


@cache
def compiled_for_cpu(specialization: kernel.Specialization) -> ctypes.CDLL:
    """Compiled by the first test that needs it, for all test processes and later runs of the tests."""
    shim = ROOT / "tests" / "cuda_shim.h"
    macros = [("OHEM_SOURCE", f'"{kernel.source_path()}"'), *specialization.macros]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command = ["g++", *options, *[f"-D{k}={v}" for k, v in macros], "-x", "c++", str(shim)]
    digest = sha256(repr(command).encode() + shim.read_bytes() + kernel.source_path().read_bytes()).hexdigest()
    path = ROOT / ".pytest_cache" / "ohem" / f"{digest[:24]}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            subprocess.run([*command, "-o", path.with_suffix(".draft")], check=True)
            path.with_suffix(".draft").rename(path)
    return ctypes.CDLL(str(path))


class CpuLibrary:
    """The kernels on the CPU, with ``block`` threads.

    ``noise``: with exponentials and logarithms as imprecise as those of a GPU.
    """

    multiprocessors = 1

    def __init__(self, block: int, specialization: kernel.Specialization, noise: bool = False) -> None:
        self.block = block
        self._library, self._noise = compiled_for_cpu(specialization), noise

    def launch(self, kernel_name: str, grid: int, *arguments: Any, only_block: int = -1) -> None:
        self._library.run_only(ctypes.c_longlong(only_block))
        self._library.make_noise(int(self._noise))
        kinds = {int: ctypes.c_longlong, float: ctypes.c_float}
        values = [
            ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else kinds[type(value)](value)
            for value in arguments
        ]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        getattr(self._library, f"launch_{kernel_name}")(ctypes.c_uint(grid), ctypes.c_uint(self.block), pointers)


def requires_cpu_kernel() -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernel for the CPU")


WHERE = ["sequential", "threads", pytest.param("gpu", marks=pytest.mark.gpu)]
and_by_torch = pytest.mark.parametrize("device", [*WHERE, "torch"], indirect=True)
"""For the contract of both implementations."""


@pytest.fixture(params=WHERE)
def device(request, monkeypatch):
    """Where the kernel runs: one thread after another, 32 threads to a block with barriers and noise, or for real."""
    if request.param == "gpu":
        if reason := kernel.why_not():
            pytest.skip(reason)
        return torch.device("cuda")
    if request.param == "torch":
        monkeypatch.setattr(
            kernel, "ohem", lambda x, y, *rule: losses._loss(x, y, Rule(*rule[:4]), rule[4], None, "torch")
        )
        return torch.device("cpu")
    requires_cpu_kernel()
    block, noise = {"sequential": (1, False), "threads": (32, True)}[request.param]
    compiled_for_cpu(kernel.Specialization("float", "uint8", 19))  # an error in it is no matter for hypothesis
    monkeypatch.setattr(kernel, "library", lambda _, specialization: CpuLibrary(block, specialization, noise))
    return torch.device("cpu")


def forward(logits: Tensor, target: Tensor, *, threshold, min_kept, normalizer, align) -> tuple[Tensor, ...]:
    fraction = _rule(1.0, min_kept, "kept")[1:3]
    return kernel.ohem(logits, target, -math.log(threshold), *fraction, normalizer == "kept", align)


def ohem(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    loss, kept, *_ = forward(*case, **{**RULE, **changes})
    return loss, kept


def cases(dtype: torch.dtype, device: torch.device, **changes: Any) -> Case:
    logits, target = make_case(**{"dtype": dtype, **changes})
    return Case(logits.detach().to(device).requires_grad_(), target.to(device))


def ordered_losses(case: Case, dtype: torch.dtype, align: bool) -> Tensor:
    """Of the valid pixels, largest first: interpolate and cross entropy."""
    full = F.interpolate(case.logits.to(dtype), case.target.shape[-2:], mode="bilinear", align_corners=align)
    losses = F.cross_entropy(full, case.target.long(), ignore_index=IGNORE, reduction="none")
    return losses[case.target != IGNORE].sort(descending=True).values


def stock(case: Case, kept: int, *, min_kept, normalizer, align, **_) -> Tensor:
    """The usual composition in float32, of a known number of pixels."""
    n_min = min_kept if isinstance(min_kept, int) and normalizer == "at_least_n_min" else 0
    return ordered_losses(case, torch.float32, align)[:kept].sum() / max(kept, n_min, 1)


def unambiguous(case: Case, *, threshold, align, **rule) -> bool:
    """Whether float32 and float64 must keep the same pixels: no loss is a rounding error away from the cut."""
    losses = ordered_losses(case, torch.float64, align)
    _, kept = oracle(*case, threshold=threshold, align=align, **rule)
    margins = (losses + math.log(threshold)).abs()
    gap = losses[kept - 1] - losses[kept] if 0 < kept < len(losses) else 1.0
    return bool(margins.numel() == 0 or margins.min() > 2e-5) and bool(gap > 2e-5)


def without_pixels_at_the_cut(case: Case, threshold: float) -> Case:
    """Ignores the pixels that float32 and float64 may take for hard or not: some in half a million always are."""
    target = case.target.clone()
    for logits, labels in zip(case.logits.detach(), target, strict=True):  # one at a time: in float64 they are large
        full = F.interpolate(logits[None].double(), labels.shape, mode="bilinear", align_corners=False)
        losses = F.cross_entropy(full, labels[None].long(), ignore_index=IGNORE, reduction="none")[0]
        labels[(losses + math.log(threshold)).abs() < 2e-5] = IGNORE
    return Case(case.logits, target)


def assert_as_good_as_stock(case: Case, *, tolerance: float = 2e-6, **rule: Any) -> None:
    """Count right, value and gradient no further from the truth than the stock float32 composition, plus a little.

    The truth is that of float64 logits. A gradient may also be wrong by the last place of its type; the loss is scaled
    such that the gradient is of the size of 1, since small numbers in float16 have fewer places.
    """
    rule = {**RULE, **rule}
    exact, single = (
        Case(case.logits.detach().to(t).requires_grad_(), case.target) for t in (torch.float64, torch.float32)
    )
    truth, true_kept = oracle(*exact, **rule)
    common = stock(single, true_kept, **rule)
    ours, kept = ohem(case, **rule)
    assert kept.dtype == torch.int64
    assert ours.dtype == torch.float32
    assert kept == true_kept
    assert (ours - truth).abs() <= (common - truth).abs() + tolerance * (1 + truth.abs())
    true_gradient = gradient(truth, exact.logits)
    largest = true_gradient.abs().max().item() if case.logits.numel() else 0.0
    scale = 2.0 ** -math.frexp(largest)[1]
    our_gradient = gradient(ours * scale, case.logits)
    assert our_gradient.dtype == case.logits.dtype
    assert our_gradient.stride() == torch.empty_like(case.logits).stride()
    if case.logits.numel():
        allowed = (gradient(common, single.logits) - true_gradient).abs().max() + 5 * tolerance * largest
        last_place = torch.finfo(case.logits.dtype).eps * true_gradient.abs()
        assert ((our_gradient.double() / scale - true_gradient).abs() <= allowed + last_place).all()


sides = st.integers(1, 9)
full_sides = st.one_of(st.integers(1, 20), st.integers(33, 70))
shapes = st.fixed_dictionaries(
    {
        "images": st.integers(0, 2),
        "size": st.tuples(sides, sides),
        "full_size": st.tuples(full_sides, full_sides),
        "confidence": st.sampled_from([0.0, 4.0, 9.0]),
        "ignored": st.sampled_from([0.0, 0.3, 0.97, 1.0]),
        "seed": st.integers(0, 2**16),
    }
)
rules = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([1e-9, 0.1, 0.7]),
        "min_kept": st.one_of(st.sampled_from([0.0, 0.0625, 0.5, 1.0]), st.integers(0, 6000)),
        "normalizer": st.sampled_from(["kept", "at_least_n_min"]),
        "align": st.booleans(),
    }
)
same_fixture_for_all = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(
    ("dtype", "label_dtype"),
    [(torch.float32, torch.uint8), (torch.float16, torch.uint8), (torch.bfloat16, torch.int64)],
    ids=["float32", "float16", "bfloat16, int64 labels"],
)
@and_by_torch
@same_fixture_for_all
@given(shape=shapes, rule=rules, channels_last=st.booleans())
def test_value_count_and_gradient_of_19_classes(device, dtype, label_dtype, shape, rule, channels_last):
    case = cases(dtype, device, **shape)
    if channels_last:
        logits = case.logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        case = Case(logits, case.target)
    case = Case(case.logits, case.target.to(label_dtype))
    assume(fits(case, rule) and unambiguous(case, **rule))
    assert_as_good_as_stock(case, **rule)


@same_fixture_for_all
@given(shape=shapes, rule=rules, classes=st.one_of(st.integers(1, 40), st.integers(200, 256)))
def test_value_count_and_gradient_of_any_number_of_classes(device, shape, rule, classes):
    shape["images"] = min(shape["images"], 1)
    case = cases(torch.float32, device, classes=classes, **shape)
    if classes == 256:
        case.target[case.target == IGNORE] = 0
    assume(unambiguous(case, **rule))
    with patch.object(kernel, "MAX_SPECIALIZED_CLASSES", 0):
        assert_as_good_as_stock(case, **rule)


@pytest.mark.parametrize(
    ("dtype", "label_dtype", "classes"),
    [
        (torch.float32, torch.uint8, 2),
        (torch.float32, torch.uint8, 171),
        (torch.float16, torch.uint8, 19),
        (torch.bfloat16, torch.int64, 19),
    ],
)
def test_the_kernel_passes_the_example_that_decides_whether_it_runs(device, dtype, label_dtype, classes):
    with torch.inference_mode():  # where a process may begin
        assert losses._disagreement(device, dtype, label_dtype, classes) is None


def test_a_kernel_that_is_wrong_is_found_out(device, monkeypatch):
    right = kernel.ohem
    monkeypatch.setattr(kernel, "ohem", lambda logits, *arguments: right(logits * 1.1, *arguments))
    assert "its loss for an example is" in (losses._disagreement(device, torch.float32, torch.uint8, 19) or "")
    monkeypatch.setattr(kernel, "ohem", lambda *_: 1 / 0)
    assert losses._disagreement(device, torch.float32, torch.uint8, 19) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_rounded_to_nearest(device, dtype):
    case = cases(dtype, device)
    single = Case(case.logits.detach().float().requires_grad_(), case.target)
    found, exact = (gradient(1024 * ohem(it)[0], it.logits) for it in (case, single))
    assert (found != exact.to(dtype)).float().mean() <= (0.01 if device.type == "cuda" else 0)  # other code, other bits


@pytest.mark.parametrize("classes", [2, 33])
@pytest.mark.parametrize("layout", ["channels first", "channels last", "a slice", "expanded"])
def test_few_and_many_classes_in_any_layout(device, classes, layout):
    case = cases(torch.float32, device, classes=classes)
    logits = case.logits.detach()
    if layout == "channels last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    elif layout == "a slice":
        logits = torch.stack([logits, logits + 1], -1).repeat(1, 2, 1, 1, 1)[:, :classes, ..., 0]
    elif layout == "expanded":
        logits = logits[..., :1].expand_as(logits)
    assert_as_good_as_stock(Case(logits.requires_grad_(), case.target))


@pytest.mark.parametrize("classes", [19, 33])
def test_neighbours_that_are_sure_of_different_classes(device, classes):
    """Between them every score is far below the largest of either: sums of exponentials would vanish."""
    case = cases(torch.float32, device, classes=classes, size=(6, 3), ignored=0.0)
    logits = torch.zeros_like(case.logits.detach())
    logits[:, 0, ::2] = logits[:, 1, 1::2] = 300.0
    assert_as_good_as_stock(Case(logits.requires_grad_(), case.target))


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (50, 60), (300, 5), (4, 53), (37, 5)], ids=str)
@pytest.mark.parametrize("align", [False, True])
def test_sizes_at_the_edge(device, size, align):
    """One logit for all pixels (more than a block has threads), no upsampling, downsampling, one axis only."""
    case = cases(torch.float32, device, size=size)
    assert_as_good_as_stock(case, align=align)


@pytest.mark.parametrize(
    "classes", [19, 32, 33, *[pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 20, 21, 31)]]
)
@pytest.mark.parametrize(
    ("size", "full_size"),
    [((25, 19), (200, 150)), ((80, 70), (160, 140)), ((50, 45), (50, 67)), ((100, 90), (70, 33)), ((2, 2), (150, 140))],
    ids=["stride 8", "stride 2", "strides under 2", "downsampling", "stride 70"],
)
def test_several_tiles_in_both_directions(device, classes, size, full_size):
    case = cases(torch.float32, device, images=1, classes=classes, size=size, full_size=full_size)
    if device.type == "cpu" and kernel.library(device, kernel.specialize(torch.float32, torch.uint8, 2)).block == 1:
        case = Case(case.logits.detach()[:, :, :30, :20].requires_grad_(), case.target[:, :100, :40])
    assert_as_good_as_stock(without_pixels_at_the_cut(case, 0.7), min_kept=0)


@pytest.mark.parametrize("classes", [19, 33])
@pytest.mark.parametrize("pattern", ["offset", "rows", "spikes"])
def test_large_logits_are_as_precise_as_stock(device, classes, pattern):
    """Float16 logits with a common offset of 1000; rows that alternate by 1e4; spikes of 6e4 beside small losses."""
    logits, target = cases(torch.float16, device, classes=classes, size=(8, 8), full_size=(64, 64), ignored=0.0)
    with torch.no_grad():
        if pattern == "spikes":
            logits[:, 0, ::3, ::3] = 6e4
        else:
            logits[..., :: 1 if pattern == "offset" else 2, :] += 1000.0 if pattern == "offset" else 1e4
    truth, stock_map = (
        F.cross_entropy(F.interpolate(logits.to(t), (64, 64), mode="bilinear"), target.long(), reduction="none")
        for t in (torch.float64, torch.float32)
    )
    allowed = (stock_map - truth).abs().max() * (2 if pattern == "spikes" else 1) + 3e-6 + 3e-7 * truth
    assert ((forward(logits, target, **RULE)[2] - truth).abs() <= allowed).all()


def test_pixels_at_a_cut_of_zero_and_ignored_ones_are_told_apart(device):
    """Most losses are exactly 0: the cut is 0, and only valid pixels share the remaining weight."""
    case = cases(torch.float32, device, classes=2, size=(6, 6), full_size=(6, 6), ignored=0.0)
    logits = 60.0 * F.one_hot(case.target.long(), 2).movedim(-1, 1).float()
    case.target[:, :2] = IGNORE
    logits[:, :, 3, :3] = 0.0
    for classes in (kernel.MAX_SPECIALIZED_CLASSES, 0):
        with patch.object(kernel, "MAX_SPECIALIZED_CLASSES", classes):
            loss, kept, _, selection = forward(logits, case.target, **{**RULE, "min_kept": 20})
        assert kept == 20
        assert selection[0] == 0
        assert selection[1].item() == pytest.approx((20 - 6) / (2 * 24 - 6))
        assert loss.item() == pytest.approx(6 * math.log(2) / 20, rel=1e-5)


def test_at_threshold_1_a_loss_of_zero_is_not_hard(device):
    logits = torch.zeros(1, 2, 4, 4, device=device)
    logits[:, 0, :2] = 200.0
    target = torch.zeros(1, 4, 4, dtype=torch.uint8, device=device)
    rule = {**RULE, "threshold": 1.0, "min_kept": 0}
    assert forward(logits, target, **rule)[1] == 8
    with patch.object(kernel, "MAX_SPECIALIZED_CLASSES", 0):
        assert forward(logits, target, **rule)[1] == 8


@pytest.mark.parametrize("limit", [32, 0])
def test_pixels_beyond_the_reach_of_32_bits(limit, monkeypatch):
    """The blocks of a late image alone, with all pointers moved back by what lies before that image."""
    requires_cpu_kernel()
    monkeypatch.setattr(kernel, "MAX_SPECIALIZED_CLASSES", limit)
    monkeypatch.setattr(kernel, "library", lambda _, specialization: CpuLibrary(32, specialization))
    logits, target = make_case(images=1, size=(8, 16), full_size=(64, 128), dtype=torch.float32)
    loss, _, expected, selection = forward(logits, target, **RULE)
    losses, slope, state = torch.zeros(1, 64, 128), torch.zeros_like(logits), torch.zeros(kernel._STATE_WORDS).long()
    image = 2**31 // logits[0].numel() + 5  # beyond it are logits, and more so pixels
    late = {it: it.data_ptr() - image * it.nbytes for it in (logits, target, expected, losses, slope)}
    specialization = kernel.specialize(torch.float32, torch.uint8, 19)
    shapes = (torch.Size((image + 1, *logits.shape[1:])), logits.stride(), torch.Size((image + 1, 64, 128)))
    plan, library = kernel._plan(shapes, False, specialization, 32), CpuLibrary(32, specialization)
    results = (state, torch.zeros(plan.grids[0]).double(), torch.zeros(3), torch.zeros(()), torch.zeros(()).long())
    given = (late[logits], late[target], *plan.geometry)
    passes = {
        "ohem_forward": (0.5, 0, 0, 1, *plan.forward_tile, late[losses], *results),
        "ohem_backward": (late[expected], selection, torch.ones(()), *plan.backward_tile, late[slope], *slope.stride()),
    }
    for grid, (name, arguments) in zip(plan.grids, passes.items(), strict=True):
        for block in range(grid // (image + 1) * image, grid):
            library.launch(name, grid, *given, *arguments, only_block=block)
    assert torch.equal(losses, expected)
    assert torch.equal(slope, gradient(loss, logits))


def test_large_images_get_wide_offsets(monkeypatch):
    seen = []
    monkeypatch.setattr(kernel, "library", lambda _, it: seen.append(it.offset) or SimpleNamespace(block=128))
    for side, full in ((2**15 - 1, 2**15), (2**15, 2**15), (2**13, 2**16)):
        logits, target = torch.empty(1, 2, side, side, device="meta"), torch.empty(1, full, 2**15, device="meta")
        kernel._prepare(logits, target.to(torch.uint8), False)
    assert seen == ["int", "int64", "int64"]


def test_more_rows_of_pixels_than_float32_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(kernel, "library", lambda *_: SimpleNamespace(block=128))
    with pytest.raises(ValueError, match="2\\^24"):
        kernel._prepare(torch.empty(1, 2, 1, 1), torch.empty(1, 2**24, 1, device="meta").to(torch.uint8), False)


def test_wide_offsets_change_nothing(device, monkeypatch):
    case = cases(torch.float16, device)
    loss, _ = ohem(case)
    slope = gradient(loss, case.logits)
    specialize = kernel.specialize
    monkeypatch.setattr(kernel, "specialize", lambda *arguments: specialize(*arguments[:3], True))  # type: ignore[call-arg]
    again, _ = ohem(case)
    assert torch.equal(again, loss)
    assert torch.equal(gradient(again, case.logits), slope)


@pytest.mark.parametrize("ignored", [0.3, 1.0])
def test_cross_entropy_keeps_all(device, ignored, monkeypatch):
    monkeypatch.setattr(losses, "_kernel_runs", lambda *_: True)
    case = cases(torch.float32, device, ignored=ignored)
    loss, kept = CrossEntropy()(*case)
    truth, true_kept = oracle(*case, threshold=0.7, min_kept=1.0, normalizer="kept", align=False)
    assert kept == true_kept
    torch.testing.assert_close(loss, truth.float())


@and_by_torch
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("min_kept", [0, 1000, 0.5])
@pytest.mark.parametrize("normalizer", ["kept", "at_least_n_min"])
def test_nothing_kept_gives_zero_with_a_zero_gradient(device, images, min_kept, normalizer):
    easy = {"confidence": 200.0, "full_size": (5, 7)} if min_kept == 0 else {"ignored": 1.0}
    case = cases(torch.float32, device, images=images, **easy)
    loss, kept = ohem(case, min_kept=min_kept, normalizer=normalizer)
    assert loss == kept == 0
    assert not gradient(loss, case.logits).any()


@same_fixture_for_all
@given(
    values=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0, 60.0]), min_size=1, max_size=4, unique=True),
    pixels=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    min_kept=st.one_of(st.integers(0, 2000), st.floats(0, 1)),
    seed=st.integers(0, 999),
)
def test_the_selection_is_exact_for_any_ties(device, values, pixels, min_kept, seed):
    """Few different losses; judged against a sort of the kernel's own loss map, so that nothing is rounded."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.tensor(values)[torch.randint(len(values), (pixels[0], 2, *pixels[1:]), generator=draw)].to(device)
    target = torch.randint(2, pixels, generator=draw).to(torch.uint8).to(device)
    target[:, ::3] = IGNORE
    with patch.object(kernel, "MAX_SPECIALIZED_CLASSES", 0):
        loss, kept, losses, selection = forward(logits, target, **{**RULE, "threshold": 0.2, "min_kept": min_kept})
    cut, share, scale = selection.tolist()
    assert torch.equal(losses == -1, target == IGNORE)
    ordered = losses[target != IGNORE].double().sort(descending=True).values
    numerator, denominator = _rule(1.0, min_kept, "kept")[1:3]
    n_min = min(len(ordered) * numerator // denominator if denominator else numerator, len(ordered))
    hard = int((losses > cut).sum()) if share == 0 else -1
    if share == 0:
        assert hard >= n_min
        assert cut == pytest.approx(-math.log(0.2))
    else:
        assert cut == ordered[n_min - 1]
        above = int((ordered > cut).sum())
        assert share == pytest.approx((n_min - above) / int((ordered == cut).sum()))
    expected = max(n_min, hard)
    assert kept == expected
    assert scale == pytest.approx(1 / max(expected, 1))
    assert loss.item() == pytest.approx((ordered[:expected].sum() / max(expected, 1)).item(), rel=1e-6)


@and_by_torch
def test_ties_at_the_cut_share_the_remaining_weight(device):
    case = cases(torch.float32, device, images=1, size=(6, 6), full_size=(6, 6), ignored=0.0)
    logits = torch.zeros_like(case.logits.detach()).requires_grad_()
    loss, kept = ohem(Case(logits, case.target), threshold=1e-9, min_kept=7)
    assert kept == 7
    assert loss.item() == pytest.approx(math.log(19))
    expected = gradient(F.cross_entropy(logits.double(), case.target.long()), logits)
    torch.testing.assert_close(gradient(loss, logits), expected)


@and_by_torch
def test_the_same_bits_every_time(device):
    case = cases(torch.float32, device, full_size=(150, 130), confidence=2.0)
    for rule in ({}, {"threshold": 1e-9, "min_kept": 0.3}):
        first, second = (ohem(case, **rule)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(gradient(first, case.logits), gradient(second, case.logits))


@pytest.mark.parametrize("rule", [{}, {"threshold": 1e-9}, {"threshold": 1e-9, "min_kept": 0}], ids=str)
@pytest.mark.parametrize("full_size", [(37, 53), (5, 7), (3, 3)], ids=["upsampled", "same size", "downsampled"])
@pytest.mark.parametrize("where", ["valid", "ignored"])
@and_by_torch
def test_a_nan_logit_gives_nan(device, rule, full_size, where):
    case = cases(torch.float32, device, full_size=full_size, ignored=0.0)
    if where == "ignored":
        case.target[1] = IGNORE
    with torch.no_grad():
        case.logits[1, 3, 2, 2] = math.nan
    for limit in (kernel.MAX_SPECIALIZED_CLASSES, 0):
        with patch.object(kernel, "MAX_SPECIALIZED_CLASSES", limit):
            loss, _ = ohem(case, **rule)
            assert loss.isnan()
            assert gradient(loss, case.logits).isnan().any()


@and_by_torch
def test_infinite_logits(device):
    case = cases(torch.float32, device, full_size=(5, 7), ignored=0.0)
    absent, label = case.logits.detach().clone(), case.logits.detach().clone()
    case.target.clamp_(max=17)
    absent[:, 18] = -math.inf  # a class that is nowhere
    loss, _ = ohem(Case(absent.requires_grad_(), case.target))
    truth, _ = oracle(absent[:, :18], case.target, **RULE)
    torch.testing.assert_close(loss, truth.float())
    assert gradient(loss, absent).isfinite().all()
    label[0, case.target[0, 0, 0].long(), 0, 0] = -math.inf
    assert ohem(Case(label, case.target))[0] == math.inf
    assert ohem(Case(-label, case.target))[0].isnan()
    full = F.interpolate(case.target[:, None].float(), (20, 28))[:, 0].to(torch.uint8)
    for sign in (1, -1):
        assert not ohem(Case(sign * label, full))[0].isfinite()


@pytest.mark.parametrize(("dtype", "labels"), [(torch.uint8, [19, 254]), (torch.int64, [-1, 19, 2**40, -(2**62)])])
def test_labels_outside_the_classes_give_nan_and_are_never_used_as_an_index(device, dtype, labels):
    for label in labels:
        logits, target = cases(torch.float32, device)
        target = target.to(dtype)
        target[0, 3, 4] = label
        loss, _ = ohem(Case(logits, target))
        assert loss.isnan()
        assert gradient(loss, logits).isnan().all()


# --------------------------------------------------------------------------------------------- PyTorch's operators


def test_the_operators_pass_opcheck(device):
    for dtype in (torch.float32, torch.float16):
        case = cases(dtype, device, size=(3, 4), full_size=(9, 11))
        arguments = (-math.log(0.7), 1, 16, True, False)
        torch.library.opcheck(kernel.ohem, (*case, *arguments))
        loss, _, losses, selection = kernel.ohem(*case, *arguments)
        values = (torch.ones_like(loss), case.logits.detach(), case.target, losses, selection, False)
        torch.library.opcheck(kernel.ohem_backward, values)


def test_traced_as_one_graph_with_the_same_result(device, monkeypatch):
    monkeypatch.setattr(losses, "_choose", lambda *_: True)  # what traces it looks at neither the cache nor the device
    case = cases(torch.float32, device)
    criterion = OhemCrossEntropy()
    traced = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    results = [(loss, kept, gradient(loss, case.logits)) for loss, kept in (criterion(*case), traced(*case))]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@and_by_torch
def test_the_gradient_is_that_of_the_scaled_loss_under_autocast(device):
    case = cases(torch.float32, device)
    loss, _ = ohem(case)
    expected = gradient(loss, case.logits) * 1024.0
    with torch.autocast(device.type, dtype=torch.bfloat16):
        again, _ = ohem(case)
        assert torch.equal(again, loss)
    assert torch.equal(gradient(again * 1024.0, case.logits), expected)


def test_the_choice_of_an_implementation(caplog):
    logits, target = make_case(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"impl: got 'best'.*auto \| torch \| cuda"):
        OhemCrossEntropy(impl="best")
    with pytest.raises(ValueError, match=r"impl: got 'cuda' with torch\.float32 logits on cpu"):
        losses._choose("cuda", logits.device, logits.dtype, target.dtype, 19)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="impl 'cuda': the kernel cannot be built: no CUDA device"):
            CrossEntropy(impl="cuda")
    losses._choose.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            OhemCrossEntropy()(logits, target)
    assert [record.getMessage() for record in caplog.records if "loss:" in record.getMessage()] == [
        "loss: PyTorch implementation, for torch.float32 logits on cpu"
    ]


def test_a_kernel_that_cannot_be_built_is_replaced_and_said_so(monkeypatch, caplog):
    monkeypatch.setattr(kernel, "why_not", lambda *_: "ImportError: No module named 'cuda'")
    arguments = (torch.device("cuda", 7), torch.float16, torch.uint8, 19)
    assert not losses._choose("auto", *arguments)
    assert "PyTorch implementation, because the CUDA kernel does not run here: ImportError" in caplog.text
    with pytest.raises(RuntimeError, match="does not run here: ImportError"):
        losses._choose("cuda", *arguments)


def test_a_first_call_within_a_graph_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once before capturing a CUDA graph"):
        kernel.why_not(torch.device("cuda", 0))


def test_a_loss_is_made_without_touching_a_device(monkeypatch):
    """Under DDP every process makes its loss before it has chosen its device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    monkeypatch.setattr(kernel, "library", lambda *_: pytest.fail("compiled"))
    assert OhemCrossEntropy(impl="cuda").impl == "cuda"


def test_backward_makes_no_gradients_of_zeros(device):
    """One of the outputs without a gradient is as large as the loss map."""

    class Shapes(TorchDispatchMode):
        made: ClassVar[list[torch.Size]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            if "zeros" in str(func) or "full" in str(func):
                self.made.append(result.shape)
            return result

    case = cases(torch.float32, device)
    loss, _ = ohem(case)
    with Shapes():
        gradient(loss, case.logits)
    assert case.target.shape not in Shapes.made


# ---------------------------------------------------------------------------------------------- a stand-in driver


@pytest.fixture
def stand_in(tmp_path):
    """Runs a script in which torch.cuda is a fake and libcuda.so.1 the stand-in; cuda.core and the binding are real."""
    requires_compiler()
    requires_cpu_kernel()
    source = ROOT / "tests" / "stand_in_driver.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source, "-ldl"], check=True)
    kernels = compiled_for_cpu(kernel.Specialization("half", "uint8", 19))._name

    def run(script: str) -> str:
        begin = """if True:
            import contextlib, ctypes, threading, types, torch
            from bisenet import kernel
            from test_kernel import RULE, assert_as_good_as_stock, cases, forward, gradient
            driver = ctypes.CDLL("libcuda.so.1")
            streams = [0]
            torch.cuda.get_device_capability = lambda _: (9, 0)
            torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=1)
            torch.cuda.current_device = lambda: 0
            torch.cuda.device = lambda _: contextlib.nullcontext()
            torch.cuda.set_device = lambda _: driver.stand_in_bind()
            torch.cuda.current_stream = lambda: types.SimpleNamespace(cuda_stream=streams[-1])
            library, on = kernel.library, kernel._on
            kernel.library = lambda _, specialization: library(torch.device("cuda", 0), specialization)
            kernel._on = lambda _: on(torch.device("cuda", 0))
            case = cases(torch.float16, torch.device("cpu"), full_size=(20, 30))
        """
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LD_LIBRARY_PATH": str(tmp_path)}
        environment = {**os.environ, **paths, "STAND_IN_KERNELS": kernels, "XDG_CACHE_HOME": str(tmp_path)}
        command = [sys.executable, "-c", begin + script]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_binding_runs_through_cuda_core(stand_in):
    """Arguments, streams, a fresh thread, and what happens without the binding of the context."""
    stand_in("""
            assert_as_good_as_stock(case)
            assert_as_good_as_stock(case, threshold=1e-9)  # through the refinement
            assert driver.stand_in_launches() == 10
            assert driver.stand_in_stream() == 1  # the default stream by name, whatever 0 means to cuda.core
            streams.append(0x5EED)
            loss, _, losses, selection = forward(*case, **RULE)
            assert driver.stand_in_stream() == 0x5EED
            expected, found = gradient(loss, case.logits), []
            arguments = torch.ones(()), case.logits.detach(), case.target, losses, selection, False

            def work():
                try:
                    found.append(kernel.ohem_backward(*arguments))
                except Exception as error:
                    found.append(str(error))

            for _ in range(2):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                kernel._on = lambda _: contextlib.nullcontext()
            assert torch.equal(found[0], expected)
            assert "CUDA_ERROR_INVALID_CONTEXT" in found[1], found[1]
    """)


def requires_compiler() -> None:
    """Skips the test where NVRTC is missing."""
    for module in ("cuda.core", "cuda.bindings.nvrtc"):
        pytest.importorskip(module, reason="cuda-core is not installed: pip install -e '.[cuda]'")
    from cuda.bindings import nvrtc  # type: ignore[attr-defined]

    try:
        nvrtc.nvrtcVersion()
    except Exception as error:
        if "DynamicLibNotFound" in type(error).__name__:
            pytest.skip(f"no NVRTC: {error}")
        raise


@pytest.mark.parametrize("error", [ValueError("damaged"), OSError(30, "Read-only")])
def test_a_cache_that_fails_is_done_without(monkeypatch, caplog, error):
    """A damaged entry; a folder that cannot be written."""
    core = pytest.importorskip("cuda.core")

    class Program:
        def __init__(self, *_): ...

        def compile(self, target, logs=None, cache=None):
            if cache is not None:
                raise error
            return SimpleNamespace(get_kernel=lambda name: name)

    monkeypatch.setattr(core, "Program", Program)
    kernel._warn_once.cache_clear()
    for _ in range(2):
        kernels = kernel._load("sm_90", kernel.Specialization("half", "uint8", 2))
        assert kernels == {name: name for name in kernel.KERNELS}
    assert caplog.text.count(f"which failed: {type(error).__name__}: {error}") == 1  # said once


def test_the_source_has_room_for_the_tiles():
    source = kernel.source_path().read_text()
    constants = dict(re.findall(r"constexpr int (\w+) = (.+?);", source))
    assert constants["BLOCK"] == "K > 20 ? 64 : 128"
    assert [kernel.Specialization("half", "uint8", classes).block for classes in (0, 20, 21)] == [128, 128, 64]
    assert constants["COLUMNS"] == "BLOCK / 2 + 4"
    assert int(constants["CHUNK"]) == kernel._CHUNK
    assert int(constants["PIXEL_ROWS"]) == kernel._TILE_ROWS
    assert int(constants["LOGIT_ROWS"]) == kernel._MOST_GRADIENT_ROWS


@given(st.integers(1, 3000), st.integers(1, 3000), st.booleans(), st.floats(0, 1), st.sampled_from([35, 67]))
def test_there_is_room_for_the_logits_beside_the_pixels_of_a_block(size, full, align, start, most):
    axis = kernel._Axis.make(size, full, align)
    count = min(2 * most - 6, axis.pixels_beside(most), full)
    first = int(start * (full - count))
    shift = np.float32(0.0 if align else 0.5)
    begin, end = (int(np.float32(axis.scale) * (np.float32(x) + shift) - shift) for x in (first, first + count - 1))
    assert end + 2 - begin <= most


def test_the_source_is_in_the_wheel(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path], cwd=ROOT, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    installed = tmp_path / "bisenet" / "kernels" / "ohem" / "ohem.cu"
    assert installed.read_bytes() == kernel.source_path().read_bytes()
    with patch.object(kernel, "__file__", str(tmp_path / "bisenet" / "kernel.py")):
        assert kernel.source_path() == installed


# ----------------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture
def bench(monkeypatch):
    """``kernels/ohem/bench.py`` as a module."""
    monkeypatch.syspath_prepend(kernel.source_path().parent)
    monkeypatch.delitem(sys.modules, "bench", raising=False)
    handler = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nothing handles SIGTERM"))
    yield importlib.import_module("bench")
    signal.signal(signal.SIGTERM, handler)


def test_a_benchmark_stopped_by_a_time_limit_writes_what_it_has(bench, monkeypatch, tmp_path):
    times = iter([12.5])

    def measure(*_):
        for time in times:
            return {"naive": bench.Sample(time, 1.0, 1.0)}
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not stopped")

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setenv("PATH", "")  # a machine without git and nvidia-smi
    monkeypatch.setattr(sys, "argv", ["bench.py", "--shrink", "4", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="what was measured until then is written"):
        bench.main()
    (table,) = tmp_path.glob("*.md")
    assert "| naive | 12.500 | 1.000 |" in table.read_text()
    assert "commit: unknown" in table.read_text()
    assert next(iter(bench.NETWORKS)) == "bisenetv2" in table.read_text()  # which matters more, is measured first


@pytest.mark.parametrize("hard", [1.0, 0.08, 0.002])
def test_the_baseline_computes_the_same_loss_without_conversions(bench, hard):
    logits, target = bench.make_inputs(1, (128, 256), 8, hard, torch.float32, torch.device("cpu"))
    baseline = bench.naive(logits, labels=target.long(), limit=bench.LIMIT)
    torch.testing.assert_close(baseline, bench.ours("torch")(logits, target))
    with pytest.raises(RuntimeError):
        bench.naive(logits, labels=target, limit=bench.LIMIT)


# ----------------------------------------------------------------------------------------------- compiled for CUDA


def assert_no_spills(arch: str, logit: str, label: str, classes: int) -> None:
    """Fails where a kernel spills registers, by ptxas."""
    requires_compiler()
    log = io.StringIO()
    kernel.compile_source(arch, kernel.Specialization(logit, label, classes), logs=log)
    rule = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores"
    assert dict(re.findall(rule, log.getvalue(), re.DOTALL)) == dict.fromkeys(kernel.KERNELS, "0")


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_it_compiles_without_spills(arch):
    assert_no_spills(arch, "half", "uint8", 19)


@pytest.mark.parametrize(
    ("arch", "classes"),
    [
        ("sm_90", 0),
        *[pytest.param(a, n, marks=pytest.mark.slow) for a in ARCHITECTURES for n in (0, 2, 11, 19, 20, 32)],
    ],
)
def test_all_types_and_numbers_of_classes_compile_without_spills(arch, classes):
    for logit, label in (("float", "int64"), ("half", "uint8"), ("bfloat16", "uint8")):
        assert_no_spills(arch, logit, label, classes)


# -------------------------------------------------------------------------------------------------- only on a GPU


@pytest.fixture
def cuda():
    if reason := kernel.why_not():
        pytest.skip(reason)
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_full_size_heads_on_a_gpu(cuda, dtype, stride):
    size = (512 // stride, 1024 // stride)
    case = cases(dtype, cuda, images=2, size=size, full_size=(512, 1024), confidence=6.0)
    assert_as_good_as_stock(without_pixels_at_the_cut(case, RULE["threshold"]), min_kept=0, tolerance=1e-5)


@pytest.mark.gpu
def test_the_first_work_of_a_process_is_a_backward_pass(cuda):
    """autograd calls the kernel from a thread of its own, which has no context then; ``auto`` would give it up."""
    script = """if True:
        import torch
        from bisenet.losses import OhemCrossEntropy
        logits = torch.zeros(1, 19, 4, 4, device="cuda", requires_grad=True)
        target = torch.zeros(1, 16, 16, dtype=torch.uint8, device="cuda")
        OhemCrossEntropy(impl="cuda")(logits, target)[0].backward()
        assert logits.grad.isfinite().all()
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.gpu
def test_no_host_synchronisation_on_a_gpu(cuda):
    case = cases(torch.float16, cuda)
    for impl in ("cuda", "torch"):
        criterion = OhemCrossEntropy(impl=impl)
        criterion(*case)[0].backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, _ = criterion(*case)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_torch_compile_on_a_gpu(cuda):
    case = cases(torch.float16, cuda)
    criterion = OhemCrossEntropy(impl="cuda")
    loss, kept = torch.compile(criterion, fullgraph=True)(*case)
    expected, expected_kept = criterion(*case)
    assert torch.equal(loss, expected)
    assert torch.equal(kept, expected_kept)
    assert torch.equal(gradient(loss, case.logits), gradient(expected, case.logits))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(cuda):
    case = cases(torch.float16, cuda)
    criterion = OhemCrossEntropy(impl="cuda")
    warmup = torch.cuda.Stream()
    with torch.cuda.stream(warmup):
        gradient(criterion(*case)[0], case.logits)
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, kept = criterion(*case)
        slope = gradient(loss, case.logits)
    other = cases(torch.float16, cuda, seed=1)
    with torch.no_grad():
        case.logits.copy_(other.logits)
        case.target.copy_(other.target)
    graph.replay()
    expected, expected_kept = criterion(*other)
    assert torch.equal(loss, expected)
    assert torch.equal(kept, expected_kept)
    assert torch.equal(slope, gradient(expected, other.logits))


@pytest.mark.gpu
def test_memory_is_a_loss_map_and_the_gradient(cuda):
    case = cases(torch.float16, cuda, images=4, size=(64, 128), full_size=(512, 1024))
    criterion = OhemCrossEntropy(impl="cuda")
    gradient(criterion(*case)[0], case.logits)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient(criterion(*case)[0], case.logits)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 4 * case.target.numel() + 2 * case.logits.numel() + 2**20


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(cuda):
    """Offsets beyond 32 bits: the last of 160 images alone must give the same loss as in the batch."""
    if torch.cuda.get_device_properties(cuda).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    logits = torch.zeros(160, 19, 768, 1024, dtype=torch.float16, device=cuda)
    logits[-1].normal_(std=3.0)
    target = torch.full((160, 768, 1024), IGNORE, dtype=torch.uint8, device=cuda)
    target[-1].random_(0, 19)
    last = logits[-1:].clone().requires_grad_()
    loss, kept = OhemCrossEntropy(impl="cuda")(logits.requires_grad_(), target)
    alone, alone_kept = OhemCrossEntropy(impl="cuda")(last, target[-1:])
    assert kept == alone_kept
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(gradient(loss, logits)[-1], gradient(alone, last)[0])
