"""Figures that are kept instead of becoming files."""

import pytest

from raydml.report import class_failures, embedding_map, image_rows


@pytest.fixture
def figures(monkeypatch):
    """The figures drawn, in order."""
    kept = []
    for module in (class_failures, embedding_map, image_rows):
        monkeypatch.setattr(module, "save_picture", lambda figure, path: kept.append(figure) or path)
    return kept
