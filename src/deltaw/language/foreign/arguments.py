"""The arguments of transformers' Trainer, which several tools take in the same flat file."""

from pathlib import Path
from typing import Any

from deltaw.language.foreign import deepspeed
from deltaw.language.foreign.tool import (
    Effect,
    Fate,
    Found,
    Ignored,
    Joint,
    Refused,
    Values,
    each,
    misfit,
    number,
    optimizer,
    reports,
    settings,
    truth,
)

SPEED = Ignored("speed or memory only")
STREAMING = Ignored("memory only: the data are read as a whole; `max_samples` takes fewer")
SHOWN = Ignored("what is shown or measured only")
PLACES = Ignored("a run keeps its own checkpoints until it is finished")
OFFLINE = Ignored("nothing is uploaded")
ALONE = "plain PyTorch trains; leave it out"
KEPT = "it would change what is learnt; leave it out"
UPLOAD = "nothing is uploaded; leave it out"
PACE = Joint(
    "`eval_every`, from `eval_steps` where `eval_strategy: steps`, else from `save_steps`; what it "
    "is not from is ignored"
)
EACH = "`batch_size`, which counts the rows of all processes: that many times as much"
STRATEGY = Joint("what `eval_every` is from, and `eval_each_epoch` for `epoch`")

KEYS: dict[str, Fate] = {
    "output_dir": Effect("output"),
    "per_device_train_batch_size": Joint(EACH),
    "gradient_accumulation_steps": Effect("gradient_accumulation"),
    "learning_rate": Effect("learning_rate", number),
    "num_train_epochs": Joint("`epochs`; `max_steps` goes before it"),
    "max_steps": Joint("`max_steps`; -1 means none"),
    "lr_scheduler_type": Joint("`scheduler`; `constant` is one without a warm-up"),
    "lr_scheduler_kwargs": Effect("scheduler_kwargs", settings),
    "warmup_ratio": Joint("`warmup`, a share of the steps"),
    "warmup_steps": Joint("`warmup`, a number of steps, or below 1 a share of them"),
    "weight_decay": Effect("weight_decay", number),
    "max_grad_norm": Effect("max_grad_norm", number),
    "neftune_noise_alpha": Effect("neftune_noise_alpha", number),
    "optim": Effect("optim", optimizer),
    "bf16": Effect("bf16", truth),
    "seed": Effect("seed"),
    "report_to": Effect("report_to", reports),
    "gradient_checkpointing": Effect("gradient_checkpointing", truth),
    "activation_checkpointing": Effect("gradient_checkpointing", truth),
    "group_by_length": Effect("group_by_length", truth),
    "train_sampling_strategy": Joint("`group_by_length`, or `shuffle: false` for `sequential`"),
    **each(("eval_strategy", "evaluation_strategy"), STRATEGY),
    "eval_steps": PACE,
    "save_steps": PACE,
    "logging_steps": Joint(
        "`eval_every` where `eval_strategy: steps` has no `eval_steps`, else ignored"
    ),
    "load_best_model_at_end": Joint("`keep: best`, else `keep: last`"),
    "metric_for_best_model": Joint(
        "`metric`: `loss`, `rouge-l`, `bleu-4`, `exact_match`, `nist` or `chrf`"
    ),
    "resume_from_checkpoint": Joint(
        "nothing: an interrupted run is always resumed; a path must be its newest checkpoint"
    ),
    "overwrite_output_dir": Joint("nothing: a run that is there stays; `--overwrite` deletes it"),
    "do_train": Refused("deltaw train trains; leave it out", (True,)),
    "do_predict": Refused("deltaw eval RUN --generate answers and scores; leave it out"),
    "fp16": Refused("give bf16: true, which needs no scaling of the loss"),
    **each(("do_eval", "per_device_eval_batch_size", "eval_accumulation_steps"), SHOWN),
    **each(("eval_delay", "eval_on_start", "batch_eval_metrics", "prediction_loss_only"), SHOWN),
    **each(("eval_do_concat_batches", "eval_use_gather_object", "greater_is_better"), SHOWN),
    **each(("include_for_metrics", "include_num_input_tokens_seen", "skip_memory_metrics"), SHOWN),
    **each(("include_tokens_per_second", "bf16_full_eval", "fp16_full_eval"), SHOWN),
    **each(("logging_dir", "logging_strategy", "logging_first_step"), SHOWN),
    **each(("logging_nan_inf_filter", "log_level", "log_level_replica"), SHOWN),
    **each(("log_on_each_node", "run_name", "project", "disable_tqdm"), SHOWN),
    **each(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), SHOWN),
    **each(("save_strategy", "save_total_limit", "save_only_model", "save_safetensors"), PLACES),
    **each(("save_on_each_node", "enable_jit_checkpoint"), PLACES),
    "restore_callback_states_from_checkpoint": PLACES,
    **each(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"), SPEED),
    **each(("dataloader_persistent_workers", "dataloader_prefetch_factor"), SPEED),
    **each(("dataloader_multiprocessing_context", "length_column_name"), SPEED),
    **each(("remove_unused_columns", "low_cpu_mem_usage", "use_cache"), SPEED),
    **each(("ddp_timeout", "ddp_backend", "ddp_find_unused_parameters"), SPEED),
    **each(("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), SPEED),
    **each(("average_tokens_across_devices", "local_rank"), SPEED),
    **each(("use_liger_kernel", "liger_kernel_config", "torch_compile"), SPEED),
    **each(("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps"), SPEED),
    **each(("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), SPEED),
    "fsdp": Effect("fsdp", bool),
    "fsdp_config": Ignored("each of the model's blocks is shared out: memory only"),
    "deepspeed": deepspeed.FATE,
    **each(("accelerator_config", "parallelism_config"), Refused(ALONE, ({},))),
    **each(("tf32", "use_cpu", "no_cuda", "full_determinism"), Refused(KEPT)),
    **each(("auto_find_batch_size", "dataloader_drop_last", "ignore_data_skip"), Refused(KEPT)),
    **each(("data_seed", "optim_args"), Refused(KEPT, ("", {}))),
    **each(("label_names", "debug"), Refused(KEPT, ("", []))),
    "optim_target_modules": Refused("name them with galore_target", ()),
    "label_smoothing_factor": Refused(KEPT, (0,)),
    "adam_beta1": Effect("adam_beta1", number),
    "adam_beta2": Effect("adam_beta2", number),
    "adam_epsilon": Effect("adam_epsilon", number),
    "push_to_hub": Refused(UPLOAD),
    **each(("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), OFFLINE),
    **each(("hub_always_push", "hub_revision"), OFFLINE),
}

DEFAULTS: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 5e-5,
    "scheduler": "linear",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "group_by_length": False,
    "seed": 42,
    "keep": "last",
}
EPOCHS = 3.0
METRICS = {
    "exact_match": "exact_match",
    "bleu-4": "bleu",
    "nist": "nist",
    "rouge-l": "rouge_l",
    "chrf": "chrf",
}
"""Scores of answers by the names that LLaMA-Factory or a recipe has for them."""
STRATEGIES = ("no", "steps", "epoch")


def join(given: Values, found: Found, logging_steps: int = 500) -> None:
    """Read the arguments that act together."""
    paced(given, found)
    found.spread(given, "per_device_train_batch_size")
    _evaluation(given, found, logging_steps)
    _order(given, found)
    _folder(given, found)


def paced(given: Values, found: Found, epochs: float = EPOCHS) -> None:
    """Read how long is trained, by default `epochs`, and how the rate goes up and down."""
    _length(given, found, epochs)
    _schedule(given, found)


def _length(given: Values, found: Found, usual: float) -> None:
    steps = found.read(given, "max_steps", number)
    epochs = found.read(given, "num_train_epochs", number)
    if steps is not None and steps > 0:
        found.give("max_steps", steps, "max_steps")
        if epochs is not None:
            found.notes.append("num_train_epochs has no effect beside max_steps, as there")
    elif epochs is not None:
        found.give("epochs", epochs, "num_train_epochs")
    else:
        found.usual["epochs"] = usual


def _schedule(given: Values, found: Found) -> None:
    ratio, steps = (found.read(given, name, number) for name in ("warmup_ratio", "warmup_steps"))
    scheduler = given.get("lr_scheduler_type")
    if ratio is not None and not 0 <= ratio < 1:
        found.problems.append(misfit("warmup_ratio", ratio, "must be a share from 0 to below 1"))
        return
    if scheduler == "constant":
        found.give("scheduler", "constant_with_warmup", "lr_scheduler_type")
        found.usual["warmup"] = 0.0
        if ratio or steps:
            found.notes.append(
                "the warm-up has no effect with lr_scheduler_type=constant, as there"
            )
        return
    if scheduler is not None:
        found.give("scheduler", scheduler, "lr_scheduler_type")
    for name, value in (("warmup_ratio", ratio), ("warmup_steps", steps)):
        if value or (value is not None and not (ratio or steps)):
            found.give("warmup", value, name)


def _evaluation(given: Values, found: Found, logging_steps: int) -> None:
    name = "evaluation_strategy" if "evaluation_strategy" in given else "eval_strategy"
    strategy = given.get(name, "no")
    strategy = "no" if strategy is False else strategy
    if strategy not in STRATEGIES:
        found.problems.append(misfit(name, strategy, f"must be one of {', '.join(STRATEGIES)}"))
    best = found.read(given, "load_best_model_at_end", truth)
    if best:
        found.give("keep", "best", "load_best_model_at_end")
    judge = "load_best_model_at_end" if best else found.names.get("early_stopping", "")
    if (best or "early_stopping" in found.values) and strategy == "no":
        found.problems.append(f"{judge} needs eval_strategy: steps, or epoch")
    every = "save_steps"
    if strategy == "steps":
        every = "eval_steps" if "eval_steps" in given else "logging_steps"
        found.give("eval_every", given.get(every, logging_steps), every)
    elif strategy == "epoch":
        every = ""
        found.give("eval_each_epoch", True, name)
    elif every in given:
        found.give("eval_every", given[every], every)
    steps = ("eval_steps", "save_steps", "logging_steps")
    found.ignored += [step for step in steps if step in given and step != every]
    _metric(given, found)


def _metric(given: Values, found: Found) -> None:
    name = "metric_for_best_model"
    if name not in given:
        return
    asked = str(given[name]).removeprefix("eval_")
    metric = METRICS.get(asked, asked)
    if metric in METRICS.values():
        found.give("metric", metric, name)
    elif asked != "loss":
        known = ", ".join(METRICS.values())
        found.problems.append(misfit(name, given[name], f"give loss, {known}, or leave it out"))


def _order(given: Values, found: Found) -> None:
    name = "train_sampling_strategy"
    order = given.get(name)
    if order in ("random", "group_by_length"):
        found.give("group_by_length", order == "group_by_length", name)
    elif order == "sequential":
        found.give("shuffle", False, name)
    elif order is not None:
        found.problems.append(misfit(name, order, "give random, sequential or group_by_length"))
    if found.values.get("group_by_length") and found.values.get("shuffle") is False:
        found.problems.append(
            "group_by_length and an order that is not drawn contradict each other; keep one"
        )


def _folder(given: Values, found: Found) -> None:
    if given.get("overwrite_output_dir"):
        found.notes.append(
            "overwrite_output_dir deletes nothing: an interrupted run is resumed, a finished one "
            "stays; --overwrite deletes it"
        )
    name = "resume_from_checkpoint"
    asked = given.get(name)
    if asked is False:
        found.problems.append(
            misfit(name, asked, "an interrupted run is resumed; start over with --overwrite")
        )
    elif isinstance(asked, str):
        folder = Path(str(given.get("output_dir", "")))
        steps = [p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*")]
        newest = max((int(step) for step in steps if step.isdecimal()), default=0)
        if Path(asked) != folder / f"checkpoint-{newest}":
            found.problems.append(
                misfit(name, asked, "only the newest checkpoint in output_dir; leave it out")
            )
