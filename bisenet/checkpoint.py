"""Reading what has been trained: our checkpoints, weights of the reference, pretrained backbones. No file runs code.

A checkpoint of ours holds under ``bisenet`` what prediction needs: the network's node, facts of the data, protocols and
classes. A file of the reference, github.com/CoinCheung/BiSeNet, is the state dict of a network and nothing else. Our
networks name their weights as it does, in both generations, so that the names tell which network it is.
"""

import hashlib
import importlib
import json
import logging
import os
import re
import reprlib
import socket
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bisenet.classes import ClassTable
from bisenet.inference import Protocol, Segmenter
from bisenet.runtimes import READERS, Exported, RuntimeNetwork, open_file

log = logging.getLogger(__name__)

NETWORKS = ("bisenet.networks.BiSeNetV1", "bisenet.networks.BiSeNetV2")
"""Classes that a file may name as its network."""
DATASETS = tuple(f"bisenet.data.{name}" for name in ("Cityscapes", "CamVid", "Listed", "Synthetic"))
"""Classes that a file may name as its data set."""
LARGEST_FILE = 16 * 2**30
"""Bytes; a larger file is not read."""
LARGEST_CONFIG = 2**20
"""Bytes of the ``config.json`` of a model folder."""

_WEIGHTS = "segmenter.network."  # before each name in the state dict of our checkpoints
_PARALLEL = "module."  # what DataParallel and its kin put before every name
_COUNTER = "num_batches_tracked"  # of every batch norm but those of InPlaceABN; no computation of ours reads it
_NODE_KEYS = ("_target_", "_partial_", "_convert_")  # of Hydra, beside the arguments
_DATA_KEYS = ("name", "mean", "std", "eval_window", "eval_short_side")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_TIMEOUT = 30  # seconds without an answer of a server


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and everything needed to use it, in plain values."""

    path: Path
    """The file it was read from."""
    network: dict[str, Any]
    """Node of the network: ``_target_`` and arguments, without ``n_classes``."""
    classes: ClassTable
    """Class table of the data set it was trained on."""
    data: dict[str, Any]
    """``name``, ``mean``, ``std``, ``eval_window`` and ``eval_short_side`` of that data set."""
    protocols: dict[str, dict[str, Any]]
    """Name -> fields of a :class:`Protocol`."""
    step: int | None
    """Optimisation steps taken; None: unknown."""
    weights: dict[str, Tensor]
    """State dict of the network."""
    hyper_parameters: dict[str, Any]
    """The configuration of the training as far as it is known, for an evaluation; may be empty."""

    def segmenter(self, protocols: Mapping[str, Protocol] | None = None, trust: Sequence[str] = ()) -> Segmenter:
        """The trained model in evaluation mode on the CPU, with its own protocols unless others are given.

        Raises:
            ValueError: a class that :func:`build` refuses, or weights that do not fit the network.
        """
        n_classes = self.classes.num_classes
        try:
            if self.network.get("_target_") in NETWORKS:  # before it costs memory
                _Differences(_shapes_of(self.network, n_classes), self.weights).require_fit()
            if sum(tensor.numel() * tensor.element_size() for tensor in self.weights.values()) > os.path.getsize(
                self.path
            ):
                raise ValueError("its weights claim more memory than the file has bytes")  # repeated by strides of 0
            with torch.random.fork_rng(devices=[]):  # the caller's generators are not ours
                network = build(self.network, trust, n_classes=n_classes)
            network.load_state_dict(self.weights)
            return self._around(network, protocols)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from error

    def _around(self, network: nn.Module, protocols: Mapping[str, Protocol] | None) -> Segmenter:
        chosen = protocols or {name: Protocol(**fields) for name, fields in self.protocols.items()}
        return Segmenter(network, self.classes, self.data["mean"], self.data["std"], chosen).eval()


@dataclass(frozen=True)
class ExportedCheckpoint(Checkpoint):
    """A file that ``bisenet export`` wrote, whose runtime takes the place of the network."""

    exported: Exported

    def segmenter(self, protocols: Mapping[str, Protocol] | None = None, trust: Sequence[str] = ()) -> Segmenter:
        """As of any checkpoint; there is nothing to trust."""
        try:
            normalization = (list(self.data[key]) for key in ("mean", "std"))
            return self._around(RuntimeNetwork(self.exported, self.classes.num_classes, *normalization), protocols)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------- writing and reading


def portable(network: Mapping[str, Any], segmenter: Segmenter, data: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds under ``bisenet``: plain values of a segmenter and of its nodes."""
    try:
        _require_plain({key: value for key, value in network.items() if key not in _NODE_KEYS}, "model.network")
    except ValueError as error:
        log.warning("this network can be trained, but its checkpoints cannot be loaded: %s", error)
    return {
        "format": 2,
        "network": dict(network),
        "data": {key: data.get(key) for key in _DATA_KEYS} | segmenter.normalization,
        "protocols": {name: asdict(protocol) for name, protocol in segmenter.protocols.items()},
        "classes": segmenter.classes.to_dict(),
    }


