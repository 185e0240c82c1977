"""The README's way from a folder of pictures to a training, followed literally."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bisenet

ROOT = Path(__file__).parents[1]
COLORS = np.array([[0, 0, 0], [128, 64, 128], [107, 142, 35], [220, 20, 60]], np.uint8)  # those of the README's table
SMALL = (
    "debug=fast trainer.accelerator=cpu trainer.progress=false model.network.width_multiplier=0.25 trainer.max_steps=6 "
    "augment.crop=[64,128]"
)


def blocks(heading: str) -> list[str]:
    """The shell blocks of a section of the README."""
    text = (ROOT / "README.md").read_text()
    section = re.split(r"\n##+ ", text[text.index(f"\n### {heading}\n") + 4 :], maxsplit=1)[0]
    return [re.sub(r"^ *", "", code, flags=re.M) for code in re.findall(r"```bash\n(.*?)```", section, re.DOTALL)]


def follow(steps: str, cwd: Path) -> None:
    """Run steps as a user would in a checkout; a training is made small by what is appended to its command."""
    (cwd / "scripts").symlink_to(ROOT / "scripts")
    python = f"""
python() {{
  if [ "$1" = scripts/train.py ]; then {sys.executable} "$@" {SMALL}; else {sys.executable} "$@"; fi
}}
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["bash", "-e", "-c", python + steps]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of varying sizes, some smaller than a crop, with labels in colours; ignored is the value 0."""
    draw = np.random.default_rng(0)
    for number in range(12):
        height, width = draw.integers(40, 200, 2)
        label = np.zeros((height, width), np.uint8)
        label[height // 5 :] = 1
        label[height // 2 :, : width // 2] = 2
        label[height // 2 :, 2 * width // 3 :] = 3
        noisy = COLORS[label] + draw.integers(-20, 20, (height, width, 3))
        for folder, suffix, pixels in (("images", "jpg", noisy.clip(0, 255).astype(np.uint8)),
                                       ("labels", "png", COLORS[label])):  # fmt: skip
            file = tmp_path / "data" / folder / f"picture {number:02d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
    return tmp_path / "data"


def test_from_a_folder_of_pictures_to_a_training(pictures: Path, tmp_path: Path) -> None:
    follow("\n".join(blocks("Your own pictures")).replace("/data/mine", str(pictures)), tmp_path)
    assert len((pictures / "train.txt").read_text().splitlines()) == 10
    run = tmp_path / "outputs" / "mine" / "first"
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == 6
    assert (run / "figures" / "predictions.png").is_file()
    (counts,) = run.glob("counts_val_*.npz")
    sizes = [Image.open(pictures / line.split(",")[1]).size for line in (pictures / "val.txt").read_text().splitlines()]
    true = np.load(counts)["per_image"][:, 2].sum(1)  # ignored pixels, the upper fifth of each picture, do not count
    assert true.tolist() == [width * (height - height // 5) for width, height in sizes]
    model = bisenet.load(run)
    assert model.classes.names == ("ground", "plant", "animal")
    assert model.classes.encode[0] == model.classes.ignore_index


def test_lists_of_coco_and_ade20k(tmp_path: Path) -> None:
    (block,) = (code for code in blocks("Data") if "ADEChallengeData2016" in code)
    pairs = {
        "data/coco": {split: (f"images/{split}2017/1.jpg", f"labels/{split}2017/1.png") for split in ("train", "val")},
        "data/ADEChallengeData2016": {
            split: (f"images/{folder}/A_1.jpg", f"annotations/{folder}/A_1.png")
            for split, folder in (("train", "training"), ("val", "validation"))
        },
    }
    for root, splits in pairs.items():
        for files in splits.values():
            for file in files:
                (tmp_path / root / file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / root / file).touch()
    follow(block, tmp_path)
    for root, splits in pairs.items():
        for split, files in splits.items():
            assert (tmp_path / root / f"{split}.txt").read_text() == f"{','.join(files)}\n"
