"""Which methods are compared: names that people know, or recipe keys of a YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import ConfigError, raise_all
from deltaw.train import yamlfile
from deltaw.train.effects import GALORE, QUANTIZATION, READERS
from deltaw.train.escape import printable
from deltaw.train.recipe import Recipe, parse
from deltaw.train.spellings import respelt

PACKED = {"method": "lora", "quantization_bit": 4, "absorb": True}
"""The start is taken out of the full W, and what is left of it is packed."""
NAMED: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "head": {"method": "head"},
    "bitfit": {"method": "bitfit"},
    "layernorm": {"method": "layernorm"},
    "freeze": {"method": "freeze"},
    "lora": {"method": "lora"},
    "rslora": {"method": "lora", "use_rslora": True},
    "lora+": {"method": "lora", "loraplus_lr_ratio": 16.0},
    "dora": {"method": "lora", "use_dora": True},
    "pissa": {"method": "lora", "init_lora_weights": "pissa"},
    "milora": {"method": "lora", "init_lora_weights": "milora"},
    "olora": {"method": "lora", "init_lora_weights": "olora"},
    "orthogonal": {"method": "lora", "init_lora_weights": "orthogonal"},
    "eva": {"method": "lora", "init_lora_weights": "eva"},
    "lora-ga": {"method": "lora", "init_lora_weights": "lora_ga"},
    "qlora": {"method": "lora", "quantization_bit": 4},
    "qpissa": PACKED | {"init_lora_weights": "pissa"},
    "loftq": PACKED | {"init_lora_weights": "loftq"},
    "galore": {"method": "full", "optim": "galore_adamw"},
}
"""What each name changes in the recipe."""

SYNONYMS = {
    "loraplus": "lora+",
    "lora_ga": "lora-ga",
    "loraga": "lora-ga",
    "layer-norm": "layernorm",
}
KEYS = Recipe.model_fields
LONGEST = 60
SHARED = frozenset(
    [
        "model",
        "revision",
        "data",
        "text",
        "label",
        "task",
        "encoding",
        "validation_share",
        "test_share",
        "split_seed",
        "max_train_rows",
        "allow_leakage",
        "seed",
        "metric",
        "output",
        "name",
        "record",
        "learning_rate",
    ]
)
"""Keys that cannot be a method's own, or its scores could not be compared."""

Methods = dict[str, dict[str, Any]]


def choose(text: str) -> Methods:
    """Return what each of the comma-separated names, or methods of YAML files, changes.

    A file maps titles to recipe keys:

        LoRA on queries and values: {target_modules: [query, value]}

    Raises:
        ConfigError: listing every name that is unknown, given twice or no title.
    """
    chosen: Methods = {}
    problems: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name.lower().endswith((".yaml", ".yml")):
            found = _from_file(Path(name), problems)
        else:
            known = SYNONYMS.get(name.lower(), name.lower())
            if known not in NAMED:
                problems.append(f"{printable(name)} is unknown; known are {', '.join(NAMED)}")
                continue
            found = {known: NAMED[known]}
        problems += [f"{printable(title)} is given twice" for title in found if title in chosen]
        chosen |= found
    if not chosen and not problems:
        problems.append("none is named")
    raise_all(ConfigError, "These methods cannot be compared:", problems)
    return chosen


def _from_file(path: Path, problems: list[str]) -> Methods:
    found: Methods = {}
    values = yamlfile.read(path)
    if not values:
        problems.append(f"{printable(str(path), 200)} holds no methods")
    for title, changes in values.items():
        where = f"{printable(str(path), 200)}: {printable(str(title))}"
        if not str(title).strip() or len(str(title)) > LONGEST:
            problems.append(f"{where}: a title has 1 to {LONGEST} characters")
        elif not isinstance(changes, dict):
            problems.append(f"{where}: must be a mapping of recipe keys, such as {{r: 16}}")
        else:
            found[str(title)] = changes
    return found


def recipes(shared: Mapping[str, Any], methods: Methods) -> dict[str, Recipe]:
    """Return the recipe of each method: the shared values that it reads, and its own over them.

    Raises:
        ConfigError: listing what is wrong with each of them, and the shared values that none reads.
    """
    made = {}
    problems = []
    shared, _ = respelt(shared)
    unread = {
        key
        for key, value in shared.items()
        if key in KEYS and value != KEYS[key].get_default(call_default_factory=True)
    }
    for title, given in methods.items():
        changes, wrong = respelt(given)
        wrong += [f"{key} is shared by all methods" for key in given if key in SHARED]
        problems += [f"{printable(title)}: {problem}" for problem in wrong]
        own = _read_by(shared, changes)
        unread -= own.keys()
        try:
            made[title] = parse(own | changes, printable(title))
        except ConfigError as error:
            head, *lines = str(error).splitlines()
            lines = [line.removeprefix("  - ") for line in lines] or [head]
            problems += [f"{printable(title)}: {line}" for line in lines]
    problems += [
        f"{key}={printable(repr(shared[key]))} has no effect with any of the methods; leave it out"
        for key in sorted(unread)
    ]
    raise_all(ConfigError, "These methods cannot be run:", problems)
    return made


def _read_by(shared: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared values without those that this method would refuse as having no effect."""
    both = {**shared, **changes}
    method = both.get("method", "lora")
    unread = {key for key, readers in READERS.items() if method not in readers}
    if not str(both.get("optim", "")).startswith("galore"):
        unread |= set(GALORE)
    if "quantization_bit" not in both or "quantization_bit" in unread:
        unread |= set(QUANTIZATION)
    if "loraplus_lr_ratio" not in both:
        unread.add("loraplus_lr_embedding")
    return {key: value for key, value in shared.items() if key not in unread}
