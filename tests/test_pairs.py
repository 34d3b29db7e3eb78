import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lmolt.data.pairs import clean, read_pairs, sample, scaffold_split
from lmolt.files import read_table, write_table

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [
    {"id": "a", "molecule": "CCO", "caption": 'It is "an alcohol".'},
    {"id": "b", "molecule": "C", "caption": "Gas."},
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_comes_back_as_written(tmp_path, suffix):
    write_table(ROWS, tmp_path / f"t{suffix}")
    assert read_table(tmp_path / f"t{suffix}") == ROWS
    assert read_pairs(tmp_path / f"t{suffix}") == ROWS
    assert [file.name for file in tmp_path.iterdir()] == [f"t{suffix}"]  # nothing partial is left


def test_columns_of_any_row_are_written_and_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "t.tsv"
    write_table([{"a": "1"}, {"a": "2", "b": "3"}], path)
    assert path.read_text() == "a\tb\n1\t\n2\t3\n"
    with pytest.raises(ValueError, match="row 2: 'x.ty' has a tab"):
        write_table([{"a": "1"}, {"a": "x\ty"}], path)
    assert path.read_text() == "a\tb\n1\t\n2\t3\n" and [f.name for f in tmp_path.iterdir()] == ["t.tsv"]
    with pytest.raises(ValueError, match="no rows"):
        write_table([], path)


def test_a_quote_is_data_in_tsv_and_quoting_in_csv(tmp_path):
    (tmp_path / "t.tsv").write_text('SMILES\tdescription\nCCO\t"Half a quote\u2028and on\n')
    assert read_pairs(tmp_path / "t.tsv")[0]["caption"] == '"Half a quote\u2028and on'
    (tmp_path / "t.csv").write_text('SMILES,description\nCCO,"One, ""two""\nlines"\n')
    assert read_pairs(tmp_path / "t.csv") == [{"id": "row 1", "molecule": "CCO", "caption": 'One, "two"\nlines'}]


def test_chebi20_columns_byte_order_mark_and_doubled_backslashes(tmp_path):
    (tmp_path / "chebi.txt").write_text(
        "\ufeffCID\tSMILES\tdescription\r\n7\tC/C=C\\\\C\tAn alkene.\r\n8\tC/C=C\\C\tAs well.\r\n"
    )
    counts = Counter()
    pairs = read_pairs(tmp_path / "chebi.txt", counts=counts)
    assert [(p["id"], p["molecule"]) for p in pairs] == [("7", "C/C=C\\C"), ("8", "C/C=C\\C")]
    assert counts == {"doubled backslashes made single": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "smile,caption\nC,gas\n", "no column 'molecule' or 'SMILES'; it has smile, caption"),
        ("t.csv", "molecule,caption\nC,gas\nCC, \n", "row 2: 'caption' is empty"),
        ("t.tsv", "molecule\tcaption\nC\tgas\nCC\n", "row 2: 1 cells but the header has 2"),
        ("t.tsv", "molecule\tcaption\n\nC\tgas\n", "row 1 is blank; remove the line"),
        ("t.csv", "molecule,caption\nC,gas\n\nC,gas\n", "row 2 is blank; remove the line"),
        ("t.jsonl", '{"molecule": "C", "caption": "gas"}\n \n{}\n', "row 2 is blank; remove the line"),
        ("t.csv", 'molecule,caption\nC,"gas\n', "broken quoting"),
        ("t.csv", "a,a\n1,2\n", "column 'a' appears twice"),
        ("t.jsonl", '{"molecule": "C", "caption": "gas"}\n{"molecule"\n', "row 2: .* is not JSON"),
        ("t.jsonl", '{"molecule": "C", "caption": "gas", "molecule": "N"}\n', "row 1: .*'molecule' is in it twice"),
        (
            "t.jsonl",
            '{"id": 1.0, "molecule": "C", "caption": "gas"}\n',
            "row 1: the id is 1.0; write a text or a whole",
        ),
        ("t.jsonl", '{"molecule": "C", "caption": null}\n', "row 1: 'caption' is empty"),
        ("t.jsonl", '{"molecule": "C", "caption": NaN}\n', "row 1: 'caption' is empty"),
        ("t.jsonl", "[1]\n", "row 1: .* is not a JSON object"),
        ("t.csv", b"molecule,caption\nC,gas\nCC,caf\xe9\n", "line 3: byte 0xe9 is not UTF-8"),
        ("t.csv", "", "the file is empty"),
        ("t.csv", "molecule,caption\n", "no rows"),
        ("t.xlsx", "", "unknown suffix '.xlsx'"),
        ("t.parquet", "no", "not a readable parquet file"),
    ],
)
def test_a_bad_file_is_named_with_row_value_and_remedy(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(path)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.tsv", "molecule\tcaption\r\nC\tgas\r\n\r\n\r\n"),
        ("t.csv", "molecule,caption\nC,gas\n\n"),
        ("t.jsonl", '{"molecule": "C", "caption": "gas"}\n\n'),
        ("t.csv", "molecule,caption\nC,gas"),
    ],
)
def test_blank_lines_at_the_end_and_none_at_all(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read_pairs(tmp_path / name) == [{"id": "row 1", "molecule": "C", "caption": "gas"}]
    (tmp_path / "one.csv").write_text('prediction\ngas\n""\n')  # a cell, though an empty one
    assert read_table(tmp_path / "one.csv") == [{"prediction": "gas"}, {"prediction": ""}]


def test_what_is_no_file():
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_pairs("nowhere/pairs.csv")
    with pytest.raises(FileNotFoundError, match="no Hub id"):
        read_pairs("./nowhere")
    with pytest.raises(ValueError, match="'lpm24' has the splits train, validation, test, not 'unseen'"):
        read_pairs("lpm24", "unseen")
    with pytest.raises(ValueError, match="'someone/something' is no file, and as a data set it could not be loaded"):
        read_pairs("someone/something")  # the tests are offline


def test_splits_of_a_table_and_of_a_data_set(tmp_path):
    rows = [row | {"split": split} for row, split in zip(ROWS, ("train", "test"), strict=True)]
    write_table(rows, tmp_path / "t.jsonl")
    assert read_pairs(tmp_path / "t.jsonl", "test") == rows[1:]
    with pytest.raises(ValueError, match="no pair of split 'dev'; there are test, train"):
        read_pairs(tmp_path / "t.jsonl", "dev")
    for split, row in zip(("train", "test"), ROWS, strict=True):  # a folder, as the Hub's are
        write_table([row], tmp_path / "set" / f"{split}.parquet")
    assert read_pairs(tmp_path / "set", "test") == ROWS[1:]
    with pytest.raises(ValueError, match="has the splits train, test; choose one with --split"):
        read_pairs(tmp_path / "set")


def test_the_default_split_is_taken_where_there_is_one(tmp_path):
    rows = [row | {"split": split} for row, split in zip(ROWS, ("train", "test"), strict=True)]
    write_table(rows, tmp_path / "t.jsonl")
    assert read_pairs(tmp_path / "t.jsonl", default_split="test") == rows[1:]
    assert read_pairs(tmp_path / "t.jsonl", default_split="validation") == rows
    assert read_pairs(tmp_path / "t.jsonl", "train", default_split="test") == rows[:1]
    write_table([*rows, ROWS[0]], tmp_path / "t.jsonl")
    assert (
        len(read_pairs(tmp_path / "t.jsonl")) == 3
        and read_pairs(tmp_path / "t.jsonl", default_split="test") == rows[1:]
    )


def test_a_folder_of_chebi20_files(tmp_path):
    (tmp_path / "LICENSE").write_text("none")
    for split, line in {"train": "7\tC/C=C\\\\C\tAn alkene.", "validation": "8\tC\t", "test": "9\tCC\tA gas."}.items():
        (tmp_path / f"{split}.txt").write_text(f"CID\tSMILES\tdescription\n{line}\n")
    counts = Counter()
    wanted = [{"id": "7", "molecule": "C/C=C\\C", "caption": "An alkene."}]
    assert read_pairs(tmp_path, "train", counts) == wanted and counts == {"doubled backslashes made single": 1}
    assert [pair["id"] for pair in read_pairs(tmp_path, default_split="test")] == ["9"]
    with pytest.raises(ValueError, match="has the splits train, validation, test; choose one with --split"):
        read_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"validation.txt row 1: 'description' is empty; .* --invalid_pairs drop"):
        read_pairs(tmp_path, "validation")
    with pytest.raises(ValueError, match="none of its 1 rows is left: {'empty caption dropped': 1}"):
        read_pairs(tmp_path, "validation", invalid="drop")
    with (tmp_path / "validation.txt").open("a") as file:
        file.write("10\tCO\tAn alcohol.\n")
    assert len(read_pairs(tmp_path, "validation", counts, invalid="drop")) == 1
    assert counts["empty caption dropped"] == 1


