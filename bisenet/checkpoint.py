"""What a checkpoint carries beside weights, and reading it back without running foreign code."""

import os
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisenet.classes import ClassTable

_KEY = "bisenet"
_NETWORK = "segmenter.network."


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and everything needed to use it."""

    path: Path
    """The file it was read from."""
    config: dict[str, Any]
    """The resolved configuration of the experiment, plain values."""
    classes: ClassTable
    """Class table of the data set it was trained on."""
    step: int
    """Optimisation steps taken."""
    weights: dict[str, Tensor]
    """State dict of the network."""


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
    path = Path(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: no file {file}; accepted: a .ckpt file, or a run directory with checkpoints/last.ckpt"
        )
    return file


def read(path: str | PathLike[str]) -> Checkpoint:
    """Read a checkpoint with ``weights_only=True``: tensors and plain values, never code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint of ours.
    """
    file = locate(path)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in any way
        raise ValueError(f"{file} cannot be read as a checkpoint of tensors and plain values: {error}") from error
    if not isinstance(content, dict) or _KEY not in content:
        raise ValueError(f"{file} was not written by bisenet: it has no {_KEY!r} entry")
    return Checkpoint(
        path=file,
        config=content[_KEY]["config"],
        classes=ClassTable.from_dict(content[_KEY]["classes"]),
        step=content["global_step"],
        weights={k.removeprefix(_NETWORK): v for k, v in content["state_dict"].items() if k.startswith(_NETWORK)},
    )
