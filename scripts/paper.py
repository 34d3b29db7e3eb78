"""The paper's Tables 1 to 4 as a list of stages: what is done, what is left and what it takes; and runs what is left.

    python scripts/paper.py --dry_run       # the plan and its commands, each of which runs alone, on any machine
    python scripts/paper.py                 # runs what is left: a GPU of 24 GB, the Hub
    python scripts/paper.py --scale demo    # the same grid on the embedded default: two CPU cores

(./launch.sh paper, with the same arguments.) A stage is done when its file is there; remove that to do it again. One
that fails doesn't keep others from running. ChemLLM, which runs code of its own, is left out without
--trust_remote_code.
"""

import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import shlex
import subprocess
from typing import NamedTuple

import yaml

from lmolt.files import run_main
from lmolt.generation.systems import SYSTEMS, System, read_system
from lmolt.prompts import CAP2MOL, MOL2CAP
from lmolt.recipes import Parser
from lmolt.training.losses import LOSSES

RECIPES = SYSTEMS.parent
ROWS = {  # systems in the tables' order, as the tables call them
    "molt5": "MolT5",
    "molt5_small": "MolT5-small",
    "molt5_base": "MolT5-base",
    "molt5_large": "MolT5-large",
    "txtchem_t5": "Text+Chem T5",
    "chem_llm": "ChemLLM",
    "meditron": "Meditron",
    "sft": "SFT",
    "dpo": "DPO (Eq. 5)",
    "dpo_kto_pair": "DPO (as run)",
    "cpo": "CPO",
    "kto": "KTO",
    "ties_dpo": "TIES + DPO (Eq. 5)",
    "ties_dpo_kto_pair": "TIES + DPO (as run)",
    "ties_cpo": "TIES + CPO",
    "slerp_dpo": "SLERP + DPO (Eq. 5)",
    "slerp_dpo_kto_pair": "SLERP + DPO (as run)",
    "slerp_cpo": "SLERP + CPO",
}
FUSED = {"ties": "recipes/merge/ties_19_1.yaml", "slerp": "recipes/merge/slerp_19_1.yaml"}
# Of 7B training, by arithmetic and not measured: 12,700 triples of 370 tokens, three epochs, 4 FLOP a parameter and
# token (the base is frozen) at 1e14 FLOP/s, an A100; DPO's reference is one forward pass more, KTO's z a third output.
# GB: NF4 weights 4, adapter with its optimizer 3, activations of 1,024 tokens 8.
TRAIN_MEMORY = 15


def train_hours(loss: str) -> float:
    reads = LOSSES[loss].reads
    return 0.9 + 0.2 * ("rejected" in reads) + 0.2 * LOSSES[loss].has_reference + 0.3 * ("z" in reads)


class Stage(NamedTuple):
    name: str
    leaves: str  # the file that appears last
    command: list[str]
    needs: list[str] = []  # stages
    memory: float = 0  # GB on a GPU
    hours: float = 0  # on one A100, or on two CPU cores


class Scale(NamedTuple):
    systems: str  # file of them
    folder: str  # what all but the triples is written to
    base: str  # the model that both unidirectional ones were trained from
    fuse: list[str]  # flags beside the recipe's
    triples: Stage
    eval_triples: Stage
    train: list[str]  # flags beside the recipe's
    evaluate: list[str]  # flags


