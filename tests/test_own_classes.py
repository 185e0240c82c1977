"""What a user of Hydra and Lightning knows holds here: classes of one's own, as conf/README.md shows them, and more."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, TRAIN_FAST, command

MODULE = """
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F
from bisenet.data.datasets import Synthetic
from bisenet.networks import SegmentationOutput

class Net(nn.Module):
    head_names, align_corners = ("head",), False
    def __init__(self, n_classes, width):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3, 4, 1), nn.Conv2d(width, n_classes, 1)
    def forward(self, image):
        return SegmentationOutput(self.head(self.body(image)), ())

class Focal(nn.Module):
    def __init__(self, gamma):
        super().__init__()
        self.gamma = gamma
    def forward(self, logits, target, align_corners=False):
        logits = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
        loss = F.cross_entropy(logits, target.long(), ignore_index=255, reduction="none")
        valid = target != 255
        return ((1 - (-loss).exp()) ** self.gamma * loss).sum() / valid.sum(), valid.sum()

class Pets(Synthetic):
    def samples(self, split):
        return super().samples(split)[:3]

class Hello(Callback):
    def on_train_end(self, trainer, module):
        print("hello from", type(module.segmenter.network).__name__, trainer.accumulate_grad_batches)
"""


def files_of_the_page(folder: Path) -> None:
    """Write the files that conf/README.md shows."""
    page = (ROOT / "conf" / "README.md").read_text()
    (block,) = re.findall(r"^```\n(mine/.*?)^```", page, re.DOTALL | re.MULTILINE)
    file = Path()
    for line in block.splitlines():
        if line.startswith("mine/"):
            file = folder / line.split()[0]
            file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(line[28:] + "\n")
    (folder / "mymodule.py").write_text(MODULE)


def results(folder: Path) -> dict[str, object]:
    return json.loads((folder / "results.json").read_text())


def test_classes_of_ones_own_as_the_page_shows_them(tmp_path: Path, scenes: list[str]) -> None:
    files_of_the_page(tmp_path)
    done = command("train", "--config-dir", "mine", "model=mynet", "loss=focal", "scheduler=torch",
                   "augment=noisy", "data=pets", "callbacks=[default,hello]", *TRAIN_FAST, *scenes,
                   "trainer.accumulate_grad_batches=2", "optimizer.lr=0.1", "hydra.run.dir=run",
                   cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hello from Net 2" in done.stdout
    assert results(tmp_path / "run")["step"] == 2
    assert "GaussNoise" in (tmp_path / "run" / ".hydra" / "config.yaml").read_text()
    again = command("evaluate", "checkpoint=run", "accelerator=cpu", "hydra.run.dir=refused", cwd=tmp_path)
    assert "got 'mymodule." in again.stderr
    assert "trust=[mymodule]" in again.stderr
    again = command(
        "evaluate", "checkpoint=run", "accelerator=cpu", "trust=[mymodule]", "hydra.run.dir=again", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert results(tmp_path / "again")["miou"] == results(tmp_path / "run")["miou"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["+trainer.fast_dev_run=true"],
        ["~callbacks.progress", "~augment.jitter", "+augment.noise={_target_: albumentations.GaussNoise}",
         "callbacks=[default,early_stopping,ema]"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_hydra_and_lightning_offer(overrides: list[str], tmp_path: Path, scenes: list[str]) -> None:
    small = ["model.network.width_multiplier=0.25", "scheduler.warmup_steps=1", "hydra.run.dir=run"]
    done = command("train", *TRAIN_FAST, *scenes, *small, *overrides, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    """It carries conf/ and the kernel's source."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert "bisenet = bisenet.cli:main" in next((tmp_path / "site").glob("*.dist-info/entry_points.txt")).read_text()
    assert (tmp_path / "site" / "bisenet" / "kernels" / "ohem" / "ohem.cu").is_file()
    program = "import bisenet.cli, sys; sys.argv = ['bisenet', 'train', '--cfg', 'job']; bisenet.cli.main()"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "site", capture_output=True, text=True,
                          check=False, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""})  # fmt: skip
    assert "bisenet.networks.BiSeNetV2" in done.stdout, done.stderr
