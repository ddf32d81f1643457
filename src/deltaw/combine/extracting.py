"""A LoRA from two full checkpoints: ΔW = W_tuned - W_base, layer by layer, cut by SVD.

Two tensors are in memory at a time. Large matrices are decomposed by a random sketch (arXiv
0909.4061), which is exact where the rank asked for holds ΔW.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from deltaw.combine._checkpoint import Checkpoint, shown
from deltaw.combine._checks import check_limit
from deltaw.combine._copies import beside
from deltaw.combine._layers import layer_of
from deltaw.combine._matching import Place, check_match, chosen, guessed, names_in_both
from deltaw.combine._result import Kept, cut
from deltaw.combine._settings import settings
from deltaw.combine._spectrum import Limit, of_matrix
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, MergeError, printable, raise_all
from deltaw.kernels.merge import is_finite
from deltaw.state import LayerState, State

REST = ("report", "save", "refuse")


@dataclass(frozen=True)
class Extracted:
    """An extracted adapter, what its layers kept, and what else the fine-tune changed.

    `rest` names the tensors that changed or are new and have no low-rank ΔW; with `rest="save"`
    the adapter holds them as full copies. `unchanged` counts those of the same bits.
    """

    state: State
    kept: tuple[Kept, ...]
    rest: tuple[str, ...]
    unchanged: int


def extract(
    base: str | Path,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    rest: str = "report",
    places: Mapping[str, Place] | None = None,
    renamed: Mapping[str, str] | None = None,
    exact: bool = False,
    seed: int = 0,
) -> Extracted:
    """Return the adapter that turns the model at `base` nearly into the one at `tuned`.

    Args:
        base: folder or file of the base: safetensors or a pickle, whole or in shards.
        tuned: the same model after full fine-tuning. It may have a new head, or lie one name
            deeper or less deep (`bert.`); layers are called as there.
        rank: the rank of every layer, or the full one where a matrix is smaller.
        energy: instead, the share of Σσ² that every layer keeps, in (0, 1].
        targets: layers to extract: names, a regular expression, or `"all-linear"`; all by default.
        exclude: names of layers to leave to the rest, and of parts that only one model has.
        rest: whether tensors that changed and are no target (norms, biases, new heads) are
            `"report"`-ed alone, `"save"`-d as full copies, or refused by `"refuse"`.
        places: the layers of the model, by `deltaw.analysis.places`; without it they are told from
            names and shapes, where groups of a convolution, that it is transposed (without a bias)
            and tied heads go unseen.
        renamed: what the checkpoints call otherwise than the model does, by
            `deltaw.analysis.places`; copies in full are called as there.
        exact: a full SVD also of large matrices.
        seed: of the sketches.

    Raises:
        ConfigError: if a setting is out of range or a target is no layer.
        FormatError: if a checkpoint is damaged, or listing all in which the two do not match.
        MergeError: listing tensors with NaN or Inf, or the rest where it is refused.
    """
    if rank is None and energy is None:
        raise ConfigError("Neither rank nor energy is given. Fix: give one of them.")
    if rest not in REST:
        raise ConfigError(f"rest must be one of {', '.join(REST)}, not {rest!r}.")
    both = _Both(Checkpoint(Path(base)), Checkpoint(Path(tuned)))
    check_match(both.base, both.tuned, both.pairs, exclude)
    layout = {
        path: (place, key)
        for path, place in (places or guessed(both.tuned.shapes)).items()
        for key in [key for key in place.keys if both.fits(key)][:1]
    }
    found = chosen({path: place for path, (place, _) in layout.items()}, targets, exclude)
    shapes = {path: both.tuned.shapes[layout[path][1]] for path in found}
    check_limit(rank, energy, {p: min(own[0], math.prod(own[1:])) for p, own in shapes.items()})
    limit = Limit(rank, energy)
    layers, kept = {}, list[Kept]()
    for path in sorted(found):
        place = found[path]
        difference = both.difference(layout[path][1])
        if difference is None:
            continue
        spectra = {("weight", 0): of_matrix(place.matrix(difference), limit, exact, seed)}
        parts, report = cut(path, spectra, limit)
        like = LayerState(place.kind, {}, groups=place.groups)
        layers[path] = layer_of(like, tuple(difference.shape[2:]), parts, {}, torch.float32)
        kept += report
    ours = {layout[path][1] for path in found}
    changed = [n for n in sorted(both.tuned.shapes) if n not in ours and not both.same(n)]
    both.check_sound()
    copies = _copies(both, changed, rest, renamed or {})
    unchanged = len(both.tuned.shapes) - len(changed) - len({layout[path][1] for path in layers})
    state = _state(beside(layers, copies), str(base))
    return Extracted(state, tuple(kept), tuple(changed), unchanged)


class _Both:
    """Two checkpoints side by side."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        self.pairs = names_in_both(base, tuned)
        self.broken: list[str] = []

    def fits(self, name: str) -> bool:
        """Tell whether both hold this tensor in one shape."""
        own = self.pairs.get(name)
        return own is not None and self.base.shapes[own] == self.tuned.shapes[name]

    def same(self, name: str) -> bool:
        """Tell whether both hold this tensor with the same values."""
        return self.fits(name) and self.difference(name) is None

    def difference(self, name: str) -> Tensor | None:
        """Return what the fine-tune added, in float32 at least, or None where that is nothing."""
        before, after = self.base.read(self.pairs[name]), self.tuned.read(name)
        if torch.equal(before, after.to(before.dtype)) and before.dtype == after.dtype:
            return None
        wide = reduce(torch.promote_types, (before.dtype, after.dtype), torch.float32)
        added = after.to(wide) - before.to(wide)
        if not is_finite(added):
            self.broken.append(f"{printable(name, 300)}: NaN or Inf in its difference")
        elif not (before.is_floating_point() and after.is_floating_point()) and added.dim() > 1:
            self.broken.append(f"{printable(name, 300)}: stored as {before.dtype}, {after.dtype}")
        else:
            return added if added.any() else None
        return None

    def check_sound(self) -> None:
        """Raise a MergeError that lists what no difference can be taken of."""
        raise_all(
            MergeError,
            f"No ΔW can be taken between {shown(self.base.path)} and {shown(self.tuned.path)}:",
            self.broken,
            "give checkpoints of finite numbers that are not quantised.",
        )


