"""Text from outside, made safe to show: nothing from a file reaches a terminal unescaped."""

from deltaw.errors import printable

__all__ = ["printable"]
