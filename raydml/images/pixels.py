"""The pixels of image files: of one file, or the reason why there are none; of many, packed into one array or decoded
at each reading.

The rules for each kind of file are the table at the end of docs/data.md.
"""

import errno
import os
import stat
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from threading import Semaphore
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile, DibImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PcxImagePlugin import PcxImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.QoiImagePlugin import QoiImageFile
from PIL.SgiImagePlugin import SgiImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from raydml.data.catalog import DataError
from raydml.data.formats import DECODED_FORMATS, UNDECODED_SUFFIXES, suffix_of
from raydml.images.preprocessing import Resizing, centre_crop, deep_mode, resized, resized_size, upright_rgb
from raydml.ops.cores import num_usable_cores

Rows = Sequence[int] | np.ndarray
Result = TypeVar("Result")
Opener = Callable[[Path], BinaryIO]
# More threads than few cores: on a network disk they wait at the same time. Only as many as there are cores work on
# pixels at a time: eight on two cores would wait for Python's lock, 1.05 ms an image where two threads take 0.72.
_MIN_THREADS, _MAX_THREADS = 8, 32
_BLOCK_BYTES = 1 << 20
# Where Pillow begins to warn of decompression bombs (it refuses at twice that): a quarter of a GiB at 3 bytes a pixel.
MAX_PIXELS = 89_478_485
_JPEG2000_HEADER_BYTES = 2**20
_MAX_SIDE_PX = 1_000_000  # the lines of Pillow's decoders end at some 67 million, with a MemoryError
# What is written beside the pixels of a PNG (a colour profile, texts) may take as much memory as the pixels: Pillow's
# limit of 1 MiB refuses sound images.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 3 * MAX_PIXELS
# Pillow's own search through all its formats may run Ghostscript, and warns of sizes that this module refuses.
_FORMATS: tuple[tuple[bytes, type[ImageFile]], ...] = (
    (b"\xff\xd8\xff", JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", PngImageFile),
    (b"GIF87a", GifImageFile),
    (b"GIF89a", GifImageFile),
    (b"BM", BmpImageFile),
    (b"\x28\0\0\0", DibImageFile),
    (b"II*\0", TiffImageFile),
    (b"MM\0*", TiffImageFile),
    (b"II+\0", TiffImageFile),
    (b"MM\0+", TiffImageFile),
    (b"RIFF", WebPImageFile),
    (b"\0\0\0\x0cjP  \r\n\x87\n", Jpeg2KImageFile),
    (b"\xff\x4f\xff\x51", Jpeg2KImageFile),
    *((b"P%d%c" % (number, blank), PpmImageFile) for number in range(1, 7) for blank in b" \t\r\n"),
    (b"qoif", QoiImageFile),
    (b"\x01\xda", SgiImageFile),
    *((b"\n%c\x01" % version, PcxImageFile) for version in (0, 2, 3, 5)),
)
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc"), "HEIC")}
_BRANDS |= dict.fromkeys((b"hevx", b"hevm", b"hevs"), "HEIC")
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
    RuntimeError,  # of libheif
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


def open_and_read(file: Path) -> BinaryIO:
    """Open a regular file at its beginning, after its bytes were read once: the system then has them in memory."""
    handle = open_regular(file)
    try:
        while handle.read(_BLOCK_BYTES):
            pass
        handle.seek(0)
    except BaseException:
        handle.close()
        raise
    return handle


def decode(
    root: Path, path: str, resizing: Resizing | None, opener: Opener | None = None, cores: Semaphore | None = None
) -> np.ndarray:
    """Decode a file into upright RGB: uint8 (H, W, 3), read-only. Raises UnreadableImage.

    resizing None: full size. opener: a function that opens the path for reading bytes, in place of open_regular.
    cores: a semaphore, held while a core works on the pixels, and not while the file is opened.
    """
    turn = cores or nullcontext()
    with _opened(root, path, opener) as (image, _), turn:
        upright = upright_rgb(image)
    with turn:
        pixels = resized(upright, resizing)
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
    first = handle.read(64)
    handle.seek(0)
    for signature, image_file in _FORMATS:
        if first.startswith(signature) and (signature != b"RIFF" or first[8:12] == b"WEBP"):
            return image_file(handle, path)
    if first[4:8] == b"ftyp":
        # The main brand, a version, and the brands of other readers that may open the file: mif1 is either format.
        brands = [first[8:12], *(first[at : at + 4] for at in range(16, min(first[3], len(first)), 4))]
        kind = next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "")
        if kind == "AVIF":
            return AvifImageFile(handle, path)
        if kind == "HEIC":
            from pillow_heif import HeifImageFile  # a slow import that other images do not need

            heic: ImageFile = HeifImageFile(handle, path)
            return heic
    if first and suffix_of(path) in DECODED_FORMATS["TGA"]:  # has no signature
        return TgaImageFile(handle, path)
    raise UnreadableImage(path, _why_unknown(path, num_bytes))


