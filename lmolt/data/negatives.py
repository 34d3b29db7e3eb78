"""Which of a translator's outputs becomes the dis-preferred one of a triple, and how far those are from the preferred.

A pair has one output or several candidates. Those that are right are no negatives: captions that are the same words,
molecules of the same canonical SMILES or InChI. Of the wrong ones the hardest is taken, or several, by a `CHOICES`:

    closest        to the preferred output, captions by Chr-F, molecules by Morgan Tanimoto (radius 2, counts); one that
                   is no molecule last
    invalid        what is no molecule first, then the closest
    hallucinated   most functional groups that the pair's molecule lacks, then the closest
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator, rdMolDescriptors

from lmolt.metrics.hallucination import chrf, groups_claimed, groups_present
from lmolt.metrics.smiles import ODDITIES, oddity, parse
from lmolt.metrics.workers import Unfinished, in_processes
from lmolt.prompts import CAP2MOL, COLUMNS, MOL2CAP

SIMILARITIES = {MOL2CAP: "Chr-F", CAP2MOL: "Morgan Tanimoto"}
CHOICES = ("closest", "invalid", "hallucinated")
_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2)


class OutputLabel(NamedTuple):
    valid: bool  # a molecule and nothing else; captions all are
    right: bool  # says what the preferred output says
    similarity: float  # to the preferred output, 0 to 1; NaN where not valid
    odd: str = ""  # what it is instead of a SMILES (smiles.ODDITIES), or that RDKit did not finish it


def label_outputs(direction: str, comparisons: Iterable[tuple[str, str]]) -> dict[tuple[str, str], OutputLabel]:
    """The label of each distinct (preferred output, output)."""
    distinct = list(dict.fromkeys(comparisons))
    if direction == CAP2MOL:
        found = in_processes(_label_molecule, distinct)
        unfinished = OutputLabel(False, False, float("nan"), "what RDKit does not finish")
        return {p: unfinished if isinstance(f, Unfinished) else f for p, f in zip(distinct, found, strict=True)}
    scores = chrf([a for a, _ in distinct], [b for _, b in distinct])
    same = [a.casefold().split() == b.casefold().split() for a, b in distinct]
    return {pair: OutputLabel(True, *found) for pair, *found in zip(distinct, same, scores.tolist(), strict=True)}


def _label_molecule(comparison: tuple[str, str]) -> OutputLabel:
    if cause := oddity(comparison[1]):  # text after a molecule makes it none
        return OutputLabel(False, False, float("nan"), ODDITIES[cause][0])
    preferred, output = map(parse, comparison)
    if output is None:
        return OutputLabel(False, False, float("nan"))
    right = Chem.MolToSmiles(preferred) == Chem.MolToSmiles(output)
    if not right and len({rdMolDescriptors.CalcMolFormula(m) for m in (preferred, output)}) == 1:
        inchi = Chem.MolToInchi(preferred)
        right = inchi != "" and inchi == Chem.MolToInchi(output)  # an atom `*` has none
    counts = [_MORGAN.GetSparseCountFingerprint(m) for m in (preferred, output)]
    return OutputLabel(True, right, DataStructs.TanimotoSimilarity(*counts))


def invented_groups(direction: str, pairs: list[dict], outputs: list[list[str]]) -> list[list[int]]:
    """How many functional groups each output claims (a caption) or has (a molecule) that the pair's molecule lacks."""
    molecules = [pair["molecule"] for pair in pairs]
    texts = [output for its in outputs for output in its] if direction == CAP2MOL else []
    distinct = list(dict.fromkeys([*molecules, *texts]))
    found = zip(distinct, in_processes(groups_present, distinct), strict=True)
    present = {text: its if isinstance(its, list) else None for text, its in found}
    said = present.__getitem__ if direction == CAP2MOL else groups_claimed
    invented = lambda output, own: sum(a and not b for a, b in zip(said(output) or [], own or [], strict=False))
    return [[invented(o, present[m]) for o in its] for m, its in zip(molecules, outputs, strict=True)]


def triples_of(
    direction: str,
    pairs: list[dict],
    candidates: list[list[str]],
    drop_invalid: bool,
    counts: Counter,
    *,
    choice: str = "closest",
    most: int = 1,
) -> tuple[list[dict], list[float]]:
    """Triples of one direction, and the similarity of each one's dis-preferred output to the preferred (NaN: invalid).

    `candidates`: each pair's outputs, none where there is none. `drop_invalid` takes no SMILES that doesn't parse.
    `choice` (of `CHOICES`) says which are taken, `most` how many of a pair: each makes a triple of its own, and the
    preference tree holds their source and preferred output once. What makes no triple is counted by cause, outputs as
    well as pairs.
    """
    source, target = COLUMNS[direction]
    stripped = [[output.strip() for output in outputs] for outputs in candidates]
    compared = ((pair[target], output) for pair, outputs in zip(pairs, stripped, strict=True) for output in outputs)
    labels = label_outputs(direction, (comparison for comparison in compared if comparison[1]))
    invented = invented_groups(direction, pairs, stripped) if choice == "hallucinated" else None
    found, triples, similarities = Counter(), [], []
    for number, (pair, outputs) in enumerate(zip(pairs, stripped, strict=True)):
        found["no output"] += not outputs
        wrong = {}
        for output in outputs:
            if not output:
                found["empty output"] += 1
            elif output in wrong:
                found["repeated output"] += 1
            elif (label := labels[pair[target], output]).right:
                found["output equal to the preferred one"] += 1
            elif drop_invalid and not label.valid:
                found[f"output that is {label.odd}"] += bool(label.odd)
                found["invalid SMILES dropped"] += 1
            else:
                found[f"output that is {label.odd}"] += bool(label.odd)
                wrong[output] = label
        if not wrong:
            found["pairs without a wrong output"] += 1
            continue
        first = dict.fromkeys(wrong, 0)  # what counts before validity and similarity
        if choice == "invalid":
            first = {output: not label.valid for output, label in wrong.items()}
        elif choice == "hallucinated":
            first = dict(zip(outputs, invented[number], strict=True))
        hardness = {output: (first[output], label.valid, label.similarity) for output, label in wrong.items()}
        for output in sorted(wrong, key=hardness.get, reverse=True)[:most]:  # the first of equals
            found["invalid SMILES kept"] += not wrong[output].valid
            similarities.append(wrong[output].similarity)
            row = {"id": pair["id"], "direction": direction, "source": pair[source]}
            triples.append(row | {"chosen": pair[target], "rejected": output})
    found["triples"] = len(triples)
    counts.update({f"{direction}: {cause}": n for cause, n in found.items() if n or cause == "triples"})
    return triples, similarities


def describe(direction: str, triples: list[dict], similarities: list[float]) -> dict:
    """Lengths in characters, the share of valid dis-preferred outputs, and how similar the valid ones are."""
    lengths = {key: _spread([len(triple[key]) for triple in triples]) for key in ("source", "chosen", "rejected")}
    similar = [similarity for similarity in similarities if similarity == similarity]
    summary = {"triples": len(triples), "characters": lengths}
    if direction == CAP2MOL and triples:
        summary["validity of rejected"] = len(similar) / len(triples)
    return summary | {"similarity of rejected": {"measure": SIMILARITIES[direction], **_spread(similar)}}


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"mean": float(np.mean(values)), "quartiles": [low, median, high], "max": float(max(values))}


def table(described: dict[str, dict]) -> str:
    """Lines for the screen, of what `describe` says of each direction."""
    lines = [f"{'median, quartiles':19}{'triples':>9}{'preferred':>22}{'dis-preferred':>22}{'valid':>8}   similarity"]
    spread = lambda v, form: "{1:{0}} [{2:{0}}, {3:{0}}]".format(form, *(v["quartiles"][i] for i in (1, 0, 2)))
    for direction, summary in described.items():
        characters, similar = summary["characters"], summary["similarity of rejected"]
        sizes = [spread(v, ".0f") + " chars" if v else "" for v in (characters["chosen"], characters["rejected"])]
        valid = f"{summary['validity of rejected']:.1%}" if "validity of rejected" in summary else ""
        close = f"{spread(similar, '.2f')} {similar['measure']}" if "quartiles" in similar else ""
        lines.append(f"{direction:19}{summary['triples']:9,}{sizes[0]:>22}{sizes[1]:>22}{valid:>8}   {close}")
    return "\n".join(lines)
