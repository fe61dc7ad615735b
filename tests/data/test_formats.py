import pytest
from PIL import Image

from raydml.data.formats import (
    DECODED_FORMATS,
    IMAGE_SUFFIXES,
    UNDECODED_SUFFIXES,
    count_suffixes,
    is_doubtful_name,
    is_image_name,
)


def test_every_suffix_that_pillow_has_heard_of_is_an_image_or_not_passed_over_in_silence():
    Image.init()
    data_or_video = {".h5", ".hdf", ".mpg", ".mpeg"}
    silent = {
        suffix for suffix in Image.EXTENSION if not is_image_name(f"x{suffix}") and not is_doubtful_name(f"x{suffix}")
    }
    assert silent == data_or_video


def test_the_tables_exclude_each_other():
    assert not IMAGE_SUFFIXES & set(UNDECODED_SUFFIXES)
    assert len(IMAGE_SUFFIXES) == sum(len(suffixes) for suffixes in DECODED_FORMATS.values())
    assert all(is_doubtful_name(f"x{suffix}") for suffix in UNDECODED_SUFFIXES)


@pytest.mark.parametrize("name", ["x.JPG", "a.b.heic", "x (1).png", "x.jfif", "😀.AVIF"])
def test_images(name):
    assert is_image_name(name)
    assert not is_doubtful_name(name)


@pytest.mark.parametrize("name", ["Thumbs.db", "notes.TXT", "x.json", "README", "labels.csv", "IMG_1.MOV"])
def test_evidently_no_images(name):
    assert not is_image_name(name)
    assert not is_doubtful_name(name)


def test_suffixes_are_counted_the_most_frequent_first():
    assert count_suffixes(["a.CR2", "b.psd", "c.cr2", "d"]) == "2 .cr2, 1 without a suffix, 1 .psd"
    assert count_suffixes([f"x.s{number:02d}" for number in range(12)]).endswith("1 .s09 and 2 other suffixes")
