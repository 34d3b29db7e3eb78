"""A main thread that makes no progress ends the run after a limit; loading, evaluating and saving may take longer."""

import os
import re
import socket
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT

from lmolt.distributed.heartbeat import Heartbeat

STUCK = """
import sys, time
from conftest import load_script
script = load_script("train_pref")
from lmolt.training.trainer import PreferenceTrainer as Trainer
step, save, evaluate = Trainer.training_step, Trainer._save_checkpoint, Trainer.evaluation_loop

def slow(function):
    def after_a_while(self, *args, **kwargs):
        time.sleep(3)
        return function(self, *args, **kwargs)
    return after_a_while

def stuck_in_step_4(self, *args, **kwargs):
    if self.state.global_step == 3:
        time.sleep(100)
    return step(self, *args, **kwargs)

Trainer._save_checkpoint, Trainer.evaluation_loop = slow(save), slow(evaluate)
Trainer.training_step = stuck_in_step_4
script.main(sys.argv[1:])
"""


def test_the_limit_is_the_flag_s_or_ten_times_the_longest():
    heartbeat = Heartbeat()
    limits = []
    for heartbeat.longest, heartbeat.limit in [(0.0, None), (5.0, None), (7.0, None), (7.0, 3.0)]:
        limits.append(heartbeat._limit())
    assert limits == [60, 60, 70, 3]


def test_a_stuck_main_thread_is_named_and_slow_saving_is_not(tmp_path, tiny_policy, triples_file):
    flags = ["--loss", "cpo", "--model", tiny_policy, "--triples", triples_file, *QUICK, "--eval_fraction", "0.2"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--max_steps", "6", "--stalled_after", "2", "--output_dir", tmp_path / "out", "--lora_r", "4"]
    run = subprocess.Popen(
        [sys.executable, "-c", STUCK, *map(str, flags)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "LMOLT_LOST_AFTER": "2"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = run.communicate(timeout=90)[1].splitlines()[-1]
    assert run.returncode == 1
    who = f"process 0 of 1 \\(pid {run.pid} on {socket.gethostname()}\\)"
    where = r"in \S+ line \d+, after \d+ micro-batches of at most [\d.]+ s"
    what = f"error: {who} makes no progress: none for 2 s, {where}; --stalled_after gives more time; --resume_from"
    assert re.search(what, said), said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


STARVED = """
import os, subprocess, sys, time
from lmolt.distributed.heartbeat import HEARTBEAT
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = "import time; end = time.monotonic() + 20\\nwhile time.monotonic() < end: pass"
others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(4)]
time.sleep(0.5)
HEARTBEAT.limit, HEARTBEAT.steps = 0.6, 1
HEARTBEAT.start()
HEARTBEAT.progress()
begin, work = time.monotonic(), time.thread_time()
while time.thread_time() - work < 0.4:
    pass
took = time.monotonic() - begin
for other in others:
    other.kill()
assert took > 1.2, took
print("waited", flush=True)
time.sleep(5)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how long a thread waits for a CPU")
def test_waiting_for_a_cpu_is_no_standing_still():
    """0.4 s of work beside four others on one CPU take several limits of 0.6 s; asleep for one limit ends the run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LMOLT_LOST_AFTER": "2"}
    done = subprocess.run([sys.executable, "-c", STARVED], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "waited\n", done.stderr
    assert done.returncode == 1 and "makes no progress: none for " in done.stderr
