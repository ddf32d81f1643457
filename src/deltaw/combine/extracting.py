"""A LoRA from two full checkpoints: ΔW = W_tuned - W_base, layer by layer, cut by SVD.

Two tensors are in memory at a time. Large matrices are decomposed by a random sketch (arXiv
0909.4061), which is exact where the rank asked for holds ΔW.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from deltaw.combine._checkpoint import Checkpoint, shown
from deltaw.combine._checks import check_limit
from deltaw.combine._copies import beside
from deltaw.combine._deltas import EXPERTS
from deltaw.combine._layers import layer_of
from deltaw.combine._matching import check_match, chosen, guessed, names_in_both
from deltaw.combine._places import Place
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
            names and shapes, where groups of a convolution, that it is transposed (without a bias),
            tied heads and stacks of experts go unseen. Experts that a checkpoint holds one by one
            while the model stacks them are left to the rest.
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
    layout = {path: both.held(own) for path, own in (places or guessed(both.tuned.shapes)).items()}
    found = chosen({path: place for path, place in layout.items() if place.slots}, targets, exclude)
    check_limit(rank, energy, {path: both.side(place) for path, place in found.items()})
    limit = Limit(rank, energy)
    layers, kept = {}, list[Kept]()
    for path, place in sorted(found.items()):
        added = both.added(place)
        if not added:
            continue
        spectra = {
            (slot, n): of_matrix(M, limit, exact, seed)
            for slot, tensor in added.items()
            for n, M in enumerate(place.matrices(tensor))
        }
        stacked = place.kind == EXPERTS
        parts, report = cut(path, spectra, limit, together=not stacked)
        one = next(iter(added.values()))
        sizes = () if stacked else tuple(one.shape[2:])
        stacks = {f"{slot}.lora_A": tensor for slot, tensor in added.items()}
        like = LayerState(place.kind, stacks, groups=place.groups)
        layers[path] = layer_of(like, sizes, parts, {}, one.dtype)
        kept += report
    ours = {slot.keys[0] for place in found.values() for slot in place.slots.values()}
    changed = [n for n in sorted(both.tuned.shapes) if n not in ours and not both.same(n)]
    both.check_sound()
    copies = _copies(both, changed, rest, renamed or {}, layers)
    unchanged = len(both.tuned.shapes) - len(changed) - len(ours & both.moved)
    state = _state(beside(layers, copies), str(base))
    return Extracted(state, tuple(kept), tuple(changed), unchanged)


class _Both:
    """Two checkpoints side by side."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        self.pairs = names_in_both(base, tuned)
        self.broken: dict[str, str] = {}
        self.moved: set[str] = set()

    def fits(self, name: str) -> bool:
        """Tell whether both hold this tensor in one shape."""
        own = self.pairs.get(name)
        return own is not None and self.base.shapes[own] == self.tuned.shapes[name]

    def held(self, place: Place) -> Place:
        """Return the place with the slots that both hold, each under the name that it has here."""
        keys = {name: [k for k in slot.keys if self.fits(k)] for name, slot in place.slots.items()}
        slots = {n: replace(place.slots[n], keys=(own[0],)) for n, own in keys.items() if own}
        return replace(place, slots=slots)

    def side(self, place: Place) -> int:
        """Return the highest rank of a slot."""
        return max(place.side(n, self.tuned.shapes[s.keys[0]]) for n, s in place.slots.items())

    def added(self, place: Place) -> dict[str, Tensor]:
        """Return what the fine-tune added to each slot that it changed."""
        found = {}
        for name, slot in place.slots.items():
            difference = self.difference(slot.keys[0])
            if difference is not None and slot.of(difference).any():
                found[name] = slot.of(difference)
        return found

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
            self.broken[name] = "NaN or Inf in its difference"
        elif not (before.is_floating_point() and after.is_floating_point()) and added.dim() > 1:
            self.broken[name] = f"stored as {before.dtype}, {after.dtype}"
        elif added.any():
            self.moved.add(name)
            return added
        return None

    def check_sound(self) -> None:
        """Raise a MergeError that lists what no difference can be taken of."""
        raise_all(
            MergeError,
            f"No ΔW can be taken between {shown(self.base.path)} and {shown(self.tuned.path)}:",
            [f"{printable(name, 300)}: {text}" for name, text in self.broken.items()],
            "give checkpoints of finite numbers that are not quantised.",
        )


def _copies(
    both: _Both,
    changed: Sequence[str],
    rest: str,
    renamed: Mapping[str, str],
    layers: Collection[str],
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
    names = {name: renamed.get(name, name) for name in both.tuned.shapes}
    whole = {names[n].rpartition(".")[0]: n for n in changed if not _is_bias(names[n])}
    raise_all(
        MergeError,
        "These are parameters of no module, or of one that is adapted, and cannot be kept as "
        "copies:",
        [printable(n, 300) for n in changed if "." not in n]
        + [printable(n, 300) for path, n in whole.items() if path in layers],
        'pass rest="report" to leave them out.',
    )
    copies: dict[str, dict[str, Tensor]] = {}
    for name, called in names.items():
        path, _, own = called.rpartition(".")
        if path in whole or name in changed:
            copies.setdefault(path, {})[f"{own}.trained"] = both.tuned.read(name).clone()
    return copies


def _is_bias(name: str) -> bool:
    """Tell biases, of attention and experts too: `in_proj_bias`, `bias_k`, `gate_up_proj_bias`."""
    return "bias" in name.removesuffix(".trained").rpartition(".")[2]


def _state(layers: Mapping[str, LayerState], base: str) -> State:
    heads = [
        path
        for path, layer in layers.items()
        if any(n.endswith(".trained") and not _is_bias(n) for n in layer.tensors)
    ]
    names = [n for layer in layers.values() for n in layer.tensors if n.endswith(".trained")]
    config = LoraConfig(
        modules_to_save=sorted(heads),
        bias="all" if any(map(_is_bias, names)) else "none",
        base_model_name_or_path=base,
    )
    return State(settings(config, layers), dict(sorted(layers.items())))
