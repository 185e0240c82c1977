"""Procedural street scenes with the 19 Cityscapes classes, written once to disk in the layout of Cityscapes.

A scene is a street seen by a pinhole camera: axes in metres, x right, y up, z ahead, the camera above x = z = 0 and
looking along z. Everything is painted from far to near on one canvas of four channels, colour and label together, so
image and label cannot disagree. Lengths on the picture are fractions of its height: a scene looks alike at every size.
"""

import json
import math
import os
import random
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from rich.progress import track

from bisenet.classes import ClassTable

Size = tuple[int, int]  # height, width in pixels
Pair = tuple[float, float]
Colour = tuple[float, float, float]  # RGB in 0..255

GENERATOR = 2
"""Version of the scenes, to be raised whenever the same parameters give other pixels."""
SPLITS = ("train", "val", "test")
MANIFEST = "synthetic.json"

_TABLE = ClassTable.load("cityscapes")
_ID = {entry.name: entry.ids[0] for entry in _TABLE.classes}
_CITIES = {"train": ("ashford", "birkholm", "calverde"), "val": ("dunmore", "eskeby"), "test": ("fairhaven",)}

_SCENES_PER_PROCESS = 20  # drawing fewer, a second or two, is not worth a process

_FOCAL = 1.25  # of the picture's height: 77 degrees across at 1:2
_NEAR, _FAR = 0.8, 160.0  # metres
_LANE = 3.3  # width in metres
_SUBPIXEL = 4  # fractional bits of a vertex

# How strongly two noises, fine and clumped, modulate the brightness of a class: two tables over label ids.
_TEXTURE = np.full((2, 256), ((0.04,), (0.0,)), np.float32)
for _name, _strength in {
    "vegetation": (0.25, 0.5),
    "terrain": (0.2, 0.25),
    "wall": (0.12, 0.1),
    "road": (0.06, 0.05),
    "sidewalk": (0.05, 0.05),
    "building": (0.05, 0.05),
    "sky": (0.0, 0.0),
}.items():
    _TEXTURE[:, _ID[_name]] = _strength

# Hues that differ between classes make a network of a few hundred steps see them, as size and shape do for longer ones.
_FACADES = ((226, 208, 170), (222, 216, 206), (188, 188, 186), (220, 196, 130), (214, 176, 164), (168, 180, 196))
_BRICKS = ((150, 84, 52), (138, 76, 58), (162, 98, 60))
_RAILINGS = ((22, 92, 84), (26, 110, 92), (30, 84, 100))
_LEAVES = ((44, 84, 34), (58, 98, 40), (38, 74, 44), (76, 104, 44))
_CARS = ((196, 200, 204), (34, 36, 40), (232, 232, 230), (92, 98, 104), (150, 28, 30), (176, 166, 148))
_CABS = ((236, 236, 232), (36, 90, 190), (210, 214, 220))
_CARGO = ((30, 84, 180), (44, 110, 200), (40, 64, 160))
_BUSES = ((232, 184, 24), (238, 140, 24))
_TRAMS = ((110, 50, 150), (140, 40, 120), (84, 52, 140))
_FRAMES = ((20, 170, 200), (40, 190, 170), (90, 200, 220))
_TANKS = ((214, 60, 20), (196, 84, 16))
_COATS = ((150, 30, 60), (110, 40, 110), (176, 60, 90), (60, 50, 90), (90, 30, 50))
_TROUSERS = ((38, 44, 66), (48, 46, 54), (30, 50, 90))
_BRIGHT_COATS = ((206, 224, 40), (244, 128, 24), (230, 210, 30))
_SKINS = ((224, 182, 152), (192, 142, 110), (118, 80, 60))
_HAIR = ((40, 30, 24), (90, 66, 40), (30, 30, 32))

# ---------------------------------------------------------------- shapes: vertices (..., 2), or (..., 3) in the world

_SQUARE = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
_TRIANGLE = np.array([(-0.5, -0.43), (0.5, -0.43), (0.0, 0.43)])
_CIRCLE = np.array([(math.cos(a), math.sin(a)) for a in np.linspace(0, 2 * math.pi, 16, endpoint=False)])
_CUBE = np.array([(a, b, c) for c in (0.0, 1.0) for a, b in ((-1, -1), (-1, 1), (1, 1), (1, -1))])  # ahead, right, up


def _rectangles(*bounds: tuple[float, float, float, float]) -> np.ndarray:
    """(left, bottom, right, top) each, as (n, 4, 2)."""
    edges = np.array(bounds, float)
    return edges[:, None, :2] + _SQUARE * (edges[:, None, 2:] - edges[:, None, :2])


