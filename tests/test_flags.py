"""Every flag from transformers is honoured or refused; values without sense and flags without effect are named."""

import dataclasses

import pytest
from transformers import TrainingArguments

from lmolt.training import flags, identity
from lmolt.training.arguments import PreferenceArguments
from lmolt.training.parser import OWN, build_parser, show_all

NAMES = {field.name for field in dataclasses.fields(TrainingArguments)}


def test_each_field_of_transformers_is_in_one_table():
    tables = [flags.FIXED, flags.MAY_CHANGE, flags.REFUSED.keys()]
    assert set().union(*tables) == NAMES
    assert sum(map(len, tables)) == len(NAMES)


def test_a_field_that_no_table_knows_is_refused(monkeypatch):
    monkeypatch.setattr(flags, "MAY_CHANGE", flags.MAY_CHANGE - {"run_name"})
    with pytest.raises(ValueError, match="--run_name x would have no effect, or a wrong one: this version of transf"):
        PreferenceArguments(run_name="x")


@pytest.mark.parametrize("name", sorted(flags.REFUSED))
def test_each_refused_field_is_refused_with_its_reason(name):
    field = next(field for field in dataclasses.fields(PreferenceArguments) if field.name == name)
    other = (not field.default) if isinstance(field.default, bool) else "something else"
    with pytest.raises(ValueError, match=f"^--{name} .* would have no effect, or a wrong one: .*; leave it out$"):
        PreferenceArguments(**{name: other})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "--learning_rate is 0; it is more than 0"),
        ({"learning_rate": float("inf")}, "--learning_rate is inf; it is a finite number"),
        ({"alpha": -1.0}, "--alpha is -1.0; it is 0 or more"),
        ({"lora_alpha": 0}, "--lora_alpha is 0; it is more than 0"),
        ({"lora_dropout": 1.0}, "--lora_dropout is 1; it is 0 or more, and less than 1"),
        ({"num_train_epochs": 0}, "--num_train_epochs is 0; it is more than 0"),
        ({"max_steps": 0}, "--max_steps is 0; it is 1 or more"),
        ({"eval_translations": -3}, "--eval_translations is -3; it is 0 or more"),
        ({"seed": -1}, "--seed is -1; it is 0 or more, and less than 2"),
        ({"save_total_limit": 0}, "--save_total_limit is 0; it is at least 1"),
        ({"loss": "sft", "beta": 0.1}, "--beta has no effect with --loss sft"),
        ({"save_steps": 10}, "--save_steps has no effect: --save_strategy isn't steps"),
        ({"logging_strategy": "epoch", "logging_steps": 5}, "--logging_steps has no effect"),
        ({"hub_model_id": "a/b"}, "--hub_model_id has no effect: there is no --push_to_hub"),
        ({"run_name": "x"}, "--run_name has no effect: there is no tracker"),
        ({"eval_max_new_tokens": 9}, "--eval_max_new_tokens has no effect: there are no --eval_translations"),
        ({"packing": "padded", "score_chunk": 9}, "--score_chunk has no effect: --packing padded"),
        ({"packing": "padded", "tree_attention": "tiles"}, "--tree_attention has no effect: --packing padded"),
        ({"tree_attention": "flex", "use_cpu": True}, "--tree_attention flex: FlexAttention has no backward pass"),
        ({"tree_attention": "blocks"}, "--tree_attention is 'blocks'; use one of auto, tiles, flex"),
        (
            {"dataloader_prefetch_factor": 2},
            "--dataloader_prefetch_factor has no effect: there are no --dataloader_num",
        ),
        ({"optim_args": "a=b"}, "--optim_args a=b has no effect with --optim adamw_torch_fused"),
        ({"optim": "ademamix", "optim_args": "beta3"}, "--optim ademamix --optim_args beta3 can't run here: "),
        ({"lr_scheduler_kwargs": {"x": 1}}, "--lr_scheduler_type cosine doesn't take --lr_scheduler_kwargs {'x': 1}: "),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_type cosine_with_min_lr doesn't take .* None: "),
        (
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "--gradient_checkpointing_kwargs has no effect: there is no --gradient_checkpointing",
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, "--warmup_steps has no effect: constant has no warm-up"),
    ],
)
def test_values_without_sense_and_flags_without_effect(values, message):
    with pytest.raises(ValueError, match=message):
        PreferenceArguments(**values)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("loss", False), ("mol2cap/nll", False), ("eval_cap2mol/nll", False), ("cap2mol/logps/chosen", True),
     ("mol2cap/logps/rejected", False), ("mol2cap/rewards/accuracies", True)],
)  # fmt: skip
def test_which_way_the_best_metric_is_better(metric, greater):
    args = PreferenceArguments(metric_for_best_model=metric)
    assert args.greater_is_better is greater
    assert PreferenceArguments(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better != greater


def test_precision_is_the_flags_alone(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    args = PreferenceArguments(bf16=False)
    assert args.mixed_precision == "no"
    assert "mixed precision is no, as --bf16 and --fp16 say, and not accelerate's fp8" in caplog.text


def test_what_an_optimizer_and_a_schedule_take_is_taken():
    args = PreferenceArguments(optim="ademamix", optim_args="beta3=0.5")
    assert args.optim_args == "beta3=0.5"
    args = PreferenceArguments(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-6})
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    for name in ("linear", "cosine", "polynomial", "inverse_sqrt", "reduce_lr_on_plateau", "constant_with_warmup"):
        PreferenceArguments(lr_scheduler_type=name)


def test_trackers_stand_with_spaces_or_commas():
    assert PreferenceArguments(report_to=["tensorboard,tensorboard"]).report_to == ["tensorboard", "tensorboard"]
    assert PreferenceArguments().report_to == []


def test_what_may_change_is_known_by_name():
    own = {field.name for field in dataclasses.fields(PreferenceArguments)} - NAMES
    assert set(identity.OWN_MAY_CHANGE) <= own
    assert {name for names in OWN.values() for name in names.split()} >= own  # --help shows all of LMolT's own


def test_help_shows_lmolts_own_first_and_the_rest_on_demand():
    short, long = build_parser("").format_help(), show_all(build_parser("")).format_help()
    assert short.index("--loss LOSS") < short.index("--learning_rate") < short.index("--output_dir")
    assert "--adam_beta1" not in short and "--adam_beta1" in long
    assert "--torch_compile" not in long
    assert len(short.splitlines()) < 160


def test_a_left_over_compilation_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="asks for compilation by INDUCTOR: each micro-batch's tree has another shape"):
        PreferenceArguments()