def scales() -> dict[str, Scale]:
    flags = lambda text: text.split()
    translator = read_system("molt5_large").models
    triples = ["python", *flags("scripts/make_triples.py --pairs lpm24 --fraction 0.1 --invalid_pairs drop")]
    triples += ["--mol2cap_model", translator[MOL2CAP], "--cap2mol_model", translator[CAP2MOL]]
    of_split = lambda split, name: [*triples, "--split", split, "--output", f"runs/paper/{name}.parquet"]
    paper = Scale(
        systems="recipes/systems.yaml",
        folder="runs/paper",
        base="epfl-llm/meditron-7b",
        fuse=flags("--dtype bfloat16"),  # the base's; both Meditrons are stored in fp32
        triples=Stage("triples", "runs/paper/triples.parquet", of_split("train", "triples"), memory=6, hours=1),
        eval_triples=Stage(
            *("eval triples", "runs/paper/eval_triples.parquet", of_split("validation", "eval_triples")),
            memory=6,
            hours=0.3,
        ),
        train=[],
        # which NLI-DeBERTa: not stated; our choice, because it is the largest of its kind
        evaluate=flags(
            "--pairs lpm24 --invalid_pairs drop --too_long empty --text_tokenizer allenai/scibert_scivocab_uncased "
            "--nli_model cross-encoder/nli-deberta-v3-large"
        ),
    )
    # the embedded default's own settings, but the loss
    triples = flags("python scripts/make_triples.py --recipe recipes/demo_triples.yaml")
    ours = yaml.safe_load((RECIPES / "demo.yaml").read_text(encoding="utf-8"))
    ours = [f"--{key}={value}" for key, value in ours.items() if key not in ("loss", "model")]
    ours.append("--eval_triples=runs/demo/eval_triples.parquet")
    held_out = [*triples, *flags("--split validation --fraction 1 --output runs/demo/eval_triples.parquet")]
    demo = Scale(
        systems="recipes/systems_demo.yaml",
        folder="runs/paper_demo",
        base="runs/demo/models/base",
        fuse=[],
        triples=Stage("triples", "runs/demo/triples.parquet", triples, ["stand-ins"], hours=0.02),
        eval_triples=Stage("eval triples", "runs/demo/eval_triples.parquet", held_out, ["stand-ins"], hours=0.005),
        train=[*ours, *flags("--max_steps 100")],
        evaluate=flags("--pairs runs/demo/pairs.parquet --limit 100 --max_new_tokens 128 --n_bootstrap 200"),
    )
    tiny = demo._replace(
        triples=demo.triples._replace(command=[*triples, *flags("--fraction 0.5 --max_new_tokens 16")], hours=0),
        eval_triples=demo.eval_triples._replace(command=[*held_out, *flags("--max_new_tokens 16")], hours=0),
        train=[*ours, *flags("--max_steps 1")],
        evaluate=flags(
            "--pairs runs/demo/pairs.parquet --limit 6 --max_new_tokens 4 --n_bootstrap 10 --n_shuffles 2 --no_fcd"
        ),
    )
    return {"paper": paper, "demo": demo, "tiny": tiny}


def systems(scale: Scale) -> dict[str, System]:
    """The tables' rows that a scale has, in their order."""
    file = RECIPES.parent / scale.systems
    known = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {row: read_system(row, file) for row in ROWS if row in known}


def left_out(name: str, trust_remote_code: bool) -> list[str]:
    """The tables' rows that the plan has not, and why, in words."""
    return [
        f"{ROWS[row]} ({row}), which runs code that comes with its weights; --trust_remote_code adds it"
        for row, system in systems(scales()[name]).items()
        if system.trust_remote_code and not trust_remote_code
    ]


def plan(name: str, only: list[str] | None = None, trust_remote_code: bool = False) -> list[Stage]:
    """The stages of scale `name` in an order in which they can run; of the rows `only`, and Meditron, the baseline."""
    scale = scales()[name]
    rows = {row: system for row, system in systems(scale).items() if trust_remote_code or not system.trust_remote_code}
    rows = {row: system for row, system in rows.items() if not only or row in only or row == "meditron"}
    folder, full = scale.folder, name == "paper"
    stages, first = [scale.triples, scale.eval_triples], [] if full else ["stand-ins"]
    if not full:
        command = ["python", "-m", "lmolt.demo.build"] + ["--scale", "tiny"] * (name == "tiny")
        stages.insert(0, Stage("stand-ins", "runs/demo/models/finished", command, hours=0.04))

    # --- fusion
    meditron = rows["meditron"].models
    for method, recipe in FUSED.items():
        if not any(row.startswith(method) for row in rows):
            continue
        command = ["python", "scripts/merge.py", "--recipe", recipe, "--models", meditron[CAP2MOL], meditron[MOL2CAP]]
        command += ["--base", scale.base] if method == "ties" else []
        command += [*scale.fuse, "--output", f"{folder}/{method}"]
        stages.append(Stage(method, f"{folder}/{method}/config.json", command, first, 0, 0.2 if full else 0.002))

    # --- training, each row from its start; evaluation of every row
    for row, system in rows.items():
        needs = first
        if system.recipe:
            loss = yaml.safe_load((RECIPES.parent / system.recipe).read_text(encoding="utf-8"))["loss"]
            command = ["python", "scripts/train_pref.py", "--recipe", system.recipe, "--resume_from_checkpoint", "true"]
            if scale.train:
                command += [*scale.train, "--model", system.models[CAP2MOL], "--output_dir", system.adapters[CAP2MOL]]
            needs = ["triples", "eval triples", *(method for method in FUSED if row.startswith(method))]
            memory, hours = (TRAIN_MEMORY, train_hours(loss)) if full else (0, 0.01)
            leaves = f"{folder}/{row}/adapter_model.safetensors"
            stages.append(Stage(row, leaves, command, needs, memory, hours))
            needs = [row]
        output = f"{folder}/evaluation/{row}"
        command = ["python", "scripts/evaluate.py", "--system", row, "--name", ROWS[row], *scale.evaluate]
        command += ["--systems", scale.systems] * (not full) + ["--trust_remote_code"] * system.trust_remote_code
        memory, hours = (2 * system.parameters / 1e9 + 4, 0.5) if full else (0, 0.003)  # GB of keys and values: 4
        command += ["--output", output]
        stages.append(Stage(f"evaluate {row}", f"{output}/metrics.json", command, needs, memory, hours))

    # --- Tables 1 to 4; the differences that Tables 3 and 4 print, of a fused row against the same loss without fusion
    for row in ("dpo", "dpo_kto_pair", "cpo"):
        fused = [f"{method}_{row}" for method in FUSED if f"{method}_{row}" in rows]
        if row in rows and fused:
            folders = [f"{folder}/evaluation/{one}" for one in (row, *fused)]
            command = ["python", "scripts/evaluate.py", "--compare", *folders, "--baseline", ROWS[row]]
            command += ["--output", f"{folder}/report_{row}"]
            needs = [f"evaluate {one}" for one in (row, *fused)]
            leaves = f"{folder}/report_{row}/report.html"
            stages.append(Stage(f"fusion and {row}", leaves, command, needs, 0, 0.02 if full else 0.002))
    command = ["python", "scripts/evaluate.py", "--compare", *(f"{folder}/evaluation/{row}" for row in rows)]
    command += ["--baseline", ROWS["meditron"], "--output", f"{folder}/report"]
    needs = [f"evaluate {row}" for row in rows]
    return [*stages, Stage("tables", f"{folder}/report/report.html", command, needs, 0, 0.02)]


