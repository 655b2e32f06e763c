"""The form in which names are compared and shown: composed Unicode on one line."""

import os
import unicodedata


def canonical_name(name: str) -> str:
    """The composed form (NFC) of a name.

    An accent may be a character of its own or part of its letter. The two forms look the same,
    and file systems and keyboards differ in which one they write.
    """
    return unicodedata.normalize("NFC", name)


def shown_name(name: str) -> str:
    """`canonical_name` with escapes for line breaks, control characters and bytes not in UTF-8."""
    if name.isascii() and name.isprintable():
        return name
    text = canonical_name(os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in ("Cc", "Zl", "Zp")
        else char
        for char in text
    )
