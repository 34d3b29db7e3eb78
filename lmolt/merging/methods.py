"""Fusing checkpoints of one architecture: linear, SLERP, TIES and DARE-TIES, streamed in small pieces.

Per tensor, base b, models x_i, weights w_i, density rho (Yadav et al., arXiv:2306.01708, as in mergekit 0.1.5):

    linear  y = sum w_i x_i / sum w_i                             (not divided without `normalize`)
    SLERP   y = sin((1-t)theta)/sin(theta) x_0 + sin(t theta)/sin(theta) x_1,   cos(theta) = <x_0, x_1> / |x_0||x_1|
            (linear where |cos(theta)| > 0.9995)
    TIES    d_i = x_i - b, of which the k = max(1, int(rho n)) largest magnitudes stay (of equal ones, the first);
            v_i = w_i d_i;  elected sign: that of sum v_i, + for 0;  m_i = [sign v_i = elected]
            y = b + lambda * (sum v_i m_i) / (sum w_i m_i)        (the divisor is left out without `normalize`)
    DARE    the same, but each d_i stays with probability rho, and what stays is scaled to the sum of all |d_i|
            (arXiv:2311.03099, with mergekit's rescaling; by default not normalised)
    task arithmetic   y = b + lambda * sum w_i d_i                (arXiv:2212.04089; with `normalize` / sum w_i)
    nuslerp           y = b + SLERP of d_0 and d_1, linear only where they are parallel

Everything is worked out in float32 (float64 where an input or the output is float32) and rounded once;
`rounding="mergekit"` rounds to the stored type after every step, as mergekit does; `"stochastic"` rounds up or down by
seeded chance, so that the expected output is the exact one. Votes that add up to less than 2^-20 of their magnitudes
count as 0: bf16 deltas with commensurate weights tie exactly, and rounding would decide.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from itertools import combinations
from operator import iadd

import numpy as np

from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.safetensors_io import (
    PIECE,
    STORAGE,
    all_finite,
    decode,
    decode_pairs,
    encode,
    encode_at_random,
    encode_pairs,
    read_bits,
)
from lmolt.merging.settings import Recipe
from lmolt.merging.trim import Bracket, Trim, radix_select

TIE = 2.0**-20  # of the votes' magnitudes; float32 sums of a few are off by 2^-23
INTEGERS, SIGN = {4: np.int32, 8: np.int64}, {np.int32: -(1 << 31), np.int64: -(1 << 63)}  # and the sign bit alone
SMALL = 2.0**15  # in the range of each type
FITTED = 8  # one piece in so many is looked at for what was stored


# --- formulas, on flat arrays of one working type


def slerp_coefficients(dots: np.ndarray, t: float, threshold: float = 0.9995) -> tuple[float, float, bool]:
    """Factors of the two *unnormalised* tensors, and whether they are linear's; `dots` (2, 2): inner products."""
    norms = [norm if norm > 1e-8 else 1.0 for norm in np.sqrt(np.diag(dots)).tolist()]
    cosine = min(1.0, max(-1.0, float(dots[0, 1]) / (norms[0] * norms[1])))
    if abs(cosine) > threshold:
        return 1 - t, t, True
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta), False


def weighted_sum(values: list[np.ndarray], factors: list[float]) -> np.ndarray:
    """sum_i f_i x_i, added in order; the values are overwritten."""
    for value, factor in zip(values, factors, strict=True):
        value *= value.dtype.type(factor)
    return reduce(iadd, values)


def fused_sum(values: list[np.ndarray], factors: list[float]) -> np.ndarray:
    """The same in float32 as torch's `addcmul_` has it: multiplied and added with one rounding, here by float64."""
    total = np.zeros_like(values[0])
    for value, factor in zip(values, factors, strict=True):
        total = (value * np.float64(np.float32(factor)) + total).astype(np.float32)
    return total


