"""What the model answers to held-out prompts before and while it is trained."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from deltaw.language.encoding.encoder import Row, samples_of
from deltaw.language.generating import Sampling, Speaker, generate
from deltaw.language.questions import asked
from deltaw.train.console import Console
from deltaw.train.escape import printable

ANSWER = Sampling(max_new_tokens=48)
SHOWN = 120


class Tries(TrainerCallback):  # type: ignore[misc]
    """Prints the answers to a few prompts at the beginning and after every evaluation."""

    def __init__(self, speaker: Speaker, rows: Sequence[Row], count: int, console: Console) -> None:
        self.speaker = speaker
        self.asked = [asked(speaker.encoder, sample) for sample in samples_of(rows)[:count]]
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what is answered before the first step, or where a run is resumed."""
        self._show(state.global_step, wanted=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what is answered now."""
        self._show(state.global_step)

    def _show(self, step: int, *, wanted: bool = False) -> None:
        if not self.asked:
            return
        answers = generate(self.speaker, [prompt for prompt, _, _ in self.asked], ANSWER)
        for (_, question, expected), answer in zip(self.asked, answers, strict=True):
            lines = [f"step {step:>5}  answer  {printable(answer, SHOWN)}"]
            if wanted:
                lines.insert(0, f"step {step:>5}  asked   {printable(question, SHOWN)}")
                lines.append(f"            wanted  {printable(expected, SHOWN)}")
            for line in lines:
                self.console.line(f"          {line}")
            self.console.record("sample", step=step, question=question, answer=answer)
