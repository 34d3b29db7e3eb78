"""Whether what the project claims holds over seeds: the demo's grid, seeds outermost (docs/evidence.md).

    python scripts/evidence.py                       # seeds 0 to 4; the same command goes on where it was
    python scripts/evidence.py --seeds 0 --rows cpo dpo
    python scripts/evidence.py --summary             # tables of docs/evidence/*.json, nothing is run

A seed has a folder, runs/evidence/SEED: stand-ins trained anew, triples of their outputs, fusions, a training run and
an evaluation of each row. Its results are docs/evidence/seed_SEED.json.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from operator import sub
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path[0] = str(ROOT)

from lmolt.files import run_main, write_whole  # noqa: E402
from lmolt.recipes import Parser

RESULTS = ROOT / "docs" / "evidence"
FUSIONS = {
    "slerp": ["--method", "slerp"],
    "ties": ["--method", "ties", "--density", "0.5", "0.5"],
    "linear": ["--method", "linear"],
    "bf16": ["--method", "slerp", "--dtype", "bfloat16"],
    "stochastic": ["--method", "slerp", "--dtype", "bfloat16", "--rounding", "stochastic"],
}
LOSSES = ("sft", "dpo", "kto", "cpo", "simpo", "orpo")
ROWS = ["start", *LOSSES, *(f"slerp_{loss}" for loss in LOSSES)]
ROWS += [f"{fusion}_{loss}" for fusion in ("ties", "linear", "bf16", "stochastic") for loss in ("cpo", "dpo")]
MEASURES = {
    "mol2cap": ("bleu2", "bleu2_grounding", "rougeL"),
    "cap2mol": ("bleu", "validity", "morgan_invalid0", "chrf", "win_rate"),
}


def stages(seed: int, rows: list[str]) -> list[tuple[Path, list[str]]]:
    """(the file that appears last, the command) of a seed's stages, in order."""
    folder = ROOT / "runs" / "evidence" / str(seed)
    models, triples, pairs = folder / "models", folder / "triples.parquet", folder / "pairs.parquet"
    script = lambda name, *argv: [str(ROOT / "scripts" / f"{name}.py"), *map(str, argv)]
    found = [(models / "finished", ["-m", "lmolt.demo.build", "--folder", str(folder), "--seed", str(seed)])]
    translators = [f"--{d}_model={models / f't5_{d}'}" for d in ("mol2cap", "cap2mol")]
    argv = ["--pairs", pairs, "--fraction", "0.3", "--seed", seed, "--max_new_tokens", "128", *translators]
    found.append((triples, script("make_triples", *argv, "--output", triples)))
    for fusion, method in FUSIONS.items():
        if any(row.startswith(f"{fusion}_") for row in rows):
            argv = [*method, "--models", models / "cap2mol", models / "mol2cap", "--weights", "0.95", "0.05"]
            argv += ["--base", models / "base"] if fusion == "ties" else []
            found.append((folder / fusion / "config.json", script("merge", *argv, "--output", folder / fusion)))
    for row in rows:
        fusion, _, loss = row.rpartition("_")
        model, adapter = folder / fusion if fusion else models / "cap2mol", folder / row
        if row != "start":
            argv = ["--recipe", ROOT / "recipes" / "demo.yaml", "--loss", loss, "--model", model, "--triples", triples]
            argv += ["--max_steps", "100", "--seed", seed, "--output_dir", adapter, "--resume_from_checkpoint", "true"]
            found.append((adapter / "adapter_model.safetensors", script("train_pref", *argv)))
        argv = ["--model", model, *(["--adapter", adapter] if row != "start" else []), "--pairs", pairs, "--name", row]
        argv += ["--limit", "100", "--max_new_tokens", "128", "--n_bootstrap", "500", "--no_fcd"]
        output = folder / "evaluation" / row
        found.append((output / "metrics.json", script("evaluate", *argv, "--output", output)))
    return found


