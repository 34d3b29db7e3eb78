"""The parts of benchmarks/gpu.py that run what a user runs: trainers, strategies, resuming, translating."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_models import (
    CHOSEN,
    REJECTED,
    SOURCE,
    Skipped,
    add_lora,
    checkpoint_layers,
    device,
    fresh_memory,
    make_model,
    make_sequences,
    make_tokenizer,
    on_gpu,
    peak_gib,
    synchronise,
    token_ids,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp_qlora")
KERNELS = ("rms_norm", "swiglu", "rope")  # of Liger


def trl(keep) -> dict:
    """TRL's CPO trainer with Liger's kernels on the same triples and model, beside our trainer."""
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error}; pip install -r benchmarks/requirements.txt") from error
    figures, liger = {}, {"use_liger_kernel": True}
    runs = [("lmolt", {}), ("trl", liger), ("lmolt", liger)] if on_gpu() else [("lmolt", {}), ("trl", {})]
    checkpointed = [(s, liger | {"gradient_checkpointing": True}) for s in ("trl", "lmolt")] if on_gpu() else []
    sizes = (32, 8) if on_gpu() else (2,)
    for batch, (system, setting) in [*itertools.product(sizes, runs), *itertools.product(sizes, checkpointed)]:
        name = f"{system}_{batch}" + "_liger" * ("use_liger_kernel" in setting)
        name += "_checkpointing" * ("gradient_checkpointing" in setting)
        one = ["--trainer", system, str(batch), json.dumps(setting)]
        command = [sys.executable, str(Path(__file__).with_name("gpu.py")), *one]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if lines:
            figures |= {f"{name}_{k}": v for k, v in json.loads(lines[0][7:]).items()}
        else:
            figures[name] = "failed: " + done.stderr[-700:]
        figures |= beside_trl(figures)
        keep(figures)
    return figures


def beside_trl(figures: dict) -> dict:
    """Each of our runs against TRL's with as many triples and the same checkpointing, with Liger where TRL has it."""
    found = {}
    for ours in [key.removesuffix("_step_s") for key in figures if key.startswith("lmolt") and key.endswith("_step_s")]:
        _, batch, *setting = ours.split("_")
        theirs = f"trl_{batch}" + "_liger" * on_gpu() + "_checkpointing" * ("checkpointing" in setting)
        if f"{theirs}_step_s" in figures:
            found[f"{ours}_speedup"] = figures[f"{theirs}_step_s"] / figures[f"{ours}_step_s"]
            found[f"{ours}_memory"] = figures[f"{ours}_peak_gib"] / figures[f"{theirs}_peak_gib"]
    return found


