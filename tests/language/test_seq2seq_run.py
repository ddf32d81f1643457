"""Training of sequence-to-sequence models from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.language.seq2seq_models import backwards, letters, save, t5, write
from transformers import T5ForConditionalGeneration

import deltaw
from deltaw.errors import ConfigError, DataError, DeltawError, RunError
from deltaw.language.choosing import train
from deltaw.language.generating import Sampling, generate
from deltaw.language.training.prepare import Seq2SeqJob, prepare
from deltaw.language.training.trainer import Seq2SeqTrainer
from deltaw.language.use.opened import open_language
from deltaw.train import run as running
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.recipe import parse
from deltaw.train.run import make_progress

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `data.json`."""
    folder = tmp_path_factory.mktemp("writer")
    save(folder / "model", t5(num_layers=1, d_model=16))
    write(folder / "data.json", backwards(2))
    return folder


@pytest.fixture
def values(writer: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(writer / "model"),
        "data": str(writer / "data.json"),
        "output": str(tmp_path / "run"),
        "max_steps": 2,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "samples": 0,
    }


def start(values: dict[str, Any], **more: Any) -> Path:
    return train(parse(values | more))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTER)


def mixed(folder: Path) -> Path:
    """Prompts and answers of different lengths."""
    rows = [*backwards(2)[:9], *backwards(3)[:6], {"prompt": "a b c d", "completion": "e"}]
    return write(folder / "mixed.json", rows)


def plain_loss(model: Any, rows: list[Any]) -> float:
    """The mean over all tokens of all rows of transformers' loss, each row alone."""
    losses, count = 0.0, 0
    for row in rows:
        source = torch.tensor([row["input_ids"]])
        target = torch.tensor([row["labels"]])
        with torch.no_grad():
            losses += model(input_ids=source, labels=target).loss.item() * target.numel()
        count += target.numel()
    return losses / count


def encoded(path: Path) -> list[dict[str, list[int]]]:
    tokenizer = letters()
    return [
        {
            "input_ids": tokenizer(row["prompt"])["input_ids"],
            "labels": tokenizer(text_target=row["completion"])["input_ids"],
        }
        for row in json.loads(path.read_text())
    ]


def test_the_loss_is_transformers_own_per_token(values: dict[str, Any], tmp_path: Path) -> None:
    data = mixed(tmp_path)
    model = T5ForConditionalGeneration.from_pretrained(values["model"]).eval()
    recipe = parse(values | {"data": str(data), "task": "sft", "validation_share": 4})
    job = prepare(recipe, Console(silent=True))
    assert isinstance(job, Seq2SeqJob) and job.rows == 12
    job.model.accepts_loss_kwargs = False
    held = [{"input_ids": row.input_ids, "labels": row.labels} for row in job.held_out]
    found = job.score()
    assert found is not None and found.values["loss"] == pytest.approx(plain_loss(model, held))
    with Interrupt() as interrupt:
        trainer = job.trainer(tmp_path / "run", interrupt, make_progress(job, Console(silent=True)))
    assert isinstance(trainer, Seq2SeqTrainer)
    rows = [job.data[index] for index in range(len(job.data))]
    batches = [job.padding(rows[at : at + 5]) for at in (0, 5, 10)]
    learnt = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    parts = [trainer.training_step(trainer.model, batch, learnt) for batch in batches]
    assert sum(parts).item() == pytest.approx(plain_loss(model, rows))
    every = encoded(data)
    assert all(row in every for row in [*held, *rows])
    order = list(trainer.order())
    together = [[rows[index] for index in order[at : at + 8]] for at in (0, 8)]
    assert trainer.padded() == [
        sum(len(some) * max(len(row[name]) for row in some) for name in ("input_ids", "labels"))
        for some in together
    ]


def test_words_are_learnt_backwards(values: dict[str, Any]) -> None:
    more = {"method": "full", "max_steps": 60, "batch_size": 25, "validation_share": 0}
    run = start(values, **more, learning_rate=0.02)
    opened = open_language(run)
    rows = backwards(2)
    answers = generate(opened.speaker, [row["prompt"] for row in rows], Sampling(8))
    right = sum(answer == row["completion"] for answer, row in zip(answers, rows, strict=True))
    assert right >= 24
    assert T5ForConditionalGeneration.from_pretrained(run).config.decoder_start_token_id == 0


