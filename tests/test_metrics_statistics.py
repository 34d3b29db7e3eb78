"""Bootstrap, paired test and Holm's correction against plain loops and textbook values."""

import re
import time
from pathlib import Path

import numpy as np
import pytest

from lmolt.metrics import METRICS, caption, grounding, ngrams, score, statistics


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


def test_intervals_cover_a_skewed_mean_where_percentiles_do_not():
    rng = np.random.default_rng(2)
    covered = np.zeros(2)
    for trial in range(400):
        found = statistics.resample({"m": statistics.mean(rng.lognormal(sigma=1.2, size=60))}, 400, trial)["m"]
        for at, (low, high) in enumerate((statistics.confidence_interval(found), statistics.interval(found.values))):
            covered[at] += low <= np.exp(1.2**2 / 2) <= high
    ours, percentiles = covered / 400
    assert percentiles < 0.89 and 0.91 < ours < 0.96
    assert statistics.interval(np.array([np.nan])) is None


def test_the_standard_error_is_the_means_own_and_equal_rows_have_none():
    scores = np.random.default_rng(3).normal(size=50)
    found = statistics.resample({"m": statistics.mean(scores)}, 200, 0)["m"]
    assert found.error == pytest.approx(scores.std(ddof=1) / np.sqrt(50))
    picks = np.random.default_rng(0).integers(0, 50, (200, 50))
    assert found.errors == pytest.approx(scores[picks].std(axis=1, ddof=0) / np.sqrt(49))
    assert statistics.confidence_interval(statistics.resample({"m": statistics.mean(np.ones(9))}, 20, 0)["m"]) == [1, 1]


@pytest.mark.parametrize(("ones", "n"), [(1, 6), (2, 40), (3, 200), (197, 200), (12, 200)])
def test_a_share_s_interval_stays_between_0_and_1(ones, n):
    """Resamples without a hit have an error of 0 but for rounding, and no t: they once led to millions."""
    scores = np.repeat([1.0, 0.0], [ones, n - ones])
    low, high = statistics.confidence_interval(statistics.resample({"m": statistics.mean(scores)}, 1000, 0)["m"])
    assert 0 <= low < ones / n < high <= 1 and high - low < 0.95


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


def test_shuffled_overlap_equals_the_overlap_of_shuffled_texts():
    rng = np.random.default_rng(3)
    texts = [[rng.integers(0, 4, rng.integers(0, 9)).tolist() for _ in range(12)] for _ in range(2)]
    shuffles = grounding.permutations(12, 5, seed=1)
    found = ngrams.shuffled_overlap(*map(ngrams.flatten, texts), 3, shuffles)
    for s, shuffle in enumerate(shuffles):
        shuffled = [texts[1][j] for j in shuffle]
        assert (found[s] == ngrams.overlap(*map(ngrams.flatten, (texts[0], shuffled)), 3)[0]).all()
    assert ngrams.shuffled_overlap(*map(ngrams.flatten, (texts[0], [[]] * 12)), 2, shuffles).sum() == 0


def test_grounding_is_the_score_less_that_of_shuffled_outputs():
    rng = np.random.default_rng(4)
    references = [" ".join(rng.choice(list("abcdefgh"), 8)) for _ in range(40)]
    predictions = [text[: rng.integers(4, 16)] + " b" for text in references]
    result, per_example = score("mol2cap", [""] * 40, references, predictions, n_shuffles=30, n_bootstrap=100, seed=2)
    shuffles = grounding.permutations(40, 30, seed=2)
    plain = [caption.rouge(references, [predictions[j] for j in shuffle])["rougeL"].mean() for shuffle in shuffles]
    found = result["metrics"]["rougeL_grounding"]
    assert found["shuffled_mean"] == pytest.approx(np.mean(plain)) and found["shuffled_max"] == pytest.approx(
        max(plain)
    )
    assert found["value"] == pytest.approx(result["metrics"]["rougeL"]["value"] - np.mean(plain))
    assert found["p_permutation"] == 1 / 31 and found["ci95"][0] > 0.1
    pooled = [predictions[j] for shuffle in shuffles for j in shuffle]
    all_pairs = score("mol2cap", [""] * 1200, references * 30, pooled, n_shuffles=0, n_bootstrap=2)[0]["metrics"]
    found = result["metrics"]["bleu2_grounding"]
    assert found["shuffled_mean"] == pytest.approx(all_pairs["bleu2"]["value"])
    assert found["value"] == pytest.approx(result["metrics"]["bleu2"]["value"] - found["shuffled_mean"])
    assert "absent" in all_pairs["bleu2_grounding"]


