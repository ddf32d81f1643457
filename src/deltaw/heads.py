"""Finding the ends of a transformers model: the new head of a task, the output embeddings and the
input embeddings."""

import re
from typing import Any

from torch import nn

from deltaw.geometry import WEIGHT
from deltaw.walking import unwrapped, walk

_TASK = re.compile(
    r"For(Sequence|Token|Image|Audio|Video|AudioFrame)Classification|ForQuestionAnswering"
    r"|ForMultipleChoice"
)


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of what a transformers task model puts on top of its base model.

    They are the children with parameters of a `...ForSequenceClassification` (or another task
    class) beside the child named by `base_model_prefix`, wherever such a model is found inside
    `model`. Any other model has none.
    """
    return [
        f"{path}.{name}".lstrip(".")
        for path, inner in walk(model)
        if _TASK.search(type(inner).__name__)
        and getattr(inner, "base_model_prefix", "") in inner._modules
        for name, child in inner.named_children()
        if name != inner.base_model_prefix and any(True for _ in child.parameters())
    ]


def output_head(model: nn.Module) -> list[str]:
    """Return the paths of the output embeddings of the transformers models in `model`."""
    heads = [
        inner.get_output_embeddings()  # type: ignore[operator]
        for _, inner in walk(model)
        if hasattr(inner, "get_output_embeddings")
    ]
    found = [unwrapped(head) for head in heads if head is not None]
    return [path for path, m in walk(model) if any(m is head for head in found)]


def input_embedding(model: nn.Module) -> list[str]:
    """Return the path of the input embeddings of the first transformers model in `model`."""
    tables = [
        inner.get_input_embeddings()  # type: ignore[operator]
        for _, inner in walk(model)
        if hasattr(inner, "get_input_embeddings")
    ]
    return [path for path, m in walk(model) if m in map(unwrapped, tables[:1])]


def tell_untied(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to False where input and output embeddings are no longer one."""
    for _, inner in walk(model):
        config: Any = getattr(inner, "config", None)
        if not getattr(config, "tie_word_embeddings", False):
            continue
        ends = (getattr(inner, f"get_{end}_embeddings", None) for end in ("input", "output"))
        tables = [unwrapped(found) for end in ends if end and (found := end()) is not None]
        if len({id(table._parameters.get(WEIGHT)) for table in tables}) == 2:
            config.tie_word_embeddings = False
