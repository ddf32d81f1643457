"""The settings of a combined adapter: every ΔW has scale 1, that is alpha = r."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from deltaw.combine._checks import adapted_weights
from deltaw.combine._deltas import EXPERTS, pair, rank_of, slots
from deltaw.combine.bases import is_dora
from deltaw.config import LoraConfig
from deltaw.state import LayerState, State


def state_of(states: Sequence[State], layers: Mapping[str, LayerState]) -> State:
    """Return the layers as a state, with the settings that `states` agree on."""
    layers = _with_biases(layers)
    configs = [state.config for state in states]
    config = settings(configs[0], layers)
    tasks = {each.task_type for each in configs}
    heads = dict.fromkeys(name for each in configs for name in each.modules_to_save or ())
    gained = any(map(is_dora, states))
    tokens = (each.trainable_token_indices for each in configs)
    rules = {each.bias for each in configs}
    named = next((each for each in configs if each.base_model_name_or_path), configs[0])
    config = replace(
        config,
        bias=next(rule for rule in ("all", "lora_only", "none") if rule in rules),
        modules_to_save=list(heads),
        trainable_token_indices=next((each for each in tokens if each), None),
        method="dora" if gained else "lora",
        use_dora=gained,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        base_model_name_or_path=named.base_model_name_or_path,
        revision=named.revision,
    )
    made = State(config, dict(sorted(layers.items())))
    same = (state.base for state in states if adapted_weights(state) == adapted_weights(made))
    return replace(made, base=next((base for base in same if base), None))


def settings(config: LoraConfig, layers: Mapping[str, LayerState]) -> LoraConfig:
    """Return `config` with the ranks of these layers and alpha = r in each."""
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        if layer.kind == EXPERTS:
            ranks |= {f"{path}.{slot}": rank_of(layer, slot) for slot in slots(layer)}
        elif slots(layer):
            ranks[path] = rank(layer)
    stacks = [name for name in sorted(ranks) if name not in layers]
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.r
    others = {pinned(path): own for path, own in sorted(ranks.items()) if own != r}
    enabled = {pinned(path): own.enabled for path, own in layers.items() if own.enabled}
    return replace(
        config,
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(ranks.keys() - set(stacks)),
        target_parameters=stacks or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        enable_lora=enabled or None,
        lora_bias=any("lora_B_bias" in n for own in layers.values() for n in own.tensors),
        lora_dropout=0.0,
        init_lora_weights=True,
    )


def _with_biases(layers: Mapping[str, LayerState]) -> dict[str, LayerState]:
    """Return the layers with a bias on every B, but those of embeddings, if there is one on any.

    PEFT has one setting for all.
    """
    if not any(name.endswith("lora_B_bias") for own in layers.values() for name in own.tensors):
        return dict(layers)
    made = {}
    for path, own in layers.items():
        names = slots(own) if own.kind not in ("embedding", EXPERTS) else []
        zeros = {f"{name}.lora_B_bias": pair(own, name)[1][:, 0] * 0 for name in names}
        made[path] = replace(own, tensors={**zeros, **own.tensors})
    return made


def highest_rank(state: State) -> int:
    """Return the highest rank of a layer, 1 where there is none."""
    return max((rank(layer) for layer in state.layers.values() if slots(layer)), default=1)


def rank(layer: LayerState) -> int:
    """Return the rows of A, which are those of one slice where the layer is fused."""
    return rank_of(layer, slots(layer)[0])


def pinned(path: str) -> str:
    """Return the pattern that matches this path alone."""
    return "^" + re.escape(path)
