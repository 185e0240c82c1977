"""Images, folders, globs and videos in; overlays, masks and ids out; nothing lost, nothing replaced unasked."""

import errno
import logging
import os
import re
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_inference import Patches

from bisenet import predict
from bisenet.classes import ClassTable, SegmentationClass
from bisenet.inference import Protocol, Segmenter
from bisenet.predict import Predictions, UnusableInput, find_sources, read_image
from bisenet.report import legend, legend_columns, overlay

CITYSCAPES = ClassTable.load("cityscapes")
ALL: dict[str, Any] = {"palette": True, "train_ids": True, "label_ids": True}


def segmenter(classes: ClassTable = CITYSCAPES) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Patches(classes.num_classes), classes, [0.4] * 3, [0.3] * 3, {"ss": Protocol()}).eval()


def many_classes(count: int) -> ClassTable:
    draw = np.random.default_rng(0).integers(0, 256, (count, 3)).tolist()
    rows = (SegmentationClass(f"a class with number {i}", (i,), i, (r, g, b)) for i, (r, g, b) in enumerate(draw))
    return ClassTable("many", tuple(rows))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.ascontiguousarray(np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:height, :width])


def video(path: Path, frames: int, size: tuple[int, int] = (64, 96)) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size[::-1])
    for number in range(frames):
        writer.write(noise(*size, seed=number))
    writer.release()
    return path


def run(given: Path | str, out: Path, classes: ClassTable = CITYSCAPES, **options: Any) -> list[str]:
    return Predictions(given, out, **options).run(segmenter(classes))


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def frames_of(path: Path) -> list[np.ndarray]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames


# --- what comes in ---------------------------------------------------------------------------------------------------


def test_inputs_are_a_file_a_folder_a_glob_or_a_camera(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = tmp_path / "in"
    a, b = save(images / "a.png", noise(8, 8)), save(images / "deep" / "b.JPG", noise(8, 8))
    clip = video(images / "clip.avi", 1)
    (images / "notes.txt").write_text("no image")
    save(images / "._a.png", noise(8, 8))  # as macOS leaves them
    save(images / ".cache" / "c.png", noise(8, 8))
    save(images / "out" / "old.png", noise(8, 8))

    def found(given: object) -> dict[Any, str]:
        return {s.origin: s.name.as_posix() for s in find_sources(str(given), exclude=[images / "out"])}

    assert found(a) == {a: "a"}
    assert found(images) == {a: "a", clip: "clip", b: "deep/b"}
    assert "1 files of other formats are left out (1 .txt)" in caplog.text
    assert found(images / "._a.png") == {images / "._a.png": "._a"}
    assert found(images / "**" / "*.JPG") == {b: "deep/b"}
    assert found(images / "*.??*") == {a: "a", clip: "clip", images / "notes.txt": "notes"}
    assert found("3") == {3: "camera3"}
    assert [s.is_stream for s in find_sources(str(images), exclude=[])] == [False, True, False, False]
    twin = save(images / "a.jpg", noise(8, 8))
    assert {found(images)[path] for path in (a, twin)} == {"a.png", "a.jpg"}
    nothing = {tmp_path / "nowhere.png": "nothing", tmp_path / "*.png": "nothing"}
    for place, what in {**nothing, images / "out": "only what lies among the outputs"}.items():
        with pytest.raises(FileNotFoundError, match=rf"input: {what} at .*accepted: an image"):
            found(place)
    with pytest.raises(ValueError, match=r"accepted: a glob without '\.\.' after its first wildcard"):
        found(images / "*" / ".." / ".." / "in" / "*.png")


def test_outputs_are_never_inputs_and_may_lie_beside_them(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(16, 16))
    for place in (tmp_path / "a.png", tmp_path, tmp_path / "*.png"):
        assert [s.origin for s in Predictions(place, tmp_path, overwrite=True).sources] == [tmp_path / "a.png"]
        assert run(place, tmp_path, overwrite=True) == []
    with pytest.raises(FileNotFoundError, match="only what lies among the outputs"):
        run(tmp_path / "overlay", tmp_path, overwrite=True)


def test_grey_alpha_palette_and_16_bits_are_read_as_rgb(tmp_path: Path) -> None:
    rgb = noise(24, 40)
    grey = Image.fromarray(rgb).convert("L")
    save(tmp_path / "rgb.png", rgb)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(rgb).convert("P").save(tmp_path / "palette.png")
    save(tmp_path / "rgba.png", np.dstack([rgb, noise(24, 40, 1)[..., 0]]))
    for suffix in ("png", "tiff"):
        cv2.imwrite(str(tmp_path / f"deep.{suffix}"), rgb[..., ::-1].astype(np.uint16) * 257)
    expected = {
        "rgb.png": rgb,
        "grey.png": np.repeat(np.asarray(grey)[..., None], 3, 2),
        "palette.png": np.asarray(Image.open(tmp_path / "palette.png").convert("RGB")),
        "rgba.png": rgb,
        "deep.png": rgb,
        "deep.tiff": rgb,
    }
    for name, pixels in expected.items():
        read = read_image(tmp_path / name)
        assert read.dtype == np.uint8
        assert np.array_equal(read, pixels), name
    turned = Image.fromarray(rgb)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (40, 24, 3)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.png", noise(40, 40)).read_bytes()
    save(tmp_path / "whole.jpg", noise(40, 40))
    jpeg = (tmp_path / "whole.jpg").read_bytes()
    broken = {"cut.png": whole[:200], "cut.jpg": jpeg[: len(jpeg) // 2], "empty.png": b"", "text.png": b"hello"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnusableInput, match=re.escape(name)):
            read_image(tmp_path / name)
    cv2.imwrite(str(tmp_path / "float.tiff"), noise(8, 8).astype(np.float32))
    with pytest.raises(UnusableInput, match=r"float\.tiff holds float32 values; accepted: 8 or 16 bits"):
        read_image(tmp_path / "float.tiff")


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = (32_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])  # 3 GB once decoded
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))))
    limit, started = Image.MAX_IMAGE_PIXELS, time.perf_counter()
    with pytest.raises(
        UnusableInput, match=r"bomb\.png has 32000 x 32000, 1024 megapixels; accepted: up to 100, unless"
    ):
        read_image(bomb)
    assert time.perf_counter() - started < 1
    assert limit == Image.MAX_IMAGE_PIXELS
    save(tmp_path / "in" / "a.png", noise(16, 16))
    save(tmp_path / "in" / "b.png", noise(16, 17))
    (problem,) = run(tmp_path / "in", tmp_path / "out", max_pixels=256)
    assert "b.png has 17 x 16" in problem


