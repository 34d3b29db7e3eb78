"""report.html: tables that sort, figures, and a browser of examples, in one file that asks the network for nothing."""

import base64
import html
import json
from pathlib import Path

from lmolt.prompts import MOL2CAP
from lmolt.report import figures
from lmolt.report.tables import Table

MOST_ROWS = 1000  # examples a direction that the page keeps; browsers stay quick
MOST_DRAWN = 60  # examples a direction whose molecules are drawn
MOST_OPEN = 12  # rows of a table that is not folded away
LONGEST = 2000  # characters of a text that are kept


def render(title: str, records: dict, numbered: list[Table], each: list[Table], drawn: list, examples: dict) -> str:
    """The page. What came from a user is escaped: as HTML, or as JSON that the script shows as text."""
    systems = ", ".join(f"{name} ({record.get('created', 'no date')[:10]})" for name, record in records.items())
    whole = "".join(_table(table, folded=len(table.rows) > MOST_OPEN) for table in numbered)
    own = "".join(
        _table(table, folded=len(table.rows) > MOST_OPEN and "Convention" not in table.columns) for table in each
    )
    if len(records) > 1:
        summary = "Every metric of each system, with its interval and convention"
        own = f"<details class=card><summary>{summary}</summary>{own}</details>"
    shown = "".join(
        f'<figure class=card><img alt="{html.escape(caption)}" width={_width(png)} src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        for _, caption, png in drawn
    )
    kept = lambda record: {key: value for key, value in record.items() if key != "directions"}
    origin = "".join(
        f"<details class=card><summary>{html.escape(name)}</summary><pre>"
        f"{html.escape(json.dumps(kept(record), indent=1, ensure_ascii=False))}</pre></details>"
        for name, record in records.items()
    )
    directions, drawings = {}, {}
    for direction, part in examples.items():
        rows = _kept(part, MOST_ROWS)
        for row in _kept(part | {"rows": rows}, MOST_DRAWN):
            drawings |= _drawings(row, direction)
        directions[direction] = part | {"rows": [_short(row) for row in rows]}
    data = json.dumps({"directions": directions, "drawings": drawings}, ensure_ascii=False)
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    filled = {
        "TITLE": html.escape(title),
        "SUBTITLE": html.escape(systems),
        "TABLES": whole + own,
        "FIGURES": shown,
        "PROVENANCE": origin,
        "DATA": data.replace("<", "\\u003c"),  # nothing in it can close the script element
    }
    first, *pieces = page.split("@@")  # the text between a pair of marks is a name
    return first + "".join(filled[piece] if i % 2 == 0 else piece for i, piece in enumerate(pieces))


def _width(png: bytes) -> int:
    """Pixels of a page that a figure of 200 dots an inch takes: the header's width, at 120 an inch."""
    return int.from_bytes(png[16:20]) * 120 // 200


def _table(table: Table, folded: bool = False) -> str:
    text = [name == "Convention" for name in table.columns]
    head = "".join(
        f"<th scope=col{' class=text' * t}>{html.escape(name)}</th>"
        for name, t in zip(table.columns, text, strict=True)
    )
    body = ""
    for row in table.rows:
        body += "<tr>"
        for cell, is_text in zip(row, text, strict=True):
            value = "" if cell.value is None else f' data-value="{float(cell.value)}"'
            inner = html.escape(cell.text)
            inner = f"<strong>{inner}</strong>" if cell.bold else inner
            inner += f"<small>{html.escape(cell.small)}</small>" if cell.small else ""
            body += f"<td{' class=text' * is_text}{value}>{inner}</td>"
        body += "</tr>"
    title = html.escape(table.title)
    if folded:
        opening, closing = f"<details class=card><summary>{title}</summary>", "</details>"
    else:
        opening, closing = f"<div class=card><h3>{title}</h3>", "</div>"
    return (
        f'{opening}<table class="sortable{" conventions" * any(text)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table><p class=soft>{html.escape(table.note)}</p>{closing}"
    )


def _kept(part: dict, most: int) -> list[dict]:
    """At most about `most` rows, in their order: the worst and the best of each system by the first measure."""
    rows, (_, _, better) = part["rows"], part["measures"][0]
    if len(rows) <= most:
        return rows
    keep, each = set(), max(1, most // (2 * len(part["systems"])))
    for s in range(len(part["systems"])):
        value = lambda i, s=s: rows[i]["scores"][s][0]
        good = lambda i, v=value: -float("inf") if v(i) is None else better * v(i) if better else -abs(v(i))
        ranked = sorted(range(len(rows)), key=good)
        keep.update(ranked[:each] + ranked[-each:])
    return [rows[i] for i in sorted(keep)]


def _drawings(row: dict, direction: str) -> dict[str, str]:
    """`{SMILES: base64 PNG}` of the molecules of an example."""
    texts = [row["source"]] if direction == MOL2CAP else [row["reference"], *row["outputs"]]
    found = {text: figures.draw(text, None, (240, 170)) for text in texts if len(text) <= LONGEST}
    return {text: base64.b64encode(png).decode() for text, png in found.items() if png}


def _short(row: dict) -> dict:
    cut = lambda text: text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
    return row | {key: cut(row[key]) for key in ("source", "reference")} | {"outputs": [cut(t) for t in row["outputs"]]}
