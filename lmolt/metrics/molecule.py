"""Molecules against molecules: validity, exact matches, Levenshtein, fingerprint similarities, scaffolds.

RDKit's share, nearly all of the time, runs in processes under limits (workers.py) over the distinct pairs and is kept
between runs for the references (`cache_dir`). Nothing is computed twice for a SMILES, nor at all for a pair of equal
strings.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rdkit
from rdkit import Chem, DataStructs
from rdkit.Chem import MACCSkeys, rdFingerprintGenerator, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold

from lmolt.metrics.cache import load_arrays, save_arrays
from lmolt.metrics.caption import BLEU_COLUMNS, bleu_of_sums
from lmolt.metrics.metric import Metric
from lmolt.metrics.ngrams import flatten
from lmolt.metrics.smiles import MAX_CHARACTERS, ODDITIES, canonical, dummy_of, oddity, parse
from lmolt.metrics.workers import SECONDS, Unfinished, in_processes

_RDK = rdFingerprintGenerator.GetRDKitFPGenerator()  # Chem.RDKFingerprint's, made once
_MORGAN = rdFingerprintGenerator.GetMorganGenerator(radius=2)
_KINDS = {"maccs": "MACCS keys", "rdk": "RDKit path fingerprint", "morgan": "Morgan radius 2, sparse counts"}


class Features(NamedTuple):
    """What one molecule is compared by."""

    formula: str  # with a * for each dummy atom
    ring: str  # atomic numbers of the atoms in rings, sorted; empty without a ring
    scaffold: str  # Bemis-Murcko's as SMILES without stereochemistry; empty without a ring
    maccs: DataStructs.ExplicitBitVect
    rdk: DataStructs.ExplicitBitVect
    morgan: DataStructs.ULongSparseIntVect


class Pair(NamedTuple):
    """A reference beside a valid prediction: exact matches, Tanimoto similarities, Morgan counts of both, packed."""

    exact_match: bool
    canonical_match: bool
    canonical_match_no_stereo: bool
    scaffold_match: float  # NaN where the reference has no ring
    maccs: float
    rdk: float
    morgan: float
    rdk_corrected: float
    dummy: bool  # in the prediction
    counts: tuple[bytes, bytes]


class NoPair(NamedTuple):
    """A reference beside what is no molecule."""

    scaffold_match: float  # 0, NaN where the reference has no ring
    unfinished: str = ""  # why RDKit did not finish the prediction


def _features(molecule: Chem.Mol) -> Features:
    ring = _ring(molecule)
    formula = rdMolDescriptors.CalcMolFormula(molecule)
    return Features(formula, ring, _scaffold(molecule) if ring else "", *_fingerprints(molecule))


def features(smiles: str) -> Features | None:
    molecule = parse(smiles)
    return molecule and _features(molecule)


def _fingerprints(molecule: Chem.Mol) -> tuple:
    """MACCS keys, RDKit's paths and Morgan's counts, as `_KINDS` has them."""
    maccs, rdk = MACCSkeys.GenMACCSKeys(molecule), _RDK.GetFingerprint(molecule)
    return maccs, rdk, _MORGAN.GetSparseCountFingerprint(molecule)


def _ring(molecule: Chem.Mol) -> str:
    """What a molecule and its scaffold have in common, and is had for a twentieth of the scaffold's time."""
    if molecule.GetRingInfo().NumRings() == 0:
        return ""
    return " ".join(map(str, sorted(atom.GetAtomicNum() for atom in molecule.GetAtoms() if atom.IsInRing())))


def _scaffold(molecule: Chem.Mol) -> str:
    return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(molecule), isomericSmiles=False)


def _compare(job: tuple[str, str, Features | None]) -> Pair | NoPair | None:
    """One pair, its reference's features given or not; None where the reference is no molecule."""
    reference, prediction, known = job
    theirs = None if known else parse(reference)
    if known is None and theirs is None:
        return None
    if prediction == reference:
        return _same(known, theirs)
    ours, ring = parse(prediction), known.ring if known else _ring(theirs)
    if ours is None:
        return NoPair(0.0 if ring else np.nan)
    formulas = (
        (known.formula if known else rdMolDescriptors.CalcMolFormula(theirs)),
        rdMolDescriptors.CalcMolFormula(ours),
    )
    matches = False, False, False
    if formulas[0] == formulas[1]:  # no others can agree
        matches = _matches(theirs or parse(reference), ours)
    if matches[1]:  # the same molecule: the two slow fingerprints need not be computed to be equal
        return _same(known, ours, matches)
    sides = (known.maccs, known.rdk, known.morgan) if known else _fingerprints(theirs), _fingerprints(ours)
    similarities = [DataStructs.TanimotoSimilarity(*both) for both in zip(*sides, strict=True)]
    alike = np.nan if not ring else 0.0
    if ring and ring == _ring(ours):  # no others can have equal scaffolds
        alike = float((known.scaffold if known else _scaffold(theirs)) == _scaffold(ours))
    counts = tuple(side[2].ToBinary() for side in sides)
    return Pair(*matches, alike, *similarities, similarities[1], "*" in formulas[1], counts)


