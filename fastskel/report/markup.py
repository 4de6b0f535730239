"""HTML text: whatever does not say that it is markup already is escaped."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from typing import Any

__all__ = ["Markup", "element", "escape", "join", "script_json"]

# elements that have no end tag
VOID = frozenset({"br", "hr", "img", "link", "meta"})
# what HTML text cannot hold
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """Text that is HTML: `element` puts it in as it is, and escapes every other text."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Make any text, of unknown origin, text of HTML; what HTML cannot hold becomes a replacement character."""
    if isinstance(text, Markup):
        return text
    # a path may hold bytes that are no text
    encodable = text.encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape(CONTROL.sub("\ufffd", encodable), quote=True))


def join(parts: Iterable[str | None], between: str = "") -> Markup:
    """Put parts one after the other, texts escaped, None left out."""
    return Markup(escape(between).join(escape(part) for part in parts if part is not None))


def element(name: str, /, *content: str | None, **attributes: str | float | None) -> Markup:
    """Make an element.

    Args:
        name: Its tag.
        content: Texts and elements in it; None is left out.
        attributes: Their names end in _ where Python needs it, _ inside is a hyphen; None is left out.
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{join(content)}</{name}>")


def script_json(value: Any) -> Markup:
    """Write plain values as JSON that may stand in a script element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
