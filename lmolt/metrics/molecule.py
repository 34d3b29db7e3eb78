"""Molecules against molecules: validity, exact matches, Levenshtein, fingerprint similarities, scaffolds.

RDKit's share, nearly all of the time, runs in a pool of processes over the distinct SMILES and is kept between runs
for the references (`cache_dir`). Nothing is computed twice for a SMILES, nor at all for a pair of equal strings.
"""

import gc
import hashlib
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
from rdkit import Chem, DataStructs
from rdkit.Chem import MACCSkeys, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold
from rdkit.rdBase import BlockLogs

from lmolt.files import write_whole
from lmolt.metrics.caption import BLEU_COLUMNS, bleu_of_sums
from lmolt.metrics.metric import Metric
from lmolt.metrics.ngrams import flatten

_RDK = rdFingerprintGenerator.GetRDKitFPGenerator()  # Chem.RDKFingerprint's, made once
_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2)
MAX_CHARACTERS = 20_000
_FEW = 60  # below so many SMILES a pool costs more than it saves


def parse(smiles: str) -> Chem.Mol | None:
    """A sanitised molecule, or None for what RDKit cannot read, for more than 20,000 characters (RDKit would not end),
    and for no atoms (RDKit calls the empty string valid)."""
    molecule = Chem.MolFromSmiles(smiles) if len(smiles) <= MAX_CHARACTERS else None
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


class Features(NamedTuple):
    """What one molecule is compared by."""

    formula: str
    maccs: DataStructs.ExplicitBitVect
    rdk: DataStructs.ExplicitBitVect
    morgan: DataStructs.ULongSparseIntVect


class Pair(NamedTuple):
    """A reference beside a valid prediction: exact matches, Tanimoto similarities, Morgan counts of both, packed."""

    exact_match: bool
    canonical_match: bool
    canonical_match_no_stereo: bool
    maccs: float
    rdk: float
    morgan: float
    rdk_corrected: float
    counts: tuple[bytes, bytes]


def _features(molecule: Chem.Mol) -> Features:
    bits = MACCSkeys.GenMACCSKeys(molecule), _RDK.GetFingerprint(molecule)
    return Features(rdMolDescriptors.CalcMolFormula(molecule), *bits, _MORGAN.GetSparseCountFingerprint(molecule))


def _features_of(smiles: str) -> Features | None:
    molecule = parse(smiles)
    return molecule and _features(molecule)


def _compare(job: tuple[str, str, Features | None]) -> Pair | str:
    """One pair, its reference's features given or not; or which side is no molecule: "reference" or "prediction"."""
    reference, prediction, known = job
    theirs = None if known else parse(reference)
    if known is None and theirs is None:
        return "reference"
    if prediction == reference:
        theirs = theirs or parse(reference)
        counts = (known.morgan if known else _MORGAN.GetSparseCountFingerprint(theirs)).ToBinary()
        return Pair(not _has_dummy(theirs), True, True, *_of_equal(theirs), (counts, counts))
    ours = parse(prediction)
    if ours is None:
        return "prediction"
    formula = known.formula if known else rdMolDescriptors.CalcMolFormula(theirs)
    matches = False, False, False
    if formula == rdMolDescriptors.CalcMolFormula(ours):  # no others can agree
        matches = _matches(theirs or parse(reference), ours)
    if matches[1]:  # the same molecule: the two slow fingerprints need not be computed to be equal
        counts = _MORGAN.GetSparseCountFingerprint(ours).ToBinary()
        return Pair(*matches, *_of_equal(ours), (counts, counts))
    sides = known or _features(theirs), _features(ours)
    similarities = list(map(DataStructs.TanimotoSimilarity, *(side[1:] for side in sides)))
    return Pair(*matches, *similarities, similarities[1], tuple(side.morgan.ToBinary() for side in sides))


def _of_equal(molecule: Chem.Mol) -> tuple[float, float, float, float]:
    """`maccs`, `rdk`, `morgan` and `rdk_corrected` of a molecule with itself: 1, but 0 where a fingerprint is empty,
    which only a molecule of very few atoms has."""
    if molecule.GetNumBonds() > 3:
        return 1.0, 1.0, 1.0, 1.0
    maccs, rdk = MACCSkeys.GenMACCSKeys(molecule), _RDK.GetFingerprint(molecule)
    return float(maccs.GetNumOnBits() > 0), float(rdk.GetNumOnBits() > 0), 1.0, 1.0


def _has_dummy(molecule: Chem.Mol) -> bool:
    """Whether an atom stands for any other (`*`, `[#0]`, `[1*]`): such a molecule has no InChI."""
    return any(atom.GetAtomicNum() == 0 for atom in molecule.GetAtoms())


