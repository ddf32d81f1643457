"""Whose file is this, and which recipe does it stand for?"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import printable
from deltaw.language.foreign import axolotl, llamafactory, mlx, trl
from deltaw.language.foreign.tool import Around, Found, Tool
from deltaw.train.keys import LANGUAGE
from deltaw.train.recipe import Recipe

TOOLS = (llamafactory.TOOL, axolotl.TOOL, mlx.TOOL, trl.TOOL)
OWN = Recipe.model_fields.keys() - {"record"}
ORDER = (*[key for key in Recipe.model_fields if key not in LANGUAGE], *LANGUAGE)
LONGEST = 60
HERE = Around()


@dataclass(frozen=True, slots=True)
class Reading:
    """The values of a recipe, what the file calls its keys, what is wrong, and what to say of it.

    `said` is None for a recipe of deltaw's own.
    """

    values: dict[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    said: str | None = None


def detect(values: Mapping[str, Any]) -> Tool | None:
    """Return the tool that a file is for, or None for a recipe of deltaw's own.

    It has a key that only this tool's files have, and of those that fit it knows the most keys.
    """
    if values.keys() <= Recipe.model_fields.keys():
        return None
    fitting = [tool for tool in TOOLS if tool.signs & values.keys()]
    return max(fitting, key=lambda tool: len(tool.keys.keys() & values.keys()), default=None)


def read(file: Mapping[str, Any], given: Mapping[str, Any], around: Around = HERE) -> Reading:
    """Return the recipe of a file with the values `given` beside it, which come first.

    `around` is where the file is read, which some tools' keys are about.
    Both may have the tool's keys and deltaw's own; a key that is in both has the tool's meaning.
    """
    tool = detect(file)
    both = {**file, **given}
    if tool is None:
        return Reading(both)
    own = {key: value for key, value in both.items() if key in OWN and key not in tool.keys}
    found = tool.read({key: value for key, value in both.items() if key in tool.keys}, own, around)
    known = [*tool.keys, *OWN]
    strange = [str(key) for key in both if key not in known]
    found.problems += [_unknown(key, tool, known) for key in strange]
    if found.stopped:
        return Reading(found.values, found.names, tuple(found.problems))
    for key in own:
        name = found.names.get(key)
        if key in found.values and (key in given) == (name in given):
            found.problems.append(f"{printable(key)} and {name} say the same; keep one")
        elif key not in found.values or key in given:
            found.values[key] = both[key]
            found.names.pop(key, None)
    usual = {key: value for key, value in found.usual.items() if key not in found.values}
    said = "\n".join(_said(tool, found, usual))
    return Reading(usual | found.values, found.names, tuple(found.problems), said)


def _unknown(key: str, tool: Tool, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown key {printable(key)}, neither {tool.name}'s nor deltaw's{hint}"


def _said(tool: Tool, found: Found, usual: Mapping[str, Any]) -> list[str]:
    lines = [f"{tool.name}'s, read as: {_listed(found.values)}"]
    if usual:
        lines.append(f"its defaults: {_listed(usual)}")
    if found.ignored:
        lines.append(f"ignored, for they do not change what is learnt: {', '.join(found.ignored)}")
    return lines + found.notes


def _listed(values: Mapping[str, Any]) -> str:
    """Return `key=value, ...`, those of every recipe first."""
    return ", ".join(
        f"{key}={printable(_shown(values[key]), LONGEST)}" for key in ORDER if key in values
    )


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
