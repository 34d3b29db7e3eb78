"""Two processes under each strategy train NF4 QLoRA like one: the same losses, adapter and resumption."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_script
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lmolt.data.triples import write_triples
from lmolt.distributed import strategy

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = {"ddp": ("DDP", "none"), "zero2": ("ZeRO-2", "none"), "zero3": ("ZeRO-3", "none")}
STRATEGIES |= {"zero3_offload": ("ZeRO-3", "cpu"), "fsdp_qlora": ("FSDP", "none")}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train(folder: Path, job: list, processes: int, name: str | None = None, wrap=()) -> subprocess.CompletedProcess:
    command = [sys.executable]
    if name:
        command += ["-m", "accelerate.commands.launch", "--config_file", ROOT / "accelerate_configs" / f"{name}.yaml"]
        command += ["--num_processes", processes, "--main_process_port", free_port()]
    command += [*wrap, ROOT / "scripts" / "train_pref.py", *job, "--output_dir", folder]
    command += ["--per_device_train_batch_size", 4 // processes, "--per_device_eval_batch_size", 4 // processes]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "DEVICE_MAPS": str(device_maps(folder))}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )


def device_maps(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_device_maps.jsonl")


def wrap_for(name: str) -> list[Path]:
    """Loading as on a GPU, with what NF4 computes in there; FSDP also as if processes had some."""
    wraps = ["as_if_cuda.py", "fsdp_on_cpu.py"] if name == "fsdp_qlora" else ["as_if_cuda.py"]
    return [ROOT / "tests" / wrap for wrap in wraps]


def finished(folder: Path, done: subprocess.CompletedProcess) -> SimpleNamespace:
    assert done.returncode == 0, done.stderr[-3000:]
    assert "invalid shape" not in done.stderr  # PEFT's warning on the parts that a process holds
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return SimpleNamespace(
        folder=folder,
        run=json.loads((folder / "run.json").read_text()),
        steps=[row for row in log if "loss" in row],
        evaluations=[row for row in log if "eval_loss" in row],
    )


def equal(one: SimpleNamespace, two: SimpleNamespace, rel: float) -> None:
    """The same losses, and the same adapter by its logits."""
    assert [row["step"] for row in two.steps] == [row["step"] for row in one.steps] == [1, 2, 3, 4]
    assert [row["loss"] for row in two.steps] == pytest.approx([row["loss"] for row in one.steps], rel=rel)
    assert [row["eval_loss"] for row in two.evaluations] == pytest.approx(
        [row["eval_loss"] for row in one.evaluations], rel=rel
    )
    # NF4's products are in bf16 whatever the rest is, and so are the gradients
    assert [row["grad_norm"] for row in two.steps] == pytest.approx([row["grad_norm"] for row in one.steps], rel=2e-2)
    model = one.run["arguments"]["model"]
    start, of_one, of_two = logits(model), logits(model, one.folder), logits(model, two.folder)
    assert (of_two - of_one).abs().max() < 0.05 * (of_one - start).abs().max()


def logits(model: str, adapter: Path | None = None) -> torch.Tensor:
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        policy = PeftModel.from_pretrained(policy, adapter)
    with torch.no_grad():
        return policy(torch.arange(3, 40)[None]).logits


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_policy, few_triples, compiled) -> list:
    """Seven rows, which neither two processes nor steps of four divide, to train on and to evaluate."""
    triples = tmp_path_factory.mktemp("data") / "triples.jsonl"
    write_triples(few_triples[:7], triples)
    arguments = ["--loss", "cpo", "--model", tiny_policy, "--triples", triples, "--eval_triples", triples]
    arguments += ["--num_train_epochs", 2, "--gradient_accumulation_steps", 1, "--learning_rate", "1e-3"]
    return arguments + ["--lora_r", 8, "--lora_dropout", 0, "--load_best_model_at_end", "false"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, job) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("one")
    return finished(folder, train(folder, [*job, "--bf16", "false"], 1, wrap=wrap_for("ddp")))


@pytest.fixture(scope="module", params=STRATEGIES)
def two(request, tmp_path_factory, job) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp(request.param)
    return finished(folder, train(folder, [*job, "--bf16", "false"], 2, request.param, wrap_for(request.param)))


@pytest.mark.slow
def test_two_processes_equal_one(one, two, request):
    name = request.node.callspec.params["two"]
    ran, offload = STRATEGIES[name]
    expected = {"name": ran, "offload": offload, "world_size": 2, "triples_per_step": 4}
    assert two.run["strategy"] == expected
    assert one.run["strategy"] == expected | {"name": "single", "offload": "none", "world_size": 1}
    equal(one, two, rel=1e-4)
    # ZeRO-3 shards what it loads and takes no device_map; the others load to the GPU of their process
    expected = [[True, str(rank), None if ran == "ZeRO-3" else {"": rank}] for rank in range(2)]
    lines = device_maps(two.folder).read_text().splitlines()
    assert sorted(map(json.loads, lines), key=lambda load: load[1]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp_qlora"])
def test_without_nf4_references_come_from_shards(name, tmp_path, job, monkeypatch):
    """Unquantised weights are sharded as they load (zero.Init) or before training; DPO's references need them whole."""
    job = [*job, "--loss", "dpo", "--load_in_4bit", "false", "--bf16", "false"]
    one = finished(tmp_path / "one", train(tmp_path / "one", job, 1))
    monkeypatch.setenv("LMOLT_CACHE", str(tmp_path / "another"))
    two = finished(tmp_path / "two", train(tmp_path / "two", job, 2, name, wrap_for(name)))
    assert "computed" in one.run["reference"] and "computed" in two.run["reference"]
    equal(one, two, rel=1e-4)
    # FSDP loads the whole model to each GPU, unless the configuration has fsdp_cpu_ram_efficient_loading
    expected = [[False, str(rank), None if name == "zero3" else {"": rank}] for rank in range(2)]
    lines = device_maps(tmp_path / "two").read_text().splitlines()
    assert sorted(map(json.loads, lines), key=lambda load: load[1]) == expected


