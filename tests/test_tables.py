"""Tables: what is bold, what differs, what is absent, and three ways of printing."""

import csv

from lmolt.prompts import CAP2MOL, MOL2CAP
from lmolt.report import report, tables


def entry(value, convention="exact"):
    return {"value": value, "ci95": [value - 0.01, value + 0.01], "n": 10, "convention": convention}


def record(direction, metrics, counts=None, **more):
    return {"directions": {direction: {"n": 10, "counts": counts or {}, "metrics": metrics}}} | more


RECORDS = {
    "T5 & co": record(
        CAP2MOL, {"bleu": entry(0.5), "fcd_1_1": entry(3.0), "delta_len": entry(-4.0), "extra": entry(0.1)}
    ),
    "cpo_1": record(
        CAP2MOL, {"bleu": entry(0.5004), "fcd_1_1": entry(2.0), "delta_len": entry(5.0), "chrf": {"absent": "x"}}
    ),
    "other": record(MOL2CAP, {"bleu2": entry(0.3)}),
}


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_the_best_is_bold_whichever_way_is_better_and_ties_share_it():
    table = tables.results_table(2, RECORDS, CAP2MOL)
    assert table.columns == ["System", "BLEU ↑", "FCD ↓", "Δ length → 0"]
    assert texts(table) == [["T5 & co", "0.500", "3.00", "−4.0"], ["cpo_1", "0.500", "2.00", "5.0"]]
    assert [[cell.bold for cell in row] for row in table.rows] == [
        [False, True, False, True],
        [False, True, True, False],
    ]
    assert table.rows[0][1].small == "[0.490, 0.510]"
    assert "Absent: Exact, Levenshtein, Validity" in table.note


def test_differences_from_a_baseline_and_what_is_significant():
    tests = {("cpo_1", "fcd_1_1"): {"p_holm": 0.04}, ("cpo_1", "bleu"): {"p_holm": 0.06}}
    table = tables.results_table(4, RECORDS, CAP2MOL, "T5 & co", tests)
    assert [cell.small for cell in table.rows[0]] == ["", "", "", ""]
    assert [cell.small for cell in table.rows[1]] == ["", "(0.000)", "(−1.00†)", "(+9.0)"]
    assert "paired bootstrap" in table.note and "Not tested: Δ length." in table.note


def test_one_system_says_interval_n_convention_and_why_something_is_absent():
    metrics = {"bleu2": entry(0.5, "NLTK"), "meteor": {"absent": "no WordNet"}}
    metrics["nli_entailment"] = {
        "value": 0.25,
        "ci95": None,
        "ci95_absent": "one row",
        "n": 1,
        "convention": "DeBERTa",
    }
    table = tables.metrics_table("s", record(MOL2CAP, metrics, {"empty_prediction": 3, "blank_line": 0}), MOL2CAP)
    assert texts(table) == [
        ["BLEU-2 (bleu2)", "0.500", "0.490 to 0.510", "10", "NLTK"],
        ["METEOR (meteor)", "absent", "", "", "no WordNet"],
        ["Entailment (nli_entailment)", "0.250", "–", "1", "DeBERTa; no interval: one row"],
    ]
    assert table.note == "10 examples; counted: 3 empty prediction."
    screen = tables.without_conventions(table)
    assert screen.columns == ["Metric", "Value", "95 % interval", "n"]
    assert screen.note.endswith("Absent: METEOR (meteor) (no WordNet).")


def test_further_metrics_and_efficiency():
    assert texts(tables.further_table(7, RECORDS, CAP2MOL)) == [["extra", "0.100", "–"]]
    assert tables.further_table(6, RECORDS, MOL2CAP) is None
    assert tables.efficiency_table(5, RECORDS) is None
    run = {"wall_seconds": 7200, "tokens": 2_500_000, "gpu_energy_joules": None}
    table = tables.efficiency_table(5, {"cpo": record(CAP2MOL, {}, efficiency=run)})
    assert texts(table) == [["cpo", "2", "2.5", "–", "–", "–", "–", "–", "–"]]


def test_markdown_csv_latex():
    table = tables.Table(
        "t", "A | B", ["System", "x ↑"], [[tables.Cell("<b>|\n50%"), tables.Cell("−1.0", "[−2, 0]", -1.0, True)]]
    )
    assert tables.to_markdown(table) == (
        "**A \\| B**\n\n| System       |              x ↑ |\n| :----------- | ---------------: |\n"
        "| &lt;b>\\| 50% | **−1.0** [−2, 0] |\n"
    )
    assert list(csv.reader(tables.to_csv(table).splitlines(keepends=True))) == [
        ["System", "x", "x in brackets"],
        ["<b>|\n50%", "-1.0", "[−2, 0]"],
    ]
    latex = tables.to_latex(table)
    assert r"System & x $\uparrow$ \\" in latex
    assert (
        r"\textless{}b\textgreater{}\textbar{}" in latex
        and r"50\% & \textbf{$-$1.0} {\scriptsize [$-$2, 0]} \\" in latex
    )


def test_no_negative_zero():
    assert [tables.shown(v, 2) for v in (-0.001, 0.0, -0.01, 12.345)] == ["0.00", "0.00", "−0.01", "12.35"]


def test_names_are_inert_in_markdown_and_in_spreadsheets():
    name = "![x](http://a) **b** <script>`c` _d_ a_b |"
    assert tables.escaped(name) == "![x\\](http://a) \\*\\*b\\*\\* &lt;script>\\`c\\` \\_d\\_ a_b \\|"
    table = tables.Table("t", "T", ["System", "x"], [[tables.Cell("=1+1"), tables.Cell("−1.0", "", -1.0)]])
    assert tables.to_csv(table) == "System,x\n'=1+1,-1.0\n"


def test_numbers_of_unlike_conventions_stand_apart():
    entries = {"a": entry(0.5, "pieces of SciBERT; first 512"), "b": entry(0.7, "plain words; first 512")}
    records = {name: record(MOL2CAP, {"bleu2": found, "rouge1": entry(0.3)}) for name, found in entries.items()}
    differ = report.unlike(records, MOL2CAP)
    assert differ == {"bleu2": "pieces of SciBERT against plain words"}
    table = tables.results_table(3, records, MOL2CAP, "a", {}, differ)
    assert [cell.bold for row in table.rows for cell in row] == [False, False, True, False, False, True]
    assert "Not evaluated" not in table.note
    records["c"] = record(CAP2MOL, {})
    assert " in this direction: c." in tables.results_table(3, records, MOL2CAP, "a", {}, differ).note
    assert table.rows[1][1].small == "" and "BLEU-2 was scored under several conventions" in table.note


def test_ties_at_zero_are_not_bold_and_stems_stand_in_for_an_absent_meteor():
    records = {n: record(MOL2CAP, {"bleu2": entry(0.0), "meteor_stem": entry(0.4)}) for n in ("a", "b")}
    table = tables.results_table(1, records, MOL2CAP)
    assert table.columns == ["System", "BLEU-2 ↑", "METEOR (stems) ↑"] and not table.rows[0][1].bold
    assert "METEOR," not in table.note
    records["a"]["directions"][MOL2CAP]["metrics"]["meteor"] = entry(0.6)
    assert tables.results_table(1, records, MOL2CAP).columns == ["System", "BLEU-2 ↑", "METEOR ↑"]
    assert texts(tables.further_table(6, records, MOL2CAP)) == [["METEOR (stems) (meteor_stem)", "0.400", "0.400"]]