def _copies(
    both: _Both, changed: Sequence[str], rest: str, renamed: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """Return what is kept as full copies: single biases, and of any other module all it holds."""
    raise_all(
        MergeError,
        "The fine-tune changed more than the targets:",
        [printable(name, 300) for name in changed] if rest == "refuse" else [],
        'pass rest="save" to keep these as full copies, or rest="report" to leave them out.',
    )
    if rest != "save":
        return {}
    raise_all(
        MergeError,
        "These are parameters of no module, which cannot be kept as copies:",
        [printable(name, 300) for name in changed if "." not in name],
        'pass rest="report" to leave them out.',
    )
    names = {name: renamed.get(name, name) for name in both.tuned.shapes}
    whole = {names[name].rpartition(".")[0] for name in changed if not name.endswith(".bias")}
    copies: dict[str, dict[str, Tensor]] = {}
    for name, called in names.items():
        path, _, own = called.rpartition(".")
        if path in whole or name in changed:
            copies.setdefault(path, {})[f"{own}.trained"] = both.tuned.read(name).clone()
    return copies


def _state(layers: Mapping[str, LayerState], base: str) -> State:
    heads = [
        path
        for path, layer in layers.items()
        if any(n.endswith(".trained") and n != "bias.trained" for n in layer.tensors)
    ]
    biased = any("bias.trained" in layer.tensors for layer in layers.values())
    config = LoraConfig(
        modules_to_save=sorted(heads),
        bias="all" if biased else "none",
        base_model_name_or_path=base,
    )
    return State(settings(config, layers), dict(sorted(layers.items())))
