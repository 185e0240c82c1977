"""Reading trained weights: our checkpoints, files of the reference, pretrained backbones. No file runs code.

A checkpoint of ours holds under ``bisenet`` what prediction needs: the network's node, facts of the data, protocols and
classes. A file of the reference, github.com/CoinCheung/BiSeNet, is the state dict of a network and nothing else. Our
networks name their weights as both generations of the reference do, so the names tell which network a file is of.
"""

import hashlib
import importlib
import json
import logging
import operator
import re
import reprlib
import socket
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bisenet import conf_dir
from bisenet.classes import ClassTable
from bisenet.files import replacing
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
_PARALLEL = "module."  # prefix of every name that DataParallel and DistributedDataParallel saved
_COUNTER = "num_batches_tracked"  # a buffer of every batch norm except InPlaceABN's; we never read it
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # values in a file may be nested to any depth
_LIBRARIES = re.compile(
    r"(torch\.optim|torch\.optim\.lr_scheduler|albumentations|lightning\.pytorch\.callbacks)\.[A-Z]\w*"
)
_NODE_KEYS = ("_target_", "_partial_", "_convert_")  # Hydra's own keys, which are no arguments
_DATA_KEYS = ("name", "mean", "std", "eval_window", "eval_short_side")
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_TIMEOUT = 30  # seconds to wait for a server's answer


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and everything needed to use it, in plain values."""

    path: Path
    network: dict[str, Any]
    """Node of the network: ``_target_`` and arguments, without ``n_classes``."""
    classes: ClassTable
    data: dict[str, Any]
    """``name``, ``mean``, ``std``, ``eval_window`` and ``eval_short_side`` of the data set it was trained on."""
    protocols: dict[str, dict[str, Any]]
    """Name -> fields of a :class:`Protocol`."""
    step: int | None
    """Optimisation steps taken; None: unknown."""
    weights: dict[str, Tensor]
    hyper_parameters: dict[str, Any]
    """The configuration of the training, as far as the file holds it; may be empty."""

    def data_node(self) -> dict[str, Any]:
        """The node of the data set it was trained on. Its ``dataset`` is left for :func:`build` to check.

        Raises:
            ValueError: the file holds no such node, or a value that a file may not hold, such as an interpolation.
        """
        node = self.hyper_parameters.get("data")
        if not isinstance(node, dict) or not isinstance(node.get("dataset"), dict) or "root" not in node:
            raise ValueError(f"{self.path} does not say what it was trained on; accepted: data=<option>")
        _require_plain({key: node[key] for key in node if key not in (*_NODE_KEYS, "dataset")}, f"{self.path}: data")
        return node

    def segmenter(self, protocols: Mapping[str, Protocol] | None = None, trust: Sequence[str] = ()) -> Segmenter:
        """The trained model in evaluation mode on the CPU, with its own protocols unless others are given.

        Raises:
            ValueError: a class that :func:`build` refuses, or weights that do not fit the network.
        """
        try:
            network = self._load_network(trust)
            chosen = protocols or {name: Protocol(**fields) for name, fields in self.protocols.items()}
            return Segmenter(network, self.classes, self.data["mean"], self.data["std"], chosen).eval()
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path}: {' '.join(str(error).split())}") from error

    def _load_network(self, trust: Sequence[str]) -> nn.Module:
        n_classes = self.classes.num_classes
        claimed = sum(tensor.nbytes for tensor in self.weights.values())  # a stride of 0 repeats few bytes many times
        if claimed > self.path.stat().st_size:
            raise ValueError("its weights claim more memory than the file has bytes")
        if self.network.get("_target_") in NETWORKS:  # built without initial weights, which take time
            network = _shapes_of(self.network, n_classes)
            _Differences(network, self.weights).require_fit()  # before memory is allocated
            memory = {key: torch.empty(t.shape, dtype=t.dtype) for key, t in network.state_dict().items()}
            network.load_state_dict(memory, assign=True)
        else:
            with torch.random.fork_rng(devices=[]):  # leave the caller's random generator alone
                network = build(self.network, trust, n_classes=n_classes)
        network.load_state_dict(self.weights)
        return network


@dataclass(frozen=True)
class ExportedCheckpoint(Checkpoint):
    """A file that ``bisenet export`` wrote; its runtime takes the place of the network."""

    exported: Exported

    def _load_network(self, trust: Sequence[str]) -> nn.Module:
        mean, std = (list(self.data[key]) for key in ("mean", "std"))
        return RuntimeNetwork(self.exported, self.classes.num_classes, mean, std)


# ---------------------------------------------------------------- writing and reading


def portable(network: Mapping[str, Any], segmenter: Segmenter, data: Mapping[str, Any]) -> dict[str, Any]:
    """The entry ``bisenet`` of a checkpoint: plain values from which a segmenter can be built again.

    Args:
        network: node of the network; if a file may not hold it, that is logged.
        segmenter: the segmenter, for normalisation, protocols and classes.
        data: node of the data.
    """
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
    """Write, atomically, a checkpoint for prediction and evaluation; no training can be resumed from it."""
    state = {_WEIGHTS + name: tensor for name, tensor in weights.items()}
    content = {"state_dict": state, "global_step": step, "bisenet": portable, "hyper_parameters": hyper_parameters}
    torch.save(content, saved := BytesIO())  # written to a full disk directly, it may end in a RuntimeError
    with replacing(path) as stream:
        stream.write(saved.getbuffer())


def newest(run_dir: Path) -> Path | None:
    """The checkpoint that a run continues from: the last, or the previous if that is damaged; None if there is none.

    Raises:
        ValueError: all are damaged.
    """
    found = [file for name in ("last", "previous") if (file := run_dir / "checkpoints" / f"{name}.ckpt").exists()]
    for file in found:
        try:
            read_tensors(file)
            return file
        except ValueError as error:
            if file == found[-1]:
                raise
            log.warning("%s; the run goes on from %s", error, found[-1])
    return None


def read(path: str | PathLike[str], data: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a trained network of any kind.

    Args:
        path: a run directory (its ``checkpoints/last.ckpt``), a checkpoint of ours, weights of the reference, an
            exported file (``.onnx``, ``.xml``, ``.param``), or a folder of ``config.json`` and ``model.safetensors``.
        data: for weights of the reference only, the data set that they were trained on: ``classes`` (a table, its name
            or its path), ``mean``, ``std`` and optionally ``eval_short_side``. For older BiSeNetV1, which was always
            trained with ImageNet's mean and std, these replace those of ``data``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is of no such kind, or damaged; ``data`` is missing, not needed or has other classes.
    """
    exported = open_file(path) if Path(path).suffix in READERS else None
    file, content, weights = (exported.path, exported.facts, {}) if exported else _read_content(path)
    if weights is None:
        return _complete(file, content, data)
    if data is not None:
        raise ValueError(f"data: {file} knows the data set it was trained on; accepted: no data here")
    try:
        entry, hyper_parameters = content["bisenet"], content.get("hyper_parameters", {})
        if "format" not in entry:
            entry, hyper_parameters = _from_format_1(entry)
        elif entry["format"] != 2:
            raise ValueError(f"format {entry['format']} is of a later version of bisenet")
        facts, protocols, table = ({**entry[key]} for key in ("data", "protocols", "classes"))
        _require_plain([facts, protocols, table], "bisenet", depth=6, most=2**17)
        classes, step = ClassTable.from_dict(table), operator.index(content["global_step"])
        facts = {key: facts[key] for key in _DATA_KEYS}
        parts = file, {**entry["network"]}, classes, facts, protocols, step, weights, {**hyper_parameters}
        return ExportedCheckpoint(*parts, exported) if exported else Checkpoint(*parts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:800]
        raise ValueError(f"{file} is no checkpoint of bisenet, or a damaged one: {why}") from error


