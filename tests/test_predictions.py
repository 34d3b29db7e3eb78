"""Files of outputs: the reference scripts' tables, our own, one output a line; and what is wrong with bad ones."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from lmolt.data.pairs import read_pairs
from lmolt.data.predictions import digest, read_candidates, read_predictions, rows_of_pairs, usable
from lmolt.files import write_table

SHARED = Path(__file__).parents[2] / "shared" / "data" / "lpm24"
HEADER = "description\tground truth\toutput\n"
PAIRS = [{"id": "a", "molecule": "CCO", "caption": "ethanol"}, {"id": "b", "molecule": "C", "caption": "methane"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data/lpm24 beside the checkout")
@pytest.mark.parametrize(("direction", "n"), [("mol2cap", 199), ("cap2mol", 200)])
def test_reference_tables_are_read_as_the_reference_scripts_read_them(direction, n):
    path = SHARED / f"{direction}_example.tsv"
    rows, counts = read_predictions(path, direction)
    with path.open(encoding="utf8") as file:  # as the reference scripts do
        expected = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(rows) == n == len(expected)
    assert [(r["reference"], r["prediction"]) for r in rows] == [(e["ground truth"], e["output"]) for e in expected]
    assert not counts


def test_odd_lines_are_counted_and_kept(tmp_path):
    text = HEADER + 'one\tC\tC"\n' + "two\tCC\n" + "\n" + "\t \t\n" + "three\tCCC\tC\tx\ty\n" + "four\u2028\x0c\tN\t\n"
    rows, counts = read_predictions(write(tmp_path / "o.tsv", text), "cap2mol")
    assert [row["prediction"] for row in rows] == ['C"', "", "C", ""]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[3]["source"] == "four\u2028\x0c"  # no line end for the reference scripts either
    assert counts == {"missing_output": 1, "blank_line": 2, "surplus_field": 1, "empty_prediction": 2}


def test_columns_are_found_by_name_and_windows_line_ends_are_line_ends(tmp_path):
    path = write(tmp_path / "o.txt", "output\tSMILES\tground truth\r\n[CLS] an acid\tCC(=O)O\tacetic acid\r\n")
    rows, counts = read_predictions(path, "mol2cap")
    assert rows == [
        {"id": "0", "direction": "mol2cap", "source": "CC(=O)O", "reference": "acetic acid", "prediction": "an acid"}
    ]
    assert counts == {"cls_prefix_removed": 1}


def test_a_line_of_ten_megabytes(tmp_path):
    long = "C" * 10_000_000
    rows, _ = read_predictions(write(tmp_path / "o.tsv", HEADER + f"x\tC\t{long}\n"), "cap2mol")
    assert rows[0]["prediction"] == long


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_other_encodings(tmp_path, encoding):
    path = write(tmp_path / "o.tsv", (HEADER + "β-é\tC\tC\n").replace("β", "b").encode(encoding))
    chosen = {"encoding": "latin-1"} if encoding == "latin-1" else {}
    assert read_predictions(path, "cap2mol", **chosen)[0][0]["source"] == "b-é"


@pytest.mark.parametrize(
    ("name", "data", "direction", "message"),
    [
        (
            "o.tsv",
            "SMILES\tground truth\toutput\nC\tx\ty\n",
            "cap2mol",
            r"line 1: no column 'description'.*--direction mol2cap",
        ),
        ("o.tsv", "a\tb\n1\t2\n", "cap2mol", r"line 1: no column 'description' in the header 'a / b'; begin with"),
        ("o.tsv", HEADER + "x\tC\tC\nbroken half\n", "cap2mol", r"line 3: 'broken half' has no ground truth \(1 of 3"),
        ("o.tsv", HEADER + "x\t\tC\n", "cap2mol", r"line 2.*no ground truth"),
        ("o.tsv", HEADER.encode() + b"x\xff\tC\tC\n", "cap2mol", r"line 2: byte 0xff is not UTF-8.*--encoding"),
        ("o.tsv", HEADER, "cap2mol", "no cap2mol row"),
        ("o.tsv", "output\t" + HEADER + "C\tx\tC\tC\n", "cap2mol", "line 1: two columns are called 'output'"),
        ("o.tsv", "", "cap2mol", "the file is empty"),
        ("o.jsonl", '{"source": "a", "reference": "b"}\n', "mol2cap", r"row 1: no column 'prediction' \(or 'output'\)"),
        (
            "o.jsonl",
            '{"direction": "up", "source": "a", "reference": "b", "prediction": "c"}\n',
            "mol2cap",
            "'up' is not",
        ),
        (
            "o.jsonl",
            '{"source": "a", "reference": "b", "prediction": "c"}\n{"source": "a", "prediction": "c"}',
            "mol2cap",
            "row 2: references count where each row has source and reference, and this one has not",
        ),
        ("o.csv", "id,reference,prediction\n1,C,C\n", "cap2mol", "row 1: references count where each row has source"),
    ],
)
def test_bad_files_name_file_line_value_and_remedy(tmp_path, name, data, direction, message):
    with pytest.raises(ValueError, match=message) as error:
        read_predictions(write(tmp_path / name, data), direction)
    assert str(tmp_path / name) in str(error.value)


def test_one_output_a_line_beside_pairs(tmp_path):
    rows, counts = read_predictions(write(tmp_path / "o.txt", "CCO\n\n"), "cap2mol", PAIRS)
    assert [(r["id"], r["source"], r["reference"], r["prediction"]) for r in rows] == [
        ("a", "ethanol", "CCO", "CCO"),
        ("b", "methane", "C", ""),
    ]
    assert counts == {"empty_prediction": 1}
    with pytest.raises(ValueError, match="3 lines but there are 2 pairs"):
        read_predictions(write(tmp_path / "o.txt", "CCO\n\nC\n"), "cap2mol", PAIRS)
    for header in ("Prediction", "SMILES", "molecule"):  # and an output is missing
        with pytest.raises(ValueError, match=f"line 1: '{header}' is a header, and no output"):
            read_predictions(write(tmp_path / "o.txt", f"{header}\nCCO\n"), "cap2mol", PAIRS)
    rows, counts = read_predictions(write(tmp_path / "o.txt", "\ufeffCCO\r\nC\r\n\r\n"), "cap2mol", PAIRS)
    assert [row["prediction"] for row in rows] == ["CCO", "C"] and counts == {"blank_line": 1}


def test_one_output_a_line_is_read_as_the_shared_tasks_scorers_do(tmp_path):
    """L+M-24's scorers split the submission's bytes at \\n, strip each line and cut MolT5's [CLS] off captions."""
    data = b" CCO \r\n[CLS]  a\rb\xe2\x80\xa8c \n"
    rows, counts = read_predictions(write(tmp_path / "o.txt", data), "mol2cap", PAIRS)
    assert [row["prediction"] for row in rows] == ["CCO", "a\rb\u2028c"] and counts == {"cls_prefix_removed": 1}
    rows, counts = read_predictions(tmp_path / "o.txt", "cap2mol", PAIRS)
    assert rows[1]["prediction"] == "[CLS]  a\rb\u2028c" and not counts


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_our_own_tables_come_back(tmp_path, suffix):
    rows = [
        row | {"prediction": p} for row, p in zip(rows_of_pairs(PAIRS, "mol2cap"), ["an alcohol", None], strict=True)
    ]
    other = [row | {"prediction": "C"} for row in rows_of_pairs(PAIRS, "cap2mol")]
    write_table(rows + other, tmp_path / f"p{suffix}")
    read, counts = read_predictions(tmp_path / f"p{suffix}", "mol2cap")
    assert read == [rows[0], rows[1] | {"prediction": ""}]
    assert counts == {"missing_output": 1, "empty_prediction": 1}
    assert digest(read) != digest(rows_of_pairs(PAIRS, "mol2cap"), ("source", "reference"))


