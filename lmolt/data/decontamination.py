"""Molecules that a corpus has twice, or shares with the pairs that a model will be tested on.

Molecules are the same where their standard InChIKeys are. Keys with the same first block (14 letters: formula and
connections) are of stereoisomers, or differ in isotopes or protonation; they are reported apart.
"""

from collections import Counter

from rdkit import Chem

from lmolt.metrics.smiles import parse
from lmolt.metrics.workers import Unfinished, in_processes


def _keys(smiles: str) -> tuple[str, str]:
    """InChIKey and its first block; SMILES with and without stereochemistry where there is no InChI (an atom `*` has
    none); twice "" where the SMILES is invalid."""
    molecule = parse(smiles)
    if molecule is None:
        return "", ""
    if key := Chem.MolToInchiKey(molecule):
        return key, key[:14]
    return Chem.MolToSmiles(molecule), Chem.MolToSmiles(molecule, isomericSmiles=False)


def decontaminate(
    pairs: list[dict],
    excluded: list[dict] = (),
    *,
    drop_duplicates: bool = False,
    drop_stereoisomers: bool = False,
    num_workers: int | None = None,
) -> tuple[list[dict], Counter]:
    """The pairs without the molecules of `excluded`, and what was found, by cause, whether dropped or kept.

    A molecule that occurs before among the pairs is a duplicate, and dropped with `drop_duplicates`; one with only the
    first block of an excluded molecule's InChIKey is dropped with `drop_stereoisomers`. Molecules must parse
    (pairs.clean); excluded ones that don't are counted.
    """
    distinct = list(dict.fromkeys(pair["molecule"] for pair in (*pairs, *excluded)))
    keys = dict(zip(distinct, in_processes(_keys, distinct, num_workers), strict=True))
    unfinished = {smiles: (smiles, smiles) for smiles in distinct if isinstance(keys[smiles], Unfinished)}
    keys |= unfinished  # compared as strings
    known = Counter(keys[pair["molecule"]] for pair in excluded)
    counts = Counter({"excluded pairs that don't parse": known.pop(("", ""), 0)})
    counts["molecules compared as text, RDKit not finishing their InChI"] = len(unfinished)
    known, skeletons = map(set, zip(*known, strict=True)) if known else (set(), set())
    seen, kept = set(), []
    fate = lambda dropped: "dropped" if dropped else "kept"
    for pair in pairs:
        key, skeleton = keys[pair["molecule"]]
        if key in known:
            counts["molecule of an excluded pair dropped"] += 1
            continue
        if skeleton in skeletons:
            counts[f"stereoisomer of an excluded pair's molecule {fate(drop_stereoisomers)}"] += 1
            if drop_stereoisomers:
                continue
        if key in seen:
            counts[f"duplicate molecule {fate(drop_duplicates)}"] += 1
            if drop_duplicates:
                continue
        seen.add(key)
        kept.append(pair)
    return kept, +counts
