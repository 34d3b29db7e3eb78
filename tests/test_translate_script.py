"""scripts/translate.py: each kind of file in and out, inputs that can't be translated, kills."""

import csv
import io
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, load_script, make_t5
from rdkit import Chem

from lmolt import Translator
from lmolt.data.sources import read_sources
from lmolt.files import read_table, write_table
from lmolt.generation import translator as module
from lmolt.generation.candidates import RANKS, Candidate, find_direction, merge, order, rows_of, sift, spell
from lmolt.generation.ranking import score
from lmolt.generation.translate import load_translator, prompts_for
from lmolt.prompts import CAP2MOL, MOL2CAP

script = load_script("translate")
MOLECULES = ["CCO", "c1ccccc1", "C1CC", "", "[Cl-].[Na+]", "CCO ethanol", "InChI=1S/CH4/h1H4"]
CAPTIONS = ["The molecule is an aromatic amine.", "It has three rings."]


@pytest.fixture(scope="module")
def t5(tiny_policy, tmp_path_factory):
    return str(make_t5(tiny_policy, tmp_path_factory.mktemp("t5")))


def run(*args):
    script.main([*map(str, args), "--max_new_tokens", "6"])


# --- files


def sdf(smiles: list[str]) -> str:
    blocks = [Chem.MolToMolBlock(Chem.MolFromSmiles(s)) if Chem.MolFromSmiles(s) else "x\n\n\nbad\n" for s in smiles]
    return "".join(f"{name}{block}>  <note>\nany\n\n$$$$\n" for name, block in zip("abc", blocks, strict=True))


