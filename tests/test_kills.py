"""Commands killed at random moments and started again: each ends bit for bit as the uninterrupted one.

SIGKILL reaches a command's own process alone, as the kernel's of too little memory does; SIGINT and SIGTERM all of its
processes, as a terminal and Slurm send them. LMOLT_KILLS=10 in the environment for ten trials of each script,
and for the demo, whose nine stages are killed once each.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import QUICK, make_t5

from lmolt.data.triples import write_triples
from lmolt.files import write_table

ROOT = Path(__file__).resolve().parents[1]
TRIALS = int(os.environ.get("LMOLT_KILLS", "1"))
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
TIMES = ("created", "efficiency", "train_loss", "total_flos", "scored_tokens", "padding", "peak_memory_gib")
TIMES += ("_runtime", "_per_second", "seconds")  # and what ends so
STAGES = ["pairs and stand-in models", "triples", "CPO", "SLERP 19:1", "SLERP + CPO"]
STAGES += ["evaluate start", "evaluate cpo", "evaluate slerp_cpo", "report"]


def start(command: list, folder: Path, log: Path, **environment) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LMOLT_CACHE": str(folder / "cache")} | environment
    with log.open("a") as file:
        return subprocess.Popen(
            list(map(str, command)), cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )


def strike(process: subprocess.Popen, number: int) -> None:
    """Send it, and see that nothing of the session is left soon after."""
    session = [p for p in psutil.process_iter() if _session(p.pid) == process.pid]
    if number == signal.SIGKILL:
        process.kill()
    elif process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(60)
    left = psutil.wait_procs([p for p in session if p.pid != process.pid], timeout=20)[1]
    assert not left, f"still there after {signal.Signals(number).name}: {[p.cmdline() for p in left]}"


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def content(folder: Path) -> dict[str, object]:
    """What a command leaves, by file: bytes; of JSON and logs all but times and what follows from them."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if "checkpoint-" in name or "efficiency" in path.name:
            continue
        if path.name == ".lmolt.jsonl" or path.parent.name == "journal":
            lines = path.read_text().split("\n")  # SIGTERM saves a checkpoint more
            found[name] = sorted(line for line in lines if line and '"checkpoint-' not in line)
        elif (
            path.suffix in (".safetensors", ".parquet", ".jsonl", ".csv", ".tex") or path.name == "adapter_config.json"
        ):
            found[name] = path.read_bytes()
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:
            found[name] = None  # that it is there
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.endswith(TIMES) and k != "resume_from_checkpoint"}
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    return re.sub(r" \(log-probabilities \S+\)$", "", value) if isinstance(value, str) else value


def commands(folder: Path, policy: Path) -> dict[str, tuple[list, str]]:
    """Of each script, a command whose work takes about as long as its imports, and what starts it again."""
    pairs = [{"molecule": "C" * n + "O" * (n % 3), "caption": f"A chain of {n} atoms."} for n in range(1, 61)]
    write_table(pairs, folder / "pairs.csv")
    triples = []
    for i, pair in enumerate(pairs):
        sides = [("mol2cap", pair["molecule"], pair["caption"]), ("cap2mol", pair["caption"], pair["molecule"])]
        triples += [
            {"id": f"{d}{i}", "direction": d, "source": s, "chosen": c, "rejected": c + "C"} for d, s, c in sides
        ]
    write_triples(triples, folder / "triples.jsonl")
    t5 = make_t5(policy, folder / "t5")
    merged = []
    if not (folder / "A").exists():
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        for name in "AB":
            (folder / name).mkdir()
            (folder / name / "config.json").write_text("{}")
            tensors = {f"w{i:02}": torch.randn(600, 600, generator=generator).bfloat16() for i in range(24)}
            save_file(tensors, folder / name / "model.safetensors")
    merged = [folder / "A", folder / "B"]
    script = lambda name: [sys.executable, ROOT / "scripts" / f"{name}.py"]
    return {
        "make_triples": (
            [*script("make_triples"), "--pairs", "pairs.csv", "--fraction", 1, "--same_pairs", "--mol2cap_model",
             policy, "--cap2mol_model", t5, "--max_new_tokens", 48, "--tokens_per_batch", 300, "--num_candidates", 2,
             "--temperature", 1.2, "--output", "out/triples.jsonl"], [],
        ),
        "train_pref": (
            [*script("train_pref"), "--loss", "kto", "--model", policy, "--triples", "triples.jsonl", *QUICK,
             "--num_train_epochs", 3, "--save_strategy", "steps", "--save_steps", 4, "--eval_strategy", "steps",
             "--eval_steps", 4, "--lora_r", 8, "--learning_rate", "1e-3", "--output_dir", "out"],
            ["--resume_from_checkpoint", "true"],
        ),
        "merge": (
            [*script("merge"), "--method", "ties", "--models", *merged, "--base", merged[0], "--weights", 1, 1,
             "--output", "out"], ["--resume"],
        ),
        "evaluate": (
            [*script("evaluate"), "--model", policy, "--pairs", "pairs.csv", "--max_new_tokens", 48,
             "--tokens_per_batch", 400, "--n_bootstrap", 200, "--no_fcd", "--output", "out"], [],
        ),
        "translate": (
            [*script("translate"), "--model", policy, "--input", "pairs.csv", "--column", "molecule", "--direction",
             "mol2cap", "--max_new_tokens", 48, "--tokens_per_batch", 400, "--num_candidates", 2, "--temperature", 1.2,
             "--output", "out/captions.csv"], [],
        ),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["make_triples", "train_pref", "merge", "evaluate", "translate"])