def _grid(columns: int, rows: int, share: Pair, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Rectangles (columns * rows, 4, 2) over 0..1 by low..high, each filling the given share of its cell."""
    cells = np.empty((rows, columns, 4, 2))
    inner = 0.5 + (_SQUARE - 0.5) * share
    cells[..., 0] = (np.arange(columns)[:, None] + inner[:, 0]) / columns
    cells[..., 1] = low + (high - low) / rows * (np.arange(rows)[:, None, None] + inner[:, 1])
    return cells.reshape(-1, 4, 2)


def _ellipse(x: float, y: float, width: float, height: float) -> np.ndarray:
    return _CIRCLE * (width / 2, height / 2) + (x, y)


def _limb(start: Pair, end: Pair, width: float) -> np.ndarray:
    """A bar (4, 2) from start to end."""
    (x0, y0), (x1, y1) = start, end
    half = width / 2 / math.hypot(x1 - x0, y1 - y0)
    dx, dy = (y0 - y1) * half, (x1 - x0) * half
    return np.array([(x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy)])


def _ground(x: Pair, z: Pair) -> np.ndarray:
    return np.array([(x[0], 0.0, z[0]), (x[1], 0.0, z[0]), (x[1], 0.0, z[1]), (x[0], 0.0, z[1])])


def _darker(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


class _Face(NamedTuple):
    """A side of a thing: the point at (u, v) is origin + u along + v (up + u twist), in metres."""

    origin: np.ndarray
    along: np.ndarray
    up: np.ndarray
    twist: np.ndarray
    label: str
    light: float

    @classmethod
    def over(cls, corners: np.ndarray, label: str, light: float = 1.0) -> "_Face":
        """Spanned by corners (4, 3) at (u, v) = (0, 0), (1, 0), (1, 1), (0, 1)."""
        a, b, c, d = corners
        return cls(a, b - a, d - a, a - b + c - d, label, light)


class _Canvas:
    """Camera, light and pixels of one scene, and the strokes that all its things are made of."""

    def __init__(self, rng: random.Random, size: Size) -> None:
        self.rng = rng
        self.noise = np.random.default_rng(rng.getrandbits(64))
        self.height, self.width = size
        self.pixels = np.zeros((*size, 4), np.uint8)  # R, G, B, label id
        self.eye = rng.uniform(1.4, 1.9)  # metres above the road
        self.origin = np.array((0.0, self.eye))
        self.vanishing = (self.width * rng.uniform(0.42, 0.58), self.height * rng.uniform(0.40, 0.48))
        self.scale = np.array((1, -1)) * (_FOCAL * self.height * 2**_SUBPIXEL)
        self.centre = np.array(self.vanishing) * 2**_SUBPIXEL
        self.reach = 0.6 * self.width / (_FOCAL * self.height)  # metres seen to either side, per metre ahead
        self.sunny = rng.random() < 0.6
        azimuth = rng.uniform(0, 2 * math.pi)
        self.sun = (math.cos(azimuth), math.sin(azimuth))  # where the light comes from, (x, z)
        self.haze = (190, 204, 222) if self.sunny else (196, 198, 200)
        self.visibility = rng.choice((140.0, 250.0, 600.0))  # metres

    def vary(self, *colours: Colour, amount: float = 14) -> Colour:
        """One of the colours, a little brighter or darker and off in hue."""
        colour, shift = self.rng.choice(colours), self.rng.uniform(-amount, amount)
        r, g, b = (min(max(c + shift + self.rng.uniform(-amount, amount) / 2, 0), 255) for c in colour)
        return r, g, b

    def project(self, points: np.ndarray) -> np.ndarray:
        """Points (..., 3) in metres to fixed-point pixels (..., 2); what lies behind the near plane moves onto it."""
        ahead = np.maximum(points[..., 2:], _NEAR)
        return ((points[..., :2] - self.origin) * self.scale / ahead + self.centre).astype(np.int32)

    def stroke(self, vertices: np.ndarray, z: float, colour: Colour, label: str, light: float) -> None:
        """Fill disjoint polygons (n, vertices, 2) of fixed-point pixels, as seen at z metres through the haze."""
        clear = math.exp(-max(z, 0.0) / self.visibility)
        (r, g, b), (r0, g0, b0), own, air = colour, self.haze, light * clear, 1 - clear
        paint = (r * own + r0 * air, g * own + g0 * air, b * own + b0 * air, _ID[label])
        cv2.fillPoly(self.pixels, vertices, paint, cv2.LINE_8, _SUBPIXEL)  # type: ignore[arg-type]

    def fill(self, points: np.ndarray, colour: Colour, label: str, light: float = 1.0) -> None:
        """Fill disjoint polygons (n, vertices, 3), or one (vertices, 3), in metres."""
        if points.size:
            vertices = self.project(points).reshape(-1, points.shape[-2], 2)
            self.stroke(vertices, points[..., 2].sum() * 3 / points.size, colour, label, light)

    def cards(self, at: Pair, outlines: np.ndarray, colour: Colour, label: str, lights: Iterable[float]) -> None:
        """Fill outlines (n, vertices, 2) that face the camera, in metres beside and above the ground point (x, z)."""
        x, z = at
        vertices = ((outlines - (-x, self.eye)) * (self.scale / z) + self.centre).astype(np.int32)
        for outline, light in zip(vertices, lights, strict=True):
            self.stroke(outline[None], z, colour, label, light)

    def card(self, at: Pair, outline: np.ndarray, colour: Colour, label: str, light: float = 1.0) -> None:
        """Fill one outline (vertices, 2) that faces the camera."""
        self.cards(at, outline[None], colour, label, (light,))

    def strip(self, x: Pair, z: Pair, colour: Colour, label: str) -> None:
        """Fill a rectangle of ground."""
        self.fill(_ground(x, z), colour, label)

    def shadow(self, x: Pair, z: Pair) -> None:
        """Darken a rectangle of ground."""
        self.glaze(_ground(x, z), (16, 18, 26), 0.5 if self.sunny else 0.3)

    def glaze(self, points: np.ndarray, colour: Colour, alpha: float, label: str | None = None) -> None:
        """Mix a colour into a polygon (vertices, 3), and label it if asked; what lies behind shows through."""
        polygon = self.project(points)
        low = np.clip(polygon.min(0) >> _SUBPIXEL, 0, (self.width, self.height))
        high = np.clip((polygon.max(0) >> _SUBPIXEL) + 2, 0, (self.width, self.height))
        if (high <= low).any():
            return
        window = self.pixels[low[1] : high[1], low[0] : high[0]]
        inside = np.zeros(window.shape[:2], np.uint8)
        cv2.fillPoly(inside, [polygon - (low << _SUBPIXEL).astype(np.int32)], (255,), cv2.LINE_8, _SUBPIXEL)
        mixed = cv2.addWeighted(window, 1 - alpha, np.full_like(window, (*colour, 0)), alpha, 0)
        mixed[..., 3] = window[..., 3] if label is None else _ID[label]
        cv2.copyTo(mixed, inside, window)

    def box(
        self,
        centre: Pair,
        size: tuple[float, float, float],
        colour: Colour,
        label: str,
        yaw: float = 0.0,
        base: float = 0.0,
        taper: Pair = (1.0, 1.0),
    ) -> dict[str, _Face]:
        """Draw a box of size (length, width, height) whose front looks along z when yaw is 0.

        Taper shrinks the length and width of its top. Returns the visible faces; u runs from rear to front on the
        sides, from left to right on the ends.
        """
        sine, cosine = math.sin(yaw), math.cos(yaw)
        corners = _CUBE * (size[0] / 2, size[1] / 2, size[2])
        corners[4:, :2] *= taper
        corners = corners @ ((sine, 0, cosine), (cosine, 0, -sine), (0, 1, 0)) + (centre[0], base, centre[1])
        faces = {}
        for name, where, (nx, nz) in (
            ("rear", (0, 1, 5, 4), (-sine, -cosine)),
            ("front", (3, 2, 6, 7), (sine, cosine)),
            ("left", (0, 3, 7, 4), (-cosine, sine)),
            ("right", (1, 2, 6, 5), (cosine, -sine)),
        ):
            face = corners[where, :]
            if nx * face[0, 0] + nz * face[0, 2] < 0:  # its normal points towards the camera
                light = 0.86 + (0.2 if self.sunny else 0.06) * (nx * self.sun[0] + nz * self.sun[1])
                self.fill(face, colour, label, light)
                faces[name] = _Face.over(face, label, light)
        if base + size[2] < self.eye:
            self.fill(corners[4:], colour, label, 1.1)
        return faces

    def decals(self, face: _Face, colour: Colour, shapes: np.ndarray) -> None:
        """Paint disjoint shapes (n, vertices, 2), or one, on a face, in its coordinates u, v from 0 to 1."""
        u, v = shapes[..., :1], shapes[..., 1:]
        points = face.origin + u * face.along + v * (face.up + u * face.twist)
        self.fill(points, colour, face.label, face.light)

    def panes(self, face: _Face, colour: Colour, *bounds: tuple[float, float, float, float]) -> None:
        """Paint rectangles (left, bottom, right, top) on a face."""
        self.decals(face, colour, _rectangles(*bounds))

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """The finished picture, RGB uint8 (H, W, 3), with texture, exposure and grain; and its labels, uint8 (H, W)."""
        *channels, label = cv2.split(self.pixels)
        size = (self.height, self.width)
        fine = self.noise.integers(-128, 128, size, np.int8) * np.float32(1 / 128)
        clump = max(round(self.height * 0.016), 1)
        coarse = self.noise.random((self.height // clump + 1, self.width // clump + 1), np.float32) * 2 - 1
        clumped = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR)
        gain = 1 + fine * cv2.LUT(label, _TEXTURE[0]) + clumped * cv2.LUT(label, _TEXTURE[1])
        exposure, warmth = self.rng.uniform(0.8, 1.12), self.rng.uniform(-0.05, 0.05)
        tints = (exposure * (1 + warmth), exposure, exposure * (1 - warmth))
        lit = [cv2.multiply(c, gain, scale=t, dtype=cv2.CV_8U) for c, t in zip(channels, tints, strict=True)]
        grain = self.noise.integers(0, 8, size, np.uint8)
        return cv2.subtract(cv2.GaussianBlur(cv2.merge(lit), (3, 3), 0.6), cv2.merge([grain] * 3)), label


# ---------------------------------------------------------------- what closes the view


def _sky(canvas: _Canvas) -> None:
    """Gradient and clouds above the horizon, grass below it."""
    rows = int(canvas.vanishing[1]) + 1
    ramp = np.linspace(0, 1, rows, dtype=np.float32)[:, None] ** 1.3
    clouds = cv2.resize(canvas.noise.random((6, 10), np.float32), (canvas.width, rows), interpolation=cv2.INTER_CUBIC)
    cover = np.clip(2.4 * clouds - canvas.rng.uniform(0.9, 1.9), 0, 0.9)
    zenith = canvas.vary((92, 146, 214) if canvas.sunny else (168, 174, 182))
    for channel, (top, bottom) in enumerate(zip(zenith, canvas.haze, strict=True)):
        air = top + ramp * (bottom - top)
        canvas.pixels[:rows, :, channel] = air + cover * (245 - air)
    canvas.pixels[:rows, :, 3] = _ID["sky"]
    canvas.pixels[rows:] = (*canvas.vary((126, 134, 82)), _ID["terrain"])


def _skyline(canvas: _Canvas) -> None:
    """Blocks and trees at the end of the street."""
    rng = canvas.rng
    for x in np.arange(-130, 130, 13.0):
        z, width, top = rng.uniform(110, 140), rng.uniform(12, 20), rng.uniform(7, 24)
        if rng.random() < 0.5:
            wall = np.array([(x, 0, z), (x + width, 0, z), (x + width, top, z), (x, top, z)])
            canvas.fill(wall, canvas.vary((150, 140, 134)), "building")
            canvas.decals(_Face.over(wall, "building"), (96, 102, 112), _grid(5, 6, (0.5, 0.5)))
        else:
            for shift in (-5, 0, 5):
                crown = _ellipse(shift, 0.2 * top, 12, 0.4 * top + rng.uniform(3, 8))
                canvas.card((x, z), crown, canvas.vary((56, 88, 44)), "vegetation")


def _building(canvas: _Canvas, x: float, far: float, near: float) -> None:
    """A house front along the street from near to far: windows, blinds, an eave, doors or shops below."""
    rng, depth, height = canvas.rng, 22.0, canvas.rng.uniform(6, 15)
    colour, glass, frame = canvas.vary(*_FACADES), canvas.vary((58, 68, 84)), canvas.vary((226, 222, 214), amount=20)
    wide, tall, lobby = rng.uniform(0.35, 0.6), rng.uniform(0.45, 0.65), 3.6 / height
    floors, shop = max(round((height - 3.6) / 3.1), 1), rng.random() < 0.5
    centre = (x + math.copysign(depth / 2, x), (near + far) / 2)
    for name, face in canvas.box(centre, (far - near, depth, height), colour, "building").items():
        columns = max(round((depth if name == "rear" else far - near) / rng.uniform(2.2, 3.2)), 2)
        windows = _grid(columns, floors, (wide, tall), lobby, 0.97)
        if near < 40:
            canvas.decals(face, frame, _grid(columns, floors, (wide + 0.14, tall + 0.1), lobby, 0.97))
        canvas.decals(face, glass, windows)
        if near < 40:
            canvas.decals(face, (168, 170, 166), windows[canvas.noise.random(len(windows)) < 0.25])
        canvas.panes(face, _darker(colour, 0.6), (0, 0.975, 1, 1))
        if shop:
            canvas.decals(face, (44, 48, 54), _grid(max(columns // 2, 1), 1, (0.84, 0.7), 0, 0.72 * lobby))
            canvas.panes(face, canvas.vary((150, 60, 50), amount=60), (0, 0.74 * lobby, 1, 0.95 * lobby))
        else:
            canvas.decals(face, canvas.vary((84, 62, 48)), _grid(columns, 1, (0.4, 0.9), 0, 0.62 * lobby))


def _wall(canvas: _Canvas, x: float, far: float, near: float) -> None:
    """A free-standing brick wall with a cap, trees behind."""
    _grove(canvas, x + math.copysign(3, x), far, near)
    height, brick = canvas.rng.uniform(2.4, 3.8), canvas.vary(*_BRICKS)
    centre = (x + math.copysign(0.3, x), (near + far) / 2)
    for name, face in canvas.box(centre, (far - near, 0.6, height), brick, "wall").items():
        blocks = _grid(1 if name == "rear" else round((far - near) / 1.1), 7, (0.92, 0.86), 0, 0.9)
        shade = canvas.noise.random(len(blocks))
        for least, factor in ((0.0, 1.16), (0.4, 0.86), (0.7, 1.02)):
            canvas.decals(face, _darker(brick, factor), blocks[shade >= least])
        canvas.panes(face, (186, 176, 160), (0, 0.92, 1, 1))


def _fence(canvas: _Canvas, x: float, far: float, near: float) -> None:
    """Metal railings with a mesh, half seen through; a meadow and trees behind."""
    _grove(canvas, x + math.copysign(4, x), far, near)
    height, colour = canvas.rng.uniform(1.8, 2.8), canvas.vary(*_RAILINGS)
    panel = np.array([(x, 0, near), (x, 0, far), (x, height, far), (x, height, near)])
    canvas.glaze(panel, colour, 0.5, "fence")
    canvas.decals(_Face.over(panel, "fence"), colour, _grid(round((far - near) / 0.45), 1, (0.4, 1)))
    canvas.panes(_Face.over(panel, "fence", 0.8), colour, (0, 0.86, 1, 0.95), (0, 0.12, 1, 0.2))


def _park(canvas: _Canvas, x: float, far: float, near: float) -> None:
    """Trees, sometimes behind a clipped hedge."""
    _grove(canvas, x + math.copysign(2, x), far, near)
    if canvas.rng.random() < 0.5:
        size = (far - near, 1.0, canvas.rng.uniform(1.0, 1.6))
        canvas.box((x + math.copysign(0.5, x), (near + far) / 2), size, canvas.vary(*_LEAVES), "vegetation")


def _grove(canvas: _Canvas, x: float, far: float, near: float) -> None:
    for z in np.arange(far, near, -6):
        _tree(canvas, x + math.copysign(canvas.rng.uniform(0, 4), x), z)


def _tree(canvas: _Canvas, x: float, z: float) -> None:
    crown, top, leaf = canvas.rng.uniform(1.4, 2.4), canvas.rng.uniform(5, 8), canvas.vary(*_LEAVES)
    canvas.card((x, z), _limb((0, 0), (canvas.rng.uniform(-0.3, 0.3), top - crown), 0.36), (84, 70, 56), "vegetation")
    lit = np.linspace(0, 1, int(min(24, 5 + 140 / z)))[:, None]  # dark masses first, tufts in the sun last
    angle = 2 * math.pi * canvas.noise.random(lit.shape)
    out = crown * np.sqrt(canvas.noise.random(lit.shape)) * (0.5 + 0.25 * lit)
    middle = np.hstack([out * np.cos(angle) - 0.4 * lit * canvas.sun[0], 1.15 * out * np.sin(angle) + 0.5 * lit])
    size = crown * (0.75 - 0.55 * lit[..., None])
    tufts = _CIRCLE * (1, 0.85) * size + middle[:, None] + (0, top - crown)
    canvas.cards((x, z), tufts, leaf, "vegetation", 0.62 + 0.66 * lit[:, 0])


# ---------------------------------------------------------------- what stands at the kerb


def _lamp(canvas: _Canvas, x: float, z: float) -> None:
    grey, arm = canvas.vary((116, 120, 122)), -math.copysign(1.8, x)
    canvas.card((x, z), _limb((0, 0), (0, 6.5), 0.32), grey, "pole")
    canvas.card((x, z), _limb((0, 6.4), (arm, 6.8), 0.2), grey, "pole")
    canvas.card((x, z), _limb((0, 0), (0, 1.1), 0.4), grey, "pole", 0.8)


_SIGNS = (  # outline, rim, field
    (_CIRCLE / 2, (200, 24, 32), (244, 244, 240)),
    (_CIRCLE / 2, (24, 74, 170), (24, 84, 190)),
    (_TRIANGLE, (204, 26, 34), (246, 244, 238)),
    (_SQUARE - 0.5, (244, 244, 240), (20, 84, 180)),
)


def _sign(canvas: _Canvas, x: float, z: float) -> None:
    """A post with one sign or two."""
    rng, at = canvas.rng, (x, z)
    height, size = rng.uniform(2.3, 2.9), rng.uniform(0.95, 1.25)
    canvas.card(at, _limb((0, 0), (0, height), 0.2), canvas.vary((132, 136, 138)), "pole")
    for _ in range(rng.randint(1, 2)):
        outline, rim, field = rng.choice(_SIGNS)
        canvas.card(at, outline * size + (0, height), rim, "traffic sign")
        canvas.card(at, outline * size * 0.72 + (0, height), field, "traffic sign")
        if min(field) > 200:
            canvas.card(at, _limb((-0.14, height), (0.14, height), 0.16), (30, 30, 34), "traffic sign")
        height -= size * 1.02


_LAMPS = (  # on, off; from below
    ((40, 250, 120), (20, 70, 50)),
    ((255, 196, 30), (96, 76, 30)),
    ((255, 40, 36), (90, 30, 30)),
)


def _lights(canvas: _Canvas, x: float, z: float) -> None:
    """Traffic lights at the kerb, and sometimes on an arm over the road."""
    rng, at, shining = canvas.rng, (x, z), canvas.rng.randrange(3)
    arm = -math.copysign(rng.uniform(2.4, 4.0), x) if rng.random() < 0.5 else 0.0
    grey = canvas.vary((104, 108, 106))
    canvas.card(at, _limb((0, 0), (0, 5.4 if arm else 2.6), 0.28), grey, "pole")
    if arm:
        canvas.card(at, _limb((0, 5.3), (arm, 5.5), 0.2), grey, "pole")
    for u, v in ((0.0, 2.4), (arm, 4.6))[: 2 if arm else 1]:
        plate, case = _rectangles((u - 0.45, v - 0.1, u + 0.45, v + 1.75), (u - 0.3, v, u + 0.3, v + 1.65))
        canvas.card(at, plate, (248, 186, 24), "traffic light")
        canvas.card(at, case, (22, 24, 26), "traffic light")
        for number, (on, off) in enumerate(_LAMPS):
            lamp = _ellipse(u, v + 0.3 + 0.52 * number, 0.46, 0.46)
            canvas.card(at, lamp, on if number == shining else off, "traffic light")


def _clutter(canvas: _Canvas, x: float, z: float) -> None:
    """What belongs to none of the 19 classes: a bin, or something under a sheet."""
    if canvas.rng.random() < 0.5:
        canvas.shadow((x - 0.5, x + 0.5), (z - 0.4, z + 0.6))
        canvas.box((x, z), (0.7, 0.7, 1.1), canvas.vary((60, 64, 66)), "static")
    else:
        canvas.card((x, z), _ellipse(0, 0.2, 1.5, 1.5), canvas.vary((120, 130, 150), amount=40), "unlabeled")


# ---------------------------------------------------------------- people and cycles


def _person(canvas: _Canvas, x: float, z: float) -> None:
    rng = canvas.rng
    tall, stride = rng.uniform(0.95, 1.2), rng.uniform(-0.22, 0.22)
    coat, trousers = canvas.vary(*_COATS), canvas.vary(*_TROUSERS)
    canvas.shadow((x - 0.35, x + 0.35), (z - 0.2, z + 0.4))

    def part(outline: np.ndarray, colour: Colour, light: float = 1.0) -> None:
        canvas.card((x, z), outline * tall, colour, "person", light)

    for foot, light in ((-stride, 0.8), (stride, 1.0)):
        part(_limb((foot / 3, 0.88), (foot, 0.05), 0.2), trousers, light)
        part(_ellipse(foot + 0.03, 0.05, 0.26, 0.1), (30, 28, 28))
    part(_limb((-0.27, 1.36), (-0.3 + stride, 0.84), 0.13), coat, 0.75)
    part(np.array([(-0.22, 0.78), (0.22, 0.78), (0.29, 1.3), (0.2, 1.46), (-0.2, 1.46), (-0.29, 1.3)]), coat)
    part(_limb((0.27, 1.36), (0.3 - stride, 0.84), 0.13), coat, 0.88)
    part(_ellipse(0, 1.62, 0.24, 0.3), rng.choice(_SKINS))
    part(_ellipse(0, 1.7, 0.26, 0.18), rng.choice(_HAIR))


def _cycle(canvas: _Canvas, x: float, z: float, name: str, ridden: bool) -> None:
    """A bicycle or motorcycle (its name) from the side or at an angle, with or without its rider."""
    rng, motor = canvas.rng, name == "motorcycle"
    ahead = rng.choice((-1, 1)) * rng.uniform(0.6, 1.0)
    radius, base = (0.36, 0.72) if motor else (0.37, 0.56)
    wheel = (64, 50, 46) if motor else (176, 206, 210)
    canvas.shadow((x - 0.9, x + 0.9), (z - 0.2, z + 0.3))

    def part(outline: np.ndarray, colour: Colour, label: str = name, light: float = 1.0) -> None:
        canvas.card((x, z), outline * (ahead, 1), colour, label, light)

    for hub in (-base, base):
        for scale, colour in ((2.0, (24, 24, 26)), (1.5, wheel), (0.5, (60, 60, 64))):
            part(_ellipse(hub, radius, scale * radius, scale * radius), colour)
    if motor:
        part(np.array([(-0.5, 0.42), (0.42, 0.42), (0.5, 0.8), (0.2, 1.02), (-0.6, 0.82)]), (70, 44, 40))
        tank = np.array([(-0.55, 0.7), (0.46, 0.6), (0.56, 0.98), (0.1, 1.1), (-0.6, 0.9)])
        part(tank, canvas.vary(*_TANKS))
        part(_limb((-0.95, 0.86), (-0.1, 0.9), 0.2), (26, 26, 28))  # seat
        part(_limb((0.42, 1.0), (base, radius), 0.12), (170, 172, 176))  # fork
        part(_limb((0.32, 1.22), (0.52, 0.96), 0.1), (30, 30, 32))  # handlebar
        part(_limb((-0.9, 0.4), (-0.1, 0.36), 0.12), (190, 192, 196))  # exhaust
    else:
        frame = canvas.vary(*_FRAMES)
        hull = np.array([(-base, radius), (-0.18, 0.9), (0.4, 0.94), (base, radius), (-0.02, 0.34)])
        canvas.glaze(np.column_stack([hull * (ahead, 1) + (x, 0), np.full(5, z)]), frame, 0.3, "bicycle")
        rear, saddle, head, crank, front = (-base, radius), (-0.18, 0.9), (0.4, 0.94), (-0.02, 0.34), (base, radius)
        tubes = ((rear, saddle), (saddle, head), (head, crank), (saddle, crank), (rear, crank), (head, front))
        for start, end in tubes:
            part(_limb(start, end, 0.11), frame)
        part(_limb((-0.36, 1.0), (-0.04, 1.0), 0.1), (28, 28, 30))  # saddle
        part(_limb((0.3, 1.1), (0.5, 1.08), 0.09), (40, 40, 44))  # handlebar
    if ridden:
        coat = canvas.vary(*_BRIGHT_COATS)
        part(_limb((-0.25, 1.0), (0.22, 0.74), 0.22), (44, 46, 60), "rider")
        part(_limb((0.22, 0.74), (0.02, 0.3), 0.18), (44, 46, 60), "rider", 0.9)
        part(np.array([(-0.4, 0.92), (-0.04, 0.92), (0.28, 1.48), (0.06, 1.62), (-0.16, 1.5)]), coat, "rider")
        part(_limb((0.12, 1.46), (0.42, 1.12), 0.13), coat, "rider", 0.86)
        part(_ellipse(0.2, 1.72, 0.26, 0.3), rng.choice(_SKINS), "rider")
        part(_ellipse(0.18, 1.82, 0.36, 0.26), canvas.vary(*_BRIGHT_COATS), "rider")  # helmet


# ---------------------------------------------------------------- vehicles, all by (x, z) of their middle and yaw


def _wheels(canvas: _Canvas, faces: Mapping[str, _Face], at: Iterable[float], radius: float) -> None:
    """Tyres on the sides, at u, and below the ends of a body that stands on the ground."""
    for name, face in faces.items():
        length, height = math.dist(face.along, (0, 0, 0)), math.dist(face.up, (0, 0, 0))
        if name in ("left", "right"):
            for u in at:
                for scale, colour in ((2.0, (22, 22, 24)), (1.1, (150, 152, 156))):
                    tyre = _ellipse(u, radius / height, scale * radius / length, scale * radius / height)
                    canvas.decals(face, colour, tyre)
        else:
            canvas.panes(face, (22, 22, 24), (0.02, 0, 0.16, radius / height), (0.84, 0, 0.98, radius / height))


def _ends(canvas: _Canvas, faces: Mapping[str, _Face], v: float, height: float) -> None:
    """Lamps and number plates at height v of front and rear."""
    for name, colour in (("rear", (214, 24, 26)), ("front", (250, 246, 216))):
        if name in faces:
            canvas.panes(faces[name], colour, (0.03, v, 0.2, v + height), (0.8, v, 0.97, v + height))
            canvas.panes(faces[name], (232, 232, 226), (0.36, v - 0.9 * height, 0.64, v - 0.1 * height))


def _car(canvas: _Canvas, x: float, z: float, yaw: float) -> None:
    rng = canvas.rng
    length, width, height = rng.uniform(3.9, 4.7), rng.uniform(1.75, 1.9), rng.uniform(1.42, 1.62)
    colour, belt = canvas.vary(*_CARS), 0.62 * height
    body = canvas.box((x, z), (length, width, belt), colour, "car", yaw)
    for face in body.values():
        canvas.panes(face, (34, 34, 38), (0, 0, 1, 0.26))
    _wheels(canvas, body, (0.19, 0.81), 0.33)
    _ends(canvas, body, 0.62, 0.24)
    middle = (x - 0.06 * length * math.sin(yaw), z - 0.06 * length * math.cos(yaw))
    cabin = canvas.box(middle, (0.6 * length, 0.92 * width, height - belt), colour, "car", yaw, belt, (0.72, 0.84))
    for name, face in cabin.items():
        if name in ("left", "right"):
            canvas.panes(face, (36, 44, 54), (0.06, 0.1, 0.48, 0.84), (0.53, 0.1, 0.94, 0.84))
        else:
            canvas.panes(face, (36, 44, 54), (0.08, 0.1, 0.92, 0.86))


def _truck(canvas: _Canvas, x: float, z: float, yaw: float) -> None:
    load, cab, cargo = canvas.rng.uniform(5.0, 7.0), canvas.vary(*_CABS), canvas.vary(*_CARGO)
    ahead = np.array((math.sin(yaw), math.cos(yaw)))
    frame = canvas.box((x, z), (load + 2.2, 2.3, 0.95), (44, 46, 50), "truck", yaw)
    _wheels(canvas, frame, (0.12, 0.24, 0.86), 0.48)
    _ends(canvas, frame, 0.66, 0.2)

    def draw_load() -> None:
        at, size = (x, z) - ahead * 1.1, (load, 2.45, canvas.rng.uniform(2.2, 2.7))
        for name, face in canvas.box((at[0], at[1]), size, cargo, "truck", yaw, 0.9).items():
            if name == "rear":
                canvas.panes(face, _darker(cargo, 0.9), (0.04, 0.04, 0.485, 0.94), (0.515, 0.04, 0.96, 0.94))
            elif name != "front":
                canvas.panes(face, cab, (0, 0.28, 1, 0.5))

    def draw_cab() -> None:
        at = (x, z) + ahead * (load / 2 + 0.05)
        for face in canvas.box((at[0], at[1]), (2.0, 2.45, 1.9), cab, "truck", yaw, 0.75, (0.9, 0.96)).values():
            canvas.panes(face, (34, 42, 52), (0.1, 0.46, 0.9, 0.9))

    for draw in (draw_cab, draw_load) if ahead @ (x, z) > 0 else (draw_load, draw_cab):  # the farther of the two first
        draw()


def _bus(canvas: _Canvas, x: float, z: float, yaw: float) -> None:
    faces = canvas.box((x, z), (canvas.rng.uniform(9, 12), 2.55, 3.1), canvas.vary(*_BUSES), "bus", yaw)
    for name, face in faces.items():
        canvas.panes(face, (36, 36, 40), (0, 0, 1, 0.1))
        if name in ("left", "right"):
            canvas.panes(face, (30, 34, 42), (0.01, 0.44, 0.99, 0.82))
            canvas.decals(face, (66, 82, 98), _grid(7, 1, (0.86, 1), 0.47, 0.79))
            canvas.panes(face, (52, 62, 74), (0.3, 0.12, 0.4, 0.8), (0.84, 0.12, 0.93, 0.8))  # doors
            canvas.panes(face, (244, 240, 230), (0, 0.3, 1, 0.36))
        else:
            canvas.panes(face, (40, 48, 58), (0.05, 0.4 if name == "front" else 0.52, 0.95, 0.82))
            canvas.panes(face, (24, 24, 24), (0.2, 0.87, 0.8, 0.97))  # where to
            canvas.decals(face, (255, 176, 40), _grid(5, 1, (0.6, 0.6), 0.88, 0.96) * (0.5, 1) + (0.25, 0))
    _wheels(canvas, faces, (0.2, 0.76), 0.5)
    _ends(canvas, faces, 0.2, 0.08)


def _train(canvas: _Canvas, x: float, z: float, yaw: float) -> None:
    """A tram of two cars with white bands and gear on the roof."""
    colour, half, ahead = canvas.vary(*_TRAMS), 11.0, np.array((math.sin(yaw), math.cos(yaw)))
    middles = [(x, z) + ahead * along for along in (-half / 2 - 0.2, half / 2 + 0.2)]
    for at in sorted(middles, key=lambda at: math.hypot(*at), reverse=True):
        canvas.box((at[0], at[1]), (0.9 * half, 1.7, 0.5), (70, 72, 76), "train", yaw, 3.3)
        faces = canvas.box((at[0], at[1]), (half, 2.5, 3.4), colour, "train", yaw, 0.0, (0.97, 0.9))
        for name, face in faces.items():
            canvas.panes(face, (52, 54, 58), (0, 0, 1, 0.14))
            canvas.panes(face, (236, 236, 230), (0, 0.84, 1, 0.93), (0, 0.36, 1, 0.44))
            if name in ("left", "right"):
                canvas.panes(face, (24, 30, 36), (0.02, 0.47, 0.98, 0.82))
                canvas.panes(face, (150, 176, 176), (0.28, 0.14, 0.4, 0.82), (0.64, 0.14, 0.76, 0.82))  # doors
            else:
                canvas.panes(face, (30, 38, 46), (0.1, 0.46, 0.9, 0.82))
                lamps = np.stack([_ellipse(u, 0.26, 0.14, 0.1) for u in (0.2, 0.8)])
                canvas.decals(face, (252, 244, 200), lamps)


_Vehicle = Callable[[_Canvas, float, float, float], None]
_LENGTH: dict[_Vehicle, float] = {_car: 4.6, _bus: 11.5, _truck: 9.0, _train: 22.5}  # metres, about


def _vehicle(canvas: _Canvas, x: float, z: float, kind: _Vehicle, yaw: float) -> None:
    """A vehicle and its shadow."""
    across, along = (1.2, _LENGTH[kind] / 2) if abs(math.cos(yaw)) > 0.5 else (_LENGTH[kind] / 2, 1.2)
    canvas.shadow((x - across, x + across), (z - along, z + along))
    kind(canvas, x, z, yaw)


def _bonnet(canvas: _Canvas) -> None:
    """The car that carries the camera, at the lower edge."""
    middle = (canvas.width // 2, round(canvas.height * 1.03))
    for scale, colour in ((1.0, (40, 42, 48)), (0.9, (58, 60, 68))):
        axes = (round(canvas.width * 0.45 * scale), round(canvas.height * 0.12 * scale))
        cv2.ellipse(canvas.pixels, middle, axes, 0, 180, 360, (*colour, _ID["ego vehicle"]), -1)


# ---------------------------------------------------------------- the street


class _Street:
    """The plan of one scene: widths in metres by side (-1 left, 1 right), and what stands where."""

    def __init__(self, canvas: _Canvas) -> None:
        rng = canvas.rng
        self.canvas, self.rng = canvas, rng
        self.lanes = [-_LANE * k for k in range(rng.randint(1, 2), 0, -1)] + [0.0] + [_LANE] * (rng.random() < 0.3)
        self.parking = {side: 2.2 * (rng.random() < 0.5) for side in (-1, 1)}
        self.edge = {side: max(side * x for x in self.lanes) + _LANE / 2 + self.parking[side] for side in (-1, 1)}
        self.walk = {side: rng.uniform(2.2, 3.6) for side in (-1, 1)}
        self.meadow = {side: rng.uniform(3.0, 6.0) * (rng.random() < 0.75) for side in (-1, 1)}
        self.crossing = rng.uniform(15, 26) if rng.random() < 0.5 else math.inf
        self.things: list[tuple[float, float, float, Callable[[], None]]] = []
        for side in (-1, 1):
            self.build(side)
            self.furnish(side)
            self.park(side)
        for x in self.lanes:
            self.drive(x)
        if self.crossing < math.inf:
            self.cross()

    def place(
        self,
        thing: Callable[..., None],
        x: float,
        z: float,
        *more: Any,
        band: float | None = None,
        crosses: bool = False,
    ) -> None:
        """Plan something at (x, z), unless it is out of sight.

        Painted first is what lies beyond the crossing, then what is on it, then the rest; within each the outer of the
        `band`s along the street come first, because a line of sight only moves outwards; then what is farther away.
        """
        if abs(x) < self.canvas.reach * z + 3:
            part = 1 if crosses else 2 * (z > self.crossing)
            band = abs(x) if band is None else band
            self.things.append((part, band, z, lambda: thing(self.canvas, x, z, *more)))

    def build(self, side: int) -> None:
        """Close the street with houses, walls, fences and trees."""
        x, near = side * (self.edge[side] + self.walk[side] + self.meadow[side]), 3.0
        while near < 75:
            far = near + self.rng.uniform(9, 18)
            if near < self.crossing + 6.5 and far > self.crossing - 6.5:
                far = self.crossing - 6.5
            if far - near > 3:
                kind = self.rng.choices((_building, _wall, _fence, _park), (0.4, 0.22, 0.28, 0.1))[0]
                self.place(kind, x, far, near)
                near = far
            else:
                near = self.crossing + 6.5

    def furnish(self, side: int) -> None:
        """Trees, lamps, signs, traffic lights, and people and things on the pavement."""
        rng, kerb = self.rng, self.edge[side] + 0.5
        middle = self.edge[side] + self.walk[side] / 2
        verge = self.edge[side] + self.walk[side] + self.meadow[side] / 2
        if self.meadow[side]:
            for z in np.arange(rng.uniform(6, 12), 45, rng.uniform(7, 14)):
                self.place(_tree, side * verge, z)
        for z in np.arange(rng.uniform(7, 16), 50, rng.uniform(14, 24)):
            self.place(_lamp, side * kerb, z)
        for _ in range(rng.randint(1, 3)):
            self.place(_sign, side * (kerb + rng.uniform(0, 0.5)), rng.uniform(6, 22), band=kerb)
        if rng.random() < 0.6:
            z = self.crossing - 5 if self.crossing < math.inf else rng.uniform(7, 14)
            self.place(_lights, side * (kerb + 0.3), z, band=kerb)
        for most, deepest, thing, more in (
            (6, 17, _person, ()),
            (3, 15, _cycle, ("bicycle", False)),
            (2, 15, _cycle, ("motorcycle", False)),
            (1, 20, _clutter, ()),
        ):
            for _ in range(rng.randint(0, most)):
                x = side * (middle + rng.uniform(-0.8, 0.8))
                self.place(thing, x, rng.uniform(5, deepest), *more, band=middle)

    def park(self, side: int) -> None:
        """Parked cars, and who rides along them."""
        rng, x, z = self.rng, side * (self.edge[side] - 1.1), self.rng.uniform(5, 12)
        while self.parking[side] and z < 50:
            self.place(_vehicle, x, z, _car, 0.0 if side > 0 else math.pi)
            z += rng.uniform(5.2, 14)
        for z in (rng.uniform(6, 9), rng.uniform(10, 15))[: rng.randint(0, 2)]:
            x = side * (self.edge[side] - self.parking[side] - 0.7)
            self.place(_cycle, x, z, rng.choice(("bicycle", "motorcycle")), True)

    def drive(self, x: float) -> None:
        """Traffic of one lane; trams only come towards us, left of the middle."""
        z = self.rng.uniform(10, 20) if x == 0 else self.rng.uniform(7, 16)
        while z < 60:
            kind = self.rng.choices(tuple(_LENGTH), (0.45, 0.25, 0.2, 0.3 if x < 0 else 0.0))[0]
            half = _LENGTH[kind] / 2
            z += half
            if abs(z - self.crossing) > half + 5:
                self.place(_vehicle, x, z, kind, 0.0 if x >= 0 else math.pi)
            z += half + self.rng.uniform(4, 20)

    def cross(self) -> None:
        """Traffic on the street that crosses ours, and people in front of it."""
        rng = self.rng
        if rng.random() < 0.75:
            kind, turn = rng.choices(tuple(_LENGTH), (0.2, 0.3, 0.25, 0.25))[0], rng.choice((-1, 1))
            x, z, yaw = rng.uniform(-9, 9), self.crossing + 2 * turn, turn * math.pi / 2
            self.place(_vehicle, x, z, kind, yaw, band=0, crosses=True)
        for _ in range(rng.randint(0, 3)):
            x, z = rng.uniform(-self.edge[-1], self.edge[1]), self.crossing - rng.uniform(5.5, 7.5)
            self.place(_person, x, z, band=0, crosses=True)

    def draw(self) -> None:
        """Put the street on the canvas."""
        self.pave()
        for *_, thing in sorted(self.things, key=lambda entry: entry[:3], reverse=True):
            thing()

    def pave(self) -> None:
        """Road, kerbs, pavements and grass, the markings, and the shade of the houses."""
        canvas, rng, edge, deep = self.canvas, self.rng, self.edge, (_NEAR, _FAR)
        asphalt, slab, white = canvas.vary((84, 86, 94)), canvas.vary((196, 164, 146)), (226, 226, 220)
        for side in (-1, 1):
            inner, outer = side * edge[side], side * (edge[side] + self.walk[side])
            canvas.strip((outer, outer + side * 30), deep, canvas.vary((132, 144, 74)), "terrain")
            canvas.strip((inner, outer), deep, slab, "sidewalk")
            joints = [_ground((inner, outer), (z, z + 0.06 + 0.002 * z)) for z in np.arange(3, 40, 1.6)]
            canvas.fill(np.stack(joints), slab, "sidewalk", 0.8)
            canvas.strip((inner, inner + side * 0.25), deep, (200, 198, 192), "sidewalk")
        canvas.strip((-edge[-1], edge[1]), deep, asphalt, "road")
        for _ in range(rng.randint(1, 5)):  # repairs
            x, z, size = rng.uniform(-edge[-1], edge[1] - 1), rng.uniform(4, 30), rng.uniform(0.8, 5)
            canvas.strip((x, min(x + size / 2, edge[1])), (z, z + size), canvas.vary(asphalt, amount=12), "road")
        for x in self.lanes[:-1]:
            line = (x + _LANE / 2 - 0.08, x + _LANE / 2 + 0.08)
            solid = x == -_LANE and rng.random() < 0.4
            dashes = [_ground(line, deep)] if solid else [_ground(line, (z, z + 3)) for z in np.arange(2.0, 90, 6)]
            canvas.fill(np.stack(dashes), white, "road")
        if self.crossing < math.inf:
            for half, colour, name in ((6.5, slab, "sidewalk"), (4.5, asphalt, "road")):
                for x in ((-_FAR, -edge[-1]), (edge[1], _FAR)):
                    canvas.strip(x, (self.crossing - half, self.crossing + half), colour, name)
            zebra = (self.crossing - 8, self.crossing - 5.2)
            bars = [_ground((x, x + 0.55), zebra) for x in np.arange(-edge[-1] + 0.3, edge[1] - 0.5, 1.1)]
            canvas.fill(np.stack(bars), white, "road")
        if canvas.sunny:
            side = math.copysign(1, canvas.sun[0])
            canvas.shadow((side * rng.uniform(0, 5), side * 60), deep)


# ---------------------------------------------------------------- the public face


def _shapes(rng: random.Random, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """Two areas, upper and lower, and in each of them an ellipse: four classes in their colours, with noise."""
    height, width = size
    label = np.empty(size, np.uint8)
    ids = rng.sample([entry.ids[0] for entry in _TABLE.classes if entry.train_id is not None], 4)
    middle = round(height * rng.uniform(0.45, 0.55))
    label[:middle], label[middle:] = ids[:2]
    for top, bottom, left, class_id in ((0, middle, 0.0, ids[2]), (middle, height, 0.5, ids[3])):
        centre = (round(width * (left + rng.uniform(0.2, 0.3))), (top + bottom) // 2)
        axes = (round(width * rng.uniform(0.14, 0.18)), round((bottom - top) * rng.uniform(0.32, 0.4)))
        cv2.ellipse(label, centre, axes, 0, 0, 360, class_id, cv2.FILLED)
    noise = np.random.default_rng(rng.getrandbits(64)).normal(0, 12, (*size, 3))
    return np.clip(_TABLE.palette[_TABLE.encode[label]] + noise, 0, 255).astype(np.uint8), label


def render_scene(
    seed: int, split: str, number: int, size: Size, scene: str = "street"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene, a pure function of the arguments.

    Args:
        seed: of the whole set.
        split: of the scene; the same number is another scene in another split.
        number: of the scene in its split.
        size: (H, W) in pixels, even, from (64, 128) up.
        scene: ``street``, or ``shapes`` (large areas, for debugging).

    Returns:
        The image, RGB uint8 (H, W, 3), and the label, uint8 (H, W): the ids of Cityscapes' labelIds files.
    """
    _require_size(size)
    rng = random.Random(f"{seed}/{split}/{number}")
    if scene == "shapes":
        return _shapes(rng, size)
    canvas = _Canvas(rng, size)
    _sky(canvas)
    _skyline(canvas)
    _Street(canvas).draw()
    if canvas.rng.random() < 0.35:
        _bonnet(canvas)
    return canvas.develop()


def _require_size(size: Size) -> None:
    height, width = size
    if height < 64 or width < 128 or height % 2 or width % 2:
        raise ValueError(f"size of a synthetic scene: got {height}x{width}, accepted: even numbers from 64x128 up")


def write_synthetic(root: Path, *, counts: Mapping[str, int], size: Size, seed: int, scene: str = "street") -> None:
    """Write ``counts[split]`` scenes of each split below ``root``, in the layout of Cityscapes.

    A complete set of the same parameters is left as it is, an interrupted one is completed, and several processes may
    write the same set at once. Many scenes are shared out over the cores, which changes nothing in them. While a set
    grows, its parameters are in ``synthetic.json.partial``; they become ``synthetic.json`` when all is there.

    Raises:
        ValueError: wrong parameters, or a ``root`` that holds another set or anything else; nothing is written then.
    """
    if unknown := sorted(set(counts) - set(SPLITS)):
        raise ValueError(f"synthetic scenes: got split {unknown[0]!r}, accepted: {' | '.join(SPLITS)}")
    if min(counts.values(), default=0) < 0 or not sum(counts.values()):
        raise ValueError(f"synthetic scenes: got counts {dict(counts)}, accepted: 0 or more, not 0 in all")
    _require_size(size)
    generator = GENERATOR if scene == "street" else f"{scene} {GENERATOR}"
    asked: dict[str, Any] = {"generator": generator, "seed": seed, "size": list(size)}
    asked["counts"] = {split: counts.get(split, 0) for split in SPLITS}
    if root.exists() and not root.is_dir():
        raise ValueError(f"data.root: got {root}, which is a file; accepted: a folder, or a path where nothing is")
    manifest, draft = root / MANIFEST, root / f"{MANIFEST}.partial"

    # In this order: another process may meanwhile write `draft`, then images, then turn `draft` into `manifest`.
    occupied = any((root / folder).exists() for folder in ("leftImg8bit", "gtFine"))
    begun, complete = _read(draft), _read(manifest)
    found = complete or begun
    if found is None and occupied:
        raise ValueError(f"{root} holds images but no {MANIFEST}: no synthetic set, so nothing is written there")
    if found is not None and found != asked:
        keys = sorted(key for key in found.keys() | asked.keys() if found.get(key) != asked.get(key))
        differences = ", ".join(f"{key} {found.get(key)}, not {asked.get(key)}" for key in keys)
        raise ValueError(
            f"{root} holds another synthetic set ({differences}), which is left as it is. Choose another data.root; or "
            "delete that folder, and the scenes asked for are drawn there"
        )
    if complete is not None:
        return

    scenes = [(split, number) for split in SPLITS for number in range(counts.get(split, 0))]
    missing = [scene for scene in scenes if not all(path.exists() for path in _paths(root, *scene))]
    if missing:
        _publish(draft, json.dumps(asked, indent=2).encode())
    draw, pool = partial(_draw, root, seed, size, scene), None
    processes = min(os.cpu_count() or 1, len(missing) // _SCENES_PER_PROCESS)
    if processes > 1:
        cv2.setNumThreads(0)  # here: threads of OpenCV do not survive a fork
        pool = ProcessPoolExecutor(processes, get_context("fork" if sys.platform == "linux" else "spawn"))
    drawn = pool.map(draw, missing, chunksize=4) if pool else map(draw, missing)
    try:
        few = len(missing) < 2 * _SCENES_PER_PROCESS
        for _ in track(drawn, f"Drawing scenes in {root}", total=len(missing), disable=few):
            pass
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    _publish(manifest, json.dumps(asked, indent=2).encode())
    draft.unlink(missing_ok=True)


def _draw(root: Path, seed: int, size: Size, scene: str, place: tuple[str, int]) -> None:
    """Draw a scene to its files."""
    image, label = render_scene(seed, *place, size, scene)
    for path, pixels in zip(_paths(root, *place), (cv2.cvtColor(image, cv2.COLOR_RGB2BGR), label), strict=True):
        _publish(path, cv2.imencode(".png", pixels)[1].tobytes())


def _paths(root: Path, split: str, number: int) -> tuple[Path, Path]:
    """Image and label of a scene: the number is Cityscapes' sequence; the frame, as in all of its sequences, is 19."""
    city = _CITIES[split][number % len(_CITIES[split])]
    stem = f"{city}_{number:06d}_000019"
    return (
        root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png",
        root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png",
    )


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        return json.loads(manifest.read_bytes())
    except FileNotFoundError:
        return None


def _publish(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    draft.write_bytes(content)
    os.replace(draft, path)
