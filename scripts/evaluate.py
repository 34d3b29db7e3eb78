"""Score translations between molecules and language: a model's, or outputs that exist; or compare scored systems.

    accelerate launch scripts/evaluate.py --model runs/demo/models/cap2mol --pairs demo --limit 50 --output runs/start
    accelerate launch scripts/evaluate.py --model runs/demo/models/cap2mol --adapter runs/demo/cpo --pairs demo \\
        --limit 50 --output runs/aligned
    python scripts/evaluate.py --system molt5 --systems recipes/systems_demo.yaml --pairs demo --output runs/molt5
    python scripts/evaluate.py --compare runs/start CPO=runs/aligned --baseline start --output runs/compared
    python scripts/evaluate.py --predictions runs/start/predictions.parquet --direction cap2mol --output runs/again

(as printed once ./launch.sh has made runs/demo). Pairs: demo, which is made if it isn't there, a .csv/.tsv/.jsonl/
.parquet file with molecule and caption, or a Hub data set. Systems: the paper's, with their prompts and stop rules, are
in recipes/systems.yaml. Predictions: the reference scripts' tables (tab-separated: SMILES or description, ground truth,
output), .parquet/.jsonl with source, reference and prediction, or one output a line beside --pairs. Writes
predictions.parquet, scores.parquet, report.md, report.html, figures and, last, metrics.json to --output; a run that was
killed goes on where it was.
--push_to_hub --hub_model_id OWNER/NAME puts the metrics on that model's card.
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
from collections import Counter, defaultdict
from datetime import UTC, datetime

from lmolt.files import cache_folder, known_as, run_main, versions
from lmolt.generation.candidates import RANKS
from lmolt.generation.outputs import Translators, translate_back, translated
from lmolt.generation.systems import SYSTEMS, read_system
from lmolt.prompts import CAP2MOL, COLUMNS, DIRECTIONS, MOL2CAP
from lmolt.recipes import Parser

PACKAGES = ("torch", "transformers", "peft", "rdkit", "fcd", "nltk", "rapidfuzz", "numpy")
PENALTIES = (("repetition_penalty", float, 1.0), ("no_repeat_ngram_size", int, 0))
WRITTEN = ("metrics.json", "predictions.parquet", "scores.parquet", "report.md", "report.html", "journal")
WRITTEN += ("figure[1-9]*.png", "table[1-9]*.csv", "table[1-9]*.tex")
FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # as accelerate launch numbers them; it alone scores and writes


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="causal or sequence-to-sequence model: a folder or a Hub id")
    what.add_argument("--system", metavar="NAME", help="one of --systems: its models, prompts, stop rules")
    what.add_argument("--predictions", nargs="+", type=Path, metavar="FILE", help="score outputs, a file a direction")
    what.add_argument("--compare", nargs="+", metavar="[NAME=]DIR", help="compare folders written by this script")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--name", help="the system's name in reports (default: the name of --output)")
    parser.add_argument("--pairs", help="demo, lpm24, chebi20, a file, a folder, or a Hub data set")
    parser.add_argument("--split", help="split of --pairs (default: test where the pairs have splits)")
    parser.add_argument("--limit", type=int, help="this many pairs, chosen by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--invalid_pairs", choices=("error", "drop"), default="error", help="whose molecule RDKit cannot read"
    )
    model = parser.add_argument_group("translating with --model or --system")
    model.add_argument("--systems", type=Path, default=SYSTEMS, metavar="FILE", help="default: recipes/systems.yaml")
    model.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    model.add_argument("--adapter", help="PEFT adapter on --model")
    model.add_argument("--load_in_4bit", action="store_true", help="NF4, as QLoRA trains on")
    model.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32"
    )
    model.add_argument("--trust_remote_code", action="store_true")
    model.add_argument("--max_new_tokens", type=int, default=250, help="the paper's limit")
    model.add_argument("--num_beams", type=int, default=1)
    for name, kind, off in PENALTIES:
        model.add_argument(f"--{name}", type=kind, default=off, help="what the model's own settings ask for isn't done")
    model.add_argument("--num_candidates", type=int, default=1, help="evaluate the best of so many: docs/translate.md")
    model.add_argument("--rank", choices=RANKS, default="logp", help="which candidate is best")
    model.add_argument("--temperature", type=float, default=0.8, help="of sampled candidates (default: 0.8)")
    model.add_argument("--channel_weight", type=float, default=1.0, help="lambda of --rank channel (default: 1)")
    model.add_argument("--reverse_model", help="scores inputs given outputs for --rank channel (default: the model)")
    model.add_argument("--tokens_per_batch", type=int, default=16384, help="rows x (prompt + new tokens)")
    model.add_argument(
        "--too_long", choices=("error", "empty"), default="error", help="prompts over the model's positions"
    )
    existing = parser.add_argument_group("scoring --predictions")
    existing.add_argument("--direction", nargs="+", choices=DIRECTIONS, help="of each file, in their order")
    existing.add_argument("--encoding", default="utf-8", help="of the file")
    metric = parser.add_argument_group("metrics")
    metric.add_argument(
        "--no_references",
        action="store_true",
        help="score what needs none; --pairs may have sources only, or be a list",
    )
    metric.add_argument(
        "--novelty", metavar="PAIRS", help="how many valid molecules are none of these (--pairs' forms)"
    )
    metric.add_argument("--novelty_split", metavar="SPLIT", help="of --novelty (default: train where it has splits)")
    metric.add_argument(
        "--round_trip", action="store_true", help="translate the outputs back and compare with the sources"
    )
    metric.add_argument("--round_trip_model", metavar="MODEL", help="by this one (default: the same model or system)")
    metric.add_argument("--round_trip_adapter", metavar="ADAPTER", help="PEFT adapter on --round_trip_model")
    metric.add_argument(
        "--text_tokenizer", help="word pieces of captions; comparable: allenai/scibert_scivocab_uncased"
    )
    metric.add_argument("--nli_model", help="sequence classification model with an entailment label")
    metric.add_argument("--nltk_data", help="folder with corpora/wordnet, for METEOR")
    metric.add_argument("--property_tree", help="folder with L+M-24's nested_props.json and its companions")
    metric.add_argument("--no_fcd", action="store_true", help="leave out the Frechet ChemNet distance, the slowest")
    metric.add_argument("--chrf_threshold", type=float, default=0.3, help="a molecule wins above this (paper, 3.4)")
    metric.add_argument("--delta_threshold", type=int, default=5, help="and below this |length difference|")
    metric.add_argument("--n_shuffles", type=int, default=99, help="of the outputs, for what they owe to their sources")
    metric.add_argument("--n_bootstrap", type=int, help="resamples (default: 1,000 for intervals, 10,000 to compare)")
    metric.add_argument("--cache_dir", type=Path, help="keeps references' features (default: LMOLT_CACHE)")
    sharing = parser.add_argument_group("sharing")
    sharing.add_argument("--push_to_hub", action="store_true", help="put the metrics on the model's card on the Hub")
    sharing.add_argument("--hub_model_id", metavar="OWNER/NAME", help="the model whose card that is")
    parser.add_argument("--baseline", help="--compare: the system that differences are from (default: the first)")
    args = parser.parse_args(argv)
    if args.system and args.adapter:
        parser.error("--system has adapters of its own; give --model with --adapter")
    if args.predictions and len(args.predictions) != len(args.direction or []):
        parser.error("--predictions needs a --direction for each file: mol2cap or cap2mol")
    if args.predictions and len(set(args.direction)) < len(args.direction):
        parser.error(f"--direction {' '.join(args.direction)}: a direction's outputs are one file; evaluate twice")
    if args.num_candidates > 1 and any(getattr(args, name) != off for name, _, off in PENALTIES):
        parser.error(
            "--repetition_penalty and --no_repeat_ngram_size have no effect with --num_candidates; leave them out"
        )
    if args.round_trip_adapter and not args.round_trip_model:
        parser.error("--round_trip_adapter needs --round_trip_model")
    args.round_trip = args.round_trip or args.round_trip_model is not None
    if args.round_trip and args.predictions and not args.round_trip_model:
        parser.error("--round_trip of --predictions needs --round_trip_model, which translates them back")
    if args.push_to_hub and (args.compare or not args.hub_model_id):
        parser.error("--push_to_hub is for one model's metrics, and needs --hub_model_id OWNER/NAME")
    if not args.pairs and (args.limit is not None or args.split):
        parser.error("--limit and --split choose among --pairs, which are not given")
    if (args.model or args.system) and not args.pairs:
        parser.error("--model and --system need --pairs: demo, a file, or a Hub data set")
    place = next(folder for folder in (args.output.absolute(), *args.output.absolute().parents) if folder.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        parser.error(f"--output {args.output}: {place} is no folder that can be written to")
    return args


def chosen_pairs(args: argparse.Namespace, counts: Counter) -> list[dict]:
    """The pairs to evaluate on: the split's, all of them or --limit of them by seed, in their order."""
    from lmolt.data.pairs import clean, read_pairs

    options = {"default_split": "test", "invalid": args.invalid_pairs, "seed": args.seed}
    if args.no_references:
        directions = args.direction if args.predictions else args.directions
        options["need"] = tuple(dict.fromkeys(COLUMNS[direction][0] for direction in directions))
    pairs = read_pairs(args.pairs, args.split, counts, **options)
    if args.limit is not None and args.limit < len(pairs):
        pairs = [pairs[i] for i in sorted(random.Random(args.seed).sample(range(len(pairs)), args.limit))]
    if (
        not args.predictions and pairs[0]["molecule"] is not None
    ):  # a molecule that doesn't parse is found before hours of translating, not after
        pairs, dropped = clean(pairs, invalid=args.invalid_pairs, where=args.pairs)
        counts += dropped
    return pairs


