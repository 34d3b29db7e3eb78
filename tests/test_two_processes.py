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


# What two processes do together, case by case; each says what came of it
TOGETHER = """
import os, sys
from pathlib import Path
from accelerate import PartialState
state = PartialState(cpu=True)
rank = state.process_index
from lmolt.distributed.strategy import first_decides, shared_out
from lmolt.generation.translate import load_translator, translate
from lmolt.training import checkpoints

def agree(case):
    os.chdir(Path(case) / "ab"[rank])
    found = first_decides(lambda: checkpoints.last_good_checkpoint(Path(".")))
    checkpoints.check_seen_alike(found, patience=1)
    return found

def share(case):
    rows = [str(i) for i in range(5)]
    if case == "other" and rank == 1:
        rows[2] = "x"
    def encode(row):
        if row == case:
            raise ValueError(f"row {row} is wrong")
        computed.append(row)
        return row * 2
    return "".join(shared_out(encode, rows))

def other(case):
    dtype = "float16" if rank and case == "precision" else "float32"
    model, tokenizer = load_translator(os.environ["POLICY"], dtype=dtype)
    prompts = ["CC", "CO" if rank and case == "prompts" else "CN"]
    return len(translate(model, tokenizer, prompts, max_new_tokens=2))

for what in sys.argv[1:]:
    computed = []
    name, case = what.split("=")
    try:
        said = globals()[name](case)
    except ValueError as error:
        said = error
    os.write(1, f"{what}\\t{rank} {len(computed)} {said}\\n".encode())  # in one piece: both write to the same pipe
    state.wait_for_everyone()
os._exit(0)  # as strategy.exit_other_processes: a thread of gloo's may abort an interpreter that finalizes
"""
SEEN = ("same", "other", "none")
SHARED = {
    "right": ["0 3 0011223344", "1 2 0011223344"],
    "3": ["0 3 row 3 is wrong (process 1)", "1 1 row 3 is wrong (process 1)"],
    "other": [
        f"{rank} 0 process 1 reads other rows than the first; give all machines the same file" for rank in (0, 1)
    ],
}


@pytest.fixture(scope="module")
def together(tmp_path_factory, tiny_policy) -> dict[str, list[str]]:
    """What both processes said of each case, the first process first."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "two.yaml").write_text(TWO)
    (folder / "together.py").write_text(TOGETHER)
    for second in SEEN:  # a shared disk that shows another state to another machine
        for name, content in (("a", "x"), ("b", "x" if second == "same" else "y")):
            checkpoint = folder / second / name / "checkpoint-3"
            checkpoint.mkdir(parents=True)
            (checkpoint / "weights").write_text(content)
            (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
            if name == "a" or second != "none":
                checkpoints.write_manifest(checkpoint)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "two.yaml"]
    command += ["--main_process_port", free_port(), folder / "together.py", *(f"share={case}" for case in SHARED)]
    command += ["other=prompts", "other=precision", *(f"agree={folder / second}" for second in SEEN)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "POLICY": str(tiny_policy)}
    environment["LMOLT_CACHE"] = str(folder / "cache")
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in sorted(done.stdout.splitlines()):
        what, _, said = line.partition("\t")
        found.setdefault(what.replace(f"{folder}/", ""), []).append(said)
    return found


@pytest.mark.parametrize("second", SEEN)
def test_all_resume_the_same_checkpoint_or_none(second, together):
    said = together[f"agree={second}"]
    if second == "same":
        assert said == ["0 0 checkpoint-3", "1 0 checkpoint-3"]
    else:
        assert [line[0] for line in said] == ["0", "1"]
        assert all("checkpoint-3, which is another one, or none, on" in line for line in said)
        assert all(line.endswith("(process 1)") for line in said)


@pytest.mark.parametrize("case", SHARED)
def test_each_process_computes_its_share(case, together):
    assert together[f"share={case}"] == SHARED[case]


@pytest.mark.parametrize("case", ["prompts", "precision"])
def test_what_is_shared_out_is_the_same_for_all(case, together):
    """Else half of the outputs would be another machine's, of another precision, or be missing in the end."""
    why = "process 1 has other prompts, another model or precision than the first; give all machines the same"
    assert together[f"other={case}"] == [f"0 0 {why}", f"1 0 {why}"]
