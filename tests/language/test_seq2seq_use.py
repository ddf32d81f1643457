"""What a finished run of a sequence-to-sequence model can be asked, and taken to."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language.seq2seq_models import backwards, bart, letters, save, t5, write
from tests.train.conftest import Command
from transformers import AutoModelForSeq2SeqLM

import deltaw
from deltaw.errors import RunError
from deltaw.language.choosing import train
from deltaw.language.encoding.naming import plain
from deltaw.language.encoding.seq2seq import Seq2SeqEncoder
from deltaw.language.encoding.templating import choose
from deltaw.language.generating import Sampling, Speaker, answers, generate
from deltaw.language.use.chatting import chat
from deltaw.language.use.evaluating import evaluate_run
from deltaw.language.use.opened import OpenedLanguage, open_language
from deltaw.train.recipe import parse

SHORT = Sampling(max_new_tokens=6)
PROMPTS = ["a b c d e", "c", "b a"]


@pytest.fixture(scope="module", params=["t5", "bart"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of either model."""
    folder = tmp_path_factory.mktemp(request.param)
    other = request.param == "bart"
    model = bart() if other else t5(num_layers=1, d_model=16)
    values = {
        "model": str(save(folder / "model", model, bos=other)),
        "data": str(write(folder / "data.json", backwards(2))),
        "output": str(folder / "run"),
        "max_steps": 2,
        "learning_rate": 0.05,
        "samples": 0,
    }
    return train(parse(values))


@pytest.fixture(scope="module")
def opened(run: Path) -> OpenedLanguage:
    return open_language(run)


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[4, 5, 6, 7, 1], [5, 4, 8, 8, 1]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, labels=ids.flip(1)).logits
    return found


