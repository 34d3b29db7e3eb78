"""What comes back when outputs are translated once more, the other way: faithfulness without a gold reference.

A caption that says what its molecule is leads back to it (molecule -> caption -> molecule); a molecule that is what its
caption asks for is captioned alike (caption -> molecule -> caption). Both by a second model, or by the same, which may
understand its own mistakes: the convention names it. The idea is RTMol's (arXiv 2511.12135).
"""

import numpy as np

from lmolt.metrics import caption, molecule
from lmolt.metrics.metric import Metric

_BACK = "the output translated back by {round_trip}; an empty{what} output comes back as nothing, 0"
_MOLECULES = _BACK.replace("{what}", "")
_CAPTIONS = _BACK.replace("{what}", " or invalid")
CAPTION_METRICS = (
    Metric(
        key="round_trip_validity",
        label="Round trip, validity",
        better=1,
        convention=f"share of molecules that come back readable, RDKit {{rdkit}}; {_MOLECULES}",
        undefined="no source is a molecule",
    ),
    Metric(
        key="round_trip_exact",
        label="Round trip, exact",
        better=1,
        convention=f"share of molecules that come back with equal InChI, RDKit {{rdkit}}; {_MOLECULES}",
        undefined="no source is a molecule",
    ),
    Metric(
        key="round_trip_morgan",
        label="Round trip, Morgan",
        better=1,
        convention="mean Tanimoto (Morgan, radius 2, sparse counts) of source and what comes back, RDKit {rdkit}, 0 "
        f"where that is invalid; {_MOLECULES}",
        undefined="no source is a molecule",
    ),
)
MOLECULE_METRICS = (
    Metric(
        key="round_trip_exact",
        label="Round trip, exact",
        better=1,
        convention=f"share of captions that come back in the same words; {_CAPTIONS}",
    ),
    Metric(
        key="round_trip_rougeL",
        label="Round trip, ROUGE-L",
        better=1,
        convention=f"ROUGE-L F1 of source caption and what comes back, lower-cased words, no stemming; {_CAPTIONS}",
    ),
)


def of_molecules(sources: list[str], returned: list[str], num_workers=None) -> dict[str, np.ndarray]:
    """`(n,)` each: molecules beside those that came back; NaN where the source is no molecule."""
    distinct = list(dict.fromkeys(sources))
    found = molecule.in_processes(molecule.features, distinct, num_workers)
    readable = {s for s, f in zip(distinct, found, strict=True) if isinstance(f, molecule.Features)}
    at = np.array([i for i, source in enumerate(sources) if source in readable], int)
    mine = [returned[i] for i in at]
    columns = molecule.columns(mine, molecule.compare([sources[i] for i in at], mine, None, num_workers))
    names = {
        "round_trip_validity": "validity",
        "round_trip_exact": "exact_match",
        "round_trip_morgan": "morgan_invalid0",
    }
    result = {}
    for key, column in names.items():
        result[key] = np.full(len(sources), np.nan)
        result[key][at] = columns[column]
    return result


def of_captions(sources: list[str], returned: list[str]) -> dict[str, np.ndarray]:
    """`(n,)` each: captions beside those that came back."""
    same = [a.casefold().split() == b.casefold().split() for a, b in zip(sources, returned, strict=True)]
    return {"round_trip_exact": np.array(same, float), "round_trip_rougeL": caption.rouge(sources, returned)["rougeL"]}
