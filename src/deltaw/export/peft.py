"""PEFT's adapter folder, with the tokenizer beside it."""

from deltaw.export._order import Order, Told
from deltaw.export._tokenizer import add_tokenizer
from deltaw.formats import peft


def write(order: Order) -> Told:
    """Write `adapter_config.json`, `adapter_model.safetensors` and the tokenizer's files.

    The base's name and revision on the hub are written, the path of a local one is not.

    Raises:
        FormatError: listing all that PEFT's format cannot hold.

    Source: Hugging Face PEFT.
    """
    source, config = order.source, order.source.state.config
    peft.write(source.state, order.folder)
    told = {"written": f"an adapter of PEFT's, r={config.r} lora_alpha={config.lora_alpha:g}"}
    told |= add_tokenizer(source, order.folder)
    return told | {"next": f"peft.PeftModel.from_pretrained(base, {str(order.out)!r})"}
