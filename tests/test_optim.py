"""Parameter groups are a partition that the rules describe; schedules are what the reference's two generations used."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import composed
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from bisenet.experiment import build, build_all
from bisenet.module import SegmentationModule
from bisenet.optim import GroupRule, WarmupConstant, WarmupCosine, WarmupPoly, parameter_groups

# --- groups ----------------------------------------------------------------------------------------------------------


def tiny_network() -> nn.Module:
    """backbone: two weights and a norm; head and head2: a weight of two and of four dimensions, a bias each."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False))
    return nn.ModuleDict({"backbone": backbone, "head": nn.Sequential(nn.Linear(4, 2)), "head2": nn.Conv2d(4, 2, 1)})


GOLDEN = {  # tensors that decay, that do not, and both again at ten times the learning rate
    ("model=bisenetv1", "model.network.generation=current"): (31, 62, 8, 13),
    ("model=bisenetv1", "model.network.generation=older"): (31, 62, 9, 8),
    ("model=bisenetv1", "model.network.generation=older", "model.network.norm=inplace_abn"): (31, 62, 9, 8),
    ("model=bisenetv1_diss", "model.network.generation=current"): (27, 54, 8, 13),
    ("model=bisenetv1_diss", "model.network.generation=older", "model.network.norm=inplace_abn"): (27, 54, 9, 8),
    ("model=bisenetv2", "model.network.generation=current"): (54, 106, 14, 23),
    ("model=bisenetv2", "model.network.generation=older", "model.output_layers=[]"): (64, 121, 0, 0),
}


@pytest.mark.parametrize("overrides", GOLDEN, ids=" ".join)
def test_shipped_rules_split_the_networks_as_the_reference_does(overrides):
    cfg = composed(*overrides)
    with torch.device("meta"):
        network = build(cfg, "model.network", n_classes=19)
    groups = parameter_groups(network, build_all(cfg, "parameter_groups"), lr=0.01, weight_decay=5e-4)
    sizes = {group["name"]: len(group["params"]) for group in groups}
    names = ("decay", "no_decay", "output_decay", "output_no_decay")
    assert tuple(sizes.get(name, 0) for name in names) == GOLDEN[overrides]
    for group in groups:
        assert group["lr"] == pytest.approx(0.1 if "output" in group["name"] else 0.01)
        assert group["weight_decay"] == (0.0 if "no_decay" in group["name"] else 5e-4)


LAYERS = ["backbone", "backbone.1", "head", "head.0", "head2"]
random_rules = st.lists(
    st.builds(
        GroupRule,
        layers=st.none() | st.lists(st.sampled_from(LAYERS), unique=True, max_size=3),
        kind=st.sampled_from(["weight", "norm_bias", "any"]),
        lr_multiplier=st.sampled_from([0.5, 1.0, 10.0]),
        weight_decay=st.sampled_from([None, 0.0, 0.3]),
    ),
    max_size=3,
)


@given(random_rules)
@example([GroupRule(["head"])])  # which is the beginning of head2
def test_every_parameter_goes_to_the_first_rule_that_matches(rules):
    network = tiny_network()
    rules = {str(i): rule for i, rule in enumerate([*rules, GroupRule()])}

    def matches(rule: GroupRule, parameter: nn.Parameter) -> bool:
        layers = [network] if rule.layers is None else [network.get_submodule(layer) for layer in rule.layers]
        kind = {"weight": parameter.ndim >= 2, "norm_bias": parameter.ndim <= 1, "any": True}[rule.kind]
        return kind and any(parameter is other for layer in layers for other in layer.parameters())

    expected: dict[str, list[nn.Parameter]] = {name: [] for name, rule in rules.items() if rule.layers != []}
    for parameter in network.parameters():
        expected[next(name for name, rule in rules.items() if matches(rule, parameter))].append(parameter)
    if not all(expected.values()):
        with pytest.raises(ValueError, match="is left for it"):
            parameter_groups(network, rules, lr=0.2, weight_decay=0.1)
        return
    groups = parameter_groups(network, rules, lr=0.2, weight_decay=0.1)
    assert [group["name"] for group in groups] == list(expected)
    for group in groups:
        rule = rules[group["name"]]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected[group["name"]]]
        assert group["lr"] == pytest.approx(0.2 * rule.lr_multiplier)
        assert group["weight_decay"] == (0.1 if rule.weight_decay is None else rule.weight_decay)
    torch.optim.SGD(groups, lr=1.0)


