"""Every metric of both directions, with its interval and the convention it holds under (docs/metrics.md)."""

from lmolt.metrics.scoring import METRICS, compare, score

__all__ = ["METRICS", "compare", "score"]