def _matches(a: Chem.Mol, b: Chem.Mol) -> tuple[bool, bool, bool]:
    """Whether two molecules agree in InChI, in canonical SMILES, and in that without stereochemistry."""
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
    """`[function(item) for item in items]` over processes, RDKit's log silenced; the longest first, for balance."""
    workers = num_workers or len(os.sched_getaffinity(0))
    if workers == 1 or len(items) < _FEW:
        return _quietly(function, items)
    length = lambda item: len(item) if isinstance(item, str) else sum(map(len, item[:2]))
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    size = -(-len(order) // (16 * workers))
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    futures = [_pool(workers).submit(_quietly, function, [items[i] for i in chunk]) for chunk in chunks]
    results = [None] * len(items)
    for chunk, future in zip(chunks, futures, strict=True):
        for i, result in zip(chunk, future.result(), strict=True):
            results[i] = result
    return results


@cache
def _pool(workers: int) -> ProcessPoolExecutor:
    """Forked once and kept: RDKit need not be imported again, and memory is not copied again for each metric."""
    return ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_start_worker)


def _start_worker() -> None:
    gc.freeze()  # collections pass over what a child has of its parent, else they would touch and so copy all of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent answers Ctrl-C; its children end without a word


def compare(
    references: list[str], predictions: list[str], cache_dir=None, num_workers: int | None = None
) -> list[Pair | None]:
    """n pairs, each distinct one compared once; None where the prediction is no molecule.

    Exact match: by InChI (as MolT5), by canonical SMILES, by that without stereochemistry. Tanimoto similarity, as
    MolT5's fingerprint_metrics.py: `maccs`, 166 MACCS keys; `rdk`, RDKit's path fingerprint (paths 1 to 7, 2048 bits);
    `morgan`, sparse counts, radius 2. RDKit calls the Tanimoto similarity of empty fingerprints 0, so a molecule
    without bonds (methane) has an `rdk` of 0 to itself; `rdk_corrected` is 1 for equal molecules.

    References' features are kept in `cache_dir`. `ValueError` on a reference that is no molecule.
    """
    known = {} if cache_dir is None else _cached_features(list(dict.fromkeys(references)), cache_dir, num_workers)
    pairs = list(zip(references, predictions, strict=True))
    jobs = {pair: (*pair, known.get(pair[0])) for pair in pairs}
    of = dict(zip(jobs, in_processes(_compare, list(jobs.values()), num_workers), strict=True))
    for row, pair in enumerate(pairs, 1):
        if of[pair] == "reference":
            raise ValueError(
                f"row {row}: the reference {pair[0][:100]!r} is not a molecule RDKit can read; references are your "
                "data: correct it, remove the row, or leave such rows out with --invalid_pairs drop"
            )
    return [None if of[pair] == "prediction" else of[pair] for pair in pairs]


def columns(pairs: list[Pair | None]) -> dict[str, np.ndarray]:
    """Validity, exact matches (invalid: 0) and similarities (invalid: NaN) of what `compare` returned, `(n,)` each."""
    invalid = Pair(False, False, False, np.nan, np.nan, np.nan, np.nan, ())
    found = {key: np.array([getattr(pair or invalid, key) for pair in pairs], float) for key in Pair._fields[:-1]}
    found |= {f"{key}_invalid0": np.nan_to_num(found[key]) for key in _KINDS}
    return {"validity": np.array([float(pair is not None) for pair in pairs])} | found


