"""Make preference triples: pairs as the preferred outputs, a translator's outputs as the dis-preferred ones.

    python scripts/make_triples.py --recipe recipes/demo_triples.yaml
    accelerate launch scripts/make_triples.py --pairs lpm24 --exclude lpm24 --output runs/lpm24.parquet \\
        --mol2cap_model language-plus-molecules/molt5-large-smiles2caption-LPM24 \\
        --cap2mol_model language-plus-molecules/molt5-large-caption2smiles-LPM24
    python scripts/make_triples.py --pairs pairs.csv --fraction 1 --directions mol2cap --mol2cap_outputs captions.txt \\
        --output triples.jsonl

Pairs: demo, lpm24 (L+M-24) or chebi20 from the Hub, a .csv/.tsv/.jsonl/.parquet file with molecule and caption, a
folder of ChEBI-20's files, or another Hub data set. A --fraction of them is taken by --seed and split half and half
between the directions, so that no pair is in both (--same_pairs: all in both).
Models: causal or sequence-to-sequence, a folder or a Hub id; with --pairs demo they default to the demo's, and what
runs/demo lacks of pairs and models is built first. Outputs that exist: a .txt with one a line for each pair of --pairs
(and --split), or a table with `id` and `prediction` or `output`.
An output that is empty, or equal to the preferred one, makes no triple; of several candidates (a table's rows of one
id, or --num_candidates) the hardest does (--negatives), or several (--num_rejected). In on-policy rounds the model in
training is its own translator: --mol2cap_model and --cap2mol_model its base, --mol2cap_adapter and --cap2mol_adapter
what training wrote (docs/data.md). Writes the triples and, beside them, a summary (.json, .png). What a killed run has
translated stays in OUTPUT.journal: the same command goes on from it.
"""

import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import hashlib
import json
import os
import random
import shutil
from collections import Counter
from datetime import UTC, datetime

