"""Tables of results, and how they are printed: Markdown, CSV, LaTeX.

A record is the content of one `metrics.json`; `records` maps the systems' names to theirs, in the order of the rows.
"""

import csv
import io
import re
from collections import namedtuple
from dataclasses import dataclass

from lmolt.metrics import METRICS
from lmolt.metrics.metric import NOT_COMPARABLE, Metric
from lmolt.prompts import CAP2MOL, MOL2CAP

DECLARED = {direction: {metric.key: metric for metric in metrics} for direction, metrics in METRICS.items()}

ARROWS = {1: " ↑", -1: " ↓", 0: " → 0"}
DIRECTION_NAMES = {MOL2CAP: "Molecule → language", CAP2MOL: "Language → molecule"}
EFFICIENCY = {  # key of efficiency.json: column, divisor
    "wall_seconds": ("Wall (h)", 3600),
    "tokens": ("Tokens (M)", 1e6),
    "flops": ("PFLOP", 1e15),
    "peak_memory_bytes": ("Peak memory (GiB)", 2**30),
    "gpu_energy_joules": ("GPU energy (kWh)", 3.6e6),
    "scored_tokens_per_second": ("Scored tokens/s", 1),
    "n_parameters": ("Parameters (M)", 1e6),
    "n_trainable": ("Trainable (M)", 1e6),
}

# What a cell says, what stands small beside it, what sorting goes by, whether it is a column's best.
Cell = namedtuple("Cell", "text small value bold", defaults=("", None, False))


@dataclass
class Table:
    name: str  # of its .csv and .tex
    title: str
    columns: list[str]  # the first names the row
    rows: list[list[Cell]]
    note: str = ""


def declared(direction: str, key: str) -> Metric:
    """A metric's declaration; a record of another version of LMolT may hold what this one doesn't know."""
    return DECLARED[direction].get(key) or Metric(key, label=key, better=0, convention="")


def _of_paper(direction: str, parts: list[dict]) -> tuple[list[Metric], list[Metric]]:
    """The paper's columns that one of `parts` (systems' metrics) has a value for, and those that none has."""
    has = {key for part in parts for key, entry in part.items() if "value" in entry}
    wanted = [m for m in METRICS[direction] if m.paper or (m.instead_of and m.instead_of not in has)]
    kept = [m for m in wanted if m.key in has]
    replaced = {m.instead_of for m in kept}
    return kept, [m for m in wanted if m.key not in has and not m.instead_of and m.key not in replaced]