def elect(
    deltas: list[np.ndarray], weights: list[float], normalize: bool, scale: float, rounded=lambda x: x, exact=True
) -> tuple[np.ndarray, int]:
    """TIES' last two steps on trimmed deltas, which it overwrites: what is added to the base, and how many conflicts.

    `rounded` is applied after every step; where not `exact`, ties are what rounding makes of them. Votes are turned so
    that the elected sign is +: agreeing ones are then > 0.

    Two deltas of three values at 0.95 and 0.05, normalised; the first and the last are conflicts:

        deltas    0.2   -0.4    0.3        -0.2   -0.1   -6.0
        votes     0.19  -0.38   0.285      -0.01  -0.005 -0.3
        sum       0.18  -0.385 -0.015      elected: + - -
        added     0.2   -0.385 -6.0        the agreeing votes' sum over their weights': 0.19 / 0.95, -0.385, -0.3 / 0.05
    """
    number, integer = deltas[0].dtype.type, INTEGERS[deltas[0].itemsize]
    weights = [rounded(np.array([weight], number))[0] for weight in weights]
    votes = [rounded(np.multiply(delta, weight, out=delta)) for delta, weight in zip(deltas, weights, strict=True)]
    elected = rounded(sum(votes[1:], start=votes[0])) if len(votes) > 1 else votes[0].copy()
    if len(votes) > 1 and exact:
        settle_ties(elected, votes, max(range(len(votes)), key=lambda index: abs(weights[index])))
    elected = elected.view(integer)
    elected &= SIGN[integer]
    zeros, conflict = _zeros(votes[0].size, number), None
    for vote in votes:
        turned = vote.view(integer)
        turned ^= elected
        conflict = vote < 0 if conflict is None else np.logical_or(conflict, vote < 0, out=conflict)
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


@lru_cache(maxsize=4)
def _zeros(size: int, number: type) -> np.ndarray:  # of a whole piece, and of a tensor's last
    return np.zeros(size, number)


def settle_ties(elected: np.ndarray, votes: list[np.ndarray], largest: int) -> None:
    """Turn those of the votes' sums, `elected`, to + that are a tie, or what rounding left of one.

    In a tie all votes together are at most twice those without any one of them (here the `largest`), so twice the norms
    of the others: mostly no negative sum is as near to 0 as that allows, which one look at the bits tells.
    """
    others = [vote for index, vote in enumerate(votes) if index != largest]
    reach = TIE * (2.2 * sum(math.sqrt(np.dot(vote, vote)) for vote in others) + 1e-15)  # squares may underflow
    integer = INTEGERS[elected.itemsize]
    nearest = int(elected.view(integer).min()) - SIGN[integer]  # the magnitude's bits, if it is negative
    if nearest <= int(np.array(reach, elected.dtype).view(integer)):
        near = np.flatnonzero((elected < 0) & (elected >= -reach))
        elected[near] += elected.dtype.type(TIE) * sum(np.abs(vote[near]) for vote in votes)


# --- one tensor, streamed


def copy_tensor(entry, write: Callable[[np.ndarray], None]) -> dict:
    """A buffer, as it is stored in the first model."""
    for bits in read_bits(entry.file, STORAGE[entry.dtype], entry.offset, entry.size):
        write(bits)
    return {"size": entry.size, "copied": True}


class Work:
    """How a tensor is worked on: the `type`, and in which order a piece's values lie.

    Where all is bf16 and nothing depends on the order, the values at even places come first, which is less work.
    """

    def __init__(self, name: str, sources: list[Checkpoint], recipe: Recipe, dtype: str):
        kinds = {dtype, *(source.entries[name].dtype for source in sources)}
        self.name, self.dtype, self.exact = name, dtype, recipe.rounding != "mergekit"
        self.type = np.float64 if self.exact and "F32" in kinds else np.float32
        self.pairs = kinds == {"BF16"} and recipe.rounding == "once" and recipe.method != "dare_ties"

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """What is applied after every step."""
        return values if self.exact else decode(encode(values, self.dtype), self.dtype)

    def load(self, bits: np.ndarray, dtype: str) -> np.ndarray:
        if self.pairs and dtype == "BF16":
            return decode_pairs(bits)
        values = decode(bits, dtype, self.type)
        if not self.pairs:
            return values
        return np.concatenate([values[::2], values[1::2], np.zeros(values.size % 2, self.type)])

    def store(self, values: np.ndarray, size: int) -> np.ndarray:
        """Rounded to the nearest, in their own order; `size` of them."""
        return encode_pairs(values, size) if self.pairs else encode(values, self.dtype)

    def pieces(self, sources: list[Checkpoint], read=None) -> Iterator[tuple[np.ndarray, ...]]:
        """A piece of each of the sources, again and again; `read(source)` gives its stored bits."""
        read = read or (lambda source: source.bits(self.name))
        loaded = lambda source: (self.load(bits, source.entries[self.name].dtype) for bits in read(source))
        return zip(*map(loaded, sources), strict=True)


