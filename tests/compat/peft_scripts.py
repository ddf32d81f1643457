"""Scripts as people write them for PEFT, and the small models they train."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

theirs = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


SETTINGS = {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 5, "target_modules": ["key", "value"]}
IDS = torch.arange(8).view(2, 4)
SIZES = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=12, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
    )
    config.update(SIZES)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
        num_labels=3,
    )
    config.update(SIZES)
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=12, d_kv=6, d_ff=20, num_layers=1, num_heads=2, dropout_rate=0
    )
    config.update({**SIZES, "decoder_start_token_id": 0})
    return transformers.T5ForConditionalGeneration(config)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))


def fill(model: nn.Module) -> None:
    """Give the trainable parameters the same numbers under both libraries' names."""
    generator = torch.Generator().manual_seed(5)

    def plain(name: str) -> str:
        parts = name.removeprefix("base_model.model.").split(".")
        drop = {"base_layer", "adapter", "default", "first", "second", "weight", "trained"}
        drop |= {"modules_to_save"}
        bias = ["bias"] if "bias" in parts else []
        return ".".join([part for part in parts if part not in {*drop, "bias"}] + bias)

    trainable = {plain(n): p for n, p in model.named_parameters() if p.requires_grad}
    for name in sorted(trainable):
        p = trainable[name]
        p.data = torch.randn(p.shape, generator=generator) * 0.3


def saved_by_peft(folder: Path) -> Path:
    """Return `folder` with an adapter as PEFT saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = theirs.get_peft_model(bert(), theirs.LoraConfig(**SETTINGS))
        fill(model)
        model.save_pretrained(str(folder))
    return folder


def trainable(model: nn.Module) -> bool:
    return any(p.requires_grad for p in model.parameters())


def run(script: str, library: str, folder: Path) -> dict[str, object]:
    names: dict[str, object] = {
        "torch": torch,
        "fill": fill,
        "folder": str(folder),
        "bert": bert,
        "gpt2": gpt2,
        "t5": t5,
        "mlp": mlp,
    }
    with warnings.catch_warnings():
        if library == "peft":  # it warns of much that is as it should be
            warnings.simplefilter("ignore")
        exec(script.replace("from peft import", f"from {library} import"), names)
    return names


# Fine-tune a classifier, save the adapter, load it on a fresh base, merge.
CLASSIFIER = """
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model

config = LoraConfig(
    task_type=TaskType.SEQ_CLS, inference_mode=False, r=4, lora_alpha=12, lora_dropout=0.0
)
model = get_peft_model(bert(), config)
model.print_trainable_parameters()
fill(model)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids, labels = torch.arange(24).reshape(4, 6) + 3, torch.tensor([0, 1, 2, 1])
losses = []
for _ in range(4):
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
model.eval()
trained = model(input_ids=ids).logits.detach()
model.save_pretrained(folder)

settings = PeftConfig.from_pretrained(folder)
assert (settings.r, settings.lora_alpha, settings.task_type) == (4, 12, "SEQ_CLS")
model = PeftModel.from_pretrained(bert(), folder)
assert not model.training
reloaded = model(input_ids=ids).logits.detach()
with model.disable_adapter():
    disabled = model(input_ids=ids).logits.detach()
model = model.merge_and_unload()
merged = model(input_ids=ids).logits.detach()
assert not isinstance(model, PeftModel)
"""

# Two adapters on a causal model, switched, generated with, deleted.
TWO_ADAPTERS = """
from peft import LoraConfig, PeftModel, get_peft_model

model = get_peft_model(gpt2(), LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7), "first")
fill(model)
model.eval()
ids = torch.arange(8).reshape(2, 4) + 3
seen = [model(input_ids=ids).logits.detach()]
model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["c_fc", "c_proj"]))
seen.append(model(input_ids=ids).logits.detach())
active = [model.active_adapter]
model.set_adapter("second")
active.append(model.active_adapter)
model.print_trainable_parameters()
fill(model)
seen.append(model(input_ids=ids).logits.detach())
words = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
model.save_pretrained(folder)

model = PeftModel.from_pretrained(gpt2(), folder + "/first", adapter_name="a")
model.load_adapter(folder + "/second", adapter_name="b")
names = sorted(model.peft_config)
seen.append(model(input_ids=ids).logits.detach())
model.set_adapter("b")
seen.append(model(input_ids=ids).logits.detach())
model.delete_adapter("a")
names += sorted(model.peft_config)
seen.append(model(input_ids=ids).logits.detach())
base = model.unload()
seen.append(base(input_ids=ids).logits.detach())
"""

# A plain module, and heads trained in full.
PLAIN = """
from peft import LoraConfig, get_peft_model

config = LoraConfig(
    r=2, lora_alpha=3, target_modules=["0"], modules_to_save=["2"], bias="lora_only"
)
model = get_peft_model(mlp(), config)
model.print_trainable_parameters()
fill(model)
x = torch.linspace(-1, 1, 20).view(4, 5)
seen = [model(x).detach()]
model.save_pretrained(folder)
merged = model.merge_and_unload()
seen.append(merged(x).detach())
"""

# An encoder and decoder, all linear layers.
SEQ2SEQ = """
from peft import LoraConfig, TaskType, get_peft_model

config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, lora_alpha=6, use_rslora=True)
model = get_peft_model(t5(), config)
model.print_trainable_parameters()
fill(model)
model.eval()
ids = torch.arange(12).reshape(2, 6) + 3
seen = [model(input_ids=ids, decoder_input_ids=ids[:, :3]).logits.detach()]
words = model.generate(input_ids=ids, max_new_tokens=4, num_beams=2, do_sample=False)
model.save_pretrained(folder)
"""
