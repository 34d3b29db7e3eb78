"""Molecules against molecules: validity, exact matches, Levenshtein, fingerprint similarities, scaffolds.

RDKit's share, nearly all of the time, runs in a pool of processes over the distinct SMILES and is kept between runs
for the references (`cache_dir`). Nothing is computed twice for a SMILES, nor at all for a pair of equal strings.
"""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
from rdkit import Chem, DataStructs
from rdkit.Chem import MACCSkeys, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold
from rdkit.rdBase import BlockLogs

from lmolt.metrics.ngrams import flatten

_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2)
MAX_CHARACTERS = 20_000
_FEW = 60  # below so many SMILES a pool costs more than it saves


def parse(smiles: str) -> Chem.Mol | None:
    """A sanitised molecule, or None for what RDKit cannot read, for more than 20,000 characters (RDKit would not end),
    and for no atoms (RDKit calls the empty string valid)."""
    molecule = Chem.MolFromSmiles(smiles) if len(smiles) <= MAX_CHARACTERS else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


class Features(NamedTuple):
    """What is compared of one molecule: MACCS and RDK bits packed, Morgan's sparse counts in RDKit's binary form."""

    formula: str
    maccs: bytes | None
    rdk: bytes | None
    morgan: bytes


def _features(smiles: str, bits: bool = True) -> Features | None:
    """None where it is no molecule; without `bits`, nine tenths of the time, neither MACCS nor RDK."""
    molecule = parse(smiles)
    if molecule is None:
        return None
    packed = None, None
    if bits:
        packed = map(DataStructs.BitVectToBinaryText, (MACCSkeys.GenMACCSKeys(molecule), Chem.RDKFingerprint(molecule)))
    morgan = _MORGAN.GetSparseCountFingerprint(molecule).ToBinary()
    return Features(rdMolDescriptors.CalcMolFormula(molecule), *packed, morgan)


def _matches(pair: tuple[str, str]) -> tuple[bool, bool, bool]:
    """Whether two SMILES of one formula agree in InChI, in canonical SMILES, and in that without stereochemistry."""
    a, b = map(parse, pair)
    inchi = Chem.MolToInchi(a)
    flat = [Chem.MolToSmiles(m, isomericSmiles=False) for m in (a, b)]
    # A dummy atom has no InChI: the empty strings of two such molecules say nothing about them.
    return inchi != "" and inchi == Chem.MolToInchi(b), Chem.MolToSmiles(a) == Chem.MolToSmiles(b), flat[0] == flat[1]


def scaffold(smiles: str) -> str:
    """Bemis-Murcko scaffold as SMILES without stereochemistry; empty for a molecule without a ring."""
    molecule = parse(smiles)
    if molecule is None or molecule.GetRingInfo().NumRings() == 0:
        return ""
    return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(molecule), isomericSmiles=False)


def canonical(smiles: str) -> str:
    """RDKit's canonical SMILES, empty where it cannot be read."""
    molecule = parse(smiles)
    return Chem.MolToSmiles(molecule) if molecule else ""


def _quietly(function, items: list) -> list:
    with BlockLogs():
        return [function(item) for item in items]


def in_processes(function, items: list, num_workers: int | None = None) -> list:
    """`[function(item) for item in items]` over processes, RDKit's log silenced; long SMILES first, for balance."""
    workers = num_workers or len(os.sched_getaffinity(0))
    if workers == 1 or len(items) < _FEW:
        return _quietly(function, items)
    order = sorted(range(len(items)), key=lambda i: -len(items[i]))
    chunks = [order[start :: 8 * workers] for start in range(8 * workers)]
    futures = [_pool(workers).submit(_quietly, function, [items[i] for i in chunk]) for chunk in chunks]
    results = [None] * len(items)
    for chunk, future in zip(chunks, futures, strict=True):
        for i, result in zip(chunk, future.result(), strict=True):
            results[i] = result
    return results


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Forked once and kept: RDKit need not be imported again, and memory is not copied again for each metric."""
    return ProcessPoolExecutor(workers, mp_context=get_context("fork"))


def describe(
    references: list[str], predictions: list[str], cache_dir=None, num_workers: int | None = None
) -> dict[str, Features | None]:
    """Features of each distinct SMILES, each parsed once; None for what is no molecule.

    Pairs of one string need no MACCS and RDK, so those are None where nothing else asks for them. References' features
    are kept in `cache_dir`, by content: all of them with their bits, for other systems' outputs.
    """
    path, found = None, {}
    if cache_dir is not None:
        content = "\n".join([rdkit.__version__, *references])
        path = Path(cache_dir) / f"features-{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"
    own = list(dict.fromkeys(references))
    if path is not None and path.is_file():
        with np.load(path) as stored:  # allow_pickle is off
            parts = [np.split(stored[f"data{k}"], np.cumsum(stored[f"length{k}"])[:-1]) for k in range(4)]
        rows = ([part.tobytes() for part in row] for row in zip(*parts, strict=True))
        found = {s: Features(row[0].decode(), *row[1:]) for s, row in zip(own, rows, strict=True)}
    unequal = [pair for pair in zip(references, predictions, strict=True) if pair[0] != pair[1]]
    wanted = dict.fromkeys([*(own if path else ()), *(s for pair in unequal for s in pair)])
    whole = [s for s in wanted if s not in found]
    brief = [s for s in own if s not in wanted]
    new = path is not None and not found
    found |= zip(whole, in_processes(_features, whole, num_workers), strict=True)
    found |= zip(brief, in_processes(partial(_features, bits=False), brief, num_workers), strict=True)
    if new and all(found[s] for s in own):  # else the caller names the reference that is no molecule
        columns = [[found[s].formula.encode(), *found[s][1:]] for s in own]
        arrays = {f"data{k}": np.frombuffer(b"".join(c[k] for c in columns), np.uint8) for k in range(4)}
        save_whole(path, arrays | {f"length{k}": np.array([len(c[k]) for c in columns]) for k in range(4)})
    return found


def environments(sides: list[list[Features]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Morgan's sparse counts of each side's molecules as a corpus of atom environments, repeated (see ngrams.py)."""
    counts = [[DataStructs.ULongSparseIntVect(f.morgan).GetNonzeroElements() for f in side] for side in sides]
    return [flatten([[e for e, c in row.items() for _ in range(c)] for row in side]) for side in counts]