def test_frozen_parameters_are_left_out_and_shared_ones_taken_once():
    network = tiny_network()
    network.get_submodule("backbone").requires_grad_(False)
    network.get_submodule("head2").register_parameter("weight", network.get_parameter("head.0.weight"))
    (group,) = parameter_groups(network, {"all": GroupRule()}, lr=1.0, weight_decay=0.0)
    assert [p.shape for p in group["params"]] == [(2, 4), (2,), (2,)]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"heads": GroupRule(["head", "tail"])},
            r"heads.layers: no layers \['tail'\]; accepted: backbone, head, head2",
        ),
        ({"heads": GroupRule(["hea"])}, r"no layers \['hea'\]"),
        ({"decay": GroupRule(kind="weight")}, r"no rule among \['decay'\] takes the parameter backbone.1.weight"),
        ({"all": GroupRule(), "heads": GroupRule(["head"])}, r"heads: .*'any' in layers \['head'\] is left"),
        ({"all": GroupRule(), "bias": GroupRule(kind="norm_bias")}, r"bias: .*'norm_bias' in any layer is left"),
    ],
)
def test_rules_that_cannot_be_meant_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(tiny_network(), rules, lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize(
    "wrong", [{"layers": "head"}, {"kind": "bias"}, {"lr_multiplier": -1}, {"weight_decay": float("nan")}]
)
def test_a_rule_refuses_what_it_cannot_mean(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got "):
        GroupRule(**wrong)


# --- schedules -------------------------------------------------------------------------------------------------------

RECIPE = {"total_steps": 80_000, "warmup_steps": 1000, "warmup_ratio": 0.1}


def shares(kind, steps, **arguments):
    """Share of the learning rate at some steps."""
    scheduler = kind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **arguments)
    return [scheduler.lr_lambdas[0](step) for step in steps]


def reference_current(step: int) -> float:
    return 0.1 ** (1 - step / 1000) if step < 1000 else (1 - (step - 1000) / (80_000 - 1000)) ** 0.9


def reference_older(step: int) -> float:
    """Rates from 1e-3 to 1e-2, relative to the latter."""
    if step <= 1000:
        return 1e-3 * (1e-2 / 1e-3) ** (step / 1000) / 1e-2
    return (1 - (step - 1000) / (80_000.0 - 1000)) ** 0.9


@pytest.mark.parametrize("reference", [reference_current, reference_older])
def test_poly_is_what_both_generations_of_the_reference_use(reference):
    steps = (0, 1, 500, 999, 1000, 1001, 40_000, 79_999)
    assert shares(WarmupPoly, steps, **RECIPE, power=0.9) == pytest.approx([reference(s) for s in steps], rel=1e-9)


warmups = st.fixed_dictionaries(
    {
        "warmup_steps": st.integers(0, 50),
        "warmup_ratio": st.floats(1e-4, 1.0),
        "warmup": st.sampled_from(["exponential", "linear"]),
    }
)


@given(warmups, st.integers(1, 100), st.floats(0.1, 3.0))
def test_a_schedule_rises_to_one_and_falls_to_zero(warmup, decay_steps, power):
    peak = warmup["warmup_steps"]
    total = peak + decay_steps
    for kind, more in ((WarmupPoly, {"power": power}), (WarmupCosine, {})):
        found = shares(kind, [*range(total + 3), 10 * total], total_steps=total, **more, **warmup)
        assert all(type(share) is float and 0 <= share <= 1 for share in found)
        assert found[peak] == 1.0
        assert found[0] == pytest.approx(warmup["warmup_ratio"] if peak else 1.0)
        assert all(a <= b for a, b in pairwise(found[: peak + 1]))
        assert all(a > b for a, b in pairwise(found[peak : total + 1]))
        assert found[total:] == [0.0] * 4


@given(warmups, st.integers(0, 10**6))
def test_constant_stays_at_one_after_the_same_warmup(warmup, step):
    early = range(warmup["warmup_steps"])
    assert shares(WarmupConstant, [warmup["warmup_steps"] + step], **warmup) == [1.0]
    assert shares(WarmupConstant, early, **warmup) == shares(WarmupPoly, early, total_steps=100, **warmup)


def test_shapes_of_the_warmup_and_of_the_cosine():
    half = {"steps": [50], "warmup_steps": 100, "warmup_ratio": 0.04}
    assert shares(WarmupConstant, **half) == pytest.approx([0.2])  # geometric mean of 0.04 and 1
    assert shares(WarmupConstant, **half, warmup="linear") == pytest.approx([0.52])
    third = round(1000 + 79_000 / 3)
    assert shares(WarmupCosine, [third], **RECIPE) == pytest.approx([(1 + math.cos(math.pi / 3)) / 2], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "accepted"),
    [
        ({"warmup_steps": 100}, "fewer than the 100 steps"),
        ({"warmup_steps": -1}, "at least 0"),
        ({"warmup_ratio": 0}, r"\(0, 1\]"),
        ({"warmup": "cosine"}, r"exponential \| linear"),
        ({"power": 0}, "positive"),
    ],
)
def test_schedules_that_cannot_be_meant_are_named(wrong, accepted):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*{accepted}"):
        shares(WarmupPoly, [0], **{"total_steps": 100, "warmup_steps": 10, **wrong})


def test_an_optimizer_stays_fused_when_it_takes_up_the_state_of_one_that_was_not() -> None:
    weights = [nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.SGD(weights, lr=0.1, fused=True)
    optimizer.load_state_dict(torch.optim.SGD(weights, lr=0.1).state_dict())
    module: Any = SimpleNamespace(trainer=SimpleNamespace(optimizers=[optimizer]))
    SegmentationModule.on_train_start(module)
    assert optimizer.param_groups[0]["fused"] is True
