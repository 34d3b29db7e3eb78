"""Fusing checkpoints of one architecture: linear, SLERP, TIES and DARE-TIES, streamed in small pieces.

Per tensor, base b, models x_i, weights w_i, density rho (Yadav et al., arXiv:2306.01708, as in mergekit 0.1.5):

    linear  y = sum w_i x_i / sum w_i                             (not divided without `normalize`)
    SLERP   y = sin((1-t)theta)/sin(theta) x_0 + sin(t theta)/sin(theta) x_1,   cos(theta) = <x_0, x_1> / |x_0||x_1|
            (linear where |cos(theta)| > 0.9995)
    TIES    d_i = x_i - b, of which the k = max(1, int(rho n)) largest magnitudes stay (of equal ones, the first);
            v_i = w_i d_i;  elected sign: that of sum v_i, + for 0;  m_i = [sign v_i = elected]
            y = b + lambda * (sum v_i m_i) / (sum w_i m_i)        (the divisor is left out without `normalize`)
    DARE    the same, but each d_i stays with probability rho, and is divided by it (arXiv:2311.03099)

Everything is worked out in float32 (float64 where an input or the output is float32) and rounded once;
`rounding="mergekit"` rounds to the stored type after every step, as mergekit does.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from operator import iadd

import numpy as np

from lmolt.merging.safetensors_io import Checkpoint, all_finite, decode, encode

METHODS = ("ties", "slerp", "linear", "dare_ties")


@dataclass
class Recipe:
    """How to merge. `weights`, `density`: one a model; `weights_for` {pattern of tensor names: weights}."""

    method: str
    weights: list[float]
    density: list[float] = field(default_factory=list)
    normalize: bool = True
    scale: float = 1.0  # lambda
    rounding: str = "once"  # or "mergekit"
    seed: int = 0  # of DARE's mask
    weights_for: dict[str, list[float]] = field(default_factory=dict)

    def weights_of(self, name: str) -> list[float]:
        """The last pattern found in the tensor's name decides."""
        for pattern, weights in reversed(self.weights_for.items()):
            if re.search(pattern, name):
                return weights
        return self.weights


def check_recipe(recipe: Recipe, models: list[Checkpoint], base: Checkpoint | None) -> None:
    """`ValueError` where the numbers don't fit the method or the number of models."""
    count = len(models)
    if recipe.method == "slerp" and count != 2:
        raise ValueError(f"SLERP is between exactly two models, not {count}; linear and ties take any number")
    if recipe.method in ("ties", "dare_ties") and base is None:
        raise ValueError(f"{recipe.method} needs --base: the model that all of --models were trained from")
    if recipe.method in ("slerp", "linear") and base is not None:
        raise ValueError(f"{recipe.method} has no base; leave --base out, or use --method ties")
    if count < 1 or (count < 2 and base is None):
        raise ValueError(f"--models has {count} model; merging takes two or more")
    for option, weights in {"--weights": recipe.weights, **recipe.weights_for}.items():
        if len(weights) != count:
            raise ValueError(f"{option}: {len(weights)} weights for {count} models; give one each, in --models' order")
        if not all(map(math.isfinite, weights)):
            raise ValueError(f"{option}: weights must be finite, not {weights}")
        if (recipe.method == "slerp" or recipe.method == "linear" and recipe.normalize) and sum(weights) == 0:
            raise ValueError(f"{option}: weights {weights} add up to 0, by which {recipe.method} divides")
        if recipe.method == "slerp" and min(weights) < 0:
            raise ValueError(f"{option}: SLERP's weights are shares of the way, none below 0, not {weights}")
    names = list(models[0].entries)
    for pattern in recipe.weights_for:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"--weights_for {pattern!r}: no tensor has such a name; the first are {names[:3]}")
    if len(recipe.density) != count and recipe.method in ("ties", "dare_ties"):
        raise ValueError(f"--density: {len(recipe.density)} values for {count} models; give one, or one each")
    if not all(0 < density <= 1 for density in recipe.density):
        raise ValueError(f"--density must lie in (0, 1], not {recipe.density}")


