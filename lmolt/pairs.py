"""Pairs of a molecule and its caption: read, parse, split, sample; and the tables all of LMolT's files are.

A pair is `{"id": str, "molecule": SMILES, "caption": text}`, with `"split"` where the corpus names one.
"""

import csv
import io
import json
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")  # .txt, as ChEBI-20 has them, are .tsv
NAMES = {"molecule": ("molecule", "SMILES"), "caption": ("caption", "description"), "id": ("id", "CID")}

# Named corpora: split -> the Hub's data set, its split there, and, where they are sampled, how many molecules. L+M-24's
# own `train` holds its `split_valid` too, so that isn't what to train on. The paper evaluates on 3,000 molecules of
# the unseen split of LPM-24_train-extra, which has five captions a molecule, with the first of them.
CORPORA = {
    "lpm24": {
        "train": ("language-plus-molecules/LPM-24_train", "split_train", None),
        "validation": ("language-plus-molecules/LPM-24_train", "split_valid", None),
        "test": ("language-plus-molecules/LPM-24_train-extra", "split_valid", 3000),
    },
    "chebi20": {
        "train": ("liupf/ChEBI-20-MM", "train", None),
        "validation": ("liupf/ChEBI-20-MM", "validation", None),
        "test": ("liupf/ChEBI-20-MM", "test", None),
    },
}


# --- tables


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, byte order mark removed; `ValueError` names the line and byte that are not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line}: byte 0x{data[error.start]:02x} is not UTF-8; convert the file "
            f"(iconv -f LATIN1 -t UTF-8 {path.name}, if Latin-1 is what it is in)"
        ) from None


