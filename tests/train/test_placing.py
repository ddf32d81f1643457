"""Models that no Trainer places are used on the GPU where there is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from deltaw.errors import RunError
from deltaw.language import merged
from deltaw.train import evaluate, export, methods, opened, packing, placing, predict
from deltaw.train import run as running
from deltaw.train.placing import place
from deltaw.train.recipe import Recipe, parse


def test_without_a_gpu_a_model_stays_where_it_is() -> None:
    model = nn.Linear(2, 2)
    assert place(model) is model
    assert model.weight.device.type == "cpu"


def test_a_gpu_is_used_and_a_full_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Module] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: moved.append(self) or self)
    model = nn.Linear(2, 2)
    assert place(model) is model and moved == [model]

    def full(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "cuda", full)
    with pytest.raises(RunError, match=r"Linear does not fit[^§]*Fix: .*CUDA_VISIBLE_DEVICES=''"):
        place(model)


def test_runs_are_scored_and_asked_there(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    placed: list[nn.Module] = []
    monkeypatch.setattr(opened, "place", lambda model: placed.append(model) or model)
    evaluate.evaluate_run(finished, None)
    predict.predict_run(finished, ["refund order 1 now"])
    assert len(placed) == 2


def test_a_merged_run_is_compared_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[nn.Module] = []
    for module in (opened, export):
        monkeypatch.setattr(module, "place", lambda model: placed.append(model) or model)
    export.merge_run(finished, tmp_path / "plain")
    assert len(set(placed)) == 2


def test_a_model_has_room_where_its_weights_leave_a_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(9, 10, bias=False)  # of 360 bytes
    assert placing.home() is None and not placing.has_room(model)
    free = [401]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 1 << 30))
    assert placing.home() == torch.device("cuda:3") and placing.has_room(model)
    free[0] = 400
    assert not placing.has_room(model)
    assert placing.has_room(model.to("meta"))


def fitted(tiny: Path, **settings: Any) -> tuple[nn.Module, Recipe]:
    """A classifier and a recipe for it."""
    recipe = parse({"model": str(tiny / "model"), "data": str(tiny / "data.csv")} | settings)
    config = transformers.AutoConfig.from_pretrained(recipe.model)
    return transformers.AutoModelForSequenceClassification.from_config(config), recipe


@pytest.mark.parametrize("room", [True, False])
def test_a_start_is_computed_where_there_is_room(
    tiny: Path, room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    model, recipe = fitted(tiny, init_lora_weights="pissa")
    attach = methods.deltaw.attach

    def attached(*args: Any, **options: Any) -> Any:
        done.append("start")
        return attach(*args, **options)

    monkeypatch.setattr(packing, "has_room", lambda model: room)
    monkeypatch.setattr(packing, "place", lambda model: done.append("place"))
    monkeypatch.setattr(methods.deltaw, "attach", attached)
    methods.adapt(model, recipe)
    assert done == ["place"] * room + ["start"]


def test_data_to_start_from_go_to_where_the_model_is_then() -> None:
    model = nn.Linear(2, 2)
    batches = methods._beside(model, [{"x": torch.ones(1)}] * 2)
    assert next(batches)["x"].device.type == "cpu"
    model.to("meta")
    assert next(batches)["x"].device.type == "meta"


@pytest.mark.parametrize("method", ["bnb", "torchao"])
def test_int4_of_torchao_is_absorbed_on_the_gpu_or_not_at_all(
    tiny: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = fitted(
        tiny,
        init_lora_weights="pissa",
        absorb=True,
        quantization_bit=4,
        quantization_method=method,
    )
    packing.move(model, recipe)
    monkeypatch.setattr(packing, "home", lambda: torch.device("cuda"))
    if method == "bnb":
        packing.move(model, recipe)
        return
    with pytest.raises(RunError, match=r"before it is packed[^§]*Fix: quantization_method=bnb"):
        packing.move(model, recipe)


def test_what_is_packed_on_a_gpu_is_not_left_apart(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[nn.Module] = []
    monkeypatch.setattr(packing, "place", placed.append)
    model, recipe = fitted(tiny, quantization_bit=4)
    packing.move(model, recipe)
    assert placed == [model]


def test_weights_that_do_not_fit_packed_are_said(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing.deltaw, "quantize", full)
    model, recipe = fitted(tiny, quantization_bit=4)
    with pytest.raises(RunError, match="does not fit into the memory of the GPU"):
        packing.pack(model, recipe, ())


def test_a_gpu_that_fills_up_in_training_is_said(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(running.RecipeTrainer, "training_step", full)
    values = {"model": str(tiny / "model"), "data": str(tiny / "data.csv"), "max_steps": 1}
    with pytest.raises(RunError, match=r"no memory left: CUDA out[^§]*Fix: a smaller batch_size"):
        running.train(parse(values | {"output": str(tmp_path / "run")}), silent=True)


def test_an_adapter_that_cannot_be_merged_for_want_of_memory_stays_beside(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: nn.Module) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(merged.deltaw, "merge", full)
    recipe = parse({"model": str(tiny / "model"), "data": str(tiny / "data.csv")})
    with merged.merged(nn.Linear(2, 2), recipe) as done:
        assert done == "adapter not merged: CUDA out of memory"


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("supported", [True, False])
def test_float32_on_a_gpu_that_has_bfloat16_is_said(
    tiny: Path, bf16: bool, supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = fitted(tiny, bf16=bf16)
    assert methods._precision(recipe) == []
    monkeypatch.setattr(methods, "move", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    adapted = methods.adapt(model, recipe)
    said = [w for w in adapted.warnings if w.endswith("Fix: bf16=true")]
    assert len(said) == (supported and not bf16)
