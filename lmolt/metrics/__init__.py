"""Every metric of both directions, with its interval and the convention it holds under (docs/metrics.md)."""

import numpy as np


def score(
    direction: str,
    sources: list[str],
    references: list[str],
    predictions: list[str],
    *,
    text_tokenizer=None,
    nli_model: str | None = None,
    nltk_data: str | None = None,
    chrf_threshold: float = 0.3,
    delta_threshold: int = 5,
    property_tree: str | None = None,
    fcd: bool = True,
    cache_dir: str | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    num_workers: int | None = None,
) -> tuple[dict, dict[str, np.ndarray]]:
    """Score one system's outputs of one direction.

    `sources`, `references`, `predictions`: n strings each, row i of one belongs to row i of the others.
    `text_tokenizer`: mol2cap's word pieces: a tokenizer's folder, a Hub id or a callable `str -> list[str]`;
    None is a plain word tokenizer, and each convention then says that the number is not comparable.
    `nli_model`: folder or Hub id of a sequence-classification model; `nltk_data`: a folder with `corpora/wordnet`.
    `chrf_threshold`, `delta_threshold`: a molecule wins with Chr-F above and |delta length| below them (paper, 3.4).
    `property_tree`: folder with L+M-24's `nested_props.json`, `prop_counts.json`, `train_props.txt.gz` (optional).
    `cache_dir`: folder that keeps fingerprints and activations of references between runs. `num_workers`: processes
    for RDKit, default one a core.

    Returns `(metrics, per_example)`:
    `{"counts": {name: int}, "metrics": {key: {"value", "ci95": [lo, hi], "n", "convention"} | {"absent": reason}}}`
    (a `ci95` may be None, then `"ci95_absent"` says why) and `{column: float array (n,), NaN where undefined}`, where
    columns with a `stat_` prefix are the sufficient statistics of corpus-level metrics, as `compare` needs them.

    `ValueError` on lists of different lengths, no rows, or a reference that does not parse (naming row and value).
    """
    raise NotImplementedError


def compare(
    direction: str, scores_a: dict, scores_b: dict, *, n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict]:
    """Paired bootstrap between two systems scored on the same rows.

    `scores_a`, `scores_b`: what `score` returned as `per_example` (or the same columns of two `scores.parquet`, rows
    in the same order). Returns `{key: {"difference": a - b, "ci95": [lo, hi], "p": two-sided p-value, "n"}}` for each
    metric both can be compared on (all but FCD). The p-values are uncorrected: `statistics.holm` corrects a table's.

    `ValueError` where the two have different numbers of rows.
    """
    raise NotImplementedError