def test_12_bits_in_16_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cv2.imwrite(str(tmp_path / "dark.png"), noise(8, 8).astype(np.uint16) * 16)
    assert read_image(tmp_path / "dark.png").max() < 16
    assert "dark.png: nearly black, its 16-bit values end at" in caplog.text


def test_the_pages_of_a_tiff_after_the_first_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    first, second = (Image.fromarray(noise(8, 9, seed)) for seed in (0, 1))
    first.save(tmp_path / "two.tiff", save_all=True, append_images=[second])
    assert np.array_equal(read_image(tmp_path / "two.tiff"), noise(8, 9))
    assert "two.tiff holds several images; the first is taken" in caplog.text


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_folder_of_mixed_images_and_a_broken_one(tmp_path: Path) -> None:
    images, out = tmp_path / "in", tmp_path / "out"
    sizes = {"small": (9, 13), "odd": (75, 131), "street/aachen_000000_000019_leftImg8bit": (64, 128)}
    for name, size in sizes.items():
        save(images / f"{name}.png", noise(*size))
    (images / "broken.png").write_bytes(b"\x89PNG")
    video(images / "broken.avi", 3)
    (images / "broken.avi").write_bytes((images / "broken.avi").read_bytes()[:100])

    problems = run(images, out, **ALL)
    assert len(problems) == 2
    assert all("broken." in problem for problem in problems)
    kinds = {"overlay": "jpg", "palette": "png", "train_ids": "png", "label_ids": "png"}
    expected = {f"{kind}/{name}.{suffix}" for kind, suffix in kinds.items() for name in sizes}
    assert files(out) == expected | {"legend.png"}

    model = segmenter()
    for name, (height, width) in sizes.items():
        mask = model.predict(noise(height, width))
        written = {kind: Image.open(out / kind / f"{name}.png") for kind in ("train_ids", "label_ids", "palette")}
        assert [image.mode for image in written.values()] == ["L", "L", "P"]
        values = {kind: np.asarray(image) for kind, image in written.items()}
        assert np.array_equal(values["train_ids"], mask)
        assert np.array_equal(values["label_ids"], CITYSCAPES.decode[mask])
        assert np.array_equal(values["palette"], mask)
        assert np.array_equal(np.asarray(written["palette"].convert("RGB")), CITYSCAPES.palette[mask])
        drawn = np.asarray(Image.open(out / "overlay" / f"{name}.jpg"))
        assert drawn.shape[1] == width
        assert drawn.shape[0] > height  # the legend is below


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    images = tmp_path / "in"
    save(images / "a.png", noise(8, 8))
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "itself.png").symlink_to(images / "itself.png")
    (images / "folder.png").mkdir()
    for out, source in {"folder": images, "glob": images / "*.png"}.items():
        gone, itself = run(source, tmp_path / out)
        assert "gone.png cannot be read" in gone
        assert "itself.png cannot be read" in itself
        assert (tmp_path / out / "overlay" / "a.jpg").exists()
    (problem,) = run(images / "gone.png", tmp_path / "alone")
    assert "gone.png cannot be read" in problem