def shown(value: float, decimals: int) -> str:
    """A number for a table: a true minus sign, and no negative zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def metrics_table(name: str, record: dict, direction: str) -> Table:
    """One system's every metric: value, interval, n, convention; the paper's first, absent ones with their reason."""
    part, rows = record["directions"][direction], []
    paper = [m.key for m in METRICS[direction] if m.paper or m.instead_of]
    keys = [key for key in paper if key in part["metrics"]]
    keys += [key for key in part["metrics"] if key not in paper and "/" not in key]
    for key in keys:
        entry, metric = part["metrics"][key], declared(direction, key)
        decimals = metric.decimals
        label = metric.label if metric.label == key else f"{metric.label} ({key})"
        if "absent" in entry:
            rows.append([Cell(label), Cell("absent"), Cell(""), Cell(""), Cell(entry["absent"])])
            continue
        interval, convention = entry.get("ci95"), entry["convention"]
        span = f"{shown(interval[0], decimals)} to {shown(interval[1], decimals)}" if interval else "–"
        if not interval:
            convention += f"; no interval: {entry.get('ci95_absent', 'not computed')}"
        if "p_permutation" in entry:
            shuffled = [shown(entry[f"shuffled_{what}"], decimals) for what in ("mean", "max")]
            convention += f"; shuffled {shuffled[0]}, at most {shuffled[1]}; p = {entry['p_permutation']:.3g}"
        value, n = Cell(shown(entry["value"], decimals), value=entry["value"]), Cell(str(entry["n"]), value=entry["n"])
        rows.append([Cell(label), value, Cell(span), n, Cell(convention)])
    counted = [f"{count} {cause.replace('_', ' ')}" for cause, count in part["counts"].items() if count]
    note = f"{part['n']} examples; counted: {', '.join(counted) or 'nothing out of the ordinary'}."
    columns = ["Metric", "Value", "95 % interval", "n", "Convention"]
    return Table(f"metrics_{direction}", f"{DIRECTION_NAMES[direction]}: {name}", columns, rows, note)


def categories_table(name: str, record: dict, direction: str) -> Table | None:
    """Metrics that are per category (their keys read METRIC/CATEGORY), a category a row; None where there are none."""
    metrics = {key.split("/", 1)[0]: {} for key in record["directions"][direction]["metrics"] if "/" in key}
    for key, entry in record["directions"][direction]["metrics"].items():
        if "/" in key and "value" in entry:
            metric, category = key.split("/", 1)
            metrics[metric][category] = entry
    rows = []
    for category in dict.fromkeys(category for found in metrics.values() for category in found):
        cells = [found.get(category) for found in metrics.values()]
        spans = [f"[{shown(e['ci95'][0], 3)}, {shown(e['ci95'][1], 3)}]" if e and e.get("ci95") else "" for e in cells]
        values = [
            Cell(shown(e["value"], 3), s, e["value"]) if e else Cell("–") for e, s in zip(cells, spans, strict=True)
        ]
        rows.append([Cell(category), *values])
    title = f"{DIRECTION_NAMES[direction]} by category: {name}"
    return Table(f"categories_{direction}", title, ["Category", *metrics], rows) if rows else None


def without_conventions(table: Table) -> Table:
    """A `metrics_table` for the screen: its widest column left out, the reasons of what is absent in the note."""
    at = table.columns.index("Convention")
    absent = _by_reason((row[0].text, row[at].text) for row in table.rows if row[1].text == "absent")
    rows = [[cell for i, cell in enumerate(row) if i != at] for row in table.rows if row[1].text != "absent"]
    note = table.note + "".join(f"\nAbsent: {names} ({reason})." for reason, names in absent.items())
    return Table(table.name, table.title, [name for name in table.columns if name != "Convention"], rows, note)


def _by_reason(absent) -> dict[str, str]:
    """`(metric, reason)` pairs as `{reason: "metric, metric"}`."""
    found = {}
    for name, reason in absent:
        found[reason] = f"{found[reason]}, {name}" if reason in found else name
    return found


def results_table(
    number: int,
    records: dict[str, dict],
    direction: str,
    baseline: str | None = None,
    tests: dict | None = None,
    unlike: dict[str, str] | None = None,
) -> Table:
    """The paper's tables: a system a row, the best value of a column in bold; with `baseline`, differences from it.

    `tests`: `{(system, key): {"p_holm", ...}}` against the baseline; a dagger marks p < 0.05. `unlike`: metrics that
    were scored under several conventions, with what differs: they have no best value and no difference.
    """
    unlike = unlike or {}
    parts = {name: r["directions"][direction] for name, r in records.items() if direction in r["directions"]}
    entry = lambda name, key: parts[name]["metrics"].get(key, {"absent": "not computed"})
    kept, missing = _of_paper(direction, [part["metrics"] for part in parts.values()])
    best = {m.key: _best({name: entry(name, m.key) for name in parts}, m.better, m.decimals) for m in kept}
    best |= dict.fromkeys(unlike, set())
    rows = []
    for name in parts:
        row = [Cell(name)]
        for metric in kept:
            key, decimals = metric.key, metric.decimals
            found, small = entry(name, key), ""
            if "absent" in found:
                row.append(Cell("–"))
                continue
            if baseline is None and found.get("ci95"):
                small = f"[{shown(found['ci95'][0], decimals)}, {shown(found['ci95'][1], decimals)}]"
            elif baseline not in (None, name) and key not in unlike and "value" in entry(baseline, key):
                difference = shown(found["value"] - entry(baseline, key)["value"], decimals)
                plus = "" if difference.startswith("−") or float(difference) == 0 else "+"
                significant = (tests or {}).get((name, key), {"p_holm": 1})["p_holm"] < 0.05
                small = f"({plus}{difference}{'†' * significant})"
            row.append(Cell(shown(found["value"], decimals), small, found["value"], name in best[key]))
        rows.append(row)
    note = f"n = {', '.join(str(n) for n in sorted({p['n'] for p in parts.values()}))}. Best of each column in bold."
    if baseline is None:
        note += " In brackets: 95 % bootstrap interval over examples."
    else:
        note += f" In parentheses: difference from {baseline}"
        note += "; † p < 0.05, paired bootstrap, Holm-corrected." if tests else "."
        tested = {key for _, key in tests or ()}
        untested = [m.label for m in kept if m.key not in tested and m.key not in unlike]
        note += f" Not tested: {', '.join(untested)}." if tests and untested else ""
    if lacking := [name for name in records if name not in parts]:
        note += f" Not evaluated in this direction: {', '.join(lacking)}."
    for metric in kept:
        if metric.key in unlike:
            note += f" {metric.label} was scored under several conventions, so it is neither bold nor tested"
            note += f" ({unlike[metric.key]})."
    if any(NOT_COMPARABLE in entry(name, metric.key).get("convention", "") for name in parts for metric in kept):
        note += " Some numbers are not comparable with published ones: see the conventions."
    if missing:
        first = next(iter(parts))
        absent = _by_reason((metric.label, entry(first, metric.key)["absent"]) for metric in missing)
        note += " Absent: " + "; ".join(f"{names} ({reason})" for reason, names in absent.items()) + "."
    columns = ["System", *(metric.label + ARROWS[metric.better] for metric in kept)]
    title = f"Table {number}. {DIRECTION_NAMES[direction]}"
    if baseline is None:
        return Table(f"table{number}_{direction}", title, columns, rows, note)
    return Table(f"table{number}_{direction}_differences", f"{title}, against {baseline}", columns, rows, note)


def _best(entries: dict[str, dict], better: int, decimals: int) -> set[str]:
    """The systems whose value, as printed, is the best; none where there is nothing to compare, or all have 0."""
    goodness = lambda value: better * value if better else -abs(value)
    good = {name: goodness(round(e["value"], decimals)) for name, e in entries.items() if "value" in e}
    if len(good) < 2 or set(good.values()) == {0}:
        return set()
    return {name for name in good if good[name] == max(good.values())}


def further_table(
    number: int, records: dict[str, dict], direction: str, unlike: dict[str, str] | None = None
) -> Table | None:
    """Metrics beyond the paper's, one a row, a system a column; None where there are none."""
    parts = {name: r["directions"][direction]["metrics"] for name, r in records.items() if direction in r["directions"]}
    paper = {m.key for m in _of_paper(direction, list(parts.values()))[0]}
    keys = [k for k in dict.fromkeys(k for part in parts.values() for k in part) if k not in paper and "/" not in k]
    small = lambda e: f"(p = {e['p_permutation']:.3g})" if "p_permutation" in e else ""
    rows = []
    for key in keys:
        metric, found = declared(direction, key), [part.get(key, {}) for part in parts.values()]
        if any("value" in e for e in found):
            cells = [
                Cell(shown(e["value"], metric.decimals), small(e), e["value"]) if "value" in e else Cell("–")
                for e in found
            ]
            name = metric.label if metric.label == key else f"{metric.label} ({key})"
            rows.append([Cell(name + " ‡" * (key in (unlike or {}))), *cells])
    title = f"Table {number}. {DIRECTION_NAMES[direction]}, beyond the paper"
    note = "Definitions and conventions: each system's own table, and docs/metrics.md."
    if any("p_permutation" in part.get(key, {}) for part in parts.values() for key in keys):
        note += " Grounding: the score less that of the outputs shuffled among the rows, with its permutation p-value."
    if any(key in (unlike or {}) for key in keys):
        note += " ‡ scored under several conventions: not to be compared."
    if "fcd" in keys:
        note += " FCD of fcd 1.2.2 moves with the longest string of either side: the paper's is 1.1's, in its table."
    return Table(f"table{number}_{direction}_further", title, ["Metric", *parts], rows, note) if rows else None


