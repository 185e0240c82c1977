"""Weights to start from: fetched once, digest checked, loaded where they fit. With files of random weights."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from test_config import composed
from torch import Tensor, nn

from bisenet import experiment
from bisenet.classes import ClassTable
from bisenet.config import ModelConfig, typed
from bisenet.networks import BiSeNetV1, BiSeNetV2
from bisenet.pretrained import fetch, load_backbone

OLD_V1: dict[str, Any] = {"generation": "older", "norm": "inplace_abn"}


def randomized(module: nn.Module) -> dict[str, Tensor]:
    return {k: torch.rand(v.shape) if v.is_floating_point() else v for k, v in module.state_dict().items()}


def resnet18() -> dict[str, Tensor]:
    """The entries of torchvision's file, the classifier included."""
    backbone = randomized(BiSeNetV1(19).cp.resnet)
    return {**backbone, "fc.weight": torch.rand(1000, 512), "fc.bias": torch.rand(1000)}


def backbone_v2() -> dict[str, dict[str, Tensor]]:
    """The reference's file: a state dict for each branch."""
    network = BiSeNetV2(19)
    return {name: randomized(network.get_submodule(name)) for name in ("detail", "segment")}


def save(content: Any, folder: Path, name: str, **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a web server on this machine."""
    (tmp_path / "www").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", tmp_path / "www"
        served.shutdown()


# Fetching


def test_a_url_is_downloaded_once(cache: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    source = folder / "weights.pth"
    source.write_bytes(b"content")
    file = fetch(f"{address}/weights.pth?download=1")
    assert (file, file.read_bytes()) == (cache / "weights.pth", b"content")
    source.unlink()
    assert fetch(f"{address}/weights.pth?download=1") == file
    assert fetch(str(file)) == file


def test_file_urls_are_paths_too(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"content")
    assert fetch((tmp_path / "weights.pth").as_uri()).read_bytes() == b"content"


def test_the_digest_in_the_name_or_given_is_checked(tmp_path: Path) -> None:
    (tmp_path / "plain.pth").write_bytes(b"content")
    digest = sha256(tmp_path / "plain.pth")
    named = (tmp_path / "plain.pth").rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    for given in (None, digest, digest[:12]):
        assert fetch(str(named), given) == named
    with pytest.raises(
        ValueError, match=rf"{named.name} has the sha256 {digest}, accepted after model.pretrained_sha256: 00000000"
    ):
        fetch(str(named), "0" * 8)
    named.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"the end of its name: {digest[:8]}\.\.\."):
        fetch(str(named))


def test_a_digest_that_nobody_knows_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "resnet-eighteen.pth"
    file.write_bytes(b"content")
    fetch(str(file))
    assert sha256(file) in caplog.text


def test_a_wrong_download_is_not_kept(cache: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    (folder / "resnet18-f37072fd.pth").write_bytes(b"<html>please log in</html>")
    with pytest.raises(ValueError, match=r"cannot be downloaded: invalid hash"):
        fetch(f"{address}/resnet18-f37072fd.pth")
    assert not list(cache.iterdir())


def test_what_cannot_be_had_says_what_to_do(cache: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    for url in (f"{server[0]}/lost.pth", "http://127.0.0.1:9/lost.pth"):
        with pytest.raises(ValueError, match=rf"lost\.pth cannot be downloaded: .*Put the file into {cache}.* null"):
            fetch(url)
    with pytest.raises(ValueError, match=r"nowhere\.pth', which is no file; accepted: a path, a URL, or null"):
        fetch(str(tmp_path / "nowhere.pth"))


# Loading


@pytest.mark.parametrize("zipped", [True, False], ids=["f37072fd", "5c106cde"])
@pytest.mark.parametrize("arguments", [{}, {"structure": "u_shape"}, OLD_V1], ids=["current", "u_shape", "older"])
def test_resnet18_fills_the_backbone(arguments: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    """Both ages of torchvision's file: the older one is no zip archive and counts no batches."""
    content = resnet18()
    if not zipped:
        content = {key: value for key, value in content.items() if "num_batches" not in key}
    file = save(content, tmp_path, "resnet18.pth", _use_new_zipfile_serialization=zipped)
    network = BiSeNetV1(19, **arguments)
    rest = {key: value.clone() for key, value in network.state_dict().items() if not key.startswith("cp.resnet.")}
    load_backbone(network.cp.resnet, file)
    for key, value in network.cp.resnet.state_dict().items():
        assert "num_batches" in key or torch.equal(value, content[key]), key
    assert all(torch.equal(network.state_dict()[key], value) for key, value in rest.items())


@pytest.mark.parametrize("generation", ["current", "older"])
def test_backbone_v2_fills_both_branches(generation: Any, tmp_path: Path) -> None:
    content = backbone_v2()
    network = BiSeNetV2(19, generation=generation)
    head = network.head.state_dict()
    load_backbone(network, save(content, tmp_path, "backbone_v2.pth"))
    for branch, state in content.items():
        for key, value in network.get_submodule(branch).state_dict().items():
            assert "num_batches" in key or torch.equal(value, state[key]), key
    assert all(torch.equal(network.head.state_dict()[key], value) for key, value in head.items())


def test_a_partial_fit_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_backbone(BiSeNetV1(19).cp.resnet, save(resnet18(), tmp_path, "resnet18.pth"))
    assert "100 of 102 entries fit the 100 of ResNet18; unused: fc.weight (1000, 512), fc.bias (1000,)" in caplog.text


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    wide = BiSeNetV2(19, width_multiplier=2.0)
    before = {key: value.clone() for key, value in wide.state_dict().items()}
    file = save(backbone_v2(), tmp_path, "backbone_v2.pth")
    with pytest.raises(ValueError, match=r"backbone_v2\.pth: \d+ of \d+ entries fit .*; not so detail\.S1.*null"):
        load_backbone(wide, file)
    assert all(torch.equal(wide.state_dict()[key], value) for key, value in before.items())
    for content in ({"conv.weight": torch.rand(3)}, {}, [torch.rand(3)], torch.rand(3)):
        with pytest.raises(ValueError, match=r"other\.pth: 0 of \d entries fit"):
            load_backbone(wide, save(content, tmp_path, "other.pth"))
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.pth cannot be read as tensors"):
        load_backbone(wide, tmp_path / "page.pth")


# In an experiment


def test_the_model_says_where_the_weights_go(tmp_path: Path) -> None:
    files = {"resnet18": save(resnet18(), tmp_path, "r.pth"), "v2": save(backbone_v2(), tmp_path, "v2.pth")}
    models = {"bisenetv1": "resnet18", "bisenetv1_diss": "resnet18", "bisenetv1_ushape": "resnet18", "bisenetv2": "v2"}
    for model, weights in models.items():
        cfg = composed(f"model={model}", f"model.pretrained={files[weights]}")
        network = experiment.build(cfg, ClassTable.load("cityscapes")).segmenter.network
        before = {key: value.clone() for key, value in network.state_dict().items()}
        experiment.load_pretrained(network, typed(cfg.model))
        changed = {key.rsplit(".", 1)[0] for key, value in network.state_dict().items() if not value.equal(before[key])}
        assert changed, model
        assert all(name.startswith(("cp.resnet.", "detail.", "segment.")) for name in changed), model


def test_the_config_is_named_in_every_error(tmp_path: Path) -> None:
    network = BiSeNetV2(19)
    with pytest.raises(ValueError, match=r"model\.pretrained: got 'nowhere\.pth'"):
        experiment.load_pretrained(network, ModelConfig(pretrained="nowhere.pth"))
    with pytest.raises(ValueError, match=r"model\.backbone: got 'cp\.resnet', accepted: a module of the network"):
        experiment.load_pretrained(network, ModelConfig(pretrained="nowhere.pth", backbone="cp.resnet"))


def test_a_recipe_without_its_weights_stops_before_any_data(cache: Path, tmp_path: Path) -> None:
    """The weights are asked for first, so that the missing data set is not what is complained about."""
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"
    recipe = ["experiment=cityscapes_bisenetv1", f"data.root={tmp_path / 'nowhere'}"]
    with pytest.raises(ValueError, match=rf"model\.pretrained: {url} cannot be downloaded.*null to train from scratch"):
        experiment.train(composed(*recipe, f"model.pretrained={url}"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data\.root: .*nowhere is not a folder"):
        experiment.train(composed(*recipe, "model.pretrained=null"), tmp_path)


def test_a_checkpoint_needs_no_pretrained_weights(cache: Path, tmp_path: Path) -> None:
    """Building a network, which loading and resuming do, asks for nothing."""
    cfg = composed("experiment=cityscapes_bisenetv2", "model.pretrained=http://127.0.0.1:9/lost.pth")
    experiment.build(cfg, ClassTable.load("cityscapes"))
    assert not cache.exists()
