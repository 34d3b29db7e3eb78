"""report.html: tables that sort, figures, and a browser of examples, in one file that asks the network for nothing."""

import base64
import json
from pathlib import Path

import jinja2

from lmolt.prompts import MOL2CAP
from lmolt.report.drawing import draw
from lmolt.report.tables import Table

MOST_ROWS = 10_000  # examples a direction that the page keeps; browsers stay quick
MOST_DRAWN = 60  # examples a direction whose molecules are drawn
MOST_OPEN = 12  # rows of a table that is not folded away
LONGEST = 2000  # characters of a text that are kept


def render(title: str, records: dict, numbered: list[Table], each: list[Table], drawn: list, examples: dict) -> str:
    """The page. What came from a user is escaped: as HTML, or as JSON that the script shows as text."""
    directions, drawings = {}, {}
    for direction, part in examples.items():
        rows = _kept(part, MOST_ROWS)
        for row in _kept(part | {"rows": rows}, MOST_DRAWN):
            drawings |= _drawings(row, direction)
        directions[direction] = part | {"rows": [_short(row) for row in rows]}
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # in the order of the rows, not of the keys
    environment.filters["as_json"] = lambda record: json.dumps(
        {key: value for key, value in record.items() if key != "directions"}, indent=1, ensure_ascii=False
    )
    return environment.get_template("page.html").render(
        title=title,
        records=records,
        numbered=numbered,
        each=each,
        most_open=MOST_OPEN,
        drawn=[{"caption": caption, "width": _width(png), "png": _base64(png)} for _, caption, png in drawn],
        data={"directions": directions, "drawings": drawings},
    )


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _width(png: bytes) -> int:
    """Pixels of a page that a figure of 200 dots an inch takes: the header's width, at 120 an inch."""
    return int.from_bytes(png[16:20]) * 120 // 200


def _kept(part: dict, most: int) -> list[dict]:
    """At most about `most` rows, in their order: the worst and the best of each system by the first measure, or, where
    rows have none, the first."""
    rows = part["rows"]
    if len(rows) <= most or not part["measures"]:
        return rows[:most]
    better = part["measures"][0][2]
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
    found = {text: draw(text, None, (240, 170)) for text in texts if text}
    return {text: _base64(png) for text, png in found.items() if png}


def _short(row: dict) -> dict:
    cut = lambda t: t if t is None or len(t) <= LONGEST else f"{t[:LONGEST]}… ({len(t):,} characters)"
    return row | {key: cut(row[key]) for key in ("source", "reference")} | {"outputs": [cut(t) for t in row["outputs"]]}