@pytest.mark.slow
def test_resumes(two, request, tmp_path, job):
    """From the first epoch's checkpoint, to the adapter of the run that wasn't interrupted."""
    name = request.node.callspec.params["two"]
    shutil.copytree(two.folder / "checkpoint-2", tmp_path / "checkpoint-2")
    job = [*job, "--bf16", "false", "--resume_from_checkpoint", "true"]
    if name == "ddp":  # goes on in one process
        done = train(tmp_path, job, 1, wrap=wrap_for(name))
    else:
        done = train(tmp_path, job, 2, name, wrap_for(name))
    resumed = finished(tmp_path, done)
    assert f"resumes from {tmp_path / 'checkpoint-2'}" in done.stdout
    equal(two, resumed, rel=1e-4)


@pytest.mark.slow
def test_kto_in_bf16_under_zero3(tmp_path, job, monkeypatch):
    """KTO asks the most: reference log-probabilities, z over all processes; bf16 and the best model by default."""
    job = [*job, "--loss", "kto", "--load_best_model_at_end", "true"]
    one = finished(tmp_path / "one", train(tmp_path / "one", job, 1))
    monkeypatch.setenv("LMOLT_CACHE", str(tmp_path / "another"))
    two = finished(tmp_path / "two", train(tmp_path / "two", job, 2, "zero3"))
    assert "computed" in one.run["reference"] and "computed" in two.run["reference"]
    equal(one, two, rel=2e-2)


@pytest.mark.slow
def test_what_would_not_run_as_asked_is_an_error(tmp_path, job):
    """accelerate would run DDP instead of FSDP on CPUs; under ZeRO-3 processes can't translate each its share."""
    job = [*job, "--bf16", "false"]
    done = train(tmp_path / "fsdp", job, 2, "fsdp_qlora")
    assert done.returncode != 0
    assert "FSDP was asked for and MULTI_CPU would run; it needs GPUs" in done.stderr
    done = train(tmp_path / "zero3", [*job, "--eval_translations", 2], 2, "zero3")
    assert done.returncode != 0
    assert "--eval_translations needs the whole model in each process, and ZeRO-3 shards it" in done.stderr


