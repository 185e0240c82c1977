"""What a checkpoint carries beside weights, and reading one without running foreign code: ours, and the reference's.

A file of the reference, github.com/CoinCheung/BiSeNet, is the state dict of a network and nothing else. Our networks
name their weights as it does, in both generations, so that the names tell which network it is.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bisenet.classes import ClassTable
from bisenet.networks import BiSeNetV1, BiSeNetV2
from bisenet.networks.blocks import SegmentationNetwork

log = logging.getLogger(__name__)

_KEY = "bisenet"
_NETWORK = "segmenter.network."
_PARALLEL = "module."  # what DataParallel and its kin put before every name
_COUNTER = "num_batches_tracked"  # of every batch norm but those of InPlaceABN; no computation of ours reads it
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_V1_OPTIONS = {"two_path": "bisenetv1", "one_path": "bisenetv1_diss", "u_shape": "bisenetv1_ushape"}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and everything needed to use it."""

    path: Path
    """The file it was read from."""
    config: dict[str, Any]
    """The resolved configuration of the experiment, plain values."""
    classes: ClassTable
    """Class table of the data set it was trained on."""
    step: int | None
    """Optimisation steps taken; None: unknown."""
    weights: dict[str, Tensor]
    """State dict of the network."""


@dataclass(frozen=True)
class Published:
    """Weights without a configuration, and what their names and shapes tell."""

    path: Path
    """The file they were read from."""
    model: str
    """Option of ``conf/model``."""
    network: dict[str, Any]
    """Arguments of that option's network."""
    n_classes: int
    """Channels of the logits."""
    weights: dict[str, Tensor]
    """State dict of the network."""
    normalisation: dict[str, list[float]] = field(default_factory=dict)
    """``mean`` and ``std`` where all weights of this kind were trained with the same, whatever the data set."""


def attach(checkpoint: dict[str, Any], config: dict[str, Any], classes: ClassTable) -> None:
    """Put configuration and class table into a Lightning checkpoint that is about to be saved."""
    checkpoint[_KEY] = {"config": config, "classes": classes.to_dict()}


def write(path: Path, weights: dict[str, Tensor], step: int, config: dict[str, Any], classes: ClassTable) -> None:
    """Write a checkpoint to predict and evaluate with, from which no training can be resumed; replaces atomically."""
    content = {"state_dict": {_NETWORK + name: tensor for name, tensor in weights.items()}, "global_step": step}
    attach(content, config, classes)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(content, draft)
    os.replace(draft, path)


def locate(path: str | PathLike[str]) -> Path:
    """The checkpoint file of a file or a run directory.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path).expanduser()
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: no file {file}; accepted: a .ckpt or .pth file, or a run directory with checkpoints/last.ckpt"
        )
    return file


def read_tensors(file: Path) -> Any:
    """What ``torch.save`` wrote, with ``weights_only=True``: tensors and plain values, never code.

    Raises:
        ValueError: anything else; the message names the file and what is wrong with it.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in any way
        kind, told = type(error).__name__, str(error)  # not passed on: it tells how to run what is in the file
    wanted = re.search(r"GLOBAL (\S+)|TorchScript", told)
    if wanted:
        why = f"it wants {wanted[1] or wanted[0]}, which is code; accepted: a state dict saved by "
        why += "torch.save(net.state_dict(), file)"
    else:
        line = told.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        why = f"{kind}: {line}" if line else kind
    raise ValueError(f"{file} cannot be read as tensors and plain values: {why}")


def read(path: str | PathLike[str]) -> Checkpoint:
    """Read a checkpoint of ours with ``weights_only=True``: tensors and plain values, never code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint of ours.
    """
    found = read_any(path)
    if isinstance(found, Published):
        raise ValueError(f"{found.path} was not written by bisenet: it holds the weights of a {found.model} alone")
    return found


def read_any(path: str | PathLike[str]) -> Checkpoint | Published:
    """Read a checkpoint of ours, or a state dict with the names of the reference, with ``weights_only=True``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither.
    """
    file = locate(path)
    content = read_tensors(file)
    if not isinstance(content, dict) or _KEY not in content:
        return _recognise(file, content)
    return Checkpoint(
        path=file,
        config=content[_KEY]["config"],
        classes=ClassTable.from_dict(content[_KEY]["classes"]),
        step=content["global_step"],
        weights={k.removeprefix(_NETWORK): v for k, v in content["state_dict"].items() if k.startswith(_NETWORK)},
    )


def finetune(network: nn.Module, path: str | PathLike[str]) -> None:
    """Start a network from the weights of another: everything up to its heads, and of the heads what has their shape.

    So another number of classes keeps all but the classifiers. What is kept, dropped and missing is logged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without weights of ours or of the reference, or of a network that differs before its heads.
    """
    found = read_any(path)
    differences = _Differences(network, found.weights)
    head_names: tuple[str, ...] = network.head_names  # type: ignore[assignment]
    heads = tuple(f"{head}." for head in head_names)
    if foreign := [name for name in differences.unfit if not name.startswith(heads)]:
        raise ValueError(
            f"finetune_from: {found.path} does not fit {type(network).__name__} before its heads: {_listed(foreign)}"
        )
    if any(_COUNTER in name for name in network.state_dict()) != any(_COUNTER in name for name in found.weights):
        raise ValueError(
            f"finetune_from: {found.path} and model.network.norm differ: one is inplace_abn, whose scale is |weight|"
        )
    kept = {name: found.weights[name] for name in differences.matched}
    network.load_state_dict(kept, strict=False)
    log.info("finetune from %s: %s", found.path, differences)


