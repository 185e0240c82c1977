"""Parameter groups as rules over module names, learning rates as functions of the step, and the fp16 loss scale."""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bisenet.config import GroupRule


def parameter_groups(
    network: nn.Module, rules: Mapping[str, GroupRule], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Split the trainable parameters: each goes to the first rule that matches it.

    Args:
        network: whose parameters; one that is shared counts under its first name.
        rules: name of the group -> rule, in order.
        lr: learning rate of a group whose multiplier is 1.
        weight_decay: of the groups whose rule leaves it open.

    Returns:
        One ``{"name", "params", "lr", "weight_decay"}`` for each rule that is not switched off, for a torch optimizer.

    Raises:
        ValueError: a rule names a layer that does not exist or gets no parameter, or no rule takes a parameter.
    """
    modules = dict(network.named_modules())
    for name, rule in rules.items():
        if unknown := [layer for layer in rule.layers or () if layer not in modules]:
            there = ", ".join(child for child, _ in network.named_children())
            raise ValueError(f"rule {name!r}: no layers {unknown}; accepted: {there}, or modules inside them")

    active = {name: rule for name, rule in rules.items() if rule.layers is None or rule.layers}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in active}
    left_over = []
    for path, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        name = next((name for name, rule in active.items() if _matches(rule, path, parameter)), None)
        if name is None:
            left_over.append(path)
        else:
            members[name].append(parameter)
    if left_over:
        raise ValueError(f"parameters {left_over} match none of the rules {list(active)}; accepted: rules for all")
    for name, parameters in members.items():
        if not parameters:
            where = "any layer" if active[name].layers is None else f"layers {list(active[name].layers or ())}"
            raise ValueError(
                f"rule {name!r}: no trainable parameter of kind {active[name].kind!r} in {where} is left for it; "
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


def _matches(rule: GroupRule, path: str, parameter: nn.Parameter) -> bool:
    is_weight = parameter.ndim > 1
    inside = rule.layers is None or any(path.startswith(f"{layer}.") for layer in rule.layers)
    return inside and (rule.kind == "any" or is_weight == (rule.kind == "weight"))


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    """One line for each of :func:`parameter_groups`: name, tensors, parameters, learning rate, weight decay."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    for group in groups:
        size = sum(parameter.numel() for parameter in group["params"])
        rows.append(
            (group["name"], str(len(group["params"])), f"{size:,}", f"{group['lr']:g}", f"{group['weight_decay']:g}")
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def warmup_poly(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    warmup_ratio: float,
    power: float = 0.9,
    warmup: str = "exponential",
) -> float:
    """Share of the learning rate at ``step``: warmup to 1, then (1 - progress)^power (arXiv 1808.00897, section 4.1).

    Progress is counted over the steps that the warmup leaves of ``total_steps``, as both generations of the reference
    do. The share is 0 from ``total_steps`` on.

    Args:
        step: optimisation steps done, from 0.
        total_steps: length of the training, warmup included.
        warmup_steps: steps until the share is 1; 0: none.
        warmup_ratio: share at step 0, in (0, 1].
        power: exponent of the decay.
        warmup: ``exponential`` (the logarithm of the share is a line) or ``linear``.

    Raises:
        ValueError: nothing is left after the warmup.
    """
    progress = _progress(step, total_steps, warmup_steps)
    return _warmup(step, warmup_steps, warmup_ratio, warmup) if progress < 0 else (1 - progress) ** power


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, warmup_ratio: float, warmup: str = "exponential"
) -> float:
    """As :func:`warmup_poly`, with half a cosine wave as the decay (arXiv 1608.03983).

    Departs: the reference measures the wave from step 0 although it is used after the warmup only, so that it starts
    below 1 and does not end at 0; here it starts after the warmup.
    """
    progress = _progress(step, total_steps, warmup_steps)
    if progress < 0:
        return _warmup(step, warmup_steps, warmup_ratio, warmup)
    return (1 + math.cos(math.pi * progress)) / 2


def constant(step: int, *, warmup_steps: int, warmup_ratio: float, warmup: str = "exponential") -> float:
    """As :func:`warmup_poly`, without a decay."""
    return _warmup(step, warmup_steps, warmup_ratio, warmup) if step < warmup_steps else 1.0


def _warmup(step: int, steps: int, ratio: float, shape: str) -> float:
    if shape == "exponential":
        return ratio ** (1 - step / steps)
    if shape == "linear":
        return ratio + (1 - ratio) * step / steps
    raise ValueError(f"warmup: got {shape!r}, accepted: exponential | linear")


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the decay that is done, negative in the warmup; past the end it stays 1, lest a power turn complex."""
    if total_steps <= warmup_steps:
        raise ValueError(f"total_steps: got {total_steps}, accepted: more than warmup_steps, which is {warmup_steps}")
    return min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))


class CountingGradScaler(torch.amp.GradScaler):
    """Loss scaling for fp16 that counts the steps it skipped because a gradient overflowed.

    Args:
        device: ``cuda`` or ``cpu``.
        **kwargs: passed to ``torch.amp.GradScaler``.
    """

    def __init__(self, device: str = "cuda", **kwargs: Any) -> None:
        super().__init__(device, **kwargs)
        self._on = device

    # Made when they are first used: by then each process has chosen its own device.

    @cached_property
    def _one(self) -> Tensor:
        return torch.ones((), device=self._on)

    @cached_property
    def _overflows(self) -> Tensor:
        return torch.zeros((), device=self._on)

    @property
    def overflows(self) -> int:
        """Steps skipped so far; reading it waits for the device."""
        return int(self._overflows)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Adapt the scale after a step; it falls when, and only when, the step overflowed. Nothing waits."""
        before = self.scale(self._one)
        super().update(new_scale)
        self._overflows.add_(self.scale(self._one) < before)

    def state_dict(self) -> dict[str, Any]:
        """The state of ``torch.amp.GradScaler``, and the count."""
        return super().state_dict() | {"overflows": self.overflows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a scale and a count."""
        state = dict(state_dict)
        self._overflows.fill_(state.pop("overflows"))
        super().load_state_dict(state)