def environments(pairs: list[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both sides' Morgan fingerprints as corpora of atom environments, each as often as it occurs (see ngrams.py)."""
    sides = zip(*(pair.counts for pair in pairs), strict=True)
    rows = [[DataStructs.ULongSparseIntVect(c).GetNonzeroElements().items() for c in side] for side in sides]
    return [flatten([[e for e, count in row for _ in range(count)] for row in side]) for side in rows]


def _cached_features(references: list[str], cache_dir, num_workers) -> dict[str, Features]:
    """Features of distinct SMILES that are molecules, kept in `cache_dir` by content."""
    content = hashlib.sha256("\n".join([rdkit.__version__, *references]).encode()).hexdigest()[:32]
    path = Path(cache_dir) / f"features-{content}.npz"
    if path.is_file():
        with np.load(path) as stored:  # allow_pickle is off
            parts = [np.split(stored[f"data{k}"], np.cumsum(stored[f"length{k}"])[:-1]) for k in range(4)]
        kinds = bytes.decode, DataStructs.ExplicitBitVect, DataStructs.ExplicitBitVect, DataStructs.ULongSparseIntVect
        rows = zip(*([kind(p.tobytes()) for p in part] for kind, part in zip(kinds, parts, strict=True)), strict=True)
        return {s: Features(*row) for s, row in zip(references, rows, strict=True)}
    found = dict(zip(references, in_processes(_features_of, references, num_workers), strict=True))
    if all(found.values()):  # else `compare` names the one that is no molecule
        rows = [[f.formula.encode(), *(vector.ToBinary() for vector in f[1:])] for f in found.values()]
        arrays = {f"data{k}": np.frombuffer(b"".join(row[k] for row in rows), np.uint8) for k in range(4)}
        save_whole(path, arrays | {f"length{k}": np.array([len(row[k]) for row in rows]) for k in range(4)})
    return found


def scaffold_match(references, predictions, valid: np.ndarray, num_workers=None) -> np.ndarray:
    """1 where the scaffolds agree, 0 where not or the prediction is invalid, NaN where the reference has no ring."""
    distinct = list(dict.fromkeys([*references, *predictions]))
    of = dict(zip(distinct, in_processes(scaffold, distinct, num_workers), strict=True))
    pairs = zip(references, predictions, valid, strict=True)
    return np.array([float(ok and of[r] == of[p]) if of[r] else np.nan for r, p, ok in pairs])


def save_whole(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An .npz that appears complete or not at all."""
    write_whole(path, lambda file: np.savez(file, **arrays))


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


_AS_IS = "characters as they are in the file"
_ONCE = "ChEBI-20's doubled backslashes made single on both sides"
_TANIMOTO = "mean Tanimoto, RDKit {rdkit}"
_KINDS = {"maccs": "MACCS keys", "rdk": "RDKit path fingerprint", "morgan": "Morgan radius 2, sparse counts"}
_LABELS = {"maccs": "MACCS", "rdk": "RDK", "morgan": "Morgan"}
_NONE_VALID = "no prediction is valid"
_INVALID = f"empty or over {MAX_CHARACTERS} characters is invalid"
METRICS = (
    Metric(
        key="bleu",
        label="BLEU",
        better=1,
        convention=f"NLTK corpus BLEU, weights 1/4 each, no smoothing; {_AS_IS}",
        paper=True,
        columns=tuple(f"stat_bleu_{column}" for column in BLEU_COLUMNS),
        value=bleu_of_sums,
    ),
    Metric(
        key="exact_match",
        label="Exact",
        better=1,
        convention="equal InChI, RDKit {rdkit}; molecules with an atom `*` have none and never match",
        paper=True,
    ),
    Metric(
        key="levenshtein",
        label="Levenshtein",
        better=-1,
        decimals=2,
        convention=f"mean edit distance; {_AS_IS}",
        paper=True,
    ),
    Metric(
        key="validity",
        label="Validity",
        better=1,
        convention=f"RDKit {{rdkit}} parses it; {_INVALID}",
        paper=True,
    ),
    *(
        Metric(
            key=key,
            label=_LABELS[key],
            better=1,
            convention=f"{kind}, {_TANIMOTO}; over valid predictions (MolT5)",
            undefined=_NONE_VALID,
            paper=True,
        )
        for key, kind in _KINDS.items()
    ),
    Metric(
        key="uniqueness",
        label="Uniqueness",
        better=1,
        convention="distinct valid strings / valid strings, RDKit {rdkit}; interval with each string's count held",
        undefined=_NONE_VALID,
        paper=True,
    ),
    Metric(
        key="rdk_corrected",
        label="RDK, equal molecules 1",
        better=1,
        convention=f"{_KINDS['rdk']}, {_TANIMOTO}; over valid predictions, equal molecules 1 though without bonds",
        undefined=_NONE_VALID,
    ),
    *(
        Metric(
            key=f"{key}_invalid0",
            label=f"{_LABELS[key]}, invalid 0",
            better=1,
            convention=f"{kind}, {_TANIMOTO}; an invalid prediction 0 (L+M-24)",
        )
        for key, kind in _KINDS.items()
    ),
    Metric(
        key="canonical_match",
        label="Equal canonical SMILES",
        better=1,
        convention="equal canonical SMILES, RDKit {rdkit}",
    ),
    Metric(
        key="canonical_match_no_stereo",
        label="Equal but for stereochemistry",
        better=1,
        convention="equal canonical SMILES without stereochemistry, RDKit {rdkit}",
    ),
    Metric(
        key="scaffold_match",
        label="Equal scaffold",
        better=1,
        convention="equal Bemis-Murcko scaffold without stereochemistry, RDKit {rdkit}, over references with a ring; "
        "invalid 0",
        undefined="no reference has a ring",
    ),
    Metric(
        key="bleu_undoubled",
        label="BLEU, backslashes made single",
        better=1,
        convention=f"as bleu; {_ONCE}",
        columns=tuple(f"stat_bleu_undoubled_{column}" for column in BLEU_COLUMNS),
        value=bleu_of_sums,
    ),
    Metric(
        key="levenshtein_undoubled",
        label="Levenshtein, backslashes made single",
        better=-1,
        decimals=2,
        convention=f"mean edit distance; {_ONCE}",
    ),
)
