"""Pieces of HTML: whatever comes from outside is escaped here, so that a class name cannot end a tag."""

from __future__ import annotations

import html
from collections.abc import Sequence

_VOID = ("img", "meta")  # elements without content and without an end
_LONG = 18  # letters from which on a cell of text keeps a width that leaves its words whole


class Markup(str):
    """Text that is HTML already; any other string is escaped where it enters a page."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A value as HTML text, fit for attributes too; None is a dash."""
    if isinstance(value, Markup):
        return value
    return Markup("–" if value is None else html.escape(str(value), quote=True))


def element(name: str, *content: object, **attributes: object) -> Markup:
    """``element("td", 3, class_="number")``: content and attribute values are escaped, None attributes left out.

    A trailing underscore of an attribute's name is dropped, other underscores become hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    closing = "" if name in _VOID else f"{joined(*content)}</{name}>"
    return Markup(f"<{name}{written}>{closing}")


def joined(*pieces: object) -> Markup:
    return Markup("".join(escaped(piece) for piece in pieces))


def paragraph(*content: object, class_: str | None = None) -> Markup:
    return element("p", *content, class_=class_)


def table(
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    words: Sequence[int] = (0,),
    caption: str | None = None,
    emphasised: Sequence[int] = (),
) -> Markup:
    """A table that scrolls by itself when it is wider than the page.

    words: numbers of the columns that hold text; all others are figures and stand to the right.
    emphasised: numbers of the rows to set apart.
    """

    def cell(name: str, column: int, value: object) -> Markup:
        if column not in words:
            return element(name, value, class_="number")
        return element(name, value, class_="long" if isinstance(value, str) and len(value) > _LONG else None)

    head = element("tr", *(cell("th", column, value) for column, value in enumerate(header)))
    body = [
        element(
            "tr",
            *(cell("td", column, value) for column, value in enumerate(row)),
            class_="emphasised" if number in emphasised else None,
        )
        for number, row in enumerate(rows)
    ]
    titled = element("caption", caption) if caption else Markup()
    return element(
        "div",
        element("table", titled, element("thead", head), element("tbody", *body)),
        class_="scrolls",
        tabindex=0,
        role="region",
        aria_label=caption or "table",
    )


def folded(summary: object, *content: object) -> Markup:
    """Details that open on a click, with or without scripts."""
    return element("details", element("summary", summary), *content)


def bullets(items: Sequence[object], *, class_: str | None = None) -> Markup:
    return element("ul", *(element("li", item) for item in items), class_=class_)