def collect(seed: int, rows: list[str]) -> dict:
    """The measures of a seed's finished rows, each with its interval over pairs."""
    results = {}
    for row in rows:
        file = ROOT / "runs" / "evidence" / str(seed) / "evaluation" / row / "metrics.json"
        if file.exists():
            directions = json.loads(file.read_text())["directions"]
            found = {f"{d}/{key}": directions[d]["metrics"][key] for d, keys in MEASURES.items() for key in keys}
            results[row] = {k: {part: entry.get(part) for part in ("value", "ci95")} for k, entry in found.items()}
    return results


def run(seed: int, rows: list[str]) -> None:
    """What is left of a seed; its file is written anew after each evaluation."""
    for leaves, command in stages(seed, rows):
        if leaves.exists():
            continue
        print(f"== seed {seed}: {leaves.relative_to(ROOT)}", flush=True)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nfailed:\n{done.stderr[-3000:]}")
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
        if leaves.name == "metrics.json":
            packages = {name: version(name) for name in ("torch", "transformers", "peft", "rdkit")}
            about = {"seed": seed, "date": time.strftime("%Y-%m-%d"), "processor": processor(), "versions": packages}
            record = about | {"rows": collect(seed, ROWS)}
            write_whole(RESULTS / f"seed_{seed}.json", json.dumps(record, indent=1) + "\n")


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def summary() -> str:
    """Markdown: mean and standard deviation over seeds, and the differences that docs/evidence.md asks for."""
    seeds = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("seed_*.json"))]
    measures = [f"{direction}/{key}" for direction, keys in MEASURES.items() for key in keys]
    half = lambda seed, row, measure: -sub(*seed["rows"][row][measure]["ci95"]) / 2
    value = lambda seed, row, measure: seed["rows"].get(row, {}).get(measure, {}).get("value")
    lines = [f"{len(seeds)} seeds: mean (standard deviation over seeds, half a seed's 95 % interval over pairs)", ""]
    lines += ["| row | n | " + " | ".join(measures) + " |", "|---" * (len(measures) + 2) + "|"]
    for row in ROWS:
        columns = [[v for seed in seeds if (v := value(seed, row, m)) is not None] for m in measures]
        if columns[0]:
            over_pairs = [
                statistics.mean(half(seed, row, m) for seed in seeds if row in seed["rows"]) for m in measures
            ]
            over_seeds = [f"{statistics.stdev(c):.3f}" if len(c) > 1 else "" for c in columns]
            cells = [
                f"{statistics.mean(c):.3f} ({of_seeds}, {of_pairs:.3f})"
                for c, of_seeds, of_pairs in zip(columns, over_seeds, over_pairs, strict=True)
            ]
            lines.append(f"| {row} | {len(columns[0])} | " + " | ".join(cells) + " |")
    lines += ["", "| difference | n | " + " | ".join(measures) + " |", "|---" * (len(measures) + 2) + "|"]
    compared = [("cpo", "start"), ("cpo", "dpo"), ("cpo", "kto"), ("cpo", "simpo"), ("cpo", "orpo"), ("cpo", "sft")]
    compared += [(f"{fusion}_cpo", "cpo") for fusion in FUSIONS] + [("bf16_cpo", "slerp_cpo")]
    for a, b in [*compared, ("stochastic_cpo", "slerp_cpo"), ("dpo", "start"), ("kto", "start")]:
        cells, n = [], 0
        for m in measures:
            pairs = [(value(seed, a, m), value(seed, b, m)) for seed in seeds]
            differences = [x - y for x, y in pairs if x is not None and y is not None]
            n = max(n, len(differences))
            if not differences:
                cells.append("")
            elif len(differences) == 1:
                cells.append(f"{differences[0]:+.3f}")
            else:
                error = statistics.stdev(differences) / math.sqrt(len(differences))
                cells.append(
                    f"{statistics.mean(differences):+.3f} ± {2 * error:.3f}, {sum(d > 0 for d in differences)} up"
                )
        if n:
            lines.append(f"| {a} less {b} | {n} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", '± is twice the standard error over seeds; "up" counts seeds.'])


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--summary", action="store_true", help="print the tables; run nothing")
    args = parser.parse_args(argv)
    if not args.summary:
        for seed in args.seeds:
            run(seed, args.rows)
    print(summary())


if __name__ == "__main__":
    run_main(main)
