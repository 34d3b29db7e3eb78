"""Bootstrap intervals, paired bootstrap tests and Holm's correction.

Every statistic here is a function of sums over examples, so that a resample of the examples is a row of counts and
all resamples of all statistics are one matrix product. A statistic is `(columns, value)`: `columns` `(n, k)`, one row
an example; `value` maps sums `(..., k)` to the statistic `(...,)`.
"""

from typing import NamedTuple

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


class Resampled(NamedTuple):
    """A statistic of all rows and of each resample, with its standard error there."""

    estimate: float
    error: float
    values: np.ndarray  # (n_bootstrap,), NaN where a resample defines none
    errors: np.ndarray  # (n_bootstrap,)
    skewed: bool = False  # few rows weigh much: influences of a skewness over 2, and not a share's two
    reach: tuple[float, float] = (-np.inf, np.inf)  # from the least to the greatest that a row alone would give


def resample(statistics: dict[str, tuple], n_bootstrap: int, seed: int) -> dict[str, Resampled]:
    """Each statistic over the same resamples of the rows.

    Its standard error is the infinitesimal jackknife's: of the rows' influences (n - 1) (theta - theta without the row)
    and, in a resample, of those of the rows in it.
    """
    columns = {id(c): c for c, _ in statistics.values()}  # BLEU-2 and BLEU-4 share theirs
    influences, totals = {}, {key: c.sum(0) for key, (c, _) in statistics.items()}
    for key, (its, value) in statistics.items():
        influence = (len(its) - 1) * (value(totals[key]) - value(totals[key] - its))
        influence = np.nan_to_num(influence - np.nanmean(influence)) if np.isfinite(influence).any() else 0 * its[:, 0]
        influences[key] = np.stack([influence, influence**2], 1)
    blocks = [*columns.values(), *influences.values()]
    ends = np.cumsum([block.shape[1] for block in blocks]).tolist()
    sums = resampled_sums(np.concatenate(blocks, 1), n_bootstrap, seed)
    part = {i: sums[:, end - block.shape[1] : end] for i, (block, end) in enumerate(zip(blocks, ends, strict=True))}
    place = {identity: i for i, identity in enumerate(columns)}
    found = {}
    for number, (key, (its, value)) in enumerate(statistics.items(), len(columns)):
        n = len(its)
        error = float(np.sqrt(influences[key][:, 1].sum() / n / max(n - 1, 1)))
        mean, square = part[number].T / n
        errors = np.sqrt(np.maximum(square - mean**2, 0) / max(n - 1, 1))
        errors[errors < 1e-6 * error] = 0  # equal rows, but for rounding
        with np.errstate(invalid="ignore", divide="ignore"):
            alone = value(its)
        alone = alone[np.isfinite(alone)]
        reach = (float(alone.min()), float(alone.max())) if len(alone) else (-np.inf, np.inf)
        influence = influences[key][:, 0]
        deviation = float(np.sqrt((influence**2).mean()))
        skewed = deviation > 0 and abs((influence**3).mean()) > 2 * deviation**3 and len(np.unique(influence)) > 2
        values = value(part[place[id(its)]])
        found[key] = Resampled(float(value(totals[key])), error, values, errors, bool(skewed), reach)
    return found


def bootstrap(statistics: dict[str, tuple], n_bootstrap: int, seed: int) -> dict[str, np.ndarray]:
    """Values of each statistic over the same resamples, `(n_bootstrap,)` each (NaN where a resample defines none)."""
    return {key: resampled.values for key, resampled in resample(statistics, n_bootstrap, seed).items()}


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Percentile interval of bootstrap values (Efron 1979), or None where no resample defines the statistic."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return None
    return [float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def confidence_interval(resampled: Resampled, level: float = 0.95) -> list[float] | None:
    """From the lower to the higher bound of the percentile interval and the bootstrap-t interval (Efron 1981).

    Percentiles alone hold the truth too seldom where few rows weigh much, as in the edit distance of outputs some of
    which run on; BCa is no better there, and worse for BLEU. Where rows are that skewed, bounds of 0.97 hold 0.95
    (benchmarks/coverage.py, docs/metrics.md). None where no resample defines the statistic.
    """
    level = 1 - 0.6 * (1 - level) if resampled.skewed else level
    bounds = interval(resampled.values, level)
    with np.errstate(invalid="ignore", divide="ignore"):
        t = (resampled.values - resampled.estimate) / resampled.errors
    t = t[np.isfinite(t)]
    # A resample of equal rows has no t: where there are many (a share near 0 or 1), the others say nothing.
    if bounds is None or resampled.error == 0 or len(t) < 0.99 * len(resampled.values):
        return bounds
    low, high = resampled.estimate - resampled.error * np.quantile(t, [(1 + level) / 2, (1 - level) / 2])
    least, most = resampled.reach  # no share is over 1, no BLEU below 0
    return [min(bounds[0], max(float(low), least)), max(bounds[1], min(float(high), most))]


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
