"""Time scripts/merge.py beside mergekit 0.1.5 on random Llama checkpoints; compare their outputs bit for bit.

    python benchmarks/merge_vs_mergekit.py
    python benchmarks/merge_vs_mergekit.py --sizes S M --methods ties --parity --json merge.json

Both run in turn as a user runs them, start-up included, under GNU time (apt-get install time): wall and CPU seconds
(user + system) and peak resident memory. `cp` of the output is the limit. Each run finds its inputs in the page cache:
whichever came first would pay for reading them from the disk. The models: bf16, hidden size 2048, 32,000 tokens,
sharded; S has 285M parameters, M 542M, 3B 3.0 billion (18 GB for its models, 12 GB for outputs). --parity compares a
second merge of ours, with --rounding mergekit, to mergekit's output, whose argsort is made stable for it (it leaves the
order of equal magnitudes open).
CPU seconds are the figures to trust where other work shares the cores.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from lmolt.merging.checkpoints import Checkpoint  # noqa: E402
from lmolt.merging.safetensors_io import OutputFolder, encode  # noqa: E402

LAYERS, SHARDS = {"S": 3, "M": 8, "3B": 56}, {"S": 2, "M": 4, "3B": 6}
HIDDEN, MLP, VOCABULARY = 2048, 5632, 32000
PARAMETERS = {"7B": 6.74e9, "70B": 69.0e9}  # Llama 2's
WEIGHTS, DENSITY = (0.95, 0.05), 0.5
STABLE = (
    "import sys, torch; argsort = torch.argsort; torch.argsort = lambda *x, **k: argsort(*x, stable=True, **k); "
    "from mergekit.scripts.run_yaml import main; main()"
)


def layout(size: str) -> dict[str, list]:
    """{shard: [(tensor, shape)]} of a Llama."""
    square, tall, wide = (HIDDEN, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)
    tensors = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(LAYERS[size]):
        shapes = {f"self_attn.{name}_proj": square for name in "qkvo"} | {"mlp.gate_proj": tall, "mlp.up_proj": tall}
        shapes |= {"mlp.down_proj": wide, "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        tensors += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    tensors += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
    count, per = SHARDS[size], -(-len(tensors) // SHARDS[size])
    tensors = [(name, "BF16", shape) for name, shape in tensors]
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": tensors[i * per : (i + 1) * per] for i in range(count)}


def build(folder: Path, size: str) -> None:
    """base, a, b: two fine-tuned models, whose deltas have a tenth of the weights' size."""
    config = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "vocab_size": VOCABULARY,
        },
        **{"intermediate_size": MLP, "num_hidden_layers": LAYERS[size], "num_attention_heads": 16, "dtype": "bfloat16"},
        **{"num_key_value_heads": 16, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    }
    shapes = {tensor: shape for tensors in layout(size).values() for tensor, _, shape in tensors}
    # normal values drawn once, from which each block of rows takes a stretch: drawing all would take minutes at 3B
    pools = [np.random.default_rng(seed).standard_normal(1 << 23, np.float32) for seed in range(3)]
    for number, name in enumerate(("base", "a", "b")):
        if (folder / name).is_dir():
            continue

        def produce(tensor: str, write, number=number) -> dict:
            rows, columns = (*shapes[tensor], 1)[:2]
            for start in range(0, rows, 1024):
                count = min(1024, rows - start) * columns
                places = np.random.default_rng([zlib.crc32(tensor.encode()), start]).integers(0, (1 << 23) - count, 3)
                stretch = lambda which, count=count, places=places: pools[which][places[which] :][:count]
                values = 0.02 * stretch(0)
                if number:
                    values += np.float32(0.002) * stretch(number)
                write(encode(values, "BF16"))
            return {}

        output = OutputFolder(folder / name, layout(size), {}, False)
        output.write_tensors(produce)
        output.finish(folder, [], config, lambda: None)


def mergekit_recipe(folder: Path, method: str) -> Path:
    models = [{"model": str(folder / name)} for name in "ab"]
    recipe: dict = {"merge_method": method, "dtype": "bfloat16", "models": models}
    if method == "slerp":
        recipe |= {"base_model": models[0]["model"], "parameters": {"t": WEIGHTS[1]}}
    else:
        for model, weight in zip(models, WEIGHTS, strict=True):
            model["parameters"] = {"weight": weight} | ({"density": DENSITY} if method == "ties" else {})
        recipe |= {"base_model": str(folder / "base")} if method == "ties" else {}
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def ours(folder: Path, method: str, output: Path, *options: str) -> list[str]:
    command = [sys.executable, str(ROOT / "scripts" / "merge.py"), "--method", method, "--output", str(output)]
    command += ["--models", str(folder / "a"), str(folder / "b"), "--weights", *map(str, WEIGHTS), *options]
    return command + (["--base", str(folder / "base"), "--density", str(DENSITY)] if method == "ties" else [])


