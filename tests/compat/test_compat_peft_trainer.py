"""A PeftModel under transformers' Trainer with the mix-in that loads its checkpoints."""

from pathlib import Path

import pytest
import torch
from peft_scripts import bert

from deltaw.compat import peft as ours

transformers = pytest.importorskip("transformers")


def make_trainer(folder: Path) -> "transformers.Trainer":
    from deltaw.train.trainer import ExactCheckpoints

    class MyTrainer(ExactCheckpoints, transformers.Trainer):
        pass

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
    return MyTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_model_is_loaded_and_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
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

    for file in (tmp_path / "checkpoint-6").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-6").rmdir()
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6
    resumed = ours.PeftModel.from_pretrained(bert(), tmp_path / "checkpoint-6", is_trainable=True)
    assert same(parts(resumed), checkpoints[6])
