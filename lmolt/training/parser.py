"""The parser of train_pref: LMolT's own flags first, in groups, and the inherited ones behind --help_all."""

import argparse

from transformers import HfArgumentParser, TrainingArguments

from lmolt.recipes import Parser
from lmolt.training.arguments import PreferenceArguments
from lmolt.training.flags import REFUSED
from lmolt.training.losses import PARAMETERS

OWN = {  # what --help shows, in groups; the rest is behind --help_all
    "model and data": "model revision adapter triples pairs eval_triples eval_fraction max_length max_length_policy "
    "prompt_style trust_remote_code",
    "loss": "loss " + " ".join(PARAMETERS),
    "adapter": "load_in_4bit lora_r lora_alpha lora_dropout lora_target_modules use_dora use_rslora",
    "steps": "num_train_epochs max_steps learning_rate lr_scheduler_type warmup_steps optim weight_decay max_grad_norm "
    "per_device_train_batch_size gradient_accumulation_steps tokens_per_batch packing tree_attention score_chunk seed "
    "bf16 fp16 gradient_checkpointing",
    "evaluation": "eval_strategy eval_steps per_device_eval_batch_size eval_translations eval_max_new_tokens "
    "metric_for_best_model greater_is_better load_best_model_at_end early_stopping_patience",
    "output": "output_dir overwrite_output_dir resume_from_checkpoint save_strategy save_steps save_total_limit "
    "logging_steps report_to stalled_after push_to_hub hub_model_id hub_private_repo hub_revision",
}


class _Parser(Parser, HfArgumentParser):
    """Strict, with a flag for each argument."""


def build_parser(description: str) -> _Parser:
    """The flags of training: those that LMolT means first, in groups, and the inherited ones hidden from --help."""
    parser = _Parser(
        PreferenceArguments,
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=120),
    )
    parser.usage = "%(prog)s [--recipe FILE.yaml] [flags]"
    actions = {}
    for action in parser._actions:
        first = action.dest not in actions
        actions.setdefault(action.dest, action)
        action.hidden = action.help if first else argparse.SUPPRESS  # --no_FLAG is the same flag
        if action.dest != "help":
            action.help = argparse.SUPPRESS
    for title, names in OWN.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            action = actions[name]
            action.help = _described(action)
            parser._optionals._group_actions.remove(action)  # argparse has no way to add an action to another group
            group._group_actions.append(action)
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of defaults for these flags (recipes/)")
    parser.add_argument("--help_all", action="store_true", help="list the inherited flags too, and exit")
    return parser


def show_all(parser: _Parser) -> _Parser:
    for action in parser._actions:
        if action.help is argparse.SUPPRESS and action.dest not in REFUSED:
            action.help = _described(action)
    return parser


def _described(action: argparse.Action) -> str:
    inherited = TrainingArguments.__dataclass_fields__.get(action.dest)
    text = action.hidden or (inherited.metadata.get("help") if inherited else "")
    text = " ".join(text.replace("%", "%%").split())
    if action.hidden is argparse.SUPPRESS:
        return argparse.SUPPRESS
    action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
    if action.default in (None, [], "", argparse.SUPPRESS) or "default" in text:
        return text
    shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    return f"{text} (default {shown})".strip()