def test_a_tables_own_references_count_and_not_the_pairs(tmp_path):
    rows, counts = read_predictions(write(tmp_path / "o.tsv", HEADER + "one\tCC\tC\n"), "cap2mol", PAIRS)
    assert rows[0]["reference"] == "CC" and counts == {
        "references_of_file": 1,
        "unknown_source": 1,
        "pair_without_row": 2,
    }
    more = [row | {"prediction": "C", "reference": row["reference"] + "C"} for row in rows_of_pairs(PAIRS, "cap2mol")]
    write_table([*more, more[0], more[0] | {"id": "no pair's"}], tmp_path / "o.jsonl")
    _, counts = read_predictions(tmp_path / "o.jsonl", "cap2mol", [*PAIRS, PAIRS[0] | {"id": "left out"}])
    unlike = {"reference_unlike_the_pairs": len(more) + 1, "unknown_id": 1, "repeated_id": 1, "pair_without_row": 1}
    assert counts == {"references_of_file": len(more) + 2} | unlike
    for row in more:  # a table without ids finds its pairs by their sources, of which two may be equal
        del row["id"]
    write_table([*more, more[0] | {"reference": "CCO"}], tmp_path / "p.jsonl")
    _, counts = read_predictions(tmp_path / "p.jsonl", "cap2mol", [*PAIRS, PAIRS[0] | {"molecule": "CCOC"}])
    assert counts == {"references_of_file": len(more) + 1, "reference_unlike_the_pairs": 1}