from lmolt.files import run_main, versions
from lmolt.prompts import CAP2MOL, COLUMNS, DIRECTIONS, MOL2CAP
from lmolt.recipes import Parser, apply_recipe

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # as accelerate launch numbers them; it alone prints and writes
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "rdkit")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="YAML file of defaults for these flags")
    parser.add_argument("--pairs", required=True, help="demo, lpm24, chebi20, a file, a folder, or a Hub data set")
    parser.add_argument(
        "--output", type=Path, required=True, help="triples, .parquet or .jsonl; replaced when finished"
    )
    parser.add_argument("--split", help="of --pairs (default: train where the pairs have splits)")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the pairs (default: the paper's 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--same_pairs", action="store_true", help="each pair in both directions, not half in each")
    parser.add_argument("--canonicalise", action="store_true", help="write molecules as RDKit's canonical SMILES")
    parser.add_argument("--deduplicate", action="store_true", help="keep the first pair of each molecule (InChIKey)")
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PAIRS", help="leave out molecules of these (of their test split)"
    )
    parser.add_argument("--exclude_stereoisomers", action="store_true", help="and those that differ in stereo only")
    parser.add_argument(
        "--invalid_pairs", choices=("error", "drop"), default="error", help="that don't parse, or are empty"
    )
    for direction in DIRECTIONS:
        group = parser.add_argument_group(direction)
        either = group.add_mutually_exclusive_group()
        either.add_argument(f"--{direction}_model", help="folder or Hub id")
        either.add_argument(f"--{direction}_outputs", type=Path, help="file of outputs that exist")
        group.add_argument(f"--{direction}_adapter", help="LoRA adapter of the model: folder or Hub id")
    parser.add_argument("--encoding", default="utf-8", help="of the files of outputs")
    parser.add_argument("--max_new_tokens", type=int, default=250, help="default: the paper's 250")
    parser.add_argument("--num_beams", type=int, default=1, help="default: greedy")
    penalty = "not taken from the model's own settings (default: none)"
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help=penalty)
    parser.add_argument("--no_repeat_ngram_size", type=int, default=0, help=penalty)
    parser.add_argument("--num_candidates", type=int, default=1, help="sample so many, take the hardest negative")
    parser.add_argument(
        "--negatives",
        choices=("closest", "invalid", "hallucinated"),
        default="closest",
        help="which wrong candidates: the closest to the preferred output (default), invalid SMILES first, or those "
        "with most functional groups that the molecule lacks",
    )
    parser.add_argument("--num_rejected", type=int, default=1, help="triples of a pair at most, one a wrong candidate")
    parser.add_argument("--temperature", type=float, help="of sampling (default: 1 with --num_candidates, else greedy)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up this")
    parser.add_argument("--tokens_per_batch", type=int, default=16384, help="prompts and outputs together")
    parser.add_argument("--prompt", choices=("auto", "paper", "bare"), default="auto", help="auto: bare for seq2seq")
    parser.add_argument(
        "--too_long", choices=("error", "drop"), default="error", help="prompts over a model's positions"
    )
    invalid = parser.add_mutually_exclusive_group()
    invalid.add_argument("--keep_invalid", action="store_true", help="dis-preferred SMILES that don't parse (default)")
    invalid.add_argument("--drop_invalid", action="store_true", help="make no triple of them")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU")
    parser.add_argument("--trust_remote_code", action="store_true")
    apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    args.directions = [direction for direction in DIRECTIONS if direction in args.directions]
    for direction in args.directions:
        if not (getattr(args, f"{direction}_model") or getattr(args, f"{direction}_outputs") or args.pairs == "demo"):
            parser.error(f"give --{direction}_model or --{direction}_outputs, or choose other --directions")
        if getattr(args, f"{direction}_adapter") and not getattr(args, f"{direction}_model"):
            parser.error(f"--{direction}_adapter is of a model: give --{direction}_model, its base")
    if args.num_rejected < 1:
        parser.error(f"--num_rejected {args.num_rejected}: it is 1 or more")
    if args.output.suffix not in (".parquet", ".jsonl"):
        parser.error(f"--output {args.output}: triples are .parquet or .jsonl")
    if args.temperature is None:
        args.temperature = 1.0 if args.num_candidates > 1 else 0.0
    if args.num_beams > 1 and args.temperature:
        parser.error(
            f"--num_beams {args.num_beams}: beams are not sampled; leave out --temperature and --num_candidates"
        )
    if args.num_candidates < 1 or (args.num_candidates > 1 and not args.temperature):
        parser.error(
            f"--num_candidates {args.num_candidates} at --temperature {args.temperature}: candidates are sampled"
        )
    return args


def pairs_by_direction(args: argparse.Namespace, counts: Counter) -> dict[str, list[dict]]:
    """Clean, sampled pairs for each direction; those with outputs that exist have them under the direction's name."""
    from lmolt.data.decontamination import decontaminate
    from lmolt.data.pairs import clean, read_pairs, sample
    from lmolt.data.predictions import read_candidates

    pairs = read_pairs(args.pairs, args.split, counts, default_split="train", invalid=args.invalid_pairs)
    for direction in args.directions:
        if path := getattr(args, f"{direction}_outputs"):
            candidates, found = read_candidates(path, direction, pairs, args.encoding)
            counts.update({f"{direction}: {path.name}: {cause}": n for cause, n in found.items()})
            for pair, outputs in zip(pairs, candidates, strict=True):
                pair[direction] = outputs
    sampled = sample(pairs, args.fraction, args.seed)
    cleaned, changes = clean(sampled, canonicalise=args.canonicalise, invalid=args.invalid_pairs, where=args.pairs)
    excluded = []
    for spec in args.exclude:
        excluded += read_pairs(spec, default_split="test", invalid="drop")
    drops = {"drop_duplicates": args.deduplicate, "drop_stereoisomers": args.exclude_stereoisomers}
    kept, found = decontaminate(cleaned, excluded, **drops)
    counts += changes + found
    counts |= {"pairs read": len(pairs), "pairs sampled": len(sampled), "pairs excluded": len(excluded)}
    counts |= {"pairs used": len(kept)}
    if not kept:
        raise ValueError(f"no pair of {args.pairs} is left: {dict(counts)}")
    if args.same_pairs or len(args.directions) == 1:
        return dict.fromkeys(args.directions, kept)
    shuffled = random.Random(args.seed).sample(kept, len(kept))
    half = len(shuffled) // 2
    return {MOL2CAP: shuffled[:half], CAP2MOL: shuffled[half:]}


