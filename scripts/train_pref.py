"""Align a causal LM with preference triples: SFT, DPO, CPO or KTO, with QLoRA.

    accelerate launch scripts/train_pref.py --loss cpo
    accelerate launch scripts/train_pref.py --loss dpo --model FOLDER_OR_HUB_ID --triples triples.parquet
    accelerate launch scripts/train_pref.py --loss sft --model FOLDER_OR_HUB_ID --pairs pairs.csv
    accelerate launch scripts/train_pref.py --loss cpo --resume_from_checkpoint true
    accelerate launch scripts/train_pref.py --loss cpo --push_to_hub --hub_model_id OWNER/NAME

Without --model, --triples and --recipe it trains on the embedded default, building what that lacks.
--recipe FILE.yaml sets defaults, and flags win. --help_all lists the flags of transformers.TrainingArguments as well.
Writes the adapter, its card, run.json, efficiency.json, the log and a plot to --output_dir.
"""

import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import lmolt  # noqa: F401 - before transformers, which imports bitsandbytes, which lmolt keeps from downloading

# isort: split
import hashlib
import logging
import os
import subprocess
import warnings
from collections import Counter

import torch
from transformers import set_seed
from transformers.utils import logging as hf_logging

from lmolt import hub, ownership
from lmolt.data.pairs import DEMO, read_pairs
from lmolt.data.triples import read_triples
from lmolt.distributed import strategy
from lmolt.distributed.heartbeat import HEARTBEAT, HeartbeatCallback
from lmolt.distributed.preemption import PreemptionCallback
from lmolt.files import SHIPPED, run_main, sha256_file, versions
from lmolt.models import loading
from lmolt.models.adapters import check_made_for
from lmolt.models.precision import bf16_is_slow
from lmolt.models.tokenizers import check_texts
from lmolt.prompts import COLUMNS, build_prompt
from lmolt.recipes import apply_recipe, describe_unknown
from lmolt.training import batches, checkpoints, identity
from lmolt.training.arguments import PreferenceArguments
from lmolt.training.flags import REFUSED
from lmolt.training.losses import LOSSES
from lmolt.training.parser import build_parser, show_all
from lmolt.training.saving import save_finished
from lmolt.training.statistics import best_is_greater
from lmolt.training.trainer import PreferenceTrainer

logger = logging.getLogger(__name__)
FEW = 20  # held-out triples: with fewer, chance decides which checkpoint is the best
PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes")
SCRIPT = "train_pref"
FINISHED = ("adapter_*", "run.json", "efficiency.json", "trainer_state.json", "training.png", "README.md", "unfinished")
FINISHED += ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def parse_arguments(argv: list[str]) -> PreferenceArguments:
    parser = build_parser(__doc__)
    if "--help_all" in argv:
        parser.exit(message=show_all(parser).format_help())
    given = {argument.split("=")[0] for argument in argv}
    default = None if given & {"--model", "--triples", "--pairs", "--recipe"} else SHIPPED / "recipes" / "demo.yaml"
    recipe = apply_recipe(parser, argv, default)
    parse = lambda: parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    args, _, unknown = parse()
    undecided = args.use_cpu and args.bf16 and "--bf16" not in given and "bf16" not in recipe
    if undecided and strategy.first_decides(bf16_is_slow):  # processors may differ from machine to machine
        parser.set_defaults(bf16=False)
        args, _, unknown = parse()
        loading.say("this processor has no fast bf16: training computes in fp32 (--bf16 true has it all the same)")
    if unknown:
        raise ValueError(describe_unknown(unknown, parser._option_string_actions))
    for name in ("do_train", "do_eval", "restore_callback_states_from_checkpoint"):
        if name in recipe or f"--{name}" in given:  # whatever its value, for false is its default
            raise ValueError(f"--{name} would have no effect: {REFUSED[name]}; leave it out")
    if args.fp16 and ({"--bf16"} & given or recipe.get("bf16")) and recipe.get("bf16") is not False:
        raise ValueError("--bf16 and --fp16 were both given; choose one")
    if not args.model or not (args.triples or args.pairs):
        raise ValueError("give both --model and --triples (or neither, nor --recipe, for the embedded default)")
    return args


