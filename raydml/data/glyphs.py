"""Letters in typefaces: a data set drawn from the TrueType fonts that matplotlib ships; no file, no download.

A class is a letter or digit that a person can tell from all the others, in any of the typefaces; an image is that
letter in one typeface. Unicode has many more letters, but 129 of 566 that these fonts share have a twin of the same
shape (Latin A, Greek Alpha, Cyrillic A), and others differ in size alone (o and O): such labels cannot be learnt.

Half of the letters are the test classes. The other half comes in the 12 faces of DejaVu only; the test classes come in
these and in STIX and Computer Modern. So the test has two protocols: letters never seen in training (each image
searches all others), and these in typefaces never seen (images in STIX and Computer Modern search those in DejaVu).
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from raydml.data.catalog import Catalog, DataError, listed

LETTERS = (
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    "abdefghijmnqrty"  # without c k l o p s u v w x z: like their capitals but for the size, or like I
    "23456789"  # without 0 and 1: like O and I
    "ΓΔΘΛΞΠΣΦΨΩβγδεζλμξπσω"
    "БДЖИЛЦЧШЩЪЫЭЮЯЄЂЊ"
    "ÆæØŁÞŊŒəɔʔɐʎʞʃŢ"
    "ÄÅÇČÉĘĞĤĶÑÖŠÜŮŴÝŽĴ"
)

# File -> SHA-256. Equal in matplotlib 3.9.0, 3.10.9 and 3.11.2.
TRAINING_FACES = {
    "DejaVuSans": "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
    "DejaVuSans-Bold": "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
    "DejaVuSans-Oblique": "ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213",
    "DejaVuSans-BoldOblique": "6edf0283160186af451cbee71e7b845f2e4cabf264bb992ce668c83c25465e6f",
    "DejaVuSansMono": "602ec86b8948cfcd956482fe64f94c36c867770149ef2f791d4613f443bcecb3",
    "DejaVuSansMono-Bold": "baada9a5172fe20886251aff0433fc38461912d5daf07287e7bee56620a8da96",
    "DejaVuSansMono-Oblique": "28052813f7a709fc89f52d192dc995ef4f0fdc5c3d7b73a49d6849b1916d0cd0",
    "DejaVuSansMono-BoldOblique": "a69081c15c76c827e0a27a5a7f5c74b6135c843499955495ffa8c20d3a98288b",
    "DejaVuSerif": "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
    "DejaVuSerif-Bold": "c3753f2ed6bc673f15846dc45addbeb3b9c872f32fb18fd53a21f1bef1ed7676",
    "DejaVuSerif-Italic": "3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04",
    "DejaVuSerif-BoldItalic": "d93efec7a9d2e826768d1a2ee95b95870e15e29599a84f3484af1de1cec2e181",
}
TEST_FACES = {
    "STIXGeneral": "167378031e2dddc6216d67819c9260e9a06ffc4c478e4e23cb98a6fd44b183c2",
    "STIXGeneralBol": "e8533dc7083fa346bda1933d60ea4a83b67d0945bceaf1b3541f82b4a0e2c6a0",
    "STIXGeneralItalic": "6cfcb333d22b7c3c623bdfd40174f14c85c3d6731ca6166c1edc80140eae8527",
    "STIXGeneralBolIta": "98788fd4ba48dfbb2bd026c0e20a247a8b06c7372879628b7a6bb0d5bb09736c",
}
# Computer Modern has the letters and digits of ASCII only.
ASCII_TEST_FACES = {
    "cmr10": "4dd9761b058c009db9b2145f55ee6617d093c273dd3d6c5b3e43ff6110fa9bf6",
    "cmb10": "074497b50c43ea57597181591f9893d38fc12a87e95104f5657fc2481f61a23a",
    "cmss10": "7df91a83d05b2e471ec638cb0b435a360a3c792b09fc42a7da67e91f2e79115a",
    "cmtt10": "6211f09ae93599991afda970c24669dad1a77e253d915624fbf212f702f071d7",
}
FACES = {**TRAINING_FACES, **TEST_FACES, **ASCII_TEST_FACES}

IMAGE_PX = 64
_INNER_PX = 60  # a margin of 2 px all around
_SMALLEST_PX = 48  # the longer side of a letter is 48 to 60 px
_DRAWN_PX = 128  # drawn larger and reduced, so that hinting and the version of FreeType hardly matter
_NO_LETTER = "\uffff"  # no font has it, and draws its sign for missing letters
_FORMAT = 1  # raise it when a letter is drawn in another way


def class_name(letter: str) -> str:
    """Return a short Unicode name, in ASCII: "W with circumflex", "greek delta", "greek Delta", "digit 4"."""
    if letter.isdecimal():
        return f"digit {letter}"
    words = unicodedata.name(letter).split()
    begin = next(place for place, word in enumerate(words) if word in ("LETTER", "LIGATURE"))
    kind, name = words[:begin], words[begin + 1 :]
    base, marks = (name[: name.index("WITH")], name[name.index("WITH") :]) if "WITH" in name else (name, [])
    base = [word.capitalize() if "CAPITAL" in kind else word.lower() for word in base]
    script = [] if kind[0] == "LATIN" else [kind[0].lower()]
    return " ".join([*script, *base, *(mark.lower() for mark in marks)])


@cache
def sealed_letters() -> frozenset[str]:
    """Return the letters of the test classes: the half whose hashes are smallest."""
    ordered = sorted(LETTERS, key=lambda letter: hashlib.sha256(letter.encode()).digest())
    return frozenset(ordered[: len(ordered) // 2])


def faces_of(letter: str) -> tuple[str, ...]:
    """Return the typefaces in which the data set has a letter."""
    if letter not in sealed_letters():
        return tuple(TRAINING_FACES)
    return (*TRAINING_FACES, *TEST_FACES, *(ASCII_TEST_FACES if letter.isascii() else ()))


def open_glyphs(fonts: Path | None = None) -> Catalog:
    """List the images; the paths are CLASS/FACE, and no letter is drawn.

    Fonts with other contents than those listed here are accepted, and the catalog's notes name them: its content hash
    then differs, and with it the fingerprint of every trial. A refusal would leave a new user without a first study.
    fonts: the folder of the fonts, by default matplotlib's. Raises DataError where a font is missing.
    """
    fonts = fonts or fonts_folder()
    digests = {face: _digest_of(fonts / f"{face}.ttf") for face in FACES}
    content = hashlib.sha256(repr((_FORMAT, LETTERS, sorted(digests.items()))).encode())
    held_out, parts = sealed_letters(), []
    for letter in sorted(LETTERS, key=class_name):
        parts += [(letter, face, "test" if letter in held_out else "train") for face in sorted(faces_of(letter))]
    class_names = tuple(sorted(class_name(letter) for letter in LETTERS))
    ids = {name: number for number, name in enumerate(class_names)}
    labels = np.array([ids[class_name(letter)] for letter, _, _ in parts], dtype=np.int64)
    labels.setflags(write=False)
    return Catalog(
        name="glyphs",
        root=None,
        paths=tuple(f"{class_name(letter)}/{face}" for letter, face, _ in parts),
        labels=labels,
        class_names=class_names,
        given_split=tuple(part for _, _, part in parts),
        content=content.hexdigest(),
        roles=tuple(_role(face, part) for _, face, part in parts),
        protocols=("leave_one_out", "query_gallery"),
        notes=_notes(digests),
        description=f"{len(LETTERS)} letters and digits in typefaces, {len(labels):,} images",
    )


def _role(face: str, part: str) -> str:
    if part == "train":
        return ""
    return "gallery" if face in TRAINING_FACES else "query"


def _notes(digests: dict[str, str]) -> tuple[str, ...]:
    other = [face for face, digest in digests.items() if digest != FACES[face]]
    if not other:
        return ()
    import matplotlib

    return (
        f"glyphs: matplotlib {matplotlib.__version__} ships other fonts than versions 3.9 to 3.11: {listed(other)}; "
        "results cannot be compared with those of other versions",
    )


def fonts_folder() -> Path:
    """Return the folder of matplotlib's fonts."""
    import matplotlib  # 0.2 s

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def _digest_of(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"data.name = 'glyphs' draws its images from the fonts of matplotlib, and {file} cannot be read "
            f"({error.strerror}). Cure: install matplotlib from PyPI again, or take another data.name"
        ) from error


