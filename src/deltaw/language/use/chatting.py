"""A conversation with a run in the terminal, with its adapters and with its base."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TextStreamer

import deltaw
from deltaw.errors import DeltawError, RunError
from deltaw.language.data.samples import Message
from deltaw.language.encoding.calling import as_data
from deltaw.language.generating import Sampling, generate
from deltaw.language.use.opened import OpenedLanguage, open_language
from deltaw.train.continuing import ADAPTER
from deltaw.train.escape import printable
from deltaw.train.methods import IN_PLACE
from deltaw.train.model import positions
from deltaw.train.runfolder import read_recipe
from deltaw.train.sandbox import Refused

HELP = """/adapter NAME   answer with this adapter from now on
/base           answer the last question with the base model, to compare
/system TEXT    begin the conversation anew with this system text
/reset          begin the conversation anew
/help           show this
/exit           end (or Ctrl-D)"""


class Shown(TextStreamer):  # type: ignore[misc]
    """Writes an answer as it comes, control characters spelt out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is known of the answer."""
        sys.stdout.write(escaped(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


def escaped(text: str) -> str:
    """Return `text` with everything invisible but line breaks spelt out."""
    return "".join(c if c == "\n" else printable(c) for c in text)


class Chat:
    """A conversation whose answers come from one of several adapters of one base.

    `names` maps what a person calls an adapter to what the model calls it. As much is remembered as
    the model has positions for, whatever length it was trained with.
    """

    def __init__(
        self, opened: OpenedLanguage, names: Mapping[str, str], sampling: Sampling, *, merge: bool
    ) -> None:
        room = positions(opened.model) or opened.encoder.max_length
        self.opened = replace(opened, encoder=replace(opened.encoder, max_length=room))
        self.names = names
        self.speaks = next(iter(names))
        self.sampling = sampling
        self.merge = merge
        self.how = "adapter beside the weights"
        self._merged = ExitStack()
        self.system: str | None = opened.recipe.default_system
        self.turns: list[Message] = []
        self.forgets = False

    def say(self, line: str) -> bool:
        """Answer a line, or do what it asks for; return whether the conversation goes on."""
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return False
        if not command.startswith("/"):
            self._answer(line.strip())
        elif command == "/reset":
            self._begin()
        elif command == "/system":
            self.system = rest.strip() or None
            self._begin()
        elif command == "/base":
            self._compare()
        elif command == "/adapter":
            self._switch(rest.strip())
        else:
            print(HELP)
        return True

    def _begin(self) -> None:
        self.turns, self.forgets = [], False

    def _answer(self, text: str) -> None:
        if not text:
            return
        turns = [*self.turns, Message("user", text)]
        answer = self._generated(turns)
        if answer is not None:
            self.turns = [*turns, Message("assistant", answer)]

    def _compare(self) -> None:
        if not self.turns:
            print("There is no question yet.")
        elif not self.opened.has_base:
            print("This run changed the base itself, so there is nothing to compare with.")
        else:
            with self._unmerged(), deltaw.disabled(self.opened.model):
                self._generated(self.turns[:-1])

    def _switch(self, name: str) -> None:
        if self.opened.recipe.method in IN_PLACE:
            print("This run changed the base itself: there is no adapter to switch.")
        elif name not in self.names:
            print(f"Adapters: {', '.join(map(printable, self.names))}.")
        elif name == self.speaks:
            print(f"{printable(name)} answers already.")
        else:
            with self._unmerged():
                deltaw.activate(self.opened.model, self.names[name])
                self.speaks = name
            print(f"{printable(name)} answers from now on, {self.how}.")

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Merge the adapter that answers while the block lasts, where that is possible."""
        self.how = self._merged.enter_context(self.opened.merged(self.merge))
        try:
            yield
        finally:
            self._merged.close()

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Take a merged adapter out of the weights while the block lasts."""
        self._merged.close()
        try:
            yield
        finally:
            self.how = self._merged.enter_context(self.opened.merged(self.merge))

    def _generated(self, turns: Sequence[Message]) -> str | None:
        try:
            text = self._prompt(turns)
        except Refused as error:
            print(f"The chat template refuses this: {error}")
            return None
        streamer = Shown(self.opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return generate(self.opened.speaker, [text], self.sampling, streamer)[0]

    def _prompt(self, turns: Sequence[Message]) -> str:
        """Return turns as text; the oldest questions go with their answers where it is too long."""
        system = () if self.system is None else (Message("system", self.system),)
        template, encoder = self.opened.template.template, self.opened.encoder
        while True:
            text, _ = template.render(as_data([*system, *turns], template), prompt=True)
            fits = encoder.fits(text, self.sampling.max_new_tokens)
            if not (fits or self.forgets):
                room = f"{encoder.max_length:,} tokens"
                print(f"The conversation has outgrown {room}: its beginning is forgotten.")
                self.forgets = True
            if fits or len(turns) < 3:
                return text
            turns = turns[2:]


def chat(
    folders: Sequence[Path],
    ask: Callable[[], str],
    *,
    sampling: Sampling,
    merge: bool = True,
    model: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Talk with a run until `ask` raises `EOFError`; further folders add adapters of its base.

    Raises:
        RunError: if a run cannot be opened, or runs have different bases.
        FormatError: if an adapter does not fit.
    """
    opened = open_language(folders[0], model=model, trust_remote_code=trust_remote_code)
    names = {folders[0].resolve().name: ADAPTER}
    for folder in folders[1:]:
        _add(opened, folder, names)
    talk = Chat(opened, names, sampling, merge=merge)
    with talk.merging():
        several = f"adapters {', '.join(map(printable, names))}, " * (len(names) > 1)
        print(f"{opened.shown}, {several}{talk.how}; /help shows what else can be typed.")
        torch.manual_seed(opened.recipe.seed)
        while True:
            try:
                if not talk.say(ask()):
                    return
            except EOFError:
                print()
                return
            except DeltawError as error:
                print(f"error: {error}")


def _add(opened: OpenedLanguage, folder: Path, names: dict[str, str]) -> None:
    """Put the adapter of another run of the same base beside the others."""
    shown = printable(str(folder), 300)
    record, own = read_recipe(folder).record or {}, opened.recipe.record or {}
    if not opened.has_base or record.get("base") != own.get("base"):
        raise RunError(f"{shown} has another base than {opened.shown}.\nFix: chat with it alone.")
    name = folder.resolve().name
    if name in names:
        raise RunError(f"Two adapters would be called {printable(name)}.\nFix: rename a folder.")
    names[name] = f"adapter_{len(names)}"
    deltaw.load(opened.model, folder, names[name])
    deltaw.activate(opened.model, ADAPTER)
