"""The mix-in on a plain Trainer: what its checkpoints hold, and that they load again."""

from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import deltaw
from deltaw.errors import RunError
from deltaw.train.checkpoint import TRAINED, reading, restore, trained
from deltaw.train.trainer import ExactCheckpoints

CONFIG = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
    num_labels=3,
)


class AdapterTrainer(ExactCheckpoints, Trainer):
    pass


def adapted(r: int = 4) -> BertForSequenceClassification:
    torch.manual_seed(0)
    model = BertForSequenceClassification(CONFIG)
    deltaw.attach(model, deltaw.LoraConfig(r=r), generator=torch.Generator().manual_seed(1))
    return model


def rows(count: int = 24) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        {
            "input_ids": torch.randint(0, 40, (7,), generator=draw),
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "labels": torch.randint(0, 3, (), generator=draw),
        }
        for _ in range(count)
    ]


def make_trainer(folder: Path, **more: object) -> AdapterTrainer:
    options: dict[str, object] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "disable_tqdm": True,
        "report_to": [],
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    model = adapted()
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(**(options | more)),  # type: ignore[arg-type]
        train_dataset=rows(),
        eval_dataset=rows(8),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def test_a_checkpoint_holds_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    assert {path.name for path in checkpoint.iterdir()} >= {
        TRAINED,
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    }
    held = safetensors.torch.load_file(checkpoint / TRAINED)
    assert all(".adapter." in name for name in held)
    assert set(held) == set(trained(trainer.model))


def test_another_folder_of_such_a_name_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-best").mkdir()
    trainer = make_trainer(tmp_path, save_total_limit=1)
    trainer.train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-best",
        "checkpoint-6",
    }
    with pytest.raises(RunError, match=r"The last good state is in .*/checkpoint-6\."):
        trainer.require_finite(torch.tensor([float("nan")]), "The loss", 7)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_reads_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(
        BertForSequenceClassification(CONFIG), tmp_path / "checkpoint-6"
    ).eval()
    batch = {"input_ids": torch.stack([row["input_ids"] for row in rows(5)])}
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-6, rtol=1e-6)


def test_resuming_gives_the_same_bits(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    part = make_trainer(tmp_path / "part")
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in trained(whole.model).items():
        assert torch.equal(tensor, trained(part.model)[name]), name


def test_the_best_state_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
        learning_rate=0.5,
    )
    trainer.train()
    best = trainer.state.best_global_step
    held = safetensors.torch.load_file(tmp_path / f"checkpoint-{best}" / TRAINED)
    assert all(torch.equal(t, held[name]) for name, t in trained(trainer.model).items())
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"checkpoint-{best}"}


def test_a_checkpoint_that_does_not_fit_names_every_parameter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    other = adapted(r=2)
    before = trained(other)
    with pytest.raises(RunError) as caught:
        restore(other, tmp_path / "checkpoint-6")
    assert "(4, 16) in the checkpoint, (2, 16) in the model" in str(caught.value)
    assert all(torch.equal(t, trained(other)[name]) for name, t in before.items())
    (tmp_path / "checkpoint-6" / TRAINED).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(RunError, match=r"is damaged: .*\nFix: delete this checkpoint"):
        restore(adapted(), tmp_path / "checkpoint-6")


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_a_lack_of_memory_is_not_a_damaged_checkpoint(error: type[Exception]) -> None:
    with pytest.raises(error), reading("checkpoint-2"):
        raise error


def test_a_checkpoint_that_may_not_be_read_is_not_to_be_deleted() -> None:
    refused = pytest.raises(RunError, match="cannot be read: Permission denied")
    with refused as caught, reading("checkpoint-2"):
        raise PermissionError(13, "Permission denied")
    assert "delete" not in str(caught.value)


def test_a_gradient_that_is_no_number_stops_before_the_weights_move(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = {name: t.clone() for name, t in trained(trainer.model).items()}
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RunError, match="The gradient became"):
        trainer.train()
    assert all(torch.equal(t, before[name]) for name, t in trained(trainer.model).items())


def test_a_loss_of_held_out_rows_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    held_out = trainer.model.register_forward_hook(
        lambda model, _, out: out if model.training else {**out, "loss": out["loss"] * float("inf")}
    )
    with pytest.raises(RunError, match="eval_loss became inf in step 2"):
        trainer.train()
    held_out.remove()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_weights_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="no")
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter[0] = float("-inf")
    with pytest.raises(RunError, match=f"{name} became -inf in step 0"):
        trainer._save_checkpoint(trainer.model, None)
    assert not list(tmp_path.glob("checkpoint-*"))