def shown(stages: list[Stage]) -> str:
    """The plan as a table."""
    rows = [("stage", "", "GPU GB", "hours", "needs")]
    for stage in stages:
        state = "done" if Path(stage.leaves).exists() else ""
        needs = f"{len(stage.needs)} stages" if len(stage.needs) > 3 else ", ".join(stage.needs)
        rows.append((stage.name, state, f"{stage.memory:.0f}" if stage.memory else "-", f"{stage.hours:.2g}", needs))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left = sum(stage.hours for stage in stages if not Path(stage.leaves).exists())
    return "\n".join(lines) + f"\nestimated, one stage after the other: {left:.2g} hours left"


def run(stages: list[Stage]) -> list[str]:
    """Run what is left, in order; the names of the stages that failed, or that wait for one that did."""
    names, failed = {stage.name: stage for stage in stages}, []
    for number, stage in enumerate(stages, 1):
        print(f"== {number}/{len(stages)} {stage.name}", end="", flush=True)
        if Path(stage.leaves).exists():
            print(f": done ({stage.leaves})")
        elif missing := [need for need in stage.needs if not Path(names[need].leaves).exists()]:
            print(f": waits for {', '.join(missing)}")
            failed.append(stage.name)
        else:
            print(f"\n   {shlex.join(stage.command)}", flush=True)
            if subprocess.run([sys.executable, *stage.command[1:]], check=False).returncode:
                failed.append(stage.name)
    return failed


def main(argv: list[str]) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("paper", "demo", "tiny"), default="paper", help="tiny: for tests")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW", help=f"only some of {', '.join(ROWS)}")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and its commands; run nothing")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="with ChemLLM, whose tokenizer is its own code"
    )
    args = parser.parse_args(argv)
    if not Path("scripts/evaluate.py").is_file():
        parser.error("run this in the project's folder, where scripts/ is")
    stages = plan(args.scale, args.rows, args.trust_remote_code)
    print(shown(stages))
    for line in left_out(args.scale, args.trust_remote_code):
        print(f"left out: {line}")
    if args.dry_run:
        for stage in stages:
            print(f"\n# {stage.name}: {stage.leaves}\n{shlex.join(stage.command)}")
        return
    if args.scale == "paper":
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: there is no GPU here; --dry_run prints the commands, --scale demo runs on two CPU cores")
    if failed := run(stages):
        sys.exit(f"error: not done: {', '.join(failed)}; what is done stays, and the same command goes on")
    print(f"Tables 1 to 4: {Path(stages[-1].leaves).with_name('report.md')}")


def command() -> None:
    run_main(main, kept="what is done stays, and the same command goes on")


if __name__ == "__main__":
    command()
