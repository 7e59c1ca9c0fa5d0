"""The rendered world: scenes of one to three shapes whose whole truth is known.

A scene is drawn with Pillow on a grid of 3 × 3 cells of 28 pixels, one visual token each. What
training may show is fixed here: five shapes and six colours without five combinations of them.
NoCaps's near domain holds those combinations, the out domain the shapes and colours beyond.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Domain = Literal["in-domain", "near-domain", "out-domain"]
Style = Literal["plain", "striped"]
Split = Literal["pretraining", "pairs", "probe", "validation", "test"]

SHAPES = ("circle", "square", "triangle", "star", "cross")
NOVEL_SHAPES = ("diamond", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 30),
    "orange": (245, 130, 20),
    "purple": (140, 50, 175),
}
NOVEL_COLOURS = {"pink": (250, 150, 190), "brown": (120, 70, 30)}
HELD_OUT = frozenset(
    {
        ("circle", "green"),
        ("square", "purple"),
        ("triangle", "blue"),
        ("star", "red"),
        ("cross", "yellow"),
    }
)
"""Combinations of a known shape and a known colour that training never shows."""

BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (165, 165, 165),
    "black": (15, 15, 15),
    "beige": (235, 220, 190),
}
SIZES = {"small": 7.0, "large": 12.0}
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
PLACE_NAMES = tuple(name for row in PLACES for name in row)

CELL = 28
IMAGE_SIZE = 3 * CELL
_SUPERSAMPLING = 4
_SPLIT_SHARES: tuple[tuple[Split, int], ...] = (
    ("pretraining", 60),
    ("pairs", 14),
    ("probe", 3),
    ("validation", 10),
    ("test", 13),
)


@dataclass(frozen=True, order=True)
class Thing:
    """One shape in a cell; row 0 is the top, column 0 the left."""

    row: int
    column: int
    shape: str
    colour: str
    size: str

    @property
    def place(self) -> str:
        """The name of the cell."""
        return PLACES[self.row][self.column]

    @property
    def domain(self) -> Domain:
        """How far the thing lies from what training shows."""
        if self.shape in NOVEL_SHAPES or self.colour in NOVEL_COLOURS:
            return "out-domain"
        return "near-domain" if (self.shape, self.colour) in HELD_OUT else "in-domain"


@dataclass(frozen=True)
class Scene:
    """One to three things in reading order on a background."""

    things: tuple[Thing, ...]
    background: str
    style: Style = "plain"

    @property
    def key(self) -> str:
        """The canonical form: two scenes with one key show the same things in the same places."""
        return f"{self.background}:{self.things!r}"

    @property
    def domain(self) -> Domain:
        """The domain of the farthest thing."""
        domains = {thing.domain for thing in self.things}
        if "out-domain" in domains:
            return "out-domain"
        return "near-domain" if "near-domain" in domains else "in-domain"

    @property
    def split(self) -> Split:
        """The only split that may hold this scene, whatever the seed.

        A hash of the canonical form decides, so that no data of any seed meet the scenes that the
        bundled base was trained on.
        """
        digest = hashlib.blake2b(self.key.encode(), digest_size=8).digest()
        draw = int.from_bytes(digest) % 100
        for name, share in _SPLIT_SHARES:
            draw -= share
            if draw < 0:
                return name
        raise AssertionError("the shares add up to 100")


def relations(first: Thing, second: Thing) -> tuple[str, ...]:
    """What holds between two things: `left of`, `right of`, `above`, `below`."""
    found = []
    if first.column != second.column:
        found.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        found.append("above" if first.row < second.row else "below")
    return tuple(found)


def draw_scene(
    rng: random.Random,
    split: Split,
    *,
    domain: Domain = "in-domain",
    style: Style = "plain",
    count: int | None = None,
    twins: bool = False,
) -> Scene:
    """A random scene of one split and domain.

    Args:
        rng: the only source of chance.
        split: scenes of other splits are drawn again.
        domain: the domain of the farthest thing.
        style: how it is rendered.
        count: how many things; drawn when None.
        twins: two things agree in shape and colour and a third differs in both.
    """
    while True:
        # Few scenes hold a single thing (25 × 2 × 9 × 4), so they are drawn less often.
        number = 3 if twins else count or rng.choices((1, 2, 3), weights=(15, 45, 40))[0]
        kinds = _twin_kinds(rng, domain) if twins else _kinds(rng, number, domain)
        cells = rng.sample([(row, column) for row in range(3) for column in range(3)], number)
        things = tuple(
            sorted(
                Thing(row, column, shape, colour, rng.choice(tuple(SIZES)))
                for (row, column), (shape, colour) in zip(cells, kinds, strict=True)
            )
        )
        scene = Scene(things, rng.choice(tuple(BACKGROUNDS)), style)
        if scene.split == split and scene.domain == domain:
            return scene


def _kinds(rng: random.Random, number: int, domain: Domain) -> list[tuple[str, str]]:
    kinds: list[tuple[str, str]] = []
    for index in range(number):
        shape, colour = _kind(rng, domain if index == 0 else "in-domain")
        # Shapes and colours that repeat make counting and pointing worth asking.
        if kinds and rng.random() < 0.2:
            shape = kinds[0][0]
        if kinds and rng.random() < 0.2:
            colour = kinds[0][1]
        kinds.append((shape, colour))
    return kinds


def _twin_kinds(rng: random.Random, domain: Domain) -> list[tuple[str, str]]:
    twin = _kind(rng, domain)
    while True:
        odd = _kind(rng, "in-domain")
        if odd[0] != twin[0] and odd[1] != twin[1]:
            return [twin, twin, odd]


def _kind(rng: random.Random, domain: Domain) -> tuple[str, str]:
    if domain == "near-domain":
        return rng.choice(sorted(HELD_OUT))
    if domain == "out-domain":
        if rng.random() < 0.5:
            return rng.choice(NOVEL_SHAPES), rng.choice(tuple(COLOURS))
        return rng.choice(SHAPES), rng.choice(tuple(NOVEL_COLOURS))
    while True:
        kind = (rng.choice(SHAPES), rng.choice(tuple(COLOURS)))
        if kind not in HELD_OUT:
            return kind


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene, RGB of 84 × 84 pixels; `rng` moves the shapes and tints within small bounds."""
    side = IMAGE_SIZE * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), _tinted(BACKGROUNDS[scene.background], rng, 4))
    canvas = ImageDraw.Draw(image)
    if scene.style == "striped":
        _draw_stripes(canvas, side, BACKGROUNDS[scene.background])
    for thing in scene.things:
        _draw_thing(canvas, thing, rng)
    return image.reduce(_SUPERSAMPLING)