def tests_table(number: int, direction: str, baseline: str, tests: dict) -> Table:
    """Every paired test of one direction: `tests` is `{(system, key): {"difference", "ci95", "p", "p_holm", "n"}}`."""
    rows = []
    for (system, key), test in tests.items():
        metric = declared(direction, key)
        label, decimals = metric.label, metric.decimals
        ends = [shown(v, decimals + 1) for v in test["ci95"] or ()]
        difference = Cell(shown(test["difference"], decimals + 1), value=float(test["difference"]))
        p_values = [Cell(f"{test[p]:.3g}".replace("nan", "–"), value=float(test[p])) for p in ("p", "p_holm")]
        n = Cell(str(test["n"]), value=test["n"])
        rows.append([Cell(system), Cell(label), difference, Cell(" to ".join(ends) or "–"), *p_values, n])
    columns = ["System", "Metric", "Difference", "95 % interval", "p", "p (Holm)", "n"]
    note = f"Paired bootstrap over examples, two-sided; Holm's correction over the {len(tests)} tests of this table."
    title = f"Table {number}. {DIRECTION_NAMES[direction]}: paired tests against {baseline}"
    return Table(f"table{number}_{direction}_tests", title, columns, rows, note)


def efficiency_table(number: int, records: dict[str, dict]) -> Table | None:
    """The paper's appendix G, from the `efficiency.json` of what was trained; None where no system has one."""
    rows = []
    for name, record in records.items():
        if measured := record.get("efficiency"):
            values = [(measured.get(key), unit) for key, (_, unit) in EFFICIENCY.items()]
            cells = [Cell("–") if v is None else Cell(f"{v / unit:,.4g}", value=v / unit) for v, unit in values]
            rows.append([Cell(name), *cells])
    if not rows:
        return None
    columns = ["System", *(label for label, _ in EFFICIENCY.values())]
    note = "As the training run measured itself (efficiency.json); – where it could not."
    return Table(f"table{number}_efficiency", f"Table {number}. Efficiency of training", columns, rows, note)