def _same(known: Features | None, molecule: Chem.Mol | None, matches: tuple | None = None) -> Pair:
    """A molecule with itself, from its features or, where they aren't known, itself; `matches` as of `_matches`.

    Its similarities are 1, or 0 where a fingerprint is empty, which only that of very few atoms is.
    """
    if known is None and molecule.GetNumBonds() > 3:
        ring, formula = molecule.GetRingInfo().NumRings() > 0, rdMolDescriptors.CalcMolFormula(molecule)
        morgan, similar = _MORGAN.GetSparseCountFingerprint(molecule), (1.0, 1.0)
    else:
        known = known or _features(molecule)
        ring, formula, morgan = known.ring != "", known.formula, known.morgan
        similar = float(known.maccs.GetNumOnBits() > 0), float(known.rdk.GetNumOnBits() > 0)
    dummy, counts = "*" in formula, morgan.ToBinary()
    # A dummy atom has no InChI: two such molecules may be the same or not.
    matches = matches or (not dummy, True, True)
    return Pair(*matches, 1.0 if ring else np.nan, *similar, 1.0, 1.0, dummy, (counts, counts))


def _matches(a: Chem.Mol, b: Chem.Mol) -> tuple[bool, bool, bool]:
    """Whether two molecules agree in InChI, in canonical SMILES, and in that without stereochemistry."""
    inchi = Chem.MolToInchi(a)
    flat = [Chem.MolToSmiles(m, isomericSmiles=False) for m in (a, b)]
    # A dummy atom has no InChI: the empty strings of two such molecules say nothing about them.
    return inchi != "" and inchi == Chem.MolToInchi(b), Chem.MolToSmiles(a) == Chem.MolToSmiles(b), flat[0] == flat[1]


def compare(
    references: list[str], predictions: list[str], cache_dir=None, num_workers: int | None = None
) -> list[Pair | NoPair]:
    """n pairs, each distinct one compared once.

    Exact match: by InChI (as MolT5), by canonical SMILES, by that without stereochemistry. Tanimoto similarity, as
    MolT5's fingerprint_metrics.py: `maccs`, 166 MACCS keys; `rdk`, RDKit's path fingerprint (paths 1 to 7, 2048 bits);
    `morgan`, sparse counts, radius 2. RDKit calls the Tanimoto similarity of empty fingerprints 0, so a molecule
    without bonds (methane) has an `rdk` of 0 to itself; `rdk_corrected` is 1 for equal molecules.

    References' features are kept in `cache_dir`. `ValueError` on a reference that is no molecule, or that RDKit does
    not finish.
    """
    distinct = list(dict.fromkeys(references))
    known = {} if cache_dir is None else _cached_features(distinct, cache_dir, num_workers)
    pairs = list(zip(references, predictions, strict=True))
    jobs = {pair: (*pair, known.get(pair[0])) for pair in pairs}
    of = dict(zip(jobs, in_processes(_compare, list(jobs.values()), num_workers), strict=True))
    stuck = [pair for pair, found in of.items() if isinstance(found, Unfinished)]
    for pair, its in zip(
        stuck, in_processes(features, [reference for reference, _ in stuck], num_workers), strict=True
    ):
        if isinstance(its, Features):  # so it is the prediction's
            of[pair] = NoPair(0.0 if its.scaffold else np.nan, of[pair])
    for row, pair in enumerate(pairs, 1):
        if not isinstance(of[pair], (Pair, NoPair)):
            why = f": {of[pair]}" if of[pair] else " is not a molecule RDKit can read"
            raise ValueError(
                f"row {row}: the reference {pair[0][:100]!r}{why}; references are your data: correct it, remove the "
                "row, or leave such rows out with --invalid_pairs drop"
            )
    return [of[pair] for pair in pairs]


def columns(predictions: list[str], pairs: list[Pair | NoPair]) -> dict[str, np.ndarray]:
    """Validity, exact matches (invalid: 0), similarities (invalid: NaN) of what `compare` returned, and, in columns
    `count_CAUSE`, what is odd about a prediction, `(n,)` each."""
    valid = np.array([float(isinstance(pair, Pair)) for pair in pairs])
    of_pairs = lambda key, other: np.array([getattr(p, key) if isinstance(p, Pair) else other for p in pairs], float)
    found = {"validity": valid}
    found |= {key: of_pairs(key, 0) for key in ("exact_match", "canonical_match", "canonical_match_no_stereo")}
    found |= {key: of_pairs(key, np.nan) for key in (*_KINDS, "rdk_corrected")}
    found |= {f"{key}_invalid0": np.nan_to_num(found[key]) for key in _KINDS}
    found["scaffold_match"] = np.array([pair.scaffold_match for pair in pairs])
    odd = [oddity(prediction) for prediction in predictions]
    plain = np.array([cause is None for cause in odd])
    found |= {"validity_strict": valid * plain, "exact_match_strict": found["exact_match"] * plain}
    for cause in ODDITIES:
        found[f"count_{cause}"] = np.array([float(cause == its) for its in odd])
    found["count_dummy_atom"] = of_pairs("dummy", 0)
    found["count_unfinished"] = np.array([float(isinstance(p, NoPair) and p.unfinished != "") for p in pairs])
    return found


