"""Decoding of one image file: its pixels, or the reason why there are none.

The rules for each kind of file are the table at the end of docs/data.md.
"""

import errno
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from raydml.data.catalog import DataError
from raydml.images.preprocessing import Resizing, deep_mode, resized, resized_size, upright_rgb

Opener = Callable[[Path], BinaryIO]

# Where Pillow begins to warn of decompression bombs (it refuses at twice that): a quarter of a GiB at 3 bytes a pixel.
MAX_PIXELS = 89_478_485
_MAX_SIDE_PX = 1_000_000  # the lines of Pillow's decoders end at some 67 million, with a MemoryError
# Pillow's own search through all its formats may run Ghostscript, and warns of sizes that this module refuses.
_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"BM", BmpImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),
    (b"MM\0+", TiffImageFile),
    (b"RIFF", WebPImageFile),
)
# The exceptions of Pillow for a damaged file, depending on where the damage is.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnreadableImage(DataError):
    """A file that gives no pixels. path: relative to the root. reason: one line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Header(NamedTuple):
    """The size as stored, before any rotation, and the bytes of the file."""

    width: int
    height: int
    num_bytes: int


def open_regular(file: Path) -> BinaryIO:
    """Open a regular file for reading bytes. Raises OSError for others, at once even for a pipe without a writer."""
    handle = open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError("not a regular file")
    return handle


def decode(root: Path, path: str, resizing: Resizing | None, opener: Opener | None = None) -> np.ndarray:
    """Decode a file into upright RGB: uint8 (H, W, 3), read-only. Raises UnreadableImage.

    resizing None: full size. opener: a function that opens the path for reading bytes, in place of open_regular.
    """
    with _opened(root, path, opener) as (image, _):
        upright = upright_rgb(image)
    pixels = np.asarray(resized(upright, resizing))
    pixels.flags.writeable = False
    return pixels


def read_header(root: Path, path: str) -> Header:
    """Read the header of a file and decode nothing. Raises UnreadableImage."""
    with _opened(root, path) as (image, num_bytes):
        return Header(*image.size, num_bytes)


def decoded_bytes(header: Header, resizing: Resizing) -> int:
    """Bytes of the pixels of a file after resizing; a rotation does not change them."""
    width, height = resized_size(header[:2], resizing)
    return width * height * 3


@contextmanager
def _opened(root: Path, path: str, opener: Opener | None = None) -> Iterator[tuple[ImageFile, int]]:
    """The image, not decoded yet, and the bytes of its file; any fault of the file is raised as UnreadableImage."""
    file = root / path
    try:
        with (opener or open_regular)(file) as handle:
            num_bytes = os.fstat(handle.fileno()).st_size
            image = _identified(path, handle, num_bytes)
            _refuse_unfit(path, image)
            yield image, num_bytes
    except UnreadableImage:
        raise
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{file}: {error}; raise the limit of open files (ulimit -n)") from error  # no damage
        reason = f"{type(error).__name__}: {error}".replace(str(file), file.name)
        raise UnreadableImage(path, " ".join(reason.split())) from error


def _identified(path: str, handle: BinaryIO, num_bytes: int) -> ImageFile:
    first = handle.read(12)
    handle.seek(0)
    for signature, image_file in _FORMATS:
        if first.startswith(signature) and (signature != b"RIFF" or first.endswith(b"WEBP")):
            return image_file(handle, path)
    reason = "no JPEG, PNG, GIF, BMP, TIFF or WebP by its first bytes" if num_bytes else "an empty file (0 bytes)"
    raise UnreadableImage(path, reason)


def _refuse_unfit(path: str, image: ImageFile) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(path, f"{width:,} x {height:,} pixels are more than {MAX_PIXELS:,}; scale the file down")
    if max(width, height) > _MAX_SIDE_PX:
        reason = f"a side of {max(width, height):,} pixels is longer than {_MAX_SIDE_PX:,}; scale the file down"
        raise UnreadableImage(path, reason)
    if deep := deep_mode(image):
        raise UnreadableImage(path, f"pixels of mode {deep} are not 8 bits a channel; convert the file")


def fault_of(folder: Path, path: str) -> str | None:
    """Decode an image file in full: the reason why it cannot be used, or None for a good file."""
    try:
        decode(folder, path, None)
    except UnreadableImage as error:
        return error.reason
    return None
