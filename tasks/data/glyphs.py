"""``glyphs``: the letters of the alphabet, drawn from the fonts that matplotlib ships; nothing to download.

Owns: which letters, fonts and distortions, and the recorded seed. Must never resize (resize.py does) or keep anything
(the cache does).

26 classes (capital and small letters together), 21 faces, and ``VARIANTS`` pictures of each letter in each face, each
turned, scaled, sheared and moved a little. The pictures are fixed by ``SEED`` and the versions of matplotlib (fonts)
and Pillow (FreeType), which ``state`` names, so that other versions get a cache entry of their own.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, __version__
from PIL.ImageFont import FreeTypeFont

from tasks.data.sources import Chunk, Images, Source
from tasks.data.store import digest
from tasks.errors import DataError

FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip
CLASSES = 26
SIDE = 28
VARIANTS = 14
SEED = 5
TURN, SHEAR, SCALE, MOVE = math.radians(12), 0.15, (0.8, 1.1), 0.07
"""The distortions' bounds; all are uniform, and ``MOVE`` is in sides."""

_LARGE = 4 * SIDE  # drawn at this side, so that distortions do not show its pixels
_HEIGHT = 0.7  # of the letters' bounding box, of a side


def open_glyphs() -> Source:
    """The set, nothing of it drawn yet. Raises DataError if a font is not there."""
    import matplotlib as mpl  # half a second, which most processes need not spend

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    files = [folder / f"{face}.ttf" for face in FACES]
    if missing := [file.name for file in files if not file.exists()]:
        raise DataError(f"glyphs: expected the fonts of matplotlib in {folder}, found no {', '.join(missing)}")
    state = digest("glyphs", str(SEED), str(VARIANTS), mpl.__version__, __version__)
    return Source(lambda: _draw(files), None, in_class_order=True, state=state)


def _draw(files: list[Path]) -> Iterator[Chunk]:
    rng = np.random.RandomState(SEED)  # frozen by NumPy's compatibility policy
    for file in files:
        font = ImageFont.truetype(str(file), _LARGE, layout_engine=ImageFont.Layout.BASIC)
        for letter in string.ascii_letters:
            upright = _upright(font, letter)
            images = np.stack([_distorted(upright, rng) for _ in range(VARIANTS)])[:, None]
            label = string.ascii_lowercase.index(letter.lower())
            yield Chunk(images, np.full(VARIANTS, label, np.int64))


def _upright(font: FreeTypeFont, letter: str) -> Image.Image:
    """The letter in the middle of a large black square, as wide or as high as ``_HEIGHT`` of it."""
    left, top, right, bottom = font.getbbox(letter)
    drawn = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(drawn).text((-left, -top), letter, fill=255, font=font)
    scale = _HEIGHT * _LARGE / max(drawn.size)
    drawn = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))
    square = Image.new("L", (_LARGE, _LARGE))
    square.paste(drawn, ((_LARGE - drawn.width) // 2, (_LARGE - drawn.height) // 2))
    return square


def _distorted(upright: Image.Image, rng: np.random.RandomState) -> Images:
    """(SIDE, SIDE): turned, sheared, scaled and moved at random."""
    angle, shear, scale = rng.uniform(-TURN, TURN), rng.uniform(-SHEAR, SHEAR), rng.uniform(*SCALE)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    backwards = turn @ np.array([[1, shear], [0, 1]]) / scale  # from a pixel of the result to where it is taken from
    middle = np.full(2, _LARGE / 2)
    offset = middle - backwards @ (middle + rng.uniform(-MOVE, MOVE, 2) * _LARGE)
    rows = np.column_stack([backwards, offset]).ravel()
    moved = upright.transform(upright.size, Image.Transform.AFFINE, rows.tolist(), Image.Resampling.BILINEAR)
    return np.asarray(moved.resize((SIDE, SIDE), Image.Resampling.BOX))
