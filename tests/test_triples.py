import pytest

from lmolt.data.triples import read_triples, write_triples
from lmolt.files import read_table, write_table

TRIPLE = {"id": "1", "direction": "cap2mol", "source": "An alcohol.", "chosen": "CCO", "rejected": "CC("}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_triples_come_back_as_written(tmp_path, few_triples, suffix):
    write_triples(few_triples, tmp_path / f"t{suffix}")
    assert read_triples(tmp_path / f"t{suffix}") == few_triples


def test_ids_become_text_and_other_columns_are_left_out(tmp_path):
    write_table([TRIPLE | {"id": 7, "score": 0.5}], tmp_path / "t.parquet")
    assert read_triples(tmp_path / "t.parquet") == [TRIPLE | {"id": "7"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "smiles2caption"}, "row 2: direction 'smiles2caption'; use mol2cap or cap2mol"),
        ({"rejected": ""}, r"row 2 \(id '1'\): 'rejected' is ''; fill it in or remove the row"),
        ({"chosen": None}, "row 2 .*: 'chosen' is None"),
        ({"source": 5}, "row 2 .*: 'source' is 5"),
    ],
)
def test_a_bad_triple_is_named(tmp_path, change, message):
    write_table([TRIPLE, TRIPLE | change], tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=message):
        read_triples(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=message):
        write_triples(read_table(tmp_path / "t.jsonl"), tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


def test_a_missing_column_or_file_and_a_wrong_suffix(tmp_path):
    write_table([{"id": "1", "direction": "cap2mol"}], tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match=r"row 1: no column 'source' \(there are id, direction\)"):
        read_triples(tmp_path / "t.jsonl")
    with pytest.raises(FileNotFoundError, match="make_triples.py"):
        read_triples(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="'.csv'"):
        read_triples(tmp_path / "t.csv")
