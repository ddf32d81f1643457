"""A mix-in over `transformers.Trainer`: checkpoints hold what was trained, whole or not at all.

    class MyTrainer(ExactCheckpoints, Trainer): ...

A checkpoint is written beside its final name and renamed when complete. It holds the trainable
tensors, the optimiser, the scheduler, the random states and the Trainer's state, never the frozen
base; a model with adapters also gets their PEFT files. Resuming from it goes on bit for bit.
"""

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from deltaw.errors import DivergedError
from deltaw.saving import save_all
from deltaw.switching import configs
from deltaw.train import randomness, staging
from deltaw.train.checkpoint import (
    STATE,
    TRAINED,
    changing,
    reading,
    require_complete,
    restore,
    trained,
)
from deltaw.train.distributed import processes
from deltaw.train.distributed.sharding import full, whole
from deltaw.train.escape import printable
from deltaw.train.saved import checkpoints_in


class ExactCheckpoints(Trainer):
    """Atomic checkpoints of the trainable tensors only, exact resume, and a watch on NaN."""

    _unchecked: torch.Tensor | float = 0.0
    """The sum of a step's losses on a GPU, which has to come to rest whenever one is looked at."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        states = processes.gathered(randomness.current())
        with whole(self.model):
            for name, tensor in changing(self.model).items():
                self.require_finite(tensor, printable(name), self.state.global_step)
            optimizer = self.optimizer.state_dict()
            if processes.first() and not final.exists():
                with staging.staged(final) as partial:
                    self._write_checkpoint(partial, optimizer, states)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(
                folder / f"checkpoint-{self.state.best_global_step}"
            )
        if processes.first():
            self._rotate(folder)
        processes.from_first(lambda: None)  # all go on when it is written

    def _write_checkpoint(
        self, folder: Path, optimizer: dict[str, Any], states: Sequence[dict[str, Any]]
    ) -> None:
        self._save(str(folder))
        try:
            torch.save(optimizer, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
            self._save_scaler(str(folder))
            randomness.write(states, folder)
        except RuntimeError as error:  # what torch.save raises when the disk is full
            raise OSError(errno.EIO, f"torch cannot write (is the disk full?): {error}") from error
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / STATE))

    def _rotate(self, folder: Path) -> None:
        """Delete all checkpoints but the newest and the best, oldest first."""
        limit = self.args.save_total_limit
        steps = list(checkpoints_in(folder))
        keep = self._kept(folder, steps)
        if limit:
            spare = [step for step in steps if step not in keep]
            for step in spare[: max(0, len(steps) - max(limit, len(keep & set(steps))))]:
                staging.remove(folder / f"checkpoint-{step}")

    def _kept(self, folder: Path, steps: Sequence[int]) -> set[int | None]:
        return {self.state.global_step, self.state.best_global_step}

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained(self.model), folder / TRAINED)
        if configs(self.model):
            save_all(self.model, folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        require_complete(Path(resume_from_checkpoint))
        restore(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        self._unchecked = 0.0

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with reading(checkpoint):
                randomness.restore(Path(checkpoint), processes.rank())

    def _load_best_model(self) -> None:
        restore(self.model, Path(self.state.best_model_checkpoint))

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        position: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step:  # the folder may have moved since the state was written
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        return position

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run one forward and backward pass.

        Raises:
            DivergedError: on a loss that is no number; on a GPU at the end of the step.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if processes.count() > 1:  # the others would wait for this one: see the gradient
            return loss
        if loss.device.type == "cpu":
            self.require_finite(loss, "The loss", self.state.global_step + 1)
        else:
            self._unchecked = self._unchecked + loss
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate; raise `DivergedError` on a loss that is no number."""
        found: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        for name, value in (found.metrics or {}).items():
            if name.endswith("_loss"):
                self.require_finite(torch.tensor(value), name, self.state.global_step)
        return found

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        losses, self._unchecked = torch.as_tensor(self._unchecked), 0.0
        self.require_finite(losses, "The loss", self.state.global_step + 1)
        norm = full(super()._get_grad_norm(model, grad_norm))
        if norm is not None and self.accelerator.scaler is None:
            self.require_finite(torch.as_tensor(norm), "The gradient", self.state.global_step + 1)
        return norm

    @property
    def rate_tried(self) -> float:
        """The highest rate that training goes by now."""
        return float(self.args.learning_rate)

    def require_finite(self, values: torch.Tensor, what: str, step: int) -> None:
        """Raise `DivergedError`, naming the last good state, if there is NaN or Inf in `values`."""
        broken = values[~values.isfinite()]
        if not broken.numel():
            return
        saved = list(checkpoints_in(Path(self.args.output_dir)).values())
        kept = (
            f"The last good state is in {printable(str(saved[-1]), 300)}."
            if saved
            else "No checkpoint had been written yet."
        )
        more = "more warmup" + ", bf16 off" * bool(self.args.bf16)
        clip = "a smaller max_grad_norm" if self.args.max_grad_norm else "max_grad_norm=1"
        raise DivergedError(
            f"{what} became {broken[0].item()} in step {step}.\nThe run was stopped. {kept}\n"
            f"Fix: try a third of the learning rate ({self.rate_tried / 3:.1g}), {more}, or "
            f"{clip}, with --overwrite."
        )
