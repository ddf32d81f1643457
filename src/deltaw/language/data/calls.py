"""Functions a model may call, and its calls of them, in the form of OpenAI's chat completions."""

from collections.abc import Mapping
from typing import Any

from deltaw.language.data.record import BadRow, as_json, as_text, described

Call = Mapping[str, Any]
Ids = tuple[str | None, ...]


def read_tools(value: Any, name: str) -> tuple[Call, ...]:
    """Return `{"type": "function", "function": {...}}` for each tool of a list, or of JSON text.

    A tool that is not wrapped in `function` yet is wrapped.
    """
    if not value or (isinstance(value, str) and not value.strip()):
        return ()
    tools = as_json(value, name)
    if not isinstance(tools, list):
        raise BadRow(f"{name} holds {described(tools)}, not a list of tools")
    return tuple(_tool(tool, f"tool {number} of {name}") for number, tool in enumerate(tools, 1))


def read_calls(value: Any, name: str) -> tuple[tuple[Call, ...], Ids]:
    """Return the calls of a list or of one object, as values or as JSON text, and their ids.

    `{"name": ..., "arguments": ...}` may stand alone or under `function`; arguments given as JSON
    text are read.
    """
    if not value:
        return (), ()
    calls = as_json(value, name)
    found = calls if isinstance(calls, list) else [calls]
    named = [(call, f"call {number} of {name}") for number, call in enumerate(found, 1)]
    read = tuple(_call(call, where) for call, where in named)
    return read, tuple(as_id(call.get("id"), f"the id of {where}") for call, where in named)


def as_id(value: Any, name: str) -> str | None:
    """Return a name or an id as text; None where there is none."""
    if value is None or value == "":
        return None
    return str(value) if type(value) is int else as_text(value, name)


def _tool(tool: Any, name: str) -> Call:
    function = _function(tool, name)
    as_text(function.get("name"), f"the name of {name}")
    return {"type": "function", "function": function}


def _call(call: Any, name: str) -> Call:
    function = _function(call, name)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = as_json(arguments, f"the arguments of {name}") if arguments.strip() else {}
    if not isinstance(arguments, Mapping | None):
        raise BadRow(f"the arguments of {name} are {described(arguments)}, not an object")
    called = as_text(function.get("name"), f"the name of {name}")
    return {"type": "function", "function": {"name": called, "arguments": arguments or {}}}


def _function(value: Any, name: str) -> Mapping[str, Any]:
    inner = value.get("function") or value if isinstance(value, Mapping) else value
    if not isinstance(inner, Mapping):
        raise BadRow(f"{name} is {described(inner)}, not an object")
    return inner