def _why_unknown(path: str, num_bytes: int) -> str:
    if not num_bytes:
        return "an empty file (0 bytes)"
    *formats, last = DECODED_FORMATS
    about = UNDECODED_SUFFIXES.get(suffix_of(path))
    hint = f" ({suffix_of(path)} is {about}); convert it to JPEG or PNG" if about else ""
    return f"no {', '.join(formats)} or {last} by its first bytes{hint}"


def _refuse_unfit(path: str, image: ImageFile) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(path, f"{width:,} x {height:,} pixels are more than {MAX_PIXELS:,}; scale the file down")
    if max(width, height) > _MAX_SIDE_PX:
        reason = f"a side of {max(width, height):,} pixels is longer than {_MAX_SIDE_PX:,}; scale the file down"
        raise UnreadableImage(path, reason)
    if deep := deep_mode(image) or _deep_jpeg2000(image):
        raise UnreadableImage(path, f"pixels of mode {deep} are not 8 bits a channel; convert the file")


def _deep_jpeg2000(image: ImageFile) -> str:
    """The bits of a channel of a JPEG 2000 image with more than 8, of which Pillow would keep the upper ones; or ""."""
    if not isinstance(image, Jpeg2KImageFile) or image.fp is None:
        return ""
    place = image.fp.tell()
    image.fp.seek(0)
    start = image.fp.read(_JPEG2000_HEADER_BYTES)
    image.fp.seek(place)
    codestream = start.find(b"\xff\x4f\xff\x51")
    bits = start[codestream + 42 : codestream + 43]  # Ssiz of the first channel, ISO 15444-1 A.5.1
    num_bits = (bits[0] & 0x7F) + 1 if codestream >= 0 and bits else 8
    return f"{image.mode} of {num_bits} bits" if num_bits > 8 else ""


def fault_of(folder: Path, path: str) -> str | None:
    """Decode an image file in full: the reason why it cannot be used, or None for a good file."""
    try:
        decode(folder, path, None)
    except UnreadableImage as error:
        return error.reason
    return None


