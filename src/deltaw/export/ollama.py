"""A folder that `ollama create` reads: a Modelfile beside a merged model or an adapter."""

import shlex
from typing import Any

from deltaw.errors import FormatError, printable
from deltaw.export import gguf, hf
from deltaw.export._model import is_language_model, load_config
from deltaw.export._modelfile import quoted, require_name
from deltaw.export._order import Order, Told
from deltaw.export._template import Chat, recognised
from deltaw.export._tokenizer import tokenizer_of
from deltaw.train import staging

CONVERTED = ("Llama", "Mistral", "Mixtral", "Gemma", "Gemma2", "Gemma3", "Phi3", "Qwen2", "Qwen3")
"""Beginnings of the names of architectures that Ollama is known to read from safetensors."""


def write(order: Order) -> Told:
    """Write a merged model as for `hf`, or with `ollama_base` a GGUF adapter, and the Modelfile.

    The chat template is written where it is translated exactly, and nothing in its place where it
    is not; Ollama then takes what it knows of the base.

    Raises:
        ConfigError: if `ollama_base` is no name, or a text cannot stand in a Modelfile.
        FormatError: if it is no adapter of a language model, or the GGUF file cannot hold it.
        RunError, MergeError: as for `hf`.

    Source: Ollama, its Modelfile.
    """
    source = order.source
    config = load_config(source)
    if not is_language_model(source, config):
        raise FormatError(
            "Ollama runs language models, and this adapter is for another kind.\n"
            "Fix: export it with --to hf."
        )
    if order.ollama_base is not None:
        lines = [f"FROM {require_name(order.ollama_base)}", f"ADAPTER ./{gguf.FILE}"]
        layers, r = gguf.write_file(order, order.folder / gguf.FILE)
        told = {"written": f"Modelfile and {gguf.FILE}: {layers} layers, rank {r}"}
    else:
        lines = ["FROM ."]
        told = hf.write(order)
        told["written"] = f"Modelfile and {told['written']}"
    tokenizer = tokenizer_of(source)
    chat = recognised(tokenizer) if tokenizer is not None else "there is no tokenizer"
    if isinstance(chat, Chat):
        told["template"] = f"{chat.family}, translated"
    else:
        told["template"] = f"none: {chat}"
    lines += _spoken(chat, tokenizer)
    if order.ollama_base is None and not _converted(config):
        told["warning"] = (
            f"Ollama may not read {printable(config.model_type)} from safetensors; convert it with "
            "llama.cpp's convert_hf_to_gguf.py and name that file behind FROM"
        )
    staging.write_text(order.folder / "Modelfile", "\n".join(lines) + "\n")
    told.pop("next", None)
    file = shlex.quote(str(order.out / "Modelfile"))
    return told | {"next": f"ollama create NAME -f {file}"}


def _spoken(chat: Chat | str, tokenizer: Any) -> list[str]:
    """Return the lines for the template and the tokens to stop at."""
    lines, stops = [], []
    if isinstance(chat, Chat):
        lines.append(f"TEMPLATE {quoted(chat.go)}")
        stops += chat.after["assistant"].strip().splitlines()[:1]
    if tokenizer is not None and tokenizer.eos_token:
        stops.append(tokenizer.eos_token)
    return lines + [f"PARAMETER stop {quoted(stop)}" for stop in dict.fromkeys(stops)]


def _converted(config: Any) -> bool:
    known = {f"{name}ForCausalLM" for name in CONVERTED}
    return bool(known.intersection(config.architectures or ()))
