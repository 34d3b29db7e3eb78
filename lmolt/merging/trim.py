"""TIES' trim: which of a model's deltas are the largest, in one reading or a few, exactly."""

from collections.abc import Callable, Iterator

import numpy as np


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
        self.within: list[np.ndarray] = [sample[:0]]

    def add(self, piece: np.ndarray) -> None:
        self.above += np.count_nonzero(piece > self.high)
        self.at_high += np.count_nonzero(piece == self.high)
        if self.low < self.high:
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
    """One model's deltas, piece after piece, 0 but for the largest; of those equal to the threshold the first stay.

    `pairs`: the values lie as `decode_pairs` has them.
    """

    def __init__(self, threshold: float, ties: int, pairs: bool = False):
        self.threshold, self.ties, self.pairs = threshold, ties, pairs

    def __call__(self, delta: np.ndarray) -> np.ndarray:
        magnitude = np.abs(delta)
        keep = magnitude > self.threshold
        if self.ties:
            equal = magnitude == self.threshold
            count = np.count_nonzero(equal)
            if count > self.ties:
                places, half = np.flatnonzero(equal), equal.size // 2
                if self.pairs:  # those at even places come first
                    places = places[np.argsort(np.where(places < half, 2 * places, 2 * (places - half) + 1))]
                equal[places[self.ties :]] = False
            keep |= equal
            self.ties -= min(count, self.ties)
        kept = keep.view(np.int8).astype(np.int32 if delta.itemsize == 4 else np.int64)
        kept *= delta.view(kept.dtype)  # the bits as an integer, times 0 or 1: what is dropped is +0
        return kept.view(delta.dtype)
