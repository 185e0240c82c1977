"""Export a model to files for other runtimes, each compared with the network before it is kept, and model folders."""

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from bisenet import checkpoint, report, runtimes
from bisenet.data.scenes import render_scene
from bisenet.networks.blocks import fold

if TYPE_CHECKING:
    from bisenet.inference import Segmenter

log = logging.getLogger(__name__)

FILES = {
    "onnx": (".onnx",),
    "openvino": (".xml", ".bin"),
    "ncnn": (".ncnn.param", ".ncnn.bin", ".ncnn.json"),
    "torch_export": (".pt2",),
    "tensorrt": (".onnx", ".engine"),
}
"""Format of a runtime -> suffixes of its files."""
FORMATS = (*FILES, "folder", "reference")
DTYPES = {"fp32": 0.999, "fp16": 0.99, "int8": 0.9}
"""Number type that a file computes with -> least share of labels that must equal the network's."""
SIZES = ((128, 256), (97, 131), (257, 193))
"""Heights and widths of the images on which a file for any size is compared with the network."""


class Deployed(nn.Module):
    """What is exported: image (B, 3, H, W) float32 -> mask uint8 (B, H, W), or logits or probabilities (B, C, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, segmenter: "Segmenter", output: str, normalization: str, half: bool) -> None:
        super().__init__()
        try:
            self.network = fold(segmenter.network)
        except ValueError as error:
            log.warning("batch norm is not folded: %s", error)
            self.network = deepcopy(segmenter.network).eval()
        self.align_corners, self.output, self.half_precision = bool(segmenter.network.align_corners), output, half
        self.register_buffer("mean", segmenter.mean.clone())
        self.register_buffer("std", segmenter.std.clone())
        self.raw = normalization == "inside"
        if half:
            self.network.half()

    def forward(self, image: Tensor) -> Tensor:
        """Normalise, run the network, upsample, classify."""
        x = (image - self.mean) / self.std if self.raw else image
        logits = self.network(x.half() if self.half_precision else x)[0].float()
        logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=self.align_corners)
        if self.output == "mask":
            return logits.argmax(1).to(torch.uint8)
        return logits.softmax(1) if self.output == "probabilities" else logits


@dataclass
class Export:
    """Options of an export. They are checked here, before a model is read.

    Args:
        format: one or several of :data:`FORMATS`. ``folder`` is a model folder by the hub's conventions, ``reference``
            a ``model_final.pth`` for the reference's own tools.
        folder: where the files go; none of them may exist.
        output: ``mask`` (train ids, uint8), ``logits`` or ``probabilities``, at the size of the image; None: a mask, or
            logits for ncnn, which has no argmax.
        normalization: ``inside``: the file takes raw RGB in [0, 255]; ``outside``: it takes normalised images.
        dtype: ``fp32``, ``fp16``, or ``int8``, quantised after training (ONNX, OpenVINO).
        batch: fixed number of images in a batch; None: any number.
        size: fixed (height, width) of the images; None: any.
        least_agreement: a file is refused if a smaller share of its labels equals the network's; None: :data:`DTYPES`.
        license: license of the weights, recorded in the file.

    Raises:
        FileExistsError: one of the files exists already.
        ValueError: a value that is not accepted; the message begins with its name.
    """

    format: str | Sequence[str]
    folder: Path
    _: KW_ONLY
    output: str | None = None
    normalization: str = "inside"
    dtype: str = "fp32"
    batch: int | None = None
    size: Sequence[int] | None = None
    least_agreement: float | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        self.formats = [self.format] if isinstance(self.format, str) else list(self.format)
        self.folder = Path(self.folder).expanduser()
        without_int8 = {"ncnn", "torch_export"} & {*self.formats}
        size = list(self.size or (32, 32))
        for name, ok, accepted in (
            ("format", {*self.formats} <= {*FORMATS} and self.formats, f"one or several of {', '.join(FORMATS)}"),
            ("output", self.output in (None, *runtimes.OUTPUTS), " | ".join(runtimes.OUTPUTS)),
            ("output", "ncnn" not in self.formats or self.output != "mask", "logits | probabilities, of ncnn"),
            ("normalization", self.normalization in runtimes.NORMALIZATIONS, " | ".join(runtimes.NORMALIZATIONS)),
            ("dtype", self.dtype in DTYPES, " | ".join(DTYPES)),
            ("dtype", self.dtype != "int8" or not without_int8, "fp32 | fp16, of ncnn and torch_export"),
            ("batch", self.batch is None or (type(self.batch) is int and self.batch >= 1), "null or at least 1"),
            ("size", len(size) == 2 and all(type(s) is int and s >= 32 for s in size), "null or [height, width]"),
            ("least_agreement", 0 <= (self.least_agreement or 0) <= 1, "null or a share in [0, 1]"),
        ):
            if not ok:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, accepted: {accepted}")
        if existing := [file for kind in self.formats for file in self.files(kind) if file.exists()]:
            raise FileExistsError(f"folder: {existing[0]} exists; accepted: another folder")

    def files(self, kind: str) -> list[Path]:
        """Return the paths that a format writes."""
        stem = "model" if self.dtype == "fp32" else f"model_{self.dtype}"
        names = {"folder": ["model"], "reference": ["model_final.pth"]}
        return [self.folder / name for name in names.get(kind) or [stem + suffix for suffix in FILES[kind]]]

    def run(
        self,
        read: checkpoint.Checkpoint,
        segmenter: "Segmenter",
        hyper_parameters: Mapping[str, Any],
        images: Sequence[np.ndarray] = (),
    ) -> list[dict[str, Any]]:
        """Write every format, and ``export.json``.

        Args:
            read: the checkpoint that the segmenter was made from.
            segmenter: the model.
            hyper_parameters: those of the training; ``name`` and ``data`` are copied to the files, for an evaluation.
            images: RGB uint8 (H, W, 3) training images, to calibrate int8 and to compare on; none: the comparison uses
                synthetic scenes, and int8 is refused.

        Returns:
            For each format: the files, their bytes, and how closely they agree with the network.

        Raises:
            ValueError: some exports could not be made or disagree with the network; all others are written.
        """
        if isinstance(read, checkpoint.ExportedCheckpoint):
            raise ValueError(f"checkpoint: {read.path} is an export already; accepted: what it was made from")
        writer = _Writer(self, read, segmenter, {key: hyper_parameters.get(key) for key in ("name", "data")}, images)
        done, refused = [], []
        for kind in self.formats:
            try:
                done.append({"format": kind, **writer.make(kind)})
                log.info("%s", ", ".join(f"{key} {value}" for key, value in done[-1].items()))
            except ValueError as error:
                refused.append(f"format={kind}: {error}")
        report.write_json(self.folder / "export.json", done)
        if refused:
            raise ValueError("; ".join(refused))
        return done


@dataclass
class _Writer:
    """Writer of all formats of one model; the arguments are those of :meth:`Export.run`."""

    options: Export
    read: checkpoint.Checkpoint
    segmenter: "Segmenter"
    hyper_parameters: dict[str, Any]
    images: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        self.calibrated = len(self.images) > 0
        self.images = self.images or [render_scene(0, "val", number, (256, 512))[0] for number in range(2)]
        self.program, self.onnx = cache(self._make_program), cache(self._make_onnx)  # shared by several formats
        self.source = self.read.path.parent if self.read.path.suffix == ".safetensors" else self.read.path
        self.commit = report.provenance({})["commit"]

    def make(self, kind: str) -> dict[str, Any]:
        """Write one format to a temporary folder, compare it with the network, and move it to its place."""
        files = self.options.files(kind)
        self.options.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.options.folder, prefix=".") as aside:
            drafts = [Path(aside, file.name) for file in files]
            found = getattr(self, f"_{kind}")(*drafts)
            written = [(draft, file) for draft, file in zip(drafts, files, strict=True) if draft.exists()]
            for draft, file in written:
                os.replace(draft, file)
        sizes = [sum(f.stat().st_size for f in ([*file.iterdir()] if file.is_dir() else [file])) for _, file in written]
        return {"files": [str(file) for _, file in written], "bytes": sum(sizes), **found}

    # ------------------------------------------------------------ shared by the formats

    def output(self, kind: str) -> str:
        """Return the kind of output of a format: ``mask``, ``logits`` or ``probabilities``."""
        return self.options.output or ("logits" if kind == "ncnn" else "mask")

    def deployed(self, output: str, half: bool) -> Deployed:
        """Return the module to export, in evaluation mode."""
        return Deployed(self.segmenter, output, self.options.normalization, half).eval()

    def facts(self, kind: str) -> str:
        """Return the JSON that is stored in the file: :meth:`content`, and how the file was made."""
        options, size = self.options, self.options.size
        made = {
            "format": kind,
            "input": "image: RGB float32 (B, 3, H, W), "
            + ("raw in [0, 255]" if options.normalization == "inside" else "(raw / 255 - mean) / std"),
            "output": self.output(kind),
            "normalization": options.normalization,
            "precision": options.dtype,
            "batch": 1 if kind == "ncnn" else options.batch,
            "size": size and list(size),
            "size_multiple": next(iter(self.segmenter.protocols.values())).size_multiple,
            "checkpoint": str(self.source.resolve()),
            "commit": self.commit,
            "license": options.license,
        }
        return json.dumps({**self.content(), "export": made})

    def content(self) -> dict[str, Any]:
        """Return the content of a checkpoint without its weights."""
        portable = checkpoint.portable(self.read.network, self.segmenter, self.read.data)
        return {"bisenet": portable, "global_step": self.read.step, "hyper_parameters": self.hyper_parameters}

    def inputs(self, images: Sequence[np.ndarray], size: tuple[int, int] | None, batch: int) -> tuple[Tensor, Tensor]:
        """Return a batch of resized images (B, 3, H, W) float32, as the file takes them and normalised.

        ``images`` are repeated to fill the batch; without ``size`` they get the size of the first.
        """
        size = size or images[0].shape[:2]  # type: ignore[assignment]
        some = [images[number % len(images)] for number in range(batch)]
        pixels = np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in some])
        raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous()
        normalized = self.segmenter.normalize(raw)
        return (raw if self.options.normalization == "inside" else normalized), normalized

    @torch.inference_mode()
    def compare(self, kind: str, run: runtimes.Run) -> dict[str, Any]:
        """Compare the outputs of a file with the network's, at several sizes.

        Returns:
            The smallest share of equal labels, and for logits or probabilities the largest difference.

        Raises:
            ValueError: the share of equal labels is too small.
        """
        options, network = self.options, self.segmenter.network
        share, largest, output = 1.0, 0.0, self.output(kind)
        own = self.images[0].shape[:2]
        sizes = [own, tuple(side - 8 | 1 for side in own)] if self.calibrated else SIZES  # int8 is calibrated there
        for number, (height, width) in enumerate([options.size] if options.size else sizes):
            batch = options.batch or (2 if number == 0 else 1)
            given, normalized = self.inputs(self.images[number % len(self.images) :], (height, width), batch)
            logits = F.interpolate(
                network(normalized).logits, (height, width), mode="bilinear", align_corners=bool(network.align_corners)
            )
            found = torch.from_numpy(run(given.numpy()))
            labels = found if output == "mask" else found.argmax(1)
            share = min(share, (labels == logits.argmax(1)).double().mean().item())
            if output != "mask":
                expected = logits if output == "logits" else logits.softmax(1)
                largest = max(largest, (found - expected).abs().max().item())
        least = DTYPES[options.dtype] if options.least_agreement is None else options.least_agreement
        if share < least:
            raise ValueError(
                f"refused: {share:.4f} of the labels are the network's, accepted: at least {least} (least_agreement)"
            )
        return {"equal_labels": share} | ({} if output == "mask" else {f"largest_difference_of_{output}": largest})

    def _make_program(self, output: str, half: bool) -> Any:
        """Return the network as a program of torch.export."""
        options, dynamic = self.options, torch.export.Dim.DYNAMIC
        shape = options.batch or 2, 3, *(options.size or (96, 160))
        free = ({} if options.batch else {0: dynamic}) | ({} if options.size else {2: dynamic, 3: dynamic})
        return torch.export.export(self.deployed(output, half), (torch.zeros(shape),), dynamic_shapes=(free or None,))

    def _make_onnx(self, output: str, half: bool) -> bytes:
        return runtimes.to_onnx(self.program(output, half))

    def quantized(self, model: Any, wrap: Callable[[np.ndarray], Any]) -> Any:
        """Return a model of ONNX or OpenVINO quantised to int8, calibrated on training images.

        ``wrap`` turns a batch into the input of the model.
        """
        if not self.calibrated:
            raise ValueError("dtype: int8 needs images of the training to calibrate on; accepted: fp32 | fp16")
        nncf = runtimes.import_extra("nncf", "export")
        size: Any = self.options.size
        batches = [self.inputs([image], size, self.options.batch or 1)[0].numpy() for image in self.images]
        # ONNX Runtime does not support per-channel scales of activations.
        parts = nncf.quantization.advanced_parameters
        advanced = nncf.AdvancedQuantizationParameters(
            activations_quantization_params=parts.QuantizationParameters(per_channel=False),
            overflow_fix=parts.OverflowFix.ENABLE,  # else sums of products overflow on processors without VNNI
        )
        data = nncf.Dataset([wrap(batch) for batch in batches])
        with redirect_stdout(sys.stderr):
            return nncf.quantize(
                model,
                data,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(batches),
                advanced_parameters=advanced,
            )

    # ------------------------------------------------------------ formats

    def _onnx(self, file: Path) -> dict[str, Any]:
        onnx = runtimes.import_extra("onnx", "export")
        model = onnx.load_from_string(self.onnx(self.output("onnx"), self.options.dtype == "fp16"))
        if self.options.dtype == "int8":
            model = self.quantized(model, lambda batch: {"image": batch})
        onnx.helper.set_model_props(model, {runtimes.KEY: self.facts("onnx")})
        onnx.save(model, file)
        return self.compare("onnx", runtimes.open_file(file).run)

    def _openvino(self, file: Path, _weights: Path) -> dict[str, Any]:
        openvino = runtimes.import_extra("openvino", "export")
        model = openvino.Core().read_model(self.onnx(self.output("openvino"), False))
        if self.options.dtype == "int8":
            model = self.quantized(model, lambda batch: batch)
        model.set_rt_info(self.facts("openvino"), runtimes.KEY)
        openvino.save_model(model, file, compress_to_fp16=self.options.dtype == "fp16")
        return self.compare("openvino", runtimes.open_file(file).run)

    def _ncnn(self, file: Path, weights: Path, facts: Path) -> dict[str, Any]:
        pnnx = Path(runtimes.import_extra("pnnx", "export").__file__).with_name("pnnx")
        sizes = [self.options.size] * 2 if self.options.size else [(96, 160), (131, 97)]
        shapes = [f"inputshape{n}=[1,3,{h},{w}]f32" for n, (h, w) in zip(("", "2"), sizes, strict=True)]
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # conditions on the image's size
            network = self.deployed(self.output("ncnn"), half=False)
            traced: Any = torch.jit.trace(network, torch.zeros(1, 3, *sizes[0]), check_trace=False)
        traced.save(str(file.with_name("model.pt")))
        command = [str(pnnx), "model.pt", *shapes[: 1 if self.options.size else 2],
                   f"ncnnparam={file.name}", f"ncnnbin={weights.name}",
                   f"fp16={int(self.options.dtype == 'fp16')}"]  # fmt: skip
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
        if not file.exists():
            raise ValueError(f"pnnx failed: {(done.stderr or done.stdout).strip()[-300:]}")
        facts.write_text(self.facts("ncnn"), encoding="utf-8")
        return self.compare("ncnn", runtimes.open_file(file).run)

    def _torch_export(self, file: Path) -> dict[str, Any]:
        facts = {f"{runtimes.KEY}.json": self.facts("torch_export")}
        program = self.program(self.output("torch_export"), self.options.dtype == "fp16")
        torch.export.save(program, file, extra_files=facts)
        module = torch.export.load(file).module()
        return self.compare("torch_export", lambda image: module(torch.from_numpy(image)).numpy())

    def _tensorrt(self, onnx: Path, engine: Path) -> dict[str, Any]:
        """Build an engine if trtexec is here. Only the ONNX file that it is built from is compared with the network."""
        found, final = self._onnx(onnx), self.options.files("tensorrt")
        batch, size = self.options.batch, self.options.size
        most = {"min": (1, (64, 64)), "opt": (1, (512, 1024)), "max": (4, (1024, 2048))}
        chosen = {key: (batch or b, *(size or hw)) for key, (b, hw) in most.items()}
        shapes = [f"--{key}Shapes=image:{b}x3x{h}x{w}" for key, (b, h, w) in chosen.items()]
        shapes = [] if batch and size else shapes
        typed = [] if self.options.dtype == "fp32" else ["--stronglyTyped"]

        def command(model: Path, plan: Path) -> list[str]:
            return ["trtexec", f"--onnx={model}", f"--saveEngine={plan}", *shapes, *typed]

        if shutil.which("trtexec"):
            done = subprocess.run(command(onnx, engine), capture_output=True, text=True, check=False)
            if done.returncode or not engine.exists():
                raise ValueError(f"trtexec failed: {(done.stderr or done.stdout).strip()[-300:]}")
            return {**found, "engine": "built, not compared"}
        return {**found, "engine": f"no trtexec here; to build it: {shlex.join(command(*final))}"}

    def _reference(self, file: Path) -> dict[str, Any]:
        weights = self.segmenter.network.state_dict()
        torch.save(weights, file)
        node = checkpoint.read(file, {"classes": self.segmenter.classes, **self.segmenter.normalization}).network
        if node["generation"] != "current" or node.get("structure", "two_path") != "two_path":
            raise ValueError(f"got {node}, accepted: BiSeNetV1 (two_path) or BiSeNetV2 of the generation current")
        return {"tensors": len(weights)}

    def _folder(self, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        content = deepcopy(self.content())
        if data := content["hyper_parameters"]["data"]:
            data["root"] = f"data/{data['name']}"  # not this machine's path
        state = {name: tensor.contiguous() for name, tensor in self.segmenter.network.state_dict().items()}
        (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
        report.write_json(folder / "config.json", {"library_name": "bisenet", "model_type": "bisenet", **content})
        scene = render_scene(0, "test", 0, (256, 512))[0]
        drawn = report.overlay(scene, self.segmenter.predict(scene), self.segmenter.classes.palette, edges=True)
        Image.fromarray(np.hstack([scene, drawn])).save(folder / "example.png")
        (folder / "README.md").write_text(self.card(), encoding="utf-8")
        written = checkpoint.read(folder).weights
        if written.keys() != state.keys() or not all(torch.equal(written[name], state[name]) for name in state):
            raise ValueError("the weights read from the folder differ from those written")
        return {"tensors": len(state)}

    def card(self) -> str:
        """Return the model card: the hub's front matter, a description, the run's scores if known, and the classes."""
        classes = self.segmenter.classes
        name = self.hyper_parameters["name"] or self.read.path.stem
        node, data = self.read.network, self.read.data
        arguments = ", ".join(f"{key}={value}" for key, value in node.items() if not key.startswith("_"))
        front = f"license: {self.options.license or 'unknown'}\nlibrary_name: bisenet\npipeline_tag: image-segmentation"
        tags = "tags: [semantic-segmentation, real-time, bisenet]"
        rows = [f"| {i} | {name} | {[*map(int, classes.palette[i])]} |" for i, name in enumerate(classes.names)]
        lines = ["---", front, tags, "---", f"# {name}", "",
                 f"`{node['_target_'].rpartition('.')[2]}` ({arguments or 'default arguments'}) for the "
                 f"{classes.num_classes} classes of {classes.name}, trained on {data['name'] or 'unnamed data'}, "
                 f"step {self.read.step}. Exported at commit {self.commit}.", "",
                 "```python", "model = bisenet.load(\"this_folder\")",
                 "train_ids = model.predict(rgb_uint8_array)  # (H, W, 3) -> (H, W)", "```", "",
                 "![A synthetic scene and its prediction](example.png)", "",
                 "The example is a synthetic scene, which the network was not necessarily trained for.", "",
                 f"Images are RGB, normalised by mean {data['mean']} and std {data['std']}.", "",
                 "## Scores", "", *self.scores(), "",
                 "## Classes", "", "| train id | name | colour |", "|---|---|---|", *rows]  # fmt: skip
        return "\n".join(lines) + "\n"

    def scores(self) -> list[str]:
        """Return the table of scores from the run's results, with protocol, split and commit."""
        run = self.read.path.parent.parent
        if not (run / "results.json").is_file():
            return ["Not known: the weights come without the results of a run."]
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        provenance = run / "provenance.json"
        commit = json.loads(provenance.read_text(encoding="utf-8"))["commit"] if provenance.is_file() else None
        rows = [
            f"| {protocol} | {results['split']} | {report.percent(found['miou'])} | {commit} |"
            for protocol, found in results["protocols"].items()
        ]
        return ["| protocol | split | mIoU | commit |", "|---|---|---|---|", *rows]