def exact_matches(references, predictions, features: dict, num_workers=None) -> dict[str, np.ndarray]:
    """Three kinds of exact match, `(n,)` of 0 and 1: by InChI (`exact_match`, as MolT5), `canonical_match` and
    `canonical_match_no_stereo`. Only pairs of one formula are compared further, since no others can agree."""
    keys = ("exact_match", "canonical_match", "canonical_match_no_stereo")
    result = np.zeros((len(references), 3))
    open_pairs = {}
    for i, pair in enumerate(zip(references, predictions, strict=True)):
        if pair[0] == pair[1]:
            result[i] = "*" not in pair[0], True, True
        elif features[pair[1]] and features[pair[0]].formula == features[pair[1]].formula:
            open_pairs.setdefault(pair, []).append(i)
    for pair, found in zip(open_pairs, in_processes(_matches, list(open_pairs), num_workers), strict=True):
        result[open_pairs[pair]] = found
    return {key: result[:, k] for k, key in enumerate(keys)}


def scaffold_match(references, predictions, valid: np.ndarray, num_workers=None) -> np.ndarray:
    """1 where the scaffolds agree, 0 where not or the prediction is invalid, NaN where the reference has no ring."""
    distinct = list(dict.fromkeys([*references, *predictions]))
    of = dict(zip(distinct, in_processes(scaffold, distinct, num_workers), strict=True))
    pairs = zip(references, predictions, valid, strict=True)
    return np.array([float(ok and of[r] == of[p]) if of[r] else np.nan for r, p, ok in pairs])


def similarities(references: list[str], predictions: list[str], features: dict, same: np.ndarray) -> dict:
    """Tanimoto similarity of n pairs, `(n,)` each, NaN where the prediction is invalid, 1 where it is the `same`.

    `same`: pairs of one canonical SMILES, whose fingerprints need not be computed to be equal.

    `maccs`: 166 MACCS keys; `rdk`: RDKit's path fingerprint (paths 1 to 7, 2048 bits); `morgan`: sparse counts, radius
    2. As MolT5's fingerprint_metrics.py, but equal molecules score 1 also where their fingerprint is empty (methane's),
    which RDKit's Tanimoto calls 0.
    """
    of = [[features[s] for s in side] for side in (references, predictions)]
    valid = np.array([f is not None for f in of[1]])
    table = np.where(valid, 1.0, np.nan)[:, None].repeat(3, 1)
    unequal = np.flatnonzero(valid & ~same)
    if len(unequal):
        table[unequal] = _compare_fingerprints(*([side[i] for i in unequal] for side in of))
    return {key: table[:, k] for k, key in enumerate(("maccs", "rdk", "morgan"))}


def _compare_fingerprints(*sides: list) -> np.ndarray:
    """Tanimoto of MACCS, RDK and Morgan, `(n, 3)`, of n >= 1 pairs of `Features`."""
    n = len(sides[0])
    scores = np.empty((n, 3))
    for k in range(2):
        bits = [np.frombuffer(b"".join(f[1 + k] for f in side), np.uint8).reshape(n, -1) for side in sides]
        shared = np.bitwise_count(bits[0] & bits[1]).sum(1).astype(float)
        scores[:, k] = _tanimoto(shared, *(np.bitwise_count(b).sum(1) for b in bits))
    counts = ([DataStructs.ULongSparseIntVect(f.morgan) for f in side] for side in sides)
    scores[:, 2] = [DataStructs.TanimotoSimilarity(a, b) for a, b in zip(*counts, strict=True)]
    return scores


def _tanimoto(shared, a, b) -> np.ndarray:
    return np.divide(shared, a + b - shared, out=np.zeros(len(shared)), where=a + b > 0)


def save_whole(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def levenshtein(references: list[str], predictions: list[str]) -> np.ndarray:
    """Edit distance in characters, `(n,)` float."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cpdist

    return cpdist(references, predictions, scorer=Levenshtein.distance, dtype=np.int64).astype(float)


def uniqueness(predictions: list[str], valid: np.ndarray) -> np.ndarray:
    """1 / (how often the same valid string was output), `(n,)`, NaN where invalid.

    Its mean is L+M-24's uniqueness, distinct valid strings / valid strings, written as a mean over examples so that it
    has an interval: resampling the rows themselves would repeat some and make any system look less unique.
    """
    counts = {}
    for smiles in np.array(predictions, object)[valid]:
        counts[smiles] = counts.get(smiles, 0) + 1
    return np.array([1 / counts[p] if ok else np.nan for p, ok in zip(predictions, valid, strict=True)])
