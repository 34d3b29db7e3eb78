"""Files of a system's outputs, read in one way for scoring and for triples.

A prediction row is `{"id", "direction", "source", "reference", "prediction"}`, all of them strings; `reference` is None
where there is none. A file is one of
    a table: .parquet, .jsonl, .csv or .tsv (also .gz) with `prediction` (or `output`), and either `source` and
        `reference`, or `id`, by which its outputs find their pairs; `direction` where it holds both
    a reference script's table: tab-separated text whose header has `ground truth` and `output`
    one output a line, in the order of the pairs
"""

import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from lmolt.data.pairs import NAMES, not_a
from lmolt.files import read_table, read_text, table_suffix
from lmolt.metrics.molecule import Features, features
from lmolt.metrics.workers import in_processes
from lmolt.prompts import CAP2MOL, COLUMNS, DIRECTIONS, MOL2CAP

# Headers of MolT5's and L+M-24's scorers; they read tab-separated text without any quoting.
HEADERS = {
    MOL2CAP: ("SMILES", "ground truth", "output"),
    CAP2MOL: ("description", "ground truth", "output"),
}
# What a line that holds one of these, and nothing else, is: no output, and each one after it is another pair's.
_HEADERS_OF_LINES = {
    "prediction",
    "predictions",
    "output",
    "outputs",
    *map(str.lower, NAMES["molecule"] + NAMES["caption"]),
}


class _Record(NamedTuple):
    """A row of a table: its place for messages, and its outputs, none where the cell is empty."""

    place: str
    id: str | None
    source: str | None
    reference: str | None
    outputs: list[str]


def rows_of_pairs(pairs: list[dict], direction: str) -> list[dict]:
    """Prediction rows without a prediction: a pair read in one direction."""
    source, reference = COLUMNS[direction]
    return [{"id": str(p["id"]), "direction": direction, "source": p[source], "reference": p[reference]} for p in pairs]


def digest(rows: list[dict], columns: tuple[str, ...] = ("direction", "source", "reference", "prediction")) -> str:
    """SHA-256 of the rows' `columns`, whatever file they are kept in."""
    return hashlib.sha256(json.dumps([[row[key] for key in columns] for row in rows]).encode()).hexdigest()


def read_predictions(
    path: str | Path,
    direction: str,
    pairs: list[dict] | None = None,
    encoding: str = "utf-8",
    *,
    references: bool = True,
) -> tuple[list[dict], Counter]:
    """Prediction rows of one direction, one output each, and what was odd about the file, counted by cause.

    A table's own references count, and how they differ from `pairs` is counted; one with ids alone finds its sources
    and references in `pairs`. Without `references` none is wanted, and none is in the rows. A missing output is an
    empty prediction, since the system failed; a missing reference is a `ValueError`, since the data did. `ValueError`
    also on several outputs of one row, on outputs that are no text, on ids that are no pair's, on a row count that
    differs from `pairs`, and on bytes that are not `encoding`; `FileNotFoundError` where there is no file.
    """
    path, counts = Path(path), Counter()
    kind, content = _content(path, direction, encoding, pairs is not None or not references)
    if kind == "lines":
        lines = _of_lines(path, content, direction, counts, None if pairs is None else len(pairs))
        asked = _unnamed(len(lines), direction) if pairs is None else rows_of_pairs(pairs, direction)
        rows = [row | {"prediction": output} for row, output in zip(asked, lines, strict=True)]
    elif kind == "reference table":
        rows = _from_reference_tsv(path, *content, direction, counts)
    else:
        records = _records(path, content, direction)
        for record in records:
            if len(record.outputs) > 1:
                raise ValueError(
                    f"{path} {record.place}: {len(record.outputs)} outputs; one is scored: choose one a row, or give "
                    "the file to make_triples.py, which takes candidates"
                )
        whole = [record.source is not None and record.reference is not None for record in records]
        if references and any(record.reference is not None for record in records) and not all(whole):
            raise ValueError(
                f"{path} {records[whole.index(False)].place}: references count where each row has source and "
                "reference, and this one has not; fill them in, or leave the column of references to --pairs"
            )
        if references and all(whole):
            rows = [
                {
                    "id": str(number if record.id is None else record.id),
                    "direction": direction,
                    "source": record.source,
                    "reference": record.reference,
                    "prediction": "".join(record.outputs),
                }
                for number, record in enumerate(records)
            ]
            counts["missing_output"] = sum(not record.outputs for record in records)
        elif pairs is not None:
            outputs = _by_id(path, records, direction, pairs, counts)
            for pair, found in zip(pairs, outputs, strict=True):
                if len(found) > 1:
                    raise ValueError(
                        f"{path}: {len(found)} rows have the id {pair['id']!r}; one output a pair is scored: choose "
                        "one, or give the file to make_triples.py, which takes candidates"
                    )
            counts["missing_output"] = sum(not found for found in outputs)
            asked = rows_of_pairs(pairs, direction)
            rows = [row | {"prediction": "".join(found)} for row, found in zip(asked, outputs, strict=True)]
        elif not references:
            rows = [
                row
                | {"id": record.id or row["id"], "source": record.source or "", "prediction": "".join(record.outputs)}
                for row, record in zip(_unnamed(len(records), direction), records, strict=True)
            ]
            counts["missing_output"] = sum(not record.outputs for record in records)
        else:
            raise ValueError(
                f"{path}: needs columns source and reference, or id beside --pairs; found {', '.join(content[0])}. To "
                "score without references: --no_references"
            )
    if not rows:
        raise ValueError(f"{path}: no {direction} row in it")
    if not references:
        rows = [row | {"reference": None} for row in rows]
    elif pairs is not None and kind != "lines" and (kind == "reference table" or all(whole)):
        counts["references_of_file"] = len(rows)
        named = kind == "table" and records[0].id is not None
        counts += _unlike_pairs(rows, pairs, direction, "id" if named else "source")
    for number, row in enumerate(rows if references else (), 1):
        if not row["reference"].strip():
            raise ValueError(
                f"{path} row {number} (id {row['id']!r}): the reference is empty; every row needs one. A line break "
                "inside an output also looks like this: replace it by a space."
            )
    counts["empty_prediction"] = sum(not row["prediction"].strip() for row in rows)
    return rows, +counts


