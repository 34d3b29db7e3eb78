"""Translate molecules (SMILES) to captions or captions to molecules, with a model, an adapter, a system or a server.

    python scripts/translate.py "CC(=O)Nc1ccc(O)cc1" --model runs/demo/models/cap2mol --adapter runs/demo/cpo
    python scripts/translate.py --input molecules.smi --model runs/demo/models/cap2mol --adapter runs/demo/cpo \\
        --output captions.csv
    accelerate launch scripts/translate.py --input captions.csv --column text --output molecules.sdf \\
        --model runs/demo/models/cap2mol --adapter runs/demo/cpo --num_candidates 8 --valid_only
    python scripts/translate.py --system molt5 --systems recipes/systems_demo.yaml --input captions.txt --output o.csv

    python scripts/translate.py --serve --model runs/demo/models/cap2mol --adapter runs/demo/cpo

(as printed once ./launch.sh has made runs/demo). Inputs: texts, or --input FILE: a .txt with one a line, a .csv, .tsv,
.jsonl or .parquet with --column, a .smi, an .sdf; - is the standard input, one a line. --output is a .csv, .tsv,
.jsonl, .parquet, .smi or .sdf with a row a candidate: input, rank, output, its log-probability, canonical SMILES and
InChIKey of the molecule, validity; without it, candidates are printed. An input that can't be translated has a row that
says why. What a killed run has translated stays in OUTPUT.journal: the same command goes on from it.
"""

import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import shutil

from lmolt.data.sources import INPUTS, OUTPUTS, Sources, read_sources, write_translations
from lmolt.files import run_main
from lmolt.generation.candidates import RANKS
from lmolt.generation.systems import SYSTEMS
from lmolt.prompts import CAP2MOL, DIRECTIONS
from lmolt.recipes import Parser

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # as accelerate launch numbers them; it alone prints and writes


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="SMILES or captions")
    parser.add_argument("--input", metavar="FILE", help=f"{', '.join(INPUTS)}, or - for the standard input")
    parser.add_argument("--column", help="of a table (default: molecule, SMILES, caption, description, the only one)")
    parser.add_argument("--output", type=Path, help=f"{', '.join(OUTPUTS)}; replaced when finished")
    parser.add_argument("--serve", action="store_true", help="a page on this machine (pip install 'lmolt[page]')")
    parser.add_argument("--port", type=int, help="of --serve (default: the first that is free from 7860)")
    parser.add_argument("--pairs", help="of --serve: its examples are of these (demo, a file, a Hub data set)")
    parser.add_argument("--direction", choices=DIRECTIONS, help="default: found from the inputs, where they show it")
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="causal or sequence-to-sequence model: a folder, a Hub id, or a server's URL")
    which.add_argument("--system", metavar="NAME", help="one of --systems: its models, prompts, stop rules")
    model.add_argument("--systems", type=Path, default=SYSTEMS, metavar="FILE", help="default: recipes/systems.yaml")
    model.add_argument("--adapter", help="PEFT adapter on --model")
    model.add_argument("--load_in_4bit", action="store_true", help="NF4, as QLoRA trains on")
    model.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, on a CPU float32"
    )
    model.add_argument("--trust_remote_code", action="store_true")
    model.add_argument("--max_new_tokens", type=int, default=250)
    model.add_argument("--tokens_per_batch", type=int, default=16384, help="rows x (prompt + new tokens)")
    several = parser.add_argument_group("candidates")
    several.add_argument("--num_candidates", type=int, default=1, help="of an input: greedy and samples, or beams")
    several.add_argument("--num_beams", type=int, default=1, help="beam search instead of sampling")
    several.add_argument("--temperature", type=float, default=0.8, help="of sampled candidates (default: 0.8)")
    several.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that make up this")
    several.add_argument("--seed", type=int, default=0)
    several.add_argument("--valid_only", action="store_true", help="drop outputs that are no molecule (or empty)")
    several.add_argument(
        "--rank", choices=RANKS, default="logp", help="log-probability; a token's; both directions'; frequency"
    )
    several.add_argument("--channel_weight", type=float, default=1.0, help="lambda of --rank channel (default: 1)")
    several.add_argument("--reverse_model", help="scores inputs given outputs for --rank channel (default: the model)")
    several.add_argument("--properties", action="store_true", help="add RDKit's properties; groups captions claim")
    args = parser.parse_args(argv)
    if args.system and args.adapter:
        parser.error("--system has adapters of its own; give --model with --adapter")
    if args.texts == ["-"]:  # as --input has it
        args.texts, args.input = [], args.input or "-"
    if args.serve and (args.input or args.texts or args.output):
        parser.error("--serve takes its inputs from the page: give none, and no --output")
    if not args.serve and (args.pairs or args.port):
        parser.error("--pairs and --port are for --serve; inputs are --input FILE")
    if args.input and args.texts:
        parser.error(f"--input {args.input} and {args.texts[0][:80]!r}: give a file or texts, one of them")
    if len(args.texts) == 1 and Path(args.texts[0]).suffix in INPUTS and Path(args.texts[0]).is_file():
        parser.error(f"{args.texts[0]} is a file; say --input {args.texts[0]}")
    if args.output and args.output.suffix.lower() not in OUTPUTS:
        parser.error(f"--output {args.output}: unknown suffix {args.output.suffix!r}; outputs are {', '.join(OUTPUTS)}")
    if args.output and args.output.is_dir():
        parser.error(f"--output {args.output}: is a folder; name a file")
    return args