def build_demo() -> None:
    """Make what the embedded default lacks: pairs and models here, triples with the script beside this one."""
    from lmolt.demo.build import build_models

    build_models()
    if not (DEMO / "triples.parquet").exists():
        script = ["-m", f"{__package__}.make_triples"] if __package__ else [Path(__file__).with_name("make_triples.py")]
        command = [sys.executable, *script, "--recipe", SHIPPED / "recipes" / "demo_triples.yaml"]
        one_process = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        if subprocess.run(command, env=one_process).returncode:
            raise ValueError(f"{DEMO}/triples.parquet could not be made; the reason is above")


def check_output_dir(args: PreferenceArguments) -> Path | None:
    """The checkpoint to resume from, if that was asked for; an error before anything of value is overwritten.

    For the first process: it alone looks, and writes.
    """
    output_dir = Path(args.output_dir)
    inputs = {f"--{name}": getattr(args, name) for name in ("model", "adapter", "triples", "pairs", "eval_triples")}
    ownership.check_inputs("--output_dir", output_dir, inputs)
    ownership.hold(output_dir)
    wanted = args.resume_from_checkpoint
    if wanted and str(wanted).lower() not in ("true", "false"):
        wrong = checkpoints.what_is_wrong(Path(wanted)) if Path(wanted).is_dir() else "there is no such folder"
        if wrong:
            raise ValueError(f"can't resume from {wanted}: {wrong}; --resume_from_checkpoint true finds the latest")
        return with_optimizer(Path(wanted))
    if wanted and str(wanted).lower() == "true":
        ownership.check_free(output_dir, SCRIPT, FINISHED)
        if (output_dir / "adapter_model.safetensors").exists() and not checkpoints.checkpoints(output_dir):
            raise ValueError(
                f"{output_dir} holds a finished adapter and no checkpoint to resume from; choose another --output_dir "
                "or --overwrite_output_dir"
            )
        return with_optimizer(checkpoints.last_good_checkpoint(output_dir))
    if args.overwrite_output_dir:
        ownership.check_deletable("--output_dir", output_dir)
        ownership.check_free(output_dir, SCRIPT, ["checkpoint-*", *FINISHED])
    elif (output_dir / "adapter_model.safetensors").exists():
        raise ValueError(
            f"{output_dir} holds a finished adapter; choose another --output_dir or --overwrite_output_dir"
        )
    elif checkpoints.checkpoints(output_dir):
        raise ValueError(
            f"{output_dir} holds checkpoints of an interrupted run; go on with --resume_from_checkpoint true, or start "
            "anew with --overwrite_output_dir"
        )
    ownership.check_free(output_dir, SCRIPT, FINISHED)
    return None


def with_optimizer(checkpoint: Path | None) -> Path | None:
    if checkpoint is not None and not checkpoints.has_optimizer(checkpoint):
        raise ValueError(
            f"{checkpoint} holds no optimizer or no schedule (--save_only_model), so it can't be resumed; train on "
            f"from the adapter in it: --adapter {checkpoint}"
        )
    return checkpoint