def png_bytes(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _tinted(colour: tuple[int, int, int], rng: random.Random, spread: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-spread, spread))) for c in colour)
    return red, green, blue


def _draw_stripes(canvas: ImageDraw.ImageDraw, side: int, colour: tuple[int, int, int]) -> None:
    shade = 14 if sum(colour) < 3 * 128 else -14
    fill = (colour[0] + shade, colour[1] + shade, colour[2] + shade)
    width = side // 12
    for left in range(0, side, 2 * width):
        canvas.rectangle((left, 0, left + width - 1, side), fill=fill)


def _draw_thing(canvas: ImageDraw.ImageDraw, thing: Thing, rng: random.Random) -> None:
    radius = SIZES[thing.size]
    slack = CELL / 2 - radius
    x = (CELL * (thing.column + 0.5) + rng.uniform(-slack, slack) * 0.7) * _SUPERSAMPLING
    y = (CELL * (thing.row + 0.5) + rng.uniform(-slack, slack) * 0.7) * _SUPERSAMPLING
    r = radius * _SUPERSAMPLING
    fill = _tinted((COLOURS | NOVEL_COLOURS)[thing.colour], rng, 12)
    if thing.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "ring":
        canvas.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(0.4 * r))
    else:
        canvas.polygon([(x + r * dx, y + r * dy) for dx, dy in _outline(thing.shape)], fill=fill)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygon in units of the radius, y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0, -1), (0.95, 0.85), (-0.95, 0.85)]
    if shape == "diamond":
        return [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]
    if shape == "star":
        radii = (1.0, 0.42)
        turns = [math.pi * (k / 5 - 0.5) for k in range(10)]
        return [
            (radii[k % 2] * math.cos(t), radii[k % 2] * math.sin(t)) for k, t in enumerate(turns)
        ]
    arm = 0.32
    return [
        (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
        (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
    ]  # fmt: skip
