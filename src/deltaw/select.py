"""Which modules a config names: from a list of paths to the targets, with every miss reported."""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deltaw.config import LoraConfig
from deltaw.patterns import ends_with, full_matches, key_matches, within


@dataclass(frozen=True)
class Modules:
    """What selection needs to know of a model: all its paths, and which of them are linear layers,
    output heads and new heads; further path -> path of what is reachable under several, the paths
    of all parameters, and that of the input embedding."""

    paths: Sequence[str]
    linear: Sequence[str]
    output_heads: Sequence[str]
    new_heads: Sequence[str]
    aliases: Mapping[str, str]
    parameters: Sequence[str] = ()
    input_embedding: Sequence[str] = ()


@dataclass(frozen=True)
class Selection:
    """The paths adapted by a low-rank ΔW, those trained in full, and what matched nothing; further
    the parameters adapted on their own, and the tokens trained of each table."""

    targets: tuple[str, ...]
    heads: tuple[str, ...]
    misses: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)


def select(modules: Modules, config: LoraConfig) -> Selection:
    """Apply `target_modules`, `exclude_modules`, `layers_*` and `modules_to_save` of a config.

    Precedence: a module in `modules_to_save` is never a low-rank target; with
    `modules_to_save=None` the new heads are, except where an entry of `target_modules` matches
    nothing else; `exclude_modules` removes; `layers_to_transform` filters, but not a path that a
    list gives in full.
    """
    misses: list[str] = []
    heads = _heads(modules, config, misses)
    wanted = _wanted(modules, config, misses)
    if config.modules_to_save is None:
        aimed = {path for paths in wanted.values() if _all_within(paths, heads) for path in paths}
    else:
        aimed = set()
    chosen = {path for paths in wanted.values() for path in paths}
    excluded = _excluded(modules, config, chosen, misses)
    kept = _in_layers(modules, config, chosen - excluded, misses)
    targets = [p for p in modules.paths if p in kept and (p in aimed or not within(p, heads))]
    parameters = _parameters(modules, config, misses)
    _check_patterns(config, targets, parameters, misses)
    tokens = _tokens(modules, config, misses)
    return Selection(tuple(targets), tuple(heads), tuple(misses), tuple(parameters), tokens)


def names_parameter(path: str, names: Sequence[str]) -> bool:
    """Tell whether `target_parameters` takes the parameter at `path`."""
    return any(ends_with(path, name) for name in names)


def nearest(name: str, paths: Sequence[str]) -> str:
    """Return `nearest: ...`, naming existing modules most like `name`, or an empty string."""
    last = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    pool = [*last, *paths] if "." in name else last
    close = difflib.get_close_matches(name, [n for n in pool if not n.isdigit()], n=3, cutoff=0.5)
    return f" (nearest: {', '.join(close)})" if close else ""


def block_index(path: str, lists: Sequence[str]) -> int | None:
    """Return the number after the first list of blocks on the path, or after one of `lists`.

    Numbers further in (experts of a block) do not count.
    """
    parts = path.split(".")
    for before, part in itertools.pairwise(parts):
        if part.isdigit() and not before.isdigit() and (not lists or before in lists):
            return int(part)
    return None


def _heads(modules: Modules, config: LoraConfig, misses: list[str]) -> list[str]:
    if config.modules_to_save is None:
        return list(modules.new_heads)
    found: set[str] = set()
    for name in config.modules_to_save:
        matched = [path for path in modules.paths if ends_with(path, name)]
        if not matched:
            misses.append(f"modules_to_save {name!r}{_hint(name, [name], modules)}")
        found.update(matched)
    return [p for p in modules.paths if p in found and not within(p, found - {p})]


def _wanted(modules: Modules, config: LoraConfig, misses: list[str]) -> Mapping[str, list[str]]:
    """Return the matches of each entry of `target_modules`."""
    target = config.target_modules
    if target is None:
        return {}
    if target == "all-linear":
        heads = {*modules.output_heads, *(() if config.adapts_new_heads else modules.new_heads)}
        return {target: [path for path in modules.linear if not within(path, heads)]}
    wanted = {
        entry: _matching(entry, target, modules.paths)
        for entry in ([target] if isinstance(target, str) else target)
    }
    misses += [
        f"target_modules {entry!r}{_hint(entry, target, modules)}"
        for entry, paths in wanted.items()
        if not paths
    ]
    return wanted


