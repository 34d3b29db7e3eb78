"""The way to and from the Hub, against a small one on this machine (hub_server.py): the libraries' own code asks it."""

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
import xxhash
import yaml
from hub_server import HubServer

from lmolt import card, ownership
from lmolt.data.triples import write_triples
from lmolt.files import write_table

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
    readme = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
    readme += b"  - split: validation\n    path: data/validation-*\n---\n"
    hub.add("org/parquet", {
        "README.md": readme,
        "data/train-00000-of-00001.parquet": parquet(rows),
        "data/validation-00000-of-00001.parquet": parquet(rows[:1]),
    }, "dataset")  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    hub.add("org/jsonl", {"train.jsonl": lines.encode()}, "dataset", private=True)
    code = (
        "import sys, json; from lmolt.data.pairs import read_pairs\n"
        "print(json.dumps(read_pairs(sys.argv[1], sys.argv[2] or None)))"
    )
    environment = hub.environment(tmp_path / "home")
    wanted = [{"id": f"row {n}", **row} for n, row in enumerate(rows, 1)]
    assert json.loads(python(code, environment, "org/parquet", "train")) == wanted
    assert json.loads(python(code, environment, "org/parquet", "validation")) == wanted[:1]
    with pytest.raises(AssertionError, match="could not be loaded"):
        python(code, environment, "org/jsonl", "")  # private
    assert json.loads(python(code, hub.environment(tmp_path / "own", hub.login("org")), "org/jsonl", "")) == wanted


def test_a_model_on_the_hub_is_known_by_its_files(hub, tmp_path):
    code = "from lmolt.models.hashes import model_hashes; print(model_hashes('org/base')['base config'])"
    for content in (b"{}", b'{"hidden_size": 64}'):
        hub.add("org/base", {"config.json": content})
        digest = f"{len(content)}-{xxhash.xxh3_128_hexdigest(content)}"
        assert python(code, hub.environment(tmp_path / "home")) == f"{digest}\n"


# --- uploading


@pytest.fixture
def train(hub, tmp_path, tiny_policy, few_triples):
    """Runs a short training of org/base that uploads; (code, stdout, stderr). Nothing it leaves holds the token."""
    write_triples(few_triples[:8], tmp_path / "triples.jsonl")
    readme = {"README.md": b"---\nlicense: llama2\n---\n# base\n"}
    hub.add("org/base", {file.name: file.read_bytes() for file in tiny_policy.iterdir()} | readme)

    def run(token: str, *arguments):
        command = [sys.executable, ROOT / "scripts" / "train_pref.py", "--model", "org/base", "--loss", "cpo"]
        command += [
            "--triples",
            tmp_path / "triples.jsonl",
            "--output_dir",
            tmp_path / "cpo",
            "--num_train_epochs",
            "1",
        ]
        command += ["--load_in_4bit", "false", "--bf16", "false", "--lora_r", "4", "--eval_fraction", "0.3"]
        command += ["--gradient_accumulation_steps", "4", "--push_to_hub", "--hub_model_id", "alice/cpo", *arguments]
        environment = hub.environment(tmp_path / "home", token)
        done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
        left = [file.read_bytes() for file in (tmp_path / "cpo").rglob("*") if file.is_file()]
        for repository in hub.repositories.values():
            left += [data for files in repository.commits.values() for data in files.values()]
        assert not any(token.encode() in text for text in [*left, done.stdout.encode(), done.stderr.encode()])
        return done.returncode, done.stdout, done.stderr

    return run


