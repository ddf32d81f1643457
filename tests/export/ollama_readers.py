"""Ollama's readers by their rules: of Modelfiles, and of the part of Go's templates we write."""

import re

COMMANDS = ("from", "adapter", "template", "system", "parameter")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile and their values; a parameter's name belongs to its value.

    A value ends at the first line after which it is a whole one: unquoted, or with the quotes that
    it began with. Characters that cannot be printed are left out.
    """
    found = []
    command, value = "", ""
    for line in text.split("\n"):
        if not command:
            if not line.strip():
                continue
            command, _, line = line.strip().partition(" ")
            command = command.lower()
            assert command in COMMANDS, line
            if command == "parameter":
                name, _, line = line.partition(" ")
                command = f"parameter {name}"
            value = ""
        else:
            value += "\n"
        value += "".join(c for c in line if c.isprintable() or c == "\t")
        whole = value.strip()
        for quotes in ('"""', '"'):
            if whole.startswith(quotes):
                closed = len(whole) >= 2 * len(quotes) and whole.endswith(quotes)
                whole = whole[len(quotes) : -len(quotes)] if closed else ""
                break
        else:
            closed = True
        if closed:
            found.append((command, whole))
            command = ""
    assert not command, "the file ends within a value"
    return found


def render(template: str, messages: list[tuple[str, str]]) -> str:
    """What Go makes of our templates: strings, and of `.Messages` those of the role and content."""
    parts = re.split(r"\{\{ ((?:[^\"{}]|\"[^\"]*\")*) \}\}", template)
    texts, actions = parts[::2], parts[1::2]
    assert not any("{{" in text for text in texts)
    start, end = actions.index("range .Messages"), len(actions) - 1 - actions[::-1].index("end")

    def spoken(n: int) -> str:
        action = actions[n]
        if action.startswith('"'):
            return re.sub(r"\\U([0-9a-f]{8})", lambda m: chr(int(m[1], 16)), action[1:-1])
        raise AssertionError(action)

    output = texts[0]
    if start:
        assert actions[0] == "if not .System" and actions[start - 1] == "end"
        added = texts[1] + "".join(spoken(n) + texts[n + 1] for n in range(1, start - 1))
        output += added * all(role != "system" for role, _ in messages) + texts[start]
    for role, content in messages:
        on = False
        for n in range(start + 1, end):
            if actions[n].startswith(("if ", "else if ")):
                on = actions[n].endswith(f'eq .Role "{role}"')
            elif actions[n] == "end":
                on = False
            elif on:
                output += content if actions[n] == ".Content" else spoken(n)
            if on:
                output += texts[n + 1]
    output += texts[end + 1]
    for n in range(end + 1, len(actions)):
        output += spoken(n) + texts[n + 1]
    return output
