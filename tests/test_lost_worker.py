"""A process or a machine is lost in mid-step: the others end soon and say what happened; restarted, the run goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from test_two_nodes import CPO, one_process, steps, two_nodes  # noqa: F401

from lmolt.triples import write_triples

ROOT = Path(__file__).resolve().parents[1]


def until(happens, processes: list[subprocess.Popen]) -> None:
    while not happens():
        assert all(process.poll() is None for process in processes), "the run ended before it could be disturbed"
        time.sleep(0.01)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that a launcher started, in the order of their ranks."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "LOCAL_RANK" in (environment := child.environ()) and child.ppid() != process.pid:
            found[environment["RANK"]] = child
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_killed_process_and_a_cut_cable(two_nodes, tmp_path, tiny_policy, few_triples):  # noqa: F811
    write_triples(few_triples, tmp_path / "triples.jsonl")
    arguments = ["--model", tiny_policy, "--triples", tmp_path / "triples.jsonl", "--load_in_4bit", "false"]
    arguments += ["--num_train_epochs", "10", "--save_strategy", "steps", "--save_steps", "5", *CPO]
    out = tmp_path / "out"
    resume = ["--output_dir", out, "--resume_from_checkpoint", "true"]
    saved = lambda: max([int(folder.name[11:]) for folder in out.glob("checkpoint-*")], default=0)

    def end_in_time(processes) -> None:
        start = time.monotonic()
        for process in processes:
            assert process.wait(timeout=60) not in (0, 75)
        assert time.monotonic() - start < 60

    nodes = two_nodes.train(*arguments, 2, *resume)
    until(lambda: saved() >= 5, nodes)
    workers(nodes[1])[0].send_signal(signal.SIGKILL)
    end_in_time(nodes)
    assert "SIGKILL" in two_nodes.said(1)
    assert f"error: node 1 ({os.uname().nodename}) failed with exit code 1" in two_nodes.said(0)

    before = saved()
    nodes = two_nodes.train(*arguments, 2, *resume, LMOLT_LOST_AFTER="6")
    until(lambda: saved() >= before + 10, nodes)
    two_nodes.cable("down")
    end_in_time(nodes)
    assert f"error: node 1 ({os.uname().nodename}) is lost: " in two_nodes.said(0)
    assert "error: the main node is lost: " in two_nodes.said(1)

    two_nodes.cable("up")
    nodes = two_nodes.train(*arguments, 2, *resume)
    assert [node.wait(timeout=120) for node in nodes] == [0, 0], two_nodes.said(0) + two_nodes.said(1)
    assert f"resumes from {out}/checkpoint-" in two_nodes.said(0)
    expected = one_process(tmp_path / "one", *arguments, 4)
    assert [row["step"] for row in steps(out)] == [row["step"] for row in expected]
    assert [row["loss"] for row in steps(out)] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
