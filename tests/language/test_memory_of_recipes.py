"""What a recipe will take of memory: said before weights are read, true to the run, with fixes."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.language import seq2seq_models
from tests.language.models import conversations, make_model, write_json
from tests.train.conftest import Command

import deltaw
from deltaw.analysis.memory import Estimate, Machine
from deltaw.analysis.memory.estimate import ABOUT
from deltaw.analysis.memory.rehearsal import rehearse
from deltaw.analysis.memory.trace import Record
from deltaw.errors import ConfigError, RunError
from deltaw.language import choosing, scores
from deltaw.language.loading import outline
from deltaw.language.memory import weighing
from deltaw.language.memory.fixes import fixes
from deltaw.language.memory.outlook import Outlook, outlook
from deltaw.language.memory.shapes import Batches, Shape, of_answers, of_texts
from deltaw.language.memory.table import variants
from deltaw.language.training import prepare as preparing
from deltaw.train import prepare as text_training
from deltaw.train.console import Console
from deltaw.train.interrupt import Interrupt
from deltaw.train.methods import weight_dtype
from deltaw.train.probing import probe
from deltaw.train.recipe import Recipe, parse
from deltaw.train.run import make_progress

MB = 10**6


def recipe_of(talker: Path, **settings: Any) -> Recipe:
    values = {"model": str(talker / "model"), "data": str(talker / "data.json"), "task": "sft"}
    return parse(values | settings)


def outlook_of(talker: Path, **settings: Any) -> Outlook:
    recipe = recipe_of(talker, **settings)
    return outlook(recipe, outline(recipe).model, [(20, 0)] * 64, [(12, 0)] * 8)


def rehearsed(one: Outlook) -> Record:
    model = copy.deepcopy(one.model).to(weight_dtype(one.recipe))
    return rehearse(model, one._kind()(one.recipe, one.batches), one.weights)


def held(record: Record, part: str, *, until: str = "") -> int:
    """The bytes of a part that are alive at the end of a phase, or of all."""
    phases = [event.phase for event in record.events]
    last = len(phases) - 1 - phases[::-1].index(until) if until else len(phases) - 1
    alive = set[int]()
    for event in record.events[: last + 1]:
        (alive.add if event.born else alive.discard)(event.number)
    return sum(record.blocks[n].size for n in alive if record.blocks[n].part == part)


def machine(monkeypatch: pytest.MonkeyPatch, total: int, free: int, swap: int = 0) -> None:
    monkeypatch.setattr(weighing, "available", lambda _: Machine(total, free, swap=swap))


def guessed(monkeypatch: pytest.MonkeyPatch, rule: Callable[[Recipe, Batches], int]) -> None:
    """Estimates by a rule, which takes no time."""
    monkeypatch.setattr(
        Outlook,
        "estimate",
        lambda one: Estimate({"activations": rule(one.recipe, one.batches)}),
    )
    monkeypatch.setattr(Outlook, "ceiling", lambda one: 10**15)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight can be read."""

    def load(*_: Any) -> Any:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(preparing, "load_model", load)


def test_check_compares_the_methods_before_it_reads_a_weight(
    deltaw_command: Command, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of a file is intact here, and all bytes after it are zero."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 900_000 * MB, 500_000 * MB)
    asked = ("gradient_accumulation=2", "batch_size=4", "r=4")
    folder = make_model(tmp_path / "model")
    file = folder / "model.safetensors"
    length, size = 8 + int.from_bytes(file.read_bytes()[:8], "little"), file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(length)
        opened.truncate(size)
    code, out, _ = deltaw_command("check", folder, talker / "data.json", *asked)
    assert code == 1, "zeros are no model that can be trained"
    lines = out[out.index("memory ") :].splitlines()
    assert lines[0].endswith("largest batch 4 rows of 128 tokens:")
    rows = {line[12:25].strip(): line[:11].strip() for line in lines[2:6]}
    assert rows == {"full": "", "LoRA r=4": "*", "QLoRA r=4": "", "GaLore r=4": ""}
    for line in lines[2:6]:
        *parts, total = (_bytes(number) for number in re.findall(r"[\d.]+ [kMG]?B", line))
        assert sum(parts) == pytest.approx(total, rel=0.01)
    assert lines[7] == "          fits: 500 GB of 900 GB RAM are free"
    assert all(len(line) <= 80 for line in lines[:7])


def _bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_run_that_cannot_fit_is_refused_before_it_reads_a_weight(
    deltaw_command: Command,
    talker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unread: None,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 60 * MB, 50 * MB, swap=20 * MB)
    guessed(monkeypatch, lambda recipe, batches: 6 * batches.trained.rows * MB)
    code, _, err = deltaw_command(command, talker / "model", talker / "data.json")
    assert code == 1
    assert err.startswith(
        "error: Memory estimate above the machine's: about 96.0 MB, and 50.0 MB of 60.0 MB RAM are "
        "free and 20.0 MB swap, so it would be killed.\nFix: one of\n"
        "  - batch_size=8 gradient_accumulation=2, about 48.0 MB\n"
    )
    assert "allow_overcommit=true tries it all the same" in err
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("recipe.yaml"))


