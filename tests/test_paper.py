"""The plan of the paper's tables: complete, in order, of commands that the scripts take; and it runs."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import load_script

from lmolt.generation.systems import SYSTEMS

ROOT = Path(__file__).resolve().parents[1]
TRAINED = {"sft", "dpo", "dpo_kto_pair", "cpo", "kto"} | {
    f"{method}_{loss}" for method in ("ties", "slerp") for loss in ("dpo", "dpo_kto_pair", "cpo")
}


paper = load_script("paper")
plan, ROWS = paper.plan, paper.ROWS


@pytest.mark.parametrize(("scale", "rows"), [("paper", 17), ("demo", 13), ("tiny", 13)])
def test_the_plan_is_complete_and_in_order(scale, rows):
    stages = plan(scale, trust_remote_code=True)
    seen = []
    for stage in stages:
        assert set(stage.needs) <= set(seen), stage.name
        seen.append(stage.name)
    assert len(set(seen)) == len(seen) == 2 + (scale != "paper") + 2 + rows + len(TRAINED) + 3 + 1
    assert set(seen) >= TRAINED and stages[-1].name == "tables" and len(stages[-1].needs) == rows
    assert len({stage.leaves for stage in stages}) == len(stages)


def test_every_trained_row_has_a_recipe_and_every_recipe_a_row():
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes" / "paper").glob("*.yaml")}
    assert set(recipes) == TRAINED
    for name, recipe in recipes.items():
        assert name.removeprefix("ties_").removeprefix("slerp_") == recipe["loss"].replace("kto_pair", "dpo_kto_pair")
        text = (ROOT / "recipes" / "paper" / f"{name}.yaml").read_text()
        assert all(" # " in line for line in text.splitlines() if not line.startswith("#")), "each value has its place"
    assert set(yaml.safe_load(SYSTEMS.read_text())) - set(ROWS) == {
        *(f"molt5_{size}_chebi20" for size in ("small", "base", "large")),
        *("txtchem_t5_augm", "txtchem_t5_translate"),  # other ways to ask a baseline: in no table
    }


def test_remote_code_and_rows_are_asked_for():
    names = lambda *args: {stage.name for stage in plan("paper", *args)}
    assert "evaluate chem_llm" not in names() and "evaluate chem_llm" in names(None, True)
    assert names(["slerp_cpo"]) == {
        "triples",
        "eval triples",
        "slerp",
        "evaluate meditron",
        "slerp_cpo",
        "evaluate slerp_cpo",
        "tables",
    }


@pytest.mark.parametrize("scale", ["paper", "demo"])
def test_the_scripts_take_every_command(scale):
    from transformers import HfArgumentParser

    from lmolt.recipes import apply_recipe
    from lmolt.training.trainer import PreferenceArguments

    parse = {name: load_script(name).parse_arguments for name in ("make_triples", "evaluate")}
    merge = load_script("merge")
    for stage in plan(scale, trust_remote_code=True):
        script, argv = Path(stage.command[1]).stem, stage.command[2:]
        if script == "train_pref":
            parser = HfArgumentParser(PreferenceArguments)
            parser.add_argument("--recipe")
            apply_recipe(parser, [word.replace("recipes/", f"{ROOT}/recipes/") for word in argv])
            args = parser.parse_args(argv)
            assert args.output_dir == str(Path(stage.leaves).parent)
            assert (
                args.triples == next(s.leaves for s in plan(scale) if s.name == "triples") and args.loss in stage.name
            )
            fused = args.model.rpartition("/")[2]
            assert (fused if fused in ("ties", "slerp") else "eval triples") == stage.needs[-1]
            assert args.eval_triples == next(s.leaves for s in plan(scale) if s.name == "eval triples")
        elif script == "merge":
            parser = merge.build_parser()
            apply_recipe(parser, [word.replace("recipes/", f"{ROOT}/recipes/") for word in argv])
            args = parser.parse_args(argv)
            assert (args.method, args.weights, len(args.models)) == (stage.name, [0.95, 0.05], 2)
        elif script in parse:
            parse[script](argv)
        assert shlex.split(shlex.join(stage.command)) == stage.command


def test_dry_run_prints_the_plan_and_runs_nothing():
    command = [sys.executable, "scripts/paper.py", "--dry_run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "left out: ChemLLM (chem_llm), which runs code that comes with its weights" in done.stdout
    assert "hours left" in done.stdout and "slerp_cpo" in done.stdout
    assert "python scripts/train_pref.py --recipe recipes/paper/cpo.yaml --resume_from_checkpoint true\n" in done.stdout
    away = subprocess.run([command[0], ROOT / command[1]], cwd="/", capture_output=True, text=True)
    assert away.returncode == 2 and "in the project's folder" in away.stderr


@pytest.mark.slow
def test_a_row_from_nothing_to_the_tables(tmp_path):
    """In a copy of the project, the smallest embedded default; a second run does nothing again."""
    for name in ("lmolt", "scripts", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "scripts/paper.py", "--scale", "tiny", "--rows", "ties_dpo_kto_pair"]
    run = lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first = run()
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    for number, name in enumerate(("mol2cap", "cap2mol"), 1):
        assert "TIES + DPO (as run)" in (tmp_path / f"runs/paper_demo/report/table{number}_{name}.csv").read_text()
    assert run().stdout.count(": done (") == 8
    (tmp_path / "runs/paper_demo/evaluation/meditron/metrics.json").unlink()
    (tmp_path / "runs/paper_demo/report/report.html").unlink()
    shutil.rmtree(tmp_path / "runs/demo/models/mol2cap")
    broken = run()
    assert broken.returncode == 1 and "error: not done: evaluate meditron, tables;" in broken.stderr
    assert "tables: waits for evaluate meditron" in broken.stdout
