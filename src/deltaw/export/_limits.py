"""What keeps an adapter from programs that read factors of linear layers and nothing else."""

import shlex
from collections.abc import Sequence

from deltaw.errors import printable
from deltaw.export._source import Source
from deltaw.state import IDS, ROWS, LayerState
from deltaw.train.packing import packing

PARTS = {
    "lora_magnitude_vector": "the magnitudes of DoRA",
    "lora_B_bias": "a bias on B",
    ROWS: "rows of single tokens that were trained",
}
LINEAR = ("linear", "fused")


def merge_instead(source: Source) -> str:
    """Return the way out that is always open."""
    folder = shlex.quote(str(source.folder))
    return f"merge it into the model instead: deltaw export {folder} NEW_FOLDER --to hf"


def trained_on(source: Source) -> dict[str, str]:
    """Return what is to be told of an adapter kept apart whose base was packed in training."""
    kind = None if source.recipe is None else packing(source.recipe)
    if kind is None:
        return {}
    return {
        "trained": f"on a base packed in {kind}: on weights in another form the adapter answers "
        "otherwise; deltaw export --to hf writes the model that was trained"
    }


def problems(source: Source, kinds: Sequence[str] = LINEAR) -> list[str]:
    """List all that such a program cannot hold: other kinds of layers than `kinds`, and others."""
    found = []
    if source.task == "SEQ_CLS":
        found.append("it is for a classifier, not for a language model")
    for path, layer in source.state.layers.items():
        where = printable(path, 300)
        found += [f"{where}: {what}" for what in _in(layer)]
        if layer.kind not in (*kinds, "module"):
            found.append(f"{where}: an adapter on a layer of kind {layer.kind}")
    return found


def _in(layer: LayerState) -> list[str]:
    found = []
    for name in layer.tensors:
        parameter, _, part = name.rpartition(".")
        if part == "trained":
            found.append(f"its {printable(parameter)} was trained in full")
        elif part in PARTS:
            found.append(PARTS[part])
        elif part not in ("lora_A", "lora_B", "start_A", "start_B", IDS):
            found.append(printable(name))
    return found