@pytest.mark.parametrize(
    ("total", "swap", "asked"),
    [(90, 0, {}), (60, 30, {}), (50, 0, {"allow_overcommit": True})],
    ids=["close", "swap", "forced"],
)
def test_a_run_that_may_not_fit_is_warned_of(
    talker: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    total: int,
    swap: int,
    asked: dict[str, Any],
) -> None:
    machine(monkeypatch, total * MB, 50 * MB, swap * MB)
    guessed(monkeypatch, lambda recipe, batches: 6 * batches.trained.rows * MB)
    preparing.prepare(recipe_of(talker, **asked), preparing.Console())
    out = capsys.readouterr().out
    assert "memory    about 96.0 MB at most, estimated, 50.0 MB of" in out
    assert "warning   memory estimate above the machine's: about 96.0 MB" in out
    assert "  - batch_size=8 gradient_accumulation=2, about 48.0 MB" in out
    assert out.index("warning ") < out.index("Fix: ")


def test_plenty_of_memory_needs_no_estimate(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(monkeypatch, 900_000 * MB, 500_000 * MB)
    monkeypatch.setattr(Outlook, "estimate", lambda _: pytest.fail("it takes time"))
    preparing.prepare(recipe_of(talker), preparing.Console())
    assert re.search(r"memory    below \d+ MB by a rough bound, 500 GB of", capsys.readouterr().out)


def test_fixes_are_the_mildest_of_each_kind(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(recipe: Recipe, batches: Batches) -> int:
        packed = 40 * (recipe.quantization_bit is None)
        some = batches.trained.size // 8 // (1 + 7 * recipe.gradient_checkpointing)
        return (packed + some) * MB

    guessed(monkeypatch, rule)
    one = outlook_of(talker, batch_size=16, gradient_accumulation=2)
    one = one.with_recipe(Batches(Shape(16, 512), Shape(8, 512)))
    assert fixes(one, 400 * MB) == [
        "batch_size=4 gradient_accumulation=8, about 296 MB",
        "gradient_checkpointing=true, about 168 MB",
        "max_length=128, about 296 MB",
    ]
    assert fixes(one, 30 * MB) == [
        "batch_size=1 gradient_accumulation=32 gradient_checkpointing=true quantization_bit=4, "
        "about 8.00 MB"
    ]
    (nothing,) = fixes(one, 3 * MB)
    assert nothing.startswith("take a smaller model, or a machine with more memory: even batch_")
    full = one.with_recipe(method="full", optim="galore_adamw_layerwise")
    assert fixes(full, 600 * MB)[0] == "batch_size=8, about 552 MB"
    guessed(monkeypatch, lambda recipe, _: (1 + (recipe.method == "full")) * MB)
    assert fixes(full, MB) == ["method=lora optim=adamw, about 1.00 MB"]
    parse(dict(full.recipe) | {"method": "lora", "optim": "adamw"})
    assert fixes(one.with_recipe(method="full"), MB) == ["method=lora, about 1.00 MB"]


def test_weights_of_half_the_width_are_a_fix_where_they_are_frozen(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, lambda recipe, _: (100 - 50 * recipe.bf16) * MB)
    one = outlook_of(talker)
    assert fixes(one, 60 * MB) == ["bf16=true, about 50.0 MB"]
    assert "bf16" not in fixes(one.with_recipe(method="full"), 60 * MB)[0]
    assert "bf16" not in fixes(one.with_recipe(quantization_bit=8), 60 * MB)[0]


def test_what_weights_alone_exceed_is_not_estimated(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only packed or halved ones could fit; what all changes together take is said as ever."""
    asked: list[Recipe] = []

    def rule(recipe: Recipe, batches: Batches) -> int:
        asked.append(recipe)
        return 900 * MB

    guessed(monkeypatch, rule)
    one = outlook_of(talker, batch_size=4)
    (text,) = fixes(one, one.floor() - 1)
    assert text.startswith("take a smaller model, or a machine with more memory")
    dense = [recipe for recipe in asked if recipe.quantization_bit is None and not recipe.bf16]
    assert len(dense) == 3, "as it is, by the smallest batches, and with checkpointing"
    assert one.floor() == sum(p.numel() for p in one.model.parameters()) * one._dtype().itemsize


def test_no_fix_is_a_batch_that_cannot_be(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guessed(monkeypatch, lambda recipe, _: recipe.batch_size * MB)
    one = outlook_of(talker, batch_size=12)
    found = [
        fixes(
            replace(one, recipe=one.recipe.model_copy(update={"task": task}), processes=n), 5 * MB
        )
        for task, n in (("sft", 1), ("kto", 1), ("dpo", 1), ("dpo", 6))
    ]
    smallest = ["batch_size=3 gradient_accumulation=4, about 3.00 MB"]
    assert found[0] == found[2] == smallest
    assert "even batch_size=6" in found[1][0] and "even batch_size=6" in found[3][0]


def test_processes_share_batches_and_the_hosts_memory(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = outlook_of(talker, batch_size=8, method="full")
    shared = replace(alone, processes=3)
    assert (alone.trained.rows, shared.trained.rows) == (8, 3)
    parts = shared.estimate().parts
    weights = sum(p.numel() for p in alone.model.parameters())
    assert parts["buckets"] == 4 * weights and "buckets" in ABOUT
    assert alone.estimate().parts["buckets"] == 0
    assert shared.ceiling() < alone.ceiling()
    with pytest.raises(ConfigError, match="shared out"):
        shared.with_recipe(fsdp=True).estimate()
    machine(monkeypatch, 900_000 * MB, 600_000 * MB)
    weighing.weigh(Console(), shared)
    said = capsys.readouterr().out
    assert "200 GB of 300 GB RAM (for each of 3 processes) are free" in said
    monkeypatch.setattr(weighing.cuda, "device_count", lambda: 2)
    weighing.compare(Console(), alone.with_recipe(method="lora"))
    assert "largest batch 4 rows of 20 tokens" in capsys.readouterr().out


def test_a_classifier_may_begin_from_another_one(tiny: Path, tmp_path: Path) -> None:
    with_head = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny / "model", num_labels=7
    )
    with_head.save_pretrained(tmp_path / "seven")
    transformers.AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "seven")
    recipe = parse({"model": str(tmp_path / "seven"), "data": str(tiny / "data.csv")})
    seen: list[Outlook] = []
    prepare = choosing.preparation(recipe, lambda _, one: seen.append(one))
    assert prepare(recipe, Console(silent=True)).model.config.num_labels == 3
    assert seen[0].weights is not None and seen[0].estimate().total > 0


def test_texts_are_tried_with_too_little_memory_if_asked(
    deltaw_command: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 60 * MB, 50 * MB)
    guessed(monkeypatch, lambda recipe, batches: 20 * batches.trained.rows * MB)
    asked = ("train", tiny / "model", tiny / "data.csv", "--dry-run", "allow_overcommit=true")
    code, out, err = deltaw_command(*asked)
    assert (code, err) == (0, "")
    assert "warning   memory estimate above" in out and "task: classification" in out


def test_what_cannot_be_estimated_says_why(
    talker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eight = outlook_of(talker, quantization_bit=8)
    with pytest.raises(ConfigError, match="weights in 8 bits of bnb are not in the estimate"):
        eight.estimate()
    named = [(name, mine) for name, _, mine in variants(eight)]
    assert named[-1] == ("lora int8", True) and sum(mine for _, mine in named) == 1
    monkeypatch.setattr(Outlook, "ceiling", lambda _: 10**15)
    weighing.weigh(preparing.Console(), eight)
    assert "memory    not estimated: weights in 8 bits" in capsys.readouterr().out
    broken = outlook_of(talker)
    monkeypatch.setattr(type(broken.model), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(RunError, match="ZeroDivisionError: division by zero"):
        broken.estimate()


@pytest.mark.parametrize("bits", [None, 4])
def test_an_adapter_that_is_trained_on_is_as_large_as_its_own_settings(
    talker: Path, tmp_path: Path, bits: int | None
) -> None:
    if bits:
        pytest.importorskip("bitsandbytes")
    chosen = {"r": 5, "target_modules": ["q_proj", "up_proj"], "modules_to_save": ["down_proj"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(talker / "model")
    deltaw.attach(model, deltaw.LoraConfig(lora_dropout=0.2, **chosen))
    deltaw.save(model, tmp_path)
    adapters = [str(tmp_path)]
    named = outlook_of(talker, quantization_bit=bits, lora_dropout=0.2, **chosen)
    going = outlook_of(talker, quantization_bit=bits, adapter=adapters)
    assert going.estimate() == named.estimate()
    own = [name for name, _, mine in variants(going) if mine]
    assert own == ["QLoRA r=5" if bits else "LoRA r=5"]
    new = outlook_of(talker, adapter=adapters, create_new_adapter=True, r=3)
    assert new.estimate() == outlook_of(talker, r=3).estimate()
    assert [name for name, _, mine in variants(new) if mine] == ["LoRA r=3"]


def test_check_estimates_a_run_that_goes_on(
    deltaw_command: Command, talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(talker / "model")
    deltaw.attach(model, deltaw.LoraConfig(r=3, target_modules=["q_proj"]))
    deltaw.save(model, tmp_path)
    machine(monkeypatch, 900_000 * MB, 500_000 * MB)
    asked = ("check", talker / "model", talker / "data.json", f"adapter={tmp_path}")
    code, out, err = deltaw_command(*asked, "batch_size=4")
    assert code == 0, err
    assert re.search(r"\* LoRA r=3 .* MB", out)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damaged")
    code, _, err = deltaw_command(*asked)
    assert code == 1 and "adapter_model.safetensors" in err


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, "LoRA r=8"),
        ({"quantization_bit": 4, "r": 2}, "QLoRA r=2"),
        ({"method": "full"}, "full"),
        ({"method": "full", "optim": "galore_adamw_8bit", "galore_rank": 3}, "GaLore r=3"),
        ({"method": "freeze"}, "freeze"),
        ({"method": "layernorm", "quantization_bit": 4}, "layernorm nf4"),
    ],
    ids=str,
)
def test_one_row_of_the_table_is_the_recipe_itself(
    talker: Path, settings: dict[str, Any], own: str
) -> None:
    one = outlook_of(talker, **settings)
    found = list(variants(one))
    assert [name for name, _, mine in found if mine] == [own]
    assert all(other is one for _, other, mine in found if mine)
    kinds = [name.split()[0] for name, _, _ in found]
    assert kinds[:4] == ["full", "LoRA", "QLoRA", "GaLore"]
    qlora = found[2][1].recipe
    assert (qlora.method, qlora.quantization_bit) == ("lora", 4)
    assert found[3][1].recipe.uses_galore and found[3][1].recipe.quantization_bit is None
    assert {name for name, value in qlora if value != getattr(one.recipe, name)} <= {
        *("method", "quantization_bit", "quantization_method", "optim")
    }


def test_what_is_merged_is_never_to_be_packed(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guessed(monkeypatch, lambda recipe, _: (9 - 8 * (recipe.quantization_bit == 4)) * MB)
    one = outlook_of(talker)
    merged = one.with_recipe(adapter=["a", "b"])
    assert merged.recipe.merged and not one.recipe.merged
    assert fixes(one, 5 * MB) == ["quantization_bit=4, about 1.00 MB"]
    assert "quantization_bit" not in fixes(merged, 5 * MB)[0]
    kinds = [[name.split()[0] for name, _, _ in variants(each)] for each in (one, merged)]
    assert kinds == [["full", "LoRA", "QLoRA", "GaLore"], ["full", "LoRA", "GaLore"]]


def test_the_largest_batches(talker: Path) -> None:
    recipe = recipe_of(talker, batch_size=3)

    def alone(*lengths: int) -> list[tuple[int, int]]:
        return [(length, 0) for length in lengths]

    rows = alone(5, 9, 100, 5, 5, 5, 90, 95)
    found = of_answers(recipe, rows, alone(7, 8), alone(11), vocabulary=10)
    assert found == Batches(Shape(3, 90), Shape(2, 8), Shape(1, 11))
    assert of_answers(recipe, alone(5), [], [], vocabulary=10) == Batches(Shape(1, 5), None)
    few = of_answers(recipe, alone(5), alone(*[4000] * 5), [], vocabulary=5000)
    assert few.scored == Shape(3, 4000)
    apart = of_answers(recipe, [(5, 30), (9, 4), (20, 20), (6, 1)], [(5, 30)], [], vocabulary=10)
    assert apart == Batches(Shape(3, 20, 30), Shape(1, 5, 30))
    texts = of_texts(recipe, [5, 9, 100, 5, 5, 90], [7] * 40)
    assert texts == Batches(Shape(3, 100), Shape(32, 7))
    assert of_texts(recipe, [5], []) == Batches(Shape(1, 5), None)


def test_scored_batches_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "ROWS", 3)
    lengths = [9, 2, 30, 2, 2, 2, 9]
    found = scores.batches(lengths, 5, 100)
    assert sorted(index for part in found for index in part) == list(range(7))
    assert [[lengths[index] for index in part] for part in found] == [[2, 2, 2], [2, 9], [9], [30]]
    assert scores.batches([], 5, 100) == []


@pytest.mark.parametrize(("gib", "numbers"), [(8, 1 << 26), (20, 1 << 27), (141, 1 << 28)])
def test_a_gpu_with_more_memory_scores_more_at_once(
    gib: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gib << 30))
    assert scores.room(gpu=True) == numbers
    assert scores.room(gpu=False) == 1 << 26


def test_the_estimate_counts_the_batches_that_a_gpu_scores(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 << 30))
    found = of_answers(recipe_of(talker), [(5, 0)], [(4000, 0)] * 20, [], vocabulary=5000)
    assert found.scored == Shape(13, 4000)


@pytest.fixture
def writer(tmp_path: Path) -> dict[str, Any]:
    """A T5 and words to be written backwards."""
    data = seq2seq_models.write(tmp_path / "words.json", seq2seq_models.backwards())
    folder = seq2seq_models.save(tmp_path / "t5", seq2seq_models.t5())
    return {"model": str(folder), "data": str(data)}


def rated(file: Path) -> Path:
    """Answers of which every other is good."""
    rows = conversations(12)
    told = [
        {"prompt": row["instruction"], "completion": row["output"], "label": number % 2 == 0}
        for number, row in enumerate(rows)
    ]
    return write_json(file, told)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "modules_to_save": ["embed_tokens"]},
        {"method": "full", "optim": "galore_adamw_8bit", "galore_rank": 4},
        {"task": "kto"},
        {"kind": "seq2seq", "use_dora": True},
        {"kind": "seq2seq", "quantization_bit": 4},
        {"kind": "texts", "task": None, "method": "full"},
    ],
    ids=["lora", "galore", "kto", "seq2seq", "packed", "texts"],
)
def test_parts_are_those_of_a_real_run(
    talker: Path, tiny: Path, writer: dict[str, Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Adapters, moments, gradients: the bytes of the real job's tensors after a real step."""
    pytest.importorskip("bitsandbytes")
    kind = settings.pop("kind", "")
    if kind == "seq2seq":
        settings |= writer
    elif kind:
        settings |= {"model": str(tiny / "model"), "data": str(tiny / "data.csv")}
    elif "task" in settings:
        settings["data"] = str(rated(tmp_path / "rated.json"))
    recipe = recipe_of(talker, max_steps=1, batch_size=4, **settings)
    seen: list[Outlook] = []
    prepare = choosing.preparation(recipe, lambda _, one: seen.append(one))
    job = prepare(recipe, Console(silent=True))
    record = rehearsed(seen[0])
    with Interrupt() as interrupt:
        trainer = job.trainer(tmp_path, interrupt, make_progress(job, Console(silent=True)))
        probe(trainer)
    states = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert held(record, "optimiser") == sum(state.nbytes for state in states)
    trained = [p for p in job.model.parameters() if p.requires_grad]
    gradients = held(record, "gradients", until="backward")
    assert gradients == sum(p.nbytes for p in trained)
    assert held(record, "gradients") == 0
    assert seen[0].estimate().total < seen[0].ceiling()


def test_precision_accumulation_and_packing_are_in_it(talker: Path) -> None:
    plain = rehearsed(outlook_of(talker, batch_size=4))
    half = rehearsed(outlook_of(talker, batch_size=4, bf16=True))
    assert 2 * held(half, "weights", until="load") < 1.1 * held(plain, "weights", until="load")
    twice = rehearsed(outlook_of(talker, batch_size=4, gradient_accumulation=3))
    passes = [event.phase for event in twice.events]
    assert passes.index("backward") < len(passes) - 1 - passes[::-1].index("forward")
    packed = rehearsed(outlook_of(talker, batch_size=4, packing=True))
    assert held(packed, "activations", until="forward") > 0
    vocabulary = outline(recipe_of(talker)).model.get_input_embeddings().num_embeddings
    wide = [block for block in plain.blocks if block.untouched]
    assert {block.size for block in wide} == {4 * 4 * 19 * vocabulary}, "TRL's tiles of logits"
    head = outlook_of(talker, batch_size=4, target_modules=["lm_head", "q_proj"])
    assert not any(block.untouched for block in rehearsed(head).blocks)


def test_rated_answers_are_compared_without_gradients_first(talker: Path) -> None:
    one = outlook_of(talker, batch_size=4)
    plain, rated = (rehearsed(o) for o in (one, one.with_recipe(task="kto")))
    kept = [held(record, "activations", until="forward") for record in (plain, rated)]
    assert kept[0] == kept[1] > 0
    phases = [{e.phase for e in record.events if e.born} for record in (plain, rated)]
    assert phases[1] - phases[0] == {"before"}


def test_answers_that_are_apart_take_memory_too(writer: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **writer, batch_size=4)
    model = outline(recipe).model
    kept = [
        held(rehearsed(outlook(recipe, model, [sides] * 4, [])), "activations", until="forward")
        for sides in ((8, 4), (16, 4), (8, 8))
    ]
    assert kept[0] < kept[1] and kept[0] < kept[2]


def test_texts_are_weighed_before_a_weight_is_read(
    deltaw_command: Command, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    machine(monkeypatch, 900_000 * MB, 500_000 * MB)
    code, out, _ = deltaw_command("check", tiny / "model", tiny / "data.csv", "batch_size=4")
    assert code == 0
    lines = out[out.index("memory ") :].splitlines()
    assert re.search(r"largest batch 4 rows of \d+ tokens:$", lines[0])
    assert [line[12:25].strip() for line in lines[2:6]] == [
        *("full", "LoRA r=8", "QLoRA r=8", "GaLore r=4")
    ]
    code, out, _ = deltaw_command("train", tiny / "model", tiny / "data.csv", "--dry-run")
    assert code == 0
    assert out.index("memory    below") < out.index("adapter")
    machine(monkeypatch, 60 * MB, 50 * MB)
    guessed(monkeypatch, lambda recipe, batches: 20 * batches.trained.rows * MB)
    monkeypatch.setattr(text_training, "load_model", lambda *_: pytest.fail("weights are read"))
    code, _, err = deltaw_command("train", tiny / "model", tiny / "data.csv")
    assert code == 1
    assert err.startswith("error: Memory estimate above the machine's: about 320 MB, and 50.0 MB")
    assert "  - batch_size=2 gradient_accumulation=8, about 40.0 MB\n" in err


def test_pairs_of_answers_are_two_rows_each(talker: Path) -> None:
    one = outlook_of(talker, batch_size=4)
    pairs = one.with_recipe(task="dpo")
    plain, both = (held(rehearsed(o), "activations", until="forward") for o in (one, pairs))
    assert both == pytest.approx(2 * plain, rel=0.02)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_rough_bound_is_above_the_estimate(talker: Path, method: str) -> None:
    one = outlook_of(talker, method=method)
    assert one.estimate().total < one.ceiling()
