"""Check a merged folder: SHA-256 of its files, and a sample of tensors worked out again by the plain formulas.

Plain: the whole tensor at once in float64, sorted where the merge itself streams, selects and counts bits.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmolt.merging.methods import Recipe
from lmolt.merging.safetensors_io import Checkpoint

LARGEST = 1 << 25  # values: 256 MiB in float64, of which a few copies are held
MIDPOINT = 0.501  # units in the last place: weights like 0.95 put many values on exact midpoints


def plain(recipe: Recipe, name: str, sources: list[Checkpoint], base: Checkpoint | None) -> np.ndarray | None:
    """One tensor, flat, float64, as merging/methods.py's docstring writes it. None for DARE, whose mask is random."""
    weights, models = recipe.weights_of(name), [whole(source, name) for source in sources]
    if recipe.method == "linear":
        return sum(w * x for w, x in zip(weights, models, strict=True)) / (sum(weights) if recipe.normalize else 1)
    if recipe.method == "slerp":
        t, (x0, x1) = weights[1] / sum(weights), models
        norms = [norm if norm > 1e-8 else 1 for norm in (np.linalg.norm(x0), np.linalg.norm(x1))]
        cosine = np.clip(x0 @ x1 / norms[0] / norms[1], -1, 1)
        if abs(cosine) > 0.9995:
            return (1 - t) * x0 + t * x1
        theta = np.arccos(cosine)
        return (np.sin((1 - t) * theta) * x0 + np.sin(t * theta) * x1) / np.sin(theta)
    if recipe.method == "dare_ties":
        return None
    votes, origin = [], whole(base, name)
    for x, w, density in zip(models, weights, recipe.density, strict=True):
        delta = x - origin
        first = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(density * delta.size))]
        kept = np.zeros_like(delta)
        kept[first] = delta[first]
        votes.append(w * kept)
    elected = np.where(sum(votes) >= 0, 1, -1)
    masks = [np.sign(vote) == elected for vote in votes]
    total = sum(vote * mask for vote, mask in zip(votes, masks, strict=True))
    if recipe.normalize:
        divisor = sum(w * mask for w, mask in zip(weights, masks, strict=True))
        total = total / np.where(divisor == 0, 1, divisor)
    return origin + recipe.scale * total


def whole(source: Checkpoint, name: str) -> np.ndarray:
    """A tensor, flat, in float64."""
    return np.concatenate(list(source.read(name, np.float64)))


def units_apart(values: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """|values - exact| in units in the last place of `dtype` at the exact value."""
    digits, smallest = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}[dtype]
    exponent = np.maximum(np.frexp(exact)[1] - digits, smallest)
    return np.ldexp(np.abs(values - exact), -exponent)


def verify(
    folder: Path, lineage: dict, formula: Callable[[str], np.ndarray | None], count: int = 8, seed: int = 0
) -> dict[str, float]:
    """Compare `folder`'s files with their SHA-256 in `lineage`, and `count` tensors with `formula(name)`.

    Returns the share of each such tensor's values that lie more than half a unit in the last place off.
    `ValueError` where a file or more than 0.1 % of a tensor's values differ (10 % if rounded after every step).
    """
    for name, digest in lineage["outputs"].items():
        with (folder / name).open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise ValueError(f"{folder / name} is not what was written (its SHA-256 differs); merge again")
    merged = Checkpoint(folder)
    allowed = 0.1 if lineage["arguments"]["rounding"] == "mergekit" else 0.001
    folded = bool(lineage["arguments"]["adapter"])
    small = sorted(name for name, entry in merged.entries.items() if 0 < entry.size <= LARGEST)
    shares = {}
    for name in random.Random(seed).sample(small, min(count, len(small))):
        exact = formula(name)
        if exact is None:
            continue
        values = whole(merged, name)
        dtype = merged.entries[name].dtype
        units = 1024 if folded and dtype == "F32" else MIDPOINT  # PEFT, and so we, multiply in float32
        off = units_apart(values, exact, dtype) > units
        shares[name] = float(off.mean())
        if shares[name] > allowed:
            first = int(off.argmax())
            raise ValueError(
                f"{folder}: {name}: {shares[name]:.2%} of its values are not the formula's, such as {values[first]} "
                f"for {exact[first]} at {first}; the inputs or the output changed: merge again"
            )
    return shares
