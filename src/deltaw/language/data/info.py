"""LLaMA-Factory's dataset_info.json: data sets by name, with their columns and tags."""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.errors import DataError, printable, raise_all
from deltaw.language.data.schema import ROLES, SPEAKERS, Speaker, Tags
from deltaw.train.data.decode import decode, load
from deltaw.train.data.rows import PATH_LIMIT

FILE = "dataset_info.json"
TEXTS = ("hf_hub_url", "file_name", "formatting", "subset", "split", "folder")
ELSEWHERE = ("ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
KEYS = (*TEXTS, *ELSEWHERE, "ranking", "num_samples", "columns", "tags")
MESSAGES = {"alpaca": None, "sharegpt": "conversations", "openai": "messages"}
TAGS: Mapping[str, Speaker | None] = {
    "role_tag": None,
    "content_tag": None,
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One data set of a dataset_info.json; `location` is a file, a folder or a hub name."""

    location: str
    hub: bool
    columns: Mapping[str, str] | None = None
    tags: Tags = field(default_factory=Tags)
    ranking: bool = False
    split: str | None = None
    folder: str | None = None
    limit: int | None = None


def read_info(folder: Path) -> Mapping[str, Any]:
    """Return the entries of the dataset_info.json of a folder, still unchecked."""
    path = folder / FILE
    shown = printable(str(path), PATH_LIMIT)
    try:
        entries = json.loads(decode(load(path), str(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{shown}: invalid JSON: {error}\nFix: correct the file.") from error
    if not isinstance(entries, dict):
        raise DataError(
            f'{shown}: not an object\nFix: write {{"NAME": {{"file_name": ...}}, ...}}.'
        )
    return entries


def entry(name: str, value: Any, folder: Path) -> Entry:
    """Return one entry of the dataset_info.json of `folder`.

    Raises `DataError` listing unknown keys with the nearest known, values of a wrong type, and
    places that cannot be read from.
    """
    named = f'{printable(str(folder / FILE), PATH_LIMIT)}: data set "{printable(name)}"'
    if not isinstance(value, dict):
        raise DataError(f'{named} is not an object\nFix: write {{"file_name": ...}}.')
    problems = [*_unknown(value, KEYS, "key"), *_wrong_types(value)]
    columns, tags = value.get("columns") or {}, value.get("tags") or {}
    if isinstance(columns, dict) and isinstance(tags, dict):
        problems += _unknown(columns, ROLES, "column")
        problems += _not_texts(columns, "column")
        problems += tag_problems(tags)
    location = value.get("hf_hub_url") or value.get("file_name")
    elsewhere = [key for key in ELSEWHERE if value.get(key)]
    if not location:
        problems.append(
            f"{' and '.join(elsewhere)} cannot be read from: give hf_hub_url or file_name"
            if elsewhere
            else "no file_name and no hf_hub_url"
        )
    formatting = value.get("formatting") or "alpaca"
    if isinstance(formatting, str) and formatting not in MESSAGES:
        problems.append(f'formatting "{printable(formatting)}" is none of {", ".join(MESSAGES)}')
    raise_all(
        DataError,
        named,
        problems,
        "correct this entry; data of other hubs, clouds or scripts: download it, give file_name.",
    )
    if MESSAGES[formatting]:
        columns = {"messages": MESSAGES[formatting], **columns}
    hub = bool(value.get("hf_hub_url"))
    subset = f":{value['subset']}" if value.get("subset") else ""
    return Entry(
        f"{location}{subset}" if hub else str(folder / str(location)),
        hub,
        columns or None,
        read_tags(tags),
        bool(value.get("ranking")),
        value.get("split"),
        value.get("folder"),
        value.get("num_samples"),
    )


def read_tags(tags: Mapping[str, str]) -> Tags:
    """Return the tags of an entry, beside which the usual names of speakers stay known."""
    named = {tags[tag]: speaker for tag, speaker in TAGS.items() if speaker and tags.get(tag)}
    return Tags(tags.get("role_tag"), tags.get("content_tag"), {**SPEAKERS, **named})


def tag_problems(tags: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each unknown tag and each that is not text."""
    return [*_unknown(tags, tuple(TAGS), "tag"), *_not_texts(tags, "tag")]


def _unknown(value: Mapping[str, Any], known: Sequence[str], what: str) -> list[str]:
    problems = []
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(known)}"
            problems.append(f'unknown {what} "{printable(key)}"{hint}')
    return problems


def _not_texts(value: Mapping[str, Any], what: str) -> list[str]:
    return [
        f'{what} "{printable(key)}" must be text'
        for key, name in value.items()
        if name is not None and not isinstance(name, str)
    ]


def _wrong_types(value: Mapping[str, Any]) -> list[str]:
    problems = _not_texts({key: value[key] for key in (*TEXTS, *ELSEWHERE) if key in value}, "key")
    if not isinstance(value.get("ranking"), bool | None):
        problems.append('key "ranking" must be true or false')
    number = value.get("num_samples")
    if number is not None and (type(number) is not int or number < 1):
        problems.append('key "num_samples" must be a whole number of at least 1')
    problems += [
        f'key "{key}" must be an object'
        for key in ("columns", "tags")
        if not isinstance(value.get(key), dict | None)
    ]
    return problems