def test_a_finished_adapter_is_uploaded_and_its_cards_python_runs(hub, tmp_path, train, tiny_policy):
    from lmolt.generation.translate import load_translator, translate
    from lmolt.prompts import build_prompt

    token = hub.login("alice")
    hub.cut("PUT /lfs/", after=1000, times=1)  # once, which huggingface_hub mends by itself
    revision = next(iter(hub.repositories["model", "org/base"].commits))
    mine = (".env", "notes/private.csv", "old_run/checkpoint-5/optimizer.pt")
    for name in mine:
        (tmp_path / "cpo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cpo" / name).write_text("mine")
    code, out, err = train(token, "--hub_private_repo", "true", "--hub_revision", "v1", "--revision", revision)
    assert code == 0, err
    assert "uploaded http" in out and len([line for line in hub.requests if "/commit/" in line]) == 1
    assert hub.repositories["model", "alice/cpo"].private and list(hub.files("alice/cpo")) == [".gitattributes"]
    files = hub.files("alice/cpo", revision="v1")
    kept = {file.name: file.read_bytes() for file in (tmp_path / "cpo").iterdir() if file.name[0] not in ".cno"}
    assert files == kept | {".gitattributes": b""} and files.keys() >= {"adapter_model.safetensors", "README.md"}
    text = files["README.md"].decode()
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["base_model"] == ["org/base"] and metadata["license"] == "llama2"
    assert json.loads(files["adapter_config.json"])["revision"] == revision and f"revision `{revision}`" in text
    assert "co2_eq_emissions" not in metadata and str(tmp_path) not in text
    hub.add("alice/cpo", files, private=True)
    shown = python(text.split("```python\n")[1].split("```")[0], hub.environment(tmp_path / "other", token))
    model, tokenizer = load_translator(str(tiny_policy), str(tmp_path / "cpo"), dtype="float32")
    expected = translate(model, tokenizer, [build_prompt("mol2cap", "CCO")], max_new_tokens=20)[0].rstrip("\ufffd")
    assert expected and expected in shown  # its beginning: near-ties of a barely trained model are rounding's to decide


