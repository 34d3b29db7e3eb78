"""A process or a machine is lost in mid-step: the others end soon and say what happened; restarted, the run goes on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from machines import CPO, one_process, steps

from lmolt.data.triples import write_triples
from lmolt.files import read_table, write_table

ROOT = Path(__file__).resolve().parents[1]


def until(happens, processes: list[subprocess.Popen]) -> None:
    while not happens():
        assert all(process.poll() is None for process in processes), "the run ended before it could be disturbed"
        time.sleep(0.01)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that a launcher started, in the order of their ranks."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if "RANK" in (environment := child.environ()):
            found.setdefault(environment["RANK"], child)
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
def test_a_killed_process_and_a_cut_cable(two_nodes, tmp_path, tiny_policy, few_triples):
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


@pytest.fixture
def two_ranks(tmp_path, tiny_policy, few_triples):
    """A training run of two processes, as its launcher, its ranks and its log, once it has saved a checkpoint."""
    write_triples(few_triples, tmp_path / "triples.jsonl")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--config_file", ROOT / "accelerate_configs" / "ddp.yaml", ROOT / "scripts" / "train_pref.py"]
    command += ["--model", tiny_policy, "--triples", tmp_path / "triples.jsonl", "--load_in_4bit", "false"]
    command += ["--num_train_epochs", "500", "--save_strategy", "steps", "--save_steps", "5", *CPO, "2"]
    command += ["--output_dir", tmp_path / "out"]
    with (tmp_path / "log").open("w") as log:
        environment = os.environ | {"LMOLT_LOST_AFTER": "4"}
        launcher = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log, env=environment)
    until(lambda: (tmp_path / "out" / "checkpoint-5").exists(), [launcher])
    ranks = workers(launcher)
    yield launcher, ranks, tmp_path / "log"
    for process in [launcher, *ranks]:
        try:
            process.kill()
            process.wait(10)
        except psutil.NoSuchProcess:
            pass


@pytest.mark.slow
def test_a_stopped_process_is_named(two_ranks):
    launcher, ranks, log = two_ranks
    ranks[1].suspend()
    assert launcher.wait(timeout=60) != 0
    what = f"process 1 of 2 (pid {ranks[1].pid} on {os.uname().nodename}) is stopped: no sign of life for 4 s"
    assert f"error: {what}; --resume_from_checkpoint true goes on" in log.read_text(errors="replace")
    psutil.wait_procs(ranks, timeout=30)
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.slow
def test_processes_end_with_their_launcher(two_ranks):
    launcher, ranks, _ = two_ranks
    launcher.kill()
    launcher.wait()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize(("script", "victim"), [("make_triples", 1), ("evaluate", 0)])
def test_a_killed_translator_loses_nothing(script, victim, tmp_path, tiny_policy):
    write_table([{"molecule": "C" * n, "caption": f"A chain of {n}."} for n in range(1, 21)], tmp_path / "pairs.csv")
    arguments = ["--pairs", tmp_path / "pairs.csv", "--max_new_tokens", "32", "--tokens_per_batch", "200"]
    if script == "make_triples":
        arguments += ["--mol2cap_model", tiny_policy, "--cap2mol_model", tiny_policy, "--fraction", "1", "--same_pairs"]
        output, written, journal = "out.jsonl", "out.jsonl", "out.jsonl.journal"
    else:
        arguments += ["--model", tiny_policy, "--no_fcd"]
        output, written, journal = "out", "out/predictions.parquet", "out/journal"
    two = ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml"]
    two += ["--num_processes", "2"]

    def start(folder: str, launcher: list) -> subprocess.Popen:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, *launcher, ROOT / "scripts" / f"{script}.py", *arguments]
        command += ["--output", tmp_path / folder / output]
        with (tmp_path / f"{folder}.log").open("w") as log:
            return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=log, stderr=log)

    def kept() -> list[str]:
        lines = []
        for file in (tmp_path / "two" / journal).rglob("*.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # the journal goes once the output is written
                lines += file.read_text().split("\n")
        return [line for line in lines if line.endswith("}")]

    process = start("two", two)
    until(lambda: len(kept()) >= 6, [process])
    workers(process)[victim].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    assert "SIGKILL" in (tmp_path / "two.log").read_text()
    before = kept()
    assert not (tmp_path / "two" / written).exists()

    process = start("two", two)
    made = set(before)
    while process.poll() is None:
        made.update(kept())
        time.sleep(0.01)
    assert process.wait() == 0, (tmp_path / "two.log").read_text()
    said = (tmp_path / "two.log").read_text()
    taken = sum(int(n) for n in re.findall(r"(\d+) of \d+ rows are in", said))
    assert taken == len(before)  # the rest was translated, and those not again
    assert len({json.loads(line)["key"] for line in made}) == len(made)
    assert start("one", []).wait() == 0, (tmp_path / "one.log").read_text()
    rows = read_table(tmp_path / "two" / written)
    assert len(rows) > 30 and rows == read_table(tmp_path / "one" / written)