class _Differences:
    """Which tensors of a state dict a network takes: ``matched``, ``dropped``, ``missing`` and of another ``shape``."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        expected = network.state_dict()
        shared = [name for name in expected if name in weights]
        self.matched = [name for name in shared if weights[name].shape == expected[name].shape]
        self.missing = [name for name in expected if name not in weights and not name.endswith(_COUNTER)]
        self.dropped = [name for name in weights if name not in expected]
        self.shape = [
            f"{name} {list(weights[name].shape)} for {list(expected[name].shape)}"
            for name in shared
            if weights[name].shape != expected[name].shape
        ]

    @property
    def unfit(self) -> list[str]:
        """What keeps the network from being complete; each entry starts with the tensor's name."""
        return self.missing + self.shape

    def __str__(self) -> str:
        parts = {"dropped": self.dropped, "missing": self.missing, "of another shape": self.shape}
        told = [f"{len(names)} {part} ({_listed(names, len(names))})" for part, names in parts.items() if names]
        return ", ".join([f"{len(self.matched)} tensors matched", *(told or ["nothing dropped, nothing missing"])])


def _listed(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _recognise(file: Path, content: Any) -> Published:
    """Tell network, generation, norm, auxiliary heads and number of classes from names and shapes, and say so."""
    refused = f"{file} was not written by bisenet: it has no {_KEY!r} entry"
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{refused}, and it is no state dict of the reference: accepted are tensors by name")
    renamed = sum(name.startswith(_PARALLEL) for name in content)
    weights: dict[str, Tensor] = {name.removeprefix(_PARALLEL): tensor for name, tensor in content.items()}
    described = _describe_v1(weights) or _describe_v2(weights)
    if described is None:
        raise ValueError(
            f"{refused}, and its {len(weights)} tensors are of neither a BiSeNetV1 (cp.resnet.*, conv_out.conv_out.*) "
            f"nor a BiSeNetV2 (detail.*, head.conv_out.*): {_listed(list(weights))}"
        )
    family, model, arguments, n_classes = described
    for aux in (True, False):  # auxiliary heads that are missing or incomplete are not needed to predict
        arguments["aux"] = aux
        with torch.device("meta"):
            differences = _Differences(family(n_classes, **arguments), weights)
        if not differences.unfit:
            break
    told = ", ".join(f"{key}={value}" for key, value in arguments.items())
    if differences.unfit:
        raise ValueError(
            f"{file}: its names are those of {model} ({told}), but it misses, or has of another shape: "
            f"{_listed(differences.unfit)}"
        )
    level = logging.WARNING if differences.dropped else logging.INFO
    prefix = f"{renamed} renamed ({_PARALLEL!r} taken off), " if renamed else ""
    log.log(level, "%s: %s (%s, %d classes); %s%s", file, model, told, n_classes, prefix, differences)
    older_v1 = family is BiSeNetV1 and arguments["generation"] == "older"
    return Published(
        path=file,
        model=model,
        network=arguments,
        n_classes=n_classes,
        weights={name: weights[name] for name in differences.matched},
        normalisation=_IMAGENET if older_v1 else {},
    )


_Description = tuple[type[SegmentationNetwork], str, dict[str, Any], int]  # class, option, arguments, classes


def _describe_v1(weights: Mapping[str, Tensor]) -> _Description | None:
    if "cp.resnet.conv1.weight" not in weights or "conv_out.conv_out.weight" not in weights:
        return None
    structure = "one_path"
    if "cp.lateral8.conv.weight" in weights:
        structure = "u_shape"
    elif "sp.conv1.conv.weight" in weights:
        structure = "two_path"
    arguments = {
        "structure": structure,
        "generation": "current" if "conv_out.conv_out.bias" in weights else "older",
        "norm": "bn" if any(name.endswith(_COUNTER) for name in weights) else "inplace_abn",
    }
    return BiSeNetV1, _V1_OPTIONS[structure], arguments, len(weights["conv_out.conv_out.weight"])


def _describe_v2(weights: Mapping[str, Tensor]) -> _Description | None:
    generation = "current" if "head.conv_out.1.weight" in weights else "older"
    classifier = "head.conv_out.1.weight" if generation == "current" else "head.conv_out.weight"
    if "detail.S1.0.conv.weight" not in weights or classifier not in weights:
        return None
    layers = {name.split(".")[2] for name in weights if name.startswith("segment.S3.")}
    arguments = {
        "width_multiplier": len(weights["detail.S1.0.conv.weight"]) / 64,
        "depth_multiplier": max(len(layers) - 1, 1),
        "generation": generation,
    }
    large = arguments["depth_multiplier"] > 1
    return BiSeNetV2, "bisenetv2_large" if large else "bisenetv2", arguments, len(weights[classifier])
