"""Bootstrap, paired test and Holm's correction against plain loops and textbook values."""

import time

import numpy as np
import pytest

from lmolt.metrics import caption, ngrams, statistics


def test_bootstrap_equals_a_plain_loop_over_resampled_examples():
    rng = np.random.default_rng(1)
    sides = [[rng.integers(0, 4, rng.integers(1, 9)).tolist() for _ in range(30)] for _ in range(2)]
    columns = caption.bleu_columns(*map(ngrams.flatten, sides))
    table = np.stack([columns[name] for name in caption.BLEU_COLUMNS], 1)
    scores = rng.normal(size=30)
    scores[3] = np.nan
    own = {"bleu": (table, caption.bleu_of_sums), "mean": statistics.mean(scores)}
    found = statistics.bootstrap(own, 50, seed=7)
    picks = np.random.default_rng(7).integers(0, 30, (50, 30))
    for b, rows in enumerate(picks):
        resampled = caption.bleu_columns(*(ngrams.flatten([side[i] for i in rows]) for side in sides))
        sums = np.array([resampled[name].sum() for name in caption.BLEU_COLUMNS])
        assert found["bleu"][b] == pytest.approx(caption.bleu_of_sums(sums), abs=1e-12)
        assert found["mean"][b] == pytest.approx(np.nanmean(scores[rows]))


def test_interval_covers_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        samples = statistics.bootstrap({"m": statistics.mean(rng.exponential(size=80))}, 300, trial)["m"]
        low, high = statistics.interval(samples)
        covered += low <= 1 <= high
    assert 0.88 < covered / 300 < 0.98
    assert statistics.interval(np.array([np.nan])) is None


def test_p_value():
    assert statistics.p_value(np.ones(999)) == pytest.approx(2 / 1000)
    assert statistics.p_value(np.zeros(99)) == 1
    assert statistics.p_value(np.array([-1.0] * 10 + [1.0] * 89)) == pytest.approx(2 * 11 / 100)
    assert np.isnan(statistics.p_value(np.array([np.nan])))


def test_holm():
    # Holm (1979): sorted p times m, m - 1, ..., made monotone.
    found = statistics.holm([0.01, 0.04, 0.03, np.nan, 0.005])
    assert found[[4, 0, 2, 1]] == pytest.approx([0.02, 0.03, 0.06, 0.06]) and np.isnan(found[3])
    assert statistics.holm([0.9, 0.8]).tolist() == [1, 1]


def test_a_thousand_resamples_of_3300_examples_take_a_moment():
    table = np.random.default_rng(0).random((3300, 40))
    start = time.process_time()
    statistics.resampled_sums(table, 1000, 0)
    assert time.process_time() - start < 3  # 0.15 s on an idle core


def test_ngram_keys_stay_exact_with_a_large_vocabulary():
    rng = np.random.default_rng(0)
    sides = [[(rng.integers(0, 3, 20) * 10**12).tolist() + [10**15 + i] for i in range(40)] for _ in range(2)]
    matches, *_ = ngrams.overlap(*map(ngrams.flatten, sides), 6)
    for i in range(40):
        for order in range(1, 7):
            grams = [[tuple(s[i][k : k + order]) for k in range(22 - order)] for s in sides]
            shared = sum(min(grams[0].count(g), grams[1].count(g)) for g in set(grams[0]))
            assert matches[i, order - 1] == shared
