"""Everything that has to be measured on a GPU, in parts of a few minutes; at a toy scale on a CPU.

    ./launch.sh bench-gpu                    # all parts; finished ones are skipped
    ./launch.sh bench-gpu steps trl          # some
    python benchmarks/gpu.py --output runs/bench/gpu attention

Each part is a process of its own, so that one survives another's failure, and writes PART.json into the output folder
at once, with its figures, the card and the versions. A part that can't run there says `skipped` and why. Models have
random weights in the shape of Llama-2 7B and of a 1B, so nothing is downloaded; triples are random tokens as long as
ChEBI-20's under the paper's prompts (docs/performance.md). Neither datasets nor rdkit is needed, except by `trl`.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_runs  # noqa: E402
from gpu_models import (  # noqa: E402
    Skipped,
    add_lora,
    backbone_flops,
    checkpoint_layers,
    device,
    fresh_memory,
    make_model,
    make_sequences,
    matrix_rate,
    on_gpu,
    peak_gib,
    seconds,
    synchronise,
)  # fmt: skip

# --- parts


def versions(keep) -> dict:
    import torch

    figures = {"matrix_tflops": matrix_rate() / 1e12, "cudnn_sdp": torch.backends.cuda.cudnn_sdp_enabled()}
    figures["cudnn"] = torch.backends.cudnn.version()
    if not on_gpu():
        return figures
    smi = subprocess.run(["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True)
    figures["nvidia_smi"] = smi.stdout[:3000]
    a = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    b = torch.empty_like(a)
    figures["copy_tb_per_s"] = 2 * a.numel() * 4 / seconds(lambda: b.copy_(a)) / 1e12
    return figures


def tests(keep) -> dict:
    """The project's own tests of tree, attention, losses and trainer, with the GPU visible."""
    names = ["tree", "attention", "lora", "losses", "trainer", "liger"] if on_gpu() else ["losses"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--maxfail=12"]
    command += [f"tests/test_{name}.py" for name in names]
    environment = dict(os.environ)
    if on_gpu():
        environment |= {"CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    lines = done.stdout.splitlines()
    failed = [line[:400] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "last": lines[-1:], "failed": failed[:40]}


def forms(keep) -> dict:
    """Tree (tiles, flex) against plain rows on the device: fp32 and bf16, log-probabilities and gradients."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, GptOssConfig, LlamaConfig

    from lmolt.models.attention import TREE
    from lmolt.models.tree import build_tree, padded_logps, tree_logps

    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    windows = {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"] * 2}
    configs = {
        "llama": LlamaConfig(**shape),
        "gemma3": Gemma3TextConfig(**shape | windows),
        "gemma2": Gemma2Config(**shape | windows | {"query_pre_attn_scalar": 64}),
        "gpt_oss": GptOssConfig(**shape | windows | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    }
    sequences = [(p[:120], o) for p, o in make_sequences(4)]
    sequences = [([t % 509 + 3 for t in p], [t % 509 + 3 for t in o]) for p, o in sequences]
    figures = {}
    for name, config in configs.items():
        if not on_gpu() and name != "llama":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(device(), dtype)
            tree_model = AutoModelForCausalLM.from_config(config, attn_implementation=TREE).to(device(), dtype)
            for parameter in eager.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.08)
            tree_model.load_state_dict(eager.state_dict())
            scores = {"eager": lambda m: torch.cat([padded_logps(m, [s]) for s in sequences])}
            for form in ("tiles", "flex") if name != "gemma2" else ("tiles",):  # a soft cap is the tiles' alone
                scores[form] = lambda m, form=form: tree_logps(m, build_tree(sequences).to(device()), attention=form)
            results, key = {}, f"{name}_{str(dtype).removeprefix('torch.')}"
            for form, score in scores.items():
                model = eager if form == "eager" else tree_model
                model.zero_grad()
                try:
                    start = time.perf_counter()
                    if form == "flex" and not on_gpu():
                        with torch.no_grad():  # no backward pass on a CPU
                            results[form] = score(model), None
                        continue
                    logps = score(model)
                    logps.sum().backward()
                    results[form] = (
                        logps.detach(),
                        torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None]),
                    )
                    synchronise()
                    figures[f"{key}_{form}_first_s"] = time.perf_counter() - start
                except Exception as error:  # the others are still worth having
                    figures[f"{key}_{form}"] = f"failed: {type(error).__name__}: {error}"[:600]
            truth, gradient = results["eager"]
            for form in ("tiles", "flex"):
                if form in results:
                    figures[f"{key}_{form}_nats"] = (results[form][0] - truth).abs().max().item()
                    if results[form][1] is not None:
                        difference = (results[form][1] - gradient).norm() / gradient.norm()
                        figures[f"{key}_{form}_gradient"] = difference.item()
    return figures


def new_shapes(keep) -> dict:
    """What a new shape costs SDPA with a mask, with cuDNN's attention and without: forward and backward, ms each."""
    import torch
    from torch.nn import functional as F

    if not on_gpu():
        raise Skipped("no GPU: cuDNN has no part in attention")
    figures = {}
    for on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(on)
        times = []
        for i in range(20):
            k = 200 + 8 * i + 200 * on
            q, key, value = (torch.randn(1, 32, n, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                             for n in (96, k, k))  # fmt: skip
            mask = torch.zeros(1, 1, 96, k, device="cuda", dtype=torch.bfloat16)
            synchronise()
            start = time.perf_counter()
            F.scaled_dot_product_attention(q, key, value, mask).sum().backward()
            synchronise()
            times.append(1000 * (time.perf_counter() - start))
        times = times[1:]
        name = "cudnn" if on else "without"
        figures |= {f"{name}_median_ms": sorted(times)[len(times) // 2], f"{name}_worst_ms": max(times)}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return figures


def attention(keep) -> dict:
    """Attention alone of one layer, forward and backward: tiles, FlexAttention, one mask over the row."""
    import torch

    from lmolt.models import tree as trees
    from lmolt.models.forms import time_forms

    figures = {}
    sizes = (8, 16, 64) if on_gpu() else (2,)
    for heads, shared, size in ((32, 32, 128), (32, 8, 128)) if on_gpu() else ((4, 2, 16),):
        for triples in sizes:
            tree = trees.build_tree(make_sequences(triples)).to(device())
            for form in ("tiles", "flex", "mask"):
                key = f"{heads}_{shared}_T{len(tree.input_ids)}_{form}"
                fresh_memory()
                try:
                    if form == "mask" and triples == 64:
                        continue
                    dtype = torch.bfloat16 if on_gpu() else torch.float32
                    timed, _ = time_forms(tree, heads, shared, size, dtype, forms=(form,))
                    figures[f"{key}_ms"] = 1000 * timed[form]
                    figures[f"{key}_gib"] = peak_gib()
                except Exception as error:
                    figures[key] = f"failed: {type(error).__name__}: {error}"[:300]
    return figures


def head(keep) -> dict:
    """The head's log-probabilities and their gradient, of 2,256 positions, in chunks."""
    import torch

    from lmolt.models.tree import _FrozenHeadLogps

    figures, positions = {}, 2256 if on_gpu() else 64
    hidden_size, dtype = (4096, torch.bfloat16) if on_gpu() else (64, torch.float32)
    for vocabulary in (32_000, 128_000) if on_gpu() else (512,):
        weight = torch.randn(vocabulary, hidden_size, device=device(), dtype=dtype) * 0.02
        hidden = torch.randn(positions, hidden_size, device=device(), dtype=dtype, requires_grad=True)
        targets = torch.randint(0, vocabulary, (positions,), device=device())
        for chunk in (256, 512, 1024, 4096):
            fresh_memory()
            before = peak_gib()
            run = lambda w=weight, h=hidden, t=targets, c=chunk: (
                _FrozenHeadLogps.apply(h, w, None, t, c).sum().backward()
            )
            took = seconds(run)
            figures[f"V{vocabulary}_chunk{chunk}_ms"] = 1000 * took
            figures[f"V{vocabulary}_chunk{chunk}_tflops"] = 4 * positions * vocabulary * hidden_size / took / 1e12
            figures[f"V{vocabulary}_chunk{chunk}_added_gib"] = peak_gib() - before
    return figures


def steps(keep) -> dict:
    """Training steps (CPO, forward, backward, AdamW) of LMolT at 1, 8, 16, 32 triples, checkpointing off and on."""
    import warnings

    import torch

    from lmolt.models.lora import lean_adapters
    from lmolt.models.tree import build_tree, tree_logps
    from lmolt.training import losses

    rate = matrix_rate()
    figures = {"matrix_tflops": rate / 1e12}
    for shape in ("7B", "1B") if on_gpu() else ("toy",):
        for checkpointing in (False, True):
            fresh_memory()
            model = add_lora(make_model(shape)).train()
            lean_adapters(model)
            figures[f"{shape}_weights_gib"] = torch.cuda.memory_allocated() / 2**30 if on_gpu() else None
            if checkpointing:
                checkpoint_layers(model)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, fused=True)
            for form in ("tiles", "flex") if on_gpu() else ("tiles",):
                for triples in (1, 8, 16, 32) if on_gpu() else (1, 2):
                    if form == "flex" and (triples == 1 or checkpointing):
                        continue
                    key = f"{shape}_{form}_{triples}_{'checkpointing' if checkpointing else 'whole'}"
                    sequences = make_sequences(triples)
                    tokens = torch.tensor([len(o) for _, o in sequences[:triples]], device=device())
                    batches = itertools.cycle([make_sequences(triples, seed) for seed in range(8)])

                    def step(n=triples, t=tokens, f=form, batches=batches, model=model, optimizer=optimizer):
                        tree = build_tree(next(batches)).to(device())  # another one each time, as in training
                        with torch.autocast(device(), torch.bfloat16):
                            logps = tree_logps(model, tree, attention=f)
                        losses.cpo(logps[:n], logps[n:], t).float().backward()
                        optimizer.step()
                        optimizer.zero_grad()

                    try:
                        fresh_memory()
                        took = seconds(step, repeats=7, warm=2)
                        tree = build_tree(sequences)
                        figures |= {
                            f"{key}_ms": 1000 * took,
                            f"{key}_triples_per_s": triples / took,
                            f"{key}_scored_tokens_per_s": int(tree.num_tokens.sum()) / took,
                            f"{key}_peak_gib": peak_gib(),
                            f"{key}_share_of_matrix_rate": backbone_flops(model, len(tree.input_ids), checkpointing)
                            / took / rate,
                        }  # fmt: skip
                    except torch.OutOfMemoryError:
                        figures[key] = "out of memory"
                        fresh_memory()
                    except Exception as error:
                        figures[key] = f"failed: {type(error).__name__}: {error}"[:400]
                    if on_gpu() and triples == 8 and not checkpointing and form == "tiles" and shape == "7B":
                        torch.cuda.set_sync_debug_mode("warn")
                        with warnings.catch_warnings(record=True) as caught:
                            warnings.simplefilter("always")
                            step()
                        torch.cuda.set_sync_debug_mode("default")
                        figures["synchronisations_a_step"] = len(caught)
                        figures["synchronised_in"] = sorted({f"{w.filename}:{w.lineno}" for w in caught})[:12]
                        from torch.profiler import ProfilerActivity, profile

                        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                            step()
                        events = profiler.key_averages()
                        busiest = sorted(events, key=lambda e: -e.self_device_time_total)[:25]
                        figures["kernels_ms"] = {e.key[:90]: round(e.self_device_time_total / 1000, 2) for e in busiest}
                        figures["kernels_total_ms"] = sum(e.self_device_time_total for e in events) / 1000
                        figures["launches"] = sum(e.count for e in events)
                    keep(figures)
            del model, optimizer
    return figures


# --- running


PARTS = {"versions": versions, "forms": forms, "new_shapes": new_shapes, "attention": attention, "head": head,
         "steps": steps, "trl": gpu_runs.trl, "tests": tests, "memory": gpu_runs.memory,
         "references": gpu_runs.references, "translating": gpu_runs.translating, "strategies": gpu_runs.strategies,
         "offload": gpu_runs.offload, "resume": gpu_runs.resume, "out_of_memory": gpu_runs.out_of_memory}  # fmt: skip
OUTPUT = ROOT / "runs" / "bench" / "gpu"


def write(part: str, figures: dict, state: str = "unfinished") -> None:
    """PART.json at once, whole: a part that is killed leaves what it had."""
    import importlib.metadata

    import torch

    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: a toy scale on the CPU"
    text = json.dumps({"part": part, "state": state, "card": card, "versions": found, "figures": figures}, indent=1)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / f"{part}.json.new").write_text(text)
    (OUTPUT / f"{part}.json.new").replace(OUTPUT / f"{part}.json")


def main() -> None:
    global OUTPUT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--part_seconds", type=int, default=230, help="a part that takes longer is ended")
    parser.add_argument("--json", type=Path, help="all parts' figures in one file, too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    OUTPUT = args.output
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.trainer:
        gpu_runs.one_trainer(args.trainer[0], int(args.trainer[1]), json.loads(args.trainer[2]))
        return
    if args.one:
        try:
            write(args.one, PARTS[args.one](lambda figures: write(args.one, figures)), "finished")
        except Skipped as reason:
            write(args.one, {}, f"skipped: {reason}")
        return
    for part in args.parts or PARTS:
        file, start = OUTPUT / f"{part}.json", time.perf_counter()
        if file.exists() and json.loads(file.read_text())["state"] == "finished":
            print(f"{part}: done ({file})", flush=True)
            continue
        command = [sys.executable, __file__, "--output", str(OUTPUT), "--one", part]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.part_seconds)
            reason = "" if done.returncode == 0 else f"failed: {done.stderr[-1500:]}"
        except subprocess.TimeoutExpired:
            reason = f"failed: took over {args.part_seconds} s"
        found = json.loads(file.read_text()) if file.exists() else {"figures": {}}
        if reason:
            write(part, found["figures"], reason)
        state = reason or found["state"]
        print(f"{part}: {state} in {time.perf_counter() - start:.0f} s", flush=True)
        for key, value in found["figures"].items():
            print(f"  {key}: {value:.4g}" if isinstance(value, float) else f"  {key}: {str(value)[:700]}", flush=True)
    if args.json:
        found = {part: json.loads((OUTPUT / f"{part}.json").read_text()) for part in args.parts or PARTS}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