def base_of(run: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(run.parent / "model")


def test_answers_are_the_models_own_and_padding_changes_none(opened: OpenedLanguage) -> None:
    together = generate(opened.speaker, PROMPTS, SHORT)
    assert together == [generate(opened.speaker, [prompt], SHORT)[0] for prompt in PROMPTS]
    source = opened.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    written = torch.tensor([[opened.model.config.decoder_start_token_id]])
    for _ in range(SHORT.max_new_tokens):
        with torch.no_grad():
            best = opened.model(input_ids=source, decoder_input_ids=written).logits[0, -1].argmax()
        written = torch.cat((written, best[None, None]), 1)
        if best == opened.tokenizer.eos_token_id:
            break
    greedy = opened.tokenizer.decode(written[0, 1:], skip_special_tokens=True)
    assert greedy.strip() == together[0]


def test_no_answer_is_longer_than_the_decoder_has_positions() -> None:
    model, tokenizer = bart(), letters(bos=True)
    model.final_logits_bias[0, tokenizer.convert_tokens_to_ids("a")] = 100
    template = choose(tokenizer, None, plain=plain()).template
    speaker = Speaker(model, tokenizer, Seq2SeqEncoder(tokenizer, template, 24, ("</s>",)))
    for asked, written in ((7, 7), (100, 24)):
        assert generate(speaker, ["b"], Sampling(asked)) == [" ".join("a" * written)]


def test_scores_are_those_of_the_end_of_training(run: Path, deltaw_command: Command) -> None:
    results = json.loads((run / "results.json").read_text())
    code, out, err = deltaw_command("eval", run)
    assert (code, err) == (0, "")
    row = next(line.split() for line in out.splitlines() if line.startswith("loss "))
    for moment, shown in (("before", row[1]), ("after", row[2])):
        assert float(shown) == pytest.approx(results[moment]["values"]["loss"], abs=6e-4)


def test_a_conversation_compares_with_the_base(
    opened: OpenedLanguage, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting: Iterator[str] = iter(["a b", "/base"])

    def ask() -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    chat([run], ask, sampling=SHORT)
    _, answer, base, *_ = capsys.readouterr().out.splitlines()
    assert answer.strip() == generate(opened.speaker, ["a b"], SHORT)[0]
    with deltaw.disabled(opened.model):
        assert base.strip() == generate(opened.speaker, ["a b"], SHORT)[0]


def test_a_merged_model_answers_alike(
    opened: OpenedLanguage, run: Path, deltaw_command: Command, tmp_path: Path
) -> None:
    code, out, err = deltaw_command("merge", run, tmp_path / "plain")
    assert (code, err) == (0, "") and "largest difference of answers" in out
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(opened.model))
    assert (logits(plain) - logits(base_of(run))).abs().max() > 1e-3
    assert plain.generation_config.decoder_start_token_id is not None


def test_peft_answers_alike(
    opened: OpenedLanguage, run: Path, deltaw_command: Command, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    code, _, err = deltaw_command("export", run, tmp_path / "out", "--to", "peft")
    assert (code, err) == (0, "")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        model = peft.PeftModel.from_pretrained(base_of(run), tmp_path / "out")
    assert isinstance(model, peft.PeftModelForSeq2SeqLM)
    torch.testing.assert_close(logits(model), logits(opened.model))
    assert "text2text-generation" in (tmp_path / "out" / "README.md").read_text()


def test_programs_of_causal_models_are_refused(
    run: Path, deltaw_command: Command, tmp_path: Path
) -> None:
    for to in ("vllm", "mlx", "gguf", "ollama"):
        code, _, err = deltaw_command("export", run, tmp_path / "out", "--to", to)
        assert code == 1 and f"--to {to} is for causal language models" in err
        assert "Fix: use --to hf or peft" in err
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_trained_and_not_merged_in_silence(
    deltaw_command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "model", t5(num_layers=1, d_model=16))
    data = write(tmp_path / "data.json", backwards(2))
    code, _, err = deltaw_command(
        "train", tmp_path / "model", data, "max_steps=1", "samples=0", "--targets", "lm_head",
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    code, _, err = deltaw_command("merge", tmp_path / "run", tmp_path / "plain")
    assert code == 1 and "tied" in err


def test_data_and_check_tell_prompts_and_answers_apart(
    deltaw_command: Command, tmp_path: Path
) -> None:
    save(tmp_path / "model", t5(num_layers=1, d_model=16))
    turns = [("user", "a b"), ("assistant", "b a"), ("user", "c"), ("assistant", "c d e")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns[:2]]},
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"messages": [{"role": r, "content": f"{c} ?"} for r, c in turns[:2]]},
    ]
    data = write(tmp_path / "talks.json", rows)
    words = ("validation_share=0", "batch_size=2")
    code, out, err = deltaw_command("data", data, "--model", tmp_path / "model", *words)
    assert (code, err) == (0, "")
    assert "tokens    14 of answers learnt: every answer, with its end </s>" in out
    assert "          16 of prompts read" in out
    assert "longest 6 and 4, 2,048 fit each; none cut" in out
    assert "ends      every row ends with </s>, which is learnt" in out
    assert "sample 2  " in out and "a prompt of 6 tokens, an answer of 4" in out
    assert "⟦c d e </s>⟧" in out
    assert "epoch     32 tokens go through the model, 6% of them padding" in out
    code, out, err = deltaw_command("check", tmp_path / "model", data, *words, "max_steps=2")
    assert (code, err) == (0, "")
    assert "tokens    14 of answers learnt" in out and "verify    passed" in out
    assert "first     loss" in out and "tokens of the first steps" in out


def test_prompts_of_any_length_leave_answers_their_room(opened: OpenedLanguage) -> None:
    speaker = opened.speaker
    long, few = " ".join("abc" * 9), Sampling(max_new_tokens=6)
    together = answers(speaker, ["a b", long], few, batch_size=2)
    assert together == [answers(speaker, [prompt], few)[0] for prompt in ("a b", long)]
    assert together[1] == generate(speaker, [long], few)[0]
    room = speaker.encoder.room(1)
    assert room == speaker.encoder.room(1_000) == speaker.encoder.max_length


def test_judged_rows_are_no_scores_of_such_a_model(run: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a b", "chosen": "b a", "rejected": "a b"}]
    with pytest.raises(RunError, match=r"sequence-to-sequence models are not scored by.\nFix"):
        evaluate_run(run, str(write(tmp_path / "pairs.json", rows)))
