"""Runs whose states are compared by answers, and answers of a run beside its base's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language.models import conversations, write_json
from tests.train.conftest import Command

import deltaw
from deltaw.errors import ConfigError, DataError
from deltaw.language import examining
from deltaw.language.choosing import train
from deltaw.language.encoding.encoder import samples_of
from deltaw.language.examining import examination
from deltaw.language.generating import Sampling, answers, generate
from deltaw.language.use.opened import open_language
from deltaw.train.recipe import parse
from deltaw.train.runfolder import RunFolder

QUESTION = "What is the colour of the sky, number 0?"


@pytest.fixture(scope="module")
def values(talker: Path) -> dict[str, Any]:
    return {
        "model": str(talker / "model"),
        "data": str(talker / "data.json"),
        "max_steps": 12,
        "eval_every": 4,
        "batch_size": 8,
        "learning_rate": 0.05,
        "metric": "chrf",
        "max_new_tokens": 12,
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(parse(values | {"output": str(tmp_path_factory.mktemp("runs") / "run")}))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three questions, the first with two answers."""
    rows = conversations(3)
    more = rows[0] | {"output": "It is blue."}
    return write_json(tmp_path_factory.mktemp("asked") / "asked.json", [*rows, more])


def test_the_best_state_is_the_one_with_the_best_answers(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    shown = "\n".join(entry.get("text", "") for entry in log)
    assert "answers   2 prompts, 2 references; answered greedily in at most 12 tokens" in shown
    assert "BLEU and NIST count words, as sacrebleu's tokenizer 13a has them" in shown
    assert shown.count("validation chrf") == 3
    before, after = results["before"], results["after"]
    assert before["primary"] == after["primary"] == "chrf"
    names = ["loss", "perplexity", "tokens_right"]
    assert list(after["values"]) == [*names, "exact_match", "bleu", "nist", "rouge_l", "chrf"]
    assert after["intervals"].keys() == after["values"].keys()
    assert after["values"]["chrf"] == results["best_validation"]  # the same rows


def test_answering_leaves_no_trace_in_training(values: dict[str, Any], tmp_path: Path) -> None:
    few = {"keep": "last", "max_steps": 4, "eval_every": 2}
    both = [
        train(parse(values | few | {"output": str(tmp_path / name), "metric": name}))
        for name in ("loss", "bleu")
    ]
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in both)
    assert one == other


def test_answers_are_scored_beside_the_bases(
    run: Path, asked: Path, deltaw_command: Command, tmp_path: Path
) -> None:
    code, out, err = deltaw_command("eval", run, asked, "--generate")
    assert (code, err) == (0, "")
    assert "3 prompts, 4 references; answered greedily in at most 12 tokens" in out
    assert f"written   the answers, to {run / 'answers.jsonl'}" in out
    lines = [line.split()[0] for line in out.splitlines()]
    table = lines[lines.index("base") + 1 :]
    assert table[:8] == [
        "chrf", "loss", "perplexity", "tokens_right", "exact_match", "bleu", "nist", "rouge_l",
    ]  # fmt: skip
    assert table[8:] == ["loss", "exact_match", "bleu", "nist", "rouge_l", "chrf", "written"]
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [len(row["references"]) for row in rows] == [2, 1, 1]
    assert all(list(row) == ["prompt", "references", "base", "answer"] for row in rows)
    opened = open_language(run)
    prompts = [row["prompt"] for row in rows]
    assert QUESTION in prompts[0] and prompts[0].endswith("### Response:\n")
    sampling = Sampling(max_new_tokens=12)
    assert answers(opened.speaker, prompts, sampling) == [row["answer"] for row in rows]
    with deltaw.disabled(opened.model):
        assert answers(opened.speaker, prompts, sampling) == [row["base"] for row in rows]
    assert [row["answer"] for row in rows] != [row["base"] for row in rows]
    exam = examination(opened.speaker, opened.recipe, _samples(asked, opened))
    chrf = exam.scored([row["answer"] for row in rows])["chrf"].value
    shown = next(line.split() for line in out.splitlines() if line.startswith("chrf "))
    assert float(shown[2]) == pytest.approx(chrf, abs=6e-4)

    code, again, _ = deltaw_command(
        "eval", run, asked, "--generate", "--no-merge", "-o", tmp_path / "here.jsonl"
    )
    assert code == 0 and "adapter beside" in again
    assert (tmp_path / "here.jsonl").read_text() == (run / "answers.jsonl").read_text()


def _samples(file: Path, opened: Any) -> Any:
    from deltaw.language.data.corpus import Request, load

    return samples_of(opened.encoder.encode(load(Request(str(file), val_size=0)).train).rows)


