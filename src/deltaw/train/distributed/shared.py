"""A Trainer that is one of several processes: each computes its share of every batch."""

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from deltaw.errors import ConfigError, RunError, raise_all
from deltaw.train.batches import EpochSampler
from deltaw.train.checkpoint import changing
from deltaw.train.distributed import processes
from deltaw.train.distributed.outliving import outlive
from deltaw.train.distributed.sharding import Sharded, keep_full
from deltaw.train.distributed.shares import WEIGHT, ShareSampler, joined, loader
from deltaw.train.guarding.guarded import Guarded
from deltaw.train.methods import IN_PLACE
from deltaw.train.recipe import Recipe

NOTHING = -100
"""A label that is not learnt."""


def agree(model: nn.Module) -> None:
    """Give the adapters of the first process to all, and tell DDP what it need not send.

    That is packed weights of torchao, which it cannot read, and frozen starts, which it would send
    in every forward pass.
    """
    with torch.no_grad():
        for name, tensor in changing(model).items():
            if ".adapter." in name:
                sent = tensor.detach().contiguous()
                dist.broadcast(sent, 0)
                tensor.copy_(sent)
    packed = [n for n, p in model.named_parameters() if is_traceable_wrapper_subclass(p)]
    starts = [n for n, _ in model.named_buffers() if ".adapter." in n and ".start_" in n]
    model._ddp_params_and_buffers_to_ignore = packed + starts  # type: ignore[assignment]


def _as_it_is(values: Any) -> Any:
    return values


class SharedTraining(Guarded):
    """Sees the same rows in the same steps, and has the same losses, on any number of processes."""

    recipe: Recipe
    _joined = 1
    loss_over: Literal["items", "rows"] | None = None
    """What the loss of a step is a mean over: all that is counted, or each batch's rows; without
    it processes cannot share a batch."""

    @abstractmethod
    def order(self) -> EpochSampler:
        """Return what orders the rows of every epoch."""

    def share(self) -> None:
        """Have each process train on its share of every batch.

        Raises:
            ConfigError, RunError: if that cannot be, or the processes have not found each other.
        """
        recipe = self.recipe
        several, equal = processes.count(), self.loss_over == "rows"
        accumulated = recipe.gradient_accumulation
        together = joined(several, recipe.batch_size, accumulated, equal=equal)
        problems = []
        if self.loss_over is None:
            problems.append(f"task={recipe.task} is trained by one process")
        if together is None:
            problems.append(
                f"batch_size={recipe.batch_size} counts the rows of all processes together, and "
                f"they cannot share so many; give a multiple of {several}"
                + ", and less gradient_accumulation"
                * (accumulated > 1 and not equal)
            )
        if recipe.updates_in_backward:
            problems.append(f"optim={recipe.optim} updates weights before gradients are exchanged")
        if recipe.fsdp and (recipe.uses_galore or recipe.quantization_bit is not None):
            problems.append("fsdp shares out neither the optimiser of GaLore nor packed weights")
        apart = self.model.config.is_encoder_decoder
        if recipe.fsdp and apart and (recipe.samples or recipe.metric not in (None, "loss")):
            problems.append(
                "fsdp gives the encoder of a sequence-to-sequence model no weights to answer with; "
                "give samples=0 and metric=loss"
            )
        raise_all(
            ConfigError,
            f"{several} processes cannot share this training:",
            problems,
            "change the recipe, or train with --processes 1.",
        )
        if self.args.world_size != several:
            raise RunError(
                f"WORLD_SIZE says {several} processes, and {self.args.world_size} found each "
                "other.\nFix: start them with torchrun or --processes, one for each GPU."
            )
        self._joined = together or 1
        self.args.gradient_accumulation_steps = accumulated // self._joined
        self.accelerator.ddp_handler.find_unused_parameters = self._may_rest()
        agree(self.model)

    def _may_rest(self) -> bool:
        """Tell whether a step may leave out trained weights; of adapters all were tried."""
        config = self.model.config.to_dict()
        chosen = any(config[key] for key in config if "layerdrop" in key or "experts" in key)
        return chosen or self.recipe.method in IN_PLACE

    def _prepare_for_training(self, *args: Any) -> Any:
        """Prepare as usual, and see that the processes can part."""
        prepared = super()._prepare_for_training(*args)
        if isinstance(self.model_wrapped, DistributedDataParallel):
            outlive(self.model_wrapped)
        return prepared

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch, or this process's share of them."""
        if processes.count() == 1:
            return super().get_train_dataloader()  # type: ignore[no-any-return]
        shares = ShareSampler(
            self.order(),
            processes.rank(),
            processes.count(),
            equal=self.loss_over == "rows",
            joined=self._joined,
        )
        gpu = torch.cuda.is_available()
        return prepare_data_loader(
            loader(self.train_dataset, shares, self.data_collator),
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=gpu,
            non_blocking=gpu,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return all rows that are evaluated, in every process."""
        if processes.count() == 1:
            return super().get_eval_dataloader(eval_dataset)  # type: ignore[no-any-return]
        rows, size = eval_dataset or self.eval_dataset, self.args.eval_batch_size
        batches: DataLoader[Any] = DataLoader(rows, size, collate_fn=self.data_collator)
        return prepare_data_loader(batches, num_processes=1, process_index=0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate all rows in this process."""
        if processes.count() > 1:
            self.gather_function = _as_it_is
        return super().evaluation_loop(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss by the weight of this process's share."""
        weight = inputs.pop(WEIGHT, None)
        found = super().compute_loss(model, inputs, *args, **kwargs)
        return found if weight is None else found * weight

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        counted = [
            batch
            if batch.get(WEIGHT, 1) or "labels" not in batch
            # counted in, and so all processes exchange their numbers, but as nothing
            else {**batch, "labels": torch.full_like(batch["labels"], NOTHING)}
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; what the first process finds decides in all."""
        found = super().evaluate(*args, **kwargs)
        return processes.from_first(lambda: found)

    def share_out(self) -> None:
        """Share out the weights and the optimiser over the processes if the recipe says so."""
        if self.recipe.fsdp and processes.count() > 1:
            self.model_wrapped = Sharded(self.model, bf16=self.recipe.bf16)
            self.optimizer = None
            keep_full(self.create_optimizer())
