"""The flags that training has from transformers.TrainingArguments: honoured, or refused with the reason.

Each field is in one of three tables; tests hold them against `dataclasses.fields`, and a field that a later release of
transformers adds is refused until it is in one.
"""

import dataclasses

from transformers import TrainingArguments

# Honoured, and part of a run's identity (lmolt/training/identity.py).
FIXED = frozenset(
    """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm bf16 fp16 tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs use_liger_kernel liger_kernel_config
    metric_for_best_model greater_is_better full_determinism seed data_seed
    """.split()  # noqa: SIM905
)
# Honoured, and another value is no other run when one is resumed: it is recorded with the step. What is named by a path
# is compared by its content; how a step is cut into micro-batches may change while its triples are the same.
MAY_CHANGE = frozenset(
    """
    output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica disable_tqdm debug
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics
    save_strategy save_steps save_total_limit save_only_model load_best_model_at_end resume_from_checkpoint
    push_to_hub hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size
    dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
    use_cpu ddp_backend ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    ddp_find_unused_parameters deepspeed fsdp fsdp_config torch_empty_cache_steps
    """.split()  # noqa: SIM905
)
_ORDER = "rows are shuffled by --seed and balanced by their tokens, each once an epoch"
_SUMS = "evaluation keeps sums over the held-out triples, and no predictions"
_BASE = "the base is frozen, and only an adapter is trained"
_COMPILE = "each micro-batch's tree has another shape, and would be compiled anew"
REFUSED = {
    "label_smoothing_factor": "there are no labels to smooth; --label_smoothing is of the losses that have it",
    "train_sampling_strategy": _ORDER,
    "length_column_name": _ORDER,
    "dataloader_drop_last": _ORDER,
    "dataloader_in_order": _ORDER,
    "dataloader_pin_memory": "micro-batches are token ids, and no tensors, until they are packed",
    "bf16_full_eval": "evaluation has the precision of training",
    "fp16_full_eval": "evaluation has the precision of training",
    "do_train": "this command always trains; scripts/evaluate.py evaluates",
    "do_eval": "--eval_strategy says when the held-out triples are evaluated",
    "do_predict": "scripts/evaluate.py translates",
    "average_tokens_across_devices": "losses are always normalised over all processes",
    "eval_accumulation_steps": _SUMS,
    "include_for_metrics": _SUMS,
    "eval_do_concat_batches": _SUMS,
    "eval_use_gather_object": _SUMS,
    "batch_eval_metrics": _SUMS,
    "prediction_loss_only": _SUMS,
    "label_names": "the loss is computed from trees, and not from labels",
    "remove_unused_columns": "triples have no other columns",
    "use_cache": "training keeps no keys and values",
    "optim_target_modules": _BASE,
    "hub_always_push": "the finished adapter is uploaded once",
    "logging_nan_inf_filter": "training stops at a loss that isn't finite",
    "auto_find_batch_size": "use --tokens_per_batch, which cuts a step into micro-batches that fit",
    "include_num_input_tokens_seen": "efficiency.json counts the tokens",
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "neftune_noise_alpha": "its noise would depend on how rows are packed",
    "accelerator_config": "micro-batches, their order and their accumulation are LMolT's own",
    "parallelism_config": "processes share the data, and with DeepSpeed or FSDP the weights",
    "enable_jit_checkpoint": "SIGTERM and SIGUSR1 always save a checkpoint",
    "save_on_each_node": "the first process alone writes",
    "restore_callback_states_from_checkpoint": "it is always done: early stopping would count anew",
    "local_rank": "the launcher numbers the processes, in their environment",
    "ignore_data_skip": "a resumed epoch would draw some rows twice and some never",
}
FULL_RANK = ("galore", "apollo", "lomo", "adalomo")


def check_refused(args) -> None:
    """`ValueError` where a refused field, or one that no table knows, is not at its default."""
    for field in dataclasses.fields(TrainingArguments):
        if field.name in FIXED | MAY_CHANGE or not field.init:
            continue
        own = next(f for f in dataclasses.fields(args) if f.name == field.name)
        default = own.default if own.default_factory is dataclasses.MISSING else own.default_factory()
        value = getattr(args, field.name)
        # the same by value, as a recipe or a flag would write it
        if value != default and not (field.name == "include_num_input_tokens_seen" and value is False):
            reason = REFUSED.get(field.name, "this version of transformers has it, and LMolT doesn't know it")
            raise ValueError(f"--{field.name} {value} would have no effect, or a wrong one: {reason}; leave it out")
