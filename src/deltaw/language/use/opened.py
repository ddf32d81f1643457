"""A finished run of a language model, loaded again from its folder alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from deltaw.errors import FormatError, RunError
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import Chosen, choose
from deltaw.language.generating import Speaker
from deltaw.language.loading import load
from deltaw.language.merged import merged
from deltaw.language.reading import encoder_of
from deltaw.train.escape import printable
from deltaw.train.identity import find_base, require_base, require_tokenizer
from deltaw.train.methods import IN_PLACE, restore
from deltaw.train.model import load_tokenizer
from deltaw.train.placing import place
from deltaw.train.recipe import Recipe
from deltaw.train.runfolder import read_recipe, read_results


@dataclass(frozen=True)
class OpenedLanguage:
    """The model of a run with its adapter on, ready to answer."""

    folder: Path
    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    template: Chosen
    encoder: Encoder

    @property
    def shown(self) -> str:
        """The folder, safe to print."""
        return printable(str(self.folder), 300)

    @property
    def speaker(self) -> Speaker:
        """What answers."""
        return Speaker(self.model, self.tokenizer, self.encoder)

    @property
    def has_base(self) -> bool:
        """Whether the base's own answers can be had from the same model."""
        return self.recipe.method not in IN_PLACE and not self.recipe.absorb

    @contextmanager
    def merged(self, merge: bool = True) -> Iterator[str]:
        """Merge the adapter while the block lasts, where that is possible; yield what was done."""
        with merged(self.model, self.recipe, merge) as done:
            yield done


def open_language(
    folder: Path, *, model: str | None = None, trust_remote_code: bool = False
) -> OpenedLanguage:
    """Load the base that the run names (or `model`) and put the run's adapter on it.

    Raises:
        RunError: if the folder is not a finished run of a language model, or its base or tokenizer
            cannot be loaded or is another.
        FormatError: if the adapter's file is damaged or does not fit the base.
    """
    recipe = read_recipe(folder).model_copy(update={"trust_remote_code": trust_remote_code})
    shown = printable(str(folder), 300)
    if not recipe.is_language:
        raise RunError(f"The run in {shown} is no language model's.\nFix: use deltaw predict.")
    if not read_results(folder):
        raise RunError(
            f"The run in {shown} is not finished.\n"
            "Fix: give the same `deltaw train` command again; it resumes."
        )
    in_place = recipe.method in IN_PLACE
    source = str(folder) if in_place else find_base(recipe, model)
    loaded = load(recipe.model_copy(update={"revision": None}) if in_place else recipe, source)
    base = loaded.model
    tokenizer = load_tokenizer(str(folder), base.config, trust_remote_code=trust_remote_code)
    require_tokenizer(tokenizer, folder, recipe)
    if not in_place:
        require_base(base, source, recipe)
        try:
            restore(base, recipe, folder)
        except FormatError as error:
            raise FormatError(
                f"{error}\nFix: restore the run's files, or train again with --overwrite."
            ) from error
    place(base).eval()
    template = choose(tokenizer, None, system=recipe.default_system)
    encoder = encoder_of(recipe, tokenizer, template, base)
    return OpenedLanguage(folder, recipe, base, tokenizer, template, encoder)
