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
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

INSTRUCTION, SOURCE, CHOSEN, REJECTED = 95, (40, 102), (34, 94), (47, 107)  # tokens: means 166, 64, 77
SHAPES = {
    "toy": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
VOCABULARY = 32_000


class Skipped(Exception):
    """A part, or one of its rows, that can't run here, with the reason."""


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device():
    return "cuda" if on_gpu() else "cpu"


def synchronise() -> None:
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def seconds(function, repeats: int = 5, warm: int = 2) -> float:
    """Median of a call's time, the device's work included."""
    for _ in range(warm):
        function()
    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def fresh_memory() -> None:
    import gc

    import torch

    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    from lmolt.training.efficiency import peak_memory_bytes

    return peak_memory_bytes() / 2**30


def matrix_rate() -> float:
    """FLOP/s of a bf16 matrix product of random numbers, 8192 cubed (fp32 and 1024 on a CPU)."""
    import torch

    n, dtype = (8192, torch.bfloat16) if on_gpu() else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device(), dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, repeats=10)


def make_model(shape: str, nf4: bool = True, attention: str | None = None):
    """A random Llama on the device, its linear layers in NF4 there, without LoRA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmolt.models.attention import TREE

    config = LlamaConfig(
        vocab_size=VOCABULARY if shape != "toy" else 512, max_position_embeddings=4096, **SHAPES[shape],
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attn_implementation=attention or TREE,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device()):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if nf4:
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if type(module) is torch.nn.Linear and name != "lm_head":
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", quant_storage=torch.bfloat16, device="meta",
                )  # fmt: skip
                packed.weight = bnb.nn.Params4bit(
                    module.weight.data.cpu() if not on_gpu() else module.weight.data, requires_grad=False,
                    quant_type="nf4", compress_statistics=True, quant_storage=torch.bfloat16,
                )  # fmt: skip
                packed.support_avx512bf16_for_cpu = False
                model.set_submodule(name, packed.to(device()))
        model.is_loaded_in_4bit = True  # PEFT asks
    fresh_memory()
    return model


def add_lora(model, dropout: float = 0.1):
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, config)  # whose weights PEFT makes fp32


def checkpoint_layers(model) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_sequences(triples: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(prompt, chosen), then (prompt, rejected), of random tokens; two directions' instructions."""
    draw, top = random.Random(seed), VOCABULARY if on_gpu() else 512
    ids = lambda n: [draw.randrange(3, top) for _ in range(n)]
    fixed = random.Random(1)
    instructions = [[1] + [fixed.randrange(3, top) for _ in range(INSTRUCTION - 1)] for _ in range(2)]
    chosen, rejected = [], []
    for i in range(triples):
        prompt = instructions[i % 2] + ids(draw.randint(*SOURCE))
        chosen.append((prompt, [*ids(draw.randint(*CHOSEN) - 1), 2]))
        rejected.append((prompt, [*ids(draw.randint(*REJECTED) - 1), 2]))
    return chosen + rejected


def backbone_flops(model, tokens: int, checkpointing: bool) -> float:
    """2 P forward, 2 P through activations (2 P more where a layer is computed again), of linear layers, LoRA's too."""
    linear = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    head = model.get_output_embeddings()
    linear -= head.in_features * head.out_features
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return tokens * (2 * linear * (3 if checkpointing else 2) + 2 * trained)


# --- parts


def versions() -> dict:
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


