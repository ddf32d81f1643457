"""Text from outside, made safe to show: nothing from a file reaches a terminal unescaped."""


def printable(text: str, limit: int = 80) -> str:
    """Return `text` on one line of at most `limit` characters, with everything invisible spelt out.

    Control characters (ANSI escapes among them), line breaks, bidirectional controls, zero-width
    characters, unassigned code points and half surrogates become `\\n`, `\\x1b`, `\\u202e`, ...;
    ordinary letters of every script stay as they are.
    """
    shown = "".join(c if c.isprintable() else _spelt(c) for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
