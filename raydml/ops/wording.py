"""Numbers in sentences, and texts that a terminal may print."""

import re

_CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the tab and the line feed


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 image``, ``2,000 images`` or, with a plural, ``3 classes``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def hours_text(hours: float) -> str:
    """Return ``12.3 h``, ``4.5 min`` or ``12 s``."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def printable(text: str) -> str:
    """Return a text with its control characters in letters: a file name may hold what changes a terminal."""
    return _CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