def build_demo() -> None:
    """Make the embedded default's pairs, if they aren't there."""
    from lmolt.demo.build import pairs
    from lmolt.generation.translate import process_state

    with process_state().main_process_first():
        pairs()


def take(output: Path, directions: set[str], inputs: dict[str, object]) -> None:
    """Lock --output, which holds none of the inputs and nothing that would be lost: else `ValueError`."""
    from lmolt import ownership
    from lmolt.files import read_json

    ownership.check_inputs("--output", output, inputs)
    ownership.hold(output)
    ownership.check_free(output, "evaluate", WRITTEN)
    if (record := output / "metrics.json").is_file():
        others = sorted(set(read_json(record).get("directions", ())) - directions)
        if others and directions:
            raise ValueError(
                f"{output} holds {others[0]} results, which this run would drop; score both directions in one command "
                "(--predictions and --direction take several), or choose another --output"
            )


def compare(args: argparse.Namespace) -> None:
    from lmolt import ownership
    from lmolt.report.report import read_run, write_report
    from lmolt.report.tables import to_markdown

    if not FIRST_PROCESS:
        return
    if len(args.compare) < 2:
        raise ValueError("--compare needs at least two folders; one system's report is in its folder")
    runs = [read_run(spec) for spec in args.compare]
    take(args.output, set(), {"a compared folder": None} | {f"run {run.name}": run.folder for run in runs})
    ownership.claim(args.output, "evaluate", WRITTEN)
    for table in write_report(runs, args.output, args.baseline, args.n_bootstrap or 10_000, args.seed):
        print(to_markdown(table))
    print(f"report: {args.output / 'report.html'} (report.md, tables and figures beside it)")


