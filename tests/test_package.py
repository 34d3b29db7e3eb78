"""The package as others install it: built, put elsewhere, used from another folder; nothing is written into it."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

from lmolt.files import write_table

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as site-packages: the built wheel and nothing else."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("lmolt", "scripts", "recipes", "metrics"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", source, source], check=True)
    (wheel,) = source.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel], check=True)
    return site


@pytest.fixture
def run(installed, tmp_path):
    """run(COMMAND...): elsewhere, with the installed package first; its output."""
    paths = {"PYTHONPATH": str(installed), "PATH": f"{installed / 'bin'}:{os.environ['PATH']}"}
    files = lambda: sorted(path for path in installed.rglob("*"))

    def run(*command):
        environment = os.environ | paths | {"PYTHONDONTWRITEBYTECODE": "1"}
        before = files()
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert files() == before, "written into site-packages"
        return done.stdout

    return run


def test_every_folder_of_the_package_is_packaged():
    packages = PROJECT["tool"]["setuptools"]["packages"]
    folders = {f"lmolt.{path.parent.name}" for path in (ROOT / "lmolt").glob("*/__init__.py")}
    assert folders | {"lmolt", "lmolt.commands", "lmolt.shipped.metrics", "lmolt.shipped.recipes"} == set(packages)


def test_the_lock_pins_what_the_package_asks_for_and_extras_bring_no_more():
    """requirements.txt, beside requirements-test.txt, has what [all] asks for, but for what others bring."""
    name = lambda line: line.split(";")[0].split("=")[0].split(">")[0].strip().lower().replace("_", "-")
    pinned = lambda file: {name(line) for line in (ROOT / file).read_text().splitlines() if "==" in line}
    extras = {key: {name(line) for line in lines} for key, lines in PROJECT["project"]["optional-dependencies"].items()}
    wanted = {name(line) for line in PROJECT["project"]["dependencies"]} | extras["train"] | extras["deepspeed"]
    brought = {"huggingface-hub", "numpy", "pyarrow", "pyyaml", "tqdm"}
    assert wanted | extras["metrics"] == pinned("requirements.txt") | brought
    assert extras["test"] - {"lmolt[all]"} == pinned("requirements-test.txt")
    assert not extras["metrics"] & {"deepspeed", "bitsandbytes", "pytest", "ruff"}


def test_what_comes_with_the_package_is_found(run, installed, tmp_path):
    (tmp_path / "pairs.csv").write_text("molecule,caption\nCCO,It is ethanol.\n")
    code = f"""
import lmolt, lmolt.files, evaluate
from lmolt.data.pairs import read_pairs
from lmolt.generation.systems import read_system
assert lmolt.__file__.startswith({str(installed)!r})
assert read_system("molt5_small").architecture == "t5" and read_system("molt5", "recipes/systems_demo.yaml")
assert read_pairs("pairs.csv")[0]["molecule"] == "CCO"
try:
    read_pairs("demo")
except FileNotFoundError as error:
    print(error)
captions = evaluate.load(str(lmolt.files.SHIPPED / "metrics" / "captions"))
print(captions.compute(predictions=["It is an acid."], references=["It is an amine."])["rouge1"])
"""
    assert run(sys.executable, "-c", code).split("\n")[:2] == [
        "runs/demo/pairs.parquet: not made yet; python -m lmolt.demo.build makes it here",
        "0.75",
    ]


def test_commands_run_from_anywhere(run, tiny_policy, tmp_path):
    outputs = {"source": "It is ethanol.", "reference": "CCO", "prediction": "CCN"}
    write_table([outputs | {"id": str(i), "direction": "cap2mol"} for i in range(3)], tmp_path / "outputs.jsonl")
    report = ["--predictions", "outputs.jsonl", "--direction", "cap2mol", "--no_fcd", "--n_bootstrap", "10"]
    assert "report: report/report.html" in run("lmolt-evaluate", *report, "--output", "report")
    recipe = ["--recipe", "recipes/merge/slerp_19_1.yaml", "--models", tiny_policy, tiny_policy]
    assert f"wrote {tmp_path / 'fused'}" in run("lmolt-merge", *recipe, "--output", "fused")
    model = ["--directions", "cap2mol", "--cap2mol_model", "fused", "--max_new_tokens", "4"]
    (tmp_path / "pairs.csv").write_text("molecule,caption\nCCO,It is ethanol.\nCCN,It is ethylamine.\n")
    run("lmolt-triples", "--pairs", "pairs.csv", "--fraction", "1", *model, "--output", "triples.jsonl")
    assert len((tmp_path / "triples.jsonl").read_text().splitlines()) == 2
    assert "--valid_only" in run("lmolt-translate", "--help")
    assert "--beta" in run("accelerate", "launch", "--quiet", "-m", "lmolt.commands.train_pref", "--help")
