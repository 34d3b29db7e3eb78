"""sbatch on a real Slurm: two nodes on this machine (Debian's slurm-wlm and munge, as root), daemons of our own."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from machines import CPO, one_process, steps

from lmolt.data.triples import write_triples

ROOT = Path(__file__).resolve().parents[1]
# A cluster's node names can be looked up. So can this host's, which is the main node, being the first by the alphabet.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/linear
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=zz NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=p Nodes={host},zz Default=YES MaxTime=INFINITE State=UP
"""
NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which Slurm's commands speak to a controller of our own with two idle nodes."""
    lacking = [program for program in NEEDED if not shutil.which(program)]
    if lacking or os.getuid() != 0:
        pytest.skip(f"needs root and Debian's slurm-wlm and munge; not found: {', '.join(lacking) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    configuration = CONFIGURATION.format(host=socket.gethostname(), folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(configuration)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "VENV": sys.prefix}
    munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemons = [
        ["munged", "--foreground", "--force", *(f"--{flag}={folder}/munge.{suffix}" for flag, suffix in munge.items())],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", socket.gethostname()],
        ["slurmd", "-D", "-N", "zz"],
    ]
    for number, daemon in enumerate(daemons):
        with (folder / f"{number}.out").open("w") as log:
            subprocess.Popen(daemon, env=environment, stdout=log, stderr=log)
        time.sleep(0.5)
    command = lambda *words: (
        subprocess.run(
            list(map(str, words)), env=environment, capture_output=True, text=True, cwd=ROOT, timeout=30
        ).stdout
    )
    try:
        until(lambda: command("sinfo", "--noheader", "--format=%D %t").strip() == "2 idle", folder, 20)
        yield command
    finally:
        command("scancel", "--user=root")
        end = time.monotonic() + 40  # Slurm lets jobs end for 30 s
        while command("squeue", "--noheader") and time.monotonic() < end:
            time.sleep(0.2)
        for process in psutil.process_iter(["environ"]):  # the daemons, wherever they are
            if (process.info["environ"] or {}).get("SLURM_CONF") == environment["SLURM_CONF"]:
                process.kill()


def until(happens, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happens():
        logs = sorted(log.glob("*.out")) if log.is_dir() else [log]
        assert time.monotonic() < end, [file.read_text(errors="replace")[-3000:] for file in logs if file.exists()]
        time.sleep(0.2)


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_requeues_and_goes_on(slurm, tmp_path, tiny_policy, few_triples):
    write_triples(few_triples, tmp_path / "triples.jsonl")
    arguments = ["--model", tiny_policy, "--triples", tmp_path / "triples.jsonl", "--load_in_4bit", "false"]
    arguments += ["--num_train_epochs", "10", "--save_strategy", "steps", "--save_steps", "5", *CPO]
    out, log = tmp_path / "out", tmp_path / "log"
    options = ["--nodes=2", f"--output={log}"]
    said = slurm("sbatch", *options, "launch.sh", "train", *arguments, 2, "--output_dir", out)
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    until(lambda: (out / "checkpoint-5").exists(), log, 90)
    slurm("scancel", "--signal=USR1", job)
    until(lambda: "asked to stop: saved" in log.read_text(errors="replace"), log, 30)
    stopped = int(re.search(r"saved \S+/checkpoint-(\d+)", log.read_text(errors="replace"))[1])

    shown = lambda: slurm("scontrol", "show", "job", job)
    until(lambda: "JobState=PENDING" in shown(), log, 60)
    time.sleep(3)  # a node refuses a job that it ended within the same second
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm itself would pause for two minutes
    until(lambda: "JobState=RUNNING" in shown() and "Restarts=1" in shown(), log, 60)
    until(lambda: (out / "adapter_model.safetensors").exists(), log, 90)
    until(lambda: "JobState=COMPLETED" in shown(), log, 30)
    assert f"resumes from {out}/checkpoint-{stopped}" in log.read_text(errors="replace")
    assert json.loads((out / "run.json").read_text())["world_size"] == 2
    expected = one_process(tmp_path / "one", *arguments, 4)
    assert [row["loss"] for row in steps(out)] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