def test_the_adapter_is_in_the_weights_while_answers_are_generated(
    run: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_language(run)
    before = {name: value.clone() for name, value in opened.model.state_dict().items()}
    exam = examination(opened.speaker, opened.recipe, _samples(asked, opened))

    def watched(*given: Any) -> list[str]:
        weight = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(opened.model.state_dict()[weight], before[weight])
        return answers(*given)

    monkeypatch.setattr(examining, "answers", watched)
    first = exam.sit()
    monkeypatch.undo()
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    beside = exam.scored(exam.answers())
    assert {n: t.value for n, t in first.items()} == {n: t.value for n, t in beside.items()}


def test_answers_do_not_depend_on_their_batch(run: Path) -> None:
    speaker = open_language(run).speaker
    prompts = ["x", "What is the colour of the snow?", "A longer one, which is about coal.", "y?"]
    for sampling in (Sampling(8), Sampling(8, num_beams=3, length_penalty=0.5)):
        alone = [generate(speaker, [prompt], sampling)[0] for prompt in prompts]
        for size in (1, 3, 4):
            assert answers(speaker, prompts, sampling, size) == alone
    length = speaker.encoder.max_length
    long = "sky " * length
    assert len(answers(speaker, [long, "x"], Sampling(8))) == 2


def test_beams_and_penalties_are_those_of_the_recipe(run: Path, asked: Path) -> None:
    opened = open_language(run)
    samples = _samples(asked, opened)
    open_end = opened.recipe.model_copy(update={"max_new_tokens": None})
    exam = examination(opened.speaker, open_end, samples)
    texts = [text for one in exam.questions for text in one.references]
    longest = max(len(opened.tokenizer(text)["input_ids"]) for text in texts) - 1  # BOS
    assert exam.sampling == Sampling(int(1.5 * longest) + 1)
    beams = {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.2}
    for ways in (beams, {"no_repeat_ngram_size": 1}):
        recipe = opened.recipe.model_copy(update=ways)
        exam = examination(opened.speaker, recipe, samples)
        assert ("answered by 3 beams in at most 12" in str(exam)) == (ways is beams)
        ids = opened.tokenizer(exam.questions[0].prompt, add_special_tokens=False)["input_ids"]
        asked_alone = {"max_new_tokens": 12, "do_sample": False, **ways}
        wanted = opened.model.generate(torch.tensor([ids]), **asked_alone)[0, len(ids) :]
        text = opened.tokenizer.decode(wanted, skip_special_tokens=True).strip()
        assert exam.answers()[0] == text


def test_a_metric_that_does_not_fit_is_refused_before_anything_is_written(
    values: dict[str, Any], tmp_path: Path
) -> None:
    new = values | {"output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="metric=accuracy is no score of task=sft"):
        train(parse(new | {"metric": "accuracy"}))
    texts = write_json(tmp_path / "texts.json", [{"text": f"Text {n}."} for n in range(6)])
    pairs = write_json(
        tmp_path / "pairs.json",
        [{"prompt": f"{n}?", "chosen": "b", "rejected": "c"} for n in range(12)],
    )
    with pytest.raises(DataError, match="Plain texts ask nothing"):
        train(parse(new | {"data": str(texts), "validation_share": 2}))
    del new["max_new_tokens"]
    with pytest.raises(ConfigError, match="metric=chrf is no score of task=dpo"):
        train(parse(new | {"data": str(pairs)}))
    with pytest.raises(ConfigError, match="num_beams=2 has no effect with task=dpo"):
        train(parse(new | {"data": str(pairs), "num_beams": 2, "metric": None}))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_what_answers_nothing_says_so(run: Path, deltaw_command: Command, tmp_path: Path) -> None:
    code, _, err = deltaw_command("eval", run, "-o", tmp_path / "x.jsonl")
    assert code == 1 and "Fix: give --generate too." in err
    classes: dict[str, Any] = {"model": "m", "data": "d.csv", "record": {}}
    RunFolder(tmp_path).write_recipe(parse(classes).model_copy(update={"record": {}}))
    code, _, err = deltaw_command("eval", tmp_path, "--generate")
    assert code == 1 and "The run labels texts and answers nothing." in err
    assert not (tmp_path / "x.jsonl").exists()


def test_a_folder_that_is_not_there_is_said_before_anything_is_answered(
    run: Path, deltaw_command: Command, tmp_path: Path
) -> None:
    code, out, err = deltaw_command("eval", run, "--generate", "-o", tmp_path / "none" / "a.jsonl")
    assert (code, out) == (1, "")
    assert "is no folder to write answers to.\nFix: create it" in err


def test_validation_rows_that_cannot_be_scored_are_said(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_json(folder / "train.json", conversations(6))
    long = {"instruction": "word " * 90, "input": "", "output": "Blue."}
    write_json(folder / "validation.json", [long, long | {"input": "x"}])
    new = {"data": str(folder), "output": str(tmp_path / "run"), "max_steps": 1, "eval_every": None}
    with pytest.raises(DataError, match=r"None of the 2 validation samples(.|\n)*metric go by"):
        train(parse(values | new | {"metric": None, "max_new_tokens": None, "early_stopping": 1}))
    with pytest.raises(DataError, match="None of the 2 validation samples can be scored"):
        train(parse(values | new))
    capsys.readouterr()
    train(parse(values | new | {"metric": None}))
    assert "warning   None of the 2 validation samples can be scored:" in capsys.readouterr().out