def check_checkpoints(checkpoints: list[Checkpoint], dtype: str | None) -> str:
    """Compare what the headers and configs say; the output's type. `ValueError` names the folders and the remedy."""
    first = checkpoints[0]
    for other in checkpoints:
        if first.config.get("model_type") != other.config.get("model_type"):
            kinds = first.config.get("model_type"), other.config.get("model_type")
            raise ValueError(f"{first.folder} is a {kinds[0]}, {other.folder} a {kinds[1]}; merge models of one kind")
        tied = [bool(c.config.get("tie_word_embeddings")) for c in (first, other)]
        odd = sorted(set(first.entries) ^ set(other.entries))
        if tied[0] != tied[1] or odd == ["lm_head.weight"]:
            raise ValueError(
                f"{first.folder} and {other.folder}: one ties its head to the embedding, the other does not. Untie the "
                "tied one: model.lm_head.weight = Parameter(model.model.embed_tokens.weight.clone()), "
                "config.tie_word_embeddings = False, save_pretrained"
            )
        if odd:
            where = (first if odd[0] in first.entries else other).folder
            raise ValueError(f"{first.folder} and {other.folder}: {len(odd)} tensors in one only; {odd[0]} in {where}")
        for name, entry in first.entries.items():
            here, there = entry.shape, other.entries[name].shape
            if here == there:
                continue
            if here[1:] == there[1:] and re.search(r"embed|lm_head|wte|shared", name):
                raise ValueError(
                    f"{first.folder} has a vocabulary of {here[0]}, {other.folder} one of {there[0]} ({name}). Tokens "
                    f"merge by number: use one tokenizer, and model.resize_token_embeddings({max(here[0], there[0])})"
                )
            raise ValueError(f"{name}: {list(here)} in {first.folder}, {list(there)} in {other.folder}; other models?")
    kinds = {entry.dtype for checkpoint in checkpoints for entry in checkpoint.entries.values()}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"the models hold several types ({', '.join(sorted(kinds))}); say --dtype of the output")
    return dtype or kinds.pop()


# --- formulas, on flat arrays of one working type