def test_a_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.tsv: no such file"):
        read_predictions("nowhere.tsv", "cap2mol")


def test_outputs_find_their_pairs_by_id_in_both_readers(tmp_path):
    text = '{"id": "b", "prediction": "C"}\n{"id": "a", "prediction": null}\n{"id": "z", "prediction": "N"}\n'
    path = write(tmp_path / "o.jsonl", text)
    rows, counts = read_predictions(path, "cap2mol", PAIRS)
    assert [(row["id"], row["reference"], row["prediction"]) for row in rows] == [("a", "CCO", ""), ("b", "C", "C")]
    assert counts == {"unknown_id": 1, "missing_output": 1, "missing_candidate": 1, "empty_prediction": 1}
    assert read_candidates(path, "cap2mol", PAIRS)[0] == [[], ["C"]]
    for data in (text.encode("utf-16"), gzip.compress(text.encode())):
        assert read_candidates(write(tmp_path / "o.jsonl", data), "cap2mol", PAIRS)[0] == [[], ["C"]]
    table = "id;output\na;CCO\nb;C\n"
    assert read_candidates(write(tmp_path / "o.csv", table), "cap2mol", PAIRS)[0] == [["CCO"], ["C"]]
    assert read_predictions(tmp_path / "o.csv", "cap2mol", PAIRS)[0][1]["prediction"] == "C"


def test_ids_are_never_implied(tmp_path):
    path = write(tmp_path / "o.csv", "id,prediction\n0,one\n1,two\n")
    (tmp_path / "p.csv").write_text("molecule,caption\nCCO,ethanol\nC,methane\n")
    pairs = read_pairs(tmp_path / "p.csv")
    for read in (read_predictions, read_candidates):
        with pytest.raises(ValueError, match=r"none of its 2 ids \(such as '0'\).*the pairs have no ids of their own"):
            read(path, "mol2cap", pairs)
        with pytest.raises(ValueError, match="row 1: no id"):
            read(write(tmp_path / "q.jsonl", '{"output": "one"}\n'), "mol2cap", PAIRS)
        other = write(tmp_path / "s.jsonl", '{"id": "a", "source": "CC", "prediction": "x"}\n')
        with pytest.raises(ValueError, match="row 1: id 'a' has the source 'CC' here, and 'CCO' among the pairs"):
            read(other, "mol2cap", PAIRS)


def test_several_outputs_are_candidates_and_no_prediction(tmp_path):
    lists = write(tmp_path / "l.jsonl", '{"id": "a", "prediction": ["C", "CC"]}\n{"id": "b", "prediction": ["N"]}\n')
    rows = write(tmp_path / "r.jsonl", '{"id": "a", "output": "C"}\n{"id": "a", "output": "CC"}\n')
    assert read_candidates(lists, "cap2mol", PAIRS)[0] == [["C", "CC"], ["N"]]
    assert read_candidates(rows, "cap2mol", PAIRS)[0] == [["C", "CC"], []]
    with pytest.raises(ValueError, match="l.jsonl row 1: 2 outputs; one is scored"):
        read_predictions(lists, "cap2mol", PAIRS)
    with pytest.raises(ValueError, match="2 rows have the id 'a'; one output a pair is scored"):
        read_predictions(rows, "cap2mol", PAIRS)


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}, [3]])
def test_an_output_that_is_no_text_is_an_error_in_both_readers(tmp_path, value):
    row = {"id": "a", "source": "ethanol", "reference": "CCO", "prediction": value}
    path = write(tmp_path / "o.jsonl", json.dumps(row) + "\n")
    for read in (read_predictions, read_candidates):
        with pytest.raises(ValueError, match="o.jsonl row 1: 'prediction' is .*, no text"):
            read(path, "cap2mol", PAIRS)


