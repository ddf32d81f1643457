"""One spelling per label, the same whatever file format it came from."""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from deltaw.train.data.rows import Opaque, Value
from deltaw.train.data.wording import counted
from deltaw.train.escape import printable

INTEGRAL = re.compile(r"([+-]?)(0|[1-9][0-9]*)(?:\.0*)?")
REAL = re.compile(
    r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?inf(inity)?", re.IGNORECASE
)


def is_missing(value: Value) -> bool:
    """Is `value` null, NaN (as a number or spelt out) or blank?"""
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and math.isnan(value))


def class_name(value: str | int | float | bool) -> str:
    """Return the class a label stands for: blanks around it removed, integral numbers as `1`.

    1, 1.0, "1", "1.0" and " 1 " are the class `1`; true is `true`; "01" stays `01`; case is kept.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if match := INTEGRAL.fullmatch(text):
        sign = "-" if match[1] == "-" and match[2] != "0" else ""
        return sign + match[2]
    return text


def number(value: Value) -> float | None:
    """Return the real number (infinite ones included) a label stands for, or None."""
    if isinstance(value, str):
        text = value.strip()
        return float(text) if REAL.fullmatch(text) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # whole numbers of JSON have no bound
        return math.inf if value > 0 else -math.inf


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names sorted, by value when all are numbers."""
    unique = set(names)
    numbers = {name: number(name) for name in unique}
    if all(value is not None for value in numbers.values()):
        return tuple(sorted(unique, key=lambda name: (numbers[name], name)))
    return tuple(sorted(unique))


def spelling_warnings(spellings: Counter[tuple[str, str]]) -> list[str]:
    """Return what was unified, and what was kept apart although it looks alike.

    `spellings` counts (class name, label as `spelt` in the file).
    """
    forms: dict[str, list[str]] = defaultdict(list)
    alike: dict[str, Counter[str]] = defaultdict(Counter)
    for (name, raw), count in sorted(spellings.items(), key=lambda found: (-found[1], found[0])):
        forms[name].append(f"{counted(count, 'row')} with {raw}")
        alike[unicodedata.normalize("NFKC", name).casefold()][name] += count
    unified = [
        f"label {spelt(name)} unites " + ", ".join(raws)
        for name, raws in forms.items()
        if len(raws) > 1
    ]
    apart = [
        "labels kept apart although they differ only in case or encoding form: "
        + ", ".join(
            f"{spelt(name)} in {counted(count, 'row')}" for name, count in names.most_common()
        )
        for names in alike.values()
        if len(names) > 1
    ]
    return unified + apart


def spelt(value: Value) -> str:
    """Return a label as it stands in the file, safe to show; text is in quotes."""
    if isinstance(value, Opaque):
        return value.kind
    return f'"{printable(value, 40)}"' if isinstance(value, str) else printable(str(value), 40)
