"""Two processes train like one: the same losses, gradients and weights at the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmolt.data.triples import write_triples
from lmolt.training import checkpoints

ROOT = Path(__file__).resolve().parents[1]
# MULTI_CPU starts one process; MULTI_GPU with use_cpu starts two over gloo
TWO = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("loss", ["sft", "dpo", "cpo", "kto"])
def test_two_processes_equal_one(loss, tmp_path, tiny_policy, few_triples):
    write_triples(few_triples[:23], tmp_path / "triples.jsonl")  # 23 rows: the last step doesn't divide by two
    (tmp_path / "two.yaml").write_text(TWO)
    arguments = ["--loss", loss, "--model", tiny_policy, "--triples", tmp_path / "triples.jsonl", "--bf16", "false"]
    arguments += ["--load_in_4bit", "false", "--use_cpu", "true", "--lora_dropout", "0", "--eval_fraction", "0"]
    arguments += ["--num_train_epochs", "1", "--learning_rate", "1e-2", "--save_strategy", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    launch += ["--main_process_port", free_port(), ROOT / "scripts" / "train_pref.py"]
    runs = {
        "one": [sys.executable, ROOT / "scripts" / "train_pref.py", *arguments, "--gradient_accumulation_steps", "4"],
        "two": [*launch, *arguments, "--gradient_accumulation_steps", "2", "--ddp_backend", "gloo"],
    }
    for name, command in runs.items():
        done = subprocess.run(
            [*map(str, command), "--output_dir", str(tmp_path / name)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["world_size"] == 2
    if loss in ("sft", "cpo"):  # else the second run finds the reference's log-probabilities, and scores less
        scored = [json.loads((tmp_path / name / "efficiency.json").read_text())["scored_tokens"] for name in runs]
        assert scored[0] <= scored[1] < 1.2 * scored[0]  # of both processes; more by the row that fills the last step
    logs = {
        name: [
            row
            for row in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in row
        ]
        for name in runs
    }
    assert len(logs["one"]) == len(logs["two"]) == 6
    for one, two in zip(logs["one"], logs["two"], strict=True):
        for key in ("loss", "grad_norm", "mol2cap/nll"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-5 if one["step"] == 1 else 1e-4), (key, one["step"])
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in runs)
    assert all(torch.allclose(two[name], one[name], atol=1e-4) for name in one)


AGREE = """
import os, sys
from pathlib import Path
from accelerate import PartialState
from lmolt.distributed import strategy
from lmolt.training import checkpoints
rank = PartialState(cpu=True).process_index
os.chdir(sys.argv[1 + rank])
try:
    found = strategy.first_decides(lambda: checkpoints.last_good_checkpoint(Path(".")))
    checkpoints.check_seen_alike(found, patience=1)
    said = found
except ValueError as error:
    said = error