def one_trainer(system: str, batch: int, setting: dict) -> None:
    """Some steps of one trainer, in a process of its own; prints RESULT."""
    from transformers import TrainerCallback

    count, tokenizer = 6, make_tokenizer()
    rows, examples = [], []
    for step in range(count):
        sequences = make_sequences(batch, step)
        for (prompt, chosen), (_, rejected) in zip(sequences[:batch], sequences[batch:], strict=True):
            triple = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            rows.append({k: tokenizer.decode(ids, skip_special_tokens=True) for k, ids in triple.items()})
            examples.append((prompt, chosen, rejected))
    moments = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronise()
            moments.append(time.perf_counter())

    common = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1,
        "max_steps": count, "learning_rate": 5e-5, "optim": "adamw_torch_fused", "bf16": True,
        "use_cpu": not on_gpu(), "report_to": "none", "save_strategy": "no", "eval_strategy": "no",
        "disable_tqdm": True, "seed": 0, "gradient_checkpointing": False,
    } | setting  # fmt: skip
    if common.get("use_liger_kernel") and system == "trl":  # its fused head takes the loss of language models only
        common["liger_kernel_config"] = {"fused_linear_cross_entropy": False} | dict.fromkeys(KERNELS, True)
    if common["gradient_checkpointing"]:
        common["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    shape = "7B" if on_gpu() else "toy"
    if system == "lmolt":
        from lmolt.training.batches import Example
        from lmolt.training.trainer import PreferenceArguments, PreferenceTrainer

        model = add_lora(make_model(shape), dropout=0.0)
        examples = [
            Example(str(i), "mol2cap" if i % 2 == 0 else "cap2mol", *map(token_ids, triple), token_ids([]))
            for i, triple in enumerate(examples)
        ]
        arguments = PreferenceArguments(loss="cpo", load_best_model_at_end=False, **common)
        trainer = PreferenceTrainer(model, arguments, examples, [], processing_class=tokenizer)
        trainer._model_is_proved = True
    else:
        from datasets import Dataset
        from peft import LoraConfig
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        model = make_model(shape, attention="sdpa")
        lora = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
        arguments = CPOConfig(max_length=1024, max_completion_length=512, beta=0.1, cpo_alpha=1.0, **common)
        trainer = CPOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
    trainer.add_callback(Clock())
    fresh_memory()
    trainer.train()
    took = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    took = sorted(took)[len(took) // 2]  # the first steps compile
    figures = {"attention": trainer.attention, "attention_ms": trainer.attention_ms} if system == "lmolt" else {}
    print(
        "RESULT " + json.dumps(figures | {"step_s": took, "triples_per_s": batch / took, "peak_gib": peak_gib()}),
        flush=True,
    )


def memory(keep) -> dict:
    """Peak memory of a checkpointed 7B step beside benchmarks/memory.py's arithmetic for the same tokens, GiB."""
    import torch
    from memory import MODELS
    from memory import memory as arithmetic

    from lmolt.models.lora import lean_adapters
    from lmolt.models.tree import build_tree, tree_logps

    if not on_gpu():
        raise Skipped("no GPU: its memory is what is compared")
    figures, model = {}, add_lora(make_model("7B")).train()
    lean_adapters(model)
    checkpoint_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, fused=True)
    for triples in (8, 32):
        tree = build_tree(make_sequences(triples)).to(device())
        fresh_memory()
        for _ in range(2):
            with torch.autocast(device(), torch.bfloat16):
                tree_logps(model, tree).sum().float().backward()
            optimizer.step()
            optimizer.zero_grad()
        tokens = len(tree.input_ids)
        figures[f"T{tokens}_peak_gib"] = peak_gib()  # without CUDA's own, which arithmetic counts as 1 GiB
        figures[f"T{tokens}_by_arithmetic_gib"] = arithmetic(MODELS["7B"], "ddp", 1, tokens, 64)["train"]
    return figures


def references(keep) -> dict:
    """DPO's reference pass, once what it compiles is there: triples a second."""
    from lmolt.training.batches import Example
    from lmolt.training.trainer import PreferenceArguments, PreferenceTrainer

    count, shape = (128, "7B") if on_gpu() else (4, "toy")
    sequences = make_sequences(count)
    examples = [
        Example(str(i), "mol2cap", *map(token_ids, (prompt, chosen, rejected)), token_ids([]))
        for i, ((prompt, chosen), (_, rejected)) in enumerate(zip(sequences[:count], sequences[count:], strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LMOLT_CACHE"] = folder
        arguments = PreferenceArguments(
            loss="dpo", output_dir=folder, load_best_model_at_end=False, eval_strategy="no", report_to="none",
            bf16=True, use_cpu=not on_gpu(), per_device_train_batch_size=32, per_device_eval_batch_size=32,
        )  # fmt: skip
        model = add_lora(make_model(shape))
        trainer = PreferenceTrainer(model, arguments, examples, [], processing_class=make_tokenizer())
        trainer._model_is_proved = True
        took = []
        for made_for in ("warming up", "this measurement"):  # another key: the first pass's are kept
            start = time.perf_counter()
            trainer.set_references({"made for": made_for})
            took.append(time.perf_counter() - start)
    return {"first_s": took[0], "seconds": took[1], "triples_per_s": count / took[1], "peak_gib": peak_gib(),
            "attention": trainer.attention}  # fmt: skip


def translating(keep) -> dict:
    """`translate` of random prompts, greedy, 64 tokens, and `generate` in batches of 32; cuDNN's attention off, on."""
    import torch
    from transformers import set_seed

    from lmolt.generation.translate import translate

    count, shape, longest = (200, "7B", 64) if on_gpu() else (4, "toy", 4)
    tokenizer, model = make_tokenizer(), make_model(shape).eval()
    model.generation_config.eos_token_id = None
    tokenizer.padding_side = "left"
    prompts = [tokenizer.decode(prompt[1:]) for prompt, _ in make_sequences(count)[:count]]
    figures = {}

    def plainly():
        set_seed(0)
        for at in range(0, count, 32):
            rows = tokenizer(prompts[at : at + 32], return_tensors="pt", padding=True).to(device())
            rows.pop("token_type_ids", None)
            model.generate(**rows, max_new_tokens=longest, do_sample=False)

    ways = {
        "translate": lambda: translate(model, tokenizer, prompts, max_new_tokens=longest),
        "translate_cudnn": lambda: translate(model, tokenizer, prompts, max_new_tokens=longest),
        "generate": plainly,
    }
    for name, way in ways.items():
        if name == "translate_cudnn" and not on_gpu():
            continue
        torch.backends.cuda.enable_cudnn_sdp(name == "translate_cudnn")
        if name == "generate":
            model.set_attn_implementation("sdpa")
        fresh_memory()
        start = time.perf_counter()
        way()
        synchronise()
        figures |= {f"{name}_per_s": count / (time.perf_counter() - start), f"{name}_peak_gib": peak_gib()}
        keep(figures)
    return figures


def make_job(folder: Path) -> list[str]:
    """train_pref.py's flags for a random model (1B on a GPU) that is saved in `folder`, and triples beside it."""
    import torch

    model = make_model("1B" if on_gpu() else "toy", nf4=False)
    model.config._attn_implementation = "eager"
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer(of_bytes=True).save_pretrained(folder / "model")
    draw, rows = random.Random(0), []
    for i in range(64 if on_gpu() else 24):
        parts = {"source": SOURCE, "chosen": CHOSEN, "rejected": REJECTED}
        text = {part: "".join(draw.choices("CNOSPcnos", k=draw.randint(*length))) for part, length in parts.items()}
        rows.append({"id": str(i), "direction": "mol2cap"} | text)
    (folder / "triples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = [
        "--model",
        folder / "model",
        "--triples",
        folder / "triples.jsonl",
        "--eval_fraction",
        0,
        "--report_to",
        "none",
    ]
    job += ["--eval_strategy", "no", "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    job += ["--logging_steps", 1, "--lora_dropout", 0, "--disable_tqdm", "true"]
    return list(map(str, job))


TRAIN = [str(ROOT / "scripts" / "train_pref.py")]


def losses_of(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


def strategies(keep, names=STRATEGIES, limit: int = 100) -> dict:
    """Each strategy in one process: whether it loads, takes three steps and saves; seconds, and the last loss."""
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = make_job(folder)
        for name in names:
            if not on_gpu() and name == "fsdp_qlora":
                figures[name] = "skipped: no GPU (tests/test_distributed.py runs it on CPUs)"
                continue
            config = ROOT / "accelerate_configs" / f"{name}.yaml"
            launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "1"]
            command = [sys.executable, *launch, *TRAIN, *job, "--max_steps", "3", "--output_dir", str(folder / name)]
            start = time.perf_counter()
            done = run(command, limit)
            figures[f"{name}_s"] = time.perf_counter() - start
            if done.returncode:
                figures[name] = f"failed ({done.returncode}): {said(done)}"
            else:
                figures[f"{name}_loss"] = losses_of(folder / name)[-1]
            keep(figures)
    return figures


def offload(keep) -> dict:
    """The same for zero3_offload, apart: on a fresh machine DeepSpeed compiles its Adam for the CPU first."""
    if not on_gpu():
        raise Skipped("no GPU: tests/test_distributed.py runs zero3_offload on CPUs")
    return strategies(keep, ("zero3_offload",), 210)


def resume(keep) -> dict:
    """SIGUSR1 after a step: exit code 75, then the same losses as without; beside two whole runs' own difference.

    Sums with atomic operations differ from run to run on a GPU, so that the second is what the first is read by.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        job = [sys.executable, *TRAIN, *make_job(folder), "--max_steps", "6", "--tree_attention", "tiles"]
        with ThreadPoolExecutor() as pool:
            names = ("whole", "again")
            wholes = list(pool.map(lambda name: run([*job, "--output_dir", str(folder / name)], 150), names))
        for done in wholes:
            if done.returncode:
                return {"uninterrupted": f"failed: {said(done)}"}
        command = [*job, "--output_dir", str(folder / "stopped")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        ) as stopped:
            for line in stopped.stdout:
                if "'loss'" in line:
                    stopped.send_signal(signal.SIGUSR1)
                    break
            stopped.stdout.read()
        figures = {"exit_code": stopped.wait(), "exit_code_expected": 75}
        keep(figures)
        again = run([*command, "--resume_from_checkpoint", "true"], 100)
        if again.returncode:
            return figures | {"resumed": f"failed: {said(again)}"}
        whole = losses_of(folder / "whole")
        for name in ("again", "stopped"):
            found = losses_of(folder / name)
            figures[f"{name}_relative"] = [abs(a - b) / abs(a) for a, b in zip(whole, found, strict=True)]
            figures[f"{name}_largest_relative"] = max(figures[f"{name}_relative"])
        return figures


def out_of_memory(keep) -> dict:
    """What a user reads who asked for more than the card holds: one line, with what to change."""
    if not on_gpu():
        raise Skipped("no GPU: its memory is what would run out")
    little = "import runpy, sys, torch; torch.cuda.set_per_process_memory_fraction(0.03); del sys.argv[0]; "
    little += "runpy.run_path(sys.argv[0], run_name='__main__')"
    with tempfile.TemporaryDirectory() as temporary:
        job = make_job(Path(temporary))
        done = run([sys.executable, "-c", little, *TRAIN, *job, "--output_dir", str(Path(temporary) / "run")], 150)
    return {"exit_code": done.returncode, "error": said(done)}


def said(done: subprocess.CompletedProcess) -> str:
    """The last error line of a run, or else its last words."""
    return ([line for line in done.stderr.splitlines() if line.startswith("error")] or [done.stderr])[-1][-500:]


def environment() -> dict:
    return os.environ | ({} if on_gpu() else {"DS_ACCELERATOR": "cpu"})


def run(command: list[str], limit: int) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment(), cwd=ROOT)
