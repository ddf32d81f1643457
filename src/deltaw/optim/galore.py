"""GaLore: full fine-tuning with Adam's moments in a subspace of each weight's gradient.

With P (n, r) the leading singular vectors of the gradient G (m, n), taken anew every T steps:

    R = G P,  N = Adam(R),  W <- W - lr (s N Pᵀ + decay W)

so that a matrix keeps n r + 2 m r numbers instead of 2 m n; for m < n the same from the left. All
other parameters are trained by plain AdamW. `layerwise=True` updates each weight in the backward
pass, as soon as its gradient is known, and frees the gradient.

    optimizer = GaLoreAdamW(galore.groups(model, rank=128), lr=1e-2)

Source: arXiv 2403.03507, algorithm 2, with its per-layer weight updates. Group keys, defaults and
`proj_type` are those of the authors' galore-torch 1.0. We differ: P comes from a random sketch,
unless `exact_svd` asks for the full SVD of cost m n min(m, n); ε is added after the bias correction
as in the paper, and weights decay before the step, as in `torch.optim.AdamW`, whose defaults hold;
a layer-wise optimiser is one optimiser, which schedulers and checkpoints know. `proj_type="full"`,
with P on both sides, is left out.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from deltaw.adapter import Adapter
from deltaw.config import LoraConfig
from deltaw.errors import ConfigError, StateError, TargetError, raise_all
from deltaw.heads import new_heads, output_head
from deltaw.optim import Group, _moments, decays, grouped
from deltaw.optim._checks import problems_of
from deltaw.optim._subspace import basis, is_left
from deltaw.patterns import within
from deltaw.select import Modules, select
from deltaw.walking import walk

RANK = 128
UPDATE_PROJ_GAP = 200
SCALE = 0.25

_in_backward: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The parameters that are updated in the backward pass, with the handle of the hook that does."""


def groups(
    model: nn.Module,
    rank: int = RANK,
    update_proj_gap: int = UPDATE_PROJ_GAP,
    scale: float = SCALE,
    proj_type: str = "std",
    target_modules: str | Sequence[str] = "all-linear",
    *,
    exact_svd: bool = False,
    optim_bits: int = 32,
) -> list[Group]:
    """Return parameter groups for `GaLoreAdamW`: the matrices that are projected, and the rest.

    Vectors have a weight decay of 0, matrices that of the optimiser.

    Args:
        model: a model without trainable adapters.
        rank: r, how many directions of a gradient are kept.
        update_proj_gap: T, the steps between two refreshes of P.
        scale: s. It and the learning rate act as one factor on projected weights: 0.25 at a rate
            of 0.01 for training from scratch; up to 4 at AdamW's rate for fine-tuning.
        proj_type: the side that is projected: `"std"` is the shorter one, `"reverse_std"` the
            longer, `"right"` the columns, `"left"` the rows.
        target_modules: whose matrices are projected, as in `LoraConfig`; `"all-linear"` takes all
            but embeddings and output heads.
        exact_svd: take P from the full SVD.
        optim_bits: 32 keeps the moments of projected weights in the dtype of the weight, 8 keeps
            them in bytes, by bitsandbytes.

    Raises:
        StateError: if a trainable parameter belongs to an adapter.
        TargetError: if a name matches nothing, or no matrix is larger than the rank.
    """
    chosen = set(projected(model, rank, target_modules))
    settings = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "scale": scale,
        "proj_type": proj_type,
        "exact_svd": exact_svd,
        "optim_bits": optim_bits,
    }
    still = {"weight_decay": 0.0}

    def options(name: str, parameter: nn.Parameter) -> Group:
        if parameter in chosen:
            return settings
        return {} if decays(name, parameter) else still

    return grouped(model, options)


def projected(
    model: nn.Module, rank: int, target_modules: str | Sequence[str] = "all-linear"
) -> list[nn.Parameter]:
    """Return the trainable matrices of the targets of which both sides are longer than `rank`.

    Raises what `groups` does.
    """
    adapters = [path for path, module in model.named_modules() if isinstance(module, Adapter)]
    raise_all(
        StateError,
        "GaLore trains a model's own weights, and these belong to adapters:",
        [n for n, p in model.named_parameters() if p.requires_grad and within(n, adapters)],
        "train adapters by AdamW or LoRA+, or call deltaw.detach for full fine-tuning.",
    )
    own = {
        path: [p for p in module.parameters(recurse=False) if p.requires_grad and p.ndim == 2]
        for path, module in walk(model)
        if not isinstance(module, nn.Embedding)
    }
    linear = [path for path, matrices in own.items() if matrices]
    everything = [path for path, _ in walk(model)]
    modules = Modules(everything, linear, output_head(model), new_heads(model), {})
    selection = select(modules, LoraConfig(target_modules=target_modules))
    raise_all(
        TargetError,
        f"These settings match nothing in {type(model).__name__}:",
        selection.misses,
        "use the names of its modules, or all-linear.",
    )
    if not any(own[path] for path in own if within(path, selection.targets)):
        raise TargetError(
            "No matrix of the targets is trained: they are frozen, or packed in a few bits.\n"
            "Fix: unfreeze them (requires_grad_) in a model that is not packed, or name others."
        )
    tables = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found = [
        matrix
        for path, matrices in own.items()
        if within(path, selection.targets)
        for matrix in matrices
        if matrix not in tables and min(matrix.shape) > rank
    ]
    if not found:
        raise TargetError(
            f"No trained matrix of the targets has both sides above rank={rank}, so GaLore would "
            "save nothing.\nFix: use a lower rank, other targets, or AdamW."
        )
    return list(dict.fromkeys(found))


