"""The server, started as a user does: good and bad images, several at once, and the page in a browser."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from PIL import Image

import bisenet
from bisenet import checkpoint
from bisenet.classes import ClassTable
from bisenet.data.scenes import render_scene
from bisenet.inference import Protocol, Segmenter

pytest.importorskip("litserve", reason="takes the extra `serve`")

SCENES = [render_scene(0, "val", number, size)[0] for number, size in enumerate([(64, 128), (65, 131), (64, 128)])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network of random weights."""
    path = tmp_path_factory.mktemp("model") / "last.ckpt"
    node = {"_target_": "bisenet.networks.BiSeNetV2", "width_multiplier": 0.125, "aux": False}
    torch.manual_seed(0)
    network = checkpoint.build(node, n_classes=19)
    segmenter = Segmenter(network, ClassTable.load("cityscapes"), (0.3, 0.3, 0.3), (0.2, 0.2, 0.2), {"ss": Protocol()})
    checkpoint.write(path, network.state_dict(), 1, checkpoint.portable(node, segmenter, {"name": "x"}), {})
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "bisenet.cli", "serve", f"checkpoint={model}", f"port={port}", "max_bytes=400000",
               "max_pixels=4e5", "batch_timeout=0.2", "accelerator=cpu"]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 240
    try:
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            try:
                if get(address + "health")[0] == 200:
                    break
            except URLError:
                pass
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(120)
        with pytest.raises(URLError):  # nobody is left
            get(address)


def get(url: str, body: bytes | None = None) -> tuple[int, bytes]:
    try:
        with urlopen(Request(url, body, {"Content-Type": "image/png"}), timeout=60) as answer:
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()


def png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(encoded := BytesIO(), "PNG")
    return encoded.getvalue()


def test_masks_are_those_of_the_model_however_many_at_once(server: str, model: Path) -> None:
    segmenter = bisenet.load(model)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda scene: get(server + "predict", png(scene)), SCENES))
    for (status, content), scene in zip(answers, SCENES, strict=True):
        assert status == 200
        mask = Image.open(BytesIO(content))
        assert mask.mode == "P"
        assert (np.array(mask) == segmenter.predict(scene)).mean() > 0.999
        palette = mask.getpalette() or []
        assert palette[3:6] == [244, 35, 232]  # sidewalk


def test_runs_and_overlay(server: str, model: Path) -> None:
    expected = bisenet.load(model).predict(SCENES[1])
    found = json.loads(get(server + "predict?output=runs", png(SCENES[1]))[1])
    values, lengths = np.array(found["runs"]).T
    assert (np.repeat(values, lengths).reshape(found["size"]) == expected).mean() > 0.999
    drawn = [np.array(Image.open(BytesIO(get(server + f"predict?output=overlay&alpha={alpha}", png(SCENES[1]))[1])))
             for alpha in (0, 1)]  # fmt: skip
    assert drawn[0].shape == SCENES[1].shape
    assert (drawn[0] == SCENES[1]).mean() > 0.5  # but for the lines where classes meet
    assert (drawn[1] == SCENES[1]).mean() < 0.5


@pytest.mark.parametrize(
    ("body", "query", "status", "named"),
    [
        (b"", "", 400, "no image"),
        (b"no image", "", 400, "no image"),
        (png(SCENES[0])[:-900], "", 400, "truncated"),
        (b"/etc/passwd", "", 400, "no image"),
        (b"http://127.0.0.1/image.png", "", 400, "no image"),
        (b"\0" * 400_001, "", 413, "400000 bytes"),
        (png(np.zeros((700, 700, 3), np.uint8)), "", 413, "700 x 700"),
        (png(SCENES[0]), "?output=video", 422, "mask"),
        (png(SCENES[0]), "?output=overlay&alpha=2", 422, "alpha"),
    ],
)
def test_what_is_no_image_is_refused_by_its_reason(
    server: str, body: bytes, query: str, status: int, named: str
) -> None:
    found, content = get(server + "predict" + query, body)
    assert (found, named in content.decode()) == (status, True), content


def test_a_bad_image_costs_its_neighbours_nothing(server: str) -> None:
    bodies = [png(SCENES[0]), b"no image", png(SCENES[2])]
    with ThreadPoolExecutor(3) as pool:
        assert [status for status, _ in pool.map(lambda b: get(server + "predict", b), bodies)] == [200, 400, 200]


def test_the_page_loads_nothing_from_elsewhere(server: str) -> None:
    status, content = get(server)
    assert status == 200
    assert b"<title>bisenet</title>" in content
    assert b"http://" not in content
    assert b"https://" not in content
    about = json.loads(get(server + "info")[1])["model"]
    assert [entry["name"] for entry in about["classes"]][:2] == ["road", "sidewalk"]
    assert str(Path.cwd()) not in json.dumps(about)


def test_it_listens_on_this_machine_only(server: str) -> None:
    port = int(server.rstrip("/").rpartition(":")[2])
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


CHROMIUM = shutil.which("chromium")


@contextmanager
def browser(folder: Path, address: str) -> Iterator[Callable[..., Any]]:
    """Headless Chromium at a page, with a camera that shows a test image; call it with methods of its protocol."""
    from websockets.sync.client import connect  # comes with litserve

    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
               "--window-size=1000,900", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
               f"--user-data-dir={folder}", address]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (folder / "DevToolsActivePort").is_file())
        port = (folder / "DevToolsActivePort").read_text().split()[0]
        pages = wait_for(
            lambda: [p for p in json.loads(get(f"http://127.0.0.1:{port}/json")[1]) if p["url"] == address]
        )
        with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket_:

            def call(method: str, **parameters: Any) -> Any:
                socket_.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                while (answer := json.loads(socket_.recv(60))).get("id") != 1:
                    pass
                return answer["result"]

            yield call
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page_in_a_browser(server: str, tmp_path: Path) -> None:
    """A dropped image, one that is none, the slider, the download and the camera; a screenshot is left."""
    with browser(tmp_path, server) as call:

        def run(script: str) -> Any:
            found = call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
            assert "exceptionDetails" not in found, found
            return found["result"].get("value")

        def drop(content: bytes) -> None:
            bytes_ = base64.b64encode(content).decode()
            run(f"""window.data = new DataTransfer();
                data.items.add(new File([Uint8Array.from(atob("{bytes_}"), c => c.charCodeAt(0))], "street.png"));
                $("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: data}}))""")

        wait_for(lambda: run("document.querySelectorAll('#legend li').length") == 19)
        drop(b"no image")
        wait_for(lambda: run("$('state').className") == "bad")
        drop(png(render_scene(0, "val", 0, (200, 400))[0]))
        wait_for(lambda: "400 x 200, " in run("$('state').textContent"))
        assert " %" in run("$('legend').textContent")
        assert run("$('save').download + ' ' + $('save').href").startswith("mask.png blob:")

        def weigh(weight: int) -> Any:
            return run(f"$('weight').value = {weight}; draw(); [...context.getImageData(0, 0, 400, 200).data].join()")

        (tmp_path.parent / "page.png").write_bytes(base64.b64decode(call("Page.captureScreenshot")["data"]))
        assert weigh(0) != weigh(100)
        run("film(); 0")
        wait_for(lambda: run("stream !== null && image.width == 640"))
        run("film()")
        assert run("stream") is None
