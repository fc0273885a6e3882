"""The emoji that are drawn in both styles, and their pictures on white."""

from collections.abc import Iterable
import io
import json
from pathlib import Path
from typing import Any
from typing import NamedTuple

import numpy as np
from PIL import features
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

SIZE = 224
# The font's only size: bitmaps of 136 × 128 pixels, made for 109 a line.
STRIKE = 109
WIDTH, HEIGHT = 136, 128
# No country's; the font has one picture, a question mark, for flags that it lacks.
UNKNOWN_FLAG = '\N{REGIONAL INDICATOR SYMBOL LETTER Q}' * 2
GROUPS = ('smileys-emotion', 'people-body', 'animals-nature', 'food-drink')
GROUPS += ('travel-places', 'activities', 'objects', 'symbols', 'flags')


class Concept(NamedTuple):
  """An emoji.

  Attributes:
    characters: that write it.
    hexcode: their numbers, the name of OpenMoji's file.
    name: by Unicode.
    group: index into ``GROUPS``, Unicode's groups in their order.
  """

  characters: str
  hexcode: str
  name: str
  group: int


def concepts(openmoji: Path) -> list[Concept]:
  """All emoji but components and variants of skin tone, in Unicode's order."""
  rows: list[dict[str, Any]] = json.loads(
    (openmoji / 'data' / 'openmoji.json').read_text(encoding='utf-8')
  )
  rows = [row for row in rows if row['group'] in GROUPS and not row['skintone']]
  return [
    Concept(row['emoji'], row['hexcode'], row['annotation'], GROUPS.index(row['group']))
    for row in sorted(rows, key=lambda row: row['order'])
  ]


def draw(
  drawn: Iterable[Concept], openmoji: Path, noto: Path
) -> tuple[list[Concept], np.ndarray]:
  """Draws them in both styles.

  A concept is left out if Noto lacks it, or if one of its pictures is exactly that of
  an earlier one, as with the flags of Indonesia and Monaco.

  Args:
    drawn: what to draw.
    openmoji: folder of the npm package.
    noto: the file NotoColorEmoji.ttf.

  Returns:
    The concepts that remain and their pictures, uint8 ``[2, N, 224, 224, 3]``, first
    Noto's, then OpenMoji's.
  """
  if not features.check('raqm'):
    raise RuntimeError('Pillow lacks raqm, without which flags fall into letters.')
  font = ImageFont.truetype(noto, STRIKE, layout_engine=ImageFont.Layout.RAQM)
  unknown = draw_noto(UNKNOWN_FLAG, font)
  seen = set() if unknown is None else {unknown.tobytes()}
  kept, pictures = [], []
  for concept in drawn:
    one = draw_noto(concept.characters, font)
    other = draw_openmoji(openmoji / 'color' / 'svg' / f'{concept.hexcode}.svg')
    if one is not None and not seen & {one.tobytes(), other.tobytes()}:
      kept.append(concept)
      pictures.append([np.asarray(one), np.asarray(other)])
      seen |= {one.tobytes(), other.tobytes()}
  return kept, np.stack(pictures, axis=1)


def draw_noto(characters: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
  """The glyph on a white square, enlarged; nothing if the font has no single one."""
  left, top, right, bottom = font.getbbox(characters, anchor='lt')
  if (right - left, bottom - top) != (WIDTH, HEIGHT):
    return None
  square = Image.new('RGB', (WIDTH, WIDTH), 'white')
  at = (0, (WIDTH - HEIGHT) // 2)
  pen = ImageDraw.Draw(square)
  pen.text(at, characters, font=font, embedded_color=True, anchor='lt')
  return square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def draw_openmoji(svg: Path) -> Image.Image:
  """The vector drawing at its final size on white."""
  # Installed for making the file only: see `build.py`.
  import resvg_py  # pyright: ignore[reportMissingImports]

  png = resvg_py.svg_to_bytes(
    svg_path=str(svg),
    width=SIZE,
    height=SIZE,
    background='#ffffff',
    skip_system_fonts=True,
  )
  return Image.open(io.BytesIO(bytes(png))).convert('RGB')
