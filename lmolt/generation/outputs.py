"""Outputs that evaluate.py scores: a model's or a system's for pairs, the best of several, and what they come back as.

`args` are evaluate.py's, which say how to translate. Each function gives the same rows on every process.
"""

import argparse
import os
from collections import Counter

from lmolt.generation.systems import System, finish, load
from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP, build_prompt

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # as accelerate launch numbers them


class Translators:
    """The model asked last, kept until another is wanted: there may not be room for two."""

    def __init__(self, args: argparse.Namespace, system: System | None):
        self.args, self.system, self.wanted, self.loaded = args, system, None, None

    def __call__(self, direction: str, sources: list[str], counts: Counter, back: bool = False) -> list[str]:
        """Outputs for `sources`; with `back`, by --round_trip_model where there is one."""
        from lmolt.generation.translate import prompts_for, translate

        args, system = self.args, None if back and self.args.round_trip_model else self.system
        model, tokenizer = self.load(direction, back)
        if system:
            prompts = [build_prompt(direction, source, system.prompt) for source in sources]
        else:
            prompts = prompts_for(model.config, direction, sources)
        outputs = translate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=args.max_new_tokens,
            tokens_per_batch=args.tokens_per_batch,
            num_beams=args.num_beams,
            repetition_penalty=args.repetition_penalty,
            no_repeat_ngram_size=args.no_repeat_ngram_size,
            unk=system.unk if system else "",
            too_long="empty" if back else args.too_long,
            counts=counts,
            journal=args.output / "journal",
            progress=f"{direction}, back" if back else direction,
        )
        kept = [finish(system, direction, output) for output in outputs] if system else outputs
        counts["cut_output"] += sum(a != b for a, b in zip(outputs, kept, strict=True))
        return kept

    def load(self, direction: str, back: bool = False) -> tuple:
        """The model and its tokenizer that a call with the same arguments asks."""
        from lmolt.generation.translate import load_translator

        args, other = self.args, back and self.args.round_trip_model
        system = None if other else self.system
        options = {key: getattr(args, key) for key in ("dtype", "load_in_4bit", "trust_remote_code")}
        wanted = (system.models[direction], system.adapters[direction]) if system else (args.model, args.adapter)
        wanted = (args.round_trip_model, args.round_trip_adapter) if other else wanted
        if wanted != self.wanted:
            self.loaded = None
            self.loaded = load(system, direction, **options) if system else load_translator(*wanted, **options)
            self.wanted = wanted
        return self.loaded


def translated(args: argparse.Namespace, translators: Translators, pairs: list[dict], counts: dict) -> list[dict]:
    """Prediction rows of the pairs, the same on every process; `counts` says how many were cut."""
    from lmolt.data.predictions import rows_of_pairs

    best = BestCandidates(args, translators.system) if args.num_candidates > 1 else None
    rows = []
    for direction in args.directions:
        asked = rows_of_pairs(pairs, direction)
        sources = [row["source"] for row in asked]
        if not args.no_references:
            references = [row["reference"] for row in asked]
            model, tokenizer = (best or translators).load(direction)
            count_unknown(model.config, tokenizer, direction, references, counts[direction])
            del model  # there may not be room for the next beside it
        outputs = (best or translators)(direction, sources, counts[direction])
        reference = {"reference": None} if args.no_references else {}
        rows += [row | reference | {"prediction": output} for row, output in zip(asked, outputs, strict=True)]
    return rows


def count_unknown(config, tokenizer, direction: str, references: list[str], counts: Counter) -> None:
    """Count the references that the model can't write, and say so. A server's tokenizer (None) isn't known."""
    if tokenizer is None:
        return
    from lmolt.models.tokenizers import check_texts

    texts = [(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in references]
    say = print if FIRST_PROCESS else lambda _: None
    counts += check_texts(tokenizer, config, "references", texts, lambda line: say(f"{direction} {line}"))


class BestCandidates:
    """The best of --num_candidates by --rank for each source."""

    def __init__(self, args: argparse.Namespace, system: System | None):
        from lmolt.generation.translator import Translator

        options = {key: getattr(args, key) for key in ("dtype", "load_in_4bit", "trust_remote_code", "reverse_model")}
        self.args, self.translator = args, Translator(args.model, args.adapter, system=system, **options)
        self.load = self.translator.load

    def __call__(self, direction: str, sources: list[str], counts: Counter) -> list[str]:
        from lmolt.generation.candidates import OVER

        args, names = self.args, ("num_candidates", "num_beams", "temperature", "rank", "channel_weight")
        settings = {name: getattr(args, name) for name in (*names, "max_new_tokens", "tokens_per_batch")}
        found = self.translator(sources, direction, journal=args.output / "journal", progress=True, **settings)
        if args.too_long == "error" and (over := [c for c in found if c.note == OVER]):
            raise ValueError(
                f"{len(over)} prompts are {OVER}, that of pair {over[0].row} of {len(sources)} the first; lower "
                "--max_new_tokens, or count their outputs as empty with --too_long empty"
            )
        counts.update(found.counts)
        return found.best()


def translate_back(args: argparse.Namespace, translators: Translators, rows: list[dict], counts: dict) -> None:
    """Add to each row what its output is translated back to: nothing where it is empty, or no molecule."""
    from lmolt.metrics.smiles import is_molecule
    from lmolt.metrics.workers import in_processes

    for direction in DIRECTIONS:
        mine = [row for row in rows if row["direction"] == direction]
        asked = [row for row in mine if row["prediction"].strip()]
        if direction == CAP2MOL:
            valid = in_processes(is_molecule, [row["prediction"] for row in asked])
            asked = [row for row, ok in zip(asked, valid, strict=True) if ok is True]
        for row in mine:
            row["returned"] = ""
        if asked:
            other, found = MOL2CAP if direction == CAP2MOL else CAP2MOL, Counter()
            outputs = translators(other, [row["prediction"] for row in asked], found, back=True)
            counts[direction].update({f"{cause}_returned": n for cause, n in found.items()})
            for row, output in zip(asked, outputs, strict=True):
                row["returned"] = output
