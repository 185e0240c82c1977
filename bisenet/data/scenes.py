"""Procedural street scenes with the 19 Cityscapes classes, written once to disk in the layout of Cityscapes.

A scene is a street seen by a pinhole camera: axes in metres, x right, y up, z ahead, the camera above x = z = 0 and
looking along z. Everything is painted from far to near on one canvas of four channels, colour and label together, so
image and label cannot disagree. Lengths in the image are fractions of its height: a scene looks alike at every size.
"""

import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

Size = tuple[int, int]  # height, width in pixels
Scene = tuple[np.ndarray, np.ndarray]  # image, RGB uint8 (H, W, 3); label ids, uint8 (H, W)
Pair = tuple[float, float]
Colour = tuple[float, float, float]  # RGB in 0..255

GENERATOR = 3
"""Version of the scenes, to be raised whenever the same parameters give other pixels."""

# Id in label files, and colours. Hues that differ between classes make a network of a few hundred steps see them, as
# size and shape do for longer ones.
_CLASSES: dict[str, tuple[int, tuple[Colour, ...]]] = {
    "ego vehicle": (1, ((40, 42, 48),)),
    "road": (7, ((84, 86, 94),)),
    "sidewalk": (8, ((196, 164, 146),)),
    "building": (11, ((226, 208, 170), (216, 212, 204), (220, 196, 130), (214, 176, 164), (168, 180, 196))),
    "wall": (12, ((150, 84, 52), (138, 76, 58), (162, 98, 60))),
    "fence": (13, ((22, 92, 84), (26, 110, 92), (30, 84, 100))),
    "pole": (17, ((116, 120, 122),)),
    "traffic light": (19, ((248, 186, 24),)),
    "traffic sign": (20, ((200, 24, 32), (24, 74, 190))),
    "vegetation": (21, ((44, 84, 34), (58, 98, 40), (38, 74, 44), (76, 104, 44))),
    "terrain": (22, ((132, 144, 74),)),
    "sky": (23, ((92, 146, 214), (168, 174, 182))),
    "person": (24, ((150, 30, 60), (110, 40, 110), (176, 60, 90), (60, 50, 90))),
    "rider": (25, ((206, 224, 40), (244, 128, 24), (230, 210, 30))),
    "car": (26, ((196, 200, 204), (34, 36, 40), (232, 232, 230), (92, 98, 104), (150, 28, 30))),
    "truck": (27, ((30, 84, 180), (44, 110, 200), (40, 64, 160))),
    "bus": (28, ((232, 184, 24), (238, 140, 24))),
    "train": (31, ((110, 50, 150), (140, 40, 120), (84, 52, 140))),
    "motorcycle": (32, ((214, 60, 20), (196, 84, 16))),
    "bicycle": (33, ((20, 170, 200), (40, 190, 170), (90, 200, 220))),
}
_DARK, _GLASS, _WHITE, _RED, _SKIN = (24, 24, 27), (40, 50, 62), (236, 236, 230), (224, 30, 30), (206, 162, 130)
_Line = tuple[Colour | None, float, tuple[tuple[float, float], ...]]
# What faces the camera: lines with round ends, their colour (None for the class's own), thickness and points.
_FIGURES: dict[str, tuple[_Line, ...]] = {
    "pole": ((None, 0.3, ((0, 0), (0, 6.5))), (None, 0.2, ((-1.3, 6.5), (1.3, 6.5)))),
    "traffic sign": ((None, 1.2, ((0, 2.6),)), (_WHITE, 0.85, ((0, 2.6),)), (None, 0.2, ((-0.2, 2.6), (0.2, 2.6)))),
    "traffic light": ((None, 1.0, ((0, 3), (0, 4.3))), (_DARK, 0.7, ((0, 3), (0, 4.3))), (_RED, 0.6, ((0, 4.2),))),
    "person": (
        (_GLASS, 0.2, ((-0.2, 0.1), (0, 0.9), (0.14, 0.1))),
        (None, 0.14, ((-0.34, 0.9), (-0.2, 1.35), (0.2, 1.35), (0.3, 0.9))),
        (None, 0.48, ((0, 1.0), (0, 1.26))),
        (_DARK, 0.28, ((0, 1.69),)),
        (_SKIN, 0.25, ((0, 1.62),)),
    ),
    "rider": (
        (_GLASS, 0.2, ((-0.25, 0.96), (0.2, 0.8), (0.04, 0.32))),
        (None, 0.38, ((-0.2, 1.06), (0.08, 1.44))),
        (None, 0.14, ((0.1, 1.44), (0.44, 1.1))),
        (_SKIN, 0.3, ((0.2, 1.74),)),
        (None, 0.26, ((0.16, 1.84), (0.24, 1.84))),
    ),
    "motorcycle": (
        *((_DARK, 0.72, ((x, 0.36),)) for x in (-0.72, 0.72)),
        ((70, 44, 40), 0.4, ((-0.4, 0.5), (0.3, 0.5))),
        ((170, 172, 176), 0.13, ((0.4, 1.15), (0.72, 0.37))),
        (None, 0.3, ((-0.7, 0.84), (0.4, 0.84))),
    ),
    "bicycle": (
        *((rim, width, ((x, 0.37),)) for x in (-0.56, 0.56) for rim, width in ((_DARK, 0.74), ((176, 206, 210), 0.56))),
        (None, 0.13, ((0.56, 0.37), (0.42, 1), (0, 0.37), (-0.18, 0.95), (0.44, 0.9))),
        (None, 0.13, ((0, 0.37), (-0.56, 0.37), (-0.18, 0.9))),
    ),
}
# Width and length in metres, and boxes: bottom, top, from and to (shares of the length from the front), taper, windows.
_VEHICLES = {
    "car": (1.8, 4.3, ((0, 0.95, 0, 1, 1, 0), (0.95, 1.5, 0.2, 0.86, 0.8, 2))),
    "truck": (2.45, 8.5, ((0, 2.6, 0, 0.27, 0.95, 1), (0, 3.5, 0.3, 1, 1, 0))),
    "bus": (2.55, 10.5, ((0, 3.2, 0, 1, 1, 6),)),
    "train": (2.5, 22.0, ((0, 3.5, 0, 0.49, 0.96, 5), (0, 3.5, 0.51, 1, 0.96, 5))),
}
_Cells = tuple[Any, tuple[int, int], int, Pair, float, float]
_SQUARE = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
_NEAR, _FAR, _LANE = 0.8, 160.0, 3.0  # metres: the near plane, the end of the street, the width of a lane


