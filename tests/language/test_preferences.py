"""Direct preference optimisation: pairs, their loss, and training against the base."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.language.models import COLOURS, make_model, write_json
from tests.language.test_encoding import learnt
from tests.language.tokenizers_ import byte_level, sentence_piece
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaw.errors import ConfigError, DataError
from deltaw.language.choosing import settle, train
from deltaw.language.data.samples import Message, Preference
from deltaw.language.encoding.batches import Padding
from deltaw.language.encoding.encoder import Encoder
from deltaw.language.encoding.templating import choose, ends
from deltaw.language.training.losses import PairLoss
from deltaw.language.training.pairs import encode, preferred, score
from deltaw.train.escape import printable
from deltaw.train.recipe import parse

ADAPTER = "adapter_model.safetensors"

ASKED = (Message("user", "What is blue?"),)


def preference(chosen: str, rejected: str) -> Preference:
    return Preference(
        ASKED, (Message("assistant", chosen),), (Message("assistant", rejected),), "f", 1
    )


def encoder(tokenizer: Any, length: int = 200) -> Encoder:
    template = choose(tokenizer, "alpaca").template
    return Encoder(tokenizer, template, length, ends(tokenizer))


@pytest.mark.parametrize("tokenizer", [byte_level(bos="<s>"), sentence_piece()])
def test_pairs_share_their_prompt_and_end_with_eos(tokenizer: Any) -> None:
    plain = Preference("What is blue?\n", "The sky.", "Coal is, I think.", "f", 2)
    found = encode(encoder(tokenizer), [preference("The sky.", "Coal."), plain])
    assert len(found.pairs) == 2 and not found.skipped
    for pair in found.pairs:
        data = pair.as_data()
        for name, row in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            assert data["prompt_ids"] + data[f"{name}_ids"] == row.input_ids
            assert data[f"{name}_ids"][-1] == tokenizer.eos_token_id
    first = found.pairs[0]
    assert learnt(tokenizer, first.chosen).replace(" ", "") == f"Thesky.{tokenizer.eos_token}"
    assert learnt(tokenizer, first.rejected).replace(" ", "") == f"Coal.{tokenizer.eos_token}"


def test_what_does_not_fit_is_cut_or_skipped_and_said() -> None:
    tokenizer = byte_level()
    whole = encode(encoder(tokenizer), [preference("The sky.", "Coal." * 9)]).pairs[0]
    room = len(whole.chosen.input_ids) + 2
    found = encode(encoder(tokenizer, room), [preference("The sky.", "Coal." * 9)])
    assert found.cut == 1 and len(found.pairs[0].rejected.input_ids) == room
    found = encode(encoder(tokenizer, 10), [preference("The sky.", "Coal.")])
    assert not found.pairs and "10 fit, and the answer lies beyond" in str(found.skipped[0])


def test_too_long_is_followed() -> None:
    tokenizer = byte_level()
    sample = preference("The sky.", "Coal." * 9)
    made = encoder(tokenizer, len(encode(encoder(tokenizer), [sample]).pairs[0].chosen.input_ids))
    dropped = encode(replace(made, too_long="drop"), [sample])
    assert not dropped.pairs and not dropped.cut
    assert str(dropped.skipped[0]).startswith("f:1: ") and "fit" in dropped.skipped[0].reason
    with pytest.raises(DataError, match=r"f:1: .* fit\nFix: .*too_long"):
        encode(replace(made, too_long="raise"), [sample])
    both = preference("The sky." * 9, "Coal." * 20)
    with pytest.raises(DataError) as caught:
        encode(replace(made, too_long="raise"), [both, replace(sample, line=2)])
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert [line[:9] for line in listed] == ["  - f:1: ", "  - f:2: "]
    assert encode(replace(made, too_long="truncate"), [sample]).cut == 1
    with pytest.raises(ConfigError, match=r"too_long=split: an answer is judged as a whole"):
        encode(replace(made, too_long="split"), [sample])


def test_the_loss_is_the_papers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path)).eval()
    tokenizer = byte_level(bos="<s>")
    pairs = encode(
        encoder(tokenizer), [preference("The sky.", "Coal."), preference("a", "b")]
    ).pairs
    found = preferred(model, pairs, Padding(0))
    reference = found - np.array([[0.5, 0.1], [0.2, 0.9]])
    expected, margins = [], []
    for pair, known in zip(pairs, reference, strict=True):
        gains = []
        for row, log_p in zip((pair.chosen, pair.rejected), known, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
            begin = len(pair.prompt)
            own = sum(logits[n - 1, row.input_ids[n]] for n in range(begin, len(row.input_ids)))
            gains.append(float(own) - log_p)
        margins.append(0.3 * (gains[0] - gains[1]))
        expected.append(-torch.nn.functional.logsigmoid(torch.tensor(margins[-1])).item())
    sizes = np.array([[pair.chosen.learnt, pair.rejected.learnt] for pair in pairs])
    scored = score(found, reference, sizes, PairLoss(beta=0.3))
    assert scored.values["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert scored.values["accuracy"] == np.mean([margin > 0 for margin in margins])
    assert scored.values["margin"] == pytest.approx(np.mean(margins), rel=1e-5)
    start = score(found, found, sizes, PairLoss(beta=0.3))
    assert start.values["loss"] == pytest.approx(np.log(2)) and start.values["accuracy"] == 0.5


@pytest.fixture(scope="module")
def values(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    things = list(COLOURS)
    rows = [
        {
            "prompt": f"The colour of the {things[n % 5]} number {n}? ",
            "chosen": f"It is {COLOURS[things[n % 5]]}.",
            "rejected": "No idea at all.",
        }
        for n in range(20)
    ]
    data = write_json(tmp_path_factory.mktemp("pairs") / "pairs.json", rows)
    return {
        "model": str(talker / "model"),
        "data": str(data),
        "max_steps": 6,
        "eval_every": 3,
        "batch_size": 6,
        "learning_rate": 2e-2,
        "pref_beta": 0.3,
    }


def test_a_run_learns_what_is_preferred(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("hash_module", "create_model_from_path"):  # the base is neither read nor loaded
        monkeypatch.delattr(f"trl.trainer.dpo_trainer.{name}")
    run = train(parse(values | {"output": str(tmp_path / "run")}))
    out = capsys.readouterr().out
    assert "18 pairs; the reference is the model with its adapters off" in out
    assert "verify    passed" in out and f"deltaw export {run} OUT --to hf" in out
    results = json.loads((run / "results.json").read_text())
    assert results["before"]["values"]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert results["after"]["values"]["loss"] < 0.5
    assert results["after"]["values"]["accuracy"] == 1.0
    recipe = (run / "recipe.yaml").read_text()
    assert "task: dpo" in recipe and "pref_beta: 0.3" in recipe


def test_held_out_prompts_are_answered_before_by_the_reference_and_while_training(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer before the first step is the base's; the weights do not move for it."""
    run, quiet = (
        train(parse(values | {"samples": count, "output": str(tmp_path / f"{count}")}))
        for count in (1, 0)
    )
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    answers = [line for line in lines if line.startswith("step ") and "  answer  " in line]
    assert [line.split()[1] for line in answers] == ["0", "3", "6"]
    (asked,) = (line.split("  asked   ")[1] for line in lines if "  asked   " in line)
    assert asked.startswith("The colour of the ")
    assert [line for line in lines if line.startswith("wanted  It is ")]
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    ids = tokenizer(f"{asked} ", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(values["model"])
    said = base.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    said = printable(tokenizer.decode(said, skip_special_tokens=True).strip())
    assert answers[0].split("  answer  ")[1:] == [said]
    assert (run / ADAPTER).read_bytes() == (quiet / ADAPTER).read_bytes()


def test_the_first_step_is_that_of_the_paper(
    values: dict[str, Any], tmp_path: Path, talker: Path
) -> None:
    """The loss that the Trainer logs is the mean over its batch, log 2 before anything moved."""
    more = {"validation_share": 0, "max_steps": 1, "batch_size": 20, "output": str(tmp_path / "r")}
    run = train(parse(values | more))
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = next(event for event in events if "loss" in event)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_full_fine_tuning_has_its_own_start_as_reference(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"method": "full", "output": str(tmp_path / "run"), "learning_rate": 1e-3}
    run = train(parse(values | more | {"metric": "accuracy"}))
    assert "the reference is the model as it starts" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["before"]["values"]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert results["after"]["values"]["loss"] < np.log(2)
    assert results["best_validation"] == results["after"]["values"]["accuracy"] > 0.5


@pytest.mark.parametrize("start", ["pissa", "eva", "lora_ga"])
def test_starts_learn_preferences_too(values: dict[str, Any], tmp_path: Path, start: str) -> None:
    more = {"init_lora_weights": start, "max_steps": 1, "r": 2, "learning_rate": 1e-4}
    run = train(parse(values | more | {"output": str(tmp_path / "run")}))
    results = json.loads((run / "results.json").read_text())
    assert results["before"]["values"]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_what_preferences_cannot_do_is_said(values: dict[str, Any], talker: Path) -> None:
    assert settle(parse({k: v for k, v in values.items() if k != "pref_beta"})).task == "dpo"
    with pytest.raises(DataError, match="task=dpo learns from pairs"):
        train(parse(values | {"data": str(talker / "data.json"), "output": "x"}))
    with pytest.raises(ConfigError, match="reads past an adapter on the output head"):
        train(parse(values | {"target_modules": ["lm_head"], "output": "x"}))
    with pytest.raises(ConfigError, match=r"metric=pearson is no score of task=dpo.*\nFix: .*acc"):
        train(parse(values | {"metric": "pearson", "output": "x"}))
    with pytest.raises(ConfigError, match="packing=True has no effect with task=dpo"):
        parse(values | {"task": "dpo", "packing": True})
    with pytest.raises(ConfigError, match=r"pref_beta=0.3 has no effect with task=sft"):
        parse(values | {"task": "sft"})