def draw_glyphs(paths: Iterable[str], fonts: Path | None = None) -> np.ndarray:
    """Draw images of the catalog: paths CLASS/FACE -> uint8 (N, 64, 64), black letters on white.

    Size and place of the letter in the square follow from the hash of letter and face. (With all letters of one size in
    the middle, even an untrained network finds the letter in other faces of a family: Recall@1 0.73, not 0.39.)
    Raises DataError where a face lacks a letter.
    """
    folder = fonts or fonts_folder()
    letter_of = {class_name(letter): letter for letter in LETTERS}
    named = [path.rsplit("/", 1) for path in paths]
    images = [_drawn(str(folder / f"{face}.ttf"), letter_of[name], face) for name, face in named]
    return np.stack(images) if images else np.zeros((0, IMAGE_PX, IMAGE_PX), dtype=np.uint8)


def _drawn(file: str, letter: str, face: str) -> np.ndarray:
    ink = _ink(file, letter)
    missing = _missing_sign(file)
    if ink is None or (missing is not None and ink.size == missing.size and ink.tobytes() == missing.tobytes()):
        raise DataError(
            f"data.name = 'glyphs': the font {file} has no {class_name(letter)}. Cure: install matplotlib 3.9 to 3.11"
        )
    size, across, down = hashlib.sha256(f"{letter}/{face}".encode()).digest()[:3]
    side = _between(_SMALLEST_PX, _INNER_PX, size)
    width, height = (max(1, round(length * side / max(ink.size))) for length in ink.size)
    margin = (IMAGE_PX - _INNER_PX) // 2
    left, top = (
        _between(margin, margin + _INNER_PX - length, byte) for length, byte in ((width, across), (height, down))
    )
    image = Image.new("L", (IMAGE_PX, IMAGE_PX))
    image.paste(ink.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    return 255 - np.asarray(image)


def _between(low: int, high: int, byte: int) -> int:
    """Map 0..255 to a whole number from low to high, all about equally often."""
    return low + byte * (high - low + 1) // 256


def _ink(file: str, letter: str) -> Image.Image | None:
    """Return a letter in white on black, cut to its ink; None where there is no ink."""
    font = _font(file)
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), letter, font=font, fill=255)
    box = image.getbbox()
    return None if box is None else image.crop(box)


@cache
def _missing_sign(file: str) -> Image.Image | None:
    return _ink(file, _NO_LETTER)


@cache
def _font(file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, _DRAWN_PX, layout_engine=ImageFont.Layout.BASIC)
