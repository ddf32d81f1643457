"""What a key of another trainer's file becomes: a recipe's value, nothing, or an error."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from deltaw.errors import printable
from deltaw.train.effects import OF_ADAPTER

Read = TypeVar("Read")
Values = Mapping[str, Any]


def unchanged(value: Any) -> Any:
    """Return the value for the recipe to check."""
    return value


@dataclass(frozen=True, slots=True)
class Effect:
    """The recipe's `key` gets the value that `read` makes of it; `read` may raise `ValueError`."""

    key: str
    read: Callable[[Any], Any] = unchanged


@dataclass(frozen=True, slots=True)
class Joint:
    """The tool's `join` reads the value together with others; `means` says what it becomes."""

    means: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """The value cannot change what is learnt, for the reason `why`."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The value would change what is learnt, or do what is not done here, unless it is `harmless`.

    `instead` says what to do.
    """

    instead: str
    harmless: tuple[Any, ...] = (False,)


Fate = Effect | Joint | Ignored | Refused


@dataclass(frozen=True, slots=True)
class Around:
    """How many processes train together, and the `folder` that a file lies in."""

    processes: int = 1
    folder: Path = Path()


@dataclass
class Found:
    """What a file was read as; `names` has the file's own name for each of the recipe's keys.

    `own` are the recipe's keys that stand beside the tool's, `around` is where the file is read.
    """

    around: Around = Around()
    own: Values = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stopped: bool = False

    def stop(self, problem: str) -> None:
        """Say this of the known keys alone, because the rest of them cannot be judged."""
        self.problems = [problem]
        self.stopped = True

    def give(self, key: str, value: Any, name: str) -> None:
        """Set a recipe's key as the file's key `name` asks."""
        if key in self.values and self.values[key] != value:
            self.problems.append(f"{self.names[key]} and {name} contradict each other; keep one")
            return
        self.values[key] = value
        self.names[key] = name

    def choose(self, given: Values, key: str, value: Any, name: str) -> None:
        """Set a recipe's key to what `name` says, or to what holds where it is not in the file."""
        if name in given:
            self.give(key, value, name)
        else:
            self.names.setdefault(key, name)
            self.usual[key] = value

    def spread(self, given: Values, name: str) -> None:
        """Set the rows of a batch, which `name` gives for each process and a recipe for all."""
        count = self.around.processes
        each = self.read(given, name, number) if name in given else self.usual["batch_size"]
        if each is None:
            return
        rows = count * each
        self.choose(given, "batch_size", rows, name)
        if count > 1 and "batch_size" not in self.own:
            self.notes.append(
                f"{name} is for each of the {count} processes, batch_size={rows} for all; an "
                "interrupted run keeps that, so give it where the processes are not as many"
            )

    def go_on(self, adapters: list[str], name: str) -> None:
        """Begin with these adapters; the last one's own settings hold, and not the file's."""
        self.give("adapter", adapters, name)
        unread = [self.names[key] for key in OF_ADAPTER if key in self.values]
        for key in OF_ADAPTER:
            self.values.pop(key, None)
            self.usual.pop(key, None)
        if unread:
            listed = ", ".join(dict.fromkeys(unread))
            self.notes.append(f"{listed}: without effect, the adapter's own settings hold")

    def read(self, given: Values, name: str, how: Callable[[Any], Read]) -> Read | None:
        """Return a value of the file, or None where there is none or it makes no sense."""
        if name not in given:
            return None
        try:
            return how(given[name])
        except ValueError as error:
            self.problems.append(misfit(name, given[name], str(error)))
            return None


@dataclass(frozen=True, slots=True)
class Tool:
    """A trainer: the keys of its files, and its defaults where they differ from a recipe's.

    A file with one of `signs` may be its own. `join` reads what several keys say together.
    """

    name: str
    signs: frozenset[str]
    keys: Mapping[str, Fate]
    defaults: Mapping[str, Any]
    join: Callable[[Values, Found], None]

    def read(self, values: Values, own: Values, around: Around) -> Found:
        """Return what the values of known keys become; null stands for the tool's default.

        `own` are the recipe's keys that stand beside them, `around` is where they are read.
        """
        given = {key: value for key, value in values.items() if value is not None}
        found = Found(around, own, usual=dict(self.defaults))
        for name, fate in self.keys.items():
            if isinstance(fate, Effect):
                found.names.setdefault(fate.key, name)
                value = found.read(given, name, fate.read)
                if value is not None:
                    found.give(fate.key, value, name)
            elif name in given and isinstance(fate, Ignored):
                found.ignored.append(name)
            elif name in given and isinstance(fate, Refused) and given[name] not in fate.harmless:
                found.problems.append(misfit(name, given[name], f"not done here; {fate.instead}"))
        self.join(given, found)
        if found.values.get("trust_remote_code"):
            found.notes.append("trust_remote_code: Python code that comes with the model is run")
        return found


def each(keys: Iterable[str], fate: Fate) -> dict[str, Fate]:
    """Return one fate for several keys."""
    return dict.fromkeys(keys, fate)


def misfit(name: str, value: Any, message: str) -> str:
    """Return the sentence about a value that makes no sense."""
    return f"{name}={printable(repr(value))}: {message}"


def truth(value: Any) -> bool:
    """Return a truth value, written as one or as text."""
    known = {"true": True, "false": False}
    word = str(value).lower()
    if isinstance(value, bool | str) and word in known:
        return known[word]
    raise ValueError("must be true or false")


def number(value: Any) -> float:
    """Return a finite number, written as one or as text; a whole one as `int`."""
    if isinstance(value, bool | list | dict):
        raise ValueError("must be a number")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("must be a number") from error
    if not abs(found) < float("inf"):
        raise ValueError("must be a finite number")
    return int(found) if found.is_integer() else found


def names(value: Any) -> list[str]:
    """Return names from a list, or from a text with commas between them."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be names with commas between them, or a list of names")
    found = [name.strip() for name in value if name.strip()]
    if not found:
        raise ValueError("names nothing")
    return found


def joined(value: Any) -> str:
    """Return names as one text with commas between them."""
    return ",".join(names(value))


def numbers(value: Any) -> list[float]:
    """Return numbers from a list, or from a text with commas between them."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list):
        raise ValueError("must be numbers with commas between them, or a list of numbers")
    return [number(part) for part in value]


def layers(value: Any) -> str | list[str]:
    """Return the layers to adapt: `all` and `all-linear` mean every linear layer but the head."""
    found = names(value)
    return "all-linear" if found in (["all"], ["all-linear"]) else found


def reports(value: Any) -> list[str]:
    """Return where progress is reported to."""
    found = names(value)
    return [] if found == ["none"] else found


def settings(value: Any) -> dict[str, Any]:
    """Return settings by their names, from a dictionary or from its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError as error:
            raise ValueError("must be names with values, or such as JSON") from error
    if not isinstance(value, dict):
        raise ValueError("must be names with values, or such as JSON")
    return value


def optimizer(value: Any) -> Any:
    """Return the optimiser's name here, where it has another."""
    return "adamw" if value in ("adamw", "adamw_torch", "adamw_torch_fused") else value