def columns_alone(predictions: list[str], num_workers=None) -> dict[str, np.ndarray]:
    """Of `columns`, what needs no reference, `(n,)` each."""
    distinct = list(dict.fromkeys(predictions))
    of = dict(zip(distinct, in_processes(dummy_of, distinct, num_workers), strict=True))
    pairs = [
        Pair(*[np.nan] * 8, of[p], ()) if isinstance(of[p], bool) else NoPair(np.nan, of[p] or "") for p in predictions
    ]
    found = columns(predictions, pairs)
    return {k: v for k, v in found.items() if k in ("validity", "validity_strict") or k.startswith("count_")}


def novelty(predictions: list[str], valid: np.ndarray, known: list[str], num_workers=None) -> np.ndarray:
    """1 where the molecule is none of `known` (canonical SMILES), 0 where it is, NaN where invalid, `(n,)`."""
    distinct = list(dict.fromkeys([*known, *(p for p, ok in zip(predictions, valid, strict=True) if ok)]))
    of = dict(zip(distinct, in_processes(canonical, distinct, num_workers), strict=True))
    seen = {of[smiles] for smiles in known}
    return np.array([float(of[p] not in seen) if ok else np.nan for p, ok in zip(predictions, valid, strict=True)])


def environments(pairs: list[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Both sides' Morgan fingerprints as corpora of atom environments, each as often as it occurs (see ngrams.py)."""
    sides = zip(*(pair.counts for pair in pairs), strict=True)
    rows = [[DataStructs.ULongSparseIntVect(c).GetNonzeroElements().items() for c in side] for side in sides]
    return [flatten([[e for e, count in row for _ in range(count)] for row in side]) for side in rows]


def _cached_features(references: list[str], cache_dir, num_workers) -> dict[str, Features]:
    """Features of distinct SMILES that are molecules, kept in `cache_dir` by content."""
    content = hashlib.sha256("\n".join([rdkit.__version__, *Features._fields, *references]).encode()).hexdigest()[:32]
    path = Path(cache_dir) / f"features-{content}.npz"
    if stored := load_arrays(path):
        parts = [np.split(stored[f"data{k}"], np.cumsum(stored[f"length{k}"])[:-1]) for k in range(6)]
        text, bits, counts = bytes.decode, DataStructs.ExplicitBitVect, DataStructs.ULongSparseIntVect
        kinds = text, text, text, bits, bits, counts
        rows = zip(*([kind(p.tobytes()) for p in part] for kind, part in zip(kinds, parts, strict=True)), strict=True)
        return {s: Features(*row) for s, row in zip(references, rows, strict=True)}
    found = dict(zip(references, in_processes(features, references, num_workers), strict=True))
    if all(isinstance(f, Features) for f in found.values()):  # else `compare` names the one that is no molecule
        rows = [[*(text.encode() for text in f[:3]), *(vector.ToBinary() for vector in f[3:])] for f in found.values()]
        arrays = {f"data{k}": np.frombuffer(b"".join(row[k] for row in rows), np.uint8) for k in range(6)}
        save_arrays(path, arrays | {f"length{k}": np.array([len(row[k]) for row in rows]) for k in range(6)})
    return {s: f for s, f in found.items() if isinstance(f, Features)}


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
    counts = Counter(p for p, ok in zip(predictions, valid, strict=True) if ok)
    return np.array([1 / counts[p] if ok else np.nan for p, ok in zip(predictions, valid, strict=True)])


_AS_IS = "characters as they are in the file"
_ONCE = "ChEBI-20's doubled backslashes made single on both sides"
_TANIMOTO = "mean Tanimoto, RDKit {rdkit}"
_LABELS = {"maccs": "MACCS", "rdk": "RDK", "morgan": "Morgan"}
_NONE_VALID = "no prediction is valid"
_INVALID = f"empty, over {MAX_CHARACTERS} characters or what RDKit doesn't finish in {SECONDS:g} s is invalid"
_PLAIN = "and the output is one plain SMILES: no text, name or extension after it, ASCII, no SELFIES (docs/metrics.md)"
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
        key="novelty",
        label="Novelty",
        better=1,
        convention="share of valid predictions that are no molecule of {known} (canonical SMILES, RDKit {rdkit})",
        undefined=_NONE_VALID,
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
        key="validity_strict",
        label="Validity, strict",
        better=1,
        convention=f"RDKit {{rdkit}} parses it, {_PLAIN}",
    ),
    Metric(
        key="exact_match_strict",
        label="Exact, strict",
        better=1,
        convention=f"equal InChI, RDKit {{rdkit}}, {_PLAIN}",
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