def fitting_prompts(args: argparse.Namespace, direction: str, pairs: list[dict], counts: Counter):
    """Pairs whose prompt fits the direction's model, and the prompts; read from its folder before it is loaded."""
    from lmolt.generation.outputs import count_unknown
    from lmolt.generation.translate import load_config, over_limit, prompts_for, refuse_over_limit

    config, tokenizer = load_config(getattr(args, f"{direction}_model"), args.trust_remote_code)
    prompts = prompts_for(config, direction, [pair[COLUMNS[direction][0]] for pair in pairs], args.prompt)
    over = over_limit(config, tokenizer, prompts, args.max_new_tokens)
    if args.too_long == "error":
        refuse_over_limit(config, prompts, over, args.max_new_tokens)
    if over:
        counts[f"{direction}: over the model's positions"] = len(over)
    fit = [i for i in range(len(pairs)) if i not in over]
    found = Counter()
    count_unknown(config, tokenizer, direction, [pairs[i][COLUMNS[direction][1]] for i in fit], found)
    counts.update({f"{direction}: {cause.replace('_', ' ')}": n for cause, n in found.items() if n})
    return [pairs[i] for i in fit], [prompts[i] for i in fit]


def summary(args: argparse.Namespace, pairs: dict, models: dict, counts: Counter, described: dict) -> dict:
    """What the file of triples is made of and from."""
    from lmolt.data.predictions import digest

    used = digest([pair for mine in pairs.values() for pair in mine], ("id", "molecule", "caption"))
    files = [args.output, Path(args.pairs), args.mol2cap_outputs, args.cap2mol_outputs, *map(Path, args.exclude)]
    sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "counts": dict(sorted(counts.items())),
        "directions": described,
        "sha256": {path.name: sha256(path) for path in files if path is not None and path.is_file()},
        "pairs_sha256": used,
        "models": models,
        "versions": versions(*PACKAGES),
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
    }


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    say = print if FIRST_PROCESS else lambda *_: None
    from lmolt.data.negatives import describe, table, triples_of
    from lmolt.data.triples import write_triples

    # --- pairs of each direction; a place that can't be written to is found before them
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.is_dir():
        raise ValueError(f"--output {args.output}: is a folder; name the file, such as {args.output}/triples.parquet")
    if FIRST_PROCESS:
        take(args)
    counts = Counter()
    if "demo" in (args.pairs, *args.exclude):
        use_demo(args)
    pairs = pairs_by_direction(args, counts)
    say(f"reads {args.pairs}: " + ", ".join(f"{len(pairs[direction])} pairs for {direction}" for direction in pairs))

    # --- what can be wrong with the models is found before the first is loaded
    prompts = {}
    for direction in args.directions:
        if getattr(args, f"{direction}_model"):
            pairs[direction], prompts[direction] = fitting_prompts(args, direction, pairs[direction], counts)

    # --- outputs -> triples
    triples, similarities, described, models = [], {}, {}, {}
    journal = beside(args.output)[-1]
    for direction in args.directions:
        if direction in prompts:
            preferred = [pair[COLUMNS[direction][1]] for pair in pairs[direction]]
            outputs, models[direction] = translations(args, direction, prompts[direction], preferred, journal, counts)
        else:
            outputs = [pair[direction] for pair in pairs[direction]]
        chosen = {"choice": args.negatives, "most": args.num_rejected}
        made, close = triples_of(direction, pairs[direction], outputs, args.drop_invalid, counts, **chosen)
        similarities[direction], described[direction] = close, describe(direction, made, close)
        triples += made
    if not triples:
        raise ValueError(f"no pair makes a triple: {dict(counts)}")

    # --- write; the others end without waiting, their translations being gathered
    if prompts:
        from lmolt.distributed.strategy import exit_other_processes

        exit_other_processes()
    if not FIRST_PROCESS:
        return
    from lmolt.files import write_whole
    from lmolt.report.figures import triples_figure

    write_whole(args.output.with_suffix(".png"), triples_figure(triples, similarities))
    write_triples(triples, args.output)
    record = summary(args, pairs, models, counts, described)
    write_whole(args.output.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False))
    shutil.rmtree(journal, ignore_errors=True)
    for cause, n in sorted(counts.items()):
        print(f"  {n:7,} {cause}")
    print(table(described))
    print(f"wrote {args.output}: {len(triples)} triples; beside it a summary (.json) and its figure (.png)")


