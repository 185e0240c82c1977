"""Speed and memory of evaluation under each protocol, beside the reference's on the same pictures and weights.

    python scripts/bench_evaluation.py --images 2 --size 512 1024 --window 512
    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_evaluation.py --checkpoint outputs/demo/<date_time>

Synthetic street scenes stand for the pictures; without a checkpoint the weights are random. Each row is a process of
its own: its peak memory is what predicting and counting added to the process, weights and pictures not included.
Decoding is in no time. The row "together" is all protocols in one pass.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

REFERENCE_PROTOCOLS = ("ss", "ssc", "msf", "mscf")
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def main() -> None:
    """Measure every row in its own process; print the table, and write it where told."""
    options = parse()
    if options.row:
        print(json.dumps(measure(options)))
        return
    import torch
    from rich.console import Console
    from rich.table import Table

    implementations = ["ours"] + ["reference"] * ("REFERENCE_ROOT" in os.environ)
    rows = []
    table = Table("protocol", *(f"{who}: {what}" for who in implementations for what in ("images/s", "GiB", "mIoU")))
    for protocol in [*options.protocols, "together"]:
        cells = []
        for who in implementations:
            if who == "reference" and protocol not in REFERENCE_PROTOCOLS:
                cells += ["-"] * 3
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--row", who, protocol]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append({"implementation": who, "protocol": protocol, **row})
            mious = " ".join(f"{100 * miou:.2f}" for miou in row["miou"])
            cells += [f"{row['images_per_second']:.3f}", f"{row['peak_bytes'] / 2**30:.2f}", mious]
        table.add_row(protocol, *cells)
    Console(width=160).print(table)
    if options.out:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        setup = {"date": datetime.now().isoformat(timespec="seconds"), "torch": torch.__version__, "gpu": gpu,
                 "cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                 "command": sys.argv}  # fmt: skip
        with options.out.open("x") as file:
            json.dump({"setup": setup, "rows": rows}, file, indent=2)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a run or a .ckpt file of 19 classes; default: random weights")
    parser.add_argument("--model", default="bisenetv2", choices=["bisenetv1", "bisenetv2"], help="without a checkpoint")
    parser.add_argument("--protocols", nargs="+", default=list(REFERENCE_PROTOCOLS))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 2048], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--window", type=int, default=1024, help="side of the windows of protocols that crop")
    parser.add_argument("--max-pixels-per-batch", type=int, default=4 * 1024**2)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row: images per second, peak memory in bytes and mIoU of each protocol in it."""
    import torch

    from bisenet.data.scenes import render_scene

    who, protocol = options.row
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = segmenter_of(options).to(device).eval()
    encode = torch.from_numpy(segmenter.classes.encode.copy())
    scenes = [render_scene(0, "val", number, tuple(options.size)) for number in range(options.images)]
    pictures = [(torch.from_numpy(image).permute(2, 0, 1)[None], encode[torch.from_numpy(label).long()][None])
                for image, label in scenes]  # fmt: skip
    names = list(options.protocols) if protocol == "together" else [protocol]
    evaluate = prepare_reference(segmenter, names[0], options) if who == "reference" else prepare_ours(segmenter, names)

    before = peak(device)
    started = time.perf_counter()
    with torch.inference_mode():
        mious = evaluate(pictures, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"images_per_second": len(pictures) / seconds, "peak_bytes": peak(device) - before, "miou": mious}


def peak(device: Any) -> int:
    """Most bytes held so far: on a GPU by tensors, else by the process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def segmenter_of(options: argparse.Namespace) -> Any:
    """The model, from the checkpoint or with random weights, and every protocol asked for."""
    from hydra import compose, initialize_config_dir

    import bisenet
    from bisenet import cli, experiment  # cli registers the resolvers

    with initialize_config_dir(bisenet.conf_dir(), version_base="1.3"):
        window = f"data.eval_window=[{options.window},{options.window}]"
        cfg = compose("train", [f"model={options.model}", f"protocol=[{','.join(options.protocols)}]", window])
    cli.name_changed_presets(cfg)
    segmenter = experiment.build_segmenter(cfg, experiment.build_data(cfg))
    if options.checkpoint:
        trained = bisenet.load(options.checkpoint)
        trained.protocols = segmenter.protocols
        segmenter = trained
    segmenter.max_pixels_per_batch = options.max_pixels_per_batch
    return segmenter


def prepare_ours(segmenter: Any, names: list[str]) -> Any:
    """Our evaluation of pictures in memory."""
    import torch

    from bisenet.metrics import SegmentationMetric

    def evaluate(pictures: list[Any], device: Any) -> list[float]:
        metrics = {name: SegmentationMetric(segmenter.classes.num_classes).to(device) for name in names}
        for index, (image, mask) in enumerate(pictures):
            for name, found in segmenter.predictions(image.to(device), names).items():
                metrics[name].update(found.train_ids, mask.to(device), torch.tensor([index], device=device))
        return [metric.compute().miou for metric in metrics.values()]

    return evaluate


def prepare_reference(segmenter: Any, protocol: str, options: argparse.Namespace) -> Any:
    """The evaluator of the checkout that REFERENCE_ROOT names, with our weights."""
    import torch
    from torch.utils import model_zoo

    sys.path.insert(0, os.environ["REFERENCE_ROOT"])
    for name in ("tabulate", "tqdm", "torchvision"):  # imported and not needed here
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(tqdm=iter)
    model_zoo.load_url = lambda *_, **__: {}  # its constructors download what is replaced right after
    theirs = importlib.import_module("tools.evaluate")
    if not torch.cuda.is_available():  # it knows no other device
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    kind = {"BiSeNetV1": "bisenetv1", "BiSeNetV2": "bisenetv2"}[type(segmenter.network).__name__]
    network = theirs.model_factory[kind](segmenter.classes.num_classes)
    network.load_state_dict(segmenter.network.state_dict())
    network.aux_mode = "eval"
    network.eval()
    multi = {"flip": protocol in ("msf", "mscf"), "scales": SCALES if protocol in ("msf", "mscf") else (1.0,)}
    common: dict[str, Any] = {"n_classes": segmenter.classes.num_classes, "size_processor": theirs.SizePreprocessor()}
    if protocol in ("ssc", "mscf"):
        evaluator = theirs.MscEvalCrop(cropsize=[options.window] * 2, **common, **multi)
    else:
        evaluator = theirs.MscEvalV0(**common, **multi)

    def evaluate(pictures: list[Any], device: Any) -> list[float]:
        network.to(device)
        batches = [(segmenter.normalize(image.to(device)), mask[:, None].long()) for image, mask in pictures]
        evaluator(network, batches)
        # Its own mean adds a pixel to each union and counts classes that never occur as 0.
        counts = evaluator.metric_observer.confusion.double()
        union = counts.sum(0) + counts.sum(1) - counts.diag()
        return [(counts.diag() / union)[union > 0].mean().item()]

    return evaluate


if __name__ == "__main__":
    main()