def test_clean_counts_what_it_changes():
    pairs = [{"id": str(i), "molecule": m, "caption": "x"} for i, m in enumerate(["OCC", "CCO", "C1CC", "", "CC"])]
    with pytest.raises(ValueError, match=r"pairs.csv: the molecule of pair '2', 'C1CC', does not parse"):
        clean(pairs, where="pairs.csv")
    cleaned, counts = clean(pairs, canonicalise=True, invalid="drop")
    assert [pair["molecule"] for pair in cleaned] == ["CCO", "CCO", "CC"]
    assert counts == {"unparsable SMILES dropped": 2, "SMILES made canonical": 1}
    assert pairs[0]["molecule"] == "OCC"


def test_sample_is_a_matter_of_the_seed():
    pairs = [{"id": str(i)} for i in range(100)]
    assert sample(pairs, 0.1, 1) == sample(pairs, 0.1, 1) != sample(pairs, 0.1, 2)
    assert len(sample(pairs, 0.1, 1)) == 10 and sample(pairs, 1, 0) == pairs
    with pytest.raises(ValueError, match="at most 1, got 10"):
        sample(pairs, 10, 0)


def test_no_scaffold_is_in_two_parts():
    from rdkit import Chem
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "C1CCNC1", "c1ccsc1", "c1ccc2ccccc2c1", "C1CC1", "c1cc[nH]c1"]
    pairs = [{"id": f"{i}", "molecule": side + ring} for i, ring in enumerate(rings) for side in ("C", "CC", "O", "N")]
    parts = scaffold_split(pairs, [0.75, 0.125, 0.125], seed=3)
    assert [len(part) for part in parts] == [24, 4, 4]
    scaffolds = [{MurckoScaffoldSmiles(mol=Chem.MolFromSmiles(p["molecule"])) for p in part} for part in parts]
    assert sum(map(len, scaffolds)) == len(set().union(*scaffolds)) == 8
    assert parts == scaffold_split(pairs, [0.75, 0.125, 0.125], seed=3) != scaffold_split(pairs, [0.75, 0.125, 0.125])
    with pytest.raises(ValueError, match="sum to 1"):
        scaffold_split(pairs, [0.5, 0.4])