def look(name: str, models: list[Checkpoint], base: Checkpoint | None, recipe: Recipe, dtype: str, read=None) -> list:
    """What has to be known of the whole tensor before its first value is merged, in a reading of its own.

    SLERP, nuslerp: [inner products (2, 2) of the models, or of their deltas]; TIES: for each model its threshold and
    how many of the values equal to it stay; DARE: the factor of what stays; otherwise []. `read(source)` gives a
    source's stored pieces, the first time perhaps on the way of another reading.
    """
    sources = [*models, base] if base else models
    work = Work(name, sources, recipe, dtype)
    if recipe.method in ("slerp", "nuslerp"):
        dots = np.zeros((2, 2))
        for pieces in work.pieces(sources, read):
            vectors = [np.subtract(piece, pieces[2], out=piece) for piece in pieces[:2]] if base else pieces
            add_inner_products(dots, vectors)
        return [dots]
    if recipe.method not in ("ties", "dare_ties"):
        return []

    def magnitudes(read, *models: Checkpoint) -> Iterator[list[np.ndarray]]:
        for *values, origin in work.pieces([*models, base], read):
            deltas = [work.rounded(np.subtract(value, origin, out=value)) for value in values]
            yield [np.abs(delta, out=delta) for delta in deltas]

    size, densities = models[0].entries[name].size, recipe.density_of(name)
    found: list = [None] * len(models)
    thin = [index for index, density in enumerate(densities) if density < 1 and size]
    if recipe.method == "dare_ties":
        for index in thin:
            total = kept = 0.0
            mask = dare_mask(name, index, size, densities[index], recipe.seed)
            for (piece,), stays in zip(magnitudes(read, models[index]), mask, strict=True):
                total += float(piece.sum(dtype=np.float64))
                kept += float(piece.sum(dtype=np.float64, where=stays))
            sums = work.rounded(np.array([total, kept], work.type))
            found[index] = work.rounded(sums[:1] / sums[1:])[0] if min(total, kept) >= 1e-7 else work.type(1)
    elif thin:
        brackets, origin = [], base.sample(name, work.type)
        for index in thin:
            sample = np.abs(work.rounded(models[index].sample(name, work.type) - origin))
            brackets.append(Bracket(sample, max(1, int(densities[index] * size)), size))
        for pieces in magnitudes(read, *(models[index] for index in thin)):
            for bracket, piece in zip(brackets, pieces, strict=True):
                bracket.add(piece)
        for index, bracket in zip(thin, brackets, strict=True):
            again = lambda index=index: (piece for (piece,) in magnitudes(None, models[index]))
            found[index] = bracket.threshold() or radix_select(again, bracket.k)
    return found


