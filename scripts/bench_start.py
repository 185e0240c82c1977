"""From the start of a process to its first prediction: bisenet.load, beside what the reference's tools/demo.py does.

    REFERENCE_ROOT=/path/to/BiSeNet python scripts/bench_start.py

Whole processes, in turn: imports, weights of BiSeNetV2, one PNG of 512x1024, its labels. The reference's has no GPU to
move the network to, and is spared the import of torchvision and the weights that its constructor would download.
"""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import bench

OURS = """
import cv2
import bisenet
cv2.setNumThreads({threads})
import torch
torch.set_num_threads({threads})
bisenet.load("{folder}/model.pth", data="cityscapes").predict(cv2.imread("{folder}/image.png")[..., ::-1])
"""
THEIRS = """
import sys
import types
sys.modules["torchvision"] = types.ModuleType("torchvision")  # imported there and not needed
sys.path.insert(0, "{root}")
import cv2
import numpy
import torch
from torch.utils import model_zoo
model_zoo.load_url = lambda *_, **__: {{}}
import lib.data.transform_cv2 as transforms
from lib.models import model_factory
from configs import set_cfg_from_file
cv2.setNumThreads({threads})
torch.set_num_threads({threads})
network = model_factory["bisenetv2"](19, aux_mode="eval")
network.load_state_dict(torch.load("{folder}/model.pth", map_location="cpu"), strict=False)
network.eval()
normalize = transforms.ToTensor(mean=(0.3257, 0.3690, 0.3223), std=(0.2112, 0.2148, 0.2115))
image = normalize(dict(im=cv2.imread("{folder}/image.png")[:, :, ::-1], lb=None))["im"][None]
with torch.no_grad():
    network(image)[0].argmax(1)
"""


def main() -> None:
    """Start both in turn."""
    given = bench.parser(__doc__).parse_args()
    import cv2
    import torch

    from bisenet.data.scenes import render_scene
    from bisenet.networks import BiSeNetV2

    with tempfile.TemporaryDirectory() as folder:
        torch.save(BiSeNetV2(19).state_dict(), Path(folder, "model.pth"))
        cv2.imwrite(f"{folder}/image.png", render_scene(0, "val", 0, (512, 1024))[0][..., ::-1])
        programs = {"ours": OURS}
        if bench.has_reference():
            programs["reference"] = THEIRS
        values = {"folder": folder, "threads": given.threads, "root": os.environ.get("REFERENCE_ROOT")}
        runs = {name: partial(run, program.format(**values)) for name, program in programs.items()}
        seconds = bench.in_turn(runs, given.rounds)
    what, ratio = "process start to the first prediction", bench.ratio(seconds, "ours")
    bench.write(
        "start", [bench.Row(what, min(seconds["ours"]), "s", ratio, note="target 2.0 s")], threads=given.threads
    )


def run(program: str) -> None:
    """A process of its own."""
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | path)


if __name__ == "__main__":
    main()