def read(args: argparse.Namespace, pairs: list[dict] | None, counts: dict) -> list[dict]:
    """Prediction rows of the files of --predictions; `counts` says what was odd about them."""
    from lmolt.data.predictions import read_predictions, usable

    rows = []
    for file, direction in zip(args.predictions, args.direction, strict=True):
        mine, found = read_predictions(file, direction, pairs, args.encoding, references=not args.no_references)
        if found["references_of_file"] and (args.limit is not None or args.split):
            raise ValueError(
                f"{file}: has sources and references of its own, so --limit and --split choose nothing; leave them "
                "out, or take those columns out of the file"
            )
        if not args.no_references:
            mine, dropped = usable(mine, file, args.invalid_pairs)
            for row in dropped if FIRST_PROCESS else ():
                what = "molecule" if direction == CAP2MOL else "caption"
                print(f"left out: id {row['id']}, no {what} is its reference {row['reference'][:100]!r}")
            found["unreadable_reference_dropped"] = len(dropped)
        rows += mine
        counts[direction] += found
    return rows


def scored(args: argparse.Namespace, rows: list[dict], counts: dict) -> tuple[dict, dict, list[dict]]:
    """Of each direction what metrics.json says and the scores' columns, and the rows of scores.parquet."""
    from lmolt.data.pairs import read_pairs
    from lmolt.metrics import score

    known = {}
    if args.novelty:
        found = read_pairs(args.novelty, args.novelty_split, default_split="train", invalid="drop", need=("molecule",))
        molecules = [pair["molecule"] for pair in found]
        which = hashlib.sha256("\n".join(sorted(molecules)).encode()).hexdigest()[:8]
        known = {"known_molecules": molecules, "known_name": f"{args.novelty} ({len(found)}, {which})"}
    back = (args.model, args.adapter) if args.model else (args.system or "nothing", None)
    back = (args.round_trip_model, args.round_trip_adapter) if args.round_trip_model else back
    back = " with ".join(known_as(name) for name in back if name) + ", which made it" * (not args.round_trip_model)
    parts, columns, table = {}, {}, []
    for direction in dict.fromkeys(row["direction"] for row in rows):
        mine = [row for row in rows if row["direction"] == direction]
        print(f"scoring {len(mine)} {direction} outputs", flush=True)
        try:
            part, columns[direction] = score(
                direction,
                [row["source"] for row in mine],
                None if args.no_references else [row["reference"] for row in mine],
                [row["prediction"] for row in mine],
                returned=[row["returned"] for row in mine] if args.round_trip else None,
                returned_by=back,
                **(known if direction == CAP2MOL else {}),
                text_tokenizer=args.text_tokenizer,
                nli_model=args.nli_model,
                nltk_data=args.nltk_data,
                chrf_threshold=args.chrf_threshold,
                delta_threshold=args.delta_threshold,
                property_tree=args.property_tree,
                fcd=not args.no_fcd,
                cache_dir=args.cache_dir or cache_folder(),
                n_shuffles=args.n_shuffles,
                n_bootstrap=args.n_bootstrap or 1000,
                seed=args.seed,
            )
        except ValueError as error:  # such as a reference that is no molecule: say which file it is in
            files = dict(zip(args.direction or (), args.predictions or (), strict=True))
            raise ValueError(f"{args.pairs or files[direction]}, {direction} {error}") from error
        counted = dict(counts[direction]) | part["counts"]
        parts[direction] = {"n": len(mine), "counts": counted, "metrics": part["metrics"]}
        its = {key: values.tolist() for key, values in columns[direction].items()}
        for i, row in enumerate(mine):
            table.append({"id": row["id"], "direction": direction} | {key: values[i] for key, values in its.items()})
            if its.get("count_unfinished", [0] * len(mine))[i]:
                print(f"not finished by RDKit, and so invalid: id {row['id']}, {row['prediction'][:100]!r}")
    return parts, columns, table


