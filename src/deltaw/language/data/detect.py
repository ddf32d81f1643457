"""Which schema a table follows: by the names of its columns, or by what a person says."""

import difflib
import re
from collections.abc import Mapping, Sequence

from deltaw.errors import DataError, printable, raise_all
from deltaw.language.data.preference import judgement
from deltaw.language.data.schema import MEDIA, ROLES, Kind, Schema, Tags
from deltaw.train.data.detect import detect as detect_labelled
from deltaw.train.data.names import TEXTS, plain
from deltaw.train.data.rows import PATH_LIMIT, Opaque, Table
from deltaw.train.data.table import Splits

MESSAGES = ("messages", "conversations", "conversation", "dialogue", "dialog")
PROMPTS = ("instruction", "question", "query", "problem", "prompt", "input")
QUERIES = ("input", "context")
RESPONSES = ("output", "response", "answer", "completion", "solution", "targets")
PLAIN_RESPONSES = ("text", "content")
"""What an answer may be called beside a request, where nothing else is one."""
COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("mr", "ref"))
SYSTEMS = ("system", "system_prompt")
OBJECTS = re.compile(r"\s*(\[\s*)?\{")
BESIDE = ("system", "query", "history", "tools")
LABELS = ("label", "labels")
KINDS: Mapping[Kind, str] = {
    "instruction": "instructions",
    "instances": "instructions with instances",
    "dialogue": "dialogues",
    "completion": "prompts and completions",
    "text": "text",
    "preference": "preferences",
    "rating": "rated answers",
}
KNOWN = (
    "messages | conversations, instruction + output, question + answer, prompt + completion, "
    "prompt + chosen + rejected, text"
)
GIVEN: Sequence[tuple[frozenset[str], Kind]] = (
    (frozenset({"chosen", "rejected"}), "preference"),
    (frozenset({"kto_tag", "messages"}), "rating"),
    (frozenset({"kto_tag", "prompt", "completion"}), "rating"),
    (frozenset({"kto_tag", "prompt", "response"}), "rating"),
    (frozenset({"messages"}), "dialogue"),
    (frozenset({"prompt", "completion"}), "completion"),
    (frozenset({"prompt", "response"}), "instruction"),
    (frozenset({"text"}), "text"),
    (frozenset({"prompt"}), "text"),
)


def detect(table: Table) -> Schema:
    """Return the schema of a table by the names of its columns.

    Raises `DataError` naming the columns when they fit none.
    """
    schema = find(table)
    if schema is None:
        raise DataError(
            f"{printable(table.path, PATH_LIMIT)}: columns that fit no kind of language data: "
            f"{listed(table.columns)}\nFix: name them as in one of {KNOWN}; or say what they are, "
            "such as columns: {prompt: COLUMN, response: COLUMN}."
        )
    return schema


def find(table: Table) -> Schema | None:
    """Return the schema of a table by the names of its columns, or None when they fit none."""
    names = {plain(name): name for name in table.columns}
    found = _found(table, names)
    if found is None:
        return None
    kind, columns, is_plain = found
    if kind not in ("completion", "text"):
        system = _one(names, SYSTEMS)
        columns |= {"system": system} if system else {}
        columns |= {"tools": names["tools"]} if "tools" in names else {}
    columns |= {role: names[role] for role in MEDIA if role in names}
    is_plain = is_plain and not _beside(table, columns)
    return Schema(kind, columns, _sentence(kind, columns, "by their names"), is_plain)


def given(table: Table, columns: Mapping[str, str], tags: Tags, *, ranking: bool = False) -> Schema:
    """Return the schema that `columns` asks for: a mapping from roles to columns of `table`.

    Raises `DataError` listing unknown roles, missing columns, or what else the roles need.
    """
    problems = [
        f'unknown role "{printable(role)}"{_near(role, ROLES)}'
        for role in columns
        if role not in ROLES
    ]
    problems += [
        f'no column "{printable(name)}" for {printable(role)}{_near(name, table.columns)}'
        for role, name in columns.items()
        if role in ROLES and role not in MEDIA and name not in table.columns
    ]
    kind = kind_given(columns)
    if kind is None and not problems:
        problems.append(f"the roles {', '.join(columns) or '(none)'} do not make a sample")
    if ranking and kind != "preference" and not problems:
        problems.append("a ranking needs the roles chosen and rejected")
    raise_all(
        DataError,
        f"{printable(table.path, PATH_LIMIT)}: the columns asked for do not fit",
        problems,
        "give messages; prompt and response; prompt and completion (no chat template); text; or "
        f"chosen and rejected. The file's columns are {listed(table.columns)}.",
    )
    assert kind is not None
    chosen = dict(columns)
    if kind == "text" and "text" not in chosen:
        chosen["text"] = chosen.pop("prompt")
    is_plain = "completion" in chosen and not _beside(table, chosen)
    return Schema(kind, chosen, _sentence(kind, chosen, "as given"), is_plain, tags)


