"""A run that trained a language model's own weights is a plain model, copied and checked."""

from pathlib import Path
from typing import Any

import transformers

from deltaw.errors import RunError, printable
from deltaw.export._order import Told
from deltaw.export._probing import agreement, answers, largest, probe_tokens, rms
from deltaw.export._source import require_finished, require_new
from deltaw.train import staging
from deltaw.train.export import tolerance
from deltaw.train.model import LOADING, cannot_load, quiet, save_tokenizer
from deltaw.unpacking import usual_dtype


def copy_run(run: Path, out: Path, *, trust_remote_code: bool = False) -> Told:
    """Write the model that a run trained in place to the new folder `out`; return what to tell.

    Raises:
        RunError: if the run is not finished, its model cannot be loaded, `out` is not empty, or the
            copy answers probe tokens otherwise.
    """
    require_new(out)
    require_finished(run)
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(run, **where)
            kind: Any = transformers.AutoModelForCausalLM
            if config.is_encoder_decoder:
                kind = transformers.AutoModelForSeq2SeqLM
            model = kind.from_pretrained(run, dtype="auto", **where).eval()
            tokenizer = transformers.AutoTokenizer.from_pretrained(run, **where)
    except LOADING as error:
        wanted = "AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        raise cannot_load(str(run), error, wanted) from error
    tokens = probe_tokens(config)
    before = answers(model, tokens)
    with quiet(), staging.staged(out) as partial:
        model.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        copy = kind.from_pretrained(partial, dtype="auto", **where).eval()
        difference, size = largest(answers(copy, tokens), before), rms(before)
        if not difference <= tolerance(usual_dtype(copy)) * max(1.0, size):
            raise RunError(
                f"The copy's answers differ from the run's by up to {difference:.2e}; nothing was "
                f"written.\nFix: use {printable(str(run), 300)} as it is."
            )
    return {
        "checked": agreement(difference, tokens, size),
        "next": f"transformers.{type(copy).__name__}.from_pretrained({str(out)!r})",
    }