def beside(output: Path) -> list[Path]:
    """What is written besides `output`: summary, figure and journal."""
    return [output.with_suffix(".json"), output.with_suffix(".png"), output.with_name(output.name + ".journal")]


def take(args: argparse.Namespace) -> None:
    """Lock --output; `ValueError` where it or what is written beside it is an input, or isn't of this script."""
    from lmolt import ownership

    names = ("pairs", *(f"{direction}_{kind}" for direction in DIRECTIONS for kind in ("model", "outputs")))
    inputs = {f"--{name}": getattr(args, name) for name in names}
    inputs |= {f"--exclude ({i + 1})": spec for i, spec in enumerate(args.exclude)}
    written = [args.output, *beside(args.output)]
    for path in written:
        ownership.check_inputs("--output writes", path, inputs)
    ownership.hold(args.output, beside=True)
    ownership.check_free(args.output.parent, "make_triples", [path.name for path in written])
    ownership.claim(args.output.parent, "make_triples", [path.name for path in written])


def use_demo(args: argparse.Namespace) -> None:
    """Build what the embedded default lacks, and take its T5s where no other translator is named."""
    from lmolt.data.pairs import DEMO
    from lmolt.demo import build
    from lmolt.generation.translate import process_state

    given = lambda direction: getattr(args, f"{direction}_model") or getattr(args, f"{direction}_outputs")
    wanted = [direction for direction in args.directions if args.pairs == "demo" and not given(direction)]
    with process_state().main_process_first():
        if wanted:
            build.build_models()
        else:
            build.pairs()
    for direction in wanted:
        setattr(args, f"{direction}_model", str(DEMO / "models" / f"t5_{direction}"))


def translations(
    args: argparse.Namespace, direction: str, prompts: list[str], preferred: list[str], journal: Path, counts: Counter
) -> tuple[list[list[str]], dict]:
    """Each prompt's outputs, one or --num_candidates, and what made them.

    Counted: those that are unlike the `preferred` output of their pair only in what the tokenizer can't write.
    """
    from lmolt.generation.server import is_server
    from lmolt.generation.translate import identity, load_translator, translate

    name, adapter = getattr(args, f"{direction}_model"), getattr(args, f"{direction}_adapter")
    n = args.num_candidates
    model, tokenizer = load_translator(name, adapter, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
    found = Counter()
    outputs = translate(
        model,
        tokenizer,
        [prompt for prompt in prompts for _ in range(n)],
        max_new_tokens=args.max_new_tokens,
        tokens_per_batch=args.tokens_per_batch,
        num_beams=args.num_beams,
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        counts=found,
        journal=journal / direction,
        progress=f"{direction} with {adapter or name}",
    )
    counts.update({f"{direction}: {cause.replace('_', ' ')}": n for cause, n in found.items() if n})
    weights = identity(model)
    if is_server(name):
        weights = f"unknown: they are the server's; what it is known by: {weights}"
    made_by = {"name": name, "adapter": adapter, "weights": weights}
    if tokenizer is not None:
        from lmolt.models.tokenizers import as_written

        written = [text for text in as_written(tokenizer, preferred) for _ in range(n)]
        wanted = [text.strip() for text in preferred for _ in range(n)]
        if alike := sum(a == b != c for a, b, c in zip(outputs, written, wanted, strict=True)):
            counts[f"{direction}: output that is the preferred one without what the tokenizer lacks"] = alike
    return [outputs[i : i + n] for i in range(0, len(outputs), n)], made_by


def command() -> None:
    run_main(main, kept="what is translated is in OUTPUT.journal: the same command goes on from it")


if __name__ == "__main__":
    command()