def merge_tensor(
    name: str,
    models: list[Checkpoint],
    base: Checkpoint | None,
    recipe: Recipe,
    dtype: str,
    write: Callable[[np.ndarray], None],
    reference: Checkpoint | None = None,
    known: list | None = None,
) -> dict:
    """Merge one tensor, `write` its encoded pieces, and return what became of it; `known` is what `look` found.

    The record: `size`, `inner` (inner products of the inputs, or of their deltas from the base, and last of what they
    became, before it is rounded), `linear` (SLERP fell back), `conflicts` (values whose kept votes disagree in sign),
    and of one piece in `FITTED` what was stored: `fit`, the inner products of the models' deltas (from the base, from
    `reference`, or else from the first model) and last of the stored values', `looked` at values, and how many are
    `equal` to the first model's bit for bit; `shares`, the weights that were asked for.
    """
    sources = [*models, base] if base else models
    work = Work(name, sources, recipe, dtype)
    known = look(name, models, base, recipe, dtype) if known is None else known
    store = work.store
    if recipe.rounding == "stochastic":
        chance = np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), 1 << 20])
        store = lambda values, size: encode_at_random(values, dtype, chance)
    weights, shares = recipe.weights_of(name), recipe.shares_of(name)
    record = {"size": models[0].entries[name].size, "shares": shares}
    inner, finite = np.zeros((len(models) + 1, len(models) + 1)), True

    whole, bound = 1.0, math.inf  # how much of a common origin the output has; what no value of it is beyond
    if base and recipe.method in ("ties", "dare_ties"):
        combine = ties_combiner(name, known, recipe, work, record, inner)
    elif base:
        combine = delta_combiner(name, known, recipe, work, record, inner)
    elif recipe.method in ("slerp", "nuslerp"):
        inner[:2, :2] = known[0]
        threshold = 0.9995 if recipe.method == "slerp" else 1 - 1e-15
        *factors, record["linear"] = slerp_coefficients(inner[:2, :2], shares[1], threshold)
        combine, whole = (lambda pieces: weighted_sum(pieces, factors)), sum(factors)
        record["factors"] = list(factors)
        bound = float(np.abs(factors) @ np.sqrt(np.diag(known[0])))  # no value is larger than its tensor's norm
    else:
        factors, whole = shares, sum(shares)

        def combine(pieces):
            add_inner_products(inner, pieces)
            if not work.exact:
                number = work.type
                return fused_sum(pieces, weights) / (sum(map(number, weights)) if recipe.normalize else number(1))
            return weighted_sum(pieces, factors)

    fit = Fit(len(models) - (0 if base or reference else 1), work)
    origins = work.pieces([reference]) if reference and not base else None
    for index, pieces in enumerate(work.pieces(sources)):
        (origin,) = next(origins) if origins else (None,)
        seen = [piece.copy() for piece in pieces] if index % FITTED == 0 else None
        stored = store(combine(list(pieces)), min(PIECE, record["size"] - index * PIECE))
        finite = finite and (bound < SMALL or all_finite(stored, dtype))
        write(stored)
        if seen:
            fit.add(seen[: len(models)], seen[-1] if base else origin, stored, whole)
    if not finite:
        raise ValueError(f"{name}: the merged values leave the range of {dtype}; take another --dtype or other weights")
    if not np.isfinite(inner).all():
        raise too_large(name)
    if not base:  # the output is a sum of the inputs, and so are its inner products
        inner[-1] = [*factors, 0] @ inner
        inner[:, -1] = inner @ [*factors, 0]
    return {**record, **fit.record(), "inner": inner.tolist()}


def too_large(name: str) -> ValueError:
    return ValueError(
        f"{name} holds values beyond 1e19, whose squares leave float32; a model that holds such is broken"
    )


class Fit:
    """What was stored, on some pieces: inner products of deltas with the stored values', values equal to the first."""

    def __init__(self, count: int, work: Work):
        self.products, self.equal, self.looked, self.work = np.zeros((count + 1, count + 1)), 0, 0, work

    def add(self, models: list, origin: np.ndarray | None, stored: np.ndarray, whole: float) -> None:
        """`origin` None: the first model is the origin. `whole`: how much of it the output has."""
        values = self.work.load(stored, self.work.dtype)
        if self.work.pairs:  # as many bits as are stored: no need to store the model's again
            same = values.view(np.uint32) == models[0].view(np.uint32)
            self.equal += int(np.count_nonzero(same)) - stored.size % 2  # less the 0 at the end of both
        else:
            bits = f"u{stored.itemsize}"
            self.equal += int(np.count_nonzero(stored.view(bits) == self.work.store(models[0], stored.size).view(bits)))
        self.looked += stored.size
        if origin is None:
            origin, models = models[0], models[1:]
        vectors = [np.subtract(model, origin) for model in models]
        values -= origin if whole == 1 else origin * self.work.type(whole)
        add_inner_products(self.products, vectors, values)

    def record(self) -> dict:
        return {"fit": self.products.tolist(), "equal": self.equal, "looked": self.looked}


