"""The script as a user runs it: outputs that exist, models, two processes, a kill, mistakes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_t5

from lmolt.data.triples import read_triples
from lmolt.files import write_table

ROOT = Path(__file__).resolve().parents[1]
MOLECULES = ["C" * n + end for n in range(1, 6) for end in ("O", "N", "Cl", "c1ccccc1")]
PAIRS = [
    {"id": f"p{i}", "molecule": smiles, "caption": f"Molecule {i} has {len(smiles)} signs."}
    for i, smiles in enumerate(MOLECULES)
]
TWO_PROCESSES = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
"""


def command(*args, launcher=(sys.executable,)) -> list[str]:
    return [*launcher, str(ROOT / "scripts" / "make_triples.py"), *map(str, args)]


def run(*args, launcher=(sys.executable,), cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return subprocess.run(
        command(*args, launcher=launcher), capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )


@pytest.fixture
def pairs(tmp_path) -> Path:
    write_table(PAIRS, tmp_path / "pairs.csv")
    return tmp_path / "pairs.csv"


def test_outputs_that_exist(pairs, tmp_path):
    captions = [pair["caption"].upper() + " " if i < 3 else f"Wrong {i}." for i, pair in enumerate(PAIRS)]
    captions[3] = " "
    (tmp_path / "captions.txt").write_text("".join(line + "\n" for line in captions))
    molecules = [{"id": p["id"], "output": "C1CC" if i < 4 else "CC"} for i, p in enumerate(PAIRS)]
    molecules[4]["output"] = "NC"  # the first amine in another order
    write_table(molecules[:-1], tmp_path / "molecules.jsonl")
    outputs = ("--mol2cap_outputs", tmp_path / "captions.txt", "--cap2mol_outputs", tmp_path / "molecules.jsonl")
    out = tmp_path / "triples.parquet"
    done = run("--pairs", pairs, *outputs, "--output", out, "--fraction", 1, "--same_pairs")
    assert done.returncode == 0, done.stderr
    triples, summary = read_triples(out), json.loads(out.with_suffix(".json").read_text())
    assert summary["counts"] == {
        "pairs read": 20,
        "pairs sampled": 20,
        "pairs used": 20,
        "mol2cap: output equal to the preferred one": 3,
        "mol2cap: empty output": 1,
        "mol2cap: pairs without a wrong output": 4,
        "mol2cap: triples": 16,
        "cap2mol: invalid SMILES kept": 4,
        "cap2mol: no output": 1,
        "cap2mol: pairs without a wrong output": 1,
        "cap2mol: triples": 19,
    }
    assert triples[0] == {
        "id": "p4",
        "direction": "mol2cap",
        "source": MOLECULES[4],
        "chosen": PAIRS[4]["caption"],
        "rejected": "Wrong 4.",
    }
    assert summary["sha256"]["pairs.csv"] == hashlib.sha256(pairs.read_bytes()).hexdigest()
    assert summary["directions"]["cap2mol"]["validity of rejected"] == pytest.approx(15 / 19)
    assert summary["arguments"]["fraction"] == 1.0 and summary["versions"]["rdkit"]


def test_leakage_and_several_candidates_of_a_file(pairs, tmp_path):
    """Amines are tested on; of four candidates for each alcohol the closest wrong molecule is taken."""
    test = [{"molecule": smiles[::-1], "caption": "An amine."} for smiles in MOLECULES if smiles.endswith("N")]
    write_table(test, tmp_path / "test.csv")
    write_table([*PAIRS, PAIRS[0] | {"id": "again"}, {"id": "none", "molecule": "C", "caption": " "}], pairs)
    outputs = [
        {"id": pair["id"], "prediction": output}
        for pair in PAIRS
        for output in ("C1CC", "c1ccccc1", "C" + pair["molecule"], pair["molecule"])
    ]
    write_table(outputs, tmp_path / "outputs.parquet")
    arguments = ("--pairs", pairs, "--directions", "cap2mol", "--cap2mol_outputs", tmp_path / "outputs.parquet")
    arguments += ("--fraction", 1, "--invalid_pairs", "drop", "--deduplicate", "--exclude", tmp_path / "test.csv")
    done = run(*arguments, "--output", tmp_path / "t.jsonl")
    assert done.returncode == 0, done.stderr
    triples, summary = read_triples(tmp_path / "t.jsonl"), json.loads((tmp_path / "t.json").read_text())
    assert [(t["chosen"], t["rejected"]) for t in triples] == [
        (smiles, "C" + smiles) for smiles in MOLECULES if not smiles.endswith("N")
    ]
    assert summary["counts"] == {
        "pairs read": 21,
        "empty caption dropped": 1,
        "pairs sampled": 21,
        "pairs excluded": 5,
        "molecule of an excluded pair dropped": 5,
        "duplicate molecule dropped": 1,
        "pairs used": 15,
        "cap2mol: output equal to the preferred one": 15,
        "cap2mol: triples": 15,
    }
    assert "molecule of an excluded pair dropped" in done.stdout and "Morgan Tanimoto" in done.stdout
    assert summary["directions"]["cap2mol"]["validity of rejected"] == 1
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_directions_share_no_pair_and_the_seed_decides(pairs, tmp_path):
    (tmp_path / "c.txt").write_text("Wrong.\n" * 20)
    (tmp_path / "m.txt").write_text("C1CC\n" * 20)
    outputs = ("--mol2cap_outputs", tmp_path / "c.txt", "--cap2mol_outputs", tmp_path / "m.txt")
    of = {}
    for seed in (0, 0, 1):
        done = run("--pairs", pairs, *outputs, "--output", tmp_path / "t.jsonl", "--fraction", 0.5, "--seed", seed)
        assert done.returncode == 0, done.stderr
        triples = read_triples(tmp_path / "t.jsonl")
        assert len({t["id"] for t in triples}) == len(triples) == 10
        assert sum(t["direction"] == "mol2cap" for t in triples) == 5
        assert of.setdefault(seed, triples) == triples
    assert of[0] != of[1]
    done = run("--pairs", pairs, *outputs, "--output", tmp_path / "t.jsonl", "--drop_invalid", "--fraction", 0.5)
    counts = json.loads((tmp_path / "t.json").read_text())["counts"]
    assert counts["cap2mol: invalid SMILES dropped"] == 5 and counts["cap2mol: triples"] == 0


def test_models_a_kill_and_two_processes(pairs, tmp_path, tiny_policy):
    t5 = make_t5(tiny_policy, tmp_path / "t5")
    write_table([*PAIRS, {"id": "long", "molecule": "CN" * 600, "caption": "Long."}], pairs)
    models = ("--mol2cap_model", tiny_policy, "--cap2mol_model", t5, "--max_new_tokens", 24, "--tokens_per_batch", 200)
    sampled = ("--num_candidates", 2, "--temperature", 1.5, "--top_p", 0.95)
    arguments = ("--pairs", pairs, "--fraction", 1, "--same_pairs", "--too_long", "drop", *models, *sampled, "--output")

    # killed as soon as something is in the journal; what is there is not made again
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    journal = tmp_path / "killed.jsonl.journal"
    rows = lambda: [line for f in journal.rglob("*.jsonl") for line in f.read_bytes().split(b"\n") if line]
    process = subprocess.Popen(command(*arguments, tmp_path / "killed.jsonl"), env=environment)
    while process.poll() is None and not rows():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = rows()
    assert 0 < len(before) < 82 and not (tmp_path / "killed.jsonl").exists()
    done = run(*arguments, tmp_path / "killed.jsonl")
    assert done.returncode == 0, done.stderr
    assert sum(map(int, re.findall(r"(\d+) of 4[02] rows are in", done.stdout))) == len(before)
    assert not journal.exists()
    triples = read_triples(tmp_path / "killed.jsonl")
    counts = json.loads((tmp_path / "killed.json").read_text())["counts"]
    assert counts["mol2cap: over the model's positions"] == 1 and counts["mol2cap: triples"] == 20
    assert [t["id"] for t in triples if t["direction"] == "mol2cap"] == [pair["id"] for pair in PAIRS]

    # two processes, never stopped, write the same bytes
    (tmp_path / "two.yaml").write_text(TWO_PROCESSES)
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml"))
    done = run(*arguments, tmp_path / "two.jsonl", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "(1 of 2 processes)" in done.stderr and done.stdout.count("wrote") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "killed.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "{pairs}", "--output", "t.jsonl"], "give --mol2cap_model or --mol2cap_outputs"),
        (
            ["--pairs", "{pairs}", "--output", "t.csv", "--mol2cap_model", "m", "--cap2mol_model", "m"],
            ".parquet or .jsonl",
        ),
        (
            ["--pairs", "demo", "--output", "t.jsonl", "--num_candidates", "4", "--temperature", "0"],
            "--num_candidates 4 at --temperature 0.0: candidates are sampled",
        ),
        (
            ["--pairs", "no.csv", "--output", "t.jsonl", "--directions", "mol2cap", "--mol2cap_model", "m"],
            "no such file",
        ),
        (
            ["--pairs", "{bad}", "--output", "t.jsonl", "--directions", "mol2cap", "--mol2cap_model", "m"],
            "'C1CC', does not",
        ),
        (
            ["--pairs", "{pairs}", "--output", "t.jsonl", "--directions", "mol2cap", "--mol2cap_outputs", "{bad}"],
            "row 1: no column 'prediction' (or 'output'), found molecule, caption",
        ),
        (
            ["--pairs", "{pairs}", "--fraction", "2", "--output", "t.jsonl", "--directions", "mol2cap"]
            + ["--mol2cap_model", "m"],
            "a fraction is over 0 and at most 1, got 2.0",
        ),
        (
            ["--pairs", "{twice}", "--fraction", "1", "--output", "t.jsonl", "--directions", "mol2cap"]
            + ["--mol2cap_outputs", "{outputs}"],
            "its outputs are of ids, but 2 pairs have the id '7'; give each pair its own",
        ),
        (
            ["--pairs", "{pairs}", "--output", "{pairs}/t.jsonl", "--directions", "mol2cap", "--mol2cap_model", "m"],
            "File exists",
        ),
        (
            ["--pairs", "{pairs}", "--output", "{folder}", "--directions", "mol2cap", "--mol2cap_model", "m"],
            "folder.jsonl: is a folder; name the file, such as",
        ),
    ],
)
def test_a_users_mistake_is_one_message(pairs, tmp_path, arguments, message):
    bad = tmp_path / "bad.csv"
    bad.write_text("molecule,caption\nC1CC,ring\n")
    twice, outputs, folder = tmp_path / "twice.csv", tmp_path / "outputs.csv", tmp_path / "folder.jsonl"
    twice.write_text("id,molecule,caption\n7,C,gas\n7,CC,gas\n")
    outputs.write_text("id,prediction\n7,ring\n7,acid\n")
    folder.mkdir()
    files = {"pairs": pairs, "bad": bad, "twice": twice, "outputs": outputs, "folder": folder}
    done = run(*[argument.format(**files) for argument in arguments], cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "t.jsonl").exists()


def test_a_prompt_over_the_positions_is_found_before_a_model_is_loaded(tmp_path, tiny_policy):
    long = {"id": "long", "molecule": "CN" * 600, "caption": "Long."}
    write_table([*PAIRS, long], tmp_path / "pairs.tsv")
    arguments = ("--pairs", tmp_path / "pairs.tsv", "--directions", "mol2cap", "--mol2cap_model", tiny_policy)
    arguments += ("--fraction", 1, "--max_new_tokens", 4, "--output", tmp_path / "t.jsonl")
    done = run(*arguments)
    assert done.returncode == 2 and "prompt 21 of 21" in done.stderr and "Loading weights" not in done.stderr
    assert done.stderr.count("\n") == 1  # nothing of other libraries' beside the message


def test_help_is_quick():
    start = time.monotonic()
    done = run("--help")
    assert done.returncode == 0 and "half and half" in done.stdout
    assert time.monotonic() - start < 2
