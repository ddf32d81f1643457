"""Low-rank adaptation of PyTorch models: train, merge, combine and reload ΔW."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoraConfig": "config",
    "State": "state",
    "LayerState": "state",
    "DeltawError": "errors",
    "attach": "attaching",
    "detach": "attaching",
    "activate": "switching",
    "active": "switching",
    "configs": "switching",
    "dequantize": "dequantizing",
    "disabled": "switching",
    "capture": "capturing",
    "fuse_blocks": "blocks",
    "fuse_loss": "fusing",
    "load": "loading",
    "merge": "merging",
    "measure_merge": "measuring",
    "merged": "merging",
    "unmerge": "merging",
    "plan": "planning",
    "prepare_quantized": "quantizing",
    "quantize": "quantizing",
    "rows": "mixing",
    "save": "saving",
    "summary": "summarizing",
    "verify": "verifying",
}

__all__ = [
    "DeltawError",
    "LayerState",
    "LoraConfig",
    "State",
    "__version__",
    "activate",
    "active",
    "attach",
    "capture",
    "configs",
    "dequantize",
    "detach",
    "disabled",
    "fuse_blocks",
    "fuse_loss",
    "load",
    "measure_merge",
    "merge",
    "merged",
    "plan",
    "prepare_quantized",
    "quantize",
    "rows",
    "save",
    "summary",
    "unmerge",
    "verify",
]

if TYPE_CHECKING:
    from deltaw import combine as combine
    from deltaw.attaching import attach, detach
    from deltaw.blocks import fuse_blocks
    from deltaw.capturing import capture
    from deltaw.config import LoraConfig
    from deltaw.dequantizing import dequantize
    from deltaw.errors import DeltawError
    from deltaw.fusing import fuse_loss
    from deltaw.loading import load
    from deltaw.measuring import measure_merge
    from deltaw.merging import merge, merged, unmerge
    from deltaw.mixing import rows
    from deltaw.planning import plan
    from deltaw.quantizing import prepare_quantized, quantize
    from deltaw.saving import save
    from deltaw.state import LayerState, State
    from deltaw.summarizing import summary
    from deltaw.switching import activate, active, configs, disabled
    from deltaw.verifying import verify


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used, so that `import deltaw` costs nothing."""
    if name == "combine":
        return importlib.import_module("deltaw.combine")
    if name not in _HOME:
        raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"deltaw.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*__all__, "combine"])
