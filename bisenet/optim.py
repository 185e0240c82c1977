"""Parameter groups by rule, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn


class Rule(Protocol):
    layers: Sequence[str] | None
    kind: str
    lr_multiplier: float
    weight_decay: float | None


def parameter_groups(network: nn.Module, rules: Mapping[str, Rule], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    active = {n: r for n, r in rules.items() if r.layers is None or len(r.layers)}
    groups = {n: {"name": n, "params": [], "lr": lr * r.lr_multiplier,
                  "weight_decay": weight_decay if r.weight_decay is None else r.weight_decay} for n, r in active.items()}
    for name, p in network.named_parameters():
        for n, r in active.items():
            if r.layers is not None and not any(name.startswith(f"{l}.") for l in r.layers):
                continue
            if r.kind == "any" or (r.kind == "norm_bias") == (p.ndim <= 1):
                groups[n]["params"].append(p)
                break
        else:
            raise ValueError(name)
    return list(groups.values())


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{g['name']} {len(g['params'])} {g['lr']} {g['weight_decay']}" for g in groups)


def _warm(step, warmup_steps, warmup_ratio, warmup):
    a = step / warmup_steps
    return warmup_ratio ** (1 - a) if warmup == "exponential" else warmup_ratio + (1 - warmup_ratio) * a


def warmup_poly(step: int, *, total_steps: int, warmup_steps: int, warmup_ratio: float, power: float, warmup: str = "exponential") -> float:
    if step < warmup_steps:
        return _warm(step, warmup_steps, warmup_ratio, warmup)
    return max(0.0, 1 - (step - warmup_steps) / (total_steps - warmup_steps)) ** power


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, warmup_ratio: float, warmup: str = "exponential") -> float:
    if step < warmup_steps:
        return _warm(step, warmup_steps, warmup_ratio, warmup)
    return 0.5 + 0.5 * math.cos(math.pi * min(1, (step - warmup_steps) / (total_steps - warmup_steps)))


def constant(step: int, *, warmup_steps: int, warmup_ratio: float, warmup: str = "exponential") -> float:
    return _warm(step, warmup_steps, warmup_ratio, warmup) if step < warmup_steps else 1.0
