"""Train small runs and print what they computed: ``python tests/golden.py FOLDER MODEL/GENERATION ...``.

``tests/data/golden.json`` holds what the first version of the package printed (commit 36bc76b); ``test_golden.py``
compares. The instruction set is fixed, so that processors of one maker agree to the last digit.
"""

import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2", "OMP_NUM_THREADS": "1"}
RUNS = [f"{model}/{generation}" for model in ("bisenetv1", "bisenetv1_diss", "bisenetv1_ushape", "bisenetv2",
        "bisenetv2_large") for generation in ("current", "older")]  # fmt: skip


def write_images(root: Path) -> None:
    """Blocks of classes in their own colours, with noise and ignored pixels, in the layout of Cityscapes."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "val": 3}.items():
        for number in range(count):
            ids = np.kron(rng.integers(5, 34, (6, 12)), np.ones((16, 16), int)).astype(np.uint8)
            image = np.stack([ids * 7, 255 - ids * 5, rng.integers(0, 256, ids.shape)], 2).astype(np.uint8)
            for kind, suffix, array in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", ids)):
                folder = root / kind / split / "town"
                folder.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(folder / f"town_{number:06d}_000000_{suffix}.png"), array)


def scores(protocols: dict[str, Any]) -> dict[str, Any]:
    """Everything but times, of each protocol."""
    keys = ("miou", "fw_iou", "pixel_accuracy", "mean_accuracy", "mean_f1", "category_miou", "n_images", "absent")
    return {
        name: {key: found[key] for key in keys} | {"iou": [entry["iou"] for entry in found["classes"].values()]}
        for name, found in protocols.items()
    }


def record(folder: Path, results: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics by step, scores, and the parameter groups of a run."""
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    metrics: dict[str, dict[str, float]] = {}
    for row in rows:
        values = {k: float(v) for k, v in row.items() if v and k not in ("step", "epoch") and not k.startswith("time/")}
        metrics.setdefault(row["step"], {}).update(values)
    return {
        "metrics": metrics,
        "step": results["step"],
        "split": results["split"],
        "last": scores(results["protocols"]),
        "best_on_val": [results["best_on_val"]["step"], scores(results["best_on_val"]["protocols"])],
        "groups": [
            [group["name"], len(group["params"]), sum(p.numel() for p in group["params"]), group["initial_lr"],
             group["weight_decay"]] for group in groups
        ],
    }  # fmt: skip


def run(folder: Path, data: Path, model: str, generation: str) -> dict[str, Any]:
    """One training."""
    from conftest import composed, draw_nothing

    from bisenet import experiment

    overrides = ["debug=fast", "data=cityscapes", f"data.root={data}", "data.eval_window=[64,64]",
                 "~callbacks.progress", "protocol=[ss,ssc,msf]", f"model={model}",
                 f"model.network.generation={generation}",
                 "trainer.accelerator=cpu", f"run_dir={folder}"]  # fmt: skip
    draw_nothing()
    cfg = composed(*overrides)
    results = experiment.train(cfg)
    built = experiment.build_data(cfg)
    module = experiment.build_module(cfg, built, experiment.build_segmenter(cfg, built))
    return record(folder, results, module.configure_optimizers()["optimizer"].param_groups)


def maker() -> str:
    """Of the processor: libraries choose their code by it too."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"vendor_id\s*: (\w+)", info.read_text()) if info.exists() else None
    return found[1] if found else "unknown"


def canary() -> list[float]:
    """What this processor makes of PyTorch's own operations, forward and backward: another one may round otherwise."""
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    x = torch.randn(4, 24, 33, 65, requires_grad=True)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((48, 24, 3, 3), (48, 1, 3, 3), (96, 48, 1, 1))]
    y = F.conv2d(x, weights[0], stride=2, padding=1)
    y = F.batch_norm(F.conv2d(y, weights[1], padding=1, groups=48), None, None, training=True).relu()
    y = F.interpolate(F.conv2d(y, weights[2]), (33, 65), mode="bilinear").log_softmax(1)
    (y * y).mean().backward()
    return [y.sum().item(), *(t.grad.abs().sum().item() for t in (x, *weights) if t.grad is not None)]


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    place = Path(sys.argv[1])
    write_images(place / "data")
    found: dict[str, Any] = {
        name: run(place / name.replace("/", "_"), place / "data", *name.split("/")) for name in sys.argv[2:]
    }
    found["canary"] = canary()
    sys.stdout.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")
