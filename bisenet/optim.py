"""Parameter groups as rules over module names, and learning rates as functions of the step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class GroupRule:
    """Which parameters a group takes, and their learning rate and weight decay.

    Raises:
        ValueError: a value outside its range.
    """

    layers: Sequence[str] | None = None
    """Dotted names of the modules whose parameters match; None: all modules; an empty list: the rule is off."""
    kind: str = "any"
    """``weight`` (two or more dimensions), ``norm_bias`` (at most one: norm scales, shifts and biases) or ``any``."""
    lr_multiplier: float = 1.0
    """Factor on the optimizer's learning rate, at least 0."""
    weight_decay: float | None = None
    """Weight decay, at least 0; None: the optimizer's."""

    def __post_init__(self) -> None:
        if isinstance(self.layers, str):  # each letter would count as a name
            raise ValueError(f"layers: got {self.layers!r}, accepted: null or a list of module names")
        if self.kind not in ("weight", "norm_bias", "any"):
            raise ValueError(f"kind: got {self.kind!r}, accepted: weight | norm_bias | any")
        for key in ("lr_multiplier", "weight_decay"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
                raise ValueError(f"{key}: got {value!r}, accepted: a number of at least 0")

    def matches(self, path: str, parameter: nn.Parameter) -> bool:
        """Whether the rule takes a parameter."""
        inside = self.layers is None or any(path.startswith(f"{layer}.") for layer in self.layers)
        return inside and (self.kind == "any" or (parameter.ndim > 1) == (self.kind == "weight"))


def parameter_groups(
    network: nn.Module, rules: Mapping[str, GroupRule], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Split a network's trainable parameters into groups: each parameter goes to the first rule that matches it.

    Args:
        network: the network; a shared parameter counts under its first name.
        rules: name of the group -> rule, in order.
        lr: learning rate of a group whose multiplier is 1.
        weight_decay: weight decay of a group whose rule sets none.

    Returns:
        One ``{"name", "params", "lr", "weight_decay"}`` for each rule that is not switched off, for a torch optimizer.

    Raises:
        ValueError: a rule names a layer that does not exist, a rule gets no parameter, or a parameter matches no rule.
    """
    modules = dict(network.named_modules())
    for name, rule in rules.items():
        if unknown := [layer for layer in rule.layers or () if layer not in modules]:
            there = ", ".join(child for child, _ in network.named_children())
            raise ValueError(f"{name}.layers: no layers {unknown}; accepted: {there}, or modules inside them")

    active = {name: rule for name, rule in rules.items() if rule.layers is None or rule.layers}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in active}
    for path, parameter in network.named_parameters():
        if parameter.requires_grad:
            name = next((name for name, rule in active.items() if rule.matches(path, parameter)), None)
            if name is None:
                raise ValueError(f"no rule among {list(active)} takes the parameter {path}; accepted: rules for all")
            members[name].append(parameter)
    for name, parameters in members.items():
        if not parameters:
            where = f"layers {list(active[name].layers or ())}" if active[name].layers else "any layer"
            raise ValueError(
                f"{name}: no trainable parameter of kind {active[name].kind!r} in {where} is left for it; "
                "accepted: a rule that takes one, or layers: [] to switch it off"
            )
    return [
        {
            "name": name,
            "params": members[name],
            "lr": lr * rule.lr_multiplier,
            "weight_decay": weight_decay if rule.weight_decay is None else rule.weight_decay,
        }
        for name, rule in active.items()
    ]


class WarmupConstant(LambdaLR):
    """A warmup, then the full learning rate.

    Args:
        optimizer: the optimizer whose learning rates are set.
        warmup_steps: steps until the full learning rate; 0: no warmup.
        warmup_ratio: share of the learning rate at step 0, in (0, 1].
        warmup: how the share rises to 1: ``exponential`` (its logarithm is linear in the step) or ``linear``.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, warmup_ratio: float = 0.1, warmup: str = "exponential"
    ) -> None:
        if not warmup_steps >= 0:
            raise ValueError(f"warmup_steps: got {warmup_steps}, accepted: an integer of at least 0")
        if not 0 < warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio: got {warmup_ratio}, accepted: a number in (0, 1]")
        if warmup not in ("exponential", "linear"):
            raise ValueError(f"warmup: got {warmup!r}, accepted: exponential | linear")
        self.warmup_steps, self.warmup_ratio, self.warmup = warmup_steps, warmup_ratio, warmup
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        """Share of the learning rate after ``step`` optimisation steps."""
        if step >= self.warmup_steps:
            return self.decay(step)
        done, ratio = step / self.warmup_steps, self.warmup_ratio
        return ratio ** (1 - done) if self.warmup == "exponential" else ratio + (1 - ratio) * done

    def decay(self, step: int) -> float:
        """The share at a step after the warmup."""
        return 1.0


class WarmupPoly(WarmupConstant):
    """A warmup, then the share (1 - progress)^power (arXiv 1808.00897, section 4.1).

    Progress rises from 0 at the end of the warmup to 1 at ``total_steps``, as in both generations of the reference.
    The learning rate is 0 from ``total_steps`` on.

    Args:
        optimizer: the optimizer whose learning rates are set.
        total_steps: length of the training, warmup included.
        power: exponent of the decay, above 0.
        **warmup: ``warmup_steps``, ``warmup_ratio`` and ``warmup`` of :class:`WarmupConstant`.

    Raises:
        ValueError: a value outside its range, or no step is left after the warmup.
    """

    def __init__(self, optimizer: Optimizer, *, total_steps: int, power: float = 0.9, **warmup: Any) -> None:
        if not 0 < power < math.inf:
            raise ValueError(f"power: got {power}, accepted: a positive number")
        if not total_steps > (steps := warmup.get("warmup_steps", 0)):
            raise ValueError(f"warmup_steps: got {steps}, accepted: fewer than the {total_steps} steps of the training")
        self.total_steps, self.power = total_steps, power
        super().__init__(optimizer, **warmup)

    def progress(self, step: int) -> float:
        """Progress of the decay at a step after the warmup, in [0, 1]; 1 from ``total_steps`` on."""
        return min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))

    def decay(self, step: int) -> float:
        """The share at a step after the warmup."""
        return (1 - self.progress(step)) ** self.power


class WarmupCosine(WarmupPoly):
    """A warmup, then half a cosine wave from 1 to 0 (arXiv 1608.03983).

    Departs: here the wave starts at the end of the warmup. The reference measures it from step 0, although it is used
    only after the warmup, so that it starts below 1 and does not end at 0.
    """

    def __init__(self, optimizer: Optimizer, *, total_steps: int, **warmup: Any) -> None:
        super().__init__(optimizer, total_steps=total_steps, **warmup)

    def decay(self, step: int) -> float:
        """The share at a step after the warmup."""
        return (1 + math.cos(math.pi * self.progress(step))) / 2
