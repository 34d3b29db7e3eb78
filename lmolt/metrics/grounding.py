"""How much of a score the source has a part in: a system's score less that of its own outputs, shuffled.

A system that ignores its input scores the same whichever molecule each of its outputs is put beside, and on formulaic
captions that can be a high score. A statistic's grounding is its value less its mean over S random permutations of the
outputs among the rows: 0 for a system whose outputs do not depend on the source. As a permutation test (Fisher 1935),
p = (1 + shuffles that score at least as much) / (1 + S).

A score of pairs is `(S, n)` here: `[s, i]` is reference i with prediction `shuffles[s, i]`.
"""

import numpy as np

from lmolt.metrics import caption, ngrams
from lmolt.metrics.metric import Metric


def permutations(n: int, n_shuffles: int, seed: int) -> np.ndarray:
    """`(n_shuffles, n)`: permutations of n rows."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (n_shuffles, 1)), axis=1)


def baseline(pairs: np.ndarray, shuffles: np.ndarray) -> np.ndarray:
    """Each row's part in the shuffled mean, `(n, ...)`, from scores of pairs `(S, n, ...)`.

    Its reference's mean plus its prediction's mean less the mean of all: a column with the mean of `pairs`, whose
    resamples vary as the double mean over references and predictions does (Hoeffding's projection).
    """
    of_prediction = pairs[np.arange(len(shuffles))[:, None], np.argsort(shuffles, 1)]
    return pairs.mean(0) + of_prediction.mean(0) - pairs.mean((0, 1))


def summary(value: float, shuffled: np.ndarray) -> dict[str, float]:
    """Mean and largest of the shuffled statistic `(S,)`, and the permutation p-value of `value`."""
    at_least = (shuffled >= value - 1e-12).sum()  # sums in another order differ in the last digits
    return {
        "shuffled_mean": float(shuffled.mean()),
        "shuffled_max": float(shuffled.max()),
        "p_permutation": float((1 + at_least) / (1 + len(shuffled))),
    }


def of_captions(references, predictions, corpora: tuple, columns: dict, rouge_l: np.ndarray, shuffles: np.ndarray):
    """`(per_example, summaries)` of `bleu2_grounding` and `rougeL_grounding`.

    `corpora`: both sides' word pieces as `caption.bleu_columns` takes them, `columns` what it returned.
    """
    matches = ngrams.shuffled_overlap(*corpora, 2, shuffles)  # (S, n, 2)
    sums = np.array([columns[name].sum() for name in caption.BLEU_COLUMNS])
    shuffled = np.tile(sums, (len(shuffles), 1))  # totals and lengths do not depend on the order
    shuffled[:, :2] = matches.sum(1)
    longest = caption.shuffled_rouge_l(references, predictions, shuffles)
    per_example = {f"stat_bleu_shuffled_match_{k + 1}": part for k, part in enumerate(baseline(matches, shuffles).T)}
    per_example["rougeL_grounding"] = rouge_l - baseline(longest, shuffles)
    bleu = summary(caption.bleu_of_sums(sums, 2), caption.bleu_of_sums(shuffled, 2))
    bleu["shuffled_mean"] = float(caption.bleu_of_sums(shuffled.mean(0), 2))  # a corpus's score: of all S n pairs
    return per_example, {
        "bleu2_grounding": bleu,
        "rougeL_grounding": summary(rouge_l.mean(), longest.mean(1)),
    }


def bleu2_of_sums(sums: np.ndarray) -> np.ndarray:
    """`bleu2_grounding` from summed `caption.BLEU_COLUMNS` and two `stat_bleu_shuffled_match`, `(..., 12)`."""
    shuffled = np.concatenate([sums[..., 10:], sums[..., 2:10]], -1)
    return caption.bleu_of_sums(sums[..., :10], 2) - caption.bleu_of_sums(shuffled, 2)


def of_molecules(counts: list[tuple], morgan: np.ndarray, shuffles: np.ndarray):
    """`(column (n,), summaries)` of `morgan_grounding` over n pairs of valid molecules.

    `counts`: the references' and then the predictions' sparse Morgan fingerprints as `(tokens, lengths)`, an
    environment repeated as often as it occurs; `morgan`: Tanimoto of the unshuffled pairs, `(n,)`.
    """
    shared = ngrams.shuffled_overlap(*counts, 1, shuffles)[..., 0]
    scores = shared / (counts[0][1] + counts[1][1][shuffles] - shared)
    return morgan - baseline(scores, shuffles), {"morgan_grounding": summary(morgan.mean(), scores.mean(1))}


_SHUFFLES = "{n_shuffles} shuffles of the predictions (seed {seed}): 0 for outputs that do not depend on the source"
_TOO_FEW = "needs two {rows} to shuffle, and n_shuffles above 0"
CAPTION_METRICS = (
    Metric(
        key="bleu2_grounding",
        label="BLEU-2 above shuffled",
        better=1,
        convention=f"bleu2 less that of {_SHUFFLES}, pooled; {{pieces}}",
        undefined=_TOO_FEW.format(rows="rows"),
        columns=tuple(f"stat_bleu_{c}" for c in (*caption.BLEU_COLUMNS, "shuffled_match_1", "shuffled_match_2")),
        value=bleu2_of_sums,
    ),
    Metric(
        key="rougeL_grounding",
        label="ROUGE-L above shuffled",
        better=1,
        convention=f"rougeL less that of {_SHUFFLES}",
        undefined=_TOO_FEW.format(rows="rows"),
    ),
)
MOLECULE_METRICS = (
    Metric(
        key="morgan_grounding",
        label="Morgan above shuffled",
        better=1,
        convention=f"morgan less that of {_SHUFFLES}; among valid predictions' rows, RDKit {{rdkit}}",
        undefined=_TOO_FEW.format(rows="valid predictions"),
    ),
)
