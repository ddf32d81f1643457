"""The main job: from a recipe to a trained, evaluated and reloadable adapter."""

import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

import deltaw
from deltaw.errors import DivergedError
from deltaw.train import continuing, staging
from deltaw.train.checkpoint import read_state, restore
from deltaw.train.console import Console
from deltaw.train.data import wording
from deltaw.train.distributed import processes
from deltaw.train.distributed.followed import FollowedFolder
from deltaw.train.distributed.sharding import weights, whole
from deltaw.train.escape import printable
from deltaw.train.guarding.guarded import rolled_back
from deltaw.train.interrupt import Interrupt, Stopped
from deltaw.train.job import Job
from deltaw.train.loop import Pace, RecipeTrainer, is_done
from deltaw.train.methods import IN_PLACE
from deltaw.train.metrics import Score
from deltaw.train.model import quiet, save_tokenizer, size_on_disk
from deltaw.train.placing import memory_said
from deltaw.train.plotting import PICTURE, plot_losses
from deltaw.train.prepare import prepare
from deltaw.train.progress import ProgressBar, duration
from deltaw.train.receipt import show_job, show_recipe
from deltaw.train.recipe import Recipe, filled
from deltaw.train.runfolder import LOG, RunFolder, default_path, read_recipe
from deltaw.train.scores import table


def train(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    overwrite: bool = False,
    silent: bool = False,
    scored: Collection[str] = ("before", "after"),
    prepare: Callable[[Recipe, Console], Job] = prepare,
) -> Path:
    """Train, evaluate and save what the recipe says; return the run's folder.

    A run that was interrupted in the same folder is resumed. `dry_run` stops after the receipt and
    writes nothing. `overwrite` deletes the run that is in the folder. `silent` prints nothing.
    `scored` says when the held-out rows are scored, `prepare` makes the job of this kind of
    training.

    Raises:
        DeltawError: whatever is wrong, before anything is written.
        Stopped: on Ctrl-C or SIGTERM, with a checkpoint once training had begun.
    """
    console = Console(silent=silent or not processes.first())
    path = default_path(recipe)
    if processes.shared_out():
        recipe = recipe.model_copy(update={"fsdp": True})
    with processes.together(), Interrupt() as interrupt, quiet(), memory_said():
        if dry_run:
            with rehearsal(recipe, prepare, console, interrupt, overwrite) as (job, _):
                show_recipe(job.recipe, console)
            return path
        with RunFolder(path) if processes.first() else FollowedFolder(path) as folder:
            folder.refuse(recipe, overwrite)
            job = prepare(recipe, console)
            recorded = filled(job.recipe)
            if overwrite:
                folder.clear()
            if folder.started:
                folder.refuse_other(recorded)
            run = _Run(job, folder, console, interrupt, scored)
            console.log_to(path / LOG if processes.first() else Path(os.devnull))
            run.finish()
    return path


@contextmanager
def rehearsal(
    recipe: Recipe,
    prepare: Callable[[Recipe, Console], Job],
    console: Console,
    interrupt: Interrupt,
    overwrite: bool = False,
) -> Iterator[tuple[Job, RecipeTrainer]]:
    """Show the receipt of a run, and yield it and its trainer; what these write is thrown away.

    Raises:
        DeltawError: whatever the run would be refused for.
    """
    folder = RunFolder(default_path(recipe))
    folder.refuse(recipe, overwrite)
    job = prepare(recipe, console)
    if folder.started and not overwrite:
        folder.refuse_other(filled(job.recipe))
    with TemporaryDirectory() as scratch, memory_said():
        trainer = job.trainer(Path(scratch), interrupt, make_progress(job, console))
        verified = verify(job, trainer)
        show_job(console, job, f"{folder.shown} (not written: dry run)", verified)
        yield job, trainer


