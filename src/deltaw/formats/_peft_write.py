"""The `adapter_config.json` with which PEFT loads a State."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from deltaw.config import LoraConfig
from deltaw.formats._parts import pinned
from deltaw.formats._peft_keys import PREFIX
from deltaw.patterns import ends_with

# Modules that PEFT saves in full for a task, whether or not the file lists them.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?", re.ASCII)


def alpha_for(config: LoraConfig, scale: float, r: int) -> float:
    """Return the `lora_alpha` that gives `scale` at rank r, to the last bit where one does."""
    exact = scale * (math.sqrt(r) if config.use_rslora else r)
    asked = config.lora_alpha
    for alpha in (asked, float(round(exact))):
        if alpha and config.scale(r, alpha) == scale:
            return int(alpha) if alpha == int(alpha) else alpha
    return exact


def render(
    config: LoraConfig,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    heads: Sequence[str],
    fan_in_fan_out: bool,
    lora_bias: bool,
    parameters: Sequence[str] = (),
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, object]:
    """Return the content of `adapter_config.json` for layers of these ranks and alphas.

    `r` and `lora_alpha` are those asked for where some layer has them, else the most frequent;
    the patterns name the other layers by their whole paths; `parameters` are those of the layers
    that are parameters, `tokens` those whose rows are trained.
    """
    pairs = [(ranks[path], alphas[path]) for path in ranks]
    common = (config.r, config.lora_alpha)
    if pairs and common not in pairs:
        common = Counter(pairs).most_common(1)[0][0]
    r, alpha = common
    hub = _on_hub(config.base_model_name_or_path)
    rare = {"target_parameters": list(parameters), "trainable_token_indices": tokens}
    return {
        "alpha_pattern": {pinned(path): a for path, a in sorted(alphas.items()) if a != alpha},
        "base_model_name_or_path": config.base_model_name_or_path if hub else None,
        "bias": config.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_bias": lora_bias,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(heads) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {pinned(path): rank for path, rank in sorted(ranks.items()) if rank != r},
        "revision": config.revision if hub else None,
        "target_modules": _targets([path for path in ranks if path not in parameters]),
        "task_type": _task(config.task_type, heads, ranks),
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        **{name: value for name, value in rare.items() if value},
    }


def heads(config: LoraConfig, saved: Iterable[str], adapted: Iterable[str]) -> list[str]:
    """Return the `modules_to_save` with which PEFT loads the modules `saved` in full.

    Names that the settings or the task ask for stand for all modules below them. PEFT compares ends
    of names, dots or not, so that one that ends an adapted module's too is given with what PEFT
    puts in front of all.
    """
    wanted = (*(config.modules_to_save or ()), *TASK_HEADS.get(config.task_type or "", ()))
    adapted = list(adapted)
    tops = set()
    for path in saved:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            top = ".".join(parts[:length])
            if any(ends_with(top, name) for name in wanted) and not any(
                other.startswith(top + ".") for other in adapted
            ):
                break
        tops.add(PREFIX + top if _ends_one_of(adapted, top) else top)
    return sorted(tops)


def _ends_one_of(adapted: Iterable[str], name: str) -> bool:
    """Tell whether the name of an adapted module, or of one that it lies in, ends so."""
    return any(f"{name}." in f"{path}." for path in adapted)


def _targets(adapted: Iterable[str]) -> list[str] | str:
    """Return the paths as a list, which most programs read, or else as one pattern.

    In a list PEFT takes each for the end of a path, and one without a dot would be that of many. A
    dotted path that ends another one is listed still: PEFT then adapts the other too, by ΔW = 0.
    """
    paths = sorted(adapted)
    if all("." in path for path in paths):
        return paths
    return "|".join(map(re.escape, paths))


def _task(task: str | None, heads: Sequence[str], adapted: Iterable[str]) -> str | None:
    """Return the task unless PEFT would then look for a head that the file does not hold."""
    names = TASK_HEADS.get(task or "")
    if names and not any(ends_with(head, name) for head in heads for name in names):
        return None
    if any(_ends_one_of(adapted, name) for name in names or ()):
        return None
    return task


def _on_hub(name: str | None) -> bool:
    return bool(name and _HUB_ID.fullmatch(name)) and not Path(name or "").exists()