def split_by_source(triples: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Train and validation triples: of each direction's sources that share, by their hashes, one at least.

    A source is in one of the two only.
    """
    held_out = set()
    digest = lambda source: hashlib.sha256(source.encode()).hexdigest()
    for direction in {t["direction"] for t in triples} if fraction else ():
        sources = sorted({t["source"] for t in triples if t["direction"] == direction}, key=digest)
        held_out |= set(sources[: max(round(fraction * len(sources)), len(sources) > 1)])
    return [t for t in triples if t["source"] not in held_out], [t for t in triples if t["source"] in held_out]


def pairs_both_ways(file: str) -> list[dict]:
    """A table of pairs as rows in both directions, which have no dis-preferred output; of its split `train`, if any."""
    pairs = read_pairs(file, default_split="train")
    return [
        {"id": pair["id"], "direction": direction, "source": pair[source], "chosen": pair[target]}
        for pair in pairs
        for direction, (source, target) in COLUMNS.items()
    ]


def read_examples(args: PreferenceArguments, tokenizer) -> tuple[list, list, Counter]:
    """Tokenized triples to train on and held out, and how many were dropped, by cause."""
    data = args.triples or args.pairs
    train = read_triples(data) if args.triples else pairs_both_ways(data)
    if args.eval_triples:
        held_out = read_triples(args.eval_triples)
    else:
        train, held_out = split_by_source(train, args.eval_fraction)
    reads = LOSSES[args.loss].reads
    encode = lambda rows: batches.encode_triples(
        rows,
        tokenizer,
        args.max_length,
        args.max_length_policy,
        with_rejected="rejected" in reads,
        style=args.prompt_style,
    )
    shared = {t["source"] for t in train} & {t["source"] for t in held_out}
    if shared:
        logger.warning(
            "%d sources are both trained on and held out (--triples, --eval_triples), such as %.60r: they "
            "are no measure of unseen ones", len(shared), min(shared),
        )  # fmt: skip
    asked = len(held_out)
    (train, dropped), (held_out, more) = encode(train), encode(held_out)
    if not train:
        raise ValueError(f"{data}: no row is left to train on ({dict(dropped) or 'all are held out'})")
    if asked and not held_out:
        logger.warning("none of the %d held-out triples is left: %s", asked, dict(more))
    if "z" in reads:
        both = batches.with_mismatches(train + held_out, args.seed)
        train, held_out = both[: len(train)], both[len(train) :]
    return train, held_out, dropped + more


def count(examples: list) -> dict[str, int]:
    return dict(sorted(Counter(example.direction for example in examples).items()))


def check_examples(args: PreferenceArguments, tokenizer, train: list, held_out: list) -> None:
    """`ValueError` where the model can't take the rows, or what decides the best checkpoint is not among them; said:
    texts that the tokenizer can't write."""
    rows = [(e.prompt, output) for e in train + held_out for output in (e.chosen, e.rejected, e.mismatched)]
    config = loading.read_config(args.model, args.revision, args.trust_remote_code)
    loading.check_sizes(
        args.model,
        config,
        largest_id=max(max(part, default=0) for row in rows for part in row),
        longest=max(len(prompt) + len(output) for prompt, output in rows),
    )
    every = train + held_out
    prompts = [(build_prompt(e.direction, e.source, args.prompt_style), e.prompt) for e in every]
    outputs = {"preferred outputs": [(e.target, e.chosen[:-1]) for e in every]}  # but for the EOS
    outputs["dis-preferred outputs"] = [(e.other, e.rejected[:-1]) for e in every if e.rejected]
    for what, texts in ({"prompts": prompts} | outputs).items():
        check_texts(tokenizer, config, what, texts, loading.say)
    if held_out and args.metric_for_best_model:
        directions = sorted(count(held_out))
        best_is_greater(args.metric_for_best_model, LOSSES[args.loss], bool(args.eval_translations), directions)


def identify(args: PreferenceArguments, checkpoint: Path | None) -> dict:
    """What this run is; `ValueError` where `checkpoint` is another's. What that chose by itself is taken over."""
    fixed = strategy.first_decides(lambda: identity.of_inputs(args))
    if checkpoint is not None:
        record = strategy.first_decides(lambda: identity.read(checkpoint))
        identity.check_same(checkpoint, record["fixed"], fixed)
        args.packing = record["chosen"]["packing"]
        args.tokens_per_batch = record["chosen"]["tokens_per_batch"] or 0  # 0: none, also where a GPU would have one
    return fixed


def load_policy(args: PreferenceArguments):
    # by its whole path, so that the adapter's configuration and card work from any folder
    local = Path(args.model).is_dir() and not args.push_to_hub
    base = loading.load_base(
        str(Path(args.model).absolute()) if local else args.model,
        revision=args.revision,
        load_in_4bit=args.load_in_4bit,
        dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        trust_remote_code=args.trust_remote_code,
        use_cpu=args.device.type == "cpu",
    )
    return loading.add_adapter(
        base,
        args.adapter,
        r=args.lora_r,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        revision=args.revision,
    )


def set_references(trainer: PreferenceTrainer) -> str:
    """Give the trainer its reference's log-probabilities, if its loss has one; what the reference is, in words."""
    args = trainer.args
    if not trainer.loss.has_reference:
        return "none (the loss has no reference)"
    name = f"adapter {args.adapter}, frozen" if args.adapter else f"base model {args.model}, adapter off"
    made_by = ("base weights", "base config", "tokenizer", "start adapter", "precision", "base's dtype")
    key = {part: trainer.fixed[part] for part in (*made_by, "NF4 computes in")} | trainer.chosen
    for same in ("tokens_per_batch", "tree attention"):  # tiles and flex give the same numbers
        key.pop(same)
    return f"{name} (log-probabilities {trainer.set_references(key)})"


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    HEARTBEAT.start()
    set_seed(args.seed)
    say = print if args.process_index == 0 else lambda *_: None
    if args.process_index > 0:
        hf_logging.disable_progress_bar()
    if args.use_cpu and (why := strategy.unused_accelerator()):
        say(why)

    # --- output folder, the embedded default
    checkpoint = strategy.first_decides(lambda: check_output_dir(args))
    if checkpoint is not None:
        checkpoints.check_seen_alike(checkpoint)
    data = args.triples or args.pairs
    if DEMO.resolve() in Path(data).resolve().parents:
        with args.main_process_first(desc="building what the embedded default lacks"):
            build_demo()

    # --- triples -> token ids
    loading.check_model_folder(args.model)
    if args.adapter:
        loading.check_adapter_folder(args.adapter)
        strategy.first_decides(lambda: check_made_for(args.adapter, args.model, args.revision))
    tokenizer = loading.load_tokenizer(args.model, args.revision, args.trust_remote_code)
    train, held_out, dropped = read_examples(args, tokenizer)
    check_examples(args, tokenizer, train, held_out)
    say(f"reads {data}: {count(train)} to train on, {count(held_out)} held out, {dict(dropped) or 0} dropped")
    if not held_out:
        args.eval_strategy, args.load_best_model_at_end, args.early_stopping_patience = "no", False, None
        say("no held-out triples: nothing is evaluated, and the last model is kept instead of the best")
    elif args.load_best_model_at_end and len(held_out) < FEW:
        say(f"only {len(held_out)} triples are held out: which checkpoint is the best is left to chance")
    fixed = identify(args, checkpoint)

    # --- the Hub, asked before the work
    share, licence = args.push_to_hub and args.process_index == 0, {}
    if share:
        licence = hub.licence([args.model])
        name = args.hub_model_id or Path(args.output_dir).name
        args.hub_model_id = hub.reserve(name, args.hub_private_repo, args.hub_revision)

    # --- policy, reference
    software = versions(*PACKAGES)
    changeable = identity.may_change(args, software)
    trainer = PreferenceTrainer(load_policy(args), args, train, held_out, fixed, changeable, processing_class=tokenizer)
    trainer.add_callback(PreemptionCallback())
    trainer.add_callback(HeartbeatCallback(args.stalled_after))
    trainer.check_model()
    if checkpoint is not None:
        trainer.check_resumable(checkpoint)
    reference_name = set_references(trainer)
    say(f"reference: {reference_name}")

    # --- train
    if checkpoint is not None:
        say(f"resumes from {checkpoint}")
        if args.process_index == 0:
            trainer.efficiency.resume_from(checkpoint / "efficiency.json")
    elif args.overwrite_output_dir and args.process_index == 0:
        ownership.delete_claimed(Path(args.output_dir), SCRIPT)
    say(f"writes {args.output_dir}")
    with checkpoints.full_disk_is_named(Path(args.output_dir)):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    # --- save
    rows = {"train": count(train), "evaluation": count(held_out), "dropped": dict(dropped)}
    own = {"reference": reference_name, "data": {"sha256": sha256_file(data)} | rows}
    with checkpoints.full_disk_is_named(Path(args.output_dir)):
        save_finished(trainer, own | {"versions": software, "licence": licence})
    say(f"wrote {args.output_dir}: the adapter, its card, run.json, efficiency.json, trainer_state.json, training.png")
    if share:
        url = hub.push(args.output_dir, SCRIPT, args.hub_model_id, args.hub_private_repo, args.hub_revision)
        say(f"uploaded {url}")


def command() -> None:
    hf_logging.set_verbosity_warning()
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's, at each step
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's
    run_main(main, kept="--resume_from_checkpoint true goes on from the last checkpoint")


if __name__ == "__main__":
    command()
