"""A PeftModel under transformers' Trainer, as it is and with the mix-in that trains exactly."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_scripts import bert

from deltaw.compat import peft as ours

transformers = pytest.importorskip("transformers")


def exact() -> type["transformers.Trainer"]:
    from deltaw.train.trainer import ExactCheckpoints

    class MyTrainer(ExactCheckpoints, transformers.Trainer):
        pass

    return MyTrainer


def make_trainer(kind: type["transformers.Trainer"], folder: Path) -> "transformers.Trainer":
    torch.manual_seed(1)
    config = ours.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1)
    rows = [{"input_ids": torch.arange(5) + i, "labels": i % 3} for i in range(12)]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=6,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=0.02,
        # The loss falls, so the first checkpoint is the best by this.
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = ours.get_peft_model(bert(), config)
    model.add_adapter("other", ours.LoraConfig(r=3))
    return kind(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [lambda: transformers.Trainer, exact], ids=["plain", "exact"])
def test_the_best_model_is_loaded_and_a_run_goes_on_from_a_checkpoint(
    tmp_path: Path, kind: Callable[[], type["transformers.Trainer"]]
) -> None:
    trainer = make_trainer(kind(), tmp_path)
    start = parts(trainer.model)
    trainer.train()
    assert trainer.state.best_global_step == 2
    checkpoints = {
        step: parts(
            ours.PeftModel.from_pretrained(
                bert(), tmp_path / f"checkpoint-{step}", is_trainable=True
            )
        )
        for step in (2, 6)
    }
    assert not same(checkpoints[2], start) and not same(checkpoints[2], checkpoints[6])
    assert same(parts(trainer.model), checkpoints[2])

    shutil.rmtree(tmp_path / "checkpoint-6")
    again = make_trainer(kind(), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6
    resumed = ours.PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-6", is_trainable=True)
    assert same(parts(resumed), checkpoints[6])


def test_the_trainer_treats_every_other_model_as_before(tmp_path: Path) -> None:
    ours.get_peft_model(bert(), ours.LoraConfig(r=2))
    plain = bert()
    rows = [{"input_ids": torch.arange(5) + i, "labels": i % 3} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=2,
        save_steps=1,
        learning_rate=0.1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=plain, args=arguments, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    best = bert().from_pretrained(trainer.state.best_model_checkpoint)
    wanted = best.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in plain.state_dict().items())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.state.global_step == 2