def test_a_receipt_counts_prompts_and_answers(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(values, samples=1)
    out = capsys.readouterr().out
    assert "template  none, texts as they are" in out
    assert "tokens    69 of answers learnt: every answer, with its end </s>" in out
    assert "          69 of prompts read" in out
    assert "          longest 3 and 3, 2,048 fit each; none cut" in out
    assert "/model: T5ForConditionalGeneration, t5" in out
    assert "verify    passed" in out
    lines = [line.strip() for line in out.splitlines()]
    for step in (0, 2):
        assert sum(line.startswith(f"step     {step}  answer") for line in lines) == 1
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    values |= {"max_steps": 3, "eval_every": 1, "lora_dropout": 0.2}
    whole = start(values, output=values["output"] + "-whole")
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            start(values)
    newest = Path(values["output"]) / "checkpoint-3"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run = start(values)
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


def test_accumulated_batches_are_one_large_batch(values: dict[str, Any], tmp_path: Path) -> None:
    plain = {"validation_share": 0, "group_by_length": False, "data": str(mixed(tmp_path))}
    large = start(values, **plain)
    small = start(
        values, batch_size=2, gradient_accumulation=4, output=values["output"] + "2", **plain
    )
    for name, tensor in weights(large).items():
        torch.testing.assert_close(weights(small)[name], tensor, rtol=1e-4, atol=1e-6)


def test_every_linear_layer_of_both_stacks_is_adapted_but_the_head(values: dict[str, Any]) -> None:
    run = start(values)
    paths = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in weights(run)}
    model = T5ForConditionalGeneration.from_pretrained(values["model"])
    linear = {p for p, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert paths == linear - {"lm_head"}
    assert all(t.any() for name, t in weights(run).items() if "lora_B" in name)


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True, "r": 2},
        {"init_lora_weights": "pissa", "r": 2},
        {"target_modules": ["q", "v", "lm_head"]},
        pytest.param({"init_lora_weights": "lora_ga", "r": 2}, marks=pytest.mark.slow),
        pytest.param({"bf16": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"method": "layernorm"}, marks=pytest.mark.slow),
    ],
    ids=lambda more: next(iter(more)),
)
def test_methods_and_starts_train(values: dict[str, Any], more: dict[str, Any]) -> None:
    run = start(values, max_steps=1, validation_share=0, **more)
    assert (run / ADAPTER).is_file()


def test_packed_weights_are_read_as_what_they_stand_for(values: dict[str, Any]) -> None:
    """T5 casts what goes into `wo` to the dtype of its weight, so that one is not packed."""
    pytest.importorskip("bitsandbytes")
    model = T5ForConditionalGeneration.from_pretrained(values["model"]).eval()
    packed = deltaw.quantize(model, "nf4")
    assert len(packed) == 16 and not any(path.endswith(".wo") for path in packed)
    ids = torch.tensor([[4, 5, 6, 1]])
    with torch.no_grad():
        mine = model(input_ids=ids, labels=ids).logits
        deltaw.dequantize(model)
        torch.testing.assert_close(mine, model(input_ids=ids, labels=ids).logits)
    assert (start(values, quantization_bit=4, max_steps=1) / ADAPTER).is_file()


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (
            {"packing": True, "train_on": "all", "too_long": "split", "separator": " "},
            ConfigError,
            r"(?s)sequence-to-sequence model, which these do not fit:\n  - packing=True.*"
            r"  - train_on=all.*  - too_long=split.*  - separator: .*Fix: leave them out",
        ),
        ({"method": "freeze", "last_layers": 1}, ConfigError, "counts the layers of one stack"),
        ({"lr_layer_decay": 0.9}, ConfigError, "lr_layer_decay: it counts the layers"),
        ({"neftune_noise_alpha": 5}, ConfigError, "neftune_noise_alpha: encoder and decoder"),
    ],
)
def test_what_has_no_meaning_is_refused(
    values: dict[str, Any], more: dict[str, Any], error: type[DeltawError], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(values, **more)
    assert not (Path(values["output"]) / "recipe.yaml").exists()


def test_texts_and_preferences_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    data = write(tmp_path / "texts.json", [{"text": f"a b {n}"} for n in range(40)])
    with pytest.raises(DataError, match=r"texts.json:\d+ is plain text"):
        start(values, data=str(data), samples=1)
    rows = [{"prompt": f"a {n}", "chosen": "b", "rejected": "c"} for n in range(8)]
    data = write(tmp_path / "pairs.json", rows)
    with pytest.raises(ConfigError, match=r"task=dpo: .* \(t5\), which learns answers alone"):
        start(values, data=str(data), samples=1)


def test_a_model_that_does_not_say_how_answers_begin_is_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", t5(num_layers=1, d_model=16))
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"no decoder_start_token_id\.\nFix: set it in its config"):
        start(values, model=str(folder))
