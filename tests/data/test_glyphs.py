"""Letters in typefaces: which letters and faces there are, and that every class can be told from every other."""

import hashlib
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.ft2font import FT2Font
from PIL import Image

from raydml.data import datasets
from raydml.data.datasets import open_catalog
from raydml.data.glyphs import ASCII_TEST_FACES, FACES, LETTERS, TEST_FACES, TRAINING_FACES, class_name, draw_glyphs
from raydml.data.splits import make_split
from raydml.evaluation.protocols import describe_protocol, protocols_of
from raydml.images.cache import Storage, load_development
from tests.data.refusals import SPLIT, assert_contains, refusal

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Groups of the same shape: prototypes of Unicode's confusables.txt, and letters that differ from another in size alone.
SAME_SHAPE = (
    *(
        "A\u0391\u0410",
        "a\u0251\u03b1\u0430",
        "B\u0392\u0412",
        "Cc\u0421\u0441",
        "E\u0395\u0415",
        "e\u0435",
        "H\u0397\u041d",
    ),
    *(
        "Il1\u0399\u0406",
        "i\u0456\u0131\u03b9",
        "J\u0408",
        "j\u0458",
        "Kk\u039a\u041a\u03ba\u043a",
        "M\u039c\u041c",
        "N\u039d",
    ),
    *(
        "Oo0\u039f\u041e\u03bf\u043e",
        "Pp\u03a1\u0420\u0440\u03c1",
        "Ss\u0405\u0455",
        "T\u03a4\u0422",
        "Uu",
        "Vv\u03bd\u0474",
    ),
    *(
        "Ww",
        "Xx\u03a7\u0425\u0445\u03c7",
        "Y\u03a5\u04ae",
        "y\u0443",
        "Zz\u0396",
        "\u0393\u0413",
        "\u0398\u03b8\u0472",
        "\u03a0\u041f",
    ),
    *(
        "\u03a3\u01a9",
        "\u03a6\u0424\u03c6",
        "\u03a8\u03c8",
        "\u03b2\u00df",
        "\u03b5\u025b",
        "\u03bc\u00b5",
        "3\u0417\u01b7",
        "6\u0431",
    ),
    *("\u00d0\u0110\u0189", "\u0259\u01dd", "\u0254\u0186", "\u039b\u028c"),
)


@pytest.fixture(scope="module")
def catalog():
    return open_catalog("glyphs", None)


@pytest.fixture(scope="module")
def images(catalog):
    """Face -> class -> uint8 (64, 64)."""
    drawn = draw_glyphs(catalog.paths)
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, image in zip(catalog.paths, drawn, strict=True):
        name, face = path.rsplit("/", 1)
        found.setdefault(face, {})[name] = image
    return found


def test_half_of_120_letters_are_sealed_and_come_in_faces_that_training_never_shows(catalog):
    assert len(set(LETTERS)) == len(LETTERS) == len(catalog.class_names) == 120
    split = make_split(catalog, **{**SPLIT, "val_fraction": 0.25, "order": "shuffled"})
    assert (len(split.train), len(split.val), len(split.test)) == (45, 15, 60)
    test_names = {catalog.class_names[label] for label in split.test}
    num_images = Counter(path.rsplit("/", 1)[0] for path in catalog.paths)
    for letter in LETTERS:
        extra = (8 if letter.isascii() else 4) if class_name(letter) in test_names else 0
        assert num_images[class_name(letter)] == 12 + extra, letter
    development = np.isin(catalog.labels, [*split.train, *split.val])
    faces = np.array([path.rsplit("/", 1)[1] for path in catalog.paths])
    assert set(faces[development]) == set(TRAINING_FACES)
    roles = np.array(catalog.roles)
    assert set(faces[roles == "query"]) == {*TEST_FACES, *ASCII_TEST_FACES}
    assert set(roles[development]) == {""}


def test_the_test_classes_have_two_protocols(catalog):
    test = [row for row, part in enumerate(catalog.given_split) if part == "test"]
    roles = [catalog.roles[row] for row in test]
    assert protocols_of(roles, catalog.protocols) == ("leave_one_out", "query_gallery")
    assert "queries search 720 gallery images; 60 classes" in describe_protocol(
        "query_gallery", catalog.labels[test], roles
    )


def test_names_are_short_and_ascii(catalog):
    names = [class_name(letter) for letter in "WŴδΔ4əÆʔ"]
    assert names == ["W", "W with circumflex", "greek delta", "greek Delta", "digit 4", "schwa", "Ae", "glottal stop"]
    assert "".join(catalog.class_names).isascii()