def test_reading_triples_imports_neither_rdkit_nor_torch(tmp_path):
    row = {"id": "1", "direction": "cap2mol", "source": "An alcohol.", "chosen": "CCO", "rejected": "CC("}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    code = "import sys; from lmolt.data.triples import read_triples; print(read_triples(sys.argv[1])[0]['chosen'])"
    code += "; assert not {'rdkit', 'torch'} & set(sys.modules)"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.jsonl"], cwd=root, capture_output=True, text=True)
    assert done.stdout == "CCO\n", done.stderr


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ChEBI-20's validation.txt in ../shared/data")
def test_chebi20_as_published():
    counts = Counter()
    pairs = read_pairs(SHARED / "chebi20" / "validation.txt", counts=counts)
    assert len(pairs) == 3301 and pairs[0]["id"] == "92470518"
    assert counts == {"doubled backslashes made single": 502}
    cleaned, counts = clean(pairs)
    assert len(cleaned) == 3301 and not counts


@pytest.mark.parametrize(
    ("molecule", "caption", "message"),
    [
        ("CCO ethanol", "an alcohol", "'molecule' is a SMILES with text after it ('CCO ethanol'); cut it"),
        ("CCN |$;;R1$|", "a", r"a SMILES with extensions \(CXSMILES\)"),
        ("CCO\u200b", "a", "outside ASCII"),
        ("[C][C][O]", "a", "'molecule' is SELFIES"),
        ("InChI=1S/CH4/h1H4", "a", "'molecule' is an InChI"),
        ("nan", "a", "a missing value spelled out"),
        (5, "a", "'molecule' is no text"),
        (["C", "CC"], "a", "'molecule' is a list"),
        ("C", "nan", "'caption' is a missing value spelled out"),
        ("C", "N/A", "'caption' is a missing value spelled out"),
        ("C", 4.0, "'caption' is no text"),
        ("C", "4.0", "'caption' is a number"),
        ("C", ["a", "b"], "'caption' is a list .*; write a row for each of its values"),
        ("C", None, "'caption' is empty"),
    ],
)
def test_what_is_no_molecule_and_no_caption_is_refused_or_counted_by_cause(tmp_path, molecule, caption, message):
    rows = [{"molecule": "CC", "caption": "a gas"}, {"molecule": molecule, "caption": caption}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = message if "\\" in message or ".*" in message else re.escape(message)
    with pytest.raises(ValueError, match=f"p.jsonl row 2: .*{message}.*--invalid_pairs drop"):
        read_pairs(tmp_path / "p.jsonl")
    counts = Counter()
    assert [pair["molecule"] for pair in read_pairs(tmp_path / "p.jsonl", None, counts, invalid="drop")] == ["CC"]
    assert sum(counts.values()) == 1 and "dropped" in next(iter(counts))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "utf-32"])
