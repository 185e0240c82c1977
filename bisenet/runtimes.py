"""Run exported files in ONNX Runtime, OpenVINO or ncnn. Loading a file runs no code from it.

The input ``image`` of an exported file is RGB float32 (B, 3, H, W): raw in [0, 255], or normalised if the file was
exported with ``normalization=outside``. Its ``output`` has the size of the image: a ``mask`` of train ids, uint8
(B, H, W), or ``logits`` or ``probabilities``, float32 (B, C, H, W). JSON in the file describes it, see
:attr:`Exported.facts`.

>>> exported = open_file("model.onnx")
>>> output = exported.run(np.zeros((1, 3, 512, 1024), np.float32))
"""

import importlib
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bisenet.networks import SegmentationOutput

LARGEST_FILE = 2**31
"""Most bytes of a file and its weights; larger ones are not read. ONNX files cannot be larger."""
KEY = "bisenet"
"""Key of the facts (JSON) in the metadata of a file."""

OUTPUTS = ("mask", "logits", "probabilities")
NORMALIZATIONS = ("inside", "outside")

_LARGEST_FACTS = 2**20  # bytes
_TINY = torch.finfo(torch.float32).tiny

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Exported:
    """An exported file, loaded."""

    path: Path
    facts: dict[str, Any]
    """The content of a checkpoint without its weights, and under ``export`` how the file was made."""
    runtime: str
    """Name and version of the runtime."""
    run: Run
    """Input (B, 3, H, W) float32 -> output. If the file has a fixed batch or size, it takes only that one."""


def import_extra(module: str, extra: str) -> Any:
    """Import a module that an extra of the package installs; if it is missing, a ValueError names the extra."""
    if module in ("openvino", "nncf"):
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # else they send telemetry
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ValueError(f"{error.name} is not installed: pip install 'bisenet[{extra}]' brings it") from None


def to_onnx(program: Any) -> bytes:
    """Convert a program of ``torch.export`` with one input and one output to ONNX; names: ``image``, ``output``."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(module, "export")
    for name in ("onnx_ir", "onnxscript", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they log every step
    made = torch.onnx.export(
        program, dynamo=True, input_names=["image"], output_names=["output"], external_data=False, verbose=False
    )
    assert made is not None
    return made.model_proto.SerializeToString()


def run_onnx(runtime: str, model: bytes, threads: int, precision: str = "f32") -> Run:
    """Load a model of :func:`to_onnx` in ``onnxruntime`` (f32 only) or ``openvino`` (f32, bf16 or f16)."""
    module = import_extra(runtime, "export")
    if runtime == "openvino":
        return _openvino(module, model, threads, precision)[1]
    if precision != "f32":
        raise ValueError(f"precision {precision} of {runtime}: accepted: f32")
    return _onnx(module, model, threads)[1]


def open_file(path: str | PathLike[str], threads: int | None = None) -> Exported:
    """Load an exported file: ``.onnx``, the ``.xml`` of OpenVINO, or the ``.param`` of ncnn, to run on the CPU.

    Args:
        path: the file; the weights of OpenVINO and ncnn (``.bin``) and the facts of ncnn (``.json``) lie beside it.
        threads: threads of a run; None: as many as torch uses.

    Raises:
        FileNotFoundError: the file, or one that must lie beside it, does not exist.
        ValueError: the file is damaged or was not written by an export, or its runtime is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix not in READERS:
        raise ValueError(f"{path}: accepted: a file with the suffix {' | '.join(READERS)}")
    runtime, beside, reader = READERS[path.suffix]
    files = [path, *(path.with_suffix(suffix) for suffix in beside)]
    if missing := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"checkpoint: no file {missing[0]}")
    if (size := sum(file.stat().st_size for file in files)) > LARGEST_FILE:
        raise ValueError(f"{path}: {size} bytes, accepted: at most {LARGEST_FILE} (bisenet.runtimes.LARGEST_FILE)")
    module = import_extra(runtime, "export")
    try:
        text, run = reader(module, path, threads or torch.get_num_threads())
    except Exception as error:  # each runtime has its own errors
        raise ValueError(f"{path} cannot be read by {module.__name__}: {' '.join(str(error).split())[:200]}") from error
    try:
        facts: Any = json.loads(text) if 0 < len(text) <= _LARGEST_FACTS else None
        made = facts["export"]
        sides = [made["batch"], *(made["size"] or (None, None))]
        wrong = made["output"] not in OUTPUTS or made["normalization"] not in NORMALIZATIONS or len(sides) != 3
        if wrong or not all(side is None or (type(side) is int and 1 <= side <= 2**16) for side in sides):
            raise ValueError(f"export: {made}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by bisenet export, or is damaged: {error!r}") from error
    version = getattr(module, "__version__", "")
    return Exported(path, facts, f"{module.__name__} {version.partition('-')[0]}", run)


