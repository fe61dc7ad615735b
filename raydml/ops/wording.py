"""Numbers in sentences."""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 image``, ``2,000 images`` or, with a plural, ``3 classes``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
