"""Candidates of an input: what RDKit says of them, which are the same, their order, and what is counted."""

import itertools
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace

from lmolt.metrics.hallucination import GROUPS, groups_claimed, groups_present
from lmolt.metrics.smiles import ODDITIES, oddity, parse
from lmolt.metrics.workers import Unfinished, in_processes
from lmolt.prompts import CAP2MOL, MOL2CAP

RANKS = ("logp", "mean_logp", "channel", "votes")  # ranking.py says what they are
LONGEST = 20_000  # characters of an input
EMPTY, TOO_LONG = "empty", f"over {LONGEST:,} characters"
WORDS = "several words, where a SMILES is wanted"
NO_MOLECULE, NO_CAPTION = "RDKit can't read this molecule", "a molecule, where a caption is wanted"
OVER = "over the model's positions"
NONE_VALID = "no valid candidate"


@dataclass
class Candidate:
    """One output for one input; an input without any has one row that says why in `note`, with no rank."""

    row: int  # of the input, from 1
    input: str
    direction: str
    rank: int | None = None
    output: str = ""
    logp: float | None = None  # log p(output | input), natural logarithm; None where a server tells none
    tokens: int | None = None  # of the output, its end counted
    reverse_logp: float | None = None  # log p(input | output), with rank "channel"
    count: int = 0  # how often it was made, whatever its spelling
    valid: bool = False  # cap2mol: RDKit reads it; mol2cap: not empty
    smiles: str | None = None  # of the molecule, input or output: canonical
    inchikey: str | None = None
    note: str = ""
    properties: dict = field(default_factory=dict)


class Translations(list):
    """The `Candidate`s of all inputs, in their order, best first; `counts` has what became of inputs and candidates."""

    def __init__(self, candidates, counts: Counter):
        super().__init__(candidates)
        self.counts = counts

    def rows(self) -> list[dict]:
        """For a table: a dictionary a candidate, its properties beside the rest."""
        rows = [asdict(candidate) for candidate in self]
        return [row | row.pop("properties") for row in rows]

    def best(self) -> list[str]:
        """The first candidate's output for each input, empty where there is none."""
        return [candidate.output for candidate in self if candidate.rank in (None, 1)]

    def _repr_html_(self) -> str:
        from lmolt.generation.drawing import table

        return table(self)


def find_direction(sources: list[str]) -> str:
    """mol2cap or cap2mol, where the sources plainly are molecules or captions; `ValueError` asks for it elsewhere.

    A molecule is one word that RDKit reads, a caption three words or more that it doesn't read as a whole.
    """
    asked = [source.strip() for source in sources if isinstance(source, str) and source.strip()][:1000]
    words = [len(source.split()) for source in asked]
    one = [source for source, n in zip(asked, words, strict=True) if n == 1]
    molecules = sum(facts is not None for facts in _read(one, False).values())
    captions = sum(n > 2 for n in words)
    if molecules and not captions and 2 * molecules >= len(asked):
        return MOL2CAP
    if captions and not molecules and 2 * captions >= len(asked):
        return CAP2MOL
    first = f" (the first is {asked[0][:80]!r})" if asked else ""
    raise ValueError(
        f"of {len(asked)} inputs, {molecules} read as molecules and {captions} as captions{first}; say --direction "
        "mol2cap or cap2mol"
    )


def _read(texts: list[str], properties: bool) -> dict[str, dict | None]:
    """Canonical SMILES, InChIKey and, where asked for, properties of each text that is a molecule, and nothing else."""
    found = in_processes(_facts_and_properties if properties else _facts, texts)
    return {text: None if isinstance(of, Unfinished) else of for text, of in zip(texts, found, strict=True)}


def _facts(text: str) -> dict | None:
    from rdkit import Chem

    molecule = None if oddity(text) else parse(text)
    return molecule and {"smiles": Chem.MolToSmiles(molecule), "inchikey": Chem.MolToInchiKey(molecule) or None}


def _facts_and_properties(text: str) -> dict | None:
    facts = _facts(text)
    return facts and facts | {"properties": _properties(parse(text))}


def _properties(molecule) -> dict:
    from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors

    return {
        "formula": rdMolDescriptors.CalcMolFormula(molecule),
        "weight": round(Descriptors.MolWt(molecule), 3),
        "clogp": round(Crippen.MolLogP(molecule), 3),
        "tpsa": round(rdMolDescriptors.CalcTPSA(molecule), 2),
        "h_donors": rdMolDescriptors.CalcNumHBD(molecule),
        "h_acceptors": rdMolDescriptors.CalcNumHBA(molecule),
        "rotatable_bonds": rdMolDescriptors.CalcNumRotatableBonds(molecule),
        "rings": rdMolDescriptors.CalcNumRings(molecule),
        "qed": round(QED.qed(molecule), 3),
    }


def claims(caption: str, smiles: str) -> dict[str, bool]:
    """The functional groups a caption claims, and whether the molecule has each (lmolt/metrics/hallucination.py)."""
    present = groups_present(smiles) or [False] * len(GROUPS)
    return {name: has for name, said, has in zip(GROUPS, groups_claimed(caption), present, strict=True) if said}