def test_every_kind_of_file_is_read(tmp_path):
    three = ["CCO", "xx", "CCN"]
    rows = [{"CID": i, "SMILES": s, "other": 1} for i, s in enumerate(three)]
    for suffix in ("csv", "jsonl", "parquet"):
        write_table(rows, tmp_path / f"m.{suffix}")
        assert read_sources(tmp_path / f"m.{suffix}") == (three, ["0", "1", "2"], MOL2CAP)
        with pytest.raises(ValueError, match="no column 'smile'; it has 'CID', 'SMILES', 'other'; name one with"):
            read_sources(tmp_path / f"m.{suffix}", "smile")
    (tmp_path / "m.txt").write_text("CCO\nxx\r\nCCN\n")
    assert read_sources(tmp_path / "m.txt") == (three, None, None)
    (tmp_path / "m.smi").write_text("SMILES name\nCCO\tethyl alcohol\nxx\n\nCCN amine\n")
    assert read_sources(tmp_path / "m.smi") == (["CCO", "xx", "", "CCN"], ["ethyl alcohol", "", "", "amine"], MOL2CAP)
    (tmp_path / "m.sdf").write_text(sdf(three))
    assert read_sources(tmp_path / "m.sdf") == (["CCO", "", "CCN"], ["a", "bx", "c"], MOL2CAP)
    write_table([{"text": 7}, {"text": None}], tmp_path / "t.jsonl")
    assert read_sources(tmp_path / "t.jsonl") == (["7", ""], None, None)
    write_table([{"molecule": "C", "caption": "it"}], tmp_path / "both.csv")
    with pytest.raises(ValueError, match="has 'molecule' and 'caption'; say which is to be translated"):
        read_sources(tmp_path / "both.csv")
    assert read_sources(tmp_path / "both.csv", direction=CAP2MOL).texts == ["it"]
    assert read_sources(tmp_path / "both.csv", "molecule") == (["C"], None, MOL2CAP)
    (tmp_path / "m.mol2").write_text("x")
    (tmp_path / "empty.txt").write_text("")
    for name, message in (
        ("m.mol2", "unknown suffix '.mol2'"),
        ("no.csv", "no such file"),
        ("empty.txt", "nothing in"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            read_sources(tmp_path / name)
    with pytest.raises(ValueError, match="a .smi file has no columns"):
        read_sources(tmp_path / "m.smi", "SMILES")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet", "smi", "sdf"])
def test_every_kind_of_file_is_written(t5, tmp_path, suffix, capsys):
    (tmp_path / "in.txt").write_text("\n".join(MOLECULES))
    out = tmp_path / f"out.{suffix}"
    run("--input", tmp_path / "in.txt", "--direction", MOL2CAP, "--model", t5, "--output", out)
    said = capsys.readouterr().out
    assert "3 translated" in said and "1 empty" in said and "1 RDKit can't read this molecule" in said
    assert "1 an InChI" in said and "1 several words, where a SMILES is wanted" in said
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["in.txt", out.name]
    if suffix == "smi":
        assert [line.split("\t")[0] for line in out.read_text().splitlines()] == ["CCO", "c1ccccc1", "[Cl-].[Na+]"]
        assert "4 rows have no molecule" in said
    elif suffix == "sdf":
        with Chem.SDMolSupplier(str(out)) as molecules:
            found = list(molecules)
        assert [Chem.MolToSmiles(m) for m in found] == ["CCO", "c1ccccc1", "[Cl-].[Na+]"]
        assert [m.GetProp("row") for m in found] == ["1", "2", "5"] and found[0].GetProp("output")
    else:
        rows = read_table(out)
        assert [str(row["row"]) for row in rows] == ["1", "2", "3", "4", "5", "6", "7"]
        assert [row["note"] for row in rows][:5] == ["", "", "RDKit can't read this molecule", "empty", ""]
        assert rows[0]["inchikey"] == "LFQSCWFLJHTTHZ-UHFFFAOYSA-N" and float(rows[0]["logp"]) < 0
        assert [row["rank"] in (None, "") for row in rows] == [False, False, True, True, False, True, True]


def test_what_is_printed(t5, capsys, monkeypatch):
    run("CCO", "C1CC", "--model", t5)
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()
    assert first.startswith("1\t1\t") and second == f"2\t-\t{'':9}\t(RDKit can't read this molecule)"
    assert "1 translated" in shown.err
    for dash in ((), ("-",), ("--input", "-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"CCO\n\nCC\n")))
        run(*dash, "--model", t5)
        assert [line[:4] for line in capsys.readouterr().out.splitlines()] == ["1\t1\t", "2\t-\t", "3\t1\t"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"CCO\n\xff\n")))
    with pytest.raises(ValueError, match="standard input line 2: byte 0xff is not UTF-8"):
        run("--model", t5)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--input", "y"], "give a file or texts, one of them"),
        (["x", "--output", "out.pdf"], "unknown suffix '.pdf'"),
        (["x", "--output", "."], "unknown suffix ''"),
        ([str(ROOT / "requirements.txt")], "requirements.txt is a file; say --input"),
        (["x", "--rank", "best"], "invalid choice: 'best'"),
    ],
)
def test_contradictions_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        run(*args, "--model", "m")


def test_inputs_none_of_which_can_be_translated(t5):
    with pytest.raises(ValueError, match="none of 2 inputs .*'C1CC': RDKit can't read this molecule; '': empty"):
        run("C1CC", "", "--direction", MOL2CAP, "--model", t5)
    with pytest.raises(ValueError, match="'CCO': a molecule, where a caption is wanted"):
        run("CCO", "--direction", CAP2MOL, "--model", t5)
    with pytest.raises(ValueError, match="over 20,000 characters"):
        run("C" * 10_000_000, "--direction", MOL2CAP, "--model", t5)


def test_a_kill_loses_nothing(t5, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.smi").write_text("".join(f"{'C' * n}O\n" for n in range(1, 9)))
    args = ["--input", tmp_path / "in.smi", "--model", t5, "--num_candidates", 3, "--tokens_per_batch", 40]
    run(*args, "--output", tmp_path / "whole.csv")
    real, done = module.translate, []

    def killed(*a, **how):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*a, **how)

    monkeypatch.setattr(module, "translate", killed)  # ends between the greedy outputs and the samples
    with pytest.raises(KeyboardInterrupt):
        run(*args, "--output", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
    monkeypatch.setattr(module, "translate", real)
    kept = (tmp_path / "out.csv.journal" / "mol2cap" / "process-0.jsonl").read_text()
    assert len(kept.splitlines()) == 8
    capsys.readouterr()
    run(*args, "--output", tmp_path / "out.csv")
    assert "mol2cap: 8 of 8 rows are in" in capsys.readouterr().out
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "out.csv.journal").exists()