def tests() -> dict:
    """The project's own tests of tree, attention, losses and trainer, with the GPU visible."""
    names = ["tree", "attention", "lora", "losses", "trainer"] if on_gpu() else ["losses"]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--maxfail=12"]
    command += [f"tests/test_{name}.py" for name in names]
    environment = dict(os.environ)
    if on_gpu():
        environment |= {"CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=200)
    lines = done.stdout.splitlines()
    failed = [line[:400] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"exit_code": done.returncode, "last": lines[-1:], "failed": failed[:40]}


def forms() -> dict:
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


def new_shapes() -> dict:
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


def attention() -> dict:
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


def head() -> dict:
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


def steps() -> dict:
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
                    write("steps", figures)
            del model, optimizer
    return figures


def trl() -> dict:
    """TRL's CPO trainer with Liger's kernels on the same triples and model, beside our trainer."""
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise Skipped(f"{error}; pip install -r benchmarks/requirements.txt") from error
    figures = {}
    for batch in (32, 8) if on_gpu() else (2,):
        for system, setting in (
            ("lmolt", {}),
            ("trl", {"use_liger_kernel": True}),
            ("lmolt", {"use_liger_kernel": True}),
            ("trl", {"use_liger_kernel": True, "gradient_checkpointing": True}),
            ("lmolt", {"use_liger_kernel": True, "gradient_checkpointing": True}),
        ):
            if not on_gpu() and setting:
                continue
            name = f"{system}_{batch}" + "_liger" * ("use_liger_kernel" in setting)
            name += "_checkpointing" * ("gradient_checkpointing" in setting)
            command = [sys.executable, __file__, "--trainer", system, str(batch), json.dumps(setting)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=150)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if lines:
                figures |= {f"{name}_{k}": v for k, v in json.loads(lines[0][7:]).items()}
            else:
                figures[name] = "failed: " + done.stderr[-700:]
            write("trl", figures)
        for setting in ("", "_checkpointing"):  # each against its like, with Liger where that ran
            ours, theirs = (
                f"{s}_{batch}{k}{setting}" for s, k in (("lmolt", "_liger" * on_gpu()), ("trl", "_liger" * on_gpu()))
            )
            if f"{ours}_step_s" in figures and f"{theirs}_step_s" in figures:
                figures[f"speedup_{batch}{setting}"] = figures[f"{theirs}_step_s"] / figures[f"{ours}_step_s"]
                figures[f"memory_{batch}{setting}"] = figures[f"{ours}_peak_gib"] / figures[f"{theirs}_peak_gib"]
    return figures


def one_trainer(system: str, batch: int, setting: dict) -> None:
    """Some steps of one trainer, in a process of its own; prints RESULT."""
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    count = 6
    size = VOCABULARY if on_gpu() else 512
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = lambda ids: " ".join(f"w{i}" for i in ids if i > 2)
    rows, examples = [], []
    for step in range(count):
        sequences = make_sequences(batch, step)
        for (prompt, chosen), (_, rejected) in zip(sequences[:batch], sequences[batch:], strict=True):
            rows.append({"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)})
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
    if common.get("use_liger_kernel"):  # its fused head takes the loss of plain language models only
        common["liger_kernel_config"] = {
            "fused_linear_cross_entropy": False,
            "rms_norm": True,
            "swiglu": True,
            "rope": True,
        }
    if common["gradient_checkpointing"]:
        common["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    shape = "7B" if on_gpu() else "toy"
    if system == "lmolt":
        from lmolt.training.batches import Example
        from lmolt.training.trainer import PreferenceArguments, PreferenceTrainer

        model = add_lora(make_model(shape), dropout=0.0)
        if common.pop("use_liger_kernel", False):
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model.get_base_model(), **common.pop("liger_kernel_config"))
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
    figures = {"attention": trainer.attention, "ms_a_layer": trainer.attention_ms} if system == "lmolt" else {}
    print(
        "RESULT " + json.dumps(figures | {"step_s": took, "triples_per_s": batch / took, "peak_gib": peak_gib()}),
        flush=True,
    )


def token_ids(ids):
    from array import array

    return array("i", ids)


# --- running


PARTS = {"versions": versions, "forms": forms, "new_shapes": new_shapes, "attention": attention, "head": head,
         "steps": steps, "trl": trl, "tests": tests}  # fmt: skip
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
        one_trainer(args.trainer[0], int(args.trainer[1]), json.loads(args.trainer[2]))
        return
    if args.one:
        try:
            write(args.one, PARTS[args.one](), "finished")
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
