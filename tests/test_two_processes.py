"""Two processes train like one: the same losses, gradients and weights at the same global batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmolt.data.triples import write_triples

ROOT = Path(__file__).resolve().parents[1]
# MULTI_CPU starts one process; MULTI_GPU with use_cpu starts two over gloo
TWO = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\n"


@pytest.mark.parametrize("loss", ["sft", "dpo", "cpo", "kto"])
def test_two_processes_equal_one(loss, tmp_path, tiny_policy, few_triples):
    write_triples(few_triples[:23], tmp_path / "triples.jsonl")  # 23 rows: the last step doesn't divide by two
    (tmp_path / "two.yaml").write_text(TWO)
    arguments = ["--loss", loss, "--model", tiny_policy, "--triples", tmp_path / "triples.jsonl", "--bf16", "false"]
    arguments += ["--load_in_4bit", "false", "--use_cpu", "true", "--lora_dropout", "0", "--eval_fraction", "0"]
    arguments += ["--num_train_epochs", "1", "--learning_rate", "1e-2", "--save_strategy", "no"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", tmp_path / "two.yaml"]
    launch += ["--main_process_port", port, ROOT / "scripts" / "train_pref.py"]
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