def test_a_script_killed_at_random_moments(name, tiny_policy, tmp_path, capsys):
    command, again = commands(tmp_path, tiny_policy)[name]
    log, out, whole = tmp_path / "log", tmp_path / "out", tmp_path / "whole"
    began = time.monotonic()
    assert start(command, tmp_path, log).wait(600) == 0, log.read_text()
    seconds = time.monotonic() - began
    expected = content(out)
    out.rename(whole)
    dice, hits, codes = random.Random(name), 0, []
    for trial in range(3 * TRIALS):
        if hits == TRIALS:
            break
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        number = SIGNALS[hits % 3]
        process = start(command, tmp_path, log)
        time.sleep(seconds * dice.uniform(0.2, 0.95))
        struck = process.poll() is None
        strike(process, number)
        hits += process.returncode != 0
        codes.append(process.returncode)
        resume = again if out.exists() and process.returncode != 0 else []
        if struck and process.returncode != 0:
            assert start([*command, *resume], tmp_path, log).wait(600) == 0, (trial, log.read_text()[-3000:])
        found = content(out)
        assert {n for n in {*found, *expected} if found.get(n, 0) != expected.get(n, 0)} == set(), (trial, codes)
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\n{name}: {hits} of {len(codes)} starts were ended, with exit codes {codes}")
    assert hits == TRIALS


def small_demo(folder: Path) -> Path:
    """A checkout whose embedded default is the tests' scale."""
    folder.mkdir()
    for name in ("lmolt", "scripts", "recipes", "metrics", "accelerate_configs", "requirements.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    for name, old, new in [
        ("launch.sh", "python -m lmolt.demo.build", "python -m lmolt.demo.build --scale tiny"),
        ("launch.sh", "--limit 200 --max_new_tokens 128", "--limit 8 --max_new_tokens 24"),
        ("recipes/demo_triples.yaml", "max_new_tokens: 128", "max_new_tokens: 24"),
        ("recipes/demo.yaml", "num_train_epochs: 3", "num_train_epochs: 4"),
    ]:
        source = folder / name if (folder / name).exists() else ROOT / name
        text = source.read_text()
        assert text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new))
    (folder / "launch.sh").chmod(0o755)
    return folder


@pytest.mark.skipif("LMOLT_KILLS" not in os.environ, reason="minutes; needs LMOLT_KILLS=1 in the environment")
@pytest.mark.slow
def test_the_demo_killed_once_in_each_stage(tmp_path, capsys):
    folder = small_demo(tmp_path / "checkout")
    demo, log = folder / "runs" / "demo", tmp_path / "log"
    command, venv = ["./launch.sh", "demo"], {"VENV": sys.prefix, "PYTHONUNBUFFERED": "1"}

    def begins(stage: str, process: subprocess.Popen, text: Path) -> bool:
        """Whether it comes to this stage's work; False where the process ends first."""
        while f"== {stage}\n" not in text.read_text():
            if process.poll() is not None:
                return f"== {stage}\n" in text.read_text()
            time.sleep(0.05)
        return True

    process, times = start(command, folder, log, **venv), []
    for stage in STAGES:
        assert begins(stage, process, log), log.read_text()[-3000:]
        times.append(time.monotonic())
    assert process.wait(600) == 0, log.read_text()[-3000:]
    seconds = dict(zip(STAGES, map(lambda a, b: b - a, times, [*times[1:], time.monotonic()]), strict=True))
    expected = content(demo)
    demo.rename(tmp_path / "whole")
    shutil.rmtree(folder / "cache")

    dice, codes = random.Random(0), {}
    for kind, stage in zip(itertools.cycle(SIGNALS), STAGES):
        for attempt in range(4):  # a stage may be over before its moment has come
            before = shutil.copytree(demo, tmp_path / f"before {stage} {attempt}") if demo.exists() else None
            text = tmp_path / f"log {stage} {attempt}"
            process = start(command, folder, text, **venv)
            assert begins(stage, process, text), text.read_text()[-3000:]
            time.sleep(seconds[stage] * dice.uniform(0.2, 0.8) / 2**attempt)
            if kind == signal.SIGKILL and (own := psutil.Process(process.pid).children()):
                own[0].kill()  # the stage's own process: bash ends with its code
                codes[stage] = process.wait(60)
            else:
                strike(process, kind)
                codes[stage] = process.returncode
            if re.findall("^== (.*)$", text.read_text(), re.M)[-1] == stage and codes[stage]:
                break
            shutil.rmtree(demo)
            shutil.copytree(before, demo) if before else None
        else:
            raise AssertionError(f"{stage} was always over before it could be ended")
    process = start(command, folder, log, **venv)
    assert process.wait(600) == 0, log.read_text()[-3000:]
    found = content(demo)
    assert {n for n in {*found, *expected} if found.get(n, 0) != expected.get(n, 0)} == set(), codes
    with capsys.disabled():
        print(f"\nthe demo, ended once in each of its {len(codes)} stages, with exit codes {codes}")
