import numpy as np
import pytest

from raydml.images.pixels import PackedPixels, centres, packed


def ragged() -> tuple[PackedPixels, list[np.ndarray]]:
    """Images of 2 x 3, 1 x 1 and 4 x 2 pixels, with gaps between them."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((2, 3), (1, 1), (4, 2))]
    flat = np.full(200, 99, dtype=np.uint8)
    for begin, image in zip((0, 64, 128), images, strict=True):
        flat[begin : begin + image.size] = image.ravel()
    return PackedPixels(flat, np.array([0, 64, 128]), np.array([[2, 3], [1, 1], [4, 2]], dtype=np.int32)), images


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 2], [], np.array([1]), np.array([], dtype=np.int64), (2,)])
def test_rows_are_read_in_order_and_cannot_be_written(rows):
    pixels, images = ragged()
    read = pixels.read(rows)
    assert len(pixels) == 3
    assert len(read) == len(rows)
    for image, row in zip(read, rows, strict=True):
        assert np.array_equal(image, images[row])
        assert np.shares_memory(image, pixels.flat)
        with pytest.raises(ValueError, match="read-only"):
            image[0, 0] = 0


def test_a_selection_of_a_selection():
    pixels, images = ragged()
    chosen = pixels.select([2, 0, 1]).select(np.array([2, 0]))
    assert len(chosen) == 2
    assert [image.shape for image in chosen.read([0, 1])] == [(1, 1, 3), (4, 2, 3)]
    assert np.array_equal(chosen.read([1])[0], images[2])
    assert np.shares_memory(chosen.read([0])[0], pixels.flat)
    assert len(pixels.select([])) == 0


def test_an_array_of_images_as_pixels():
    images = np.random.default_rng(1).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    for given in (images, images[::-1], images.transpose(0, 2, 1, 3)):  # also views that are not contiguous
        assert np.array_equal(np.stack(packed(given).read(range(5))), given)


def test_centres_of_images_of_any_size():
    pixels, images = ragged()
    tall_and_wide = centres(pixels, [2, 0], 2)
    assert tall_and_wide.shape == (2, 2, 2, 3)
    assert np.array_equal(tall_and_wide[0], images[2][1:3])
    assert np.array_equal(tall_and_wide[1], images[0][:, 0:2])  # half a pixel is rounded to even, as torchvision does
    tall_and_wide[:] = 0  # a copy
    assert pixels.flat.any()
    assert centres(pixels, [], 2).shape == (0, 2, 2, 3)