def test_spreadsheets_encodings_separators_and_gzip(tmp_path, encoding):
    text = "id;molecule;caption\n7;CCO;β, an alcohol\n"
    data = ("\ufeff" * (encoding == "utf-16-be") + text).encode(encoding)
    (tmp_path / "p.csv").write_bytes(data)
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(data))
    for name in ("p.csv", "p.csv.gz"):
        assert read_pairs(tmp_path / name) == [{"id": "7", "molecule": "CCO", "caption": "β, an alcohol"}]
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ValueError, match="p.csv.gz after byte 0 of its content: not a whole gzip file"):
        read_pairs(tmp_path / "p.csv.gz")


def test_molecules_that_rdkit_does_not_finish_and_dummies_are_counted():
    pairs = [{"id": str(i), "molecule": m, "caption": "a"} for i, m in enumerate(["C" * 6000, "*CC", "C", "CC("])]
    kept, counts = clean(pairs, invalid="drop")
    assert [pair["id"] for pair in kept] == ["1", "2"]
    assert counts == {"unparsable SMILES dropped": 2, "molecule with a dummy atom kept": 1}
    with pytest.raises(ValueError, match=r"none of its 1 pairs is left: \{'unparsable SMILES dropped': 1\}"):
        clean(pairs[-1:], invalid="drop")


def test_a_data_set_with_a_loading_script_is_named_with_what_to_do(tmp_path):
    (tmp_path / "owned").mkdir()
    (tmp_path / "owned" / "owned.py").write_text("raise SystemExit('code of a data set was run')\n")
    with pytest.raises(ValueError, match=r"scripts are no longer supported, .*refs/convert/parquet has them\)"):
        read_pairs(str(tmp_path / "owned"))
