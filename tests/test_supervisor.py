"""The supervisor of one machine's part: who may speak to it, what it leaves running, which exit code it has."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]


def free_ports() -> int:
    """The first of two neighbouring free ports."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue


@pytest.fixture
def supervise(tmp_path):
    """Start a supervisor with a command; all that runs below it is ended after the test."""
    started = []

    def start(*command, **environment) -> subprocess.Popen:
        environment = {"LMOLT_SECRET": "known", "MASTER_ADDR": "127.0.0.1", **environment}
        command = [sys.executable, "-m", "lmolt.distributed.supervisor", *map(str, command)]
        with (tmp_path / f"log{len(started)}").open("w") as log:
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                child.kill()
        process.wait()


def connect(port: int) -> socket.socket:
    for _ in range(200):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=30)
        except OSError:
            time.sleep(0.05)
    raise AssertionError("it never listened")


HELLO = {"node": 1, "host": "h\x1b[31m", "command": ["true"], "nonce": "n"}


@pytest.mark.parametrize(
    "sent",
    [
        b'{"node":"x"}\n',
        b"[" * 60_000 + b"\n",
        b'{"command":5}\n',
        json.dumps(HELLO | {"command": ["sleep", "47"], "mac": "0" * 64}).encode() + b"\n",
        json.dumps(HELLO | {"mac": 7}).encode() + b"\n",
        b"x" * 300_000,
        b"\xff\xfe\n",
        b'{"lost": "all"}\n{"go": true}\n',
    ],
)
def test_a_stranger_is_sent_away_and_the_job_waits_on(sent, supervise, tmp_path):
    port = free_ports()
    main = supervise("true", NNODES="2", NODE_RANK="0", MASTER_PORT=str(port))
    slow = connect(port + 1)  # sends nothing at all
    stranger = connect(port + 1)
    assert "nonce" in json.loads(stranger.makefile().readline())
    try:
        stranger.sendall(sent)
        while stranger.recv(1 << 16):  # until it is closed
            pass
    except ConnectionError:
        pass
    assert main.poll() is None
    other = supervise("true", NNODES="2", NODE_RANK="1", MASTER_PORT=str(port))
    assert (main.wait(60), other.wait(60)) == (0, 0)
    slow.close()
    assert "".join((tmp_path / f"log{i}").read_text() for i in (0, 1)) == ""


def test_another_jobs_node_is_told_and_the_job_waits_on(supervise, tmp_path):
    port = free_ports()
    main = supervise("true", NNODES="2", NODE_RANK="0", MASTER_PORT=str(port))
    stranger = supervise("true", NNODES="2", NODE_RANK="1", MASTER_PORT=str(port), LMOLT_SECRET="other")
    assert stranger.wait(60) == 1
    assert (tmp_path / "log1").read_text() == (
        "error: the main node has another LMOLT_SECRET (or .lmolt.secret, where no folder is shared)\n"
    )
    assert main.poll() is None
    assert supervise("true", NNODES="2", NODE_RANK="1", MASTER_PORT=str(port)).wait(60) == 0
    assert main.wait(60) == 0


def test_a_main_node_without_the_secret_is_no_main_node(supervise, tmp_path):
    port = free_ports()
    with socket.create_server(("127.0.0.1", port + 1)) as false:
        node = supervise("true", NNODES="2", NODE_RANK="1", MASTER_PORT=str(port))
        connection, _ = false.accept()
        connection.sendall(b'{"nonce": "n"}\n')
        assert json.loads(connection.makefile().readline())["node"] == 1
        connection.sendall(b'{"mac": "0", "go": true}\n')
        assert node.wait(60) == 1
    assert "isn't this job's main node" in (tmp_path / "log0").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_supervisor_is_named_and_its_command_ends(number, supervise, tmp_path):
    port = free_ports()
    several = {"NNODES": "2", "MASTER_PORT": str(port), "LMOLT_LOST_AFTER": "2"}
    nodes = [supervise("sleep", "60", NODE_RANK=str(rank), **several) for rank in (0, 1)]
    commands = []
    while len(commands) < 2:
        assert all(node.poll() is None for node in nodes)
        commands = [child for node in nodes for child in psutil.Process(node.pid).children() if child.name() == "sleep"]
    nodes[1].send_signal(number)
    assert nodes[0].wait(60) == 137
    assert f"error: node 1 ({socket.gethostname()}) is lost: " in (tmp_path / "log0").read_text()
    if number == signal.SIGKILL:
        psutil.wait_procs(commands, timeout=30)
        assert not any(command.is_running() for command in commands)


def test_a_stopped_command_is_named(supervise, tmp_path):
    node = supervise("sleep", "60", LMOLT_LOST_AFTER="1")
    while not (commands := psutil.Process(node.pid).children()):
        assert node.poll() is None
    while commands[0].name() != "sleep":
        time.sleep(0.01)
    commands[0].suspend()
    assert node.wait(60) == 137
    said = (tmp_path / "log0").read_text()
    assert f"error: the command (process {commands[0].pid} on {socket.gethostname()}) is stopped, for 1 s now" in said


SAVES = 'import os, pathlib, signal, sys, time; pathlib.Path(os.environ["LMOLT_SAVED"]).touch(); sys.exit(1)'


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(2)", 2),  # asked to stop, and failed for another reason
        (SAVES, 75),
        ("import time; time.sleep(60)", 138),  # still loading: SIGUSR1 ends it
    ],
)
def test_try_again_is_said_only_where_a_checkpoint_was_saved(code, expected, supervise, tmp_path):
    child = "import signal, pathlib, sys\n"
    if expected != 138:
        child += "signal.signal(signal.SIGUSR1, lambda *_: exec(sys.argv[2], globals()))\n"
    child += "pathlib.Path(sys.argv[1]).touch()\nimport time\ntime.sleep(60)\n"
    node = supervise(sys.executable, "-c", child, tmp_path / "there", code)
    while not (tmp_path / "there").exists():
        assert node.poll() is None
        time.sleep(0.01)
    node.send_signal(signal.SIGUSR1)
    assert node.wait(60) == expected
    assert (tmp_path / "log0").read_text() == ""


def test_a_secret_file_is_this_users_alone(tmp_path, monkeypatch):
    from lmolt.distributed.supervisor import job_secret

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMOLT_SECRET", raising=False)
    secret = job_secret()
    assert len(secret) == 64 and job_secret() == secret
    assert Path(".lmolt.secret").stat().st_mode & 0o777 == 0o600
    Path(".lmolt.secret").chmod(0o644)
    with pytest.raises(ValueError, match="others may read or own it"):
        job_secret()