@pytest.mark.slow
def test_a_process_that_left_its_group_ends_in_peace():
    """Exchanges of another group are still under way when the work is done: they abort an interpreter that ends."""
    script = (
        "import time, torch, torch.distributed as dist; from accelerate import PartialState\n"
        "from lmolt.distributed.strategy import exit_other_processes\n"
        "state, group = PartialState(cpu=True), dist.new_group()\n"
        "for _ in range(500): dist.all_reduce(torch.ones(10), group=group, async_op=True)\n"
        "exit_other_processes(75)\n"
        "assert state.is_main_process\n"
        "time.sleep(1)"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=os.environ | place | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 75]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, who may give files away")
@pytest.mark.parametrize("name", ["ZeRO-2", "FSDP", "single"])
def test_checkpoints_of_others_are_not_unpickled(name, tmp_path):
    checkpoint, saved = tmp_path / "checkpoint-2", {"name": name, "world_size": 2, "triples_per_step": 4}
    (checkpoint / "global_step2").mkdir(parents=True)
    strategy.write(checkpoint, saved)
    shard, elsewhere = checkpoint / "global_step2" / "shard.pt", tmp_path / "theirs.pt"
    shard.touch(), elsewhere.touch()
    strategy.check_resumable(checkpoint, saved)
    os.chown(elsewhere, 12345, 12345)

    def refused(path: Path, what: str) -> None:
        message = f"{path} {what}, and resuming under {name} would run any code in it .*shards are pickles.*--adapter"
        with pytest.raises(ValueError, match=message) if name != "single" else contextlib.nullcontext():
            strategy.check_resumable(checkpoint, saved)  # one process reads no pickles

    for path in (shard, shard.parent, checkpoint):
        os.chown(path, 12345, 12345)
        refused(path, "belongs to another user")
        os.chown(path, os.getuid(), os.getgid())
    shard.chmod(0o666)
    refused(shard, "can be written by any user")
    shard.unlink()
    shard.symlink_to(elsewhere)
    refused(shard, "belongs to another user")


def test_checkpoints_that_do_not_fit(tmp_path):
    saved = {"name": "ZeRO-3", "offload": "none", "world_size": 2, "triples_per_step": 64}
    strategy.write(tmp_path, saved)
    strategy.check_resumable(tmp_path, saved | {"offload": "cpu"})
    with pytest.raises(ValueError, match="saved by ZeRO-3 in 2 processes .* can't be resumed by ZeRO-3 in 4 processes"):
        strategy.check_resumable(tmp_path, saved | {"world_size": 4})
    with pytest.raises(ValueError, match="can't be resumed by single in 1 process"):
        strategy.check_resumable(tmp_path, saved | {"name": "single", "world_size": 1})
    strategy.write(tmp_path, saved | {"name": "DDP"})
    strategy.check_resumable(tmp_path, saved | {"name": "single", "world_size": 1})
    with pytest.raises(ValueError, match="64 triples a step, and this run has 128; give --gradient_accumulation_steps"):
        strategy.check_resumable(tmp_path, saved | {"name": "DDP", "world_size": 4, "triples_per_step": 128})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_compiler_is_waited_for_no_longer_than_said(tmp_path, monkeypatch, capsys):
    """DeepSpeed's lock while it compiles is a file, which a killed process leaves, and which is waited for for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    strategy.wait_for_compiler()
    lock.parent.mkdir()
    with lock.open("w"):  # as torch's file_baton has it
        os.utime(lock, (0, 0))
        strategy.wait_for_compiler()
    lock.touch()
    with pytest.raises(ValueError, match=f"{lock} is 0 min old and no process of this machine has it open.*delete"):
        strategy.wait_for_compiler(patience=1)
    assert capsys.readouterr().out.count("waits at most 0 min for another machine that compiles") == 1
    os.utime(lock, (0, 0))
    (tmp_path / "recipe.yaml").write_text(f"deepspeed: {tmp_path / 'zero.json'}\n")
    train = ["--model", "m", "--triples", "t.jsonl"]
    for way in (["--deepspeed", str(tmp_path / "zero.json")], ["--recipe", str(tmp_path / "recipe.yaml")], []):
        if not way:  # as accelerate's configuration says it
            monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(ValueError, match="a start was killed while DeepSpeed compiled"):
            load_script("train_pref").main([*train, *way])