def slerp_coefficients(dots: np.ndarray, t: float) -> tuple[float, float, bool]:
    """Factors of the two *unnormalised* tensors, and whether they are linear's; `dots` (2, 2): inner products."""
    norms = [norm if norm > 1e-8 else 1.0 for norm in np.sqrt(np.diag(dots)).tolist()]
    cosine = min(1.0, max(-1.0, float(dots[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > 0.9995:
        return 1 - t, t, True
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta), False


def weighted_sum(values: list[np.ndarray], factors: list[float]) -> np.ndarray:
    """sum_i f_i x_i, added in order."""
    total = values[0] * values[0].dtype.type(factors[0])
    for value, factor in zip(values[1:], factors[1:], strict=True):
        total += value * value.dtype.type(factor)
    return total


def fused_sum(values: list[np.ndarray], factors: list[float]) -> np.ndarray:
    """The same in float32 as torch's `addcmul_` has it: multiplied and added with one rounding, here by float64."""
    total = np.zeros_like(values[0])
    for value, factor in zip(values, factors, strict=True):
        total = (value * np.float64(np.float32(factor)) + total).astype(np.float32)
    return total


def elect(
    deltas: list[np.ndarray], weights: list[float], normalize: bool, scale: float, rounded=lambda x: x
) -> tuple[np.ndarray, int]:
    """TIES' last two steps on trimmed deltas, which it overwrites: what is added to the base, and how many conflicts.

    `rounded` is applied after every step. Votes are turned so that the elected sign is +: agreeing ones are then > 0.
    """
    number, integer = deltas[0].dtype.type, np.dtype(f"i{deltas[0].itemsize}")
    weights = [rounded(np.array([weight], number))[0] for weight in weights]
    votes = [rounded(np.multiply(delta, weight, out=delta)) for delta, weight in zip(deltas, weights, strict=True)]
    elected = rounded(sum(votes[1:], start=votes[0])) if len(votes) > 1 else votes[0].copy()
    elected = elected.view(integer)
    elected &= np.iinfo(integer).min  # its sign bit
    zeros, conflict = np.zeros_like(votes[0]), np.zeros(votes[0].shape, bool)
    for vote in votes:
        turned = vote.view(integer)
        turned ^= elected
        conflict |= vote < 0
        np.maximum(vote, zeros, out=vote)  # three times as fast as with a scalar 0
    if normalize:
        divisor = rounded(reduce(iadd, (weight * (vote > 0) for vote, weight in zip(votes, weights, strict=True))))
    total = reduce(iadd, votes)
    turned = total.view(integer)
    turned ^= elected
    total = rounded(total)
    if normalize:
        if min(weights) > 1e-20:  # then a divisor of 0 is of a total of 0, and any other is not changed by this
            divisor += number(1e-37)
        else:
            divisor += divisor == 0
        total = rounded(np.divide(total, divisor, out=total))
    return total if scale == 1 else rounded(total * number(scale)), int(np.count_nonzero(conflict))


class Bracket:
    """The k-th largest magnitude in one reading: counts what is above a bracket and keeps what is within.

    A `sample` of the magnitudes sets the bracket; `size` is the whole tensor's.
    """

    def __init__(self, sample: np.ndarray, k: int, size: int):
        self.k, sample = k, np.sort(sample)
        rank, margin = len(sample) * (1 - k / size), 0.008 * len(sample)  # four standard errors of a sample of 65,536
        self.low = sample[max(0, int(rank - margin))]
        self.high = sample[min(len(sample) - 1, int(rank + margin))]
        self.above = self.at_high = self.at_low = 0
        self.within: list[np.ndarray] = []

    def add(self, piece: np.ndarray) -> None:
        self.above += np.count_nonzero(piece > self.high)
        self.at_high += np.count_nonzero(piece == self.high)
        self.at_low += np.count_nonzero(piece == self.low)
        inside = piece > self.low
        inside &= piece < self.high
        self.within.append(piece.compress(inside))

    def threshold(self) -> tuple[float, int] | None:
        """The k-th largest magnitude and how many of those equal to it stay; None if it is not in the bracket."""
        left = self.k - self.above
        if 0 < left <= self.at_high:
            return float(self.high), left
        left -= self.at_high
        within = np.concatenate(self.within)
        if 0 < left <= within.size:
            place = within.size - left
            within.partition(place)
            return float(within[place]), left - int(np.count_nonzero(within > within[place]))
        left -= within.size
        return (float(self.low), left) if self.low < self.high and 0 < left <= self.at_low else None


def radix_select(magnitudes: Callable[[], Iterator[np.ndarray]], k: int) -> tuple[float, int]:
    """The k-th largest magnitude and how many of those equal to it stay, whatever the values.

    The bits of a positive float order as integers, and each reading of the tensor settles 16 of them.
    """
    left, prefix = k, 0
    width = next(magnitudes()).itemsize * 8
    unsigned = np.dtype(f"u{width // 8}")
    for shift in range(width - 16, -1, -16):
        counts = np.zeros(1 << 16, np.int64)
        for piece in magnitudes():
            bits = piece.view(unsigned)
            if shift < width - 16:
                bits = bits[bits >> (shift + 16) == prefix] & (1 << (shift + 16)) - 1
            counts += np.bincount((bits >> shift).astype(np.intp), minlength=1 << 16)
        digit = 0xFFFF - int(np.searchsorted(np.cumsum(counts[::-1]), left))
        left -= int(counts[digit + 1 :].sum())
        prefix = prefix << 16 | digit
    return float(np.array([prefix], unsigned).view(f"f{width // 8}")[0]), left


class Trim:
    """Masks of one model's deltas, piece after piece: the largest, and of those equal to the threshold the first."""

    def __init__(self, threshold: float, ties: int):
        self.threshold, self.ties = threshold, ties

    def __call__(self, delta: np.ndarray) -> np.ndarray:
        magnitude = np.abs(delta)
        keep = magnitude > self.threshold
        if self.ties:
            equal = magnitude == self.threshold
            count = np.count_nonzero(equal)
            if count > self.ties:
                equal[np.flatnonzero(equal)[self.ties :]] = False
            keep |= equal
            self.ties -= min(count, self.ties)
        return keep


# --- one tensor, streamed


def merge_tensor(
    name: str,
    models: list[Checkpoint],
    base: Checkpoint | None,
    recipe: Recipe,
    dtype: str,
    write: Callable[[np.ndarray], None],
) -> dict:
    """Merge one tensor, `write` its encoded pieces, and return what became of it.

    The record: `size`, `inner` (inner products of the inputs, or of their deltas from the base, and last of what they
    became, before it is rounded), `linear` (SLERP fell back), `conflicts` (values whose kept votes disagree in sign).
    """
    sources = [*models, base] if base else models
    float32 = dtype == "F32" or any(source.entries[name].dtype == "F32" for source in sources)
    work = np.float64 if float32 and recipe.rounding == "once" else np.float32
    rounded = (lambda x: decode(encode(x, dtype), dtype)) if recipe.rounding == "mergekit" else (lambda x: x)
    weights = recipe.weights_of(name)
    record = {"size": models[0].entries[name].size}
    inner, finite = np.zeros((len(models) + 1, len(models) + 1)), True

    if base:
        combine = ties_combiner(name, models, base, recipe, work, rounded, record, inner)
    elif recipe.method == "slerp":
        for pair in zip(*(model.read(name, work) for model in models), strict=True):
            add_inner_products(inner, pair)
        *factors, record["linear"] = slerp_coefficients(inner[:2, :2], weights[1] / sum(weights))
        combine = lambda pieces: weighted_sum(pieces, factors)
    else:
        total = sum(weights) if recipe.normalize else 1.0
        factors = [weight / total for weight in weights]

        def combine(pieces):
            add_inner_products(inner, pieces)
            if recipe.rounding == "mergekit":
                return fused_sum(pieces, weights) / (sum(map(work, weights)) if recipe.normalize else work(1))
            return weighted_sum(pieces, factors)

    for pieces in zip(*(source.read(name, work) for source in sources), strict=True):
        stored = encode(combine(pieces), dtype)
        finite = finite and all_finite(stored, dtype)
        write(stored)
    if not finite:
        raise ValueError(f"{name}: the merged values leave the range of {dtype}; take another --dtype or other weights")
    if not base:  # the output is a sum of the inputs, and so are its inner products
        inner[-1] = [*factors, 0] @ inner
        inner[:, -1] = inner @ [*factors, 0]
    return {**record, "inner": inner.tolist()}


def ties_combiner(name, models, base, recipe, work, rounded, record, inner):
    """The function that turns a piece of every model and the base into the merged one by TIES or DARE-TIES.

    It counts in `record` and `inner` as it goes (see merge_tensor).
    """

    def magnitudes(*models: Checkpoint) -> Iterator[list[np.ndarray]]:
        for *values, origin in zip(*(source.read(name, work) for source in (*models, base)), strict=True):
            deltas = [rounded(np.subtract(value, origin, out=value)) for value in values]
            yield [np.abs(delta, out=delta) for delta in deltas]

    def dropout(index: int, density: float) -> Callable[[np.ndarray], np.ndarray]:
        random = np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), index])
        return lambda delta: (random.random(delta.size, np.float32) < density) / work(density)

    size, trims = record["size"], [None] * len(models)
    thin = [index for index, density in enumerate(recipe.density) if density < 1 and size]
    if recipe.method == "dare_ties":
        for index in thin:
            trims[index] = dropout(index, recipe.density[index])
    elif thin:
        brackets = []
        for index in thin:
            sample = np.abs(rounded(models[index].sample(name, work) - base.sample(name, work)))
            brackets.append(Bracket(sample, max(1, int(recipe.density[index] * size)), size))
        for pieces in magnitudes(*(models[index] for index in thin)):
            for bracket, piece in zip(brackets, pieces, strict=True):
                bracket.add(piece)
        for index, bracket in zip(thin, brackets, strict=True):
            again = lambda index=index: (piece for (piece,) in magnitudes(models[index]))
            trims[index] = Trim(*(bracket.threshold() or radix_select(again, bracket.k)))
    weights, record["conflicts"] = recipe.weights_of(name), 0

    def combine(pieces):
        *values, origin = pieces
        deltas = [rounded(np.subtract(value, origin, out=value)) for value in values]
        kept = [delta * trim(delta) if trim else delta.copy() for delta, trim in zip(deltas, trims, strict=True)]
        added, conflicts = elect(kept, weights, recipe.normalize, recipe.scale, rounded)
        record["conflicts"] += conflicts
        add_inner_products(inner, [*deltas, added])
        added += origin
        return added

    return combine


def add_inner_products(total: np.ndarray, vectors) -> None:
    """Add each pair's inner product to the symmetric `total`."""
    for (i, x), (j, y) in combinations([*enumerate(vectors)], 2):
        total[i, j] = total[j, i] = total[i, j] + float(np.dot(x, y))
    for i, x in enumerate(vectors):
        total[i, i] += float(np.dot(x, x))


def effective_weights(inner: np.ndarray) -> list[float]:
    """Least squares of the output (last row) on the inputs: what the merge made of the weights that were asked for."""
    return np.linalg.lstsq(inner[:-1, :-1], inner[:-1, -1], rcond=1e-12)[0].tolist()


def cosines(inner: np.ndarray) -> list[float]:
    """Cosine of each pair of inputs, (0, 1), (0, 2), ..., (1, 2), ...; 0 where one of them is all zero."""
    norms = np.sqrt(np.diag(inner))
    pairs = combinations(range(len(inner) - 1), 2)
    return [float(inner[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] else 0.0 for i, j in pairs]
