"""Names of classes as a figure can show them: they come from folders, so they hold anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text


def readable(names: Sequence[str], length: int = 24) -> list[str]:
    """Names that matplotlib's font can draw, cut to `length` characters.

    A name of which the font lacks half or more becomes `class 12`, its place in the list.
    """
    return [drawable(name, length) or f"class {index}" for index, name in enumerate(names)]


def drawable(name: str, length: int) -> str:
    """What the font has of a name, cut to `length` characters; nothing if that is half or less."""
    name = " ".join(name.split())
    kept = "".join(letter for letter in name if ord(letter) in _letters())
    if 2 * len(kept) <= len(name):
        return ""
    return kept if len(kept) <= length else kept[: length - 1] + "…"


def literally(texts: Iterable[Text]) -> None:
    """A dollar in a name is a dollar, and no formula."""
    for text in texts:
        text.set_parse_math(False)


@lru_cache
def _letters() -> frozenset[int]:
    return frozenset(code for code in get_font(findfont("DejaVu Sans")).get_charmap() if code >= 32)