def _read_content(path: str | PathLike[str]) -> tuple[Path, Any, dict[str, Tensor] | None]:
    """The file that a path stands for, its content, and the network's weights if it is a checkpoint of ours."""
    path = Path(path).expanduser()
    inside = [path / "last.ckpt", path / "checkpoints" / "last.ckpt"]
    file = next(filter(Path.is_file, inside), inside[-1]) if path.is_dir() else path
    if (path / "config.json").is_file():
        file = path / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(
            f"checkpoint: no file {file}; accepted: a .ckpt or .pth file, or a run directory with checkpoints/last.ckpt"
        )
    content = _read_folder(path) if file.suffix == ".safetensors" else read_tensors(file)
    if not isinstance(content, dict) or "bisenet" not in content:
        return file, content, None
    if not (state := _state_dict(content.get("state_dict"))):
        raise ValueError(
            f"{file} is no checkpoint of bisenet, or a damaged one: it has no state_dict of tensors by name"
        )
    return file, content, {k.removeprefix(_WEIGHTS): v for k, v in state.items() if k.startswith(_WEIGHTS)}


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The content itself if it maps names to dense tensors of real numbers, else an empty dict."""
    dense = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(v, Tensor) and v.layout is torch.strided and not v.is_complex()
        for name, v in content.items()
    )
    return content if dense else {}


def _read_folder(folder: Path) -> Any:
    """Read a model folder (Hugging Face's file names) into the content of a checkpoint."""
    file, config = folder / "model.safetensors", folder / "config.json"
    try:
        if config.stat().st_size > LARGEST_CONFIG or file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"accepted: a config.json of at most {LARGEST_CONFIG} bytes, weights of {LARGEST_FILE}")
        state = {_WEIGHTS + name: tensor for name, tensor in load_file(file).items()}
        return {**json.loads(config.read_text(encoding="utf-8")), "state_dict": state}
    except (SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} is a damaged model folder: {error}") from error