def _unlike_pairs(rows: list[dict], pairs: list[dict], direction: str, key: str) -> Counter:
    """What rows that have references of their own have otherwise than the pairs with their `key`, "id" or "source".

    Several pairs may have one key (a caption of two molecules): a row is like them if it is like one of them.
    """
    counts, of, named = Counter(), defaultdict(list), Counter(row[key] for row in rows)
    for pair in rows_of_pairs(pairs, direction):
        of[pair[key]].append(pair)
    for row in rows:
        counts[f"unknown_{key}"] += row[key] not in of
        for column in ("source", "reference") if row[key] in of else ():
            counts[f"{column}_unlike_the_pairs"] += all(
                row[column].strip() != pair[column].strip() for pair in of[row[key]]
            )
    counts[f"repeated_{key}"] = sum(max(0, n - max(1, len(of.get(one, ())))) for one, n in named.items())
    counts["pair_without_row"] = sum(max(0, len(its) - named[one]) for one, its in of.items())
    return counts


def read_candidates(
    path: str | Path, direction: str, pairs: list[dict], encoding: str = "utf-8"
) -> tuple[list[list[str]], Counter]:
    """Each pair's outputs in a file, and what was odd about it, counted by cause.

    Several rows of one id, or a list in a cell, are several candidates; a pair that the file doesn't name has none.
    Errors as of `read_predictions`.
    """
    path, counts = Path(path), Counter()
    kind, content = _content(path, direction, encoding, lines=True)
    if kind == "lines":
        return [[line] for line in _of_lines(path, content, direction, counts, len(pairs))], +counts
    if kind == "reference table":
        raise ValueError(
            f"{path}: a reference script's table names no pairs; give one output a line, or columns id and output"
        )
    return _by_id(path, _records(path, content, direction), direction, pairs, counts), +counts


def _unnamed(n: int, direction: str) -> list[dict]:
    return [{"id": f"row {i}", "direction": direction, "source": "", "reference": None} for i in range(1, n + 1)]


