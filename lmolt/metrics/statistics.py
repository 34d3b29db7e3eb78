"""Bootstrap intervals, paired bootstrap tests and Holm's correction.

Every statistic here is a function of sums over examples, so that a resample of the examples is a row of counts and
all resamples of all statistics are one matrix product. A statistic is `(columns, value)`: `columns` `(n, k)`, one row
an example; `value` maps sums `(..., k)` to the statistic `(...,)`.
"""

import numpy as np


def mean(scores: np.ndarray):
    """The statistic "mean of the defined scores": `scores` `(n,)`, NaN where undefined."""
    defined = ~np.isnan(scores)
    return np.stack([np.where(defined, scores, 0.0), defined.astype(float)], 1), _ratio


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def resampled_sums(columns: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """Sums of `columns` `(n, k)` over `n_bootstrap` resamples of the rows with replacement, `(n_bootstrap, k)`.

    The same n, `n_bootstrap` and `seed` give the same resamples, which is what pairs two systems.
    """
    n = len(columns)
    rng = np.random.default_rng(seed)
    sums = []
    step = max(1, 1_000_000 // n)  # resamples at once: about 8 MB of counts
    for start in range(0, n_bootstrap, step):
        size = min(step, n_bootstrap - start)
        picks = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * n).reshape(size, n)
        sums.append(counts.astype(float) @ columns)
    return np.concatenate(sums)


def bootstrap(statistics: dict[str, tuple], n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Values of each statistic over the same resamples, `(n_bootstrap,)` each (NaN where a resample defines none)."""
    blocks = {id(columns): columns for columns, _ in statistics.values()}  # BLEU-2 and BLEU-4 share theirs
    ends = dict(zip(blocks, np.cumsum([c.shape[1] for c in blocks.values()]).tolist(), strict=True))
    sums = resampled_sums(np.concatenate(list(blocks.values()), 1), n_bootstrap, seed)
    return {
        key: value(sums[:, ends[id(columns)] - columns.shape[1] : ends[id(columns)]])
        for key, (columns, value) in statistics.items()
    }


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Percentile interval of bootstrap values (Efron 1979), or None where no resample defines the statistic."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    return [float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def p_value(differences: np.ndarray) -> float:
    """Two-sided paired bootstrap p-value of "the difference is 0" from resampled differences (Koehn 2004).

    Twice the smaller tail, with one added to both counts (Davison & Hinkley 1997, section 4.2), so it is never 0.
    """
    differences = differences[~np.isnan(differences)]
    if len(differences) == 0:
        return float("nan")
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def holm(p_values) -> np.ndarray:
    """Holm's step-down correction (1979) of m p-values for m comparisons, in the given order; NaN stays NaN."""
    p_values = np.asarray(p_values, float)
    corrected = np.full(p_values.shape, np.nan)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN sorts last
    scaled = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected
