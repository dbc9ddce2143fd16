"""Contact sheets: pairs of frames side by side with what changed between them, as one picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Width of a frame on the sheet; a tall one gets as much height.
TILE_SIZE = 176
MARGIN, GAP, CAPTION_HEIGHT, HEADING_HEIGHT = 14, 3, 19, 26
COLUMNS = 2
# Differences are small numbers: they are shown so many times as bright.
DIFFERENCE_GAIN = 2
BACKGROUND, INK, FAINT, WARN = (255, 255, 255), (25, 25, 25), (115, 115, 115), (190, 60, 0)


@dataclass(frozen=True)
class Tile:
    """
    A pair of frames on a sheet.

    Args:
        frames (`NDArray`): (2, height, width, 3) uint8 RGB, small.
        episode_id (`str`): Of the episode.
        steps (`tuple[int, int]`): First and second.
        seconds (`float`, *optional*): Between them.
        notes (`tuple[str, ...]`): More to say, such as the filters that leave it out.
        size (`tuple[int, int]`): (height, width) of the frames as they were decoded.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    episode_id: str
    steps: tuple[int, int]
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)

    @property
    def caption(self) -> str:
        """What stands above it, without the notes."""
        time = "" if self.seconds is None else f"   {self.seconds:.2f} s"
        return f"steps {self.steps[0]} > {self.steps[1]}{time}"


class Section(NamedTuple):
    """Pairs of one source: a heading, a line below it, and the pairs."""

    heading: str
    line: str
    tiles: Sequence[Tile]


def make_tile(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    episode_id: str,
    steps: tuple[int, int],
    seconds: float | None = None,
) -> Tile:
    """A pair, its frames (height, width, 3) uint8 RGB scaled to `TILE_SIZE`."""
    size = (first.shape[0], first.shape[1])
    scale = TILE_SIZE / max(size)
    height, width = (max(1, round(length * scale)) for length in size)
    # Enlarged pixels stay pixels: what a small frame does not have is not made up.
    kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    frames = [np.asarray(Image.fromarray(frame).resize((width, height), kind)) for frame in (first, second)]
    return Tile(np.stack(frames), episode_id, steps, seconds, size=size)


def difference(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(height, width, 3) uint8: how far each channel of two frames differs, `DIFFERENCE_GAIN` times as bright."""
    change = np.abs(frames[1].astype(np.int16) - frames[0].astype(np.int16)) * DIFFERENCE_GAIN
    shown: NDArray[np.uint8] = change.clip(0, 255).astype(np.uint8)
    return shown


def draw_sheet(sections: Sequence[Section]) -> Image.Image:
    """
    The sheet: per section a heading and its pairs, each as first frame, second frame and difference.

    Args:
        sections: At least one; one without pairs shows its line only.
    """
    heights = [_section_height(section) for section in sections]
    block = 3 * TILE_SIZE + 2 * GAP
    width = 2 * MARGIN + COLUMNS * block + (COLUMNS - 1) * 2 * MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for section, height in zip(sections, heights):
        draw.text((MARGIN, top), _fitted(section.heading, 17, width - 2 * MARGIN), INK, ImageFont.load_default(17))
        line = top + HEADING_HEIGHT
        draw.text((MARGIN, line), _fitted(section.line, 13, width - 2 * MARGIN), FAINT, ImageFont.load_default(13))
        place = line + CAPTION_HEIGHT + GAP
        for start in range(0, len(section.tiles), COLUMNS):
            row = section.tiles[start : start + COLUMNS]
            for column, tile in enumerate(row):
                _draw_tile(sheet, tile, MARGIN + column * (block + 2 * MARGIN), place)
            place += _row_height(row)
        top += height
    return sheet


def _section_height(section: Section) -> int:
    rows = [section.tiles[start : start + COLUMNS] for start in range(0, len(section.tiles), COLUMNS)]
    return HEADING_HEIGHT + CAPTION_HEIGHT + GAP + sum(map(_row_height, rows)) + MARGIN


def _row_height(row: Sequence[Tile]) -> int:
    height: int = max(tile.frames.shape[1] for tile in row)
    return 2 * CAPTION_HEIGHT + height + MARGIN


def _draw_tile(sheet: Image.Image, tile: Tile, left: int, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    width, font = 3 * TILE_SIZE + 2 * GAP, ImageFont.load_default(13)
    draw.text((left, top), _fitted(tile.episode_id, 13, width), INK, font)
    draw.text((left, top + CAPTION_HEIGHT - 2), tile.caption, FAINT, font)
    notes = "  ".join(tile.notes)
    if notes:
        draw.text((left + width - ceil(font.getlength(notes)), top + CAPTION_HEIGHT - 2), notes, WARN, font)
    for place, picture in enumerate((*tile.frames, difference(tile.frames))):
        sheet.paste(Image.fromarray(picture), (left + place * (TILE_SIZE + GAP), top + 2 * CAPTION_HEIGHT))


def _fitted(text: str, size: int, width: int) -> str:
    """A text cut in its middle where it is wider than there is room: names differ at their ends."""
    font = ImageFont.load_default(size)
    text = text.encode("latin-1", "replace").decode("latin-1")
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept > 2 and font.getlength(text[: kept // 2] + "..." + text[-(kept // 2) :]) > width:
        kept -= 1
    return text[: kept // 2] + "..." + text[-(kept // 2) :]


__all__ = ["TILE_SIZE", "Section", "Tile", "difference", "draw_sheet", "make_tile"]