class _Canvas:
    """Camera, light and pixels of one scene, at first a sky, and the strokes that all its things are made of."""

    def __init__(self, rng: np.random.Generator, size: Size) -> None:
        self.rng, (height, width) = rng, size
        self.eye, self.focal = rng.uniform(1.4, 1.9), 1.25 * height  # metres above the road; 77 degrees across at 1:2
        self.vanishing = np.array((rng.uniform(0.42, 0.58) * width, rng.uniform(0.4, 0.48) * height))
        self.haze, self.visibility = np.array((190, 202, 214)), rng.uniform(150, 600)  # RGB, metres
        ramp = np.linspace(0, height / self.vanishing[1], height)[:, None, None]
        air = (1 - ramp) * self.tint("sky") + ramp * self.haze
        clouds = cv2.resize(rng.random((12, 10)), (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
        air = air + np.clip(2.4 * clouds - rng.uniform(0.9, 1.9), 0, 0.9) * (245 - air)
        self.pixels = np.dstack([air, np.full(size, _CLASSES["sky"][0])]).clip(0, 255).astype(np.uint8)  # RGB, label

    def tint(self, name: str) -> np.ndarray:
        """A colour of the class, a little brighter or darker and off in hue."""
        return self.rng.choice(_CLASSES[name][1]) + self.rng.uniform(-14, 14) + self.rng.uniform(-7, 7, 3)

    def fill(self, polygons: np.ndarray, colour: Any, name: str, thickness: float = 0) -> None:
        """Fill disjoint polygons (n, vertices, 3) in metres, seen through haze, or draw lines with round ends."""
        ahead, z = np.maximum(polygons[..., 2:], _NEAR), polygons[..., 2].mean()
        seen = (polygons[..., :2] - np.array((0, self.eye))) / ahead * np.array((1, -1)) * self.focal + self.vanishing
        clear, vertices = np.exp(-z / self.visibility), list((seen * 16).astype(np.int32))
        r, g, b = np.clip(np.multiply(colour, clear) + self.haze * (1 - clear), 0, 255)
        if thickness:
            pixels = max(round(thickness * self.focal / z), 1)
            cv2.polylines(self.pixels, vertices, False, (r, g, b, _CLASSES[name][0]), pixels, cv2.LINE_8, shift=4)
        else:
            cv2.fillPoly(self.pixels, vertices, (r, g, b, _CLASSES[name][0]), cv2.LINE_8, shift=4)

    def line(self, at: Pair, points: Sequence[Pair], thickness: float, colour: Any, name: str) -> None:
        """Draw a line, or a dot, that faces the camera, in metres beside and above the ground point `at` (x, z)."""
        self.fill(np.array([[(at[0] + x, y, at[1]) for x, y in (*points, points[-1])]]), colour, name, thickness)

    def box(self, x: Pair, z: Pair, colour: Any, name: str, y: Pair = (0, 0), taper: float = 1, *cells: _Cells) -> None:
        """Draw a box, flat unless y is given, its top shrunken by taper, cells on its near end and visible side."""
        floor = np.array([(x[i], y[0], z[j]) for i, j in _SQUARE])
        roof = (floor - floor.mean(0)) * taper + floor.mean(0) + np.array((0, y[1] - y[0], 0))
        end, right, left = (np.array((floor[i], floor[j], roof[j], roof[i])) for i, j in ((0, 1), (1, 2), (0, 3)))
        inner, outer = (right, left) if sum(x) < 0 else (left, right)
        for face, light in ((outer, 0.8), (roof, 1.0), (inner, 0.8), (end, 0.95)):  # the hidden ones get covered
            self.fill(face[None], np.multiply(colour, light), name)
        for paint, columns, rows, share, low, high in cells:
            for (a, b, c, d), n, light in ((end, columns[0], 0.95), (inner, columns[1] * (x[0] * x[1] > 0), 0.8)):
                if n:
                    place = np.stack(np.divmod(np.arange(n * rows), rows), -1)[:, None] + 0.5 + (_SQUARE - 0.5) * share
                    u, v = place[..., :1] / n, place[..., 1:] / rows * (high - low) + low
                    panes = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * d + u * c)
                    self.fill(panes, np.multiply(paint, light), name)

    def develop(self) -> Scene:
        """The finished image, with exposure and noise, and its labels."""
        noise = self.rng.normal(1, 0.04, self.pixels.shape[:2])[..., None]
        image = cv2.GaussianBlur(self.pixels[..., :3] * noise, (3, 3), 0.6) * self.rng.uniform(0.8, 1.12)
        return np.clip(image, 0, 255).astype(np.uint8), self.pixels[..., 3].copy()


def _figure(c: _Canvas, x: float, z: float, *names: str) -> None:
    """Things made of lines, one before the other."""
    turn = c.rng.choice((-1, 1)) * c.rng.uniform(0.7, 1)
    for name in names:
        own = c.tint(name)
        for colour, thickness, points in _FIGURES[name]:
            c.line((x, z), [(turn * u, v) for u, v in points], thickness, colour or own, name)


def _tree(c: _Canvas, x: float, z: float) -> None:
    crown, top, leaf = c.rng.uniform(1.4, 2.4), c.rng.uniform(5, 8), c.tint("vegetation")
    c.line((x, z), [(0, 0), (0, top - crown)], 0.36, (84, 70, 56), "vegetation")
    for lit in np.linspace(0, 1, int(min(24, 5 + 140 / z))):  # dark masses first, tufts in the sun last
        u, v = c.rng.normal((0, top - crown + 0.5 * lit), 0.4 * crown)
        c.line((x, z), [(u, v)], crown * (1.5 - 1.1 * lit), leaf * (0.62 + 0.66 * lit), "vegetation")


def _front(c: _Canvas, x: float, near: float, far: float, name: str) -> None:
    """A house, a wall or a fence along the street."""
    colour, length, columns = c.tint(name), round(far - near), (8, round((far - near) / 2.7))
    height, deep, cells = {
        "building": (c.rng.uniform(6, 15), 22, (
            (c.tint(name), columns, 3, (0.66, 0.7), 0.3, 0.96),
            (_GLASS, columns, 3, (0.5, 0.56), 0.3, 0.96),
            (_GLASS, columns, 1, (0.7, 1), 0, 0.2),
        )),
        "wall": (c.rng.uniform(2.2, 3.4), 0.3, ((colour * 1.25, (1, length), 6, (0.92, 0.84), 0, 0.9),)),
        "fence": (c.rng.uniform(2.2, 3.4), 0.3, ((colour * 1.5, (1, 2 * length), 1, (0.5, 1), 0, 0.88),)),
    }[name]  # fmt: skip
    sides = (x, x + deep) if x > 0 else (x - deep, x)
    c.box(sides, (near, far), colour, name, (0, height), 1, *cells)


def _vehicle(c: _Canvas, x: float, z: float, name: str) -> None:
    """A vehicle whose nearest point is at z; it comes towards us on the left of the camera."""
    (width, length, boxes), colour, oncoming = _VEHICLES[name], c.tint(name), x < 0
    sides, lamps = (x - width / 2, x + width / 2), (250, 246, 216) if oncoming else _RED
    c.box((sides[0] - 0.2, sides[1] + 0.2), (z - 0.3, z + length), (34, 35, 40), "road")
    for bottom, top, start, stop, taper, windows in reversed(boxes) if oncoming and name != "car" else boxes:
        near, far = (start, stop) if oncoming else (1 - stop, 1 - start)
        cells: list[_Cells] = [(_GLASS, (1, windows), 1, (0.88, 1), 0.45, 0.85)] * (windows > 0)
        if bottom == 0:
            cells += [(_DARK, (1, 0), 1, (1, 1), 0, 0.3 / top), (lamps, (2, 0), 1, (0.4, 1), 0.5 / top, 0.75 / top)]
            cells += [(_DARK, (0, 2), 1, (1.6 / length / (stop - start), 1), 0, 0.7 / top)]  # wheels
        c.box(sides, (z + near * length, z + far * length), colour, name, (bottom, top), taper, *cells)


def _street(c: _Canvas) -> None:
    """Plan a street, then draw it: outer things first, as a line of sight only moves outwards, then farther ones."""
    rng, deep, things = c.rng, (_NEAR, _FAR), []

    def place(draw: Callable[..., None], x: float, z: float, *more: Any, band: float | None = None) -> None:
        things.append((abs(x if band is None else band), z, lambda: draw(c, x, z, *more)))

    c.box((-2 * _FAR, 2 * _FAR), deep, c.tint("terrain"), "terrain")
    # Cars park in the outer lanes.
    lanes = [_LANE * k for k in range(-int(rng.integers(2, 4)), 2 + (rng.random() < 0.3))]
    kerbs = [abs(lane) + _LANE / 2 for lane in (lanes[0], lanes[-1])]
    walks = [kerb + rng.uniform(2.5, 4.5) for kerb in kerbs]
    c.box((-walks[0], walks[1]), deep, c.tint("sidewalk"), "sidewalk")
    c.box((-kerbs[0], kerbs[1]), deep, c.tint("road"), "road")
    for side, lane, kerb, walk in zip((-1, 1), (lanes[1], lanes[-2]), kerbs, walks, strict=True):
        x, length = walk + rng.choice((0.5, 4, 7)), rng.uniform(10, 16)
        for z in np.arange(3.0, 90, length):
            place(_front, side * x, z, z + length, rng.choice(("building", "wall", "fence"), p=(0.45, 0.25, 0.3)))
        for z in np.arange(rng.uniform(6, 12), 90, 6):
            place(_tree, side * (x + rng.uniform(-4, 5)), z)
        for z in np.arange(rng.uniform(6, 12), 50, 8):
            more = ((), ("traffic sign",), ("traffic light",))[rng.choice(3, p=(0.2, 0.5, 0.3))]
            place(_figure, side * (kerb + 0.5), z, "pole", *more)
        for name, most in {"person": 8, "bicycle": 2, "motorcycle": 2}.items():
            for _ in range(rng.integers(most + 1)):
                place(_figure, side * rng.uniform(kerb + 0.8, walk), rng.uniform(5, 17), name)
        for z in rng.uniform(5, 15, rng.integers(3)):
            place(_figure, side * (abs(lane) + 0.8), z, rng.choice(("bicycle", "motorcycle")), "rider", band=lane)
    for x in lanes:
        for z in np.arange(2.0, 90, 6) if x < lanes[-1] else ():
            c.box((x + _LANE / 2 - 0.08, x + _LANE / 2 + 0.08), (z, z + 3), _WHITE, "road")
        z, kinds = rng.uniform(8, 18), (0.5, 0.25, 0.25, 0) if x == 0 else (0.35, 0.2, 0.2, 0.25)
        while z < 60:
            name = rng.choice(tuple(_VEHICLES), p=(1, 0, 0, 0) if x in (lanes[0], lanes[-1]) else kinds)
            place(_vehicle, x, z, name)
            z += _VEHICLES[name][1] + rng.uniform(4, 20)
    for _, _, draw in sorted(things, key=lambda thing: thing[:2], reverse=True):
        draw()
    if rng.random() < 0.3:
        c.line((0, 1.2), [(-0.8, c.eye - 0.65), (0.8, c.eye - 0.65)], 0.4, c.tint("ego vehicle"), "ego vehicle")


def _shapes(c: _Canvas) -> None:
    """Two areas, upper and lower, and an ellipse in each: four classes."""
    height, width = c.pixels.shape[:2]
    upper, lower, *inner = ((*c.tint(n), _CLASSES[n][0]) for n in c.rng.choice(list(_CLASSES)[1:], 4, replace=False))
    c.pixels[: height // 2], c.pixels[height // 2 :] = np.clip((upper, lower), 0, 255)
    for x, y, paint in zip(c.rng.uniform(0.3, 0.7, 2), (0.25, 0.75), inner, strict=True):
        axes = (round(width * c.rng.uniform(0.14, 0.18)), round(height * c.rng.uniform(0.16, 0.2)))
        cv2.ellipse(c.pixels, (round(width * x), round(height * y)), axes, 0, 0, 360, paint, cv2.FILLED)


def render_scene(seed: int, split: str, number: int, size: Size, scene: str = "street") -> Scene:
    """Draw one scene, a pure function of the arguments; the same number is another scene in another split.

    `size` is (H, W) in pixels; `scene` is ``street``, or ``shapes`` (few large areas, for debugging).
    Returns the image, RGB uint8 (H, W, 3), and the label, uint8 (H, W): the ids of Cityscapes' labelIds files.
    """
    canvas = _Canvas(np.random.default_rng(list(f"{seed}/{split}/{number}".encode())), size)
    (_street if scene == "street" else _shapes)(canvas)
    return canvas.develop()


def write_synthetic(root: Path, counts: Mapping[str, int], size: Size, seed: int, scene: str = "street") -> None:
    """Write ``counts[split]`` scenes of each split below ``root``, in the layout of Cityscapes.

    What is already there is kept, so that an interrupted set gets completed; several processes may write the same set
    at once. Many scenes are shared out over the cores, which changes nothing in them.

    Raises:
        ValueError: a ``root`` that holds another set or anything else; nothing is written then.
    """
    asked = {"generator": GENERATOR, "scene": scene, "seed": seed, "size": list(size), "counts": dict(counts)}
    manifest = root / "synthetic.json"
    # Looked at before the manifest is: another process may just be writing it, and then the images.
    occupied = root.is_file() or any((root / folder).exists() for folder in ("leftImg8bit", "gtFine"))
    found = json.loads(manifest.read_bytes()) if manifest.exists() else {} if occupied else asked
    if found != asked:
        wrong = ", ".join(f"{key} {found.get(key)}, not {asked[key]}" for key in asked if found.get(key) != asked[key])
        raise ValueError(
            f"{root} holds something else than these synthetic scenes ({wrong}), which is left as it is. "
            "Choose another data.root; or delete that folder, and the scenes asked for are drawn there"
        )
    scenes = [(split, number) for split, count in counts.items() for number in range(count)]
    missing = [place for place in scenes if not all(path.exists() for path in _paths(root, *place))]
    if missing:
        _publish(manifest, json.dumps(asked, indent=2).encode())
    few = len(missing) < 40  # not worth a process
    cv2.setNumThreads(0)  # here: threads of OpenCV do not survive a fork
    with ProcessPoolExecutor() as pool:
        drawn = (map if few else pool.map)(partial(_draw, root, seed, size, scene), missing)
        for _ in track(drawn, f"Drawing scenes in {root}", total=len(missing), disable=few):
            pass


def _draw(root: Path, seed: int, size: Size, scene: str, place: tuple[str, int]) -> None:
    image, label = render_scene(seed, *place, size, scene)
    for path, pixels in zip(_paths(root, *place), (image[..., ::-1], label), strict=True):
        _publish(path, cv2.imencode(".png", pixels)[1].tobytes())


def _paths(root: Path, split: str, number: int) -> tuple[Path, Path]:
    """Image and label of a scene: the number is Cityscapes' sequence; the frame, as in all of its sequences, is 19."""
    image, label = f"town_{number:06d}_000019_leftImg8bit.png", f"town_{number:06d}_000019_gtFine_labelIds.png"
    return root / "leftImg8bit" / split / "town" / image, root / "gtFine" / split / "town" / label


def _publish(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    draft.write_bytes(content)
    os.replace(draft, path)
