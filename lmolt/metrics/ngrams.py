"""N-gram overlap of a whole corpus at once, and the scores made of it: BLEU, ROUGE-n, Chr-F.

A text is a sequence of integers. A corpus of n texts is `(tokens, lengths)`: all tokens end to end, int64, and the
number of each text's, `(n,)`.
"""

import numpy as np

_LARGEST_KEY = 2**62


def flatten(sequences: list) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens, lengths)` of n sequences of non-negative integers."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    tokens = np.fromiter((t for s in sequences for t in s), np.int64, lengths.sum())
    return tokens, lengths


def characters(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`(tokens, lengths)` of n strings read as code points."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64), lengths


def counted(references: tuple, predictions: tuple, max_order: int):
    """For each order 1 to `max_order`, each side's distinct n-grams of each text: `(keys, counts)` of both sides.

    Both arguments are `(tokens, lengths)` with n texts. A key is (number of the n-gram) * n + (row); keys ascend.
    """
    n = len(references[1])
    rows = [np.repeat(np.arange(n), lengths) for _, lengths in (references, predictions)]
    vocabulary, tokens = np.unique(np.concatenate([references[0], predictions[0]]), return_inverse=True)
    tokens = np.split(tokens, [len(references[0])])
    keys = tokens
    for order in range(1, max_order + 1):
        if order > 1:
            size = max((k.max() for k in keys if len(k)), default=0) + 1
            if size * len(vocabulary) * n >= _LARGEST_KEY:  # rank the keys anew, so that they stay exact in 64 bits
                ranked = np.unique(np.concatenate(keys), return_inverse=True)[1]
                keys = np.split(ranked, [len(keys[0])])
            # A key may run over the end of its text here; such keys are not counted below.
            keys = [k[:-1] * len(vocabulary) + t[order - 1 :] for k, t in zip(keys, tokens, strict=True)]
        sides = []
        for key, row in zip(keys, rows, strict=True):
            start = row[: len(key)]
            whole = start == row[order - 1 :]
            sides.append(np.unique(key[whole] * n + start[whole], return_counts=True))
        yield sides


def overlap(references: tuple, predictions: tuple, max_order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clipped n-gram matches of orders 1 to `max_order`.

    Both arguments are `(tokens, lengths)` with n texts. Returns `(matches, reference_totals, prediction_totals)`,
    each `(n, max_order)` float64; a text shorter than the order has a total of 0.
    """
    n, matches, totals = len(references[1]), [], []
    for order, ((ours, our_counts), (theirs, their_counts)) in enumerate(counted(references, predictions, max_order)):
        both, a, b = np.intersect1d(ours, theirs, assume_unique=True, return_indices=True)
        matches.append(np.bincount(both % n, np.minimum(our_counts[a], their_counts[b]), n).astype(float))
        totals.append([np.maximum(lengths - order, 0) for _, lengths in (references, predictions)])
    reference_totals, prediction_totals = np.array(totals, float).transpose(1, 2, 0)
    return np.array(matches).T, reference_totals, prediction_totals


def shuffled_overlap(references: tuple, predictions: tuple, max_order: int, shuffles: np.ndarray) -> np.ndarray:
    """Clipped matches `(S, n, max_order)` of reference i with prediction `shuffles[s, i]`, as in `overlap`."""
    n = len(references[1])
    matches = np.zeros((len(shuffles), n, max_order))
    for order, ((ours, our_counts), (theirs, their_counts)) in enumerate(counted(references, predictions, max_order)):
        known = np.isin(ours // n, theirs // n)  # n-grams that some prediction has
        grams, rows = np.divmod(ours[known], n)
        for s, shuffle in enumerate(shuffles if len(theirs) else ()):
            wanted = grams * n + shuffle[rows]
            at = np.minimum(np.searchsorted(theirs, wanted), len(theirs) - 1)
            clipped = np.where(theirs[at] == wanted, np.minimum(our_counts[known], their_counts[at]), 0)
            matches[s, :, order] = np.bincount(rows, clipped, n)
    return matches


def bleu(matches: np.ndarray, totals: np.ndarray, prediction_length, reference_length) -> np.ndarray:
    """Corpus BLEU without smoothing, as NLTK's `corpus_bleu` (Papineni et al. 2002, section 2.3).

    `matches`, `totals`: sums over the corpus, `(..., N)`, each text's total at least 1; the lengths `(...,)` in
    tokens. An order with no match counts as the smallest positive float, unless order 1 has none: then BLEU is 0.
    """
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        precision = np.where(matches > 0, matches, np.finfo(float).tiny * totals) / totals
        shortness = np.where(prediction_length > 0, 1 - reference_length / prediction_length, -np.inf)
    score = np.exp(np.minimum(shortness, 0) + np.log(precision).mean(-1))
    return np.where((matches[..., 0] > 0) & (prediction_length > 0), score, 0.0)


def f1(matches: np.ndarray, totals_a: np.ndarray, totals_b: np.ndarray) -> np.ndarray:
    """2 m / (a + b): the harmonic mean of m / a and m / b, elementwise; 0 where nothing matches."""
    return np.divide(2 * matches, totals_a + totals_b, out=np.zeros_like(matches), where=matches > 0)
