"""First-class on transformers models: heads, tied weights, checkpointing, generation."""

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from core.models import shake
from core.tiny import bert, gpt2, llama
from torch import nn

import deltaw
from deltaw import LoraConfig
from deltaw.errors import DeltawError, MergeError, StateError

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

IDS = torch.tensor([[3, 9, 27, 11, 5], [8, 2, 30, 6, 6]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def test_roberta_base_counts_as_published() -> None:
    """RoBERTa-base with 2 labels, r=4 on query and both output.dense, trained head."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(
            RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2
            )
        )
    deltaw.attach(model, LoraConfig(r=4, target_modules=["query", "output.dense"]))
    summary = deltaw.summary(model)
    assert (summary.total, summary.trainable) == (124_978_946, 923_906)
    assert f"{summary.percentage:.4f}" == "0.7392" and len(summary.adapted) == 36
    assert str(summary).endswith("923,906 of 124,978,946 parameters trained (0.7392%)")
    rows = {row.name: row for row in summary.rows}
    assert (
        rows["roberta.encoder.layer.3.attention.self.query.adapter.default.weight.lora_A"].count
        == 4 * 768
    )
    assert not rows["roberta.embeddings.word_embeddings.weight"].trainable


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (bert, ["classifier"]),
        (
            lambda: DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=32, dim=20, n_layers=1, n_heads=2, hidden_dim=28)
            ),
            ["pre_classifier", "classifier"],
        ),
        (
            lambda: GPT2ForSequenceClassification(
                GPT2Config(n_layer=1, n_embd=24, n_head=2, vocab_size=32, num_labels=3)
            ),
            ["score"],
        ),
        (llama, []),
        (gpt2, []),
    ],
)
def test_new_heads_are_found(make, heads: list[str]) -> None:
    plan = deltaw.plan(make(), LoraConfig(r=2))
    assert [row.path for row in plan.trained] == heads
    assert not any(t.path.split(".")[0] in (*heads, "lm_head") for t in plan.targets)
    empty = deltaw.plan(make(), LoraConfig(r=2, modules_to_save=[]))
    assert not empty.trained and [t.path for t in empty.targets] == [t.path for t in plan.targets]


def test_targeting_the_head_adapts_it_by_lora() -> None:
    plan = deltaw.plan(bert(), LoraConfig(r=2, target_modules=["query", "classifier"]))
    assert "classifier" in [t.path for t in plan.targets] and not plan.trained


def test_a_name_that_also_hits_the_head_leaves_it_trained_in_full() -> None:
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(vocab_size=32, num_hidden_layers=1))
    plan = deltaw.plan(model, LoraConfig(target_modules=["dense"]))
    assert [row.path for row in plan.trained] == ["classifier.dense", "classifier.out_proj"]
    assert not any("classifier" in t.path for t in plan.targets)


@pytest.mark.parametrize("make", [llama, gpt2, bert])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(make, reentrant: bool) -> None:
    model = make()
    deltaw.attach(model, LoraConfig(r=3, lora_alpha=5))
    shake(model, 0.05)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(model)
    # Releases of transformers differ in the name, and later ones warn of the older.
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    deltaw.verify(model, BATCH)
    checkpointed = gradients(model)
    assert plain and plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], atol=1e-6), name


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**BATCH).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_merged_and_unmerged(beams: int) -> None:
    model = gpt2()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["c_attn", "c_fc"],
        enable_lora={"c_attn": [True, False, True]},
    )
    base = model.generate(**BATCH, max_new_tokens=6, do_sample=False, num_beams=beams)
    deltaw.attach(model, config)
    shake(model, 0.4)
    adapted = model.generate(**BATCH, max_new_tokens=6, do_sample=False, num_beams=beams)
    uncached = model.generate(
        **BATCH, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=False
    )
    assert not torch.equal(adapted, base) and torch.equal(adapted, uncached)
    with deltaw.merged(model):
        merged = model.generate(**BATCH, max_new_tokens=6, do_sample=False, num_beams=beams)
    assert torch.equal(merged, adapted)
    with deltaw.disabled(model):
        assert torch.equal(
            model.generate(**BATCH, max_new_tokens=6, do_sample=False, num_beams=beams), base
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merged_logits_agree(dtype: torch.dtype) -> None:
    model = llama(dtype)
    deltaw.attach(model, LoraConfig(r=3, lora_alpha=5))
    shake(model, 0.1)
    with torch.no_grad():
        logits = model(**BATCH).logits.float()
        with deltaw.merged(model):
            difference = model(**BATCH).logits.float() - logits
    assert difference.norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * logits.norm()


def test_autocast_keeps_its_dtype_and_master_weights() -> None:
    model = llama()
    deltaw.attach(model, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    shake(model, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**BATCH).logits
        model(**BATCH).logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_the_bases_own_checkpoint_loads_strictly() -> None:
    model = llama(tie=True)
    checkpoint = {k: v + 1 for k, v in model.state_dict().items()}
    deltaw.attach(model, LoraConfig(r=2))
    shake(model)
    before = model.layers if hasattr(model, "layers") else None
    own = {k: v.clone() for k, v in model.state_dict().items() if ".adapter." in k}
    model.load_state_dict(checkpoint, strict=True)
    after = model.state_dict()
    assert before is None and all(torch.equal(after[k], v) for k, v in own.items())
    assert all(torch.equal(after[k], v) for k, v in checkpoint.items())
    broken = {
        k: v for k, v in after.items() if not k.endswith("q_proj.adapter.default.weight.lora_B")
    }
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(broken)


@pytest.mark.parametrize("trip", ["deepcopy", "pickle", "torch.save"])
def test_round_trips_keep_the_model_and_share_nothing(trip: str) -> None:
    model = bert()
    deltaw.attach(model, LoraConfig(r=3, lora_alpha=5, bias="all"), "a")
    deltaw.attach(model, LoraConfig(r=2, target_modules=["key"]), "b")
    shake(model, 0.1)
    if trip == "deepcopy":
        twin = copy.deepcopy(model)
    elif trip == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(twin(**BATCH).logits, model(**BATCH).logits)
    deltaw.activate(twin, "b")
    assert deltaw.active(model) == {"a": 1.0}
    shake(twin, 0.1, seed=9)
    assert not torch.equal(twin(**BATCH).logits, model(**BATCH).logits)
    deltaw.detach(twin)
    assert type(twin) is BertForSequenceClassification


def test_save_pretrained_writes_an_adapter_never_a_mixture(tmp_path: Path) -> None:
    model = bert()
    deltaw.attach(model, LoraConfig(r=2))
    deltaw.attach(model, LoraConfig(r=3, target_modules=["query"]), "other")
    model.save_pretrained(tmp_path)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "deltaw.json",
        "other/adapter_config.json",
        "other/adapter_model.safetensors",
        "other/deltaw.json",
    ]
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["r"] == 3
    with pytest.raises(StateError, match="push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_resizing_the_vocabulary_is_refused() -> None:
    model = llama()
    deltaw.attach(model, LoraConfig(r=2))
    with pytest.raises(StateError, match="attach again"):
        model.resize_token_embeddings(40)


def test_tied_embeddings_run_and_refuse_to_merge() -> None:
    model = llama(tie=True)
    base = model(**BATCH).logits
    deltaw.attach(model, LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]))
    assert torch.equal(model(**BATCH).logits, base)
    shake(model)
    adapted = model(**BATCH).logits
    with pytest.raises(MergeError, match=r"tied to lm_head.weight"):
        deltaw.merge(model)
    deltaw.merge(model, untie=True)
    assert torch.allclose(model(**BATCH).logits, adapted, atol=1e-5)
    deltaw.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(**BATCH).logits, adapted)


def test_a_model_untied_for_good_is_saved_untied(tmp_path: Path) -> None:
    model = llama(tie=True)
    deltaw.attach(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    shake(model)
    with torch.no_grad():
        adapted = model(**BATCH).logits
        deltaw.merge(model, untie=True)
        assert model.config.tie_word_embeddings
        deltaw.unmerge(model)
        deltaw.merge(model, original="none", untie=True)
        deltaw.detach(model)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.allclose(again(**BATCH).logits, adapted, atol=1e-5)
    assert not model.config.tie_word_embeddings


def test_scaled_embeddings_scale_their_delta() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.Sequential(
        Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=2.5)
    ).eval()
    deltaw.attach(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    shake(model)
    ids = torch.tensor([[0, 4, 10]])
    expected = model(ids)
    plain = nn.Embedding(11, 6, padding_idx=0)
    part = model[0].adapter["default"]["weight"]
    plain.weight.data = model[0]._parameters["weight"] + 1.5 * (part.lora_B @ part.lora_A).T
    assert torch.allclose(expected[0, 1:], plain(ids)[0, 1:] * 2.5, atol=1e-6)
    with deltaw.merged(model):
        assert torch.allclose(model(ids), expected, atol=1e-6)


def test_a_model_is_still_what_transformers_takes_it_for() -> None:
    model = bert()
    deltaw.attach(model, LoraConfig(r=2))
    assert (
        isinstance(model, PreTrainedModel)
        and type(model).__name__ == "BertForSequenceClassification"
    )
    assert model.get_input_embeddings().weight.shape == (32, 20)
    with pytest.raises(DeltawError):
        model.half()


class Wrapped(nn.Module):
    """A transformers model inside another module."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model


def test_heads_are_found_inside_a_wrapper_which_alone_can_be_saved(tmp_path: Path) -> None:
    wrapper = Wrapped(bert())
    plan = deltaw.attach(wrapper, LoraConfig(r=2))
    assert [row.path for row in plan.trained] == ["model.classifier"]
    for inner in (wrapper.model, wrapper.model.bert):
        with pytest.raises(StateError, match="part of an adapted model"):
            inner.save_pretrained(tmp_path)
        with pytest.raises(StateError, match="attach again"):
            inner.resize_token_embeddings(40)
    deltaw.detach(wrapper)
    assert type(wrapper.model) is BertForSequenceClassification
    assert not any("lm_head" in t.path for t in deltaw.plan(Wrapped(llama()), LoraConfig()).targets)