def sources_of(args: argparse.Namespace) -> Sources:
    if args.texts:
        return Sources(args.texts, None, None)
    if args.input is None and sys.stdin.isatty():
        raise ValueError("nothing to translate: give texts, --input FILE, or lines on the standard input")
    if args.input in (None, "-"):
        data = sys.stdin.buffer.read()
        try:
            lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(f"standard input line {line}: byte 0x{data[error.start]:02x} is not UTF-8") from None
        if lines == [""]:
            raise ValueError("standard input: nothing in it")
        return Sources([line.removesuffix("\r") for line in lines], None, None)
    return read_sources(Path(args.input), args.column, args.direction)


def translator_of(args: argparse.Namespace):
    from lmolt.generation.translator import Translator

    options = {key: getattr(args, key) for key in ("dtype", "load_in_4bit", "trust_remote_code", "reverse_model")}
    if args.system:
        return Translator(system=args.system, systems=args.systems, **options)
    return Translator(args.model, args.adapter, **options)


def take(args: argparse.Namespace) -> None:
    """Lock --output; `ValueError` where it or its journal is an input, or isn't of this script."""
    from lmolt import ownership

    inputs = {f"--{name}": getattr(args, name) for name in ("input", "model", "adapter", "reverse_model")}
    written = [args.output, args.output.with_name(args.output.name + ".journal")]
    for path in written:
        ownership.check_inputs("--output writes", path, inputs)
    ownership.hold(args.output, beside=True)
    ownership.check_free(args.output.parent, "translate", [path.name for path in written])
    ownership.claim(args.output.parent, "translate", [path.name for path in written])


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.serve:
        from lmolt.generation.page import serve

        serve(translator_of(args), args.port, args.pairs, max_new_tokens=args.max_new_tokens, seed=args.seed)
        return
    sources = sources_of(args)
    if args.output and FIRST_PROCESS:
        take(args)

    from lmolt.distributed.strategy import exit_other_processes

    translator = translator_of(args)
    journal = args.output and args.output.with_name(args.output.name + ".journal")
    candidates = ("num_candidates", "num_beams", "temperature", "top_p", "seed", "valid_only", "rank", "channel_weight")
    how = {key: getattr(args, key) for key in (*candidates, "properties", "max_new_tokens", "tokens_per_batch")}
    direction = args.direction or sources.direction
    found = translator.translate(sources.texts, direction, journal=journal, progress=bool(args.output), **how)
    exit_other_processes()
    if not FIRST_PROCESS:
        return

    rows = found.rows()
    if sources.ids:
        rows = [{"row": row["row"], "id": sources.ids[row["row"] - 1]} | row for row in rows]
    if not args.output:
        for row in rows:
            score = f"{row['logp']:9.2f}" if row["logp"] is not None else f"{'':9}"
            shown = row["output"] if row["rank"] else f"({row['note']})"
            kind = "" if row["direction"] != CAP2MOL or not row["rank"] or row["valid"] else "\t(no molecule)"
            print(f"{row['row']}\t{row['rank'] or '-'}\t{score}\t{shown}{kind}")
    else:
        missing = write_translations(rows, args.output)
        shutil.rmtree(journal, ignore_errors=True)
        print(f"wrote {args.output}: {len(rows) - missing} rows")
        if missing:
            print(f"  {missing:7,} rows have no molecule, which {args.output.suffix} can't hold: not written")
    for what, n in found.counts.items():
        print(f"  {n:7,} {what}", file=sys.stdout if args.output else sys.stderr)


def command() -> None:
    run_main(main, kept="what is translated is in OUTPUT.journal: the same command goes on from it")


if __name__ == "__main__":
    command()
