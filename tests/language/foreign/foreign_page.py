"""Writes docs/llamafactory.md from the table of keys.

Run it as `python -m tests.language.foreign.foreign_page`.
"""

from collections.abc import Iterable
from pathlib import Path

from deltaw.language.foreign.llamafactory import DEFAULTS, TOOL
from deltaw.language.foreign.tool import Effect, Ignored, Joint, Refused

HEAD = """\
# Files of LLaMA-Factory

    deltaw train llama_factory.yaml

takes the file that `llamafactory-cli train` takes, for `stage: sft`, `pt`, `dpo` or `kto` and
`finetuning_type: lora`, `full` or `freeze`. The receipt says how it was read; `--dry-run` shows the
recipe and trains nothing. `key=value` behind the file changes a setting, in either spelling:
`lora_rank=16` or `r=16`. Keys of a recipe that LLaMA-Factory does not have, such as `too_long`, may
stand in the file too.

Where the file says nothing, LLaMA-Factory's default holds and not deltaw's: {defaults},
`epochs: 3.0`. A key that would change what is learnt and is not done here is an error; all of them
come in one message.

What differs:

- `per_device_train_batch_size` is of each process, as there, and a run records `batch_size`, which
  is that of all. To go on with a run on another number of processes, give that `batch_size` behind
  the file. `stage: kto` is for one process.
- `deepspeed` names the file beside the YAML, or in the working directory. DeepSpeed itself is not
  used: stage 3 is `fsdp: true`, and below it each process holds all that it would share out.
- `save_only_model` changes nothing: checkpoints are what an interrupted run goes on from, and none
  is kept once it is finished.
- `warmup_stable_decay` with one of `num_stable_steps` and `num_decay_steps` has the rest for the
  other; there the other is a share of the steps.
- `max_samples` are drawn by the seed; LLaMA-Factory takes the first ones.
- `adapter_name_or_path: a,b` is there the sum of base, a and b, and what is saved is b alone, which
  needs base and a. Here it is the sum of a and b, an adapter of the base: give that one folder to
  what comes next. An adapter of deltaw's must be one of this base; `finetuning_type: full` and
  `freeze` merge adapters first.
- Packed documents never see each other, whether `packing` or `neat_packing` asks for it.
- `overwrite_output_dir` deletes nothing. An interrupted run is resumed by the same command, and
  `--overwrite` starts anew.
- With `finetuning_type: freeze` an output head that is not tied to the embeddings is trained too.
- With `stage: kto` a batch of good and bad answers stays together in all epochs, and pairs are read
  as good and bad answers.
- `template` may be left out: the tokenizer's own is used then.
- `template: qwen3` drops the thoughts of answers before the last question, as Qwen3's own does;
  such an answer cannot be learnt, and `train_on: last` leaves it out. `qwen3_nothink` writes none.
- `enable_thinking: false` leaves thoughts out of answers, as there, and it is said of how many; a
  row of whose answer nothing else is left is skipped and listed.
- Rows longer than `cutoff_len` keep their beginning, and are left out where no answer is in it;
  there prompt and answer are both cut, in proportion.
- `warmup_ratio` of the steps is rounded to the nearest step; there it is rounded up.

Files of axolotl, mlx-lm and TRL are read in the same way.
"""


def page() -> str:
    """The text of the page."""
    defaults = ", ".join(f"`{key}: {str(v).lower()}`" for key, v in DEFAULTS.items())
    effects = [
        (key, f"`{fate.key}`" if isinstance(fate, Effect) else fate.means)
        for key, fate in TOOL.keys.items()
        if isinstance(fate, Effect | Joint)
    ]
    ignored = [(key, fate.why) for key, fate in TOOL.keys.items() if isinstance(fate, Ignored)]
    refused = [
        (key, ", ".join(_shown(v) for v in fate.harmless) or "only null", fate.instead)
        for key, fate in TOOL.keys.items()
        if isinstance(fate, Refused)
    ]
    parts = [
        HEAD.format(defaults=defaults),
        "## Takes effect\n\n" + _table(("key", "becomes"), effects),
        "## Ignored, because it does not change what is learnt\n\n"
        + _table(("key", "what it is about"), ignored),
        "## Refused\n\n" + _table(("key", "accepted as", "instead"), refused),
    ]
    return "\n".join(parts)


def _shown(value: object) -> str:
    return f"`{str(value).lower()}`" if str(value) else "empty"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *((f"`{key}`", *rest) for key, *rest in sorted(rows))]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    (Path(__file__).parents[3] / "docs" / "llamafactory.md").write_text(page(), "utf-8")
