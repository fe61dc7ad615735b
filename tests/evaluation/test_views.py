"""Test-time augmentation: which pixels the network sees, and what becomes of its embeddings."""

import numpy as np
import pytest
import torch

from raydml.evaluation.embed import embed
from raydml.evaluation.views import with_views
from raydml.images.pixels import packed
from raydml.images.preprocessing import Preprocessing, PreprocessingError

PREPROCESSING = Preprocessing(resize_px=6, crop_px=3, mean=(0.0,) * 3, std=(1.0,) * 3, value_range=255.0)


def images():
    return np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3)).astype(np.uint8)


class Flat(torch.nn.Module):
    """The embedding is the pixels times a weight for each place, so that every place matters."""

    def forward(self, batch):
        return batch.flatten(1) * torch.arange(1, batch[0].numel() + 1)


class Unit(Flat):
    def forward(self, batch):
        return torch.nn.functional.normalize(super().forward(batch), dim=1)


def found(network, name, preprocessing=PREPROCESSING):
    def embed_pixels(pixels):
        return embed(network, pixels, preprocessing, device="cpu", batch_size=2)

    return with_views(embed_pixels(packed(images())), packed(images()), preprocessing, name, embed_pixels)


def by_hand(network, crops):
    """The mean of the embeddings of crops, each (5, 3, 3, 3)."""
    batches = [torch.from_numpy(np.ascontiguousarray(crop)).permute(0, 3, 1, 2).float() for crop in crops]
    return np.mean([network(batch).numpy().astype(float) for batch in batches], axis=0)


def test_the_mirror_image_of_the_centre_crop():
    pixels = images()
    centre = pixels[:, 2:5, 3:6]  # round(1.5) = 2
    np.testing.assert_allclose(found(Flat(), "flip"), by_hand(Flat(), [centre, centre[:, :, ::-1]]), rtol=1e-6)


def test_the_centre_and_the_four_corners():
    pixels = images()
    crops = [pixels[:, 2:5, 3:6], pixels[:, :3, :3], pixels[:, :3, 6:], pixels[:, 3:, :3], pixels[:, 3:, 6:]]
    np.testing.assert_allclose(found(Flat(), "five_crop"), by_hand(Flat(), crops), rtol=1e-6)
    mean = by_hand(Unit(), crops)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(found(Unit(), "five_crop"), mean, rtol=1e-5)


def test_crops_that_are_all_the_same_are_refused():
    whole = Preprocessing(resize_px=3, crop_px=3, mean=(0.0,) * 3, std=(1.0,) * 3, resize="squash")
    with pytest.raises(PreprocessingError, match=r"five crops are the same. Cure: --tta flip"):
        with_views(np.ones((5, 3), np.float32), packed(images()), whole, "five_crop", lambda pixels: pixels)
