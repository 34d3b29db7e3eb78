"""Recipes and flags: a recipe sets defaults, flags win, and what a flag wouldn't take is named with file and key."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmolt.recipes import Parser, apply_recipe
from lmolt.training.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]


def parse(argv):
    parser = Parser()
    parser.add_argument("--recipe")
    parser.add_argument("--learning_rate", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", required=True)
    parser.add_argument("--names", nargs="+")
    parser.add_argument("--loud", action="store_true")
    parser.add_argument("--how", choices=("this", "that"))
    parser.add_argument("--folder", type=Path)
    for name in ("trust_remote_code", "hub_model_id", "hub_token", "push_to_hub", "overwrite_output_dir"):
        parser.add_argument(f"--{name}")
    apply_recipe(parser, argv)
    return parser.parse_args(argv)


def test_recipe_then_flags(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 5e-5\nmodel: a\nnames: [x, y]\nloud: true\nhow: that\nfolder: f\nseed: 3\n")
    args = parse(["--recipe", str(recipe)])
    assert (args.learning_rate, args.model, args.names, args.loud) == (5e-5, "a", ["x", "y"], True)
    assert (args.how, args.folder, args.seed) == ("that", Path("f"), 3)
    assert parse([f"--recipe={recipe}", "--learning_rate", "0.1"]).learning_rate == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("- 1", "a recipe is a mapping .*not a list"),
        ("just words", "a recipe is a mapping .*not a str"),
        ("1: 2", "unknown key 1"),
        ("learning_rate: fast", "learning_rate is 'fast'; it is a number"),
        ("learning_rate: true", "learning_rate is True; it is a number"),
        ("learning_rate: .nan", "learning_rate is nan; it is a number"),
        ("learning_rate: [1, 2]", "learning_rate is a list, and the flag takes one value"),
        ("learning_rate: {a: 1}", "learning_rate is a mapping, and the flag takes one value"),
        ("learning_rate:", "learning_rate has no value; leave the key out"),
        ("seed: 1.5", "seed is 1.5; it is a whole number"),
        ("seed: 2024-01-01", r"seed is datetime.date\(2024, 1, 1\)"),
        ("seed: 2024-13-41", "month must be in 1..12"),
        ("model: 7", "model is 7, which YAML takes for a int; quote it"),
        ("model: no", "model is False, which YAML takes for a bool; quote it"),
        ("names: []", "names is an empty list"),
        ("names: [a, 1]", "names is 1, which YAML takes for a int"),
        ("loud: maybe", "loud is 'maybe'; it is true or false"),
        ("how: other", "how is 'other'; use one of this, that"),
        ("model: a\nmodel: b", "line 2: .*key 'model' appears twice"),
        ("model: &x a\nhow: *x", "line 1: an alias or anchor"),
        ("names: " + "[" * 50 + "]" * 50, "line 1: deep nesting"),
        ("names: " + "[" * 90_000, "line 1: deep nesting"),
        ("model: !!python/object/apply:os.system [ls]", "line 1: not a YAML mapping"),
        ("model: a\n---\nmodel: b", "line 2: not a YAML mapping"),
        ("model: [1", "not a YAML mapping"),
        ("model: \x01", "not a YAML mapping"),
        ("recipe: other.yaml", "recipe is not for a recipe"),
        ("trust_remote_code: true", "trust_remote_code is not for a recipe; give --trust_remote_code on the command"),
        ("overwrite_output_dir: true", "overwrite_output_dir is not for a recipe"),
        ("push_to_hub: true", "push_to_hub is not for a recipe"),
        ("hub_model_id: a/b", "hub_model_id is not for a recipe"),
        ("hub_token: hf_x", "hub_token is not for a recipe"),
        ("#" * 200_000, "200000 bytes are no recipe"),
    ],
    ids=lambda text: text[:30],
)
def test_mistakes(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        parse(["--recipe", str(tmp_path / "r.yaml")])
    assert str(tmp_path / "r.yaml") in str(raised.value) and len(str(raised.value)) < 600


def test_a_recipe_that_is_not_there_or_not_utf_8(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse(["--recipe", str(tmp_path / "none.yaml")])
    (tmp_path / "r.yaml").write_bytes("model: caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"r\.yaml"):
        parse(["--recipe", str(tmp_path / "r.yaml")])


def test_all_recipes_are_taken_by_their_scripts(monkeypatch):
    for recipe in [*(ROOT / "recipes" / "paper").glob("*.yaml"), ROOT / "recipes" / "demo.yaml"]:
        assert apply_recipe(build_parser(""), ["--recipe", str(recipe)])["loss"]


# --- flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "a", "--learning_rat", "1"], "unknown flag --learning_rat; did you mean '--learning_rate'"),
        (["--model", "a", "--learn", "1"], "unknown flag --learn"),
        (["--model", "a", "b"], "unknown arguments: b"),
        (["--model", "a", "--seed", "x"], "argument --seed: invalid int value: 'x'; --help lists the flags"),
        ([], "the following arguments are required: --model"),
    ],
)
def test_flags_are_strict(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: at least 1"),
        (["--temperature", "-0.5"], "--temperature -0.5: at least 0"),
        (["--seed", "-1"], "--seed -1: at least 0"),
        (["--temperature", "nan"], "--temperature nan: give a finite number"),
        (["--weights", "0.5", "inf"], "--weights inf: give a finite number"),
    ],
)
def test_numbers_are_finite_and_not_too_small(argv, message):
    parser = Parser()
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--weights", type=float, nargs="+")
    parser.parse_args(["--max_new_tokens", "1", "--temperature", "0", "--weights", "-1", "0"])
    with pytest.raises(ValueError, match=re.escape(message)):
        parser.parse_args(argv)


def test_a_flag_given_twice_is_said(caplog):
    assert parse(["--seed", "1", "--model", "a", "--seed=1"]).seed == 1 and not caplog.text
    assert parse(["--names", "a", "b", "--model", "a", "--names=c"]).names == ["c"]
    assert "--names a b and --names c were both given: the last counts" in caplog.text


@pytest.mark.parametrize("script", ["make_triples", "train_pref", "merge", "evaluate", "translate", "paper"])
def test_no_script_takes_abbreviations(script):
    done = subprocess.run([sys.executable, ROOT / "scripts" / f"{script}.py", "--hel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and "usage:" not in done.stderr
