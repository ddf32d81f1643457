"""A dry run: what a config would adapt in a model, changing nothing."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from deltaw.bypassing import reader_of
from deltaw.config import LoraConfig
from deltaw.errors import TargetError, raise_all
from deltaw.geometry import WEIGHT
from deltaw.heads import input_embedding, new_heads, output_head
from deltaw.layer import AdaptedLayer
from deltaw.layers import geometries, geometry_of
from deltaw.layers.experts import Experts
from deltaw.patterns import pattern_values, within
from deltaw.plans import Plan, Target, Tokens, Trained
from deltaw.quant import storage_of
from deltaw.remarks import leaving_out, lost_statistics, misfits
from deltaw.select import Modules, Selection, select
from deltaw.stacks import Stack, parameters_of, stacks_of
from deltaw.state import LayerState
from deltaw.swap import origin_of, seen_as
from deltaw.tables import tables_of, width
from deltaw.walking import walk


def plan(model: nn.Module, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Return what `config` would adapt in `model`, which may be on the meta device.

    Args:
        model: any module; one of transformers tells its heads by itself.
        config: the settings.
        strict: raise where an entry of the config matches nothing; otherwise put it in `warnings`.

    Raises:
        TargetError: listing every entry that matches nothing with the nearest names, every module
            that cannot be adapted with the reason, or that nothing is left to train.
    """
    layers = base_modules(model)
    paths = [path for path in layers if path]
    if not paths:
        raise TargetError(
            f"{type(model).__name__} holds no module, and an adapter goes on what a model holds.\n"
            "Fix: put it in one, as in model = torch.nn.Sequential(layer), and attach to that."
        )
    linear, left_out = _linear(layers, paths)
    selection = select(_modules(model, layers, paths, linear), config)
    if strict:
        raise_all(
            TargetError,
            f"These settings match nothing in {type(model).__name__}:",
            selection.misses,
            "correct the names; deltaw.plan or `deltaw inspect MODEL` shows what there is.",
        )
    problems: list[str] = []
    stacks = list(stacks_of(layers, selection, config))
    targets = [*_targets(layers, selection, config, problems), *map(_stacked, stacks)]
    trained = list(_trained(layers, selection, config))
    problems += [
        f"{row.path}: its weight is packed and cannot be trained in full"
        for row in trained
        if WEIGHT in row.names and storage_of(layers[row.path])
    ]
    taken = ", ".join(g.takes for g in geometries() if g.takes and "takes" in vars(g))
    raise_all(
        TargetError,
        "These modules cannot be adapted:",
        problems,
        f"name layers of a supported type ({taken}), or take these out with exclude_modules.",
    )
    tokens = [
        Tokens(path, tuple(ids), len(ids) * width(layers[path]))
        for path, ids in tables_of(layers, selection).items()
    ]
    if not targets and not tokens and not any(row.parameters for row in trained):
        raise TargetError(
            f"Nothing in {type(model).__name__} would be trained.\n"
            "Fix: give target_modules that name its layers."
        )
    _refuse_the_roots_own(model, trained)
    warnings = [f"{miss} matches nothing" for miss in selection.misses]
    warnings += misfits(targets, config)
    if config.target_modules == "all-linear":
        warnings += leaving_out(left_out)
    warnings += lost_statistics(layers, selection.heads)
    return Plan(config, tuple(targets), tuple(trained), tuple(warnings), tuple(tokens))