def kind_given(columns: Mapping[str, str]) -> Kind | None:
    """Return what rows are whose columns have these roles, or None."""
    return next((kind for roles, kind in GIVEN if roles <= columns.keys()), None)


def is_language(splits: Splits) -> bool:
    """Does a data set look like language data, rather than like labelled rows to classify?

    Text is, unless a column beside it is a label; so are questions with answers.
    """
    table = splits.train
    schema = find(table)
    if schema is None:
        return False
    if schema.kind == "text":
        return not _has_label(table)
    asks = plain(schema.columns.get("prompt", ""))
    labelled = any(plain(name) in LABELS for name in table.columns)
    return not (schema.kind == "instruction" and labelled and asks in TEXTS)


def listed(names: Sequence[str]) -> str:
    """Return column names in quotes, safe to show."""
    more = ", ..." if len(names) > 30 else ""
    return ", ".join(f'"{printable(name)}"' for name in names[:30]) + more


def _found(table: Table, names: Mapping[str, str]) -> tuple[Kind, dict[str, str], bool] | None:
    """Return kind, columns and whether texts stay plain."""
    request = _request(names)
    messages = _one(names, MESSAGES)
    dialogue = {"messages": messages} if messages and _nested(table, messages) else {}
    only_prompt = "prompt" in names and request["prompt"] == names["prompt"]
    if "chosen" in names and "rejected" in names:
        answers = {"chosen": names["chosen"], "rejected": names["rejected"]}
        before = dialogue or request
        if before or _nested(table, names["chosen"]):
            return "preference", {**before, **answers}, not dialogue and only_prompt
    tag = _tag(table, names)
    pair = next((pair for pair in COMPLETIONS if set(pair) <= names.keys()), None)
    unlabelled = request and not any(name in names for name in LABELS)
    answer = _one(names, RESPONSES) or (_one(names, PLAIN_RESPONSES) if unlabelled else None)
    if tag and dialogue:
        return "rating", {**dialogue, "kto_tag": tag}, False
    if dialogue:
        return "dialogue", dialogue, False
    if "instruction" in names and "instances" in names:
        columns = {"prompt": names["instruction"], "instances": names["instances"]}
        return "instances", columns, False
    if pair:
        columns = {"prompt": names[pair[0]], "completion": names[pair[1]]}
        return (
            ("rating", {**columns, "kto_tag": tag}, True) if tag else ("completion", columns, True)
        )
    if request and answer:
        columns = {**request, "response": answer}
        return (
            ("rating", {**columns, "kto_tag": tag}, False)
            if tag
            else ("instruction", columns, False)
        )
    return ("text", {"text": names["text"]}, True) if "text" in names else None


def _request(names: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a request: prompt, and where there are any query and history."""
    prompt = _one(names, PROMPTS)
    if prompt is None:
        return {}
    found = {"prompt": prompt}
    query = _one({name: column for name, column in names.items() if column != prompt}, QUERIES)
    if query and plain(prompt) in ("instruction", "prompt"):
        found["query"] = query
    if "history" in names:
        found["history"] = names["history"]
    return found


def _tag(table: Table, names: Mapping[str, str]) -> str | None:
    """Return the column that judges answers: kto_tag, or a label that is true or false."""
    if "kto_tag" in names:
        return names["kto_tag"]
    label = names.get("label")
    values = [] if label is None else [v for v in table.column(label) if v is not None]
    return label if values and all(judgement(value) is not None for value in values) else None


def _nested(table: Table, name: str) -> bool:
    """Does a column hold lists or objects, or their JSON text?"""
    first = next((value for value in table.column(name) if value not in (None, "")), None)
    return isinstance(first, Opaque) or (
        isinstance(first, str) and OBJECTS.match(first) is not None
    )


def _beside(table: Table, columns: Mapping[str, str]) -> bool:
    """Does any row have what a plain text has no place for: a system text, history, tools?"""
    found = [table.column(columns[role]) for role in BESIDE if role in columns]
    values = [v.raw if isinstance(v, Opaque) else v for column in found for v in column]
    texts = [value.strip() for value in values if isinstance(value, str)]
    rounds = [value for value in values if isinstance(value, list | dict)]
    return any(text not in ("", "[]") for text in texts) or any(rounds)


def _has_label(table: Table) -> bool:
    if any(plain(name) in LABELS for name in table.columns):
        return True
    try:
        detect_labelled(table)
    except DataError:
        return False
    return True


def _one(names: Mapping[str, str], known: Sequence[str]) -> str | None:
    return next((names[name] for name in known if name in names), None)


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean "{printable(near[0])}"?' if near else ""


def _sentence(kind: Kind, columns: Mapping[str, str], why: str) -> str:
    found = ", ".join(f'{role} "{printable(name)}"' for role, name in columns.items())
    return f"{KINDS[kind]}: {found} ({why})"
