"""Writing an adapter of a model to a folder."""

from pathlib import Path

from torch import nn

from deltaw.capturing import capture
from deltaw.formats import format_of
from deltaw.root import require_root


def save(
    model: nn.Module, folder: str | Path, name: str = "default", *, format: str = "peft"
) -> None:
    """Write the adapter `name` of `model`; the base is not written.

    Args:
        model: an adapted model.
        folder: where to; made if absent. For `format="loralib"` a file.
        name: which adapter.
        format: a file of `deltaw/formats`.

    Raises:
        StateError: if the model has no such adapter.
        FormatError: if a tensor holds NaN or Inf, or the format cannot hold the adapter.
        DeltawError: if the folder cannot be written; files that were there before stay whole.
    """
    format_of(format).write(capture(model, name), Path(folder))


def save_all(model: nn.Module, folder: str | Path) -> None:
    """Write every adapter as PEFT does: `default` into the folder, others into sub-folders."""
    require_root(model).save_pretrained(str(folder))
