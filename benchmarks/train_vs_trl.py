"""Our trainer beside TRL 1.16's on the same triples, model, optimizer and precision, in one call.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_vs_trl.py --chebi20 ../shared/data/chebi20/validation.txt --json figures.json

Each run is a process of its own, so that its peak memory is its own. A random Llama with a LoRA adapter trains on
triples with the paper's prompts: ChEBI-20 pairs where their file is given, else the embedded ones; the dis-preferred
output is another pair's, of similar length. Both see all triples once, each in its own order, and the mean of all
steps counts. TRL runs in each of its settings and its fastest counts; reference pre-computation counts with a third,
since the paper trains three epochs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

EPOCHS = 3
LOSSES = ("sft", "dpo", "cpo", "kto")  # the paper's; --losses takes more
# what TRL leaves to choose on a CPU; its DPO, KTO and SFT always score with a chunked head, its CPO and ORPO never
OF_DPO = [{}, {"precompute_ref_log_probs": True}]
TRL_SETTINGS = {
    "sft": [{}, {"padding_free": True}],
    "dpo": OF_DPO,
    "cpo": [{}],
    "kto": [{}, {"precompute_ref_log_probs": True}],
    "simpo": [{"loss_type": "simpo", "cpo_alpha": 0.0}],
    "cpo_simpo": [{"loss_type": "simpo"}],
    "orpo": [{}],
}
# TRL's loss_type and label_smoothing in its DPO trainer
DPO_TYPES = {
    "ipo": ("ipo", 0.0), "hinge": ("hinge", 0.0), "robust_dpo": ("robust", 0.1), "dpo_norm": ("sigmoid_norm", 0.0),
    "apo_zero": ("apo_zero", 0.0), "apo_down": ("apo_down", 0.0),
}  # fmt: skip
for _loss, (_type, _smoothing) in DPO_TYPES.items():
    TRL_SETTINGS[_loss] = [{"loss_type": _type, "label_smoothing": _smoothing} | setting for setting in OF_DPO]


def make_triples(chebi20: str | None, count: int) -> list[dict]:
    """Real pairs in both directions; the rejected output is that of the neighbour in length."""
    from lmolt.data.pairs import read_pairs

    pairs = read_pairs(chebi20 or "demo")
    triples = []
    for target, source, direction in (("caption", "molecule", "mol2cap"), ("molecule", "caption", "cap2mol")):
        ordered = sorted(pairs, key=lambda pair: len(pair[target]))
        step = max(1, len(ordered) // (count // 2))
        for i in range(0, step * (count // 2), step):
            other = ordered[i + 1] if i + 1 < len(ordered) else ordered[i - 1]
            triples.append(
                {
                    "id": f"{direction}-{i}",
                    "direction": direction,
                    "source": ordered[i][source],
                    "chosen": ordered[i][target],
                    "rejected": other[target],
                }
            )
    return triples


def make_policy(folder: Path, triples: list[dict], args) -> None:
    """A random Llama, and a byte-pair tokenizer that knows English and spells molecules, as Llama's does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lmolt.prompts import TEMPLATES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    captions = [t["chosen"] if t["direction"] == "mol2cap" else t["source"] for t in triples]
    tokenizer.train_from_iterator([*TEMPLATES.values(), *captions], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens([f"<unused {i}>" for i in range(args.vocabulary - len(fast))])  # few texts make few tokens
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def common_arguments(args, output_dir: str, batch: int) -> dict:
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "learning_rate": 5e-5,
        "optim": "adamw_torch_fused",
        "bf16": args.bf16,
        "use_cpu": not args.gpu,
        "report_to": "none",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 0,
    }


def lora():
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")