def _content(path: Path, direction: str, encoding: str, lines: bool):
    """What kind of file it is, and its content: `("lines", text)`, `("reference table", (header, lines))` or
    `("table", rows)`. Where `lines` may be asked for, text without a known header is that."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of predictions")
    if path.suffix == ".json":
        raise ValueError(f"{path}: a JSON document; write one object a line, {{column: value}}, into a .jsonl")
    if table_suffix(path) in (".parquet", ".jsonl", ".csv"):
        return "table", read_table(path, encoding)
    text = read_text(path, encoding)
    if not text:
        raise ValueError(f"{path}: the file is empty")
    # A table's lines end where Python's text mode ends them, as for its scripts: not at U+2028 or a form feed.
    header, *rest = _lines(text.replace("\r\n", "\n").replace("\r", "\n"))
    header = header.split("\t")
    if {"prediction", "output"} & set(header) and {"id", "source"} & set(header):
        return "table", read_table(path, encoding)
    if "ground truth" in header or not lines:
        return "reference table", (header, rest)
    return "lines", text


def _records(path: Path, rows: list[dict], direction: str) -> list[_Record]:
    """A table's rows of one direction; `ValueError` names the row and what is no text in it."""
    records, named = [], any("direction" in row for row in rows)
    for number, row in enumerate(rows, 1):
        place = f"row {number}"
        its = row.get("direction", None if named else direction)
        if its not in DIRECTIONS:
            raise ValueError(f"{path} {place}: direction {its!r} is not one of {', '.join(DIRECTIONS)}")
        if its != direction:
            continue
        columns = [name for name in ("prediction", "output") if name in row]
        if not columns:
            raise ValueError(f"{path} {place}: no column 'prediction' (or 'output'), found {', '.join(row)}")
        if len(columns) > 1:
            raise ValueError(f"{path} {place}: both 'prediction' and 'output'; rename the one that is not to be scored")
        column = columns[0]
        texts = [_text_of(path, place, name, row.get(name)) for name in ("source", "reference")]
        value, identifier = row[column], row.get("id")
        if identifier is not None and (isinstance(identifier, (list, dict, float)) or identifier == ""):
            raise ValueError(f"{path} {place}: the id is {identifier!r}; write the pair's, a text or a whole number")
        values = value if isinstance(value, list) else [value]
        outputs = [_text_of(path, place, column, one) for one in values]
        records.append(
            _Record(
                place,
                None if identifier is None else str(identifier),
                *(texts if "source" in row or "reference" in row else (None, None)),
                [output for output in outputs if output is not None],
            )
        )
    if not records:
        raise ValueError(f"{path}: no {direction} row in it")
    return records


