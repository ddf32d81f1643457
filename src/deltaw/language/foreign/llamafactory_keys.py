"""What becomes of each key of LLaMA-Factory's files.

Source: github.com/hiyouga/LLaMA-Factory, src/llamafactory/hparams.
"""

from typing import Any

from deltaw.language.foreign import arguments
from deltaw.language.foreign.arguments import ALONE, KEPT, SHOWN, SPEED, STREAMING
from deltaw.language.foreign.tool import (
    Effect,
    Fate,
    Ignored,
    Joint,
    Refused,
    each,
    joined,
    layers,
    names,
    number,
    numbers,
    truth,
)

MEDIA = "images, video and sound are not trained on; leave it out"
VOCABULARY = "change the tokenizer and the model's embeddings first, and save both"
STAGE = "it belongs to another stage; leave it out"
OPTIMISER = "choose optim or use_galore, or leave it out"
ANSWERING = Ignored("how answers are drawn; those that are scored are the likeliest")
SCORED = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty")
"""How answers are generated where they are scored."""


def _pref_loss(value: Any) -> Any:
    """Return the name of a loss of pairs."""
    if value == "kto_pair":
        raise ValueError("it is not in TRL any more; stage: kto learns from pairs too")
    return value


KEYS: dict[str, Fate] = {
    **arguments.KEYS,
    "model_name_or_path": Effect("model"),
    "model_revision": Effect("revision"),
    "trust_remote_code": Effect("trust_remote_code", truth),
    "stage": Joint("`task`: `sft` for pt and sft, `dpo` for dpo, `kto` for kto"),
    "finetuning_type": Joint("`method`"),
    "lora_rank": Effect("r"),
    "lora_alpha": Effect("lora_alpha", number),
    "lora_dropout": Effect("lora_dropout", number),
    "lora_target": Effect("target_modules", layers),
    "additional_target": Effect("modules_to_save", names),
    "use_rslora": Effect("use_rslora", truth),
    "use_dora": Effect("use_dora", truth),
    "pissa_init": Joint("`init_lora_weights: pissa`"),
    "pissa_iter": Joint("`pissa_niter_N`; -1 is the whole SVD, `pissa_exact`"),
    "pissa_convert": Ignored("the adapter is always written as a plain LoRA"),
    "loraplus_lr_ratio": Effect("loraplus_lr_ratio", number),
    "loraplus_lr_embedding": Effect("loraplus_lr_embedding", number),
    "freeze_trainable_layers": Joint("`last_layers`; the first layers (negative) are refused"),
    "freeze_trainable_modules": Refused("whole layers are trained; leave it out", ("all",)),
    "freeze_extra_modules": Refused(KEPT, ()),
    "dataset": Effect("data", joined),
    "eval_dataset": Effect("eval_data", joined),
    "eval_on_each_dataset": Effect("eval_on_each_dataset", truth),
    "dataset_dir": Joint("`dataset_dir`; `ONLINE` means hub names"),
    "template": Effect("template"),
    "default_system": Effect("default_system"),
    "enable_thinking": Effect("enable_thinking", lambda value: None if truth(value) else False),
    "preserve_thinking": Effect("preserve_thinking", lambda value: truth(value) or None),
    "cutoff_len": Effect("max_length"),
    "max_samples": Joint("`max_samples`, drawn by the seed"),
    "mix_strategy": Effect("mix_strategy"),
    "interleave_probs": Effect("interleave_probs", numbers),
    "train_on_prompt": Joint("`train_on: all`"),
    "mask_history": Joint("`train_on: last`"),
    "packing": Joint("`packing`, in which documents do not see each other"),
    "neat_packing": Joint("`packing`"),
    "plot_loss": Effect("plot_loss", truth),
    "val_size": Effect("validation_share", number),
    "early_stopping_steps": Effect("early_stopping"),
    "pure_bf16": Joint("`bf16`; adapters stay in float32"),
    "disable_gradient_checkpointing": Joint("`gradient_checkpointing: false`"),
    "quantization_bit": Effect("quantization_bit"),
    "quantization_type": Effect("quantization_type"),
    "quantization_method": Effect(
        "quantization_method", lambda value: "bnb" if value == "bitsandbytes" else value
    ),
    "double_quantization": Effect("double_quantization", truth),
    **{key: Joint(f"`{key}`, for `stage: sft`") for key in SCORED},
    "generation_num_beams": Joint("`num_beams`, for `stage: sft`"),
    "predict_with_generate": Joint(
        "nothing more than `metric_for_best_model` says; `deltaw eval RUN --generate` scores a run"
    ),
    "pref_beta": Effect("pref_beta", number),
    "pref_loss": Effect("pref_loss", _pref_loss),
    "kto_chosen_weight": Effect("kto_chosen_weight", number),
    "kto_rejected_weight": Effect("kto_rejected_weight", number),
    "dpo_label_smoothing": Effect("dpo_label_smoothing", number),
    "simpo_gamma": Effect("simpo_gamma", number),
    "pref_ftx": Refused("the loss of answers is not added to that of preferences", (0,)),
    "use_galore": Joint("`optim: galore_adamw`"),
    "galore_layerwise": Joint("`optim: galore_adamw_layerwise`"),
    "galore_rank": Effect("galore_rank"),
    "galore_update_interval": Effect("galore_update_interval"),
    "galore_scale": Effect("galore_scale", number),
    "galore_target": Effect("galore_target", layers),
    "galore_proj_type": Effect("galore_proj_type"),
    **each(
        (
            "preprocessing_num_workers",
            "preprocessing_batch_size",
            "overwrite_cache",
            "data_shared_file_system",
            "cache_dir",
            "buffer_size",
            "flash_attn",
            "use_unsloth",
            "use_unsloth_gc",
            "enable_liger_kernel",
            "use_reentrant_gc",
            "use_cache",
            "use_kv_cache",
        ),
        SPEED,
    ),
    **each(
        (
            "compute_accuracy",
            "print_param_status",
            "include_effective_tokens_per_second",
        ),
        SHOWN,
    ),
    **each(
        (
            "generation_max_length",
            "generation_config",
            "infer_backend",
            "infer_dtype",
            "do_sample",
            "temperature",
            "top_p",
            "top_k",
            "skip_special_tokens",
        ),
        ANSWERING,
    ),
    "adapter_name_or_path": Joint("`adapter`; what `lora_*` keys say of it is without effect"),
    "adapter_folder": Joint("the folder in each adapter where its files are"),
    "create_new_adapter": Joint("`create_new_adapter`, where there are adapters to merge"),
    "streaming": STREAMING,
    "tokenized_path": Ignored("a cache; tokens are made anew, of `dataset`"),
    "upcast_layernorm": Joint("float32, which norms have but in a `lora` run with `bf16`"),
    "ignore_pad_token_for_loss": Refused("padding is never learnt; leave it out", (True,)),
    "disable_shuffling": Effect("shuffle", lambda value: not truth(value)),
    "use_fast_tokenizer": Refused("only fast tokenizers are read; leave it out", (True,)),
    "quantization_device_map": Refused(ALONE, ()),
    **each(("hf_hub_token", "ms_hub_token", "om_hub_token"), Ignored("`hf auth login` logs in")),
    "sortish_sampler": Refused(KEPT),
    "tool_format": Joint("what the template writes: `qwen` with `qwen`, `qwen3` and `chatml`"),
    **each(
        ("resize_vocab", "split_special_tokens", "use_llama_pro"),
        Refused(VOCABULARY),
    ),
    **each(("add_tokens", "add_special_tokens", "new_special_tokens"), Refused(VOCABULARY, ())),
    **each(
        (
            "rope_scaling",
            "moe_aux_loss_coef",
            "mixture_of_depths",
            "shift_attn",
        ),
        Refused(KEPT),
    ),
    **each(
        ("use_apollo", "use_badam", "use_muon", "use_adam_mini", "use_swanlab"),
        Refused(OPTIMISER),
    ),
    **each(("use_dft_loss", "use_eaft_loss", "use_asft_loss"), Refused(KEPT)),
    **each(("loftq_init", "oft_rank", "module_dropout"), Refused(KEPT)),
    **each(
        (
            "freeze_language_model",
            "media_dir",
            "image_max_pixels",
            "image_min_pixels",
            "video_max_pixels",
            "video_min_pixels",
            "video_fps",
            "video_maxlen",
        ),
        Refused(MEDIA),
    ),
    **each(
        (
            "ld_alpha",
            "ref_model",
            "ref_model_adapters",
            "ref_model_quantization_bit",
            "reward_model",
            "reward_model_type",
        ),
        Refused(STAGE, ()),
    ),
    **each(
        ("export_dir", "export_hub_model_id", "export_quantization_bit"),
        Refused("deltaw merge writes the merged model of a run; leave it out", ()),
    ),
    **each(
        ("freeze_vision_tower", "freeze_multi_modal_projector"),
        Ignored("texts alone are trained on"),
    ),
    **each(
        ("export_size", "export_device", "export_legacy_format"), Ignored("nothing is exported")
    ),
}
