"""A recipe sets defaults, flags win, an unknown key is an error."""

import argparse

import pytest

from lmolt.recipes import apply_recipe


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe")
    parser.add_argument("--learning_rate", type=float, default=1.0)
    parser.add_argument("--model", required=True)
    apply_recipe(parser, argv)
    return parser.parse_args(argv)


def test_recipe_then_flags(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("learning_rate: 5e-5\nmodel: a\n")
    assert parse(["--recipe", str(recipe)]).learning_rate == 5e-5
    assert parse([f"--recipe={recipe}", "--learning_rate", "0.1"]).learning_rate == 0.1
    assert parse(["--recipe", str(recipe)]).model == "a"


@pytest.mark.parametrize(
    ("text", "message"), [("learning_rat: 1", "did you mean 'learning_rate'"), ("- 1", "not a list")]
)
def test_mistakes(text, message, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(["--recipe", str(tmp_path / "r.yaml")])
    with pytest.raises(FileNotFoundError, match="none.yaml: there is no such file"):
        parse(["--recipe", str(tmp_path / "none.yaml")])
