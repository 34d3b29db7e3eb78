"""Files of a system's outputs: the reference scripts' tables, LMolT's own, or one output a line.

A prediction row is `{"id", "direction", "source", "reference", "prediction"}`, all of them strings.
"""

import codecs
import hashlib
import json
from collections import Counter
from pathlib import Path

from lmolt.files import read_table
from lmolt.prompts import CAP2MOL, COLUMNS, DIRECTIONS, MOL2CAP

# Headers of MolT5's and L+M-24's scorers; they read tab-separated text without any quoting.
HEADERS = {
    MOL2CAP: ("SMILES", "ground truth", "output"),
    CAP2MOL: ("description", "ground truth", "output"),
}


def rows_of_pairs(pairs: list[dict], direction: str) -> list[dict]:
    """Prediction rows without a prediction: a pair read in one direction."""
    source, reference = COLUMNS[direction]
    return [{"id": str(p["id"]), "direction": direction, "source": p[source], "reference": p[reference]} for p in pairs]


def digest(rows: list[dict], columns: tuple[str, ...] = ("direction", "source", "reference", "prediction")) -> str:
    """SHA-256 of the rows' `columns`, whatever file they are kept in."""
    return hashlib.sha256(json.dumps([[row[key] for key in columns] for row in rows]).encode()).hexdigest()


def read_predictions(
    path: str | Path, direction: str, pairs: list[dict] | None = None, encoding: str = "utf-8"
) -> tuple[list[dict], Counter]:
    """Prediction rows of one direction, and what was odd about the file, counted by cause.

    `path` is a reference script's table (told by its header), `.parquet`/`.jsonl` with LMolT's columns, or, beside
    `pairs`, a file with one output a line. A table's references count, whatever `pairs` has. A missing output is an
    empty prediction, since the system failed; a missing reference is a `ValueError`, since the data did. `ValueError`
    also on a wrong header, a row count that differs from `pairs`, and bytes that are not `encoding`;
    `FileNotFoundError` where there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of predictions")
    beside = False
    if path.suffix in (".parquet", ".jsonl"):
        rows, counts = _from_table(path, direction)
    else:
        text = _decode(path, encoding)
        if not text:
            raise ValueError(f"{path}: the file is empty")
        # A table's lines end where Python's text mode ends them, as for its scripts: not at U+2028 or a form feed.
        header, *lines = _lines(text.replace("\r\n", "\n").replace("\r", "\n"))
        header = header.split("\t")
        beside = pairs is not None and "ground truth" not in header
        if beside:
            rows, counts = _beside_pairs(path, _lines(text), pairs, direction)
        else:
            rows, counts = _from_reference_tsv(path, header, lines, direction)
    if not rows:
        raise ValueError(f"{path}: no {direction} row in it")
    if pairs is not None and not beside:
        counts["references_of_file"] = len(rows)
    for number, row in enumerate(rows, 1):
        if not row["reference"].strip():
            raise ValueError(
                f"{path} row {number} (id {row['id']!r}): the reference is empty; every row needs one. A line break "
                "inside an output also looks like this: replace it by a space."
            )
    counts["empty_prediction"] = sum(not row["prediction"].strip() for row in rows)
    return rows, +counts


def drop_unreadable(rows: list[dict], where: str | Path) -> tuple[list[dict], list[dict]]:
    """cap2mol's rows whose reference RDKit reads, and the others; `ValueError` where it reads none."""
    from lmolt.metrics.molecule import canonical, in_processes

    readable = in_processes(canonical, [row["reference"] for row in rows])
    kept = [row for row, smiles in zip(rows, readable, strict=True) if smiles]
    dropped = [row for row, smiles in zip(rows, readable, strict=True) if not smiles]
    if not kept:
        raise ValueError(f"{where}: RDKit reads none of its {len(rows)} references, such as {rows[0]['reference']!r}")
    return kept, dropped


def _decode(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    for bom, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(bom):
            encoding = name
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not {encoding}; name the file's encoding "
            "(--encoding latin-1, say) or convert it (iconv -f LATIN1 -t UTF-8)"
        ) from None
    except LookupError:
        raise ValueError(f"unknown encoding {encoding!r}; use a name Python knows, such as utf-8 or latin-1") from None


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n")


def _from_reference_tsv(path: Path, header: list[str], lines: list[str], direction: str):
    source, _, _ = expected = HEADERS[direction]
    if missing := [name for name in expected if name not in header]:
        found = " / ".join(header)[:200]
        other = next((d for d in DIRECTIONS if set(HEADERS[d]) <= set(header)), None)
        remedy = (
            f"its columns are those of --direction {other}"
            if other
            else f"begin with the tab-separated line {' / '.join(expected)}, or give --pairs for one output a line"
        )
        raise ValueError(f"{path} line 1: no column {missing[0]!r} in the header {found!r}; {remedy}")
    if twice := next((name for name in expected if header.count(name) > 1), None):
        raise ValueError(f"{path} line 1: two columns are called {twice!r}; rename the one that is not meant")
    at = {name: header.index(name) for name in expected}
    rows, counts = [], Counter()
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
    return rows, counts


def _without_cls(output: str, direction: str, counts: Counter) -> str:
    """A caption as MolT5's and L+M-24's scorers take it."""
    if direction != MOL2CAP or not output.startswith("[CLS] "):
        return output
    counts["cls_prefix_removed"] += 1
    return output.removeprefix("[CLS] ")


def _beside_pairs(path: Path, lines: list[str], pairs: list[dict], direction: str):
    """L+M-24's submissions, read as its scorers do: lines end at \\n alone, spaces around an output are left out."""
    counts = Counter()
    if len(lines) == len(pairs) + 1 and not lines[-1].strip():
        lines, counts["blank_line"] = lines[:-1], 1
    if len(lines) != len(pairs):
        raise ValueError(
            f"{path} has {len(lines)} lines but there are {len(pairs)} pairs; give one output a line, in their order, "
            "an empty line for an empty output, no header (check --split and --limit, and line breaks inside outputs)"
        )
    outputs = [_without_cls(line.strip(), direction, counts).strip() for line in lines]
    rows = [row | {"prediction": output} for row, output in zip(rows_of_pairs(pairs, direction), outputs, strict=True)]
    return rows, counts


def _from_table(path: Path, direction: str):
    rows, counts = [], Counter()
    for number, record in enumerate(read_table(path), 1):
        if missing := [k for k in ("direction", "source", "reference", "prediction") if k not in record]:
            raise ValueError(
                f"{path} row {number}: no column {missing[0]!r}, found {', '.join(record)}; "
                "predictions need id, direction, source, reference, prediction"
            )
        if record["direction"] not in DIRECTIONS:
            raise ValueError(
                f"{path} row {number}: direction {record['direction']!r} is not one of {', '.join(DIRECTIONS)}"
            )
        if record["direction"] != direction:
            continue
        if not isinstance(record["prediction"], str):  # null, or the NaN that pandas writes for an empty cell
            counts["missing_output"] += 1
            record["prediction"] = ""
        row = {"id": str(record.get("id", len(rows))), "direction": direction}
        for key in ("source", "reference", "prediction"):
            row[key] = record[key] if isinstance(record[key], str) else ""
        rows.append(row)
    return rows, counts