def _text_of(path: Path, place: str, column: str, value) -> str | None:
    """A cell's text; None where it is missing (null, or the NaN that pandas writes)."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str):
        raise ValueError(f"{path} {place}: {column!r} is {value!r}, no text; write text, or null for no output")
    return value


def _by_id(path: Path, records: list[_Record], direction: str, pairs: list[dict], counts: Counter) -> list[list[str]]:
    """Each pair's outputs by id; a source that the file has must be the pair's."""
    if nameless := next((record for record in records if record.id is None), None):
        raise ValueError(
            f"{path} {nameless.place}: no id; a table's outputs find their pairs by id (or write one output a line, in "
            "the order of the pairs, into a .txt)"
        )
    repeated, n = Counter(pair["id"] for pair in pairs).most_common(1)[0]
    if n > 1:
        raise ValueError(
            f"{path}: its outputs are of ids, but {n} pairs have the id {repeated!r}; give each pair its own"
        )
    of, outputs = {pair["id"]: pair for pair in pairs}, defaultdict(list)
    for record in records:
        if record.id not in of:
            counts["unknown_id"] += 1
            continue
        source = of[record.id][COLUMNS[direction][0]]
        if record.source is not None and record.source.strip() != source.strip():
            raise ValueError(
                f"{path} {record.place}: id {record.id!r} has the source {record.source[:80]!r} here, and "
                f"{source[:80]!r} among the pairs; are these the pairs it was made from?"
            )
        counts["missing_candidate"] += not record.outputs
        outputs[record.id] += record.outputs
    if not outputs:
        own = "" if not pairs[0]["id"].startswith("row ") else "; the pairs have no ids of their own: add a column id"
        raise ValueError(
            f"{path}: none of its {len(records)} ids (such as {records[0].id!r}) is a pair's (such as "
            f"{pairs[0]['id']!r}){own}"
        )
    return [outputs[pair["id"]] for pair in pairs]


def usable(rows: list[dict], where: str | Path, invalid: str) -> tuple[list[dict], list[dict]]:
    """The rows of one direction whose reference is a molecule that RDKit reads, or a caption, and the others.

    Where `invalid` is "error" there are no others: a reference that is neither by its characters is a `ValueError`, and
    molecules are read when they are scored. `ValueError` where no row is left.
    """
    distinct = list(dict.fromkeys(row["reference"] for row in rows))
    kind = COLUMNS[rows[0]["direction"]][1]
    why = {text: not_a(kind, text) for text in distinct}
    if kind == "molecule" and invalid == "drop":
        plain = [text for text in distinct if why[text] is None]
        found = zip(plain, in_processes(features, plain), strict=True)
        why |= {s: None if isinstance(f, Features) else ("no molecule", "") for s, f in found}
    kept = [row for row in rows if why[row["reference"]] is None]
    others = [row for row in rows if why[row["reference"]] is not None]
    if others and invalid == "error":
        what, remedy = why[others[0]["reference"]]
        raise ValueError(
            f"{where} id {others[0]['id']!r}: the reference is {what} ({others[0]['reference'][:100]!r}); {remedy}, or "
            "leave such rows out with --invalid_pairs drop"
        )
    if not kept:
        none = "no caption is any" if kind == "caption" else "RDKit reads none"
        raise ValueError(f"{where}: {none} of its {len(rows)} references, such as {rows[0]['reference']!r}")
    return kept, others


def _lines(text: str) -> list[str]:
    text = text if "\n" in text else text.replace("\r", "\n")  # old Macs' ends of lines
    return text.removesuffix("\n").split("\n")


def _from_reference_tsv(path: Path, header: list[str], lines: list[str], direction: str, counts: Counter) -> list[dict]:
    source, _, _ = expected = HEADERS[direction]
    if missing := [name for name in expected if name not in header]:
        found = " / ".join(header)[:200]
        other = next((d for d in DIRECTIONS if set(HEADERS[d]) <= set(header)), None)
        remedy = (
            f"its columns are those of --direction {other}"
            if other
            else f"begin with the tab-separated line {' / '.join(expected)}, or give --pairs for one output a line; "
            "without references: --no_references"
        )
        raise ValueError(f"{path} line 1: no column {missing[0]!r} in the header {found!r}; {remedy}")
    if twice := next((name for name in expected if header.count(name) > 1), None):
        raise ValueError(f"{path} line 1: two columns are called {twice!r}; rename the one that is not meant")
    at = {name: header.index(name) for name in expected}
    rows = []
    for line_number, line in enumerate(lines, 2):
        if not line.strip():  # csv.DictReader, which the reference scripts use, passes over empty lines too
            counts["blank_line"] += 1
            continue
        fields = line.split("\t")
        counts["surplus_field"] += len(fields) > len(header)
        counts["missing_output"] += len(fields) <= at["output"]
        fields += [""] * (len(header) - len(fields))
        if not fields[at["ground truth"]].strip():
            raise ValueError(
                f"{path} line {line_number}: {line[:80]!r} has no ground truth ({line.count(chr(9)) + 1} of "
                f"{len(header)} fields); a line break inside an output looks like this: make it a space"
            )
        prediction = _without_cls(fields[at["output"]], direction, counts)
        rows.append(
            {
                "id": str(len(rows)),
                "direction": direction,
                "source": fields[at[source]],
                "reference": fields[at["ground truth"]],
                "prediction": prediction,
            }
        )
    return rows


def _without_cls(output: str, direction: str, counts: Counter) -> str:
    """A caption as MolT5's and L+M-24's scorers take it."""
    if direction != MOL2CAP or not output.startswith("[CLS] "):
        return output
    counts["cls_prefix_removed"] += 1
    return output.removeprefix("[CLS] ")


def _of_lines(path: Path, text: str, direction: str, counts: Counter, n: int | None) -> list[str]:
    """L+M-24's submissions, read as its scorers do: lines end at \\n alone, spaces around an output are left out.
    There must be `n` of them, where that is known."""
    lines = _lines(text)
    if lines[0].strip().lower() in _HEADERS_OF_LINES:
        raise ValueError(f"{path} line 1: {lines[0]!r} is a header, and no output; remove the line")
    if n is not None and len(lines) == n + 1 and not lines[-1].strip():
        lines, counts["blank_line"] = lines[:-1], 1
    if n is not None and len(lines) != n:
        raise ValueError(
            f"{path} has {len(lines)} lines but there are {n} pairs; give one output a line, in their order, an empty "
            "line for an empty output, no header (check --split and --limit, and line breaks inside outputs)"
        )
    return [_without_cls(line.strip(), direction, counts).strip() for line in lines]
