"""The way to and from the Hub, against a small one on this machine (hub_server.py): the libraries' own code asks it."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def python(code: str, environment: dict, *arguments) -> str:
    """What the code prints, run from the project's root in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def parquet(rows: list[dict]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


def test_pairs_come_from_the_hub(hub, tmp_path):
    rows = [{"molecule": "CCO", "caption": "An alcohol."}, {"molecule": "C", "caption": "A gas."}]
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
    card += b"  - split: validation\n    path: data/validation-*\n---\n"
    hub.add("org/parquet", {
        "README.md": card,
        "data/train-00000-of-00001.parquet": parquet(rows),
        "data/validation-00000-of-00001.parquet": parquet(rows[:1]),
    }, "dataset")  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    hub.add("org/jsonl", {"train.jsonl": lines.encode()}, "dataset", private=True)
    code = (
        "import sys, json; from lmolt.pairs import read_pairs\n"
        "print(json.dumps(read_pairs(sys.argv[1], sys.argv[2] or None)))"
    )
    environment = hub.environment(tmp_path / "home")
    wanted = [{"id": str(n), **row} for n, row in enumerate(rows, 1)]
    assert json.loads(python(code, environment, "org/parquet", "train")) == wanted
    assert json.loads(python(code, environment, "org/parquet", "validation")) == wanted[:1]
    with pytest.raises(AssertionError, match="could not be loaded"):
        python(code, environment, "org/jsonl", "")  # private
    assert json.loads(python(code, hub.environment(tmp_path / "own", hub.login("org")), "org/jsonl", "")) == wanted


def test_models_come_from_the_hub(hub, tmp_path, tiny_policy):
    hub.add("org/policy", tiny_policy)
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])\n"
        "print(AutoTokenizer.from_pretrained(sys.argv[1])('CCO').input_ids)"
    )
    shown = python(code, hub.environment(tmp_path / "home"), "org/policy", tmp_path / "copy")
    assert json.loads(shown.splitlines()[-1])  # token ids
    copy = (tmp_path / "copy" / "model.safetensors").read_bytes()
    assert copy == (tiny_policy / "model.safetensors").read_bytes()