def sift(sources: list[str], direction: str, properties: bool) -> tuple[dict[str, dict | None], dict[str, str]]:
    """What RDKit says of each distinct source, and why those that can't be translated in `direction` can't be."""
    distinct = dict.fromkeys(sources)
    facts = _read([source for source in distinct if source and len(source) <= LONGEST], properties)
    notes = {source: TOO_LONG if source else EMPTY for source in distinct if source not in facts}
    for source, found in facts.items():
        if found is None and direction == MOL2CAP:
            odd = oddity(source)
            notes[source] = WORDS if odd == "text_after" else ODDITIES[odd][0] if odd else NO_MOLECULE
        elif found is not None and direction == CAP2MOL:
            notes[source] = NO_CAPTION
    return facts, {source: notes[source] for source in distinct if source in notes}


def merge(
    direction: str, made: dict[str, list[str]], facts: dict, properties: bool, valid_only: bool, counts: Counter
) -> dict[str, list[tuple[Candidate, list[str]]]]:
    """Each source's candidates that differ, with their spellings, in the order in which they were made.

    Molecules are the same where their canonical SMILES are, captions where they are but for case and blanks.
    """
    texts = [text for text in dict.fromkeys(itertools.chain(*made.values())) if direction == CAP2MOL and text]
    found = _read(texts, properties)
    merged = {}
    for source, outputs in made.items():
        groups: dict[str, tuple[Candidate, list[str]]] = {}
        for text in outputs:
            counts["candidates"] += 1
            of = found.get(text) if direction == CAP2MOL else facts[source]
            valid = bool(text) and of is not None
            counts["candidates that are no molecule" if direction == CAP2MOL else "empty candidates"] += not valid
            if valid_only and not valid:
                counts["dropped by valid_only"] += 1
                continue
            key = of["smiles"] if valid and direction == CAP2MOL else " ".join(text.split()).casefold()
            if direction == CAP2MOL and not valid:
                key = f"no molecule: {text}"
            if key in groups:
                counts["duplicates merged"] += 1
            else:
                of = of or {}
                about = {"smiles": of.get("smiles"), "inchikey": of.get("inchikey")}
                candidate = Candidate(0, source, direction, output=text, valid=valid, **about)
                candidate.properties = dict(of.get("properties", {}))
                if properties and direction == MOL2CAP:
                    claimed = claims(text, of["smiles"])
                    candidate.properties["groups_right"] = "; ".join(name for name, has in claimed.items() if has)
                    candidate.properties["groups_wrong"] = "; ".join(name for name, has in claimed.items() if not has)
                groups[key] = (candidate, [])
            candidate, spellings = groups[key]
            candidate.count += 1
            if text not in spellings:
                spellings.append(text)
        merged[source] = list(groups.values())
    return merged


def spell(merged: dict[str, list[tuple[Candidate, list[str]]]], scores: dict) -> dict[str, list[Candidate]]:
    """Each candidate as its most probable spelling; `scores`: (source, spelling) -> log-probability and tokens."""
    for source, found in merged.items():
        for candidate, spellings in found:
            candidate.output = max(spellings, key=lambda text, source=source: scores[source, text][0])
            logp, tokens = scores[source, candidate.output]
            if not math.isnan(logp):  # else over the model's positions, or a server's that tells none
                candidate.logp, candidate.tokens = logp, tokens
    return {source: [candidate for candidate, _ in found] for source, found in merged.items()}


def order(candidates: list[Candidate], rank: str, channel_weight: float) -> list[Candidate]:
    """Best first, numbered from 1: valid ones before others, each by `rank`; what has no score comes last."""

    def value(c: Candidate) -> tuple:
        logp = -math.inf if c.logp is None else c.logp
        match rank:
            case "mean_logp":
                scores = (logp / (c.tokens or 1),)
            case "channel":
                scores = (-math.inf if c.reverse_logp is None else logp + channel_weight * c.reverse_logp, logp)
            case "votes":
                scores = (c.count, logp)
            case _:
                scores = (logp,)
        return (c.valid, *scores)

    ordered = sorted(candidates, key=value, reverse=True)  # stable: equals stay as they were made, greedy first
    for place, candidate in enumerate(ordered, 1):
        candidate.rank = place
    return ordered


def rows_of(
    sources: list[str], direction: str, ranked: dict[str, list[Candidate]], notes: dict, counts: Counter
) -> Translations:
    """A row a candidate and, for a source without any, one that says why."""
    rows = []
    for number, source in enumerate(sources, 1):
        note = notes.get(source) or ("" if ranked.get(source) else NONE_VALID)
        if note:
            counts[note] += 1
            rows.append(Candidate(number, source, direction, note=note))
        else:
            counts["translated"] += 1
            rows += [replace(candidate, row=number) for candidate in ranked[source]]
    return Translations(rows, +counts)
