"""Figures and what the page keeps: on one value, long tails, undefined scores, odd outputs."""

import io
import resource
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lmolt.report import figures, page, report

PNG = b"\x89PNG\r\n\x1a\n"


def test_distributions_of_one_value_of_long_tails_and_with_undefined_scores():
    panels = [
        ("a", "length", {"x": np.array([3.0]), "y": np.array([np.nan, 3.0])}),
        ("b", "length", {"x": np.r_[np.zeros(500), 1e7], "y": np.arange(-50.0, 50)}),
        ("c", "share", {"x": np.array([0.0, 1.0])}),
    ]
    assert figures.distributions(panels).startswith(PNG)
    edges, outside = figures._bins(panels[1][2]["x"])
    assert edges[0] < 0 < edges[-1] and outside == pytest.approx(1 / 501)
    assert not np.isin(0, edges)  # zero is the middle of a bin


def test_cross_wins_count_strict_wins_and_undefined_loses():
    runs = [
        report.Run("a", Path(), {}, scores={"cap2mol": {"chrf": np.array([0.5, 0.5, 1.0, np.nan])}}),
        report.Run("b", Path(), {}, scores={"cap2mol": {"chrf": np.array([0.4, 0.5, np.nan, np.nan])}}),
    ]
    assert report.cross_wins(runs, "cap2mol", "chrf").tolist() == [[0, 0.5], [0, 0]]


def test_words_that_the_reference_lacks_whatever_their_order():
    marked = figures.unsupported("It impacts aging, and asthma.", "Asthma and (aging) and gout")
    assert marked == [("Asthma", False), ("and", False), ("(aging)", False), ("and", False), ("gout", True)]


def test_case_studies_of_odd_outputs():
    odd = {"none": ("", ""), "invalid": ("C1CC", "x"), "long": ("C" * 5000, ""), "same": ("c1ccccc1O", "$x$ \\alpha")}
    case = {"label": "id $1$", "molecule": "c1ccccc1O", "reference": "c1ccccc1O", "outputs": odd}
    assert figures.molecule_cases([case, case]).startswith(PNG)
    captions = {"none": ("", ""), "markup": ("<b>$\\frac{$ </b>", ""), "long": ("word " * 1000 + "x" * 10_000, "")}
    assert figures.caption_cases([case | {"reference": "a phenol", "outputs": captions}]).startswith(PNG)
    assert figures.draw("not a molecule") is None and figures.draw("") is None


def test_atoms_that_differ_from_the_reference_are_marked():
    def orange(png):
        pixels = plt.imread(io.BytesIO(png))[..., :3]  # (height, width, RGB)
        return int((np.abs(pixels - [0.96, 0.72, 0.5]).max(-1) < 0.05).sum())

    assert orange(figures.draw("c1ccccc1O", "c1ccccc1O")) == 0
    assert orange(figures.draw("c1ccccc1OC", "c1ccccc1O")) > 100


def test_a_large_evaluation_keeps_the_worst_and_the_best_of_each_system():
    rows = [{"id": str(i), "scores": [[float(i)], [float(-i)], [None]]} for i in range(1000)]
    part = {"rows": rows, "systems": ["a", "b", "c"], "measures": [["chrf", "Chr-F", 1]]}
    kept = [int(row["id"]) for row in page._kept(part, 60)]
    assert kept == sorted(kept) and len(kept) <= 60
    assert {0, 1, 9, 990, 999} <= set(kept)


def test_a_file_that_the_disk_cannot_take_is_named_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="report.md"):
            report.write_whole(tmp_path / "report.md", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
