"""The named corpora and the paper's translators, through the libraries' own code, from a Hub on this machine."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import HubServer
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from lmolt.data.triples import read_triples

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [{"molecule": "C" * n + "=O", "caption": f"an aldehyde of {n}."} for n in range(1, 13)]
UNSEEN = ["C" * a + "O" + "C" * b + "N" + "C" * c for a in range(15) for b in range(15) for c in range(15)]
READ = """
import json, sys
from collections import Counter
from lmolt.data.pairs import read_pairs
counts = Counter()
sets = [read_pairs(*spec.split(), counts, seed=seed) for seed, spec in enumerate(sys.argv[1:])]
print(json.dumps([sets, counts]))
"""


def splits(**tables: list[dict]) -> dict[str, bytes]:
    """The files of a data set on the Hub, as `push_to_hub` lays them out: a parquet file a split, named in the card."""
    files, card = {}, "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
        files[f"data/{split}-00000-of-00001.parquet"] = file.getvalue()
        card += f"  - split: {split}\n    path: data/{split}-*\n"
    return files | {"README.md": f"{card}---\n".encode()}


def make_molt5(folder: Path) -> Path:
    """A random T5 of version 1.1 with a tokenizer of SentencePiece's unigrams, as MolT5's checkpoints are."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(sign, -3.0) for sign in "CNO()=abcdefghijklmnopqrstuvwxyz.T"]
    pieces += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    T5Tokenizer(vocab=pieces, extra_ids=2).save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(pieces)}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "initializer_factor": 3.0}
    torch.manual_seed(2)
    T5ForConditionalGeneration(T5Config(**sizes, **ids, **kind)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with HubServer() as server:
        train = [*TRAIN, {"molecule": "CNO", "caption": "tested on."}, {"molecule": "CC", "caption": ""}]
        captions = [{"molecule": m, "caption": f"{nth} of {m}."} for m in UNSEEN for nth in ("first", "second")]
        valid, everything = TRAIN[:2], train + TRAIN[:2]
        names = [f"language-plus-molecules/{name}" for name in ("LPM-24_train", "LPM-24_train-extra")]
        server.add(names[0], splits(train=everything, split_train=train, split_valid=valid), "dataset")
        server.add(names[1], splits(train=train, split_train=train, split_valid=captions), "dataset")
        header = "CID,SMILES,description\n"
        files = {
            "train.csv": "7,C/C=C\\\\C,An alkene.\n",
            "validation.csv": "8,C,Gas.\n",
            "test.csv": "9,CO,Methanol.\n",
        }
        server.add("liupf/ChEBI-20-MM", {name: (header + row).encode() for name, row in files.items()}, "dataset")
        molt5 = make_molt5(tmp_path_factory.mktemp("molt5"))
        for system in ("smiles2caption", "caption2smiles"):
            server.add(f"language-plus-molecules/molt5-large-{system}-LPM24", molt5)
        yield server


def run(hub, folder: Path, *command) -> str:
    """The standard output of a Python command in the project's root, which sees this Hub alone."""
    environment = hub.environment(folder) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_names_stand_for(hub, tmp_path):
    specs = ["lpm24 test", "lpm24 test", "lpm24 validation", "chebi20 train", "chebi20 test"]  # seeds 0 and 1
    (test, other, validation, *chebi), counts = json.loads(run(hub, tmp_path, "-c", READ, *specs))
    assert [(pair["molecule"], pair["caption"]) for pair in validation] == [tuple(p.values()) for p in TRAIN[:2]]
    assert chebi == [
        [{"id": "7", "molecule": "C/C=C\\C", "caption": "An alkene."}],
        [{"id": "9", "molecule": "CO", "caption": "Methanol."}],
    ]
    molecules = [pair["molecule"] for pair in test]
    assert len(set(molecules)) == len(molecules) == 3000 and molecules == [m for m in UNSEEN if m in set(molecules)]
    assert all(pair["caption"] == f"first of {pair['molecule']}." for pair in test)
    assert molecules != [pair["molecule"] for pair in other]
    assert counts == {"further captions of a molecule left out": 2 * 3375, "doubled backslashes made single": 1}


def test_the_papers_triples_by_the_command_of_the_help(hub, tmp_path):
    text = (ROOT / "scripts" / "make_triples.py").read_text().replace("\\\\\n", "")
    script, *arguments = shlex.split(re.search(r"launch (scripts/make_triples.py --pairs lpm24 .*LPM24)\n", text)[1])
    arguments[arguments.index("--output") + 1] = tmp_path / "t.parquet"
    arguments += ["--fraction", 1, "--max_new_tokens", 6, "--invalid_pairs", "drop"]
    run(hub, tmp_path / "home", script, *arguments)
    counts = json.loads((tmp_path / "t.json").read_text())["counts"]
    triples = read_triples(tmp_path / "t.parquet")
    expected = {"pairs read": 13, "empty caption dropped": 1, "pairs excluded": 3000, "pairs used": 12}
    assert counts | expected | {"molecule of an excluded pair dropped": 1} == counts
    assert counts["mol2cap: triples"] == 6 and counts["cap2mol: invalid SMILES kept"] == counts["cap2mol: triples"] == 6
    both = [{triple["source"], triple["chosen"]} for triple in triples]
    assert len(both) == 12 and all(set(pair.values()) in both for pair in TRAIN)
