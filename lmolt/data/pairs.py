"""Pairs of a molecule and its caption: read, parse, split, sample.

A pair is `{"id": str, "molecule": SMILES, "caption": text}`, with `"split"` where the corpus names one.
"""

import random
import unicodedata
from collections import Counter
from pathlib import Path

from lmolt.files import SUFFIXES, read_table, read_text, table_suffix

DEMO = Path("runs/demo")  # in the working directory; lmolt.demo.build makes it
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


def read_pairs(
    spec: str | Path,
    split: str | None = None,
    counts: Counter | None = None,
    *,
    default_split: str | None = None,
    invalid: str = "error",
    seed: int = 0,
    need: tuple[str, ...] = ("molecule", "caption"),
) -> list[dict]:
    """Pairs of `spec`: "demo", a name in `CORPORA`, a table, a folder of tables named by split (ChEBI-20's train.txt,
    validation.txt, test.txt), or a data set of the Hub (or what else `datasets.load_dataset` takes).

    Columns `molecule` (or `SMILES`) and `caption` (or `description`); `id` (or `CID`), else "row N", counted from 1.
    `split` selects by the table's `split` column, or names the file or the Hub's split; `default_split` stands in for
    it where there is such a split; with neither, a table's pairs are all taken. Backslashes that ChEBI-20's files
    double are made single. Rows with an empty molecule or caption, or one that is none (`smiles.ODDITIES`), are a
    `ValueError`, or left out where `invalid` is "drop". All this is counted in `counts`. `seed` samples a corpus whose
    test set is a sample. `need` names the columns that are wanted; a pair's other one is None, and a .txt of one
    column may be without a header. `ValueError`/`FileNotFoundError` with file, row, value and remedy.
    """
    spec, counts = str(spec), Counter() if counts is None else counts
    if spec == "demo":
        if not (DEMO / "pairs.parquet").is_file():
            raise FileNotFoundError(f"{DEMO / 'pairs.parquet'}: not made yet; python -m lmolt.demo.build makes it here")
        return _of_split(read_table(DEMO / "pairs.parquet"), split, default_split, "demo")
    if spec in CORPORA:
        splits, split = CORPORA[spec], split or default_split
        if split not in splits:
            raise ValueError(f"{spec!r} has the splits {', '.join(splits)}, not {split!r}; choose one with --split")
        name, its_split, size = splits[split]
        pairs = _as_pairs(_load_dataset(name, its_split, None), f"{name} ({its_split})", counts, invalid, need)
        return pairs if size is None else _sampled_molecules(pairs, size, seed, counts)
    if Path(spec).is_file() or table_suffix(spec) in SUFFIXES:
        pairs = _as_pairs(_rows(spec, need), spec, counts, invalid, need)
        return _of_split(pairs, split, default_split, spec)
    if Path(spec).is_dir():
        files = {
            path.name.partition(".")[0]: path for path in sorted(Path(spec).iterdir()) if table_suffix(path) in SUFFIXES
        }
        if files := {name: files[name] for name in ("train", "validation", "test") if name in files}:
            if (split or default_split) not in files:
                raise ValueError(f"{spec!r} has the splits {', '.join(files)}; choose one with --split")
            path = files[split or default_split]
            return _as_pairs(_rows(path, need), str(path), counts, invalid, need)
    elif spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{spec!r} is no file, no folder, none of {', '.join(['demo', *CORPORA])}, and no Hub id, which reads "
            "OWNER/NAME"
        )
    return _as_pairs(_load_dataset(spec, split, default_split), spec, counts, invalid, need)


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
    except RuntimeError as error:  # datasets 4 runs no loading scripts
        raise ValueError(
            f"{spec!r} as a data set: {error}. Download its parquet files (the Hub's branch refs/convert/parquet has "
            "them) and give a file"
        ) from error
    if isinstance(loaded, DatasetDict):
        if len(loaded) > 1 and default_split not in loaded:
            raise ValueError(f"{spec!r} has the splits {', '.join(loaded)}; choose one with --split")
        loaded = loaded[default_split] if default_split in loaded else next(iter(loaded.values()))
    return loaded.to_list()


def _rows(path: str | Path, need: tuple[str, ...]) -> list[dict]:
    """A table's rows; of a .txt that is a list, one a line, where one column is wanted."""
    if len(need) == 1 and table_suffix(path) == ".txt" and Path(path).is_file():
        lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
        if "\t" not in lines[0] and lines[0].strip() not in sum(NAMES.values(), ()):
            return [{need[0]: line} for line in lines]
    return read_table(path)


