"""Maps of embeddings whose right answer is known: clouds that stay apart, colours that name the right class."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.image import imread

from raydml.images.pixels import packed
from raydml.report.embedding_map import (
    EmbeddingMap,
    draw_embedding_map,
    draw_image_map,
    embedding_map,
    grid_of,
    largest_classes,
    stratified_sample,
)
from raydml.report.image_rows import DPI, WIDTH_IN
from tests.report.drawn_squares import squares


def clouds(num_classes=4, num_each=15, dim=70, noise=0.3):
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), num_each)
    centres = 3 * generator.standard_normal((num_classes, dim))
    return (centres[labels] + noise * generator.standard_normal((len(labels), dim))).astype(np.float32), labels


def nearest(points):
    distances = ((points[:, None] - points[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def test_what_is_near_in_the_embedding_is_near_on_the_map():
    embeddings, labels = clouds()
    found = embedding_map(embeddings, labels)
    assert found.points.shape == (60, 2)
    assert found.rows.tolist() == list(range(60))
    assert found.method == "PCA to 50 dimensions, then t-SNE"
    assert (labels[nearest(found.points)] == labels).all()
    again = embedding_map(embeddings, labels)
    assert np.array_equal(found.points, again.points)


def test_a_large_set_is_thinned_out_class_by_class():
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 3], [900, 90, 9, 1]))
    rows = stratified_sample(labels, 100, seed=0)
    assert rows.tolist() == sorted(set(rows.tolist()))
    counts = np.bincount(labels[rows], minlength=4)
    assert counts.sum() == 100
    assert np.abs(counts - [90, 9, 0.9, 0.1]).max() < 1
    assert stratified_sample(labels, 1000, seed=0).tolist() == list(range(1000))
    assert rows.tolist() == stratified_sample(labels, 100, seed=0).tolist()
    assert rows.tolist() != stratified_sample(labels, 100, seed=1).tolist()


def test_a_sample_is_what_is_placed():
    embeddings, labels = clouds()
    found = embedding_map(embeddings, labels, max_points=20)
    assert np.bincount(labels[found.rows]).tolist() == [5, 5, 5, 5]
    assert found.points.shape == (20, 2)
    assert (labels[found.rows][nearest(found.points)] == labels[found.rows]).all()


@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_a_handful_of_images_is_placed_by_its_principal_components(num_rows):
    generator = np.random.default_rng(0)
    # All on one line through a space of three dimensions: the map keeps their distances, give or take a mirror.
    along = generator.standard_normal(num_rows)
    found = embedding_map((along[:, None] * [2.0, 2.0, 1.0]).astype(np.float32), np.zeros(num_rows, dtype=np.int64))
    assert found.method == "the first two principal components"
    assert found.points.shape == (num_rows, 2)
    np.testing.assert_allclose(np.abs(found.points[:, 0]), 3 * np.abs(along - along.mean()), atol=1e-5)
    np.testing.assert_allclose(found.points[:, 1], 0, atol=1e-5)


def test_embeddings_that_are_all_the_same_still_have_a_map():
    found = embedding_map(np.ones((12, 4), dtype=np.float32), np.zeros(12, dtype=np.int64))
    assert np.isfinite(found.points).all()


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 embeddings, 2 labels"):
        embedding_map(np.ones((3, 2), dtype=np.float32), np.zeros(2, dtype=np.int64))


def test_the_largest_classes_come_first_and_of_equals_the_lower_label():
    assert largest_classes(np.array([5, 5, 1, 1, 7, 7, 7, 0]), 3) == [7, 1, 5]


def colours_of(axes):
    """Colour of the points drawn at each place; the empty collections are those of the legend."""
    drawn = {}
    for points in axes.collections:
        for x, _ in points.get_offsets().tolist():
            drawn[x] = (to_hex(points.get_edgecolors()[0]), len(points.get_facecolors()) > 0)
    return drawn


def test_the_largest_classes_have_colours_and_the_others_are_grey(tmp_path, figures):
    labels = np.concatenate([np.repeat(np.arange(1, 13), 3), [0, 13, 14]])
    places = np.column_stack([np.arange(len(labels)), np.zeros(len(labels))]).astype(float)
    names = [f"class {label} $" for label in range(15)]
    found = EmbeddingMap(np.arange(len(labels)), places, "hand")
    draw_embedding_map(found, labels, names, tmp_path / "m.png", title="Map")
    (axes,), (legend,) = figures[0].axes, figures[0].legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["other classes", *(f"class {label} $" for label in range(1, 13))]
    colours = {x: colour for x, (colour, _) in colours_of(axes).items()}
    assert len(colours) == len(labels)
    grey = {colours[x] for x in (36.0, 37.0, 38.0)}
    assert len(grey) == 1
    marks = {
        points.get_label(): to_hex(points.get_edgecolors()[0])
        for points in axes.collections
        if points.get_label() in shown
    }
    for x, label in enumerate(labels[:36]):
        assert colours[float(x)] == marks[f"class {label} $"] not in grey


def test_the_gallery_is_hollow(tmp_path, figures):
    found = EmbeddingMap(np.array([0, 2]), np.array([[0.0, 0.0], [2.0, 0.0]]), "hand")
    roles = ["query", "query", "gallery"]
    draw_embedding_map(found, np.array([0, 0, 0]), ["a"], tmp_path / "m.png", title="Map", roles=roles)
    assert {x: filled for x, (_, filled) in colours_of(figures[0].axes[0]).items()} == {0.0: True, 2.0: False}


def test_the_legend_overlaps_neither_the_points_nor_the_edge(tmp_path, figures):
    labels = np.arange(40)
    names = [f"Mediterranean_{label}/a-very-long-class-name-indeed" for label in labels]
    places = np.random.default_rng(0).standard_normal((40, 2))
    draw_embedding_map(EmbeddingMap(labels, places, "hand"), labels, names, tmp_path / "m.png", title="Map")
    figure = figures[0]
    FigureCanvasAgg(figure).draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y1 <= axes.y0 + 1
    assert legend.x0 >= 0 and legend.x1 <= WIDTH_IN * DPI  # noqa: PT018
    assert axes.width > 0.8 * WIDTH_IN * DPI


def test_a_grid_keeps_the_point_nearest_to_the_middle_of_each_square():
    # The points span 0..4 both ways: squares of side 2 with middles 1 and 3.
    points = np.array([[0.0, 0.0], [1.2, 1.0], [4.0, 4.0], [3.0, 0.5], [0.9, 1.5]])
    assert grid_of(points, 2) == {(0, 0): 1, (1, 1): 2, (1, 0): 3}
    assert grid_of(np.zeros((3, 2)), 4) == {(2, 2): 0}


def test_a_map_of_images_shows_each_in_its_square(tmp_path, figures):
    points = np.array([[0.0, 0.0], [1.2, 1.0], [4.0, 4.0], [3.0, 0.5]])
    rows = np.array([3, 5, 7, 9])
    draw_image_map(EmbeddingMap(rows, points, "hand"), packed(squares(10)), tmp_path / "m.png", title="", num_columns=2)
    shown = {}
    for image in figures[0].axes[0].images:
        left, _, bottom, _ = image.get_extent()
        shown[int(left), int(bottom)] = int(image.get_array()[0, 0, 2])
    assert shown == {(0, 0): 5, (1, 1): 7, (1, 0): 9}


def test_the_picture_is_written(tmp_path):
    found = EmbeddingMap(np.arange(3), np.eye(3)[:, :2], "hand")
    path = draw_embedding_map(found, np.array([0, 1, 1]), ["a", "b"], tmp_path / "new" / "m.png", title="Map")
    picture = (imread(path)[..., :3] * 255).round().astype(int)
    assert picture.shape[1] == WIDTH_IN * DPI
    # Blue is of the larger class, whose name is the first.
    blue = [int("0072b2"[place : place + 2], 16) for place in (0, 2, 4)]
    assert (np.abs(picture - blue).max(axis=2) <= 40).sum() > 20