os.write(1, f"{rank} {said}\\n".encode())  # in one piece: both write to the same pipe
PartialState().wait_for_everyone()
os._exit(0)  # as strategy.exit_other_processes: a thread of gloo's may abort an interpreter that finalizes
"""


@pytest.mark.parametrize("second", ["same", "other", "none"])
def test_all_resume_the_same_checkpoint_or_none(second, tmp_path):
    """Each process in a folder of its own: a shared disk that shows another state to another machine."""
    (tmp_path / "two.yaml").write_text(TWO)
    (tmp_path / "agree.py").write_text(AGREE)
    for name, content in (("a", "x"), ("b", "x" if second == "same" else "y")):
        checkpoint = tmp_path / name / "checkpoint-3"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(content)
        (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
        if name == "a" or second != "none":
            checkpoints.write_manifest(checkpoint)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    command += ["--main_process_port", free_port(), tmp_path / "agree.py", tmp_path / "a", tmp_path / "b"]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    said = sorted(done.stdout.splitlines())
    if second == "same":
        assert said == ["0 checkpoint-3", "1 checkpoint-3"]
    else:
        assert [line[0] for line in said] == ["0", "1"]
        assert all("checkpoint-3, which is another one, or none, on" in line for line in said)
        assert all(line.endswith("(process 1)") for line in said)


def test_a_cache_for_each_process_is_no_reason_to_wait(tmp_path, tiny_policy, few_triples):
    """DPO twice: the first process has the reference's log-probabilities of the first run, the second never has."""
    write_triples(few_triples[:8], tmp_path / "triples.jsonl")
    (tmp_path / "two.yaml").write_text(TWO)
    own = (
        f"import os, runpy, sys; os.environ['LMOLT_CACHE'] += os.environ['RANK']; sys.argv[0] = {str(ROOT)!r} + '/x'; "
    )
    own += f"sys.path.insert(0, {str(ROOT)!r}); from scripts.train_pref import command; command()"
    (tmp_path / "own.py").write_text(own)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    command += ["--main_process_port", free_port(), tmp_path / "own.py", "--loss", "dpo", "--model", tiny_policy]
    command += ["--triples", tmp_path / "triples.jsonl", "--bf16", "false", "--load_in_4bit", "false", "--use_cpu"]
    command += ["--eval_fraction", "0", "--max_steps", "1", "--save_strategy", "no", "--gradient_accumulation_steps", 2]
    for name, outcome in (("one", "computed"), ("two", "cached")):
        done = subprocess.run(
            [*map(str, command), "--output_dir", str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True,
            timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"log-probabilities {outcome}" in done.stdout
    assert [folder.name for folder in tmp_path.glob("cache?")] == ["cache0"]


MIXED = """
import os, sys
sys.path.insert(0, ROOT)
from lmolt.models import loading
from scripts import train_pref
loading.bf16_is_slow = train_pref.bf16_is_slow = lambda: os.environ["RANK"] == "1"
bf16 = train_pref.parse_arguments(["--model", "m", "--triples", "t.jsonl", "--use_cpu", "true"]).bf16
os.write(1, f"{bf16=}\\n".encode())
train_pref.command()
"""


def test_processors_of_two_kinds_compute_alike_or_not_at_all(tmp_path, tiny_policy, few_triples):
    """The first process decides about bf16; where --bf16 false leaves NF4's products to each, they would differ."""
    write_triples(few_triples[:8], tmp_path / "triples.jsonl")
    (tmp_path / "two.yaml").write_text(TWO)
    (tmp_path / "mixed.py").write_text(MIXED.replace("ROOT", repr(str(ROOT))))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    command += ["--main_process_port", free_port(), tmp_path / "mixed.py", "--loss", "cpo", "--model", tiny_policy]
    command += ["--triples", tmp_path / "triples.jsonl", "--bf16", "false", "--use_cpu", "true"]
    command += ["--eval_fraction", "0", "--output_dir", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert done.stdout.count("bf16=True") == 2
    assert "NF4 computes in is torch.float32, and torch.bfloat16 in the first process: the machine" in done.stderr


SHARE = """
import os, sys
from accelerate import PartialState
from lmolt.distributed.strategy import shared_out
rank = PartialState(cpu=True).process_index
computed = []
rows = [str(i) for i in range(5)]
if sys.argv[1] == "other" and rank == 1:
    rows[2] = "x"
def encode(row):
    if row == sys.argv[1]:
        raise ValueError(f"row {row} is wrong")
    computed.append(row)
    return row * 2
try:
    said = "".join(shared_out(encode, rows))
except ValueError as error:
    said = error
os.write(1, f"{rank} {len(computed)} {said}\\n".encode())
PartialState().wait_for_everyone()
os._exit(0)
"""


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("right", ["0 3 0011223344", "1 2 0011223344"]),
        ("3", ["0 3 row 3 is wrong (process 1)", "1 1 row 3 is wrong (process 1)"]),
        (
            "other",
            [f"{rank} 0 process 1 reads other rows than the first; give all machines the same file" for rank in (0, 1)],
        ),
    ],
)
def test_each_process_computes_its_share(case, said, tmp_path):
    (tmp_path / "two.yaml").write_text(TWO)
    (tmp_path / "share.py").write_text(SHARE)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    command += ["--main_process_port", free_port(), tmp_path / "share.py", case]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=120)
    assert sorted(done.stdout.splitlines()) == said, done.stderr[-2000:]


OTHER = """
import os, sys
from accelerate import PartialState
rank = PartialState(cpu=True).process_index
from lmolt.generation.translate import load_translator, translate
model, tokenizer = load_translator(sys.argv[2], dtype="float16" if rank and sys.argv[1] == "precision" else "float32")
prompts = ["CC", "CO" if rank and sys.argv[1] == "prompts" else "CN"]
try:
    said = len(translate(model, tokenizer, prompts, max_new_tokens=2))
except ValueError as error:
    said = error
os.write(1, f"{rank} {said}\\n".encode())
PartialState().wait_for_everyone()
os._exit(0)
"""


@pytest.mark.parametrize("case", ["prompts", "precision"])
def test_what_is_shared_out_is_the_same_for_all(case, tmp_path, tiny_policy):
    """Else half of the outputs would be another machine's, of another precision, or be missing in the end."""
    (tmp_path / "two.yaml").write_text(TWO)
    (tmp_path / "other.py").write_text(OTHER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    command += ["--main_process_port", free_port(), tmp_path / "other.py", case, tiny_policy]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=120)
    why = "process 1 has other prompts, another model or precision than the first; give all machines the same"
    assert sorted(done.stdout.splitlines()) == [f"0 {why}", f"1 {why}"], done.stderr[-2000:]
