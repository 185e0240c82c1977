"""The page's way from a folder of images to a training (bisenet/data/README.md), followed literally."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from PIL import Image

import bisenet

ROOT = Path(__file__).parents[1]
COLORS = np.array([[0, 0, 0], [128, 64, 128], [107, 142, 35], [220, 20, 60]], np.uint8)  # those of the page's table
SMALL = (
    "debug=fast trainer.accelerator=cpu '~callbacks.progress' model.network.width_multiplier=0.25 trainer.max_steps=6 "
    "'augment.crop.size=[64,128]'"
)


def blocks(heading: str) -> list[str]:
    """The shell blocks of a section of the page."""
    text = (ROOT / "bisenet" / "data" / "README.md").read_text()
    section = re.split(r"\n##+ ", text[text.index(f"# {heading}\n") + 2 :], maxsplit=1)[0]
    return [re.sub(r"^ *", "", code, flags=re.M) for code in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)]


def follow(steps: str, cwd: Path) -> None:
    """Run steps as a user would; a training is made small by what is appended to its command."""
    command = f"'{sys.executable}' -c 'from bisenet.cli import main; main()'"
    function = f'bisenet() {{ if [ "$1" = train ]; then {command} "$@" {SMALL}; else {command} "$@"; fi; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-e", "-c", function + steps], cwd=cwd, env=environment, capture_output=True,
                          text=True, check=False, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_from_a_folder_of_images_to_a_training(tmp_path: Path) -> None:
    """Images of varying sizes, some smaller than a crop, with labels in colours; ignored is the value 0."""
    draw, folder = np.random.default_rng(0), tmp_path / "my data"
    for number in range(12):
        height, width = draw.integers(40, 200, 2)
        label = np.zeros((height, width), np.uint8)
        label[height // 5 :] = 1
        label[height // 2 :, : width // 2] = 2
        label[height // 2 :, 2 * width // 3 :] = 3
        noisy = COLORS[label] + draw.integers(-20, 20, (height, width, 3))
        save(folder / "images" / f"image {number:02d}.jpg", noisy.clip(0, 255).astype(np.uint8))
        save(folder / "labels" / f"image {number:02d}.png", COLORS[label])
    steps = "\n".join(blocks("Your own images"))
    (tmp_path / "data").symlink_to(folder)
    follow(steps.replace("/data/mine", str(tmp_path / "data")), tmp_path)
    assert len((folder / "train.txt").read_text().splitlines()) == 10
    run = tmp_path / "outputs" / "mine" / "first"
    assert json.loads((run / "results.json").read_text())["step"] == 6
    assert (run / "figures" / "predictions.png").is_file()
    (counts,) = run.glob("counts_val_*.npz")
    sizes = [Image.open(folder / line.split(",")[1]).size for line in (folder / "val.txt").read_text().splitlines()]
    true = np.load(counts)["per_image"][:, 2].sum(1)  # ignored pixels, the upper fifth of each image, do not count
    assert true.tolist() == [width * (height - height // 5) for width, height in sizes]
    model = bisenet.load(run)
    assert model.classes.names == ("ground", "plant", "animal")
    assert model.classes.encode[0] == model.classes.ignore_index


@pytest.mark.parametrize(
    ("root", "files"),
    [
        ("data/coco", {"train": "{}/train2017/1", "val": "{}/val2017/1"}),
        ("data/ADEChallengeData2016", {"train": "{}/training/A_1", "val": "{}/validation/A_1"}),
    ],
)
def test_lists_of_coco_and_ade20k(root: str, files: dict[str, str], tmp_path: Path) -> None:
    (block,) = (code for code in blocks("Data sets") if "ADEChallengeData2016" in code)
    (line,) = (line for line in re.split(r"(?<=done\))\n", block) if root in line)
    labels = "labels" if root == "data/coco" else "annotations"
    for stem in files.values():
        save(tmp_path / root / f"{stem.format(labels)}.png", np.zeros((2, 2), np.uint8))
    follow(line, tmp_path)
    for split, stem in files.items():
        pair = f"{stem.format('images')}.jpg,{stem.format(labels)}.png\n"
        assert (tmp_path / root / f"{split}.txt").read_text() == pair
