"""Grids: every pixel where it belongs, and files that are whole."""

import inspect

import numpy as np
import pytest
from PIL import Image

from mscm.report import grid


def make_images(num=5, side=8, channels=3):
    return np.random.RandomState(0).randint(0, 200, (num, side, side, channels)).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_cells_are_in_reading_order(channels):
    images = make_images(channels=channels)
    picture = grid.image_grid(images, columns=3, scale=2, padding=1)
    assert picture.shape == (2 * 17 + 1, 3 * 17 + 1, 3) and picture.dtype == np.uint8
    for index, image in enumerate(images):
        top, left = 1 + index // 3 * 17, 1 + index % 3 * 17
        cell = picture[top : top + 16, left : left + 16]
        for offset in (0, 1):
            np.testing.assert_array_equal(cell[offset::2, offset::2], np.broadcast_to(image, (8, 8, 3)))
        picture[top : top + 16, left : left + 16] = 255
    assert (picture == 255).all()  # nothing else is drawn, the missing sixth cell included


@pytest.mark.parametrize("side, cell", [(8, 48), (32, 64), (48, 48), (64, 64), (7, 49)])
def test_small_images_are_enlarged(side, cell):
    assert grid.image_grid(make_images(1, side), columns=1, padding=0).shape == (cell, cell, 3)


def test_titles_add_ink_and_keep_the_images():
    images = make_images()
    plain = grid.image_grid(images, columns=3)
    titled = grid.image_grid(images, columns=3, title="4 steps", row_titles=["first", "second"])
    np.testing.assert_array_equal(titled[-plain.shape[0] :, -plain.shape[1] :], plain)
    band = titled[: -plain.shape[0]]
    assert band.min() < 100
    margin = titled[-plain.shape[0] :, : -plain.shape[1]]
    middle = plain.shape[0] // 2
    assert margin[:middle].min() < 100 and margin[middle:].min() < 100


def test_side_by_side_puts_panels_in_order_at_one_height():
    black, grey = np.zeros((4, 8, 8, 1), np.uint8), np.full((4, 8, 8, 3), 120, np.uint8)
    picture = grid.side_by_side({"student, 4 steps": black, "a far longer title than its panel": grey}, columns=2)
    columns_of = lambda value: np.flatnonzero((picture == value).all(-1).sum(0) >= 96)  # noqa: E731
    assert len(columns_of(0)) == len(columns_of(120)) == 96
    assert columns_of(0).max() < columns_of(120).min()
    rows = [np.flatnonzero((picture == value).all(-1).sum(1) >= 96) for value in (0, 120)]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels, tmp_path):
    image = make_images(channels=channels)[0]
    path = tmp_path / "new" / "a.png"
    grid.save_png(path, image)
    grid.save_png(path, image)  # over the old one
    read = np.asarray(Image.open(path)).reshape(image.shape)
    np.testing.assert_array_equal(read, image)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    grid.save_png(path, make_images()[0])
    before = path.read_bytes()
    monkeypatch.setattr(Image, "fromarray", lambda array: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        grid.save_png(path, make_images()[1])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bad_input_is_a_sentence():
    image_grid, side_by_side = inspect.unwrap(grid.image_grid), inspect.unwrap(grid.side_by_side)
    with pytest.raises(ValueError, match="got float64 of shape"):
        image_grid(np.zeros((1, 8, 8, 3)), columns=1)
    with pytest.raises(ValueError, match="with 1 or 3 channels"):
        image_grid(make_images(channels=2), columns=1)
    with pytest.raises(ValueError, match="5 images in 0 columns"):
        image_grid(make_images(), columns=0)
    with pytest.raises(ValueError, match="got 1 row titles, expected 2"):
        image_grid(make_images(), columns=3, row_titles=["a"])
    with pytest.raises(ValueError, match="scale = 0"):
        image_grid(make_images(), columns=3, scale=0)
    with pytest.raises(ValueError, match="equally many"):
        side_by_side({"a": make_images(2), "b": make_images(3)}, columns=1)
    with pytest.raises(ValueError, match="no panels"):
        side_by_side({}, columns=1)


def test_captions_stand_beneath_their_images():
    """White above what is written, dark below; an empty caption leaves white; the images are as without."""
    images = np.zeros((4, 16, 16, 1), np.uint8)
    plain = grid.image_grid(images, columns=2, scale=6)
    written = grid.image_grid(images, columns=2, scale=6, captions=["a seven left of a two", "", "x", "word " * 60])
    extra = (written.shape[0] - plain.shape[0]) // 2
    assert written.shape[1] == plain.shape[1] and extra >= grid.CAPTION_LINES * grid.CAPTION_SIZE
    first = written[2 : 2 + 96 + extra, 2 : 2 + 96]
    assert not first[:96].any() and (first[96:] < 128).any()
    assert (written[2 + 96 : 2 + 96 + extra, 100 : 100 + 96] == grid.BACKGROUND).all()


def test_captions_make_cells_wide_enough_to_read():
    assert grid.image_grid(np.zeros((1, 16, 16, 1), np.uint8), columns=1, captions=["a"]).shape[1] == 96 + 4


def test_one_caption_for_each_image():
    with pytest.raises(ValueError, match="got 1 captions, expected 2, one per image"):
        grid.image_grid(np.zeros((2, 8, 8, 1), np.uint8), columns=2, captions=["a"])
