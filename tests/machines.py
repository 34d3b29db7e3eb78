"""Two machines as network namespaces, joined by a cable, and the run in one process that theirs is compared with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
from conftest import ROOT

CPO = ["--loss", "cpo", "--eval_fraction", "0", "--eval_strategy", "no", "--lora_dropout", "0", "--lora_r", "8"]
CPO += ["--bf16", "false", "--learning_rate", "1e-3", "--gradient_accumulation_steps"]


class TwoNodes:
    addresses = ("10.77.77.1", "10.77.77.2")

    def __init__(self, logs: Path):
        self.names = [f"lmolt-{os.getpid()}-{node}" for node in (0, 1)]
        self.logs = [logs / f"node{node}.log" for node in (0, 1)]
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", self.names[0], "type", "veth", "peer", "cable", "netns", self.names[1])
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "cable", state)

    def run(self, node: int, *command, **environment) -> subprocess.Popen:
        """The command on one node; its output goes to the node's log."""
        job = {"NNODES": "2", "NODE_RANK": str(node), "MASTER_ADDR": self.addresses[0], "VENV": sys.prefix}
        command = ["ip", "netns", "exec", self.names[node], *map(str, command)]
        with self.logs[node].open("w") as log:
            return subprocess.Popen(command, env=os.environ | job | environment, stdout=log, stderr=log, cwd=ROOT)

    def train(self, *arguments, **environment) -> list[subprocess.Popen]:
        return [self.run(node, ROOT / "launch.sh", "train", *arguments, **environment) for node in (0, 1)]

    def said(self, node: int) -> str:
        return self.logs[node].read_text(errors="replace")  # a bar may be half written

    def remove(self) -> None:
        for name in self.names:
            for pid in ip("netns", "pids", name).split():
                psutil.Process(int(pid)).kill()
            ip("netns", "delete", name)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def one_process(folder: Path, *arguments) -> list[dict]:
    """What a run in one process logs."""
    command = [sys.executable, ROOT / "scripts" / "train_pref.py", *arguments, "--output_dir", folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return steps(folder)


def steps(folder: Path) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]
