"""Molecules to captions and captions to molecules, with candidates, ranks and what RDKit says of them.

    from lmolt import Translator

    translator = Translator("runs/demo/models/cap2mol", "runs/demo/cpo")
    translator("The molecule is an aromatic amine.", num_candidates=8, valid_only=True)

The same in the shell: scripts/translate.py.
"""

import itertools
import math
from collections import Counter
from pathlib import Path

from lmolt.generation.candidates import (
    OVER,
    RANKS,
    Candidate,
    Translations,
    find_direction,
    merge,
    order,
    rows_of,
    sift,
    spell,
)
from lmolt.generation.ranking import score
from lmolt.generation.server import Server, is_server
from lmolt.generation.systems import SYSTEMS, System, finish, load, read_system
from lmolt.generation.translate import load_translator, over_limit, prompts_for, translate
from lmolt.prompts import CAP2MOL, DIRECTIONS, build_prompt

TEMPERATURE = 0.8  # of sampled candidates
CHANNEL_WEIGHT = 1.0  # lambda of the noisy channel


class Translator:
    """A model, with an adapter or not, or a system of recipes/systems.yaml, ready to translate.

    `model` is a folder or Hub id, or the URL of a server (docs/serving.md). It is loaded at the first translation; of
    a system with a model a direction, and of `reverse_model`, which gives p(input | output) in rank "channel" in the
    place of the model itself, one is in memory at a time.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        adapter: str | Path | None = None,
        *,
        system: str | System | None = None,
        systems: Path = SYSTEMS,
        reverse_model: str | None = None,
        dtype: str | None = None,
        load_in_4bit: bool = False,
        trust_remote_code: bool = False,
    ):
        if (model is None) == (system is None):
            raise ValueError("give a model or a system, one of them")
        if system is not None and adapter is not None:
            raise ValueError("a system has adapters of its own; give a model with an adapter")
        self.model, self.adapter, self.reverse_model = (x and str(x) for x in (model, adapter, reverse_model))
        self.system = read_system(system, systems) if isinstance(system, str) else system
        self.options = {"dtype": dtype, "load_in_4bit": load_in_4bit, "trust_remote_code": trust_remote_code}
        self._loaded = (None, None, None)

    def __call__(self, sources: str | list[str], direction: str | None = None, **options) -> Translations:
        return self.translate(sources, direction, **options)

    def load(self, direction: str, reverse: bool = False) -> tuple:
        """Model and tokenizer of a direction; `reverse`: those that score the inputs of the other one."""
        if reverse and self.reverse_model:
            wanted = (self.reverse_model, None)
        elif self.system:
            wanted = (self.system.models[direction], self.system.adapters[direction])
        else:
            wanted = (self.model, self.adapter)
        if wanted != self._loaded[0]:
            self._loaded = (None, None, None)  # there may not be room for two
            of_system = self.system and not (reverse and self.reverse_model)
            load_it = (lambda: load(self.system, direction, **self.options)) if of_system else None
            self._loaded = (wanted, *(load_it() if load_it else load_translator(*wanted, **self.options)))
        return self._loaded[1:]

    def prompts(self, config, direction: str, sources: list[str], reverse: bool = False) -> list[str]:
        if self.system and not (reverse and self.reverse_model):
            return [build_prompt(direction, source, self.system.prompt) for source in sources]
        return prompts_for(config, direction, sources)

    def translate(
        self,
        sources: str | list[str],
        direction: str | None = None,
        *,
        num_candidates: int = 1,
        num_beams: int = 1,
        temperature: float = TEMPERATURE,
        top_p: float = 1.0,
        seed: int = 0,
        valid_only: bool = False,
        rank: str = "logp",
        channel_weight: float = CHANNEL_WEIGHT,
        properties: bool = False,
        max_new_tokens: int = 250,
        tokens_per_batch: int = 16384,
        journal: Path | None = None,
        progress: str | bool = False,
    ) -> Translations:
        """Each source's candidates, ranked; on every process of an `accelerate launch`, which share the work.

        `num_candidates` is how many are made: the greedy output and samples at `temperature` and `top_p`, or with
        `num_beams` the best beams. Those that are one molecule (or one caption but for case and blanks) are merged.
        Valid ones come before others, which `valid_only` drops; among each, `rank` (ranking.RANKS) orders. `direction`
        is found where the sources show it. A source that can't be translated is not an error: its row says why, and
        `counts` counts it. `properties` adds RDKit's, and of captions the groups they claim.
        `journal` is a folder in which finished rows are kept; the caller deletes it.
        `ValueError` on settings that contradict each other and where no source can be translated.
        """
        _check(num_candidates, num_beams, temperature, rank)
        sources = [sources] if isinstance(sources, str) else list(sources)
        sources = [source.strip() if isinstance(source, str) else "" for source in sources]
        direction = direction or find_direction(sources)
        if direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {direction!r}; use one of {', '.join(DIRECTIONS)}")
        of_server = self.system.server if self.system else is_server(self.model)
        if rank == "channel" and (is_server(self.reverse_model) if self.reverse_model else of_server):
            raise ValueError("rank channel: a server can't score a given input; name a reverse model of this machine")
        say = lambda what: f"{direction}{what}" if progress else ""
        counts = Counter({"inputs": len(sources)})
        kept_at = None if journal is None else Path(journal) / direction

        # --- what can be translated
        facts, notes = sift(sources, direction, properties)
        model, tokenizer = self.load(direction) if len(notes) < len(set(sources)) else (None, None)
        prompts = {}
        if model is not None:
            asked = [source for source in dict.fromkeys(sources) if source not in notes]
            prompts = dict(zip(asked, self.prompts(model.config, direction, asked), strict=True))
            for i in over_limit(model.config, tokenizer, list(prompts.values()), max_new_tokens):
                notes[asked[i]] = OVER
                del prompts[asked[i]]
        if not prompts:
            why = "; ".join(f"{source[:80]!r}: {note}" for source, note in list(notes.items())[:3])
            raise ValueError(f"none of {len(sources)} inputs can be translated ({direction}): {why}")

        # --- outputs: source -> texts
        if isinstance(model, Server) and num_candidates > 1 and rank != "votes" and not model.gives_logps:
            raise ValueError(f"{model.url} tells no log-probabilities to rank by; say rank votes")
        how = {"max_new_tokens": max_new_tokens, "tokens_per_batch": tokens_per_batch}
        how |= {"journal": kept_at, "counts": counts, "unk": self.system.unk if self.system else ""}
        texts = list(prompts.values())
        if num_beams > 1 and num_candidates > 1:
            how |= {"num_beams": num_beams, "num_return": num_candidates}
            made = translate(model, tokenizer, texts, progress=say(", beams"), **how)
        else:
            made = translate(model, tokenizer, texts, num_beams=num_beams, progress=say(""), **how)
            made, n = [[output] for output in made], num_candidates - 1
            if n:
                how |= {"temperature": temperature, "top_p": top_p, "seed": seed, "progress": say(", samples")}
                in_prompts = counts["unk_in_prompts"]
                sampled = translate(model, tokenizer, [text for text in texts for _ in range(n)], **how)
                counts["unk_in_prompts"] = in_prompts  # the same prompts
                made = [greedy + sampled[i * n : (i + 1) * n] for i, greedy in enumerate(made)]
        if self.system:
            kept = [[finish(self.system, direction, output) for output in outputs] for outputs in made]
            both = zip(itertools.chain(*made), itertools.chain(*kept), strict=True)
            counts["outputs cut at a stop"] += sum(whole != part for whole, part in both)
            made = kept

        # --- the same ones merged, log-probabilities, order
        merged = merge(direction, dict(zip(prompts, made, strict=True)), facts, properties, valid_only, counts)
        pairs = [(source, text) for source, found in merged.items() for _, spellings in found for text in spellings]
        asked = [(prompts[source], text) for source, text in pairs]
        what = say(", log-probabilities")
        scores = dict(zip(pairs, score(model, tokenizer, asked, journal=kept_at, progress=what), strict=True))
        ranked = spell(merged, scores)
        if rank == "channel":
            self._score_backwards(direction, [c for found in ranked.values() for c in found], kept_at, say)
        ranked = {source: order(found, rank, channel_weight) for source, found in ranked.items()}
        return rows_of(sources, direction, ranked, notes, counts)

    def _score_backwards(self, direction: str, candidates: list[Candidate], journal, say) -> None:
        """log p(input | output) of each valid candidate; a molecule is shown as its canonical SMILES."""
        back = next(other for other in DIRECTIONS if other != direction)
        model, tokenizer = self.load(back, reverse=True)
        valid = [candidate for candidate in candidates if candidate.valid]
        shown = [c.smiles if direction == CAP2MOL else c.output for c in valid]
        prompts = self.prompts(model.config, back, shown, reverse=True)
        pairs = [(prompt, candidate.input) for prompt, candidate in zip(prompts, valid, strict=True)]
        for candidate, found in zip(
            valid, score(model, tokenizer, pairs, journal=journal, progress=say(", backwards")), strict=True
        ):
            candidate.reverse_logp = None if math.isnan(found.logp) else found.logp


def _check(num_candidates: int, num_beams: int, temperature: float, rank: str) -> None:
    if rank not in RANKS:
        raise ValueError(f"rank {rank!r}: use one of {', '.join(RANKS)}")
    if num_candidates < 1 or num_beams < 1:
        raise ValueError(f"num_candidates {num_candidates} and num_beams {num_beams}: at least 1 each")
    if 1 < num_beams < num_candidates:
        raise ValueError(f"num_candidates {num_candidates}: of {num_beams} beams, at most so many can be had")
    if num_candidates > 1 and num_beams == 1 and not temperature > 0:
        raise ValueError(
            f"temperature {temperature}: candidates are sampled, at one over 0, or are beams: give num_beams"
        )
