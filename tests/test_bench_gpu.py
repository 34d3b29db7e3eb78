"""benchmarks/gpu.py at its toy scale: each part ends, and says where it could not run and why."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

MAY_BE_SKIPPED = {
    "new_shapes": "no GPU",
    "memory": "no GPU",
    "offload": "no GPU",
    "out_of_memory": "no GPU",
    "trl": "pip install -r benchmarks/requirements.txt",
}


def run(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the toy scale is a CPU's")
def test_all_parts_end_on_a_cpu_and_finished_ones_are_skipped(tmp_path, compiled):
    done = run("--output", tmp_path)
    assert done.returncode == 0, done.stderr
    parts = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    names = "versions forms new_shapes attention head steps trl tests memory references translating strategies offload"
    assert set(parts) == {*names.split(), "resume", "out_of_memory"}
    for name, part in parts.items():
        if name in MAY_BE_SKIPPED and part["state"].startswith("skipped"):
            assert MAY_BE_SKIPPED[name] in part["state"]
        else:
            assert part["state"] == "finished", part
            assert part["figures"]
            assert not [value for value in part["figures"].values() if str(value).startswith("failed")]
    assert parts["forms"]["figures"]["llama_float32_tiles_nats"] < 1e-3
    assert parts["tests"]["figures"]["exit_code"] == 0
    strategies = parts["strategies"]["figures"]
    losses = [strategies[f"{name}_loss"] for name in ("ddp", "zero2", "zero3")]
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-3)
    resumed = parts["resume"]["figures"]
    assert (
        resumed["exit_code"] == 75
        and len(resumed["stopped_relative"]) == 6
        and resumed["stopped_largest_relative"] == 0
    )
    again = run("--output", tmp_path, "head")
    assert "head: done" in again.stdout


def test_a_part_that_there_is_not_is_told():
    done = run("hed")
    assert done.returncode == 2
    assert "no part hed; there are versions, forms" in done.stderr
