"""PNG files that a batch at a time is decoded from.

What makes decoding slow is undoing a filter that differs from row to row, pixel by pixel. Files written here use the
filter `up` (the difference to the row above) in every row: about as small, readable by everything, and undone by one
addition per row for all images of a batch.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

_UP = 2  # the filter's number
_COLOUR = {1: 0, 3: 2}  # channels: PNG's colour type, grey or RGB


def encode(pixels: UInt8[np.ndarray, "h w c"]) -> bytes:
    """PNG file of a grey (c = 1) or RGB (c = 3) image."""
    height, width, channels = pixels.shape
    values = pixels.reshape(height, width * channels)
    rows = np.full((height, 1 + width * channels), _UP, np.uint8)
    rows[0, 1:], rows[1:, 1:] = values[0], values[1:] - values[:-1]
    return _head(width, height, channels) + _chunk(b"IDAT", zlib.compress(rows.tobytes())) + _chunk(b"IEND", b"")


def decode(files: Sequence[bytes], *, side: int, channels: int) -> UInt8[np.ndarray, "b s s c"]:
    """The pixels of square images that `encode` has written.

    Raises:
      ValueError: a file of another size, another writer, or damaged.
    """
    head, length = _head(side, side, channels), side * (1 + side * channels)
    unfiltered = np.empty((len(files), length), np.uint8)
    for row, file in zip(unfiltered, files, strict=True):
        if not file.startswith(head):
            raise ValueError(f"got a file that is no PNG of {side} x {side} pixels and {channels} channels")
        try:
            unpacked = zlib.decompress(memoryview(file)[len(head) + 8 : -16], bufsize=length)
        except zlib.error as error:
            raise ValueError(f"got a PNG that does not unpack: {error}") from error
        row[:] = np.frombuffer(unpacked, np.uint8)
    rows = unfiltered.reshape(len(files), side, 1 + side * channels)
    if (rows[..., 0] != _UP).any():
        raise ValueError("got a PNG with another filter than 'up'")
    pixels = np.empty((len(files), side, side * channels), np.uint8)
    pixels[:, 0] = rows[:, 0, 1:]
    for i in range(1, side):
        np.add(pixels[:, i - 1], rows[:, i, 1:], out=pixels[:, i])  # modulo 256, as the format has it
    return pixels.reshape(len(files), side, side, channels)


def _head(width: int, height: int, channels: int) -> bytes:
    # 8 bits a channel; compression, filters and order of the rows are the only ones there are, or the plain one.
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
