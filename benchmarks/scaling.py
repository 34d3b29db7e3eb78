"""Weak scaling from one process to two, what each strategy sends a step, and a projection to 8, 64 and 512 GPUs.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --steps 12 --json figures.json

Each process has one thread and the same work: CPO on 8 triples a step (random letters, all of one length), LoRA of rank
16 on a random Llama (hidden 256, 6 layers, fp32). "Two apart" are two single processes at the same time that send
nothing: what they lose is the machine's, and what a strategy loses beyond it is the strategy's. Rates are medians over
the steps, without the first two, of scored tokens a second and process.

The projection: Llama 7B in NF4, rank 64, 8,192 tokens a step and GPU in two micro-batches. Assumed, not measured:
160 TFLOP/s a GPU (half an A100's peak), rings over 25 GB/s a GPU between machines of 8 GPUs and 200 GB/s within one,
20 us a hop, nothing overlapped with computation, work evenly divided.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.memory import MODELS  # noqa: E402

TRAIN = ["--loss", "cpo", "--eval_fraction", 0, "--load_in_4bit", "false", "--bf16", "false", "--lora_r", 16]
TRAIN += ["--save_strategy", "no", "--num_train_epochs", 1, "--per_device_train_batch_size", 4]
TRAIN += ["--gradient_accumulation_steps", 2, "--disable_tqdm", "true"]
STRATEGIES = ("ddp", "zero2", "zero3")
FLOPS, WITHIN, BETWEEN, HOP = 160e12, 200e9, 25e9, 20e-6


def prepare(folder: Path, steps: int) -> None:
    """A model, and triples for one process (one.jsonl) and for two (two.jsonl)."""
    import torch

    from benchmarks.translate import random_models
    from lmolt.data.triples import write_triples

    torch.manual_seed(0)
    _, model, tokenizer = next(random_models())
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    text = lambda length: "".join(draw.choices("CNOPS", k=length))
    rows = [
        {"id": str(i), "direction": "cap2mol", "source": text(60), "chosen": text(50), "rejected": text(60)}
        for i in range(16 * steps)
    ]
    write_triples(rows[::2], folder / "one.jsonl")
    write_triples(rows, folder / "two.jsonl")


def start(folder: Path, name: str, triples: str, strategy: str | None = None) -> subprocess.Popen:
    command = [sys.executable]
    if strategy:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "accelerate.commands.launch", "--config_file", ROOT / f"accelerate_configs/{strategy}.yaml"]
        command += ["--num_processes", 2, "--main_process_port", port]
    command += [ROOT / "scripts" / "train_pref.py", *TRAIN, "--model", folder / "model"]
    command += ["--triples", folder / triples, "--output_dir", folder / name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)


def rate(folder: Path, name: str, process: subprocess.Popen) -> float:
    """Median scored tokens a second of one process."""
    if process.wait() != 0:
        raise ValueError(f"{name} failed:\n{(folder / f'{name}.log').read_text()[-2000:]}")
    log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return statistics.median(row["tokens_per_second"] for row in log if row["step"] > 2 and "loss" in row)


def sent(strategy: str, n: int, micro_batches: int, adapter: float, base: float) -> float:
    """Bytes that each of n processes sends in a step; `adapter` and `base` are the bytes of their parameters.

    Ring collectives: an all-gather or a reduce-scatter of b bytes sends (n - 1) / n b from each, an all-reduce twice
    that. DDP reduces gradients once a step; DeepSpeed reduces each micro-batch's, then gathers what it updated; ZeRO-3
    gathers all parameters for each forward and each backward pass.
    """
    times = {"ddp": 2, "zero2": micro_batches + 1, "zero3": 3 * micro_batches}[strategy] * adapter
    return (n - 1) / n * (times + (2 * micro_batches * base if strategy == "zero3" else 0))


def projected(strategy: str, gpus: int, rank: int = 64, tokens: int = 8192, micro_batches: int = 2) -> float:
    """Weak-scaling efficiency of the 7B model under the assumptions above."""
    model = MODELS["7B"]
    compute = 4 * model.n_linear() * tokens / FLOPS  # forward, and backward through a frozen base
    collectives = {"ddp": 2, "zero2": micro_batches + 1, "zero3": 3 * micro_batches * model.layers}[strategy]
    volume = sent(strategy, gpus, micro_batches, 4 * model.n_lora(rank), model.bytes_4bit())
    hops = collectives * HOP * (gpus - 1).bit_length()
    return compute / (compute + volume / (WITHIN if gpus <= 8 else BETWEEN) + hops)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of each run")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.steps)
        rates = {"one": rate(folder, "one", start(folder, "one", "one.jsonl"))}
        apart = [(f"apart{i}", start(folder, f"apart{i}", "one.jsonl")) for i in (0, 1)]
        rates["two apart"] = statistics.mean(rate(folder, *run) for run in apart)
        for strategy in STRATEGIES:
            rates[strategy] = rate(folder, strategy, start(folder, strategy, "two.jsonl", strategy))
        sizes = json.loads((folder / "one" / "efficiency.json").read_text())
    adapter = 4 * sizes["n_trainable"]
    base = 4 * (sizes["n_parameters"] - sizes["n_trainable"])
    figures = {}
    print("| processes | scored tokens/s each | efficiency | bytes sent a step, computed |\n|---|---|---|---|")
    for run, value in rates.items():
        volume = sent(run, 2, 2, adapter, base) if run in STRATEGIES else 0
        print(f"| {run} | {value:.0f} | {value / rates['one']:.2f} | {volume:,.0f} |")
        key = run.replace(" ", "_")
        figures |= {f"{key}_tokens_per_second": value, f"{key}_efficiency": value / rates["one"]}
        figures[f"{key}_bytes_a_step"] = volume
    print("\n| projected, 7B | 8 GPUs | 64 | 512 |\n|---|---|---|---|")
    for strategy in STRATEGIES:
        row = {gpus: projected(strategy, gpus) for gpus in (8, 64, 512)}
        print(f"| {strategy} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
        figures |= {f"projected_{strategy}_{gpus}": value for gpus, value in row.items()}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
