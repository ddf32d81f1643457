"""What a plan warns of: settings with another effect than was meant, and what no file keeps."""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from deltaw.config import LoraConfig
from deltaw.patterns import within
from deltaw.plans import Target
from deltaw.summarizing import shorten_groups


def misfits(targets: Sequence[Target], config: LoraConfig) -> list[str]:
    """Return the warnings about settings that have no effect, or not the one asked for."""
    found = []
    high: dict[tuple[int, int], list[str]] = {}
    for t in targets:
        limit = min(min(shape) for shape in t.shapes)
        if t.r > limit:
            high.setdefault((t.r, limit), []).append(t.name.rpartition(".")[2])
    if high:
        count = sum(map(len, high.values()))
        parts = [
            f"r={r} is above {limit} in {', '.join(dict.fromkeys(names))}"
            for (r, limit), names in high.items()
        ]
        found.append(
            f"in {count} layer{'s' * (count > 1)} ΔW cannot have the rank asked for: "
            f"{'; '.join(parts)}"
        )
    transposed = {target.kind == "conv1d" for target in targets}
    if config.fan_in_fan_out and transposed != {True}:
        found.append("fan_in_fan_out=True has no effect: the layers here store (out, in)")
    if config.use_dora and config.lora_bias:
        found.append("use_dora with lora_bias: PEFT refuses the file, which deltaw alone loads")
    return found


def lost_statistics(layers: Mapping[str, nn.Module], heads: Sequence[str]) -> Iterator[str]:
    """Yield the warning about modules that training changes and of which no file has anything."""
    found = [
        path
        for path, module in layers.items()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        and module.running_mean is not None
        and not within(path, heads)
    ]
    if found:
        yield (
            "running statistics change in training and are in no file of the adapter: keep these "
            "modules in .eval(), or name them in modules_to_save: "
            + ", ".join(shorten_groups(tuple(found)))
        )


def leaving_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the warnings about linear layers that `"all-linear"` leaves out, by the reason."""
    return [
        f"left out, for {reason}: {', '.join(shorten_groups(tuple(paths)))}"
        for reason, paths in left_out.items()
    ]
