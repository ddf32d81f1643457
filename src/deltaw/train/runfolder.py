"""The folder of a run: who may write to it, what is in it, and whether it can be resumed.

RUN/
  adapter_config.json, adapter_model.safetensors   the adapter (PEFT's format), or a full model
  tokenizer files
  recipe.yaml                                      every setting, with versions and hashes
  results.json                                     the scores, written when the run is finished
  log.jsonl                                        everything that was shown
  training_loss.png                                the losses, where plot_loss asks for it
  answers.jsonl                                    what `deltaw eval --generate` was answered
  checkpoint-<step>/                               what resuming needs
  .lock                                            held by the process that trains
"""

import json
import os
import re
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ValidationError

from deltaw.errors import ConfigError, RunError, raise_all
from deltaw.train import staging, yamlfile
from deltaw.train.escape import printable
from deltaw.train.locking import LOCK, held
from deltaw.train.recipe import Recipe, filled, parse
from deltaw.train.saved import CHECKPOINT, checkpoints_in

RECIPE = "recipe.yaml"
RESULTS = "results.json"
LOG = "log.jsonl"
ANSWERS = "answers.jsonl"
WRITTEN = re.compile(
    r"recipe\.yaml|results\.json|training_loss\.png|(log|answers)\.jsonl"
    r"|deltaw\.json|adapter_config\.json|(adapter_model|deltaw_start)\.safetensors|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|(generation_)?config\.json|(tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|vocab\.(json|txt)|merges\.txt|chat_template\.jinja|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
"""Names of the files that a run writes; a tokenizer's are those of transformers."""
FREE = {
    "output",
    "name",
    "report_to",
    "plot_loss",
    "eval_on_each_dataset",
    "trust_remote_code",
    "record",
    "data",
    "watchdog",
    "fsdp",
}
"""Keys that may differ between a run and its resumption; the data are compared by their hashes."""


def default_path(recipe: Recipe) -> Path:
    """Return where a run goes: `output`, or `runs/<name>`, by default `<model>-<data>`."""
    if recipe.output is not None:
        return Path(recipe.output)
    data = Path(recipe.data)
    stem = data.name if data.is_dir() else data.stem
    return Path("runs") / (recipe.name or f"{_slug(Path(recipe.model).name)}-{_slug(stem)}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:60] or "run"


class RunFolder:
    """A run's folder, locked for this process while the `with` block lasts.

    Raises:
        RunError: on entry, if the folder holds other files than a run's, cannot be written, or
            another process holds it; nothing in it was touched then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = held(path, self._refuse_foreign)

    def __enter__(self) -> "RunFolder":
        self._held.__enter__()
        if self.started:
            staging.sweep(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    @property
    def shown(self) -> str:
        """The path, safe to print."""
        return printable(str(self.path), 300)

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return (self.path / RESULTS).is_file()

    @property
    def started(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RECIPE).is_file()

    def clear(self) -> None:
        """Delete the run in this folder, the marker of a finished run first, and nothing else."""
        (self.path / RESULTS).unlink(missing_ok=True)
        left = []
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and CHECKPOINT.fullmatch(path.name):
                staging.remove(path)
            elif path.is_file() and WRITTEN.fullmatch(path.name):
                path.unlink()
            elif path.name != LOCK:
                left.append(path.name)
        if left:
            warnings.warn(
                f"left in {self.shown}, because no run wrote it: {printable(', '.join(left), 300)}",
                stacklevel=2,
            )

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints, oldest first."""
        return list(checkpoints_in(self.path).values())

    def remove_checkpoints(self, after: int = -1) -> None:
        """Delete the checkpoints of later steps, by default all."""
        for step, path in checkpoints_in(self.path).items():
            if step > after:
                staging.remove(path)

    def refuse(self, recipe: Recipe, overwrite: bool) -> None:
        """Raise, touching nothing, if the run of `recipe` must not go here."""
        sources = [("model", recipe.model), ("data", recipe.data)]
        sources += [("adapter", path) for path in recipe.adapter or ()]
        raise_all(
            RunError,
            f"{self.shown} would become the run's folder, and what it is made from lies in there:",
            [
                f"{key} {printable(value, 300)}"
                for key, value in sources
                if os.path.exists(value)
                and Path(value).resolve().is_relative_to(self.path.resolve())
            ],
            "choose another folder with --output.",
        )
        try:
            if self.path.exists():
                self._refuse_foreign()
        except OSError as error:
            raise staging.cannot_write(self.path, error) from error
        if self.finished and not overwrite:
            raise RunError(
                f"{self.shown} holds a finished run.\n"
                "Fix: train into another folder with --output, or delete it with --overwrite."
            )

    def _refuse_foreign(self) -> None:
        """Raise if the folder holds files but no run of deltaw."""
        fix = "Fix: choose an empty or new folder with --output."
        if self.started:
            try:
                ours = read_recipe(self.path).record is not None
            except ConfigError as error:
                raise RunError(f"{self.shown} holds no readable run.\n{error}\n{fix}") from error
            if not ours:
                raise RunError(f"{self.shown} holds a {RECIPE} that no run wrote.\n{fix}")
            return
        begun = (LOCK, LOG, staging.PARTIAL + RECIPE)
        others = sorted(p.name for p in self.path.iterdir() if p.name not in begun)
        if others:
            raise RunError(
                f"{self.shown} holds other files ({printable(', '.join(others[:3]))}) and no run.\n"
                f"{fix}"
            )

    def write_recipe(self, recipe: Recipe) -> None:
        """Save the recipe and its record; `trust_remote_code` is never stored."""
        values = recipe.model_dump(exclude={"trust_remote_code"}, exclude_none=True)
        comment = "Train again: deltaw train recipe.yaml --output NEW_FOLDER"
        staging.write_text(self.path / RECIPE, yamlfile.write(values, comment))

    def write_results(self, results: dict[str, Any]) -> None:
        """Save the scores, which also marks the run as finished."""
        staging.write_text(
            self.path / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n"
        )

    def refuse_other(self, recipe: Recipe) -> None:
        """Raise if the run begun here had another recipe, other data or another base."""
        before = read_recipe(self.path)
        old, new = before.model_dump(exclude=FREE), recipe.model_dump(exclude=FREE)
        problems = [
            f"{key} was {printable(repr(old[key]))}, is now {printable(repr(new[key]))}"
            for key in new
            if old[key] != new[key]
        ]
        then, now = before.record or {}, recipe.record or {}
        if then.get("data") != now.get("data"):
            problems.append("the data changed since the run began (other hashes)")
        if then.get("base") != now.get("base"):
            problems.append("the base model's weights changed since the run began (other hash)")
        if then.get("adapters") != now.get("adapters"):
            problems.append("the adapters that the run began with changed since (other hashes)")
        if then.get("tokenizer") != now.get("tokenizer"):
            problems.append("the model's tokenizer changed since the run began (other hash)")
        if then.get("reading") not in (None, now.get("reading")):
            problems.append(
                "the chat template, or which columns are read as what, changed since the run began"
            )
        raise_all(
            RunError,
            f"{self.shown} holds a run from another recipe, which cannot be resumed with this one:",
            problems,
            "repeat the old settings, start over with --overwrite, or use another --output.",
        )


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run, choices filled in; what it says about remote code is ignored.

    Raises:
        RunError: if `folder` is not a run.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise RunError(
            f"{printable(str(folder), 300)} is not a run of deltaw: it has no {RECIPE}.\n"
            "Fix: give the folder that `deltaw train` wrote."
        )
    values = yamlfile.read(path)
    values.pop("trust_remote_code", None)
    return filled(parse(values, str(path), recorded=True), str(path))


class _Scores(BaseModel):
    values: dict[str, float]


class _Results(BaseModel):
    """What is read of the scores again."""

    before: _Scores | None
    after: _Scores | None


def read_results(folder: Path) -> dict[str, Any]:
    """Return the scores of a run, empty while it is not finished.

    Raises:
        RunError: if they are not what a run writes.
    """
    path = folder / RESULTS
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes()
        _Results.model_validate_json(text)
        results: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(
            f"{printable(str(path), 300)} is damaged: {_reason(error)}\n"
            "Fix: restore the file, or train again with --overwrite."
        ) from error
    return results


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return printable(str(error), 200)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return printable(f"{where}: {first['msg']}".removeprefix(": "), 200)
