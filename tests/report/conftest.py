"""Figures that are kept instead of becoming files."""

import pytest

from raydml.report import embedding_map, image_rows, retrievals


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in order."""
    kept = []
    for module in (retrievals, embedding_map, image_rows):
        monkeypatch.setattr(module, "save_picture", lambda figure, path: kept.append(figure) or path)
    return kept