@pytest.mark.parametrize("error", [RuntimeError("not enough memory: you tried to\nallocate 9"), MemoryError()])
def test_an_image_that_is_too_large_is_named_and_the_others_are_written(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in {"a": (16, 16), "b": (80, 40), "c": (16, 16)}.items():
        save(tmp_path / "in" / f"{name}.png", noise(*size))
    whole = Segmenter.predict

    def limited(self: Segmenter, rgb: np.ndarray) -> np.ndarray:
        if rgb.size > 3 * 16 * 16:
            raise error
        return whole(self, rgb)

    monkeypatch.setattr(Segmenter, "predict", limited)
    (problem,) = run(tmp_path / "in", tmp_path / "out")
    why = str(error).split("\n")[0] or "MemoryError"
    assert problem == f"{tmp_path / 'in' / 'b.png'} cannot be segmented (80 x 40 pixels): {why}"
    assert files(tmp_path / "out") == {"legend.png", "overlay/a.jpg", "overlay/c.jpg"}


@pytest.mark.parametrize("classes", [CITYSCAPES, many_classes(171)], ids=["19", "171"])
def test_a_video_becomes_a_video_and_its_masks_numbered_files(classes: ClassTable, tmp_path: Path) -> None:
    clip = video(tmp_path / "clip.avi", 4)
    assert run(clip, tmp_path / "out", classes, max_frames=3, train_ids=True) == []
    frames = frames_of(tmp_path / "out" / "overlay" / "clip.mp4")
    assert len(frames) == 3
    masks = [Image.open(tmp_path / "out" / "train_ids" / "clip" / f"00000{n}.png") for n in range(3)]
    assert all(mask.size == (96, 64) for mask in masks)
    assert frames[0].shape[:2] > (64, 96)
    rgb = cv2.cvtColor(frames_of(clip)[0], cv2.COLOR_BGR2RGB)
    drawn = overlay(rgb, np.asarray(masks[0]), classes.palette, edges=True)
    assert np.abs(cv2.cvtColor(frames[0], cv2.COLOR_BGR2RGB)[:64, :96] - drawn.astype(int)).mean() < 25  # MPEG-4 loses
    assert run(clip, tmp_path / "bare", classes, legend=False) == []
    assert [f.shape for f in frames_of(tmp_path / "bare" / "overlay" / "clip.mp4")] == [(64, 96, 3)] * 4
    assert files(tmp_path / "bare") == {"overlay/clip.mp4"}
    assert run(clip, tmp_path / "out", classes, max_frames=1, train_ids=True, overwrite=True) == []
    assert files(tmp_path / "out") == {"legend.png", "overlay/clip.mp4", "train_ids/clip/000000.png"}


def test_nothing_that_exists_is_replaced_unless_asked(tmp_path: Path) -> None:
    image, out = save(tmp_path / "a.png", noise(16, 16)), tmp_path / "out"
    run(image, out, train_ids=True)
    mine = out / "train_ids" / "a.png"
    mine.write_text("mine")
    (out / "overlay" / "a.jpg").unlink()
    with pytest.raises(
        FileExistsError, match=r"output: 1 exist, such as .*a\.png; accepted: another output, or overwrite=true"
    ):
        run(image, out, train_ids=True)
    assert mine.read_text() == "mine"
    assert not (out / "overlay" / "a.jpg").exists()  # refused before anything is written
    run(image, out)  # another kind is free
    run(image, out, train_ids=True, overwrite=True)
    assert Image.open(mine).size == (16, 16)


def test_an_interrupted_video_keeps_the_frames_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, model = video(tmp_path / "clip.avi", 5), segmenter()
    answers = iter([model.predict(noise(64, 96))] * 2)

    def interrupted(_: np.ndarray) -> np.ndarray:
        if (mask := next(answers, None)) is None:
            raise KeyboardInterrupt
        return mask

    monkeypatch.setattr(model, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Predictions(clip, tmp_path / "out").run(model)
    assert len(frames_of(tmp_path / "out" / "overlay" / "clip.mp4")) == 2


def test_the_next_image_is_read_and_the_last_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        save(tmp_path / "in" / f"{number}.png", noise(16, 16, number))
    model, read, release = segmenter(), list[str](), threading.Event()
    whole, read_whole, ahead = model.predict, predict.read_image, list[int]()

    def reading(path: Path, max_pixels: float) -> np.ndarray:
        read.append(path.name)
        return read_whole(path, max_pixels)

    def predicting(rgb: np.ndarray) -> np.ndarray:
        for _ in range(1000):
            if len(read) > len(ahead) + 1 or len(read) == 8:
                break
            time.sleep(0.01)
        ahead.append(len(read))
        if len(ahead) == 2:
            release.set()
        return whole(rgb)

    def writing(target: Path, content: bytes) -> None:
        assert release.wait(10)  # the network goes on before a single file is there
        written(target, content)

    written = predict._write_file
    monkeypatch.setattr(predict, "read_image", reading)
    monkeypatch.setattr(predict, "_write_file", writing)
    monkeypatch.setattr(model, "predict", predicting)
    assert Predictions(tmp_path / "in", tmp_path / "out", legend=False).run(model) == []
    assert len(files(tmp_path / "out")) == 8
    assert ahead == [2, 3, 4, 5, 6, 7, 8, 8]  # one ahead, and no more


@pytest.mark.parametrize("legend", [False, True])
def test_a_full_disk_ends_it_and_names_the_file(legend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        save(tmp_path / "in" / f"{number}.png", noise(16, 16, number))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    name = "legend.png" if legend else "overlay/0.jpg"
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/out/{name}'"):
        run(tmp_path / "in", tmp_path / "out", legend=legend)


def test_two_inputs_are_never_written_to_one_place(tmp_path: Path) -> None:
    save(tmp_path / "in" / "drive" / "000000.png", noise(8, 8))
    video(tmp_path / "in" / "drive.avi", 2)
    with pytest.raises(ValueError, match=r"several would be written to .*000000\.png"):
        run(tmp_path / "in", tmp_path / "out", palette=True)
    assert not (tmp_path / "out").exists()


def test_a_stream_is_read_until_it_ends_or_max_frames(tmp_path: Path, server: tuple[str, Path]) -> None:
    address, folder = server
    video(folder / "drive.avi", 4)
    given = address.replace("//", "//user:secret@") + "/drive.avi?x=1"
    assert run(given, tmp_path / "out") == []
    (written,) = (tmp_path / "out" / "overlay").iterdir()
    assert written.name == "127.0.0.1-drive.avi.mp4"
    assert len(frames_of(written)) == 4
    assert run(given, tmp_path / "some", max_frames=2, train_ids=True, overlay=False, legend=False) == []
    assert len(files(tmp_path / "some")) == 2
    (problem,) = run(given, tmp_path / "large", max_pixels=100)
    assert "drive.avi?x=1 has 0 megapixels; accepted: 0.0001" in problem
    assert "secret" not in problem


@pytest.mark.parametrize("nothing", ["93", "http://127.0.0.1:9/a.mp4", "rtsp://127.0.0.1:9/live"])
def test_a_camera_or_stream_that_is_not_there_is_named(nothing: str, tmp_path: Path) -> None:
    (problem,) = run(nothing, tmp_path)
    assert problem.startswith(f"{'camera' if nothing == '93' else 'stream'} {nothing} cannot be read: not there")


# --- drawing ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 171), st.integers(1, 6) | st.none())
def test_a_legend_has_the_width_of_the_image_and_one_height_for_all_frames(
    width: int, shown: int, rows: int | None
) -> None:
    classes = many_classes(171)
    drawn = legend(classes.names, classes.palette, range(shown), width, rows)
    assert drawn.shape[1:] == (width, 3)
    assert drawn.dtype == np.uint8
    if rows is not None:
        assert drawn.shape == legend(classes.names, classes.palette, [], width, rows).shape
    assert legend_columns(classes.names, width) >= 1


def test_a_legend_shows_the_colours_of_its_entries() -> None:
    classes = many_classes(171)
    drawn = legend(classes.names, classes.palette, [3, 170], 640).reshape(-1, 3).tolist()
    assert all(classes.palette[i].tolist() in drawn for i in (3, 170))
    assert classes.palette[4].tolist() not in drawn


def test_edges_are_drawn_where_classes_meet_and_nowhere_else() -> None:
    mask = np.zeros((40, 60), np.uint8)
    plain = np.full((40, 60, 3), 100, np.uint8)
    assert np.array_equal(
        overlay(plain, mask, CITYSCAPES.palette, edges=True), overlay(plain, mask, CITYSCAPES.palette)
    )
    mask[:, 30:] = 13
    changed = (overlay(plain, mask, CITYSCAPES.palette, edges=True) != overlay(plain, mask, CITYSCAPES.palette)).any(2)
    assert changed.any(0).nonzero()[0].tolist() in ([29], [30], [29, 30])
    assert changed[:, 30 if changed[0, 30] else 29].all()


# --- before anything is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"alpha": 2}, {"overlay": False}, {"max_frames": 0}, {"max_pixels": 0}])
def test_an_impossible_value_is_named(options: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(8, 8))
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: got .*, accepted: "):
        Predictions(tmp_path / "a.png", tmp_path / "out", **options)