def test_outputs_that_do_not_depend_on_the_source_have_no_grounding():
    references = [f"{word} is the word" for word in ("one", "two", "three", "four")] * 10
    same = score("mol2cap", [""] * 40, references, ["one is a word"] * 40, n_bootstrap=50)[0]["metrics"]
    for key in ("bleu2_grounding", "rougeL_grounding"):
        assert same[key]["value"] == pytest.approx(0, abs=1e-12) and same[key]["p_permutation"] == 1
    smiles = ["C" * n for n in range(1, 31)] + ["C("]
    found = score("cap2mol", [""] * 31, ["C" * n for n in range(31, 0, -1)], smiles, fcd=False)[0]["metrics"]
    assert found["morgan_grounding"]["n"] == 30 and found["morgan_grounding"]["p_permutation"] > 0.05
    own = score("cap2mol", [""] * 31, [*smiles[:30], "C"], smiles, fcd=False)[0]["metrics"]["morgan_grounding"]
    assert own["p_permutation"] == 0.01 and own["value"] == pytest.approx(1 - own["shuffled_mean"])
    assert "absent" in score("cap2mol", [""], ["C"], ["C"], fcd=False)[0]["metrics"]["morgan_grounding"]


def test_a_rows_part_in_the_shuffled_mean():
    """One shuffle: reference i beside prediction shuffles[i]; its own score, its prediction's, less the mean of all."""
    shuffles, pairs = np.array([[1, 2, 0]]), np.array([[1.0, 2.0, 4.0]])
    assert grounding.baseline(pairs, shuffles) == pytest.approx([1 + 4 - 7 / 3, 2 + 1 - 7 / 3, 4 + 2 - 7 / 3])


def test_the_interval_of_grounding_covers_zero_for_outputs_of_other_molecules():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        pairs = (rng.exponential(size=(30, 1)) + 2 * rng.exponential(size=(1, 30))) * rng.random((30, 30))
        shuffles = grounding.permutations(30, 50, trial)
        own = pairs.diagonal() - grounding.baseline(pairs[np.arange(30), shuffles], shuffles)
        low, high = statistics.interval(statistics.bootstrap({"m": statistics.mean(own)}, 200, trial)["m"])
        covered += low <= 0 <= high
    assert 0.90 < covered / 200 < 0.96


def test_each_metric_is_declared_once_documented_and_formats_its_convention():
    document = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    settings = ("pieces", "nli_model", "rdkit", "n_shuffles", "seed", "chrf_threshold", "delta_threshold")
    settings += ("round_trip", "known")
    for metrics in METRICS.values():
        keys = [metric.key for metric in metrics]
        assert len(set(keys)) == len(keys)
        for metric in metrics:
            metric.convention.format(**dict.fromkeys(settings, "x"))
            pattern = re.sub(r"_(precision|recall|f1|accuracy)(_empty0)?$", "_", metric.key)
            assert f"`{metric.key}`" in document or (pattern != metric.key and pattern in document), metric.key
    papers = {direction: [m.label for m in metrics if m.paper] for direction, metrics in METRICS.items()}
    assert papers["mol2cap"][:6] == ["BLEU-2", "BLEU-4", "ROUGE-1", "ROUGE-2", "ROUGE-L", "METEOR"]
    assert [m.key for m in METRICS["cap2mol"] if m.label == "FCD"] == ["fcd_1_1"]
