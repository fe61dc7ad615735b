"""A section of the report, and what its figures have around them: a title above, a legend below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raydml.report.markup import Markup, element


class Section(NamedTuple):
    """key: its anchor in the page. content: HTML; an empty one is left out with its title."""

    key: str
    title: str
    content: Markup

    def markup(self) -> Markup:
        return element("section", element("h2", self.title), self.content, id=self.key)


def titled(title: str, drawing: Markup) -> Markup:
    return element("figure", element("figcaption", title, class_="above"), drawing)


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """(class of the style sheet, words) as coloured marks with what they mean."""
    items = (element("span", element("i", class_=f"swatch {style}"), text, class_="key") for style, text in entries)
    return element("div", *items, class_="legend")