def escaped(text: str) -> str:
    """Text as Markdown that shows it: on one line, and nothing of it HTML, a link, a heading or a cell's end."""
    text = re.sub(r"\s+", " ", text).replace("\\", "\\\\").replace("|", "\\|")
    text = re.sub(r"<(?=[\w/!?])", "&lt;", text)
    # A bracket is only that but in a link, an underscore within a word.
    return re.sub(r"(\](?=[\[(:])|[`*]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def to_markdown(table: Table) -> str:
    escape = escaped
    cell = lambda c: " ".join(filter(None, [f"**{escape(c.text)}**" if c.bold else escape(c.text), escape(c.small)]))
    lines = [[escape(name) for name in table.columns], *([cell(c) for c in row] for row in table.rows)]
    widths = [min(max(3, *map(len, column)), 40) for column in zip(*lines, strict=True)]
    left = [i == 0 or name == "Convention" for i, name in enumerate(table.columns)]
    lines.insert(
        1,
        [
            ("-" * (w - 1)).rjust(w, ":") if text else ("-" * (w - 1)).ljust(w, ":")
            for w, text in zip(widths, left, strict=True)
        ],
    )
    pad = lambda line: [t.ljust(w) if text else t.rjust(w) for t, w, text in zip(line, widths, left, strict=True)]
    body = "\n".join("| " + " | ".join(pad(line)) + " |" for line in lines)
    return f"**{escape(table.title)}**\n\n{body}\n" + (
        "".join(f"\n{escape(line)}\n" for line in table.note.splitlines())
    )


def to_csv(table: Table) -> str:
    """Numbers in full precision; what stands small beside a number has a column of its own."""
    has_small = [any(row[i].small for row in table.rows) for i in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    spread = lambda pairs: [
        x for (text, small), wanted in zip(pairs, has_small, strict=True) for x in [text, small][: 1 + wanted]
    ]
    plain = [re.sub(" [↑↓]$| → 0$", "", name) for name in table.columns]
    writer.writerow(spread((name, f"{name} in brackets") for name in plain))
    for row in table.rows:
        writer.writerow(spread((_inert(c.text) if c.value is None else c.value, c.small) for c in row))
    return buffer.getvalue()


def _inert(text: str) -> str:
    """Text that a spreadsheet takes for text: a quote before what it would compute (a name like =HYPERLINK(...))."""
    return f"'{text}" if text.startswith(("=", "+", "@", "\t", "\r")) or re.match(r"-\D", text) else text


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "−": "$-$", "–": "--"}
_LATEX |= {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "→": r"$\rightarrow$", "Δ": r"$\Delta$", "†": r"$^\dagger$"}
_LATEX |= {c: "\\" + c for c in "&%$#_{}"} | {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}


def to_latex(table: Table) -> str:
    """A booktabs table over both columns of a page, set smaller where it is wide (graphicx's \\resizebox)."""
    escape = lambda text: "".join(_LATEX.get(c, c) for c in text)
    bold = lambda c: rf"\textbf{{{escape(c.text)}}}" if c.bold else escape(c.text)
    cell = lambda c: bold(c) + (rf" {{\scriptsize {escape(c.small)}}}" if c.small else "")
    caption = escape(f"{re.sub('^Table [0-9]+[.] ', '', table.title)}. {table.note}".strip())
    wide = len(table.columns) > 8
    lines = [
        r"\begin{table*}[t]",
        r"\centering\small",
        *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        " & ".join(map(escape, table.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(cell, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}" + "}" * wide,
        rf"\caption{{{caption}}}",
        rf"\label{{tab:{table.name}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"