def timed(command: list[str], inputs: Path) -> dict[str, float]:
    """Seconds of wall and CPU, peak MB, with `inputs` read before; `ValueError` if the command fails."""
    for file in inputs.glob("*/*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass
    with tempfile.NamedTemporaryFile("r") as report:
        run = subprocess.run(
            ["/usr/bin/time", "-o", report.name, "-f", "%e %U %S %M", *command], capture_output=True, text=True
        )
        if run.returncode:
            raise ValueError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
        wall, user, system, peak = map(float, report.read().split())
    return {"wall": wall, "cpu": user + system, "peak_rss_mb": peak / 1000}


def differing(one: Path, other: Path) -> float:
    """Share of stored values that are not the same bits."""
    left, right = Checkpoint(one), Checkpoint(other)
    pairs = ((left.read(name), right.read(name)) for name in left.entries)
    odd = sum(int((x != y).sum()) for pair in pairs for x, y in zip(*pair, strict=True))
    return odd / sum(entry.size for entry in left.entries.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=LAYERS, default=["S"])
    parser.add_argument(
        "--methods", nargs="+", choices=("ties", "slerp", "linear"), default=["ties", "slerp", "linear"]
    )
    parser.add_argument("--mergekit", default=str(Path(sys.executable).with_name("mergekit-yaml")))
    parser.add_argument("--without_mergekit", action="store_true", help="only ours, and cp")
    parser.add_argument("--parity", action="store_true")
    parser.add_argument("--folder", type=Path, help="keep the models here for the next run (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures here; the last size's have the plain names")
    args = parser.parse_args()
    if not Path("/usr/bin/time").is_file():
        raise ValueError("/usr/bin/time is missing: apt-get install time")
    if not args.without_mergekit and not Path(args.mergekit).is_file():
        raise ValueError(f"{args.mergekit} is missing: pip install -r benchmarks/requirements.txt, or give --mergekit")
    work = args.folder or Path(tempfile.mkdtemp(prefix="merge-"))
    figures: dict[str, float] = {}
    print("size method     who         wall s   CPU s  peak MB   CPU: mergekit / ours")
    for size in args.sizes:
        folder = work / size
        build(folder, size)
        for method in args.methods:
            rows, recipe = {}, mergekit_recipe(folder, method)
            outputs = {who: folder / f"{method}_{who}" for who in ("ours", "mergekit", "cp", "rounded", "stable")}
            for output in outputs.values():
                shutil.rmtree(output, ignore_errors=True)
            rows["ours"] = timed(ours(folder, method, outputs["ours"]), folder)
            rows["cp"] = timed(["cp", "-r", str(outputs["ours"]), str(outputs["cp"])], folder)
            if not args.without_mergekit:
                rows["mergekit"] = timed([args.mergekit, str(recipe), str(outputs["mergekit"])], folder)
            for who, row in rows.items():
                ratio = f"{row['cpu'] / rows['ours']['cpu']:8.1f}" if who == "mergekit" else ""
                numbers = f"{row['wall']:7.1f} {row['cpu']:7.1f} {row['peak_rss_mb']:8.0f}"
                print(f"{size:4} {method:10} {who:10} {numbers} {ratio}", flush=True)
                for key, value in row.items():
                    figures[f"{method}_{size}_{who}_{key}"] = value
            figures[f"{method}_peak_rss_mb"] = rows["ours"]["peak_rss_mb"]
            if not args.without_mergekit:
                figures[f"{method}_cpu_speedup"] = rows["mergekit"]["cpu"] / rows["ours"]["cpu"]
            if args.parity:
                python = Path(args.mergekit).with_name("python")
                timed([str(python), "-c", STABLE, str(recipe), str(outputs["stable"])], folder)
                timed(ours(folder, method, outputs["rounded"], "--rounding", "mergekit"), folder)
                for who in ("ours", "rounded"):
                    share = differing(outputs[who], outputs["stable"])
                    figures[f"{method}_{size}_{who}_share_unlike_mergekit"] = share
                    print(f"{size:4} {method:10} {who}: {share:.2e} of the values differ from mergekit's")
            for output in outputs.values():
                shutil.rmtree(output, ignore_errors=True)
    values = sum(int(np.prod(shape)) for tensors in layout(args.sizes[-1]).values() for *_, shape in tensors)
    for name, count in PARAMETERS.items():  # in proportion: a tensor costs next to nothing, its values all
        for method in args.methods:
            for who in ("ours", "cp") if args.without_mergekit else ("ours", "mergekit", "cp"):
                row = {
                    key: figures[f"{method}_{args.sizes[-1]}_{who}_{key}"] * count / values for key in ("wall", "cpu")
                }
                figures |= {f"{method}_{name.lower()}_{who}_projected_{key}": value for key, value in row.items()}
                numbers = f"{row['wall']:7.0f} {row['cpu']:7.0f}"
                print(f"{name:4} {method:10} {who:10} {numbers}  in proportion to {args.sizes[-1]}")
    if not args.folder:
        shutil.rmtree(work)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