def run_ours(args, loss: str, folder: Path, triples: list[dict], output_dir: str) -> dict:
    import torch
    from peft import get_peft_model

    from lmolt.models import loading
    from lmolt.training import batches, reference
    from lmolt.training.trainer import PreferenceArguments, PreferenceTrainer

    tokenizer = loading.load_tokenizer(str(folder))
    examples, _ = batches.encode_triples(triples, tokenizer, 4096, "error")
    if loss == "kto":
        examples = batches.with_mismatches(examples, 0)
    arguments = PreferenceArguments(
        loss=loss,
        load_best_model_at_end=False,
        score_chunk=args.score_chunk,
        **common_arguments(args, output_dir, args.batch),
    )
    base = loading.load_base(str(folder), load_in_4bit=args.nf4, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    trainer = PreferenceTrainer(get_peft_model(base, lora()), arguments, examples, [], processing_class=tokenizer)
    trainer._model_is_proved = True  # once a run; it would count fully in the first of these few steps
    once = 0.0
    if trainer.loss.has_reference:
        started = time.perf_counter()
        reference.compute(trainer, examples)
        once = time.perf_counter() - started
        trainer.set_references({"benchmark": f"{time.time()}"})
    rate = matrix_rate(args)
    result = time_steps(trainer, args)
    efficiency = trainer.efficiency
    flops = flops_of_steps(trainer) / args.steps
    return result | {
        "once_per_triple": once / len(examples),
        "scored_tokens_per_step": statistics.mean(len(e.chosen) + len(e.rejected) for e in examples) * args.batch,
        "prompt": statistics.mean(len(e.prompt) for e in examples),
        "chosen": statistics.mean(len(e.chosen) for e in examples),
        "rejected": statistics.mean(len(e.rejected) for e in examples),
        "packed": efficiency.packed_tokens,
        "gflop": flops / 1e9,
        "matrix_gflops": rate / 1e9,
        "share": flops / result["step_seconds"] / rate,
    }


def matrix_rate(args) -> float:
    """FLOP/s of a matrix product of random numbers, 2048 cubed, in the precision of training: the best of ten."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16 if args.bf16 else torch.float32) for _ in range(2))
    a, b = (a.cuda(), b.cuda()) if args.gpu else (a, b)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        (a @ b).sum().item()
        times.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(times)


def flops_of_steps(trainer) -> int:
    """Floating-point operations of all products of an epoch's steps, forward and backward, as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        for batch in trainer.get_train_dataloader():
            loss, _ = trainer._forward(trainer.model, batch, **trainer._normalisers([batch]))
            loss.backward()
    return counter.get_total_flops()


def run_trl(args, loss: str, folder: Path, triples: list[dict], output_dir: str, setting: dict) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmolt.prompts import build_prompt

    rows = [
        {"prompt": build_prompt(t["direction"], t["source"]), "chosen": t["chosen"], "rejected": t["rejected"]}
        for t in triples
    ]
    arguments = common_arguments(args, output_dir, args.batch) | {"gradient_checkpointing": False} | setting
    if loss == "sft":
        from trl import SFTConfig as Config
        from trl import SFTTrainer as Trainer

        rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
        arguments |= {"completion_only_loss": True, "max_length": None}
    elif loss == "dpo" or loss in DPO_TYPES:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        arguments = {"max_length": 4096, "beta": 0.1} | arguments
    elif loss in ("cpo", "simpo", "cpo_simpo"):
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer

        arguments = {"max_length": 4096, "max_completion_length": 2048, "beta": 0.1, "cpo_alpha": 1.0} | arguments
    elif loss == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer

        arguments = {"max_length": 4096, "max_completion_length": 2048, "beta": 0.1} | arguments
    else:
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        rows = [
            {"prompt": r["prompt"], "completion": r[key], "label": key == "chosen"}
            for r in rows
            for key in ("chosen", "rejected")
        ]
        arguments |= {"max_length": 4096, "beta": 0.1, "per_device_train_batch_size": 2 * args.batch}
    kwargs = {}
    if args.nf4:
        from lmolt.models.loading import nf4

        kwargs["quantization_config"] = nf4()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if args.bf16 else torch.float32, attn_implementation="sdpa", **kwargs
    )
    once = [0.0]
    if setting.get("precompute_ref_log_probs"):
        plain = Trainer._precompute_ref_logps

        def timed(self, *a, **k):
            started = time.perf_counter()
            result = plain(self, *a, **k)
            once[0] += time.perf_counter() - started
            return result

        Trainer._precompute_ref_logps = timed
    trainer = Trainer(
        model=model,
        args=Config(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora(),
    )
    return time_steps(trainer, args) | {"once_per_triple": once[0] / len(triples)}


def time_steps(trainer, args) -> dict:
    from transformers import TrainerCallback

    from lmolt.training.efficiency import peak_memory_bytes

    moments = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if not moments:
                moments.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if args.gpu:
                import torch

                torch.cuda.synchronize()
            moments.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    steps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    return {"step_seconds": statistics.mean(steps), "steps": steps, "peak_bytes": peak_memory_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chebi20", help="ChEBI-20's file; default: the embedded pairs")
    parser.add_argument(
        "--losses",
        nargs="+",
        default=LOSSES,
        choices=list(TRL_SETTINGS),
        metavar="LOSS",
        help=f"of {', '.join(TRL_SETTINGS)}",
    )
    parser.add_argument("--batch", type=int, default=8, help="triples a step")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--score_chunk", type=int, default=256)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here, flat")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # a single run: system, loss, folder, setting
    args = parser.parse_args()
    if args.one:
        system, loss, folder, setting = args.one
        triples = json.loads((Path(folder) / "triples.json").read_text())
        with tempfile.TemporaryDirectory() as output_dir:
            if system == "ours":
                result = run_ours(args, loss, Path(folder), triples, output_dir)
            else:
                result = run_trl(args, loss, Path(folder), triples, output_dir, json.loads(setting))
        print("RESULT " + json.dumps(result))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        triples = make_triples(args.chebi20, args.batch * args.steps)
        make_policy(Path(folder), triples, args)
        (Path(folder) / "triples.json").write_text(json.dumps(triples))
        for loss in args.losses:
            ours = run_one(args, "ours", loss, folder, {})
            print(
                f"{loss}: tokens a triple: prompt {ours['prompt']:.0f}, chosen {ours['chosen']:.0f}, rejected "
                f"{ours['rejected']:.0f}",
                flush=True,
            )
            report(loss, "lmolt", ours, args)
            peers = [(s, run_one(args, "trl", loss, folder, s)) for s in TRL_SETTINGS[loss]]
            for setting, result in peers:
                report(loss, f"trl {setting or ''}", result, args)
            setting, best = min(peers, key=lambda peer: cost(peer[1], args))
            print(
                f"  {loss} lmolt: {ours['gflop']:,.0f} GFLOP a step, matrix products at {ours['matrix_gflops']:,.0f} "
                f"GFLOP/s: {ours['share']:.0%} of that",
                flush=True,
            )
            figures |= {f"{loss}_{key}": ours[key] for key in ("gflop", "matrix_gflops", "share")}
            figures[f"{loss}_speedup"] = cost(best, args) / cost(ours, args)
            figures[f"{loss}_memory_ratio"] = ours["peak_bytes"] / min(r["peak_bytes"] for _, r in peers)
            figures[f"{loss}_trl_setting"] = json.dumps(setting)
            figures[f"{loss}_triples_per_second"] = args.batch / cost(ours, args)
            figures[f"{loss}_trl_triples_per_second"] = args.batch / cost(best, args)
            print(
                f"{loss}: {figures[f'{loss}_speedup']:.2f}x as fast at "
                f"{figures[f'{loss}_memory_ratio']:.2f}x the memory\n",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1))


def cost(result: dict, args) -> float:
    """Seconds a step, with its share of what is computed once for all epochs."""
    return result["step_seconds"] + result["once_per_triple"] * args.batch / EPOCHS


def report(loss: str, name: str, result: dict, args) -> None:
    seconds = cost(result, args)
    tokens = f", {result['scored_tokens_per_step'] / seconds:,.0f} scored tokens/s" if "packed" in result else ""
    print(
        f"  {loss} {name}: {seconds:.2f} s a step of {args.batch} triples (once: {result['once_per_triple']:.3f} s a "
        f"triple), {args.batch / seconds:.2f} triples/s{tokens}, peak {result['peak_bytes'] / 2**30:.2f} GiB",
        flush=True,
    )


def run_one(args, system: str, loss: str, folder: str, setting: dict) -> dict:
    command = [sys.executable, __file__, "--one", system, loss, folder, json.dumps(setting)]
    for flag in ("batch", "steps", "hidden", "layers", "vocabulary", "score_chunk"):
        command += [f"--{flag}", str(getattr(args, flag))]
    command += [f"--{flag}" for flag in ("bf16", "nf4", "gpu") if getattr(args, flag)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{system} {loss} {setting} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


if __name__ == "__main__":
    main()