def delta_combiner(name, known, recipe, work, record, inner):
    """The function that adds a sum of deltas to the base: task arithmetic, or SLERP of two task vectors."""
    factors, rounded, number = recipe.shares_of(name), work.rounded, work.type
    if recipe.method == "nuslerp":
        *factors, record["linear"] = slerp_coefficients(known[0], factors[1], 1 - 1e-15)
    elif recipe.normalize:
        total = sum(factors)
        factors = [factor / (total if abs(total) >= 1e-8 else 1) for factor in factors]

    def combine(pieces):
        *values, origin = pieces
        deltas = [rounded(np.subtract(value, origin, out=value)) for value in values]
        if recipe.rounding == "mergekit" and recipe.method == "task_arithmetic":
            weights = recipe.weights_of(name)
            stored = [rounded(np.array([weight], number))[0] for weight in weights]
            kept = [rounded(delta * weight) for delta, weight in zip(deltas, stored, strict=True)]
            added = rounded(sum(kept[1:], start=kept[0].copy()))
            if recipe.normalize:
                total = rounded(np.array([sum(stored)], number))[0]
                added = rounded(added / (total if abs(total) >= 1e-8 else number(1)))
        else:
            added = weighted_sum([delta.copy() for delta in deltas], factors)
        if recipe.scale != 1:
            added = rounded(added * number(recipe.scale))
        add_inner_products(inner, deltas, added)
        added += origin
        return added

    return combine


def dare_mask(name: str, index: int, size: int, density: float, seed: int) -> Iterator[np.ndarray]:
    """Which of the model number `index`'s deltas DARE keeps, in pieces as a checkpoint reads them: seeded."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
    for start in range(0, size, PIECE):
        yield random.random(min(PIECE, size - start), np.float32) < density


def ties_combiner(name, known, recipe, work, record, inner):
    """The function that turns a piece of every model and the base into the merged one by TIES or DARE-TIES.

    It counts in `record` and `inner` as it goes (see merge_tensor).
    """
    rounded, exact = work.rounded, work.exact
    trims: list = [found and Trim(*found, work.pairs) for found in known] if recipe.method == "ties" else []
    for index, factor in enumerate(known if recipe.method == "dare_ties" else []):
        left = dare_mask(name, index, record["size"], recipe.density_of(name)[index], recipe.seed)
        kept = lambda delta, left=left, factor=factor: rounded(delta * (next(left) * factor))
        trims.append(kept if factor is not None else None)
    weights, record["conflicts"] = recipe.weights_of(name), 0

    def combine(pieces):
        *values, origin = pieces
        deltas = [rounded(np.subtract(value, origin, out=value)) for value in values]
        kept = [trim(delta) if trim else delta.copy() for delta, trim in zip(deltas, trims, strict=True)]
        added, conflicts = elect(kept, weights, recipe.normalize, recipe.scale, rounded, exact)
        record["conflicts"] += conflicts
        add_inner_products(inner, deltas, added)
        added += origin
        return added

    return combine


def add_inner_products(total: np.ndarray, vectors, result: np.ndarray | None = None) -> None:
    """Add each pair's inner product to the symmetric `total`; `result`'s with each to the last row, not its own."""
    for i, x in enumerate(vectors):
        for j, y in enumerate(vectors[: i + 1]):
            total[i, j] = total[j, i] = total[i, j] + float(np.dot(x, y))
        if result is not None:
            total[i, -1] = total[-1, i] = total[i, -1] + float(np.dot(x, result))


def effective_weights(inner: np.ndarray) -> list[float] | None:
    """Least squares of the output (last row) on the inputs: what the merge made of the weights that were asked for.

    None where two inputs are parallel, or one is zero: then nothing tells their weights apart.
    """
    norms = np.sqrt(np.diag(inner)[:-1])
    if not norms.all() or any(1 - abs(cosine) < 1e-9 for cosine in cosines(inner)):
        return None
    return np.linalg.lstsq(inner[:-1, :-1], inner[:-1, -1], rcond=1e-12)[0].tolist()


def cosines(inner: np.ndarray) -> list[float]:
    """Cosine of each pair of inputs, (0, 1), (0, 2), ..., (1, 2), ...; 0 where one of them is all zero."""
    norms = np.sqrt(np.diag(inner))
    pairs = combinations(range(len(inner) - 1), 2)
    return [float(inner[i, j] / (norms[i] * norms[j])) if norms[i] * norms[j] else 0.0 for i, j in pairs]
