"""What a metric is: declared once, beside the function that computes it.

A new metric is one more `Metric` in its file's tuple, and its column among those that the file returns. Scores, tables,
reports, cards (through metrics.json) and the documentation's test read the declaration.
"""

from collections.abc import Callable
from typing import NamedTuple

NOT_COMPARABLE = "NOT comparable with published numbers"  # in a convention under which a number is not


class Metric(NamedTuple):
    key: str
    label: str  # of the tables
    better: int  # 1: larger, -1: smaller, 0: nearer to zero
    convention: str  # what a number is comparable under, with {settings} of the run
    decimals: int = 3
    undefined: str = "undefined in all rows"  # why there is no value where no row defines one
    paper: bool = False  # a column of the paper's tables
    instead_of: str = ""  # a column of them where this one is absent
    columns: tuple[str, ...] = ()  # per-example columns (n,) whose sums define it; none: the mean of the column `key`
    value: Callable | None = None  # of the sums of `columns`, (..., k) -> (...,)
