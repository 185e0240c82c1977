"""Parameter groups are a partition that the rules describe; schedules are what the reference's two generations used."""

import math
from itertools import pairwise

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from bisenet import config
from bisenet.config import GroupRule
from bisenet.optim import constant, describe_groups, parameter_groups, warmup_cosine, warmup_poly

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
    config.register()
    with initialize_config_dir(str(config.conf_dir()), version_base="1.3"):
        cfg = compose("train", list(overrides))
    with torch.device("meta"):
        network = config.instantiate("model.network", cfg.model.network, n_classes=19)
    groups = parameter_groups(network, config.typed(cfg).optimizer.groups, lr=0.01, weight_decay=5e-4)
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
        ({"heads": GroupRule(["head", "tail"])}, r"'heads': no layers \['tail'\]; accepted: backbone, head, head2"),
        ({"heads": GroupRule(["hea"])}, r"no layers \['hea'\]"),
        ({"decay": GroupRule(kind="weight")}, r"'backbone.1.weight'.*'head2.bias'\] match none .* \['decay'\]"),
        ({"all": GroupRule(), "heads": GroupRule(["head"])}, r"rule 'heads': .*'any' in layers \['head'\] is left"),
        ({"all": GroupRule(), "bias": GroupRule(kind="norm_bias")}, r"rule 'bias': .*'norm_bias' in any layer is left"),
    ],
)
def test_rules_that_cannot_be_meant_are_named(rules, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(tiny_network(), rules, lr=1.0, weight_decay=0.0)


def test_the_split_is_described_in_a_table():
    rules = {"heads": GroupRule(["head", "head2"], lr_multiplier=10.0, weight_decay=0.0), "rest": GroupRule()}
    table = describe_groups(parameter_groups(tiny_network(), rules, lr=0.005, weight_decay=5e-4))
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["heads", "4", "20", "0.05", "0"],
        ["rest", "4", "132", "0.005", "0.0005"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


# --- schedules -------------------------------------------------------------------------------------------------------

RECIPE = {"total_steps": 80_000, "warmup_steps": 1000, "warmup_ratio": 0.1}


def reference_current(step: int) -> float:
    return 0.1 ** (1 - step / 1000) if step < 1000 else (1 - (step - 1000) / (80_000 - 1000)) ** 0.9


def reference_older(step: int) -> float:
    """Rates from 1e-3 to 1e-2, relative to the latter."""
    if step <= 1000:
        return 1e-3 * (1e-2 / 1e-3) ** (step / 1000) / 1e-2
    return (1 - (step - 1000) / (80_000.0 - 1000)) ** 0.9


@pytest.mark.parametrize("reference", [reference_current, reference_older])
def test_poly_is_what_both_generations_of_the_reference_use(reference):
    for step in (0, 1, 500, 999, 1000, 1001, 40_000, 79_999):
        assert warmup_poly(step, **RECIPE, power=0.9) == pytest.approx(reference(step), rel=1e-9)


warmups = st.fixed_dictionaries(
    {
        "warmup_steps": st.integers(0, 50),
        "warmup_ratio": st.floats(1e-4, 1.0),
        "warmup": st.sampled_from(["exponential", "linear"]),
    }
)


@given(warmups, st.integers(1, 100), st.floats(0.1, 3.0))
def test_a_schedule_rises_to_one_and_falls_to_zero(warmup, decay_steps, power):
    total = warmup["warmup_steps"] + decay_steps
    for schedule in (
        lambda step: warmup_poly(step, total_steps=total, power=power, **warmup),
        lambda step: warmup_cosine(step, total_steps=total, **warmup),
    ):
        shares = [schedule(step) for step in range(total + 3)]
        assert all(type(share) is float and 0 <= share <= 1 for share in shares)
        peak = warmup["warmup_steps"]
        assert shares[peak] == 1.0
        assert shares[0] == pytest.approx(warmup["warmup_ratio"] if peak else 1.0)
        assert all(a <= b for a, b in pairwise(shares[: peak + 1]))
        assert all(a > b for a, b in pairwise(shares[peak : total + 1]))
        assert shares[total:] == [0.0, 0.0, 0.0]
        assert schedule(10 * total) == 0.0


@given(warmups, st.integers(0, 10**6))
def test_constant_stays_at_one_after_the_same_warmup(warmup, step):
    later = warmup["warmup_steps"] + step
    assert constant(later, **warmup) == 1.0
    for early in range(warmup["warmup_steps"]):
        assert constant(early, **warmup) == warmup_poly(early, total_steps=100, power=0.9, **warmup)


def test_shapes_of_the_warmup_and_of_the_cosine():
    assert constant(50, warmup_steps=100, warmup_ratio=0.04) == pytest.approx(0.2)  # geometric mean of 0.04 and 1
    assert constant(50, warmup_steps=100, warmup_ratio=0.04, warmup="linear") == pytest.approx(0.52)
    third = 1000 + 79_000 / 3
    assert warmup_cosine(round(third), **RECIPE) == pytest.approx((1 + math.cos(math.pi / 3)) / 2, abs=1e-4)


@pytest.mark.parametrize("schedule", [warmup_poly, warmup_cosine])
@pytest.mark.parametrize("step", [0, 100])
def test_schedules_that_cannot_be_meant_are_named(schedule, step):
    with pytest.raises(ValueError, match="total_steps: got 100, accepted: more than warmup_steps, which is 100"):
        schedule(step, total_steps=100, warmup_steps=100, warmup_ratio=0.1)
    with pytest.raises(ValueError, match=r"warmup: got 'cosine', accepted: exponential \| linear"):
        schedule(0, total_steps=100, warmup_steps=10, warmup_ratio=0.1, warmup="cosine")