def test_no_two_letters_are_known_to_have_one_shape():
    for group in SAME_SHAPE:
        assert len(set(group) & set(LETTERS)) <= 1, group


def test_every_face_has_its_letters_and_no_box_for_a_missing_one(images):
    letter_of = {class_name(letter): letter for letter in LETTERS}
    assert set(images) == set(FACES)
    for face, of_face in images.items():
        known = set(FT2Font(FONTS / f"{face}.ttf").get_charmap())
        assert [name for name in of_face if ord(letter_of[name]) not in known] == [], face
        for name, image in of_face.items():
            ink = np.argwhere(image < 255)
            assert 47 <= max(np.ptp(ink, axis=0) + 1) <= 60, (face, name)
            assert ink.min() >= 2, (face, name)
            assert ink.max() < 62, (face, name)


def in_the_middle(image):
    """The letter in the middle of the square, with its longer side as long as the square."""
    down, across = (np.flatnonzero((image < 255).any(axis=axis)) for axis in (1, 0))
    ink = Image.fromarray(255 - image[down[0] : down[-1] + 1, across[0] : across[-1] + 1])
    square = Image.new("L", (max(ink.size),) * 2)
    square.paste(ink, ((square.width - ink.width) // 2, (square.height - ink.height) // 2))
    return np.asarray(square.resize((64, 64), Image.Resampling.BILINEAR)).astype(float)


def test_no_two_classes_look_alike_in_a_face(images):
    """Somewhere, a block of 4 by 4 pixels differs by 45 % of the contrast (A and Lambda in a thin face: 49 %)."""
    for face, of_face in images.items():
        names = sorted(of_face)
        centred = [in_the_middle(of_face[name]) for name in names]
        blocks = np.stack([image.reshape(16, 4, 16, 4).mean(axis=(1, 3)).reshape(-1) for image in centred])
        largest = np.stack([np.abs(blocks - block).max(axis=1) for block in blocks]) + 999 * np.eye(len(names))
        first, second = np.unravel_index(largest.argmin(), largest.shape)
        assert largest.min() > 0.45 * 255, (face, names[first], names[second], largest.min() / 255)


def test_the_fonts_are_those_that_the_numbers_were_measured_with(catalog):
    assert catalog.notes == ()
    for face, digest in FACES.items():
        assert hashlib.sha256((FONTS / f"{face}.ttf").read_bytes()).hexdigest() == digest


@pytest.fixture
def other_fonts(tmp_path, monkeypatch):
    for face in FACES:
        (tmp_path / f"{face}.ttf").symlink_to(FONTS / f"{face}.ttf")
    monkeypatch.setattr("raydml.data.glyphs.fonts_folder", lambda: tmp_path)
    return tmp_path


def test_another_font_changes_the_content_and_is_named(catalog, other_fonts):
    assert open_catalog("glyphs", None).content == catalog.content
    (other_fonts / "DejaVuSerif.ttf").unlink()
    (other_fonts / "DejaVuSerif.ttf").symlink_to(FONTS / "cmr10.ttf")
    changed = open_catalog("glyphs", None)
    assert changed.content != catalog.content
    (note,) = changed.notes
    assert_contains(note, "DejaVuSerif", matplotlib.__version__, "cannot be compared")
    message = refusal(draw_glyphs, ["greek Delta/DejaVuSerif"])
    assert_contains(message, "DejaVuSerif.ttf", "has no greek Delta", "Cure")


def test_a_missing_font_is_refused(other_fonts):
    (other_fonts / "cmr10.ttf").unlink()
    assert_contains(refusal(open_catalog, "glyphs", None), "cmr10.ttf", "Cure: install matplotlib")


def test_development_draws_no_letter_of_the_test_classes(catalog, monkeypatch):
    drawn: list[str] = []

    def draw(paths):
        drawn.extend(paths)
        return draw_glyphs(drawn[-720:])

    monkeypatch.setattr(datasets, "draw_glyphs", draw)
    split = make_split(catalog, **{**SPLIT, "val_fraction": 0.25})
    train, val = load_development(catalog, split, Storage(24))
    assert (len(train.labels), len(val.labels), len(drawn)) == (45 * 12, 15 * 12, 720)
    held_out = {catalog.class_names[label] for label in split.test}
    assert not held_out & {path.rsplit("/", 1)[0] for path in drawn}
    assert train.pixels.read(np.array([0]))[0].shape == (24, 24, 3)