def _onnx(onnxruntime: Any, model: Path | bytes, threads: int) -> tuple[str, Run]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    text = session.get_modelmeta().custom_metadata_map.get(KEY, "")
    return text, lambda image: session.run(None, {"image": image})[0]


def _openvino(openvino: Any, model: Path | bytes, threads: int, precision: str = "f32") -> tuple[str, Run]:
    core = openvino.Core()
    network = core.read_model(model)
    text = network.get_rt_info(KEY).value if network.has_rt_info(KEY) else ""
    # By default OpenVINO computes in bfloat16 on processors that support it.
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(network, "CPU", options)
    return text, lambda image: compiled(image)[0]


def _ncnn(ncnn: Any, path: Path, threads: int) -> tuple[str, Run]:
    text = path.with_suffix(".json").read_text(encoding="utf-8")
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)  # the precision of computing; a file with fp16 weights still loads
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("no network in its .param, or not its weights in its .bin")

    def run_one(image: np.ndarray) -> np.ndarray:
        image = np.ascontiguousarray(image)  # a Mat assumes this, and does not keep the array alive
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return np.array(extractor.extract("out0")[1])

    return text, lambda images: np.stack([run_one(image) for image in images])


READERS: dict[str, tuple[str, tuple[str, ...], Callable[[Any, Path, int], tuple[str, Run]]]] = {
    ".onnx": ("onnxruntime", (), _onnx),
    ".xml": ("openvino", (".bin",), _openvino),
    ".param": ("ncnn", (".bin", ".json"), _ncnn),
}
"""Suffix of an exported file -> its runtime, the suffixes of the files beside it, and the function that reads it."""


class RuntimeNetwork(nn.Module):
    """An exported file as a network: a normalised image (B, 3, H, W) -> logits at the size of the image.

    For a file that outputs probabilities the logits are their logarithms, which changes no prediction. For a file that
    outputs masks they are 1 for the predicted class and 0 for the others, which is exact for a protocol of one whole
    view at the size of the image; with several views, the masks vote.

    Args:
        exported: the file.
        n_classes: channels of the logits.
        mean, std: values in [0, 1] that images are normalised with.
    """

    head_names = ("output",)
    align_corners = False
    mean: Tensor
    std: Tensor

    def __init__(self, exported: Exported, n_classes: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.exported, self.n_classes = exported, n_classes
        made = exported.facts["export"]
        self.raw, self.batch, self.size = made["normalization"] == "inside", made["batch"], made["size"]
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> SegmentationOutput:
        """Run the file, in batches of its fixed size if it has one.

        Raises:
            ValueError: the file takes images of another size.
        """
        if self.size and list(image.shape[-2:]) != list(self.size):
            height, width = self.size
            raise ValueError(
                f"{self.exported.path} takes images of {height} x {width} pixels only, and the protocol shows it "
                f"{image.shape[-2]} x {image.shape[-1]}; accepted: an export with size=null, or of that size"
            )
        image = image.float() * self.std + self.mean if self.raw else image.float()
        batch = self.batch or len(image)
        padded = F.pad(image, (0, 0) * 3 + (0, -len(image) % batch)).cpu().numpy()
        parts = [self.exported.run(padded[first : first + batch]) for first in range(0, len(padded), batch)]
        output = torch.from_numpy(np.concatenate(parts)[: len(image)]).to(image.device)
        kind = self.exported.facts["export"]["output"]
        if kind == "mask":
            output = F.one_hot(output.long(), self.n_classes).permute(0, 3, 1, 2).float()
        elif kind == "probabilities":
            output = output.clamp(min=_TINY).log()
        return SegmentationOutput(output, ())
