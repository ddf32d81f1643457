"""PEFT's `adapter_names`: rows of one batch under adapters of their own, as PEFT computes them."""

from pathlib import Path

import pytest
import torch
from core.tiny import llama
from peft_scripts import IDS, SETTINGS, bert
from torch import Tensor, nn

from deltaw.compat import peft as ours
from deltaw.errors import StateError

theirs = pytest.importorskip("peft")
NAMES = ("default", "second")
# PEFT itself asks for what transformers calls deprecated.
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def both(make: object, folder: Path, **settings: object) -> tuple[nn.Module, nn.Module]:
    """PEFT's model with two adapters of other ranks, and ours with the same from disk."""
    tuned = theirs.get_peft_model(make(), theirs.LoraConfig(**settings))  # type: ignore[operator]
    tuned.add_adapter("second", theirs.LoraConfig(**settings | {"r": 5}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(folder)
    model = ours.PeftModel.from_pretrained(make(), folder)  # type: ignore[operator]
    model.load_adapter(folder / "second", "second")
    return tuned.eval(), model


def logits(model: nn.Module, ids: Tensor, names: list[str] | None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=names).logits


@PEFTS_OWN
def test_a_mixed_batch_is_that_of_peft(tmp_path: Path) -> None:
    """With a head of its own for each adapter."""
    tuned, model = both(bert, tmp_path, **SETTINGS)
    ids = torch.cat([IDS, IDS.flip(1), IDS + 1])
    rows = ["second", "__base__", *NAMES] * 6
    names = rows[: len(ids)]
    found = logits(model, ids, names)
    assert torch.allclose(found, logits(tuned, ids, names), atol=1e-5)
    assert not torch.allclose(found, logits(model, ids, None), atol=1e-2)


@PEFTS_OWN
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_peft(beams: int, tmp_path: Path) -> None:
    settings = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    tuned, model = both(llama, tmp_path, **settings)
    ids = torch.randint(1, 32, (3, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    names = ["second", "__base__", "default"]
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    assert torch.equal(found, tuned.generate(input_ids=ids, adapter_names=names, **options))
    alone = model.generate(input_ids=ids, **options)
    assert torch.equal(alone, tuned.generate(input_ids=ids, **options))
    assert not torch.equal(alone, found)


def test_only_models_that_generate_have_generate() -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(**SETTINGS))
    assert not hasattr(model, "generate")


def test_rows_that_do_not_match(tmp_path: Path) -> None:
    model = ours.get_peft_model(bert(), ours.LoraConfig(**SETTINGS))
    with pytest.raises(StateError, match="there is no adapter 'third'"):
        model(input_ids=IDS, adapter_names=["third"] * len(IDS))
    with pytest.raises(StateError, match=r"one entry for each row of the batch"):
        model(input_ids=IDS, adapter_names=["default"] * (len(IDS) + 1))
    assert model(input_ids=IDS).logits.shape[0] == len(IDS)
