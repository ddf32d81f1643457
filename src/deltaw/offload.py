"""What accelerate's hooks keep of a module: the device it runs on and the values it offloaded."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_BEYOND_PROPERTY = 3


def device_of(module: nn.Module) -> torch.device:
    """Return where an adapter of `module` belongs: with its tensors, or where its hook runs it."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    device = next((tensor.device for tensor in tensors if tensor is not None), None)
    if device is None or device.type == "meta":
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return device or torch.device("cpu")


def stored(module: nn.Module, name: str) -> Tensor:
    """Return a parameter or buffer of `module`, read from where it is offloaded to.

    On the meta device it stays where no hook of the module holds its values.
    """
    tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert tensor is not None
    if tensor.is_meta:
        for hook in _hooks(module):
            if hook.offload:
                value: Tensor = hook.weights_map[name]
                return value.to(tensor.dtype)
    return tensor


def loaded_as_one(model: nn.Module) -> list[str]:
    """Return the modules inside which all offloaded tensors are loaded at once, by their names."""
    return [
        path
        for path, module in model.named_modules()
        for hook in _hooks(module)
        if hook.offload and hook.place_submodules
    ]


def is_placing() -> bool:
    """Tell, from within the getter of a property, whether accelerate is what reads it.

    It takes attributes of a module for the stored tensors when it moves these between devices.
    """
    return sys._getframe(_BEYOND_PROPERTY).f_code.co_name == "set_module_tensor_to_device"


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that place tensors, of which a module has one or a sequence."""
    hook: Any = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if type(one).__name__ == "AlignDevicesHook":
            yield one


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, without importing what defines it, which takes long."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
