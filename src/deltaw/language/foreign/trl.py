"""The YAML that `trl sft --config` takes, and `trl dpo` and `trl kto`.

Source: github.com/huggingface/trl, trl/scripts and trl/trainer/{sft,dpo,kto,model}_config.py.
"""

from typing import Any

from deltaw.language.foreign import arguments, deepspeed
from deltaw.language.foreign.arguments import KEPT, SHOWN, SPEED, STREAMING
from deltaw.language.foreign.tool import (
    Effect,
    Fate,
    Found,
    Joint,
    Refused,
    Tool,
    Values,
    each,
    layers,
    misfit,
    names,
    number,
    truth,
)
from deltaw.train.keys import JUDGED, PREFERENCES, RATED

COLUMN = "columns are found by themselves, or named with columns"
BITS = Joint("`quantization_bit`")
LEARNT = Joint("`train_on: answers`, or `all` where it is false")
ADAPTER = Joint("as here, with `use_peft: true`")

KEYS: dict[str, Fate] = {
    **arguments.KEYS,
    "model_name_or_path": Effect("model"),
    "model_revision": Effect("revision"),
    "trust_remote_code": Effect("trust_remote_code", truth),
    "use_peft": Joint("`method: lora`, else `method: full`"),
    "lora_r": ADAPTER,
    "lora_alpha": ADAPTER,
    "lora_dropout": ADAPTER,
    "lora_target_modules": ADAPTER,
    "lora_target_parameters": ADAPTER,
    "lora_modules_to_save": ADAPTER,
    "use_rslora": ADAPTER,
    "use_dora": ADAPTER,
    "lora_task_type": Refused("leave it out", ("CAUSAL_LM",)),
    "load_in_4bit": BITS,
    "load_in_8bit": BITS,
    "bnb_4bit_quant_type": Effect("quantization_type"),
    "use_bnb_nested_quant": Joint("`double_quantization`, off where it is not given"),
    "bnb_4bit_quant_storage": SPEED,
    "dataset_name": Joint("`data`, with `dataset_config` behind a colon"),
    "dataset_config": Joint("the part of `data` behind the colon"),
    "dataset_train_split": Refused("the training split is read; leave it out", ("train",)),
    "dataset_test_split": Refused("a test or validation split is read; leave it out", ("test",)),
    "dataset_streaming": STREAMING,
    "dataset_text_field": Refused(COLUMN, ("text",)),
    "dataset_kwargs": Refused(KEPT, ({},)),
    "datasets": Refused("name several with data: a,b and mix_strategy", ([],)),
    "max_length": Effect("max_length"),
    "packing": Effect("packing", truth),
    "packing_strategy": Refused("documents are packed best fit first; leave it out", ("bfd",)),
    "completion_only_loss": LEARNT,
    "assistant_only_loss": LEARNT,
    "chat_template_path": Effect("template"),
    "shuffle_dataset": Refused("rows are drawn at random anyway; leave it out", (False, True)),
    "truncation_mode": Refused("the beginning is kept; leave it out", ("keep_start",)),
    "loss_type": Joint("`pref_loss`; `kto` is `task: kto`, `nll` is `task: sft`"),
    "beta": Joint("`pref_beta`"),
    "label_smoothing": Joint("`dpo_label_smoothing`"),
    "desirable_weight": Joint("`kto_chosen_weight`"),
    "undesirable_weight": Joint("`kto_rejected_weight`"),
    "precompute_ref_log_probs": SPEED,
    "precompute_ref_batch_size": SPEED,
    "disable_dropout": Refused(KEPT, (True,)),
    **each(("loss_weights", "ld_alpha", "use_weighting"), Refused(KEPT)),
    "f_divergence_type": Refused(KEPT, ("reverse_kl",)),
    **each(("sync_ref_model", "ref_model_mixup_alpha"), Refused("the reference stays as it is")),
    "ref_model_sync_steps": Refused("the reference stays as it is", ()),
    "eos_token": Refused("set it in the tokenizer's files", ()),
    "pad_token": Refused("padding is never learnt; leave it out", ()),
    "router_aux_loss_coef": Refused(KEPT, ()),
    "model_init_kwargs": Refused(KEPT, ({},)),
    **each(
        (
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "padding_free",
            "pad_to_multiple_of",
            "dataset_num_proc",
            "activation_offloading",
            "gradient_checkpointing_use_reentrant",
            "ignore_bias_buffers",
        ),
        SPEED,
    ),
    "eval_packing": SHOWN,
}
DEFAULTS: dict[str, Any] = arguments.DEFAULTS | {
    "learning_rate": 2e-5,
    "gradient_checkpointing": True,
    "validation_share": 0.0,
    "max_length": 1024,
    "separator": "",
}
SETTINGS = {
    "lora_r": ("r", number),
    "lora_alpha": ("lora_alpha", number),
    "lora_dropout": ("lora_dropout", number),
    "lora_target_modules": ("target_modules", layers),
    "lora_target_parameters": ("target_parameters", names),
    "lora_modules_to_save": ("modules_to_save", names),
    "use_rslora": ("use_rslora", truth),
    "use_dora": ("use_dora", truth),
}
"""Keys that say how the adapter is, and how they are read."""
JUDGEMENTS = {
    "beta": "pref_beta",
    "label_smoothing": "dpo_label_smoothing",
    "desirable_weight": "kto_chosen_weight",
    "undesirable_weight": "kto_rejected_weight",
}
"""Keys of `trl dpo` and `trl kto` as a recipe has them."""
WEIGHTS = ("desirable_weight", "undesirable_weight")
ANSWERS = ("nll", "chunked_nll", "dft")
"""Losses of answers as they are."""
LOGGING_STEPS = 10
SLOW = 1e-6
"""The learning rate of `trl dpo` and `trl kto` where a file has none."""
ADAPTER_DEFAULTS = {"r": 16, "lora_alpha": 32.0, "lora_dropout": 0.05}