def write(
    path: Path, weights: Mapping[str, Tensor], step: int, portable: dict[str, Any], hyper_parameters: dict[str, Any]
) -> None:
    """Write a checkpoint to predict and evaluate with, from which no training can be resumed; replaces atomically."""
    state = {_WEIGHTS + name: tensor for name, tensor in weights.items()}
    content = {"state_dict": state, "global_step": step, "bisenet": portable, "hyper_parameters": hyper_parameters}
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(content, draft)
    os.replace(draft, path)


def load(
    path: str | PathLike[str],
    data: Mapping[str, Any] | None = None,
    protocols: Mapping[str, Protocol] | None = None,
    trust: Sequence[str] = (),
) -> Segmenter:
    """The trained model of what :func:`read` reads; arguments and errors as there and :meth:`Checkpoint.segmenter`."""
    return read(path, data).segmenter(protocols, trust)


def read(path: str | PathLike[str], data: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read what has been trained, of any kind.

    Args:
        path: a run directory (its ``checkpoints/last.ckpt``), a checkpoint of ours, weights of the reference, an
            exported file (``.onnx``, ``.xml``, ``.param``), or a folder of ``config.json`` and ``model.safetensors``.
        data: for weights of the reference, the data set that they were trained on: ``classes`` (a table, its name or
            its path), ``mean`` and ``std``, ``eval_short_side`` if there is one. Older BiSeNetV1 was always normalised
            as ImageNet, whatever ``data`` says. A checkpoint of ours takes none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is neither, or damaged; ``data`` missing, not needed or with other classes.
    """
    exported = open_file(path) if Path(path).suffix in READERS else None
    file, content = (exported.path, {**exported.facts, "state_dict": {}}) if exported else _read_content(path)
    if not _is_ours(content):
        return _complete(file, content, data)
    if data is not None:
        raise ValueError(f"data: {file} knows the data set it was trained on; accepted: no data here")
    try:
        entry, hyper_parameters = content["bisenet"], content.get("hyper_parameters", {})
        if "format" not in entry:
            entry, hyper_parameters = _from_format_1(entry)
        elif entry["format"] != 2:
            raise ValueError(f"format {entry['format']} is of a later version of bisenet")
        classes, step = ClassTable.from_dict(entry["classes"]), content["global_step"]
        network, facts, protocols = (dict(entry[key]) for key in ("network", "data", "protocols"))
        parts = file, network, classes, facts, protocols, step, _own_weights(content), dict(hyper_parameters)
        return ExportedCheckpoint(*parts, exported) if exported else Checkpoint(*parts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is a damaged checkpoint of bisenet: {error!r}") from error


def _read_content(path: str | PathLike[str]) -> tuple[Path, Any]:
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        return _read_folder(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: no file {file}; accepted: a .ckpt or .pth file, or a run directory with checkpoints/last.ckpt"
        )
    return file, read_tensors(file)


def _read_folder(folder: Path) -> tuple[Path, Any]:
    """A model folder by the hub's conventions, as what a checkpoint holds."""
    file, config = folder / "model.safetensors", folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"checkpoint: no file {file}, which belongs to {config}")
    try:
        if config.stat().st_size > LARGEST_CONFIG or file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"accepted: a config.json of at most {LARGEST_CONFIG} bytes, weights of {LARGEST_FILE}")
        state = {_WEIGHTS + name: tensor for name, tensor in load_file(file).items()}
        return file, {**json.loads(config.read_text(encoding="utf-8")), "state_dict": state}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is a damaged model folder: {error}") from error


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and "bisenet" in content


