"""Reports: of one evaluated system, or of several side by side (the paper's Tables 1 to 4 and Figures 1 to 4).

A run is a folder that scripts/evaluate.py wrote: `metrics.json`, `predictions.parquet`, `scores.parquet`. A report is
`report.md`, `report.html` (one file that needs nothing else), figures and, of several runs, tables as CSV and LaTeX.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmolt.data.predictions import digest
from lmolt.files import read_table, write_whole
from lmolt.metrics import METRICS, compare
from lmolt.metrics.statistics import holm
from lmolt.prompts import CAP2MOL, DIRECTIONS, MOL2CAP
from lmolt.report import figures, page, tables
from lmolt.report.tables import DIRECTION_NAMES, declared

PRIMARY = {MOL2CAP: ("nli_entailment", "rougeL"), CAP2MOL: ("chrf",)}  # what examples are ranked by: the first there is
_DISTRIBUTIONS = (
    (MOL2CAP, "delta_len", "length difference (tokens)"),
    (MOL2CAP, "nli_entailment", "entailment probability"),
    (CAP2MOL, "delta_len", "length difference (characters)"),
    (CAP2MOL, "chrf", "Chr-F"),
)
_CASES = (90, 50, 10)  # percentiles of the ranking that the case studies are taken at, so that nobody picks them
_MOST_DRAWN = 5  # systems beside the reference that fit a page


@dataclass
class Run:
    name: str
    folder: Path
    record: dict  # metrics.json
    rows: dict[str, list[dict]] = field(default_factory=dict)  # direction: prediction rows
    scores: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # direction: column: (n,)


def read_run(spec: str) -> Run:
    """A run's folder, or `NAME=FOLDER` to call the system NAME; `ValueError` and `FileNotFoundError` say which file."""
    name, _, folder = ("", "", spec) if Path(spec).is_dir() else spec.rpartition("=")
    file = Path(folder) / "metrics.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; --compare takes folders that evaluate.py wrote")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        run, directions = Run(name or record["system"], Path(folder), record), list(record["directions"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not what evaluate.py writes ({error!r}); evaluate that system again") from None
    for row in read_table(run.folder / "predictions.parquet"):
        run.rows.setdefault(row["direction"], []).append(row)
    if digest([row for rows in run.rows.values() for row in rows]) != record["data"]["predictions_sha256"]:
        raise ValueError(
            f"{folder}: predictions.parquet is not the one metrics.json scored; evaluate that system again"
        )
    scores = read_table(run.folder / "scores.parquet")
    for direction in directions:
        mine = [row for row in scores if row["direction"] == direction]
        if [row["id"] for row in mine] != [row["id"] for row in run.rows.get(direction, [])] or not mine:
            raise ValueError(
                f"{folder}: predictions.parquet and scores.parquet differ in rows; evaluate that system again"
            )
        # A null marks the other direction's columns; NaN, a score that is undefined for a row.
        keys = [k for k in mine[0] if k not in ("id", "direction") and mine[0][k] is not None]
        run.scores[direction] = {key: np.array([row[key] for row in mine], float) for key in keys}
    return run


def check_comparable(runs: list[Run]) -> None:
    """`ValueError` on a name used twice, or naming the first row that differs: paired tests need the same examples."""
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two systems are called {twice!r}; name them: --compare one=DIR1 two=DIR2")
    remedy = "evaluate both with the same --pairs, --split, --limit and --seed"
    for direction in DIRECTIONS:
        first, *others = [run for run in runs if direction in run.rows] or [None]
        for other in others:
            mine, theirs = first.rows[direction], other.rows[direction]
            if len(mine) != len(theirs):
                raise ValueError(
                    f"{first.folder} has {len(mine)} {direction} rows, {other.folder} has {len(theirs)}; {remedy}"
                )
            for number, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
                for what in ("reference", "source"):
                    if a[what] != b[what]:
                        raise ValueError(
                            f"{other.folder / 'predictions.parquet'}, {direction} row {number}: the {what} is "
                            f"{str(b[what])[:60]!r}, but {str(a[what])[:60]!r} in {first.folder}; {remedy}"
                        )


def unlike(records: dict[str, dict], direction: str) -> dict[str, str]:
    """Metrics that the systems were not all scored on under one convention, each with what differs.

    Such numbers stand side by side, but none is the best and none is tested.
    """
    parts = [r["directions"][direction]["metrics"] for r in records.values() if direction in r["directions"]]
    found = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        conventions = list(dict.fromkeys(part[key]["convention"] for part in parts if "value" in part.get(key, {})))
        if len(conventions) > 1:
            first, other = (convention.split("; ") for convention in conventions[:2])
            differ = [(a, b) for a, b in zip(first, other, strict=False) if a != b] or [
                (conventions[0], conventions[1])
            ]
            found[key] = " against ".join(differ[0])
    return found


def paired_tests(runs: list[Run], baseline: Run, n_bootstrap: int, seed: int) -> dict[str, dict]:
    """`{direction: {(system, key): {"difference", "ci95", "p", "p_holm", "n"}}}` of other runs against the baseline.

    Only metrics of one convention are tested. Holm's correction runs over all of a direction's tests: systems times
    metrics.
    """
    tests = {}
    for direction, reference in baseline.scores.items():
        found = {}
        for run in runs:
            if run is not baseline and direction in run.scores:
                differ = unlike({run.name: run.record, baseline.name: baseline.record}, direction)
                pair = compare(direction, run.scores[direction], reference, n_bootstrap=n_bootstrap, seed=seed)
                found |= {(run.name, key): dict(test) for key, test in pair.items() if key not in differ}
        for test, corrected in zip(found.values(), holm([t["p"] for t in found.values()]), strict=True):
            test["p_holm"] = float(corrected)
        tests[direction] = found
    return tests


def write_report(
    runs: list[Run], output: Path, baseline: str | None = None, n_bootstrap: int = 10_000, seed: int = 0
) -> list[tables.Table]:
    """Write the report of `runs` into `output`; returns its main tables, for the screen.

    With several runs, differences and paired tests are against `baseline` (default: the first run). The least
    paired p-value is 2 / (n_bootstrap + 1), and Holm multiplies it by up to the number of tests: hence many resamples.
    """
    output.mkdir(parents=True, exist_ok=True)
    records = {run.name: run.record for run in runs}
    directions = [d for d in DIRECTIONS if any(d in run.rows for run in runs)]
    if len(runs) == 1:
        own = [tables.metrics_table(runs[0].name, runs[0].record, d) for d in directions]
        main = [tables.without_conventions(table) for table in own]
        numbered = [tables.efficiency_table(1, records)]
    else:
        check_comparable(runs)
        named = {run.name: run for run in runs}
        baseline = baseline or runs[0].name
        if baseline not in named:
            raise ValueError(f"--baseline {baseline!r} is not one of the systems: {', '.join(named)}")
        tests = paired_tests(runs, named[baseline], n_bootstrap, seed)
        place = {d: i for i, d in enumerate(DIRECTIONS)}
        against = [d for d in directions if d in named[baseline].rows]
        differ = {d: unlike(records, d) for d in directions}
        main = [tables.results_table(3 + place[d], records, d, baseline, tests[d], differ[d]) for d in against]
        numbered = [tables.results_table(1 + place[d], records, d, unlike=differ[d]) for d in directions] + main
        numbered.append(tables.efficiency_table(5, records))
        numbered += [tables.further_table(6 + place[d], records, d, differ[d]) for d in directions]
        numbered += [tables.tests_table(8 + place[d], d, baseline, tests[d]) for d in against if tests[d]]
    numbered = [table for table in numbered if table]
    scored = [(name, record, d) for name, record in records.items() for d in directions if d in record["directions"]]
    each = [make(*which) for make in (tables.metrics_table, tables.categories_table) for which in scored]
    each = [table for table in each if table]
    drawn = draw_figures(runs, directions)
    for name, _, png in drawn:
        write_whole(output / name, png)
    for table in numbered:
        write_whole(output / f"{table.name}.csv", tables.to_csv(table))
        write_whole(output / f"{table.name}.tex", tables.to_latex(table))
    title = f"Evaluation of {runs[0].name}" if len(runs) == 1 else f"{len(runs)} systems compared"
    write_whole(output / "report.md", _markdown(title, runs, numbered, each, drawn))
    examples = {d: _examples(runs, d) for d in directions}
    write_whole(output / "report.html", page.render(title, records, numbered, each, drawn, examples))
    return main


def _markdown(title: str, runs: list[Run], numbered, each, drawn) -> str:
    parts = [f"# {tables.escaped(title)}\n", *map(tables.to_markdown, numbered)]
    parts += [f"![{caption.split('.')[0]}]({name})\n\n{tables.escaped(caption)}\n" for name, caption, _ in drawn]
    parts += ["## Every metric, its interval and its convention\n", *map(tables.to_markdown, each)]
    parts.append("## Provenance\n")
    for run in runs:
        kept = {key: run.record.get(key) for key in ("created", "versions", "arguments", "data")}
        parts.append(f"{tables.escaped(run.name)}:\n\n```json\n{json.dumps(kept, indent=1, ensure_ascii=False)}\n```\n")
    return "\n".join(parts)


def primary(runs: list[Run], direction: str) -> str | None:
    """The per-example measure that every run of `direction` has under one convention, and that examples are ranked by;
    None where they share none."""
    having = [run for run in runs if direction in run.scores]
    differ = unlike({run.name: run.record for run in having}, direction)
    keys = (*PRIMARY[direction], *(m.key for m in METRICS[direction]))
    return next((k for k in keys if k not in differ and all(k in run.scores[direction] for run in having)), None)


def draw_figures(runs: list[Run], directions: list[str]) -> list[tuple[str, str, bytes]]:
    """`(file name, caption, PNG)` of the paper's figures, as far as the runs have what they show."""
    drawn, panels = [], []
    for direction, key, axis in _DISTRIBUTIONS:
        having = {r.name: r for r in runs if direction in r.scores}
        if key in unlike({name: r.record for name, r in having.items()}, direction):
            continue
        values = {name: r.scores[direction][key] for name, r in having.items() if key in r.scores[direction]}
        values = {name: v for name, v in values.items() if np.isfinite(v).any()}
        if values:
            panels.append((DIRECTION_NAMES[direction], axis, values))
    if panels:
        caption = (
            "Figure 1. Distributions over examples; triangles mark means. "
            "Length differences are prediction minus reference."
        )
        if MOL2CAP in directions and not any("nli_entailment" in run.scores.get(MOL2CAP, {}) for run in runs):
            caption += " Entailment needs --nli_model."
        drawn.append(("figure1_distributions.png", caption, figures.distributions(panels)))
    panels, measures = [], []
    for direction in directions:
        having = [run for run in runs if direction in run.scores]
        if len(having) > 1:
            key = primary(having, direction)
            if key is None:
                continue
            panels.append((DIRECTION_NAMES[direction], [r.name for r in having], cross_wins(having, direction, key)))
            measures.append(f"{DIRECTION_NAMES[direction]}: {declared(direction, key).label}")
    if panels:
        caption = (
            "Figure 2. Cross win rates: the share of examples on which the row's system scores strictly above the "
            f"column's ({'; '.join(measures)}). Two opposite cells and the ties add up to 100 %. The win rates of the "
            "tables are others: the share of outputs that pass the paper's criteria (NLI; Chr-F, length, validity)."
        )
        drawn.append(("figure2_win_rates.png", caption, figures.win_rates(panels)))
    for direction in (CAP2MOL, MOL2CAP):
        rows = next((run.rows[direction] for run in runs if direction in run.rows), [])
        if rows and rows[0]["reference"] is not None and primary(runs, direction):
            drawn.append(_case_figure(runs, direction))
    return drawn


def cross_wins(runs: list[Run], direction: str, key: str) -> np.ndarray:
    """(S, S): share of rows on which system a's score is strictly above b's; an undefined score is below all others."""
    scores = np.stack([np.nan_to_num(run.scores[direction][key], nan=-np.inf) for run in runs])  # (S, n)
    return (scores[:, None] > scores[None]).mean(axis=2)


def _case_figure(runs: list[Run], direction: str) -> tuple[str, str, bytes]:
    having = [run for run in runs if direction in run.rows]
    key, beside = primary(having, direction), having[:_MOST_DRAWN]
    molecule = "reference" if direction == CAP2MOL else "source"
    mean = np.mean([np.nan_to_num(run.scores[direction][key]) for run in having], axis=0)
    ranked = np.argsort(mean, kind="stable")
    small = [i for i in ranked if len(having[0].rows[direction][i][molecule]) <= 90]  # legible when drawn
    ranked = small if len(small) >= len(_CASES) else list(ranked)
    chosen = dict.fromkeys(ranked[round(p / 100 * (len(ranked) - 1))] for p in _CASES)
    cases = []
    for i in chosen:
        outputs = {r.name: (r.rows[direction][i]["prediction"], _note(r, direction, i)) for r in beside}
        row = having[0].rows[direction][i]
        cases.append({"label": f"id {row['id'][:20]}", "molecule": row["source"], "reference": row["reference"]})
        cases[-1]["outputs"] = outputs
    how = (
        f"Examples at the {', '.join(f'{p}th' for p in _CASES)} percentile of {declared(direction, key).label}, "
        f"averaged over systems{', among molecules of at most 90 characters' if ranked is small else ''}."
    )
    if len(having) > len(beside):
        how += f" The first {len(beside)} of {len(having)} systems."
    if direction == CAP2MOL:
        caption = f"Figure 3. Molecules beside their reference; atoms outside the largest shared part are marked. {how}"
        return "figure3_molecules.png", caption, figures.molecule_cases(cases)
    caption = f"Figure 4. Captions beside their reference; words that the reference lacks are marked. {how}"
    return "figure4_captions.png", caption, figures.caption_cases(cases)


def _note(run: Run, direction: str, i: int) -> str:
    keys = ("chrf", "morgan") if direction == CAP2MOL else ("rougeL", "nli_entailment")
    values = {key: run.scores[direction][key][i] for key in keys if key in run.scores[direction]}
    return ", ".join(f"{declared(direction, k).label} {v:.2f}" for k, v in values.items() if np.isfinite(v))


def _examples(runs: list[Run], direction: str) -> dict:
    """What report.html's browser of examples shows: rows with every system's output and per-example scores."""
    having = [run for run in runs if direction in run.rows]
    shared = [m for m in METRICS[direction] if all(m.key in run.scores[direction] for run in having)]
    shown = [m.key for m in shared if m.paper] or [m.key for m in shared]
    keys = [k for k in shown if k != "uniqueness"]  # says nothing of one example
    ranking = primary(having, direction)
    keys.sort(key=lambda k: k != ranking)  # the measure that the browser opens with
    n = len(having[0].rows[direction])
    columns = [np.reshape([run.scores[direction][k] for k in keys], (len(keys), n)).T for run in having]
    return {
        "title": DIRECTION_NAMES[direction],
        "systems": [run.name for run in having],
        "measures": [[key, declared(direction, key).label, declared(direction, key).better] for key in keys],
        "n": n,
        "rows": [
            {
                "id": rows[0]["id"],
                "source": rows[0]["source"],
                "reference": rows[0]["reference"],
                "outputs": [row["prediction"] for row in rows],
                "scores": [[round(float(x), 4) if np.isfinite(x) else None for x in c[i]] for c in columns],
            }
            for i, rows in enumerate(zip(*(run.rows[direction] for run in having), strict=True))
        ],
    }
