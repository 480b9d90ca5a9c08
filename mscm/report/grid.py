"""Grids of images as PNG, large enough to be looked at.

    save_png("samples.png", side_by_side({"student, 4 steps": a, "teacher, 256 steps": b}, columns=8))
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from mscm import atomic

MIN_CELL = 48  # pixels: below this a person does not see what an 8 x 8 image shows
CAPTIONED_CELL = 96  # pixels: below this a caption has a line for each word
FONT_SIZE, CAPTION_SIZE = 15, 11
CAPTION_LINES = 3
BACKGROUND, INK = 255, 40


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int,
    scale: int | None = None,
    padding: int = 2,
    title: str | None = None,
    row_titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The images row by row on white, RGB, with an optional title above, titles left of the rows and captions beneath.

    `scale` is an integer nearest-neighbour magnification, by default the smallest that makes a cell 48 pixels wide, 96
    with captions.
    """
    cells = _cells(images, columns, scale, MIN_CELL if captions is None else CAPTIONED_CELL)
    if captions is not None:
        cells = _captioned(cells, captions)
    num, height, width, _ = cells.shape
    rows = -(-num // columns)
    if row_titles is not None and len(row_titles) != rows:
        raise ValueError(
            f"image_grid: got {len(row_titles)} row titles, expected {rows}, one per row of {num} images in "
            f"{columns} columns."
        )
    grid = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), BACKGROUND, np.uint8
    )
    for index, cell in enumerate(cells):
        top = padding + index // columns * (height + padding)
        left = padding + index % columns * (width + padding)
        grid[top : top + height, left : left + width] = cell
    if row_titles is not None:
        grid = _caption_rows(grid, row_titles, height + padding)
    return grid if title is None else _caption_above(grid, title)


def side_by_side(
    panels: Mapping[str, UInt8[np.ndarray, "n h w c"]],
    *,
    columns: int,
    captions: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """One titled grid per entry, beside each other; image i has the same place in every panel."""
    if not panels:
        raise ValueError("side_by_side: got no panels, expected at least one entry 'title: images'.")
    counts = {title: len(images) for title, images in panels.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"side_by_side: got {counts} images, expected equally many in every panel to be comparable.")
    grids = [
        image_grid(images, columns=columns, title=title, captions=captions)
        for title, images in panels.items()
    ]
    height = max(grid.shape[0] for grid in grids)
    gap = np.full((height, FONT_SIZE, 3), BACKGROUND, np.uint8)
    parts = []
    for grid in grids:
        below = height - grid.shape[0]
        parts += [gap, np.pad(grid, ((0, below), (0, 0), (0, 0)), constant_values=BACKGROUND)]
    return np.concatenate([*parts[1:]], axis=1)


def save_png(path: str | os.PathLike, image: UInt8[np.ndarray, "h w c"]) -> None:
    """Writes a grey (c = 1) or RGB (c = 3) image as PNG; a reader sees the old file or the whole new one."""
    image = _check_uint8(np.asarray(image), "save_png", rank=3)
    with atomic.writing(path) as file:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")


def _cells(images: np.ndarray, columns: int, scale: int | None, least: int) -> UInt8[np.ndarray, "n H W 3"]:
    images = _check_uint8(np.asarray(images), "image_grid", rank=4)
    if columns < 1 or not len(images):
        raise ValueError(f"image_grid: got {len(images)} images in {columns} columns, expected at least 1 of each.")
    if scale is None:
        scale = max(1, -(-least // min(images.shape[1:3])))
    if scale < 1:
        raise ValueError(f"image_grid: got scale = {scale}, expected an integer of 1 or more, or None to choose it.")
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_uint8(images: np.ndarray, who: str, *, rank: int) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim != rank or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"{who}: got {images.dtype} of shape {images.shape}, expected uint8 "
            f"'{'n ' if rank == 4 else ''}h w c' with 1 or 3 channels; convert floats with transforms.to_uint8."
        )
    return images


def _captioned(cells: UInt8[np.ndarray, "n H W 3"], captions: Sequence[str]) -> UInt8[np.ndarray, "n H_new W 3"]:
    """Each cell above its caption, whose lines are as many as the longest needs, at most `CAPTION_LINES`."""
    if len(captions) != len(cells):
        raise ValueError(f"image_grid: got {len(captions)} captions, expected {len(cells)}, one per image.")
    width = cells.shape[2]
    wrapped = [_wrapped(caption, width) for caption in captions]
    line_height = CAPTION_SIZE + 3
    below = np.full((len(cells), max(map(len, wrapped)) * line_height + 4, width, 3), BACKGROUND, np.uint8)
    for cell, lines in zip(below, wrapped, strict=True):
        for i, line in enumerate(lines):
            text = _text(line, CAPTION_SIZE)[:line_height, :width]
            left = (width - text.shape[1]) // 2
            cell[2 + i * line_height : 2 + i * line_height + text.shape[0], left : left + text.shape[1]] = text
    return np.concatenate([cells, below], axis=1)


def _wrapped(caption: str, width: int) -> list[str]:
    """Lines of whole words that fit a width in pixels; the rest of a long caption is three dots."""
    font, lines = ImageFont.load_default(size=CAPTION_SIZE), [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} ..."]
    return lines


def _text(text: str, size: int = FONT_SIZE) -> UInt8[np.ndarray, "h w 3"]:
    """The text in dark grey on white, in Pillow's own font, as tight as its line."""
    font = ImageFont.load_default(size=size)
    left, _, right, _ = font.getbbox(text)
    canvas = Image.new("L", (int(np.ceil(right - min(left, 0))) + 1, size + 5), BACKGROUND)
    ImageDraw.Draw(canvas).text((-min(left, 0), 1), text, font=font, fill=INK)
    return np.repeat(np.asarray(canvas)[..., None], 3, axis=-1)


def _caption_above(grid: np.ndarray, title: str) -> np.ndarray:
    text = _text(title)
    margin = 4
    width = max(grid.shape[1], text.shape[1] + 2 * margin)
    band = np.full((text.shape[0] + 2 * margin, width, 3), BACKGROUND, np.uint8)
    left = (grid.shape[1] - text.shape[1]) // 2 if width == grid.shape[1] else margin
    band[margin : margin + text.shape[0], left : left + text.shape[1]] = text
    side = width - grid.shape[1]
    grid = np.pad(grid, ((0, 0), (side // 2, side - side // 2), (0, 0)), constant_values=BACKGROUND)
    return np.concatenate([band, grid], axis=0)


def _caption_rows(grid: np.ndarray, titles: Sequence[str], row_height: int) -> np.ndarray:
    texts = [_text(title) for title in titles]
    band = np.full((grid.shape[0], max(text.shape[1] for text in texts) + 8, 3), BACKGROUND, np.uint8)
    for row, text in enumerate(texts):
        text = text[:row_height]  # a caption taller than its row would run into the next
        top = min(row * row_height + max(0, (row_height - text.shape[0]) // 2), grid.shape[0] - text.shape[0])
        left = band.shape[1] - 4 - text.shape[1]
        band[top : top + text.shape[0], left : left + text.shape[1]] = text
    return np.concatenate([band, grid], axis=1)
