"""What is to be translated, from files that chemists have, and what was translated, as such files."""

import json
from pathlib import Path
from typing import NamedTuple

from lmolt.data.pairs import NAMES
from lmolt.files import read_table, read_text, write_table, write_whole
from lmolt.metrics.workers import Unfinished, in_processes
from lmolt.prompts import CAP2MOL, MOL2CAP

INPUTS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet", ".smi", ".sdf")
OUTPUTS = (".csv", ".tsv", ".jsonl", ".parquet", ".smi", ".sdf")
_COLUMNS = {MOL2CAP: NAMES["molecule"], CAP2MOL: NAMES["caption"]}


class Sources(NamedTuple):
    texts: list[str]  # empty where a row has none
    ids: list[str] | None  # the file's own names of its rows
    direction: str | None  # where the file shows it


def read_sources(path: Path, column: str | None = None, direction: str | None = None) -> Sources:
    """The inputs of a file: a line each of a .txt, a row each of a table, a record each of a .smi or .sdf.

    Of a table `column`, else `molecule` or `SMILES` (mol2cap), or `caption` or `description` (cap2mol), else its only
    one; ids are its `id` or `CID`. A .smi has a SMILES and a name a line. A record of an .sdf that RDKit can't read is
    an empty text. `ValueError`, `FileNotFoundError` with file, column and remedy.
    """
    suffix = path.suffix.lower()
    if suffix not in INPUTS:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; inputs are {', '.join(INPUTS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if column is not None and suffix in (".txt", ".smi", ".sdf"):
        raise ValueError(f"{path}: a {suffix} file has no columns; leave out --column {column}")
    if suffix == ".txt":
        sources = Sources(_lines(read_text(path)), None, None)
    elif suffix == ".smi":
        sources = _from_smi(path)
    elif suffix == ".sdf":
        sources = _from_sdf(path)
    else:
        sources = _from_table(path, column, direction)
    if not sources.texts:
        raise ValueError(f"{path}: nothing in it")
    return sources


def _lines(text: str) -> list[str]:
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # str.splitlines breaks inside captions
    return lines[:-1] if lines[-1] == "" else lines


def _from_table(path: Path, column: str | None, direction: str | None) -> Sources:
    rows = read_table(path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = {d: next((name for name in _COLUMNS[d] if name in names), None) for d in _COLUMNS}
    if column is None and direction:
        column = known[direction]
    if column is None and not direction and all(known.values()):
        raise ValueError(
            f"{path} has {' and '.join(map(repr, known.values()))}; say which is to be translated with --direction"
        )
    column = column or known[MOL2CAP] or known[CAP2MOL] or (names[0] if len(names) == 1 else None)
    if column not in names:
        wanted = "" if column is None else f"no column {column!r}; "
        raise ValueError(f"{path}: {wanted}it has {', '.join(map(repr, names))}; name one with --column")
    ids = next((name for name in NAMES["id"] if name in names), None)
    texts = ["" if row.get(column) is None else str(row[column]) for row in rows]
    found = next((d for d, names in _COLUMNS.items() if column in names), None)
    return Sources(texts, ids and [str(row.get(ids, "")) for row in rows], found)


def _from_smi(path: Path) -> Sources:
    parts = [line.strip().split(maxsplit=1) for line in _lines(read_text(path))]
    if parts and parts[0] and parts[0][0].casefold() in ("smiles", "smile", "canonical_smiles"):  # a header
        parts = parts[1:]
    texts = [part[0] if part else "" for part in parts]
    return Sources(texts, [part[1] if len(part) > 1 else "" for part in parts], MOL2CAP)


def _from_sdf(path: Path) -> Sources:
    records, record = [], []
    for line in _lines(read_text(path)):
        if line.strip() == "$$$$":
            records.append(record)
            record = []
        else:
            record.append(line)
    if any(line.strip() for line in record):  # the last one's end is missing
        records.append(record)
    found = in_processes(_of_block, ["\n".join(record) for record in records])
    texts = ["" if text is None or isinstance(text, Unfinished) else text for text in found]
    return Sources(texts, [record[0].strip() if record else "" for record in records], MOL2CAP)


def _of_block(block: str) -> str | None:
    from rdkit import Chem

    molecule = Chem.MolFromMolBlock(block)
    return molecule and Chem.MolToSmiles(molecule)


def write_translations(rows: list[dict], path: Path) -> int:
    """Write rows of candidates as a table, or those with a molecule as .smi (a line: SMILES, tab, name) or .sdf.

    Returns how many rows the file could not take.
    """
    suffix = path.suffix.lower()
    if suffix not in (".smi", ".sdf"):
        tsv = suffix == ".tsv"  # whose cells hold no tab or line break
        clean = lambda value: " ".join(value.split()) if tsv and isinstance(value, str) else value
        write_table([{key: clean(value) for key, value in row.items()} for row in rows], path)
        return 0
    molecules = [row for row in rows if row["smiles"]]
    name = lambda row: row["output"] if row["direction"] == MOL2CAP else row.get("id") or row["input"]
    if suffix == ".smi":
        write_whole(path, "".join(f"{row['smiles']}\t{' '.join(name(row).split())}\n" for row in molecules))
    else:
        write_whole(path, "".join(map(_sdf_record, molecules)))
    return len(rows) - len(molecules)


def _sdf_record(row: dict) -> str:
    from rdkit import Chem
    from rdkit.Chem import rdDepictor

    molecule = Chem.MolFromSmiles(row["smiles"])
    rdDepictor.Compute2DCoords(molecule)
    molecule.SetProp("_Name", str(row.get("id") or f"row {row['row']}"))
    text = lambda value: " ".join(value.split()) if isinstance(value, str) else json.dumps(value)
    fields = "".join(f">  <{key}>\n{text(value)}\n\n" for key, value in row.items() if value not in (None, ""))
    return Chem.MolToMolBlock(molecule) + fields + "$$$$\n"