def test_a_failed_upload_leaves_the_run_and_says_how_to_upload_it_later(hub, tmp_path, train):
    token = hub.login("alice")
    hub.cut("POST /api/models/alice/cpo/commit", after=1000)
    code, out, err = train(token)
    assert code == 2 and "Traceback" not in err
    assert f"wrote {tmp_path / 'cpo'}: the adapter" in out
    message = err[err.index("error: ") :]
    assert "is finished and stays as it is, but its upload to alice/cpo failed (Server disconnected" in message
    command = shlex.split(message[message.index("hf upload ") :])
    assert command[:3] == ["hf", "upload", "alice/cpo"]
    hub.cuts.clear()
    command[0] = str(Path(sys.executable).with_name("hf"))
    done = subprocess.run(command, env=hub.environment(tmp_path / "home", token), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {file.name: file.read_bytes() for file in (tmp_path / "cpo").iterdir() if file.name[0] not in ".c"}
    assert hub.files("alice/cpo") == kept | {".gitattributes": b""}
    assert list((tmp_path / "cpo").glob("checkpoint-*"))


def test_without_rights_nothing_is_trained(hub, tmp_path, train):
    hub.add("alice/cpo", {})
    code, _, err = train(hub.login("bob"))
    assert code == 2 and "Traceback" not in err and not (tmp_path / "cpo").exists()
    message = err[err.index("error: ") :]
    assert "can't push to alice/cpo on the Hub (403 Forbidden: You don't have the rights" in message
    assert len(message.splitlines()) == 1


def script(name: str, hub: HubServer, home: Path, token: str, *arguments) -> tuple[int, str, str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    done = subprocess.run(command, env=hub.environment(home, token), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_merged_model_is_uploaded_and_its_cards_python_runs(hub, tmp_path, tiny_policy):
    files, token = {file.name: file.read_bytes() for file in tiny_policy.iterdir()}, hub.login("alice")
    for name in ("org/a", "org/b"):
        hub.add(name, files | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    arguments = ("--method", "linear", "--models", "org/a", "org/b", "--weights", "1", "1", "--push_to_hub")
    hub.cut("POST /api/models/alice/merged/commit", after=1000, times=1)
    code, out, err = script("merge.py", hub, tmp_path / "home", token, *arguments, "--output", tmp_path / "merged")
    assert code == 2 and "its upload to alice/merged failed (Server disconnected" in err
    command = shlex.split(err[err.index("hf upload ") :])
    command[0] = str(Path(sys.executable).with_name("hf"))
    subprocess.run(command, env=hub.environment(tmp_path / "home", token), check=True, capture_output=True)
    files = hub.files("alice/merged")
    assert files.keys() >= {"config.json", "tokenizer.json", "model.safetensors", "merge.json", "README.md"}
    metadata = yaml.safe_load((text := files["README.md"].decode()).split("---\n")[1])
    assert metadata["base_model"] == ["org/a", "org/b"] and metadata["base_model_relation"] == "merge"
    assert metadata["license"] == "apache-2.0"
    assert python(text.split("```python\n")[1].split("```")[0], hub.environment(tmp_path / "other"))
    assert token not in out + err and not any(token.encode() in data for data in files.values())


def test_metrics_come_onto_the_card(hub, tmp_path, few_triples):
    token = hub.login("alice")
    hub.add("alice/cpo", {"README.md": b"---\nlicense: mit\n---\n\n# cpo\n"})
    options = [
        "--no_fcd",
        "--n_bootstrap",
        20,
        "--n_shuffles",
        9,
        "--output",
        tmp_path / "cpo",
        "--direction",
        "cap2mol",
    ]
    rows = [t | {"reference": t["chosen"], "prediction": t["rejected"]} for t in few_triples if t["id"][0] == "c"]
    write_table(rows, tmp_path / "outputs.jsonl")
    options += [
        "--direction",
        "cap2mol",
        "--predictions",
        tmp_path / "outputs.jsonl",
        "--push_to_hub",
        "--hub_model_id",
    ]
    code, _, err = script("evaluate.py", hub, tmp_path / "home", token, *options, "alice/absent")
    assert code == 2 and "can't push to alice/absent on the Hub (404" in err and not (tmp_path / "cpo").exists()
    for _ in range(2):  # the second time they replace the first's
        code, out, err = script("evaluate.py", hub, tmp_path / "home", token, *options, "alice/cpo")
        assert code == 0, err
        files = hub.files("alice/cpo")
        metadata = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        [result] = metadata["model-index"][0]["results"]
        values = {metric["type"]: metric["value"] for metric in result["metrics"]}
        record = json.loads((tmp_path / "cpo" / "metrics.json").read_text())
        assert json.loads(files["evaluation/cpo/metrics.json"]) == record
        found = record["directions"]["cap2mol"]["metrics"]
        assert values == {key: entry["value"] for key, entry in found.items() if "value" in entry and "/" not in key}
        assert values["exact_match"] == 0 and metadata["license"] == "mit"
        assert files["README.md"].endswith(b"# cpo\n") and token not in out + err


CALLS = """import sys, time
from lmolt import hub
time.sleep = lambda seconds: None  # between huggingface_hub's own further attempts
for call in sys.argv[1:]:
    try:
        print(eval(call))
    except (ValueError, OSError) as error:
        print(str(error).replace("\\n", " "))
"""


@pytest.mark.parametrize(
    ("token", "calls"),
    [
        (None, {"hub.reserve('alice/new')": "--push_to_hub needs a token that may write: log in with `hf auth login`"}),
        ("hf_unknown", {"hub.reserve('alice/new')": r"can't push to alice/new on the Hub \(.*Invalid credentials"}),
        ("hf_bad\x0btoken", {"hub.reserve('alice/new')": r"can't push to alice/new on the Hub \(.*Bearer \[token\]"}),
        ("reader", {"hub.reserve('alice/there')": "403 Forbidden: You don't have the rights to write .* 'alice'"}),
        ("alice", {
            "hub.reserve('new', private=True)": "^alice/new$",
            "hub.reserve('alice/there', private=True)": "alice/there exists and is public; make it private",
            "hub.push('{folder}', 'merge', 'alice/there')": r"{folder} is finished .* \(.*disconnected.*\). Upload",
            "hub.licence(['org/licensed', 'org/licensed'])": "^{'license': 'mit'}$",
            "hub.licence(['org/licensed', '{folder}'])": "^{}$",
        }),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_without_the_token(hub, tmp_path, token, calls):
    tokens = {"alice": hub.login("alice"), "reader": hub.login("alice", write=False)}
    token = tokens.get(token, token)
    hub.add("alice/there", {"README.md": b""})
    hub.add("org/licensed", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.cut("PUT /lfs/", after=1000)
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(5000))
    ownership.claim(tmp_path, "merge", ["adapter_model.safetensors"])
    fill = lambda text: text.replace("{folder}", str(tmp_path))
    shown = python(CALLS, hub.environment(tmp_path / "home", token), *map(fill, calls))
    for line, pattern in zip(shown.splitlines(), calls.values(), strict=True):
        assert re.search(fill(pattern), line)
    assert token is None or token not in shown
    assert list(hub.files("alice/there")) == ["README.md"]


def test_a_hub_whose_storage_of_large_files_is_away(hub, tmp_path):
    """Xet, on by default: the pipeline of huggingface_hub is another one there."""
    hub.add("alice/there", {})
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(5000))
    ownership.claim(tmp_path, "merge", ["adapter_model.safetensors"])
    environment = hub.environment(tmp_path / "home", hub.login("alice"))
    del environment["HF_HUB_DISABLE_XET"]
    shown = python(CALLS, environment, f"hub.push('{tmp_path}', 'merge', 'alice/there')")
    assert "its upload to alice/there failed (" in shown and "Upload it later with: hf upload alice/there" in shown


# --- the card


def test_energy_and_emissions_stand_on_the_card_where_they_were_measured(tmp_path):
    state, efficiency = {"log_history": [], "best_global_step": None}, {"gpu_energy_joules": None}
    assert card.measured(state, efficiency, card.read_emissions(tmp_path / "emissions.csv"), 2) == {}
    header, row = "emissions,energy_consumed,country_name,cpu_model,gpu_model\n", "0.0125,0.05,France,EPYC,2 x H100\n"
    (tmp_path / "emissions.csv").write_text(header + row + row)
    emissions = card.read_emissions(tmp_path / "emissions.csv")
    assert emissions == {
        "emissions": 25.0,
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
        "geographical_location": "France",
        "hardware_used": "2 x H100",
    }
    efficiency["gpu_energy_joules"] = 7.2e6
    held_out = {"step": 2, "eval_loss": 1.5, "eval_runtime": 9, "eval_mol2cap/nll": 2.0, "eval_rewards/margins": 1}
    state["log_history"] = [{"step": 1, "loss": 3.0}, held_out]
    assert card.measured(state, efficiency, emissions, 2) == {
        "held-out, step 2": "loss 1.5, mol2cap/nll 2",
        "energy": "2 kWh of all GPUs (NVML)",
        "emissions": "25 g CO2-eq (CodeCarbon)",
    }
    shown = card.measured(state, efficiency, emissions, 3)  # step 2's scores are not those of step 3
    assert shown["held-out"] == "not evaluated at step 3, whose weights these are"


def test_a_card_names_no_folder_as_base_model_and_tells_what_a_merged_base_is_of(tmp_path):
    of_both = card.front_matter(["lora"], [str(tmp_path), "org/base"])
    assert of_both == "---\ntags:\n- lora\nbase_model:\n- org/base\n---\n"
    assert card.front_matter(["lora"], [str(tmp_path)]) == "---\ntags:\n- lora\n---\n"
    arguments = {"method": "slerp", "models": ["org/a", "b"], "base": None, "adapter": None, "weights": [0.95, 0.05]}
    assert card.described_merge(tmp_path) == ""
    (tmp_path / "merge.json").write_text(json.dumps({"arguments": arguments}))
    assert card.described_merge(tmp_path) == ", made by slerp of `org/a`, `b` with weights [0.95, 0.05]"