def _as_pairs(rows: list[dict], where: str, counts: Counter, invalid: str, need: tuple[str, ...]) -> list[dict]:
    found = {key: next((name for name in names if name in rows[0]), None) for key, names in NAMES.items()}
    for key in need:
        if found[key] is None:
            raise ValueError(
                f"{where}: no column {' or '.join(map(repr, NAMES[key]))}; it has {', '.join(rows[0])}. Rename one"
                + " (evaluate.py scores one direction without references: --no_references)"
            )
    pairs = []
    for number, row in enumerate(rows, 1):
        values = {"molecule": None, "caption": None}
        for key in need:
            value = row.get(found[key])
            values[key] = value = value.strip() if isinstance(value, str) else value
            if key == "molecule" and isinstance(value, str) and "\\\\" in value:
                values[key] = value = value.replace("\\\\", "\\")  # two bonds in a row are never valid SMILES
                counts["doubled backslashes made single"] += 1
            if cause := not_a(key, value):
                what, remedy = cause
                if invalid == "error":
                    shown = "" if value in (None, "") else f" ({str(value)[:100]!r})"
                    raise ValueError(
                        f"{where} row {number}: {found[key]!r} is {what}{shown}; {remedy}, or leave such rows out with "
                        "--invalid_pairs drop"
                    )
                counts[f"empty {key} dropped" if what == "empty" else f"{key} that is {what} dropped"] += 1
                break
        else:
            # Not its number alone: outputs that have ids of their own would find the wrong row.
            own = None if found["id"] is None else row.get(found["id"])
            if isinstance(own, bool | float | list | dict | bytes):
                raise ValueError(f"{where} row {number}: the id is {own!r:.80}; write a text or a whole number")
            pair = {"id": f"row {number}" if own is None else str(own), **values}
            if row.get("split") is not None:
                pair["split"] = str(row["split"])
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"{where}: none of its {len(rows)} rows is left: {dict(counts)}")
    return pairs


def not_a(key: str, value) -> tuple[str, str] | None:
    """What a value is that is neither a molecule nor a caption, and what to do; None where it may be one."""
    if isinstance(value, (list, tuple, dict)):
        return "a list", "write a row for each of its values"
    if value is None or value != value or (isinstance(value, str) and not _visible(value)):
        return "empty", "fill it in, remove the row"
    if not isinstance(value, str):
        return "no text", f"name the column that holds the {key}s"
    from lmolt.metrics.smiles import ODDITIES, oddity  # RDKit, without which training runs where it reads triples

    if key == "caption" and "\0" in value:
        return "text with a NUL character", "remove the character"
    cause = oddity(value)
    if key == "molecule" or cause in ("missing_value", "number", "list"):
        return ODDITIES.get(cause)
    return None


def _visible(text: str) -> bool:
    """Whether there is anything to see: zero-width characters and marks of direction are not."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def clean(
    pairs: list[dict], *, canonicalise: bool = False, invalid: str = "error", where: str = "pairs"
) -> tuple[list[dict], Counter]:
    """Pairs whose molecule RDKit reads, and how many were changed or dropped, by cause.

    `canonicalise` writes RDKit's canonical SMILES; `invalid` is "error" (`ValueError` with id and SMILES) or "drop".
    What else can be wrong with pairs is found by lmolt/data/decontamination.py. `ValueError` where none is left.
    """
    from lmolt.metrics.smiles import dummy_of
    from lmolt.metrics.workers import Unfinished, in_processes

    distinct = list(dict.fromkeys(pair["molecule"] for pair in pairs))
    of = dict(zip(distinct, in_processes(_canonical_and_dummy if canonicalise else dummy_of, distinct), strict=True))
    kept, counts = [], Counter()
    for pair in pairs:
        found = of[pair["molecule"]]
        if found is None or isinstance(found, Unfinished):
            if invalid == "error":
                raise ValueError(
                    f"{where}: the molecule of pair {pair['id']!r}, {pair['molecule'][:200]!r}, "
                    f"{'does not parse' if found is None else f'can not be read: {found}'}; correct it, remove the "
                    "pair, or leave such pairs out with --invalid_pairs drop"
                )
            counts["unparsable SMILES dropped" if found is None else "SMILES that RDKit doesn't finish dropped"] += 1
            continue
        smiles, dummy = found if canonicalise else (pair["molecule"], found)
        counts["molecule with a dummy atom kept"] += dummy
        if smiles != pair["molecule"]:
            counts["SMILES made canonical"] += 1
            pair = pair | {"molecule": smiles}
        kept.append(pair)
    if not kept:
        raise ValueError(f"{where}: none of its {len(pairs)} pairs is left: {dict(counts)}")
    return kept, +counts


def _canonical_and_dummy(smiles: str) -> tuple[str, bool] | None:
    from rdkit import Chem

    from lmolt.metrics.smiles import has_dummy, parse

    molecule = parse(smiles)
    return molecule and (Chem.MolToSmiles(molecule), has_dummy(molecule))


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
    from lmolt.metrics.molecule import Features, features
    from lmolt.metrics.workers import in_processes

    if abs(sum(fractions) - 1) > 1e-9 or min(fractions) <= 0:
        raise ValueError(f"fractions must be positive and sum to 1, got {list(fractions)}")
    groups: dict[str, list[int]] = {}
    for i, found in enumerate(in_processes(features, [pair["molecule"] for pair in pairs])):
        if not isinstance(found, Features):
            why = found or "does not parse"
            raise ValueError(f"pair {pairs[i]['id']!r}: {pairs[i]['molecule'][:200]!r}: {why}; clean the pairs first")
        groups.setdefault(found.scaffold, []).append(i)
    scaffolds = sorted(groups)
    random.Random(seed).shuffle(scaffolds)
    scaffolds.sort(key=lambda scaffold: -len(groups[scaffold]))
    parts: list[list[int]] = [[] for _ in fractions]
    for scaffold in scaffolds:
        lacks = [fraction * len(pairs) - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[lacks.index(max(lacks))] += groups[scaffold]
    return [[pairs[i] for i in sorted(part)] for part in parts]
