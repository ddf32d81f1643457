"""Training of a language model from end to end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.language.models import conversations, make_model, write_json
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from deltaw.errors import ConfigError, DataError, RunError
from deltaw.language.choosing import preparation, settle, train
from deltaw.language.data.samples import Message
from deltaw.language.generating import Sampling, generate
from deltaw.language.use.opened import open_language
from deltaw.train import run as running
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.recipe import parse
from deltaw.train.run import make_progress

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def values(talker: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "output": str(tmp_path / "run"),
        "max_steps": 4,
        "eval_every": 2,
        "batch_size": 4,
        "learning_rate": 1e-2,
    }


def start(values: dict[str, Any], **more: Any) -> Path:
    return train(parse(values | more))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / ADAPTER)


def test_a_run_says_what_it_learns_and_learns_it(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(values, max_steps=16, learning_rate=0.05)
    out = capsys.readouterr().out
    assert "24 rows, 22 training, 2 validation" in out
    assert "template  alpaca, because the tokenizer has none" in out
    assert "learnt: every answer, with its end <eos>" in out
    assert "verify    passed" in out
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["values"]["loss"] < results["before"]["values"]["loss"] - 0.05
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    tokenizer = AutoTokenizer.from_pretrained(run)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text.endswith("### Instruction:\nx\n\n### Response:\n")


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    whole = start(values, output=values["output"] + "-whole")
    with monkeypatch.context() as patch:
        patch.setattr(running, "restore", broken)
        with pytest.raises(KeyboardInterrupt):
            start(values)
    checkpoints = sorted(Path(values["output"]).glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    for path in sorted(checkpoints[1].iterdir()):
        path.unlink()
    checkpoints[1].rmdir()
    run = start(values)
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()


@pytest.mark.parametrize("task", ["sft", "dpo", "full"])
def test_matrices_decay_and_vectors_do_not(
    values: dict[str, Any], tmp_path: Path, task: str
) -> None:
    asked = {"method": "full"} if task == "full" else {"use_dora": True}
    if task == "dpo":
        rows = [{"prompt": f"{n}?", "chosen": " yes", "rejected": " no"} for n in range(4)]
        asked["data"] = str(write_json(tmp_path / "pairs.json", rows))
    recipe = settle(parse(values | asked | {"validation_share": 0, "weight_decay": 0.3}))
    job = preparation(recipe)(recipe, Console(silent=True))
    with Interrupt() as interrupt:
        trainer = job.trainer(tmp_path, interrupt, make_progress(job, Console(silent=True)))
    decays = [
        (parameter.ndim > 1, group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert set(decays) == {(True, 0.3), (False, 0.0)}


def test_accumulated_batches_are_one_large_batch(values: dict[str, Any]) -> None:
    plain = {"validation_share": 0, "group_by_length": False, "max_steps": 2}
    large = start(values, batch_size=8, **plain)
    small = start(
        values, batch_size=2, gradient_accumulation=4, output=values["output"] + "2", **plain
    )
    for name, tensor in weights(large).items():
        torch.testing.assert_close(weights(small)[name], tensor, rtol=1e-4, atol=1e-6)


def test_one_step_on_packed_rows_is_one_step_on_the_rows_alone(values: dict[str, Any]) -> None:
    plain = {"validation_share": 0, "max_steps": 1, "batch_size": 24}
    alone = start(values, **plain)
    together = start(values, packing=True, output=values["output"] + "2", **plain)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_starts_that_are_not_zero_pass_as_trainable(values: dict[str, Any], init: str) -> None:
    run = start(values, init_lora_weights=init, r=4, max_steps=1)
    assert (run / "deltaw_start.safetensors").is_file()


def test_an_adapted_output_head_is_trained(values: dict[str, Any]) -> None:
    run = start(values, target_modules=["lm_head", "q_proj"], max_steps=2, learning_rate=0.05)
    assert weights(run)["base_model.model.lm_head.lora_B.weight"].abs().max() > 0.01
    plain = {"validation_share": 0, "max_steps": 1, "batch_size": 24, "r": 2}
    alone = start(values, target_modules=["q_proj"], output=values["output"] + "2", **plain)
    both = start(
        values, target_modules=["lm_head", "q_proj"], output=values["output"] + "3", **plain
    )
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    torch.testing.assert_close(weights(alone)[name].sign(), weights(both)[name].sign())


@pytest.mark.parametrize("method", ["full", "bitfit", "layernorm", "freeze"])
def test_every_method_that_needs_no_head(values: dict[str, Any], method: str) -> None:
    if method == "bitfit":
        with pytest.raises(RunError, match="has none below its head"):
            start(values, method=method)
        return
    more = {"last_layers": 1} if method == "freeze" else {}
    run = start(values, method=method, max_steps=1, template="chatml", **more)
    whole = method in ("full", "freeze")
    assert (run / ("model.safetensors" if whole else ADAPTER)).is_file()
    if whole:
        turn = AutoTokenizer.from_pretrained(run).convert_tokens_to_ids("<|im_end|>")
        assert turn in GenerationConfig.from_pretrained(run).eos_token_id


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"template": "nonsense"}, ConfigError, "there is no such template"),
        ({"max_length": 999}, ConfigError, "max_length=999, and the model has positions for 128"),
        ({"max_length": 8}, DataError, "None of the 22 training samples has a token to learn"),
        ({"method": "head"}, ConfigError, "a language model has none"),
        ({"text": "output"}, ConfigError, "text=.* has no effect with task=sft"),
        ({"early_stopping": 2, "validation_share": 0}, ConfigError, "needs validation rows"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    values: dict[str, Any], more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        start(values, task="sft", **more)
    assert not (Path(values["output"]) / "recipe.yaml").exists()


def test_preferences_are_not_learnt_as_answers(values: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(8)]
    data = write_json(tmp_path / "preferences.json", rows)
    with pytest.raises(DataError, match="task=sft learns answers as they are"):
        start(values, data=str(data), task="sft")


def test_a_tokenizer_that_does_not_fit_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(RunError, match=f"the model embeds {config['vocab_size']}"):
        start(values, model=str(folder))


def test_labelled_texts_are_still_classified(tmp_path: Path) -> None:
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("text,label\nfine,good\nawful,bad\n")
    asked = write_json(tmp_path / "asked.json", conversations(4))
    recipe = {"model": "m", "data": str(labelled)}
    assert settle(parse(recipe)).task is None
    assert settle(parse(recipe | {"data": str(asked)})).task == "sft"
    for either in ({"eval_data": str(labelled)}, {"max_samples": 1}, {"skip_bad_rows": True}):
        assert settle(parse(recipe | either)).task is None
        assert settle(parse(recipe | either | {"data": str(asked)})).task == "sft"
    assert settle(parse(recipe | {"packing": True})).task == "sft"
    assert settle(parse(recipe | {"data": f"{asked}#3,{asked}"})).task == "sft"
    assert settle(parse({"model": "m", "data": str(asked), "label": "output"})).task is None


def test_held_out_prompts_are_answered_before_and_while_training(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    start(values, samples=2)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for step, count in ((0, 2), (2, 2), (4, 2)):
        assert sum(line.startswith(f"step     {step}  answer ") for line in lines) == count
    assert sum(line.startswith("step     0  asked   What is the colour of") for line in lines) == 2
    assert sum(line.startswith("wanted  The ") for line in lines) == 2
    quiet = values["output"] + "2"
    start(values, samples=0, output=quiet)
    assert " answer " not in capsys.readouterr().out
    assert (Path(quiet) / ADAPTER).read_bytes() == (Path(values["output"]) / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("rows", "asked"),
    [
        ([{"prompt": f"colour {n}:", "completion": " blue"} for n in range(20)], "<s>x"),
        ([{"prompt": f"colour {n}", "completion": "blue"} for n in range(20)], "<s>x\n"),
        ([{"text": f"The colour {n} of the sky is blue."} for n in range(20)], "<s>x"),
    ],
    ids=["completions", "lines", "passages"],
)
def test_plain_texts_are_learnt_and_gone_on_with(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, str]],
    asked: str,
) -> None:
    """A chat goes on with a text as training had it: no template is put around it."""
    run = start(values, data=str(write_json(tmp_path / "plain.json", rows)), max_steps=2)
    out = capsys.readouterr().out
    assert "template  none, texts as they are" in out
    assert "step     2  answer" in out
    assert (run / ADAPTER).is_file()
    template = open_language(run).template.template
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert template.render(turns[:1], prompt=True)[0] == asked
    assert template.render(turns)[0] == f"{asked}y<eos>"


def test_gpt2_with_queries_and_values_alone(values: dict[str, Any], tmp_path: Path) -> None:
    """Slices of a fused projection, and the layers beside it; merged it answers the same."""
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    run = start(
        values,
        model=str(tmp_path / "gpt2"),
        target_modules=["c_attn", "c_fc", "c_proj"],
        enable_lora={"c_attn": [True, False, True]},
        max_steps=8,
        learning_rate=0.05,
    )
    opened = open_language(run)
    weight = opened.model.transformer.h[0].attn.c_attn.weight.detach().clone()
    prompt = opened.encoder.prompted([Message("user", "What is the colour of the sky?")])
    sampling = Sampling(max_new_tokens=12)
    apart = generate(opened.speaker, [prompt], sampling)
    with opened.merged() as done:
        assert done.endswith("into the weights")
        merged = opened.model.transformer.h[0].attn.c_attn.weight
        changed = (merged != weight).any(0).view(3, 16).any(1)
        assert changed.tolist() == [True, False, True]
        assert generate(opened.speaker, [prompt], sampling) == apart
    assert torch.equal(opened.model.transformer.h[0].attn.c_attn.weight, weight)


def test_a_run_does_not_go_on_with_an_edited_template(values: dict[str, Any]) -> None:
    template = Path(values["output"]).with_suffix(".jinja")
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}" + "{{ eos_token }}{% endfor %}"
    template.write_text(source)
    run = start(values, template=str(template))
    (run / "results.json").unlink()
    template.write_text(source.replace("[", "<"))
    with pytest.raises(RunError, match="the chat template, or which columns are read as what"):
        start(values, template=str(template))
    template.write_text(source)
    recipe = run / "recipe.yaml"
    recipe.write_text(re.sub(r"\n +reading: .*", "", recipe.read_text()))
    start(values, template=str(template))