def join(given: Values, found: Found) -> None:
    """Read what several keys say together."""
    arguments.join(given, found, LOGGING_STEPS)
    _task(given, found)
    if found.read(given, "use_peft", truth):
        _adapter(given, found)
    else:
        found.usual["method"] = "full"
        without = [name for name in SETTINGS if name in given]
        if without:
            found.notes.append(f"{', '.join(without)}: no effect without use_peft: true, as there")
    bits = [bit for bit in (4, 8) if found.read(given, f"load_in_{bit}bit", truth)]
    for bit in bits:
        found.give("quantization_bit", bit, f"load_in_{bit}bit")
    if bits != [8]:
        found.usual["bf16"] = True
    if bits == [4]:
        nested = found.read(given, "use_bnb_nested_quant", truth)
        found.choose(given, "double_quantization", bool(nested), "use_bnb_nested_quant")
    if "dataset_name" in given:
        part = f":{given['dataset_config']}" if "dataset_config" in given else ""
        found.give("data", f"{given['dataset_name']}{part}", "dataset_name")
    found.names.setdefault("data", "dataset_name")
    deepspeed.join(given, found)
    _learnt(given, found)


def _task(given: Values, found: Found) -> None:
    """Read what is trained: judgements where a key, of the recipe too, is about them."""
    for name, key in JUDGEMENTS.items():
        value = found.read(given, name, number)
        if value is not None:
            found.give(key, value, name)
    loss = given.get("loss_type", "")
    losses = loss if isinstance(loss, list) and loss else [loss]
    keys, task = found.own.keys(), found.own.get("task")
    rated = loss == "kto" or any(name in given for name in WEIGHTS) or keys & {*RATED}
    compared = "label_smoothing" in given or losses[0] not in ("", "kto", *ANSWERS)
    if rated or compared or keys & {*PREFERENCES}:
        found.usual["task"] = "kto" if rated else "dpo"
    elif task not in ("dpo", "kto") and "beta" not in given and not keys & {*JUDGED}:
        found.usual["task"] = "sft"
        if loss == "dft":
            found.problems.append(misfit("loss_type", loss, f"not done here; {KEPT}"))
        return
    found.usual["learning_rate"] = SLOW
    if compared and len(losses) > 1:
        found.problems.append(misfit("loss_type", loss, "give one loss"))
    elif compared and "loss_type" in given:
        found.give("pref_loss", losses[0], "loss_type")


def _adapter(given: Values, found: Found) -> None:
    found.give("method", "lora", "use_peft")
    found.usual |= ADAPTER_DEFAULTS
    for name, (key, how) in SETTINGS.items():
        value = found.read(given, name, how)
        if value is not None:
            found.give(key, value, name)
    if "lora_target_modules" not in given:
        found.problems.append(
            "lora_target_modules is missing, and what PEFT takes then depends on the model; give "
            "the names of layers, or all-linear"
        )


def _learnt(given: Values, found: Found) -> None:
    for name in ("completion_only_loss", "assistant_only_loss"):
        answers = found.read(given, name, truth)
        if answers is not None:
            found.give("train_on", "answers" if answers else "all", name)
    if "train_on" not in found.values and found.usual.get("task") == "sft":
        found.usual["train_on"] = "answers"
        found.notes.append(
            "answers alone are learnt; TRL learns the questions of `messages` too, unless "
            "assistant_only_loss: true"
        )


TOOL = Tool(
    "TRL", frozenset({"model_name_or_path", "dataset_name", "use_peft"}), KEYS, DEFAULTS, join
)