class GaLoreAdamW(Optimizer):
    """AdamW that sees a group with a `rank` through the leading directions of its gradients.

    Args:
        params: groups as `groups` returns them, or written for galore-torch. A group without
            `rank`, and parameters that are given alone, are trained as by `torch.optim.AdamW`.
        lr, betas, eps, weight_decay: those of `torch.optim.AdamW`.
        layerwise: update each parameter when the backward pass has its gradient, and free that.
            `step` then has nothing left to do. Gradients cannot be accumulated over several passes
            nor clipped by their common norm, and one process alone may train. `close` undoes it.

    Raises:
        ConfigError: listing every setting that is out of range and every parameter of a group with
            a rank that is no matrix; for 8 bits without bitsandbytes.
        StateError: for `layerwise` in several processes, or on a parameter that another optimiser
            updates in the backward pass; in a step, for a sparse gradient, or one with NaN or Inf
            that P would be taken from.
    """

    _layerwise = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        layerwise: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": None,
            "update_proj_gap": UPDATE_PROJ_GAP,
            "scale": SCALE,
            "proj_type": "std",
            "exact_svd": False,
            "optim_bits": 32,
        }
        super().__init__(params, defaults)
        if layerwise:
            self._update_in_backward(range(len(self.param_groups)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked as the first ones are."""
        super().add_param_group(param_group)
        problems = problems_of(self.param_groups[-1])
        if problems:
            self.param_groups.pop()
            raise_all(ConfigError, "GaLoreAdamW cannot be used:", problems)
        if self._layerwise:
            self._update_in_backward([len(self.param_groups) - 1])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly from what `state_dict` returned, each tensor in the dtype it had."""
        super().load_state_dict(state_dict)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):  # torch gave it the dtype of the parameter
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    def close(self) -> None:
        """Leave the backward pass alone from now on; `step` updates all parameters."""
        if self._layerwise:
            for parameter in self._parameters():
                if parameter in _in_backward:
                    _in_backward[parameter].remove()
                    del _in_backward[parameter]
        self._layerwise = False

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _update_in_backward(self, numbers: Iterable[int]) -> None:
        """Update the parameters of some groups as soon as each has its gradient, and free that."""
        places = [
            (parameter, number)
            for number in numbers
            for parameter in self.param_groups[number]["params"]
            if parameter.requires_grad
        ]
        if _processes() > 1:
            raise StateError(
                "A layer-wise update sees the gradient of its own process alone.\n"
                "Fix: leave layerwise out, or train in one process."
            )
        if any(parameter in _in_backward for parameter, _ in places):
            raise StateError(
                "Another optimiser updates these parameters in the backward pass already.\n"
                "Fix: call its close() first."
            )
        for parameter, number in places:
            hook = functools.partial(self._update_and_free, number)
            _in_backward[parameter] = parameter.register_post_accumulate_grad_hook(hook)
        self._layerwise = True

    def _update_and_free(self, number: int, parameter: Tensor) -> None:
        self._update(parameter, self.param_groups[number])
        parameter.grad = None

    @torch.no_grad()
    def _update(self, W: Tensor, group: Group) -> None:
        G, state = W.grad, self.state[W]
        assert G is not None
        if G.is_sparse:
            raise StateError(
                f"A weight {tuple(W.shape)} has a sparse gradient, which Adam cannot take.\n"
                "Fix: build its embedding with sparse=False."
            )
        P, left = None, False
        if group["rank"] is not None:
            left = is_left(G.shape, group["proj_type"])
            P = _projector(state, G, group, left)
            G = P.T @ G if left else G @ P
        state["step"] = state.get("step", 0) + 1
        m, denominator = _moments.update(
            state, G, group["betas"], group["eps"], group["optim_bits"]
        )
        size = -group["lr"] / (1 - group["betas"][0] ** state["step"])
        W.mul_(1 - group["lr"] * group["weight_decay"])
        if P is None:
            W.addcdiv_(m, denominator, value=size)
        else:
            N = (m / denominator).to(W.dtype)
            W.addmm_(*((P, N) if left else (N, P.T)), alpha=size * group["scale"])


def _projector(state: dict[str, Any], G: Tensor, group: Group, left: bool) -> Tensor:
    """Return P, taken anew every `update_proj_gap` steps."""
    done = state.get("step", 0)
    if done % group["update_proj_gap"] == 0:
        state["projector"] = basis(G, group["rank"], left=left, exact=group["exact_svd"], seed=done)
    P: Tensor = state["projector"]
    return P


def _processes() -> int:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if several else 1