class Pixels(Protocol):
    """N images, uint8 RGB, each (H, W, 3) of its own size; several threads may read at once."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> list[np.ndarray]:
        """The images with these numbers, read-only: uint8 (H, W, 3) each."""
        ...

    def select(self, rows: Rows) -> "Pixels":
        """The images with these numbers as a set of its own; nothing is copied or decoded."""
        ...


class PackedPixels:
    """Images one after the other in one flat array, in memory or memory-mapped.

    flat: (bytes,) uint8. offsets: (N,) int64, where each image begins. sizes: (N, 2) int32, height and width. check: a
    function of an image's offset and its pixels that returns them, or the right ones where the array was damaged.
    """

    def __init__(
        self,
        flat: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        check: Callable[[int, np.ndarray], np.ndarray] | None = None,
    ) -> None:
        assert len(offsets) == len(sizes)
        self.flat, self.offsets, self.sizes, self.check = flat, offsets, sizes, check

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """Views into the flat array: no image is copied."""
        rows = np.asarray(rows, dtype=np.int64)
        images = []
        for begin, (height, width) in zip(self.offsets[rows].tolist(), self.sizes[rows].tolist(), strict=True):
            image = self.flat[begin : begin + height * width * 3].reshape(height, width, 3)
            if self.check is not None:
                image = self.check(begin, image)
            image.flags.writeable = False
            images.append(image)
        return images

    def select(self, rows: Rows) -> "PackedPixels":
        rows = np.asarray(rows, dtype=np.int64)
        return PackedPixels(self.flat, self.offsets[rows], self.sizes[rows], self.check)


class DecodedPixels:
    """Images decoded from their files at each reading, bit for bit those of a pack with the same resizing.

    root, paths: the files. resizing None: full resolution. Threads open and decode files at the same time, one for each
    core and at least eight; a selection shares them. They do not survive a fork: each process makes its own object.
    """

    def __init__(self, root: Path, paths: Sequence[str], resizing: Resizing | None) -> None:
        self.root, self.paths, self.resizing = root, tuple(paths), resizing
        initializer = None if resizing is None else _keep_torch_to_one_thread
        self._pool = ThreadPoolExecutor(_num_threads(), thread_name_prefix="decode", initializer=initializer)
        self._cores = Semaphore(num_usable_cores())

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Rows) -> list[np.ndarray]:
        """Decode the images with these numbers. Raises UnreadableImage (a DataError) for the first without pixels."""
        paths = [self.paths[row] for row in rows]
        function = partial(decode, self.root, resizing=self.resizing, opener=open_and_read, cores=self._cores)
        return list(self._pool.map(function, paths))

    def select(self, rows: Rows) -> "DecodedPixels":
        chosen = object.__new__(DecodedPixels)
        chosen.__dict__.update(self.__dict__, paths=tuple(self.paths[row] for row in rows))
        return chosen


def packed(images: np.ndarray) -> PackedPixels:
    """Wrap (N, H, W, 3) uint8 in memory as Pixels."""
    num_images, height, width = images.shape[:3]
    offsets = np.arange(num_images, dtype=np.int64) * (height * width * 3)
    sizes = np.tile(np.array([height, width], dtype=np.int32), (num_images, 1))
    return PackedPixels(np.ascontiguousarray(images).reshape(-1), offsets, sizes)


def centres(pixels: Pixels, rows: Rows, size_px: int) -> np.ndarray:
    """Copy the centre squares of these images, none smaller than size_px: uint8 (B, size_px, size_px, 3)."""
    squares = [centre_crop(image, size_px) for image in pixels.read(rows)]
    return np.stack(squares) if squares else np.empty((0, size_px, size_px, 3), dtype=np.uint8)


def _num_threads() -> int:
    return min(_MAX_THREADS, max(_MIN_THREADS, num_usable_cores()))


def _keep_torch_to_one_thread() -> None:
    """Keep torch from starting further threads for work of this thread, as it does on processors without AVX2.

    ``torch.set_num_threads`` would hold for the whole process, which may train meanwhile.
    """
    import torch

    torch.get_num_threads()  # torch sets the number when a thread first uses it, and would undo the next line
    _openmp().limit(limits=1)


@lru_cache(maxsize=1)
def _openmp() -> Any:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped,unused-ignore]

    return ThreadpoolController().select(user_api="openmp")


def decode_in_order(
    root: Path, paths: Sequence[str], resizing: Resizing | None, opener: Opener | None = None
) -> Iterator[np.ndarray | UnreadableImage]:
    """Decode every file in the order of the paths: its pixels, or why it has none. Memory: a few images a thread."""
    initializer = None if resizing is None else _keep_torch_to_one_thread
    cores = Semaphore(num_usable_cores())
    function = partial(decode, root, resizing=resizing, opener=opener or open_and_read, cores=cores)
    return _in_order(function, paths, initializer)


def read_headers(root: Path, paths: Sequence[str]) -> Iterator[Header | UnreadableImage]:
    """Read the header of every file in the order of the paths: the header, or why there is none."""
    return _in_order(partial(read_header, root), paths)


def _in_order(
    function: Callable[[str], Result], paths: Sequence[str], initializer: Callable[[], None] | None = None
) -> Iterator[Result | UnreadableImage]:
    def attempt(path: str) -> Result | UnreadableImage:
        try:
            return function(path)
        except UnreadableImage as reason:
            return reason

    num_threads = _num_threads()
    remaining = iter(paths)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="decode", initializer=initializer) as pool:
        # pool.map would run ahead of a slow consumer, with all images in memory.
        ahead: deque[Future[Result | UnreadableImage]] = deque()
        try:
            ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 4 * num_threads))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(pool.submit(attempt, path) for path in islice(remaining, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
