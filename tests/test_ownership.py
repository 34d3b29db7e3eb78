"""One process writes a folder at a time, and what it didn't write stays."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmolt import ownership

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from lmolt import ownership
ownership.hold(Path(sys.argv[1]), beside=len(sys.argv) > 2)
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder():
    """Start another process that holds a place until it is killed."""
    started = []

    def start(*arguments):
        command = [sys.executable, "-c", HOLDER, *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("beside", [(), ("beside",)])
def test_a_second_process_is_told_who_holds_it(beside, holder, tmp_path):
    first = holder(tmp_path / "out", *beside)
    with pytest.raises(ValueError) as refused:
        ownership.hold(tmp_path / "out", beside=bool(beside))
    said = str(refused.value)
    assert said.startswith(
        f"{tmp_path / 'out'} is being written by process {first.pid} on {socket.gethostname()} since 20"
    )
    first.send_signal(signal.SIGKILL)
    first.wait()
    ownership.hold(tmp_path / "out", beside=bool(beside))  # a dead process's lock is nobody's
    ownership.hold(tmp_path / "out", beside=bool(beside))
    lock = tmp_path / (".out.lock" if beside else "out/.lmolt.lock")
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    ownership.release()
    assert not lock.exists()


def test_another_way_to_the_same_folder_is_locked_too(holder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    holder(tmp_path / "link")
    with pytest.raises(ValueError, match="is being written by process"):
        ownership.hold(tmp_path / "out")


def test_a_folder_made_for_a_lock_goes_with_it(tmp_path):
    ownership.hold(tmp_path / "a" / "b")
    ownership.release()
    assert not (tmp_path / "a").exists()
    ownership.hold(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "written").touch()
    ownership.release()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["written"]


def test_a_holder_on_another_host_lives_as_long_as_it_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "LAPSED", 2)
    signs, refused = itertools.count(), threading.Event()
    sign = {"pid": 7, "host": "far", "since": "then", "boot": "other"}

    def live():
        while not refused.wait(0.05):
            (tmp_path / ".lmolt.lock").write_text(json.dumps(sign | {"beat": next(signs)}))

    (tmp_path / ".lmolt.lock").write_text(json.dumps(sign))
    far = threading.Thread(target=live)
    far.start()
    with pytest.raises(ValueError, match="process 7 on far since then"):
        ownership.hold(tmp_path)
    refused.set()
    far.join()
    ownership.hold(tmp_path)  # and no sign since


def test_only_what_was_claimed_goes(tmp_path):
    ownership.claim(tmp_path, "train_pref", ["run.json", "checkpoint-4", "unfinished"])
    ownership.claim(tmp_path, "evaluate", ["report.md"])
    names = ["run.json", "report.md", "mine.txt", "unfinished/x", "checkpoint-5/c"]
    for name in [*names, "checkpoint-4/a/b", "checkpoint-4/mine"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "checkpoint-4/manifest.json").write_text('{"a/b": [0, ""], "../mine.txt": [0, ""], "/etc/hostname": 1}')
    (tmp_path / ownership.CLAIMS).open("a").write('{"name": "../x", "by": "train_pref"}\n[[[\n{"name": "half')
    assert ownership.foreign(tmp_path, "train_pref") == ["checkpoint-5", "mine.txt", "report.md"]
    with pytest.raises(ValueError, match="checkpoint-5 is there, and train_pref.py didn't write it"):
        ownership.check_free(tmp_path, "train_pref", ["checkpoint-*", "README.md"])
    ownership.delete_claimed(tmp_path, "train_pref")
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} - {ownership.CLAIMS}
    assert left == {"report.md", "mine.txt", "checkpoint-4/mine", "checkpoint-5/c"}
    assert ownership.claimed(tmp_path, "train_pref") == []
    ownership.claim(tmp_path, "evaluate", ["more"])  # after a line that was cut off
    assert ownership.claimed(tmp_path, "evaluate") == ["report.md", "more"]


def test_an_output_is_no_input_and_holds_none(tmp_path, monkeypatch):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    (tmp_path / "pairs.csv").touch()
    (tmp_path / "linked.csv").hardlink_to(tmp_path / "pairs.csv")
    monkeypatch.chdir(tmp_path)
    for output, inputs, match in [
        ("runs", {"--model": "runs/model"}, "--output runs holds --model runs/model"),
        (".", {"--model": "runs/model", "--pairs": None}, "--output . holds --model"),
        ("runs/../runs/model", {"--model": "runs/model"}, "is --model"),
        ("linked.csv", {"--pairs": "pairs.csv"}, "--output linked.csv is --pairs pairs.csv"),
    ]:
        with pytest.raises(ValueError, match=match):
            ownership.check_inputs("--output", output, inputs)
    ownership.check_inputs("--output", "runs/model/out", {"--model": "runs/model", "--base": "owner/name"})
    monkeypatch.setenv("HOME", str(tmp_path / "runs"))
    for folder in (".", "..", "/", "runs"):
        with pytest.raises(ValueError, match="name a run's own folder"):
            ownership.check_deletable("--overwrite", Path(folder))
    ownership.check_deletable("--overwrite", Path("runs/model"))