def test_the_direction_of_the_command_line_is_that_of_a_table_without_one(tmp_path):
    path = write(tmp_path / "o.jsonl", '{"source": "a", "reference": "C", "prediction": "C"}\n')
    rows, counts = read_predictions(path, "cap2mol")
    assert rows == [{"id": "0", "direction": "cap2mol", "source": "a", "reference": "C", "prediction": "C"}]
    assert not counts


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"PK\x03\x04\x14\x00", "no text but a zip archive, or a spreadsheet"),
        ("a.csv", b"PAR1\x15\x04", "no text but a Parquet file; give its name the suffix .parquet"),
        ("a.csv", "id,output\na,C\n".encode("utf-16-le"), "full of NUL characters, as UTF-16"),
        ("a.json", '["C", "CC"]', "a JSON document; write one object a line"),
        ("a.jsonl", '{"id": "a", "output": "\\ud800"}', "row 1: holds half a character"),
        ("a.csv", "id,output,prediction\na,C,CC\n", "row 1: both 'prediction' and 'output'"),
        ("a.jsonl", '{"id":"a","direction":"cap2mol","output":"C"}\n{"id":"b","output":"C"}', "row 2: direction None"),
    ],
)
def test_what_is_no_table_of_outputs_is_said(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read_predictions(write(tmp_path / name, data), "cap2mol", PAIRS)


@pytest.mark.parametrize(
    "data",
    [
        "\ufeff\ufeffid,output\na,C\nb,CC\n",
        "id\toutput\na\tC\nb\tCC\n",
        "id|output\na|C\nb|CC",
        "id;output\ra;C\rb;CC\r",
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, data):
    rows, _ = read_predictions(write(tmp_path / "a.csv", data), "cap2mol", PAIRS)
    assert [row["prediction"] for row in rows] == ["C", "CC"]
    lines = write(tmp_path / "a.txt", "C\rCC\r")
    assert [row["prediction"] for row in read_predictions(lines, "cap2mol", PAIRS)[0]] == ["C", "CC"]


@pytest.mark.parametrize("reference", ["nan", "N/A", "17", "['a']", "\u200b", "a\0b"])
def test_a_reference_that_is_no_caption_is_refused_or_left_out(tmp_path, reference):
    keys = ("id", "direction", "source", "reference", "prediction")
    rows = [dict(zip(keys, ("a", "mol2cap", "C", text, "b"), strict=True)) for text in (reference, "methane")]
    with pytest.raises(ValueError, match="f.csv id 'a': the reference is .*; .*--invalid_pairs drop"):
        usable(rows, "f.csv", "error")
    assert usable(rows, "f.csv", "drop") == (rows[1:], rows[:1])
    with pytest.raises(ValueError, match="no caption is any of its 1 references"):
        usable(rows[:1], "f.csv", "drop")


@pytest.mark.parametrize("reference", ["CCO ethanol", "[C][C][O]", "CC>>CO", "nan", "CCO\u200b"])
def test_a_reference_that_is_no_plain_molecule_is_refused_or_left_out(reference):
    """As in pairs: RDKit reads most of them, and BLEU and Levenshtein would be of the text around."""
    keys = ("id", "direction", "source", "reference", "prediction")
    rows = [dict(zip(keys, ("a", "cap2mol", "x", text, "C"), strict=True)) for text in (reference, "CCO")]
    with pytest.raises(ValueError, match="f.csv id 'a': the reference is .*; .*--invalid_pairs drop"):
        usable(rows, "f.csv", "error")
    assert usable(rows, "f.csv", "drop") == (rows[1:], rows[:1])
    with pytest.raises(ValueError, match="RDKit reads none of its 1 references"):
        usable(rows[:1], "f.csv", "drop")


def test_without_references(tmp_path):
    path = write(tmp_path / "o.txt", "CCO\n\n")
    rows, counts = read_predictions(path, "cap2mol", references=False)
    assert [(row["id"], row["source"], row["reference"], row["prediction"]) for row in rows] == [
        ("row 1", "", None, "CCO"),
        ("row 2", "", None, ""),
    ]
    assert counts == {"empty_prediction": 1}
    with pytest.raises(ValueError, match="without references: --no_references"):
        read_predictions(path, "cap2mol")