def read_table(path: str | Path) -> list[dict]:
    """Rows of a .csv, .tsv (or .txt), .jsonl or .parquet file, in its order, values as they are stored.

    A .tsv is the field's: tab-separated without quoting, so a quote is data. A .csv may quote. Rows are counted from 1,
    without the header; blank lines at the end are none. `FileNotFoundError`, or `ValueError` with file, row, value and
    remedy.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; tables are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".parquet":
        try:
            rows = pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: not a readable parquet file ({error}); write it again") from None
    else:
        text = read_text(path)
        rows = _read_jsonl(path, text) if path.suffix == ".jsonl" else _read_separated(path, text)
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def _lines(text: str) -> list[str]:
    # Not str.splitlines, which also breaks at U+2028 and form feeds inside a caption.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def _read_jsonl(path: Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(_lines(text.rstrip("\r\n")), 1):
        if not line.strip():
            raise ValueError(f"{path} row {number} is blank; remove the line")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} row {number}: {line[:80]!r} is not JSON ({error}); one object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} row {number}: {line[:80]!r} is not a JSON object; write {{column: value}}")
        rows.append(row)
    return rows


def _read_separated(path: Path, text: str) -> list[dict]:
    if path.suffix in (".tsv", ".txt"):
        records = [line.split("\t") for line in _lines(text)]
    else:
        csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB
        try:
            records = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}: broken quoting ({error}); double each quote inside a quoted cell") from None
    if not records:
        raise ValueError(f"{path}: the file is empty")
    header, *records = records
    if repeated := [name for name, n in Counter(header).items() if n > 1]:
        raise ValueError(f"{path}: column {repeated[0]!r} appears twice in the header {header}; rename one")
    blank = lambda record: len(header) > 1 and record in ([], [""])
    while records and blank(records[-1]):
        records.pop()
    for number, record in enumerate(records, 1):
        if blank(record):
            raise ValueError(f"{path} row {number} is blank; remove the line")
        if len(record) != len(header):
            raise ValueError(
                f"{path} row {number}: {len(record)} cells but the header has {len(header)} ({', '.join(header)}); it "
                f"starts {' | '.join(record)[:80]!r}: look for a stray separator or a line break in a cell"
            )
    return [dict(zip(header, record, strict=True)) for record in records]


def write_table(rows: list[dict], path: str | Path) -> None:
    """Write rows to a .parquet, .jsonl, .csv or .tsv file, whole or not at all; its folder is made.

    Columns are those of any row, in order of appearance; what a row lacks is null (empty in text).
    `ValueError` on no rows, an unknown suffix, or a .tsv cell with a tab or line break.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; tables are {', '.join(SUFFIXES)}")
    if not rows:
        raise ValueError(f"{path}: there are no rows to write")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if path.suffix == ".parquet":
            pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), partial)
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                _write_text(rows, columns, path, file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_text(rows: list[dict], columns: list[str], path: Path, file) -> None:
    if path.suffix == ".jsonl":
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    records = [columns] + [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    if path.suffix == ".csv":
        csv.writer(file, lineterminator="\n").writerows(records)
        return
    for number, record in enumerate(records):
        if bad := [cell for cell in record if "\t" in cell or "\n" in cell or "\r" in cell]:
            raise ValueError(
                f"{path} row {number}: {bad[0][:80]!r} has a tab or line break; write .csv or .jsonl instead"
            )
        file.write("\t".join(record) + "\n")


# --- pairs


def read_pairs(
    spec: str | Path,
    split: str | None = None,
    counts: Counter | None = None,
    *,
    default_split: str | None = None,
    invalid: str = "error",
    seed: int = 0,
) -> list[dict]:
    """Pairs of `spec`: "demo", a name in `CORPORA`, a table, a folder of tables named by split (ChEBI-20's train.txt,
    validation.txt, test.txt), or a data set of the Hub (or what else `datasets.load_dataset` takes).

    Columns `molecule` (or `SMILES`) and `caption` (or `description`); `id` (or `CID`), else the row's number. `split`
    selects by the table's `split` column, or names the file or the Hub's split; `default_split` stands in for it where
    there is such a split; with neither, a table's pairs are all taken. Backslashes that ChEBI-20's files double are
    made single. Rows with an empty molecule or caption are a `ValueError`, or left out where `invalid` is "drop". All
    this is counted in `counts`. `seed` samples a corpus whose test set is a sample. `ValueError`/`FileNotFoundError`
    with file, row, value and remedy.
    """
    spec, counts = str(spec), Counter() if counts is None else counts
    if spec == "demo":
        from lmolt import demo

        return _of_split(demo.pairs(), split, default_split, "demo")
    if spec in CORPORA:
        splits, split = CORPORA[spec], split or default_split
        if split not in splits:
            raise ValueError(f"{spec!r} has the splits {', '.join(splits)}, not {split!r}; choose one with --split")
        name, its_split, size = splits[split]
        pairs = _as_pairs(_load_dataset(name, its_split, None), f"{name} ({its_split})", counts, invalid)
        return pairs if size is None else _sampled_molecules(pairs, size, seed, counts)
    if Path(spec).is_file() or Path(spec).suffix in SUFFIXES:
        pairs = _as_pairs(read_table(spec), spec, counts, invalid)
        return _of_split(pairs, split, default_split, spec)
    if Path(spec).is_dir():
        files = {path.stem: path for path in sorted(Path(spec).iterdir()) if path.suffix in SUFFIXES}
        if files := {name: files[name] for name in ("train", "validation", "test") if name in files}:
            if (split or default_split) not in files:
                raise ValueError(f"{spec!r} has the splits {', '.join(files)}; choose one with --split")
            path = files[split or default_split]
            return _as_pairs(read_table(path), str(path), counts, invalid)
    elif spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{spec!r} is no file, no folder, none of {', '.join(['demo', *CORPORA])}, and no Hub id, which reads "
            "OWNER/NAME"
        )
    return _as_pairs(_load_dataset(spec, split, default_split), spec, counts, invalid)


def _of_split(pairs: list[dict], split: str | None, default_split: str | None, where: str) -> list[dict]:
    if split is None:
        return [pair for pair in pairs if pair.get("split", "") == default_split] or pairs
    if all("split" not in pair for pair in pairs):
        raise ValueError(f"{where}: no column 'split' to select {split!r} by")
    if not (selected := [pair for pair in pairs if pair.get("split") == split]):
        present = ", ".join(sorted({str(pair.get("split")) for pair in pairs}))
        raise ValueError(f"{where}: no pair of split {split!r}; there are {present}")
    return selected


def _sampled_molecules(pairs: list[dict], size: int, seed: int, counts: Counter) -> list[dict]:
    """The first pair of each molecule, and of those `size` by `seed`, in their order."""
    first = {}
    for pair in pairs:
        first.setdefault(pair["molecule"], pair)
    counts["further captions of a molecule left out"] += len(pairs) - len(first)
    if len(first) < size:
        raise ValueError(
            f"{len(first)} molecules are too few to sample {size} of; are these the files of the whole set?"
        )
    molecules = list(first.values())
    return [molecules[i] for i in sorted(random.Random(seed).sample(range(len(molecules)), size))]


def _load_dataset(spec: str, split: str | None, default_split: str | None) -> list[dict]:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(spec, split=split)
    except (DatasetsError, FileNotFoundError, ConnectionError, ValueError) as error:
        of = "" if split is None else f" (split {split!r})"
        raise ValueError(f"{spec!r}{of} is no file, and as a data set it could not be loaded: {error}") from error
    if isinstance(loaded, DatasetDict):
        if len(loaded) > 1 and default_split not in loaded:
            raise ValueError(f"{spec!r} has the splits {', '.join(loaded)}; choose one with --split")
        loaded = loaded[default_split] if default_split in loaded else next(iter(loaded.values()))
    return loaded.to_list()


def _as_pairs(rows: list[dict], where: str, counts: Counter, invalid: str) -> list[dict]:
    found = {key: next((name for name in names if name in rows[0]), None) for key, names in NAMES.items()}
    for key in ("molecule", "caption"):
        if found[key] is None:
            raise ValueError(
                f"{where}: no column {' or '.join(map(repr, NAMES[key]))}; it has {', '.join(rows[0])}. Rename one"
            )
    pairs = []
    for number, row in enumerate(rows, 1):
        values = {key: row.get(found[key]) for key in ("molecule", "caption")}
        if empty := [key for key, value in values.items() if not isinstance(value, str) or not value.strip()]:
            if invalid == "error":
                value = values[empty[0]]
                raise ValueError(
                    f"{where} row {number}: {found[empty[0]]!r} is {'empty' if value in (None, '') else repr(value)}; "
                    "fill it in, remove the row, or leave such rows out with --invalid_pairs drop"
                )
            counts[f"empty {empty[0]} dropped"] += 1
            continue
        molecule = row[found["molecule"]].strip()
        if "\\\\" in molecule:  # never valid SMILES: two bonds in a row
            counts["doubled backslashes made single"] += 1
            molecule = molecule.replace("\\\\", "\\")
        pair = {
            "id": str(number if found["id"] is None or row.get(found["id"]) is None else row[found["id"]]),
            "molecule": molecule,
            "caption": row[found["caption"]].strip(),
        }
        if row.get("split") is not None:
            pair["split"] = str(row["split"])
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{where}: each of its {len(rows)} rows has an empty molecule or caption")
    return pairs


def clean(
    pairs: list[dict], *, canonicalise: bool = False, invalid: str = "error", where: str = "pairs"
) -> tuple[list[dict], Counter]:
    """Pairs whose molecule RDKit parses, and how many were changed or dropped, by cause.

    `canonicalise` writes RDKit's canonical SMILES; `invalid` is "error" (`ValueError` with id and SMILES) or "drop".
    What else can be wrong with pairs is found by lmolt/hygiene.py.
    """
    from rdkit import Chem, rdBase

    kept, counts = [], Counter()
    with rdBase.BlockLogs():
        for pair in pairs:
            molecule = Chem.MolFromSmiles(pair["molecule"])
            if molecule is None or molecule.GetNumAtoms() == 0:
                if invalid == "error":
                    raise ValueError(
                        f"{where}: the molecule of pair {pair['id']!r}, {pair['molecule'][:200]!r}, does not parse; "
                        "correct it, remove the pair, or leave such pairs out with --invalid_pairs drop"
                    )
                counts["unparsable SMILES dropped"] += 1
                continue
            if canonicalise and (canonical := Chem.MolToSmiles(molecule)) != pair["molecule"]:
                counts["SMILES made canonical"] += 1
                pair = pair | {"molecule": canonical}
            kept.append(pair)
    return kept, counts


def sample(pairs: list[dict], fraction: float, seed: int) -> list[dict]:
    """A random `fraction` (0 to 1] of the pairs, at least one, in their order; the same for the same seed."""
    if not 0 < fraction <= 1:
        raise ValueError(f"a fraction is over 0 and at most 1, got {fraction}")
    chosen = random.Random(seed).sample(range(len(pairs)), max(1, round(fraction * len(pairs))))
    return [pairs[i] for i in sorted(chosen)]


def scaffold_split(pairs: list[dict], fractions: list[float], seed: int = 0) -> list[list[dict]]:
    """Parts of about `fractions` of the pairs, no Bemis-Murcko scaffold in two of them; order is kept within a part.

    Scaffolds go from the most common to the rarest (`seed` orders equals) to the part that still lacks most, so the
    smaller parts hold the rarer scaffolds. All acyclic molecules share one (empty) scaffold.
    `ValueError` where fractions don't sum to 1 or a SMILES does not parse.
    """
    from rdkit import Chem, rdBase
    from rdkit.Chem.Scaffolds import MurckoScaffold

    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to 1, got {list(fractions)}")
    groups: dict[str, list[int]] = {}
    with rdBase.BlockLogs():
        for i, pair in enumerate(pairs):
            molecule = Chem.MolFromSmiles(pair["molecule"])
            if molecule is None:
                raise ValueError(
                    f"pair {pair['id']!r}: {pair['molecule'][:200]!r} does not parse; clean the pairs first"
                )
            groups.setdefault(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule), []).append(i)
    scaffolds = sorted(groups)
    random.Random(seed).shuffle(scaffolds)
    scaffolds.sort(key=lambda scaffold: -len(groups[scaffold]))
    parts: list[list[int]] = [[] for _ in fractions]
    for scaffold in scaffolds:
        lacks = [fraction * len(pairs) - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[lacks.index(max(lacks))] += groups[scaffold]
    return [[pairs[i] for i in sorted(part)] for part in parts]
