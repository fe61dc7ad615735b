"""What a reader of container files yields: an image as bytes, its label and its group."""

from typing import NamedTuple


class Columns(NamedTuple):
    """What is read from a container: names of columns, of keys, or of the ends of file names."""

    image: str = "image"
    label: str = "label"
    group: str | None = None


class Sample(NamedTuple):
    """One image of a container.

    number: of its row or sample, from 0. image: the bytes of an image file. label, group: a text or a whole number;
    group is "" where none is read. name: of its file before it was put into the container, or "".
    """

    number: int
    image: bytes
    label: str | int
    group: str | int
    name: str
