"""The layouts in which each benchmark is found, and a change of one of its list files."""

from raydml.data.benchmarks import BENCHMARKS
from raydml.data.miniatures import LAYOUTS

EVERY_LAYOUT = [(name, layout) for name in BENCHMARKS for layout in LAYOUTS[name]]


def edit(file, old, new):
    """Replace the first place of a text in a list file."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