def _linear(
    layers: Mapping[str, nn.Module], paths: Sequence[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Return what `"all-linear"` takes, and the layers that it leaves out by the reason."""
    taken: list[str] = []
    left_out: dict[str, list[str]] = {}
    for path in paths:
        kind = getattr(geometry_of(layers[path]), "kind", "")
        if kind not in ("linear", "conv1d", "attention") or _attention_of(layers, path) is not None:
            continue
        if _is_odd(layers[path]):
            left_out.setdefault("they override forward", []).append(path)
        elif reader := reader_of(layers, path):
            reason = f"{reader} reads their weights past their forward"
            left_out.setdefault(reason, []).append(path)
        else:
            taken.append(path)
    return taken, left_out


def _modules(
    model: nn.Module, layers: Mapping[str, nn.Module], paths: list[str], linear: list[str]
) -> Modules:
    """Return what names of a config can mean in a model."""
    first = {id(module): path for path, module in layers.items()}
    everywhere = model.named_modules(remove_duplicate=False)
    return Modules(
        paths,
        linear,
        output_head(model),
        new_heads(model),
        {path: first[id(m)] for path, m in everywhere if first.get(id(m), path) != path},
        [f"{path}.{name}" for path in paths for name in parameters_of(layers[path])],
        input_embedding(model),
    )


def _stacked(stack: Stack) -> Target:
    return Target(
        stack.path,
        Experts.kind,
        (stack.name,),
        (stack.shape,),
        stack.r,
        stack.alpha,
        stack.scale,
        (),
        stack.r * sum(stack.shape) * max(stack.count, 1),
        stack.count,
    )


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the base model, its root under "", without what adapters brought."""
    return dict(walk(model))


def _targets(
    layers: dict[str, nn.Module], selection: Selection, config: LoraConfig, problems: list[str]
) -> Iterator[Target]:
    paths = selection.targets
    assert config.lora_alpha is not None
    ranks = pattern_values(config.rank_pattern, paths, config.r)
    alphas = pattern_values(config.alpha_pattern, paths, config.lora_alpha)
    assert not isinstance(config.enable_lora, Sequence)
    flags = pattern_values(config.enable_lora or {}, paths, ())
    for path, r, alpha, enabled in zip(paths, ranks, alphas, flags, strict=True):
        like = LayerState("", {}, enabled=tuple(enabled))
        reasons = refusals(layers, path, like)
        if reader := reader_of(layers, path):
            reasons.append(f"{reader} reads its weight past its forward, in some passes or all")
        if config.lora_bias and isinstance(layers[path], nn.Embedding):
            reasons.append("lora_bias has no meaning for an embedding")
        if reasons:
            problems += [f"{path}: {reason}" for reason in reasons]
            continue
        geometry = geometry_of(layers[path])
        assert geometry is not None
        layer = look(layers[path], geometry)
        slots = layer.slots(enabled)
        shapes = tuple(layer.shape(slot) for slot in slots)
        outputs = sum(out for out, _ in shapes)
        bias = outputs if config.lora_bias else 0
        magnitudes = outputs if config.use_dora else 0
        yield Target(
            path,
            layer.kind,
            slots,
            shapes,
            r,
            alpha,
            config.scale(r, alpha),
            like.enabled,
            sum(r * (out + into) for out, into in shapes) + bias + magnitudes,
        )


def _is_odd(layer: nn.Module) -> bool:
    """Tell whether a layer's class has a forward of its own that nobody vouches for."""
    geometry = geometry_of(layer)
    assert geometry is not None
    vouched = getattr(origin_of(layer), "applies_weight", False) or storage_of(layer)
    return not geometry.plain(layer) and not vouched


def look(module: nn.Module, geometry: type[AdaptedLayer]) -> AdaptedLayer:
    """Return `module` as it would be seen if it were adapted, without adapting it."""
    layer = seen_as(module, geometry)
    layer.storage = storage_of(module)
    return layer


def refusals(layers: Mapping[str, nn.Module], path: str, like: LayerState) -> list[str]:
    """Return the reasons why the module at `path` cannot get a low-rank ΔW as `like` asks."""
    layer = layers[path]
    geometry = geometry_of(layer, like)
    enabled = like.enabled
    if geometry is None:
        return [f"{origin_of(layer).__name__} is not a supported layer type"]
    attention = _attention_of(layers, path)
    if attention is not None:
        return [
            "MultiheadAttention reads this layer's weight past its forward; name the attention "
            f"itself{attention and f', {attention}'}, whose projections q, k, v and out are "
            "adapted, or with enable_lora=[False, False, False, True] for it out alone"
        ]
    reasons = geometry.refusals(layer)
    storage = storage_of(layer)
    if storage is not None and not reasons:
        reasons = storage.refusals(layer)
    if _is_odd(layer):
        reasons.append(
            f"{origin_of(layer).__name__} overrides forward; if it still applies its weight as "
            f"{geometry.takes} does, set `applies_weight = True` on the class"
        )
    if enabled and geometry.kind == "attention":
        if len(enabled) != 4:
            reasons.append(f"enable_lora marks q, k, v and out here, not {len(enabled)} slices")
    elif enabled and geometry.kind not in ("linear", "conv1d"):
        reasons.append("enable_lora is for linear layers and attention")
    elif enabled and not reasons:
        out, _ = look(layer, geometry).shape(WEIGHT)
        if out % len(enabled):
            reasons.append(f"its output of {out} does not divide into {len(enabled)} slices")
    return reasons


def _attention_of(layers: Mapping[str, nn.Module], path: str) -> str | None:
    """Return the path of the attention whose output projection is at `path`, if it is one."""
    parent = path.rpartition(".")[0]
    return parent if isinstance(layers.get(parent), nn.MultiheadAttention) else None


def _trained(
    layers: dict[str, nn.Module], selection: Selection, config: LoraConfig
) -> Iterator[Trained]:
    targets = {*selection.targets, *(name.rpartition(".")[0] for name in selection.parameters)}
    for path, module in layers.items():
        parameters = {n: p for n, p in module._parameters.items() if p is not None}
        buffers: dict[str, object] = {}
        if within(path, selection.heads) and path not in targets:
            kept = module._non_persistent_buffers_set
            buffers = {n: b for n, b in module._buffers.items() if b is not None and n not in kept}
        elif config.bias == "all" or (
            config.bias == "lora_only"
            and (path in targets or _attention_of(layers, path) in targets)
        ):
            parameters = {n: p for n, p in parameters.items() if "bias" in n}
        else:
            continue
        if parameters or buffers:
            count = sum(p.numel() for p in parameters.values())
            yield Trained(path, (*parameters, *buffers), count)


def _refuse_the_roots_own(model: nn.Module, trained: Sequence[Trained]) -> None:
    """Raise where parameters of the model itself would be trained, not of a module in it."""
    own = next((row.names for row in trained if not row.path), ())
    if own:
        raise TargetError(
            f'bias="all" would train {", ".join(own)}, which {type(model).__name__} itself holds, '
            "and an adapter goes on what a model holds.\n"
            'Fix: use bias="lora_only", or put the model in another module and attach to that.'
        )