def evaluate(args: argparse.Namespace) -> None:
    from lmolt import hub, ownership
    from lmolt.data.predictions import digest
    from lmolt.files import write_table, write_whole
    from lmolt.report.report import Run, write_report
    from lmolt.report.tables import to_markdown

    # ---- the place and the Hub, asked before the work
    if args.push_to_hub and FIRST_PROCESS:
        hub.reserve(args.hub_model_id, create=False)
    if FIRST_PROCESS:
        names = ("model", "adapter", "pairs", "nli_model", "text_tokenizer", "nltk_data", "property_tree", "systems")
        inputs = {f"--{name}": getattr(args, name) for name in names}
        inputs |= {"--novelty": args.novelty, "--round_trip_model": args.round_trip_model}
        inputs |= {f"--predictions ({i + 1})": file for i, file in enumerate(args.predictions or ())}
        directions = set(args.direction if args.predictions else args.directions)
        take(args.output, directions, inputs)
        if args.nli_model and MOL2CAP in directions and not args.no_references:
            from lmolt.metrics.hallucination import check_labels

            check_labels(args.nli_model)

    # ---- outputs: made now, or made before
    counts = defaultdict(Counter)  # what was odd about the data, by direction
    system = read_system(args.system, args.systems) if args.system else None
    if args.pairs == "demo":
        build_demo()
    pairs = chosen_pairs(args, counts[CAP2MOL]) if args.pairs else None  # what reading counts concerns molecules
    rows = read(args, pairs, counts) if args.predictions else None
    if FIRST_PROCESS:
        ownership.claim(args.output, "evaluate", WRITTEN)
    translators = Translators(args, system)
    if rows is None:
        rows = translated(args, translators, pairs, counts)
    if args.round_trip:
        translate_back(args, translators, rows, counts)
    if not args.predictions or args.round_trip:
        from lmolt.distributed.strategy import exit_other_processes  # here: scoring outputs that exist needs no torch

        exit_other_processes()
    if not FIRST_PROCESS:
        return

    # ---- scores
    run = Run(args.name or args.output.resolve().name, args.output, record={})
    for row in rows:
        run.rows.setdefault(row["direction"], []).append(row)
    parts, run.scores, scores = scored(args, rows, counts)

    # ---- files
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "metrics.json").unlink(missing_ok=True)  # written last: where it is, the folder is whole
    write_table(rows, args.output / "predictions.parquet")
    write_table(scores, args.output / "scores.parquet")
    run.record |= {
        "system": run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(*PACKAGES),
        "arguments": {key: value for key, value in vars(args).items() if value is not None},
        "data": {"pairs_sha256": digest(rows, ("source", "reference")), "predictions_sha256": digest(rows)},
        "directions": parts,
    }
    folders = [args.adapter, args.model]
    if not args.predictions:
        from lmolt.generation.server import is_server

        if system.server if system else is_server(args.model):
            run.record["weights"] = "unknown: they are the server's"
    if system:
        run.record["entry"] = system._asdict()  # as the file of systems had it
        folders = [*system.adapters.values(), *system.models.values()]
    for folder in folders:
        if folder and (Path(folder) / "efficiency.json").is_file():
            run.record["efficiency"] = json.loads((Path(folder) / "efficiency.json").read_text())
            break
    record = json.dumps(run.record, indent=1, ensure_ascii=False, default=str)
    run.record = json.loads(record)  # as every later reader has it
    for table in write_report([run], args.output):
        print(to_markdown(table))
    write_whole(args.output / "metrics.json", record)
    print(f"report: {args.output / 'report.html'} (and report.md beside it)")
    if args.push_to_hub:
        url = hub.push_metrics(args.output / "metrics.json", run.record, args.hub_model_id)
        print(f"metrics are on the card of {args.hub_model_id}: {url}")


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    if args.compare:
        compare(args)
    else:
        evaluate(args)


def command() -> None:
    run_main(main, kept="finished translations are kept in --output, and the same command goes on from them")


if __name__ == "__main__":
    command()