def _matching(entry: str, of: str | Sequence[str], paths: Sequence[str]) -> list[str]:
    if isinstance(of, str):
        return [path for path, hit in zip(paths, full_matches(entry, paths), strict=True) if hit]
    return [path for path in paths if ends_with(path, entry)]


def _hint(entry: str, of: str | Sequence[str], modules: Modules) -> str:
    """Return the first name of what `entry` is another name of, or the names most like it."""
    alias = next(iter(_matching(entry, of, list(modules.aliases))), None)
    if alias is None:
        return nearest(entry, modules.paths)
    return f" ({alias} is {modules.aliases[alias]}; give that name)"


def _excluded(
    modules: Modules, config: LoraConfig, chosen: set[str], misses: list[str]
) -> set[str]:
    exclude = config.exclude_modules
    if exclude is None:
        return set()
    out: set[str] = set()
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        matched = _matching(entry, exclude, modules.paths)
        if not chosen & set(matched):
            misses.append(f"exclude_modules {entry!r} (among the targets)")
        out.update(matched)
    return out


def _in_layers(
    modules: Modules, config: LoraConfig, chosen: set[str], misses: list[str]
) -> set[str]:
    if config.layers_to_transform is None:
        return chosen
    asked = config.layers_to_transform
    indices = {asked} if isinstance(asked, int) else set(asked)
    pattern = config.layers_pattern
    lists = [pattern] if isinstance(pattern, str) else list(pattern or ())
    entries = config.target_modules
    exact = set() if entries is None or isinstance(entries, str) else set(entries)
    found = {path: block_index(path, lists) for path in chosen}
    misses += [
        f"layers_pattern {name!r}"
        for name in lists
        if not any(f".{name}." in f".{path}" for path in chosen)
    ]
    misses += [f"layers_to_transform {index}" for index in sorted(indices - set(found.values()))]
    return {path for path, index in found.items() if index in indices or path in exact}


def _parameters(modules: Modules, config: LoraConfig, misses: list[str]) -> list[str]:
    names = config.target_parameters or ()
    for name in names:
        if not any(ends_with(path, name) for path in modules.parameters):
            misses.append(f"target_parameters {name!r}{nearest(name, modules.parameters)}")
    return [path for path in modules.parameters if names_parameter(path, names)]


def _tokens(modules: Modules, config: LoraConfig, misses: list[str]) -> Mapping[str, Sequence[int]]:
    asked = config.trainable_token_indices or {}
    if isinstance(asked, Mapping):
        found: dict[str, Sequence[int]] = {}
        for name, ids in asked.items():
            paths = [path for path in modules.paths if ends_with(path, name)]
            if not paths:
                hint = _hint(name, [name], modules)
                misses.append(f"trainable_token_indices {name!r}{hint}")
            found |= dict.fromkeys(paths, ids)
        return found
    paths = list(modules.input_embedding) or [
        p for p in modules.paths if ends_with(p, "embed_tokens")
    ]
    if not paths:
        misses.append("trainable_token_indices: no input embedding is known; give {name: tokens}")
    return dict.fromkeys(paths[:1], asked)


def _check_patterns(
    config: LoraConfig, targets: Sequence[str], parameters: Sequence[str], misses: list[str]
) -> None:
    for name in ("rank_pattern", "alpha_pattern", "enable_lora"):
        paths = targets if name == "enable_lora" else [*targets, *parameters]
        for key in getattr(config, name) or {}:
            if not any(key_matches(key, paths)):
                plain = re.sub(r"[\\^$]", "", key)
                misses.append(f"{name} {key!r}{nearest(plain, paths)}")


def _all_within(paths: Sequence[str], heads: Sequence[str]) -> bool:
    return bool(paths) and all(within(path, heads) for path in paths)
