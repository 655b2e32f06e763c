"""Names as they are compared and shown: composed Unicode on one line."""

import os
import unicodedata


def canonical_name(name: str) -> str:
    """The composed form (NFC) of a name.

    An accent may be a character of its own or part of its letter. They look the same, and file
    systems and keyboards differ in which they write.
    """
    return unicodedata.normalize("NFC", name)


def shown_name(name: str) -> str:
    """`canonical_name` with escapes for bytes that are no UTF-8 and for what would end a line."""
    if name.isascii() and name.isprintable():
        return name
    text = canonical_name(os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Zl", "Zp")
        else char
        for char in text
    )