def _from_format_1(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the entry of a checkpoint of version 0.1 to the present entry and the hyperparameters to evaluate it."""
    config, data = entry["config"], dict(entry["config"]["data"])
    converted = {"network": config["model"]["network"], "protocols": config["protocol"], "classes": entry["classes"]}
    converted["data"] = {key: data.get(key) for key in _DATA_KEYS}
    kind, lists, scenes = (data.pop(key, None) for key in ("format", "lists", "synthetic"))
    arguments = {"camvid": {"lists": lists}, "listed": {"lists": lists}, "synthetic": scenes}.get(kind) or {}
    data["dataset"] = {"_target_": {name.split(".")[-1].lower(): name for name in DATASETS}.get(kind), **arguments}
    data["report_split"] = config.get("evaluation", {}).get("split") or data.get("report_split")
    return converted, {"name": config.get("name"), "data": data}


def _complete(file: Path, content: Any, data: Mapping[str, Any] | None) -> Checkpoint:
    """A checkpoint from weights of the reference and the data set that they were trained on, as for :func:`read`."""
    network, n_classes, weights = _recognise(file, content)
    if data is None:
        accepted = "the data set they were trained on, as data=cityscapes (its class table and normalisation)"
        raise ValueError(f"data: {file} holds weights for {n_classes} classes and nothing else; accepted: {accepted}")
    if missing := [key for key in ("classes", "mean", "std") if key not in data]:
        raise ValueError(f"data: got no {missing[0]}, accepted: classes, mean and std")
    classes = data["classes"]
    table = classes if isinstance(classes, ClassTable) else ClassTable.load(classes)
    if table.num_classes != n_classes:
        raise ValueError(f"data.classes: {table.name!r} has {table.num_classes}, accepted for {file}: {n_classes}")
    facts = {key: data.get(key) for key in _DATA_KEYS} | {key: list(data[key]) for key in ("mean", "std")}
    if "norm" in network and network["generation"] == "older":
        facts |= _IMAGENET
    protocols = {"ss": {"short_side": data.get("eval_short_side")}}
    return Checkpoint(file, network, table, facts, protocols, None, weights, {})


# ---------------------------------------------------------------- files that come from others


def read_tensors(file: Path) -> Any:
    """Load a file that ``torch.save`` wrote, with ``weights_only=True``: tensors and plain values, never code.

    Raises:
        ValueError: the file holds anything else, or is damaged; the message names the file and the reason.
    """
    try:
        _require_sound(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can raise anything
        kind, message = type(error).__name__, str(error)  # torch's message tells how to run the file's code: hide it
    if wanted := re.search(r"GLOBAL (\S+)", message):
        why = f"it wants {wanted[1]}, which is code; accepted: a state dict saved by torch.save(net.state_dict(), file)"
    else:
        line = message.rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        why = line if kind == "ValueError" else f"{kind}: {line}" if line else kind
    raise ValueError(f"{file} cannot be read as tensors and plain values: {why}")


def _require_sound(file: Path) -> None:
    """Raise a ValueError if a file is too large, would grow when unpacked, or fails its checksums."""
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{size} bytes, accepted: at most {LARGEST_FILE} (bisenet.checkpoint.LARGEST_FILE)")
    if not zipfile.is_zipfile(file):  # written by PyTorch before 1.6, or refused by torch.load
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if packed := [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its entry {packed[0]} is compressed; accepted: stored ones, as by torch.save")
        # The first entry must begin at byte 0, so that PyTorch's own reader finds the same entries.
        if sum(entry.file_size for entry in entries) > size or min(entry.header_offset for entry in entries) != 0:
            raise ValueError(f"its entries hold more than its {size} bytes, or do not begin with the file")
        if damaged := archive.testzip():
            raise ValueError(f"its entry {damaged} is damaged: the checksum differs")


def build(
    node: Mapping[str, Any], trust: Sequence[str] = (), accepted: Sequence[str] = NETWORKS, *args: Any, **passed: Any
) -> Any:
    """Build the object of a node from a file: a class of ours with plain arguments, and nothing else.

    Args:
        node: ``_target_``, a dotted path to a class, and its arguments: numbers, text, booleans, null, and short lists
            and mappings of them, without ``_target_`` or interpolation.
        trust: dotted paths of modules; their classes, and those of all modules below them, are accepted as well.
        accepted: dotted paths of the classes that are accepted without trust.
        args, passed: further arguments, which do not come from the file.

    Raises:
        ValueError: a class or an argument that is not accepted; the message names it.
    """
    name: Any = node.get("_target_")
    if type(name) is not str or (name not in accepted and not name.startswith(_prefixes(trust))):
        _refuse(name, " | ".join(accepted))
    arguments = {key: value for key, value in node.items() if key not in _NODE_KEYS}
    _require_plain(arguments, name, largest=64 if name in NETWORKS else 2**53)
    target = _find(name, accepted, trust)
    if not isinstance(target, type):
        raise ValueError(f"_target_: got {name}, accepted: a class")
    try:
        return target(*args, **arguments, **passed)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _prefixes(trust: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}." for prefix in ([trust] if isinstance(trust, str) else trust))


def _refuse(name: Any, accepted: str) -> NoReturn:
    module = name.partition(".")[0][:40] if isinstance(name, str) else "module"
    own = f"to run code of your own, give trust=[{module}]"
    raise ValueError(f"_target_: got {_SHORT.repr(name)}, accepted: {accepted}; {own}")


def _find(name: str, accepted: Collection[str], trust: Sequence[str]) -> Any:
    """The object of a dotted name; a trusted module must define it, not only import it."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if name not in accepted and not f"{getattr(found, '__module__', '')}.".startswith(_prefixes(trust)):
        raise ValueError(f"_target_: got {name}, accepted: a name that a trusted module defines itself")
    return found


def require_known(config: Any, trust: Sequence[str] = ()) -> None:
    """Check that a run's configuration names no foreign code, since resuming the run executes what it names.

    Accepted are targets and resolvers that ``conf/`` names, optimizers of torch, callbacks of Lightning, transforms of
    albumentations, and what is trusted.

    Args:
        config: plain containers, before interpolation.
        trust: as for :func:`build`; may also hold names of resolvers, such as ``oc.env``.

    Raises:
        ValueError: another target or resolver.
    """
    files = Path(conf_dir()).rglob("*.yaml")
    known = {name for file in files for name in _names(yaml.safe_load(file.read_text(encoding="utf-8")))}
    for name in _names(config):
        if name in known or _LIBRARIES.fullmatch(name) or name.partition(":")[0] in trust:
            continue
        if not name.startswith(_prefixes(trust)):
            _refuse(name, "what conf/ names")
        _find(name, (), trust)


def _names(node: Any) -> Iterator[str]:
    """All targets, and the text after ``${`` of interpolations that are more than the key of another value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [str(value)] if key == "_target_" else _names(value)
    elif isinstance(node, list):
        for value in node:
            yield from _names(value)
    elif isinstance(node, str):
        yield from (name for name in re.findall(r"\$\{([^${}]*)", node) if not re.fullmatch(r"[\w.-]+", name))


def _require_plain(value: Any, where: str, depth: int = 3, largest: float = 2**53, most: int = 1024) -> None:
    """Raise a ValueError unless a value is plain, nested at most ``depth`` deep, with at most ``most`` values in all.

    Plain are None, booleans, numbers up to ``largest``, text without interpolation, and lists and mappings of these.
    """
    pending, count = [(value, where, depth)], 1  # few bytes can hold the same list many times: count each of them
    while pending:
        value, where, depth = pending.pop()
        if type(value) in (list, tuple, dict):
            count += len(value)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            ok = depth > 0 and count <= most
            pending += [(item, f"{where}.{key}", depth - 1) for key, item in items] if ok else []
            ok = ok and all(type(key) is str and key[:1] != "_" for key in value if isinstance(value, dict))
        elif type(value) is str:
            ok = len(value) <= 4096 and "${" not in value
        else:
            ok = value is None or type(value) is bool or (type(value) in (int, float) and abs(value) <= largest)
        if not ok:
            limits = f"numbers up to {largest}, text, booleans, null, and at most {most} of them in lists and mappings"
            raise ValueError(f"{where}: got {_SHORT.repr(value)}, accepted from a file: {limits}")


def _shapes_of(node: Mapping[str, Any], n_classes: int) -> nn.Module:
    """A network of ours on the meta device: shapes without memory for the weights."""

    # Drawing random numbers on the meta device would import torch._dynamo, which takes a second.
    class WithoutInitialising(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))

    with torch.device("meta"), WithoutInitialising():
        return build(node, n_classes=n_classes)


class _Differences:
    """How a state dict fits a network, by tensor: ``matched``, ``dropped``, ``missing`` or of another ``shape``."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        given = {name: list(tensor.shape) for name, tensor in weights.items()}
        self.matched = [name for name in expected if given.get(name) == expected[name]]
        self.missing = [name for name in expected if name not in given and not name.endswith(_COUNTER)]
        self.dropped = [name for name in given if name not in expected]
        self.shape = [f"{n} {given[n]} for {shape}" for n, shape in expected.items() if given.get(n, shape) != shape]
        self.unfit = self.missing + self.shape  # each entry begins with the tensor's name

    def require_fit(self, prefix: str = "") -> None:
        """Raise a ValueError if the state dict does not fill the whole network."""
        if self.unfit:
            raise ValueError(f"{prefix}these tensors are missing or of another shape: {_listed(self.unfit)}")

    def __str__(self) -> str:
        parts = {"dropped": self.dropped, "missing": self.missing, "of another shape": self.shape}
        some = [f"{len(names)} {part} ({', '.join(names)})" for part, names in parts.items() if names]
        return ", ".join([f"{len(self.matched)} tensors matched", *(some or ["nothing dropped, nothing missing"])])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# ---------------------------------------------------------------- weights of the reference


def _recognise(file: Path, content: Any) -> tuple[dict[str, Any], int, dict[str, Tensor]]:
    """Recognise and log a network of the reference by the names and shapes of its weights.

    Returns:
        Its node, its number of classes, and its weights under our names.
    """
    weights = {name.removeprefix(_PARALLEL): tensor for name, tensor in _state_dict(content).items()}
    node, classifier = _describe(weights)
    if classifier not in weights:
        raise ValueError(
            f"{file} was not written by bisenet (no 'bisenet' entry), nor is it a state dict of the reference's "
            "BiSeNetV1 (cp.resnet.*, conv_out.conv_out.*) or BiSeNetV2 (detail.*, head.conv_out.*): "
            f"{_listed(list(weights)) or 'no tensors by name'}"
        )
    n_classes = sum(weights[classifier].shape[:1])
    for aux in (True, False):  # without auxiliary heads if any is missing or incomplete: prediction needs none
        node["aux"] = aux
        differences = _Differences(_shapes_of(node, n_classes), weights)
        if not differences.unfit:
            break
    summary = ", ".join(f"{key}={value}" for key, value in node.items())
    differences.require_fit(f"{file}: its names are those of {summary}, but ")
    level = logging.WARNING if differences.dropped else logging.INFO
    renamed = sum(str(name).startswith(_PARALLEL) for name in content)
    text = "%s: %s, %d classes; %d renamed (%r taken off), %s"
    log.log(level, text, file, summary, n_classes, renamed, _PARALLEL, differences)
    return node, n_classes, {name: weights[name] for name in differences.matched}


def _describe(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """Node of the network without ``aux``, and the name of its classifier's weight; both empty for other networks."""
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
    """Load another network's weights into a network: all tensors before the heads, and those in the heads that fit.

    With another number of classes, only the classifiers keep their initial weights. Matched, dropped and missing
    tensors are logged.

    Raises:
        ValueError: the networks differ before their heads, or the file is refused as by :func:`read`.
        FileNotFoundError: no such file.
    """
    file, content, weights = _read_content(path)
    weights = _recognise(file, content)[2] if weights is None else weights
    differences = _Differences(network, weights)
    head_names: tuple[str, ...] = network.head_names  # type: ignore[assignment]
    heads = tuple(f"{head}." for head in head_names)
    if foreign := [name for name in differences.unfit if not name.startswith(heads)]:
        where = f"{type(network).__name__} before its heads"
        raise ValueError(f"finetune_from: {file} does not fit {where}: {_listed(foreign)}")
    if any(_COUNTER in name for name in network.state_dict()) != any(_COUNTER in name for name in weights):
        raise ValueError(f"finetune_from: {file} and model.network.norm differ: one is inplace_abn (scale |weight|)")
    network.load_state_dict({name: weights[name] for name in differences.matched}, strict=False)
    log.info("finetune from %s: %s", file, differences)


def load_backbone(network: nn.Module, backbone: str, source: str, sha256: str | None = None) -> None:
    """Load the tensors that fit by name and shape into a module of the network, and log those that do not.

    The file holds the state dict of a classifier (torchvision's ResNet-18, whose ``fc`` stays unused), or a dict of
    state dicts by submodule (``backbone_v2.pth`` of CoinCheung/BiSeNet).

    Args:
        network: a new network.
        backbone: dotted name of the module; empty: the network itself.
        source, sha256: the file and its digest, as for :func:`fetch`.

    Raises:
        ValueError: no such module or file, a file of another kind, or a file of whose tensors less than half fit.
    """
    try:
        module = network.get_submodule(backbone)
    except AttributeError as error:
        raise ValueError(f"backbone: got {backbone!r}, accepted: a module of the network ({error})") from None
    file = fetch(source, sha256)
    content = read_tensors(file)
    nested = {"": content, **content} if isinstance(content, dict) else {}
    given = {
        f"{part}.{key}".lstrip("."): tensor
        for part, state in nested.items() if isinstance(state, dict)
        for key, tensor in state.items() if isinstance(tensor, Tensor) and not str(key).endswith(_COUNTER)
    }  # fmt: skip
    differences = _Differences(module, given)
    unused = differences.dropped + differences.shape
    summary = f"{file}: {len(differences.matched)} of its {len(given)} tensors fit {type(module).__name__}"
    summary += f"; unused: {_listed(unused)}" if unused else ""
    if 2 * len(differences.matched) < max(len(given), 1):
        raise ValueError(f"{summary}. Accepted: weights of this network's backbone, or null to train from scratch")
    module.load_state_dict({key: given[key] for key in differences.matched}, strict=False)
    log.info("pretrained weights: %s", summary)


def fetch(source: str, sha256: str | None = None) -> Path:
    """Find or download a file, and check its digest.

    Args:
        source: a path, or a URL (``https``, ``http``, ``file``), downloaded once to the cache of ``torch.hub``.
        sha256: the digest or its first 8 or more digits. None: the part of the file's name after the last ``-``, if it
            is 8 to 64 hexadecimal digits with a letter among them; otherwise the digest is logged and not checked.

    Raises:
        ValueError: no such file, no answer, or another digest; the message says what to do.
    """
    if sha256 is not None and not re.fullmatch("[0-9a-f]{8,64}", sha256):
        raise ValueError(f"sha256: got {sha256!r}, accepted: null, or 8 to 64 hexadecimal digits in lower case")
    url = urlparse(source) if urlparse(source).scheme in ("http", "https", "file") else None
    name = Path(url.path if url else source).name
    file = Path(torch.hub.get_dir(), "checkpoints", name) if url else Path(source).expanduser()
    named = re.search(r"-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[^.]+$", name)  # digits alone may be a date
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
        remedy = "delete it to have it downloaded again, or set model.pretrained_sha256"
        raise ValueError(f"{file} has the sha256 {digest}, accepted after {origin}: {expected}...; {remedy}")
    return file


def _download(url: str, file: Path, sha256: str | None) -> None:
    """Download with ``torch.hub``; its ``load_state_dict_from_url`` takes no digest and unpacks archives unchecked."""
    log.info("downloading %s to %s", url, file)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torch.hub sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), sha256)
    except (OSError, RuntimeError) as error:
        remedy = f"Put the file into {file.parent}, or give its path, or null to train from scratch"
        raise ValueError(f"{url} cannot be downloaded: {error}. {remedy}") from error
    finally:
        socket.setdefaulttimeout(before)