@pytest.mark.slow
def test_processes_share_the_inputs(t5, tmp_path):
    (tmp_path / "in.smi").write_text("".join(f"{'C' * n}O\n" for n in range(1, 9)))
    for processes in (1, 2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        command += [str(ROOT / "scripts" / "translate.py"), "--input", str(tmp_path / "in.smi"), "--model", t5]
        command += ["--num_candidates", "3", "--max_new_tokens", "6", "--output", str(tmp_path / f"{processes}.jsonl")]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [list(map(json.loads, (tmp_path / f"{n}.jsonl").read_text().splitlines())) for n in (1, 2)]
    assert [row["output"] for row in rows[0]] == [row["output"] for row in rows[1]]


# --- candidates


def test_the_direction_is_found_where_it_is_plain():
    assert find_direction(["CCO", "C1CC", "", "c1ccccc1"]) == MOL2CAP
    assert find_direction([*CAPTIONS, ""]) == CAP2MOL
    assert find_direction(["CO is a poisonous gas."]) == CAP2MOL  # RDKit reads it: methanol, and a name
    for unclear in (["CCO", "A molecule with rings."], ["xx", "CCO", "yy"], ["carbon monoxide"], [""], []):
        with pytest.raises(ValueError, match="say --direction"):
            find_direction(unclear)


def candidates_of(outputs: list[str], valid_only: bool) -> tuple[list[Candidate], Counter]:
    logps = {"OCC": -5.0, "CCO": -3.0, "C1CC": -1.0, "CC(": -2.0, "": -9.0, "CCN": -3.5}
    counts = Counter()
    merged = merge(CAP2MOL, {"it": outputs}, {}, False, valid_only, counts)
    ranked = spell(merged, {("it", text): (logp, 3) for text, logp in logps.items()})
    ranked = {source: order(found, "logp", 1.0) for source, found in ranked.items()}
    return rows_of(["it"], CAP2MOL, ranked, {}, counts), counts


def test_one_molecule_in_two_spellings_is_one_candidate():
    outputs = ["OCC", "CCO", "C1CC", "", "CC(", "C1CC", "CCN"]
    found, counts = candidates_of(outputs, valid_only=False)
    assert [(c.rank, c.output, c.valid, c.count, c.logp) for c in found] == [
        (1, "CCO", True, 2, -3.0),
        (2, "CCN", True, 1, -3.5),
        (3, "C1CC", False, 2, -1.0),
        (4, "CC(", False, 1, -2.0),
        (5, "", False, 1, -9.0),
    ]
    assert +counts == {
        "translated": 1,
        "candidates": 7,
        "candidates that are no molecule": 4,
        "duplicates merged": 2,
    }
    dropped, counts = candidates_of(outputs, valid_only=True)
    assert [c.output for c in dropped] == ["CCO", "CCN"] and counts["dropped by valid_only"] == 4
    nothing, counts = candidates_of(["C1CC", "CC("], valid_only=True)
    assert [(c.rank, c.output, c.note) for c in nothing] == [(None, "", "no valid candidate")]
    assert nothing.best() == [""] and counts["no valid candidate"] == 1


def test_each_rank_has_its_order():
    rows = [("a", -4.0, 2, -9.0, 1), ("b", -5.0, 5, -7.0, 3), ("c", -4.5, 3, -7.9, 1), ("d", None, 9, None, 2)]

    def best(rank, weight=1.0):
        made = [
            Candidate(1, "x", CAP2MOL, output=o, logp=p, tokens=n, reverse_logp=back, count=count, valid=True)
            for o, p, n, back, count in rows
        ]
        return "".join(c.output for c in order(made, rank, weight))

    assert {rank: best(rank) for rank in RANKS} == {
        "logp": "acbd",
        "mean_logp": "bcad",
        "channel": "bcad",
        "votes": "bdac",
    }
    assert best("channel", 0.1) == "acbd"


def test_captions_differ_by_words_and_say_which_groups_are_there():
    made = {"CCO": ["It is an alcohol.", "it is  an alcohol.", "A nitrile and an alcohol.", ""]}
    counts = Counter()
    facts, notes = sift(["CCO"], MOL2CAP, True)
    (found,) = merge(MOL2CAP, made, facts, True, True, counts).values()
    assert (
        notes == {}
        and [c.count for c, _ in found] == [2, 1]
        and +counts
        == {
            "candidates": 4,
            "empty candidates": 1,
            "dropped by valid_only": 1,
            "duplicates merged": 1,
        }
    )
    about = [c.properties for c, _ in found]
    assert [(a["groups_right"], a["groups_wrong"]) for a in about] == [("alcohol", ""), ("alcohol", "nitrile")]
    assert about[0]["formula"] == "C2H6O" and found[0][0].inchikey == "LFQSCWFLJHTTHZ-UHFFFAOYSA-N"


def test_the_noisy_channel_asks_the_other_direction(t5, tiny_policy):
    found = Translator(t5, reverse_model=str(tiny_policy))(CAPTIONS, num_candidates=4, rank="channel", max_new_tokens=8)
    assert {c.row for c in found} == {1, 2}
    for c in found:
        assert (c.reverse_logp is not None) == c.valid
    molecules = Translator(t5, reverse_model=str(tiny_policy))(
        ["CCO"], num_candidates=3, rank="channel", max_new_tokens=8
    )

    model, tokenizer = load_translator(str(tiny_policy))
    for c in molecules:
        (again,) = score(model, tokenizer, [(prompts_for(model.config, CAP2MOL, [c.output])[0], "CCO")])
        assert c.reverse_logp == pytest.approx(again.logp, abs=1e-3)


def test_a_translator_is_told_what_contradicts(t5):
    for how, message in (
        ({"rank": "best"}, "rank 'best': use one of logp"),
        ({"num_candidates": 0}, "at least 1"),
        ({"num_candidates": 4, "num_beams": 2}, "of 2 beams, at most so many"),
        ({"num_candidates": 4, "temperature": 0.0}, "sampled, at one over 0"),
        ({"direction": "mol2mol"}, "unknown direction 'mol2mol'"),
    ):
        with pytest.raises(ValueError, match=message):
            Translator(t5)("CCO", **how)
    with pytest.raises(ValueError, match="give a model or a system, one of them"):
        Translator()
    with pytest.raises(ValueError, match="a system has adapters of its own"):
        Translator(system="molt5_small", adapter="x")


def test_beams_are_candidates(t5):
    found = Translator(t5)(["CCO", "CCN"], num_candidates=3, num_beams=4, max_new_tokens=6)
    assert {c.row for c in found} == {1, 2} and found.counts["candidates"] == 6
    assert [c.logp for c in found if c.row == 1] == sorted((c.logp for c in found if c.row == 1), reverse=True)


def test_long_cells_of_a_csv_are_rows_like_others(t5, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["CCO"], ["C" * 1_000_000], ["CCN"]])
    run("--input", tmp_path / "in.csv", "--model", t5, "--output", tmp_path / "o.jsonl")
    assert [row["note"] for row in read_table(tmp_path / "o.jsonl")] == ["", "over 20,000 characters", ""]


def test_the_best_candidate_is_evaluated(t5, tmp_path):
    write_table(
        [{"molecule": m, "caption": c} for m, c in zip(["CCO", "CCN"], CAPTIONS, strict=True)], tmp_path / "p.csv"
    )
    args = ["--pairs", tmp_path / "p.csv", "--model", t5, "--no_fcd", "--max_new_tokens", 6, "--n_bootstrap", 20]
    args += ["--num_candidates", 3, "--rank", "votes", "--output", tmp_path / "e"]
    load_script("evaluate").main(list(map(str, args)))
    found = Translator(t5)(["CCO", "CCN"], MOL2CAP, num_candidates=3, rank="votes", max_new_tokens=6)
    rows = [row for row in read_table(tmp_path / "e" / "predictions.parquet") if row["direction"] == MOL2CAP]
    assert [row["prediction"] for row in rows] == found.best()
    record = json.loads((tmp_path / "e" / "metrics.json").read_text())
    assert record["directions"][MOL2CAP]["counts"]["candidates"] == 6