def _own_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix(_WEIGHTS): v for k, v in content["state_dict"].items() if k.startswith(_WEIGHTS)}


def _from_format_1(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What checkpoints held until version 0.1, as what they hold now, and hyperparameters to evaluate with."""
    config, data = entry["config"], dict(entry["config"]["data"])
    converted = {"network": config["model"]["network"], "protocols": config["protocol"], "classes": entry["classes"]}
    converted["data"] = {key: data.get(key) for key in _DATA_KEYS}
    kind, lists, scenes = (data.pop(key, None) for key in ("format", "lists", "synthetic"))
    arguments = {"camvid": {"lists": lists}, "listed": {"lists": lists}, "synthetic": scenes}.get(kind) or {}
    data["dataset"] = {"_target_": {name.split(".")[-1].lower(): name for name in DATASETS}.get(kind), **arguments}
    data["report_split"] = config.get("evaluation", {}).get("split") or data.get("report_split")
    return converted, {"name": config.get("name"), "data": data}


def _complete(file: Path, content: Any, data: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint of the reference's weights and the data set that they were trained on."""
    network, n_classes, weights = _recognise(file, content)
    if data is None:
        raise ValueError(
            f"data: {file} holds weights for {n_classes} classes and nothing else; accepted: the data set they were "
            "trained on, as data=cityscapes (its class table and normalisation)"
        )
    if missing := [key for key in ("classes", "mean", "std") if key not in data]:
        raise ValueError(f"data: got no {missing[0]}, accepted: classes, mean and std")
    classes = data["classes"]
    table = classes if isinstance(classes, ClassTable) else ClassTable.load(classes)
    if table.num_classes != n_classes:
        raise ValueError(
            f"data.classes: {table.name!r} has {table.num_classes} classes, the weights of {file} are for {n_classes}; "
            f"accepted: a data set or class table with {n_classes}"
        )
    facts = {key: data.get(key) for key in _DATA_KEYS} | {key: list(data[key]) for key in ("mean", "std")}
    if "norm" in network and network["generation"] == "older":
        facts |= _IMAGENET
    protocols = {"ss": {"short_side": data.get("eval_short_side")}}
    return Checkpoint(file, network, table, facts, protocols, None, weights, {})


# ---------------------------------------------------------------- files that come from others


def read_tensors(file: Path) -> Any:
    """What ``torch.save`` wrote, with ``weights_only=True``: tensors and plain values, never code.

    Raises:
        ValueError: anything else, and a damaged file; the message names the file and what is wrong with it.
    """
    try:
        _require_sound(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in any way
        kind, message = type(error).__name__, str(error)  # not passed on: it tells how to run what is in the file
    if wanted := re.search(r"GLOBAL (\S+)|TorchScript", message):
        why = f"it wants {wanted[1] or wanted[0]}, which is code; accepted: a state dict saved by "
        why += "torch.save(net.state_dict(), file)"
    else:
        line = message.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        why = line if kind == "ValueError" else f"{kind}: {line}" if line else kind
    raise ValueError(f"{file} cannot be read as tensors and plain values: {why}")


def _require_sound(file: Path) -> None:
    """Raise a ValueError if a file is too large, would grow when it is unpacked, or has lost a bit."""
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{size} bytes, accepted: at most {LARGEST_FILE} (bisenet.checkpoint.LARGEST_FILE)")
    if not zipfile.is_zipfile(file):  # of PyTorch before 1.6, or nothing that torch.load takes
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError("TorchScript")
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(
                f"its entry {packed[0]} is compressed; accepted: entries that are stored, as by torch.save"
            )
        # Counted from the first byte, so that PyTorch's own reader finds the same entries.
        if sum(entry.file_size for entry in entries) > size or min(entry.header_offset for entry in entries) != 0:
            raise ValueError(f"its entries hold more than its {size} bytes, or do not begin with the file")
        if damaged := archive.testzip():
            raise ValueError(f"its entry {damaged} is damaged: the checksum differs")


def build(
    node: Mapping[str, Any], trust: Sequence[str] = (), accepted: Sequence[str] = NETWORKS, *args: Any, **passed: Any
) -> Any:
    """Build what a node from a file names: a class of ours with plain arguments, and nothing else.

    Args:
        node: ``_target_``, a dotted path to a class, and its arguments.
        trust: dotted paths of modules whose classes, and those of all modules below them, may be named as well.
        accepted: dotted paths of the classes that may be named without trust.
        args: passed to the class, as ``passed``: what the file does not hold.

    Raises:
        ValueError: another class, or an argument that is not plain (numbers, text, booleans, null; short lists and
            mappings of them; no ``_target_``, no interpolation); the message names it.
    """
    name: Any = node.get("_target_")
    trusted = tuple(f"{prefix}." for prefix in ([trust] if isinstance(trust, str) else trust))
    if type(name) is not str or (name not in accepted and not name.startswith(trusted)):
        raise ValueError(
            f"_target_: got {reprlib.repr(name)}, accepted: {' | '.join(accepted)}; a class of your own, whose code is "
            f"run, takes trust=[{str(name).partition('.')[0][:40]}]"
        )
    arguments = {key: value for key, value in node.items() if key not in _NODE_KEYS}
    _require_plain(arguments, name, largest=64 if name in NETWORKS else 2**53)
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
        if not isinstance(target, type) or not (name in accepted or f"{target.__module__}.".startswith(trusted)):
            raise ValueError(f"_target_: got {name}, accepted: a class that is defined in what is trusted")
        return target(*args, **arguments, **passed)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _require_plain(value: Any, where: str, depth: int = 3, largest: float = 2**53) -> None:
    """Raise a ValueError if a value is nothing that a file may hold as an argument."""
    if type(value) in (list, tuple, dict):
        ok = depth > 0 and len(value) <= 64
        for key, item in (value.items() if isinstance(value, dict) else enumerate(value)) if ok else ():
            ok = ok and not str(key).startswith("_")
            _require_plain(item, f"{where}.{key}", depth - 1, largest)
    elif type(value) is str:
        ok = len(value) <= 4096 and "${" not in value
    else:
        ok = value is None or type(value) is bool or (type(value) in (int, float) and abs(value) <= largest)
    if not ok:
        limits = f"numbers up to {largest}, text, booleans, null, and short lists and mappings of them"
        raise ValueError(f"{where}: got {reprlib.repr(value)}, accepted from a file: {limits}")


class _WithoutInitialising(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def _shapes_of(node: Mapping[str, Any], n_classes: int) -> nn.Module:
    """A network of ours without memory for its weights."""
    with torch.device("meta"), _WithoutInitialising():  # random numbers there would import torch._dynamo, a second
        return build(node, n_classes=n_classes)


class _Differences:
    """Which tensors of a state dict a network takes: ``matched``, ``dropped``, ``missing``, of another ``shape``."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        given = {name: list(tensor.shape) for name, tensor in weights.items()}
        self.matched = [name for name in expected if given.get(name) == expected[name]]
        self.missing = [name for name in expected if name not in given and not name.endswith(_COUNTER)]
        self.dropped = [name for name in given if name not in expected]
        self.shape = [f"{n} {given[n]} for {shape}" for n, shape in expected.items() if given.get(n, shape) != shape]
        self.unfit = self.missing + self.shape  # each entry begins with the tensor's name

    def require_fit(self) -> None:
        """Raise a ValueError if the network would not be complete."""
        if self.unfit:
            raise ValueError(f"it misses, or has of another shape: {_listed(self.unfit)}")

    def __str__(self) -> str:
        parts = {"dropped": self.dropped, "missing": self.missing, "of another shape": self.shape}
        some = [f"{len(names)} {part} ({_listed(names, len(names))})" for part, names in parts.items() if names]
        return ", ".join([f"{len(self.matched)} tensors matched", *(some or ["nothing dropped, nothing missing"])])


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------- weights of the reference


def _recognise(file: Path, content: Any) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """Node, number of classes and weights of the network that names and shapes tell, which is logged."""
    refused = f"{file} was not written by bisenet: it has no 'bisenet' entry"
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{refused}, and it is no state dict of the reference: accepted are tensors by name")
    weights: dict[str, Tensor] = {str(name).removeprefix(_PARALLEL): tensor for name, tensor in content.items()}
    node, classifier = _describe(weights)
    if classifier not in weights:
        raise ValueError(
            f"{refused}, and its {len(weights)} tensors are of neither a BiSeNetV1 (cp.resnet.*, conv_out.conv_out.*) "
            f"nor a BiSeNetV2 (detail.*, head.conv_out.*): {_listed(list(weights))}"
        )
    n_classes = sum(weights[classifier].shape[:1])
    for aux in (True, False):  # auxiliary heads that are missing or incomplete are not needed to predict
        node["aux"] = aux
        differences = _Differences(_shapes_of(node, n_classes), weights)
        if not differences.unfit:
            break
    summary = ", ".join(str(value) if key == "_target_" else f"{key}={value}" for key, value in node.items())
    try:
        differences.require_fit()
    except ValueError as error:
        raise ValueError(f"{file}: its names are those of {summary}, but {error}") from None
    level = logging.WARNING if differences.dropped else logging.INFO
    renamed = sum(str(name).startswith(_PARALLEL) for name in content)
    prefix = f"{renamed} renamed ({_PARALLEL!r} taken off), " if renamed else ""
    log.log(level, "%s: %s, %d classes; %s%s", file, summary, n_classes, prefix, differences)
    return node, n_classes, {name: weights[name] for name in differences.matched}


def _describe(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """Node of the network without ``aux``, and the name of its classifier's weight; of other networks nothing."""
    if "cp.resnet.conv1.weight" in weights:
        two_path = "two_path" if "sp.conv1.conv.weight" in weights else "one_path"
        node = {
            "_target_": NETWORKS[0],
            "structure": "u_shape" if "cp.lateral8.conv.weight" in weights else two_path,
            "generation": "current" if "conv_out.conv_out.bias" in weights else "older",
            "norm": "bn" if any(name.endswith(_COUNTER) for name in weights) else "inplace_abn",
        }
        return node, "conv_out.conv_out.weight"
    if "detail.S1.0.conv.weight" in weights:
        is_current = "head.conv_out.1.weight" in weights
        layers = {name.split(".")[2] for name in weights if name.startswith("segment.S3.")}
        node = {
            "_target_": NETWORKS[1],
            "width_multiplier": sum(weights["detail.S1.0.conv.weight"].shape[:1]) / 64,
            "depth_multiplier": max(len(layers) - 1, 1),
            "generation": "current" if is_current else "older",
        }
        return node, "head.conv_out.1.weight" if is_current else "head.conv_out.weight"
    return {}, ""


# ---------------------------------------------------------------- weights to start from


def finetune(network: nn.Module, path: str | PathLike[str]) -> None:
    """Start a network from the weights of another: everything up to its heads, and of the heads what has their shape.

    So another number of classes keeps all but the classifiers. What is kept, dropped and missing is logged.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without weights of ours or of the reference, or of a network that differs before its heads.
    """
    file, content = _read_content(path)
    weights = _own_weights(content) if _is_ours(content) else _recognise(file, content)[2]
    differences = _Differences(network, weights)
    head_names: tuple[str, ...] = network.head_names  # type: ignore[assignment]
    heads = tuple(f"{head}." for head in head_names)
    if foreign := [name for name in differences.unfit if not name.startswith(heads)]:
        raise ValueError(
            f"finetune_from: {file} does not fit {type(network).__name__} before its heads: {_listed(foreign)}"
        )
    if any(_COUNTER in name for name in network.state_dict()) != any(_COUNTER in name for name in weights):
        raise ValueError(
            f"finetune_from: {file} and model.network.norm differ: one is inplace_abn, whose scale is |weight|"
        )
    network.load_state_dict({name: weights[name] for name in differences.matched}, strict=False)
    log.info("finetune from %s: %s", file, differences)


def load_backbone(network: nn.Module, backbone: str, source: str, sha256: str | None = None) -> None:
    """Load into a module of the network what fits by name and shape, and log what does not.

    Read are the state dict of a whole classifier (torchvision's ResNet-18, whose ``fc`` nothing here takes), and a dict
    of such state dicts by submodule (``backbone_v2.pth`` of CoinCheung/BiSeNet).

    Args:
        network: a new network.
        backbone: dotted name of the module; empty: the network itself.
        source: path or URL of the file, as :func:`fetch` takes it.
        sha256: its digest, likewise.

    Raises:
        ValueError: no such module or file, a file of another kind, or one of which less than half fits.
    """
    try:
        module = network.get_submodule(backbone)
    except AttributeError as error:
        raise ValueError(f"backbone: got {backbone!r}, accepted: a module of the network ({error})") from None
    file = fetch(source, sha256)
    given = {key: tensor for key, tensor in _flatten(read_tensors(file)).items() if not key.endswith(_COUNTER)}
    differences = _Differences(module, given)
    unused = differences.dropped + differences.shape
    summary = f"{file}: {len(differences.matched)} of its {len(given)} tensors fit {type(module).__name__}"
    summary += f"; unused: {_listed(unused)}" if unused else ""
    if 2 * len(differences.matched) < max(len(given), 1):
        raise ValueError(f"{summary}. Accepted: weights of this network's backbone, or null to train from scratch")
    module.load_state_dict({key: given[key] for key in differences.matched}, strict=False)
    log.info("pretrained weights: %s", summary)


def _flatten(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by dotted name."""
    if isinstance(content, Tensor):
        return {prefix: content}
    found: dict[str, Tensor] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        found |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def fetch(source: str, sha256: str | None = None) -> Path:
    """The file that a path or a URL names, its digest checked.

    Args:
        source: a path, or a URL (``https``, ``http``, ``file``), downloaded once to the cache of ``torch.hub``.
        sha256: the digest or its first 8 or more digits; None: the part of the file's name after the last ``-``, where
            that is 8 or more hexadecimal digits with a letter among them, else none: the digest is then logged.

    Raises:
        ValueError: no such file, no answer, or another digest; the message says what to do.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256: got {sha256!r}, accepted: null, or 8 to 64 hexadecimal digits in lower case")
    url = urlparse(source) if urlparse(source).scheme in ("http", "https", "file") else None
    name = Path(url.path if url else source).name
    file = Path(torch.hub.get_dir(), "checkpoints", name) if url else Path(source).expanduser()
    named = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[^.]+$", name)  # with a letter: else it may be a date
    expected = sha256 or (named and named[1])
    if url and not file.is_file():
        _download(source, file, expected)
    if not file.is_file():
        raise ValueError(f"got {source!r}, which is no file; accepted: a path, a URL, or null to train from scratch")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected is None:
        log.info("pretrained weights: %s has the sha256 %s; nothing to check it against", file, digest)
    elif not digest.startswith(expected):
        origin = "model.pretrained_sha256" if sha256 else "the end of its name"
        remedy = (
            "delete it to have it downloaded again" if url else "model.pretrained_sha256=<digest> takes it as it is"
        )
        raise ValueError(f"{file} has the sha256 {digest}, accepted after {origin}: {expected}...; {remedy}")
    return file


def _download(url: str, file: Path, sha256: str | None) -> None:
    """Stock, but not ``load_state_dict_from_url``, which takes no digest and checks no archive before it unpacks it."""
    log.info("downloading %s to %s", url, file)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{url} cannot be downloaded: {error}. Put the file into {file.parent}, or give its path instead of the "
            "URL, or null to train from scratch"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
