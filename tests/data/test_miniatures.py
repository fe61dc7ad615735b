"""Miniatures open with the readers of their data sets. Those of the benchmarks are in the readers' own tests, too."""

import numpy as np
import pytest

from raydml.data.datasets import open_catalog
from raydml.data.miniatures import build


@pytest.mark.parametrize(("name", "list_file"), [("image_folder", None), ("image_list", "mine/list.csv")])
def test_own_images_have_twice_the_classes_of_a_part(tmp_path, name, list_file):
    root = build(name, tmp_path / "images", classes_per_part=3, images_per_class=4, layout=list_file)
    catalog = open_catalog(name, root, list_file)
    assert np.bincount(catalog.labels).tolist() == [4] * 6
    assert catalog.given_split is None


def test_the_same_miniature_has_the_same_content(tmp_path):
    contents = {
        open_catalog("cub200", build("cub200", tmp_path / folder, images_per_class=2)).content for folder in "ab"
    }
    assert len(contents) == 1
