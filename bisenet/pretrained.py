"""Weights that a training starts from: fetched once, checked, and loaded as far as they fit."""

import hashlib
import logging
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from bisenet.checkpoint import read_tensors

log = logging.getLogger(__name__)

_TIMEOUT = 30  # seconds without an answer


def fetch(source: str, sha256: str | None = None) -> Path:
    """The file that a path or a URL names, its digest checked.

    Args:
        source: a path, or a URL (``https``, ``http``, ``file``), downloaded once to the cache of ``torch.hub``.
        sha256: the digest or its first digits; None: the part of the file's name after the last ``-``, where that is 8
            or more hexadecimal digits with a letter among them, else none: the digest is then logged.

    Raises:
        ValueError: no such file, no answer, or another digest; the message says what to do.
    """
    url = source if urlparse(source).scheme in ("http", "https", "file") else None
    name = Path(urlparse(source).path if url else source).name
    file = Path(torch.hub.get_dir(), "checkpoints", name) if url else Path(source).expanduser()
    named = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[^.]+$", name)  # with a letter: else it may be a date
    expected = sha256 or (named and named.group(1))
    if url and not file.is_file():
        _download(url, file, expected)
    if not file.is_file():
        raise ValueError(f"got {source!r}, which is no file; accepted: a path, a URL, or null to train from scratch")

    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is None:
        log.info("pretrained weights: %s has the sha256 %s; nothing to check it against", file, digest)
    elif not digest.startswith(expected):
        source = "model.pretrained_sha256" if sha256 else "the end of its name"
        advice = (
            "delete it to have it downloaded again" if url else "model.pretrained_sha256=<digest> takes it as it is"
        )
        raise ValueError(f"{file} has the sha256 {digest}, accepted after {source}: {expected}...; {advice}")
    return file


def _download(url: str, file: Path, sha256: str | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    log.info("downloading %s to %s", url, file)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub sets none
    try:
        torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{url} cannot be downloaded: {error}. Put the file into {file.parent}, or give its path instead of the "
            "URL, or null to train from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def load_backbone(backbone: nn.Module, file: Path) -> None:
    """Load into a module what fits by name and shape, and log what does not.

    Read are the state dict of a whole classifier (torchvision's ResNet-18, whose ``fc`` nothing here takes), and a dict
    of such state dicts by submodule (``backbone_v2.pth`` of CoinCheung/BiSeNet).

    Raises:
        ValueError: a file of another kind, or one of which less than half fits.
    """
    counters = ".num_batches_tracked"  # of batch norms, which use them only without a momentum
    given = {key: tensor for key, tensor in _flatten(read_tensors(file)).items() if not key.endswith(counters)}
    own = {key: tensor for key, tensor in backbone.state_dict().items() if not key.endswith(counters)}
    fitting = {key: tensor for key, tensor in given.items() if key in own and own[key].shape == tensor.shape}
    unused = [f"{key} {tuple(given[key].shape)}" for key in given if key not in fitting]
    summary = f"{file}: {len(fitting)} of {len(given)} entries fit the {len(own)} of {type(backbone).__name__}"
    if 2 * len(fitting) < len(given) or not fitting:
        raise ValueError(
            f"{summary}; not so {', '.join(unused[:5])} ... Accepted: weights of this network's backbone, or null to "
            "train from scratch"
        )
    backbone.load_state_dict(fitting, strict=False)
    log.info("pretrained weights: %s%s", summary, f"; unused: {', '.join(unused[:5])}" if unused else "")


def _flatten(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted name."""
    if isinstance(content, Tensor):
        return {prefix: content}
    found: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found
