"""Finding the heads of a transformers model: the new one of a task, and the output embeddings."""

import re

from torch import nn

_TASK = re.compile(
    r"For(Sequence|Token|Image|Audio|Video|AudioFrame)Classification|ForQuestionAnswering"
    r"|ForMultipleChoice"
)


def new_heads(model: nn.Module) -> list[str]:
    """Return the paths of what a transformers task model puts on top of its base model.

    They are the children with parameters of a `...ForSequenceClassification` (or another task
    class) beside the child named by `base_model_prefix`. Any other model has none.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not _TASK.search(type(model).__name__) or prefix not in model._modules:
        return []
    return [
        name
        for name, child in model.named_children()
        if name != prefix and any(True for _ in child.parameters())
    ]


def output_head(model: nn.Module) -> list[str]:
    """Return the path of the output embeddings of a transformers model, where it has them."""
    if not hasattr(model, "get_output_embeddings"):
        return []
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [path for path, module in model.named_modules() if head is not None and module is head]
