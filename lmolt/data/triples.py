"""Preference triples: what training reads. Nothing here needs RDKit.

    id         direction   source      chosen                     rejected
    "2244"     "mol2cap"   a SMILES    the corpus's caption       a translator's caption
    "2519"     "cap2mol"   a caption   the corpus's SMILES        a translator's output, valid SMILES or not

One row a triple, in .parquet or .jsonl, all five columns text, none empty. `id` is the pair's; with both directions
of one pair it appears twice. `source` is bare: the prompt is put around it where it is tokenized (lmolt/prompts.py).
"""

from pathlib import Path

from lmolt.files import read_table, write_table
from lmolt.prompts import DIRECTIONS

COLUMNS = ("id", "direction", "source", "chosen", "rejected")
SUFFIXES = (".parquet", ".jsonl")


def check(rows: list[dict], where: str) -> list[dict]:
    """The rows as triples (these five columns, `id` as text); `ValueError` with file, row, value and remedy."""
    for number, row in enumerate(rows, 1):
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(
                f"{where} row {number}: no column {missing[0]!r} (there are {', '.join(row)}); triples have "
                f"{', '.join(COLUMNS)}: scripts/make_triples.py writes them"
            )
        if row["direction"] not in DIRECTIONS:
            raise ValueError(
                f"{where} row {number}: direction {str(row['direction'])[:80]!r}; use {' or '.join(DIRECTIONS)}"
            )
        for name in ("source", "chosen", "rejected"):
            if not isinstance(row[name], str) or not row[name].strip():
                which, given = repr(row["id"])[:80], repr(row[name])[:80]
                raise ValueError(
                    f"{where} row {number} (id {which}): {name!r} is {given}; fill it in or remove the row"
                )
    return [{name: str(row["id"]) if name == "id" else row[name] for name in COLUMNS} for row in rows]


def read_triples(path: str | Path) -> list[dict]:
    """Checked triples of a .parquet or .jsonl file; `ValueError`, or `FileNotFoundError`."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: triples are {' or '.join(SUFFIXES)} files, not {Path(path).suffix!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of triples; scripts/make_triples.py writes one")
    return check(read_table(path), str(path))


def write_triples(triples: list[dict], path: str | Path) -> None:
    """Check, then write to a .parquet or .jsonl file, whole or not at all."""
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{path}: triples are {' or '.join(SUFFIXES)} files, not {Path(path).suffix!r}")
    write_table(check(triples, str(path)), path)