class _Run:
    """One pass through the job inside a locked folder."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        console: Console,
        interrupt: Interrupt,
        scored: Collection[str],
    ) -> None:
        self.job = job
        self.scored = scored
        self.folder = folder
        self.console = console
        self.interrupt = interrupt
        self.progress = make_progress(job, console)
        self.trainer = job.trainer(folder.path, interrupt, self.progress)
        self.pace = Pace()
        self.trainer.add_callback(self.pace)
        self.resumed = processes.from_first(lambda: folder.started)
        self.record: dict[str, Any] = dict(job.recipe.record or {})
        self.best_validation: float | None = None
        self.history: list[dict[str, float]] = []

    def finish(self) -> None:
        """Do what is left of the run."""
        show_job(self.console, self.job, self.folder.shown, verify(self.job, self.trainer))
        before = self._begin()
        began = time.monotonic()
        self._train()
        seconds = time.monotonic() - began
        after = self._evaluate("after")
        with whole(self.job.model):
            size = processes.from_first(self._save)
        results = self._results(before, after, size, seconds)
        self.folder.write_results(results)
        self.folder.remove_checkpoints()
        self.console.record("results", **results)
        self._report(before, after, size, seconds)

    def _begin(self) -> Score | None:
        """Score the untrained model and save the recipe, or take both from the run begun before."""
        if self.resumed:
            self.record |= processes.from_first(lambda: read_recipe(self.folder.path).record or {})
            self._announce_resumption(self.record["versions"])
            self.trainer.slowed = len(self.record.get("rollbacks", ()))
            before = self.record.get("before")
            return None if before is None else Score(**before)
        before = self._evaluate("before")
        self.record |= {} if before is None else {"before": before.as_data()}
        self._write_recipe()
        return before

    def _write_recipe(self) -> None:
        self.folder.write_recipe(self.job.recipe.model_copy(update={"record": self.record}))

    def _announce_resumption(self, versions: dict[str, str]) -> None:
        checkpoints = processes.from_first(self.folder.checkpoints)
        step = read_state(checkpoints[-1]).global_step if checkpoints else 0
        where = f"from step {step} of {self.job.plan.steps}" if step else "from the first step"
        self.console.field("resume", f"an interrupted run goes on {where}")
        assert self.job.recipe.record is not None
        changed = [
            f"{name} {versions.get(name)} then, {now} now"
            for name, now in self.job.recipe.record["versions"].items()
            if versions.get(name) != now
        ]
        if changed:
            self.console.field("note", f"{', '.join(changed)}: the result may differ in last bits")

    def _train(self) -> None:
        """Train from the newest checkpoint to the end, and go back to the state that is kept."""
        self.console.line()
        self.trainer.share_out()
        checkpoints = processes.from_first(self.folder.checkpoints)
        newest = checkpoints[-1] if checkpoints else None
        plan, patience = self.job.plan, self.job.recipe.early_stopping
        if newest is None or not is_done(read_state(newest), plan.steps, patience, plan.metric):
            self.interrupt.waiting = True
            self._steps(newest)
            self.interrupt.waiting = False
            if self.interrupt.number is not None:
                raise Stopped(
                    self.interrupt.number,
                    f"Stopped in step {self.trainer.state.global_step} of {self.job.plan.steps}; "
                    "the checkpoint is saved.\nThe same command goes on from there.",
                )
            newest = processes.from_first(self.folder.checkpoints)[-1]
        state = read_state(newest)
        self.best_validation = state.best_metric
        self.history = state.log_history
        best = state.best_global_step if self.job.recipe.keep == "best" else None
        restore(self.job.model, self.folder.path / f"checkpoint-{best or state.global_step}")

    def _steps(self, newest: Path | None) -> None:
        """Run the training loop, and again from an earlier state where it went wrong."""
        while True:
            transformers.set_seed(self.job.recipe.seed + processes.rank())
            try:
                with self.progress:
                    self.trainer.train(resume_from_checkpoint=newest and str(newest))
            except DivergedError as error:
                newest = self._go_back(error)
            else:
                return

    def _go_back(self, error: DivergedError) -> Path:
        """Return the checkpoint to go on from, noted in the record; raise the error without one."""
        back = rolled_back(self.trainer, error)
        self.folder.remove_checkpoints(after=back.to)
        self.record["rollbacks"] = [*self.record.get("rollbacks", ()), back.as_data()]
        self._write_recipe()
        self.trainer.slowed += 1
        self.console.field(
            "rollback", f"{back}, at most {back.factor * self.job.plan.rate.value:g}"
        )
        return processes.from_first(self.folder.checkpoints)[-1]

    def _evaluate(self, moment: str) -> Score | None:
        return self.job.score() if moment in self.scored else None

    def _save(self) -> int:
        """Write adapter (or model) and tokenizer; return the bytes of the weights."""
        model = self.job.model
        with staging.staged_into(self.folder.path) as partial:
            if self.job.recipe.method in IN_PLACE:
                model.save_pretrained(partial, state_dict=weights(model))
            else:
                continuing.save(model, partial, self.job.adapted.merged)
            if self.job.recipe.plot_loss:
                plot_losses(self.history, partial / PICTURE)
            size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            save_tokenizer(self.job.tokenizer, partial)
        return size

    def _results(
        self, before: Score | None, after: Score | None, size: int, seconds: float
    ) -> dict[str, Any]:
        summary = deltaw.summary(self.job.model)
        return {
            "held_out": self.job.held_out_name,
            "before": None if before is None else before.as_data(),
            "after": None if after is None else after.as_data(),
            "best_validation": self.best_validation,
            "trainable_parameters": summary.trainable,
            "parameters": summary.total,
            "weights_bytes": size,
            "model_bytes": size_on_disk(self.job.model),
            "seconds": round(seconds, 1),
            "seconds_per_step": self.pace.median,
            "resumed": self.resumed,
            "rollbacks": self.record.get("rollbacks", []),
        }

    def _report(self, before: Score | None, after: Score | None, size: int, seconds: float) -> None:
        console, job = self.console, self.job
        console.line()
        if before is not None and after is not None:
            console.line(table([("before", before), ("after", after)], job.plan.metric))
            rows = f"on {after.rows:,} {job.held_out_name} rows that were not trained on"
            by_them = job.recipe.keep == "best" and not job.tested
            chosen = ", but the best state was chosen by them" if by_them else ""
            console.line(rows + chosen)
            console.line()
        whole = size_on_disk(job.model)
        kind = "model" if job.recipe.method in IN_PLACE else "adapter"
        saved = f"{self.folder.shown}: {kind} of {wording.size(size)}"
        if kind == "adapter" and whole >= 2 * size:
            saved += f", {whole / size:.0f} times smaller than the model ({wording.size(whole)})"
        console.field("saved", saved)
        since = ", since the run was resumed" if self.resumed else ""
        console.field("time", duration(seconds) + since)
        run = printable(shlex.quote(str(self.folder.path)), 300)
        console.field("next", "\n".join(job.commands(run)), whole=True)


def make_progress(job: Job, console: Console) -> ProgressBar:
    """Return what shows the progress of a job."""
    recipe = job.recipe
    return ProgressBar(console, recipe.batch_size * recipe.gradient_accumulation, job.plan.metric)


def verify(job: Job, trainer: RecipeTrainer) -> str:
    """Try the adapters on a batch; raise if one of them would not train."""
    if trainer.recipe.method in IN_PLACE:
        return "not needed: the weights themselves are trained"
    batch = trainer._prepare_inputs(job.probe(trainer))
    deltaw.verify(trainer.model, batch, optimizer=trainer.optimizer)
    return "passed: every adapter runs, gets gradients and is in the optimiser"
