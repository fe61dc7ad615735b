import numpy as np
from PIL import Image

from raydml.metrics.verification import RocPoints
from raydml.report.roc import write_roc


def points(far, tar):
    return RocPoints(np.linspace(0.1, 1, len(far)), np.array(far), np.array(tar))


def line_of(file):
    """The pixels of the line's blue, as (column, row) of the picture."""
    image = np.asarray(Image.open(file).convert("RGB")).astype(int)
    rows, columns = np.nonzero(np.abs(image - [127, 166, 201]).sum(axis=2) < 30)
    return columns, rows, image.shape


def test_pairs_that_are_told_apart_have_a_line_too(tmp_path):
    """No impostor is accepted before all genuine pairs are: the line goes up at the left and along the top."""
    write_roc(tmp_path / "roc.png", points([0.0, 0.0], [0.5, 1.0]), "digits")
    columns, rows, (height, width, _) = line_of(tmp_path / "roc.png")
    assert columns.max() > 0.9 * width
    assert rows.max() - rows.min() > 0.5 * height


def test_a_title_with_a_dollar_is_text(tmp_path):
    write_roc(tmp_path / "roc.svg", points([0.1], [1.0]), "/data/a$x_{/b$")
    assert (tmp_path / "roc.svg").stat().st_size > 0
