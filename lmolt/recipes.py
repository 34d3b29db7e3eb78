"""Recipes: a YAML file sets a script's defaults, its flags win, and a key that no flag has is an error."""

import argparse
import difflib
import sys
from pathlib import Path

import yaml

from lmolt.files import shipped


def apply_recipe(parser: argparse.ArgumentParser, argv: list[str] | None = None, default: Path | None = None) -> None:
    """Set `parser`'s defaults from the file after `--recipe` in `argv` (or from `default`, where there is none).

    `ValueError` on a key without a flag, naming the nearest one; `FileNotFoundError` where there is no such file.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe", type=Path, default=default)
    path = finder.parse_known_args(sys.argv[1:] if argv is None else argv)[0].recipe
    if path is None:
        return
    path = shipped(path)
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping `key: value`, not a {type(values).__name__}")
    known = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        # argparse converts a default only if it is a string: YAML 1.1 reads 5e-5 as one, and true as a bool
        known[key].required = False
        parser.set_defaults(**{key: value})
