"""Flags and recipes: a YAML file sets a script's defaults, its flags win, and what no flag takes is an error."""

import argparse
import difflib
import itertools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from lmolt.files import read_text, shipped

logger = logging.getLogger(__name__)
# What runs code, deletes, uploads or names a secret is asked for by whoever types the command, never by a file.
COMMAND_LINE_ONLY = ("trust_remote_code", "overwrite_output_dir", "push_to_hub", "resume_from_checkpoint", "recipe")
COMMAND_LINE_ONLY += ("help", "help_all", "overwrite")
MAX_BYTES, MAX_DEPTH = 100_000, 8
LEAST = dict.fromkeys(("n_shuffles", "no_repeat_ngram_size", "delta_threshold", "chrf_threshold"), 0)
LEAST |= dict.fromkeys(("temperature", "seed"), 0)
LEAST |= dict.fromkeys(("max_new_tokens", "num_beams", "num_candidates", "num_rejected", "tokens_per_batch"), 1)
LEAST |= dict.fromkeys(("limit", "n_bootstrap", "port"), 1)


class Parser(argparse.ArgumentParser):
    """argparse's, strict: no abbreviations, the nearest flag named, a mistake is a `ValueError` of one line."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, which takes the last of a flag's values; where they differ, a warning says so."""
        args = list(sys.argv[1:] if args is None else args)
        starts = [i for i, text in enumerate(args) if text.startswith("--")] + [len(args)]
        given: dict[str, list[str]] = {}
        for start, stop in itertools.pairwise(starts):
            words = [*args[start].split("=", 1), *args[start + 1 : stop]]
            if (action := self._option_string_actions.get(words[0])) is None:
                continue
            if (known := given.get(action.dest, words)) != words and os.environ.get("RANK", "0") == "0":
                logger.warning("%s and %s were both given: the last counts", " ".join(known), " ".join(words))
            given[action.dest] = words
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        unknown = [text for text in args if text.startswith("--") and text[2:] and text.split("=")[0] not in known]
        found, unknown = (None, unknown) if unknown else self.parse_known_args(args, namespace)
        if unknown:
            raise ValueError(describe_unknown(unknown, self._option_string_actions))
        self._check_numbers(found)
        return found

    def _check_numbers(self, found: argparse.Namespace) -> None:
        """`ValueError` on a number that is not finite, or under the least that its flag takes."""
        for name, value in vars(found).items():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, float) and not math.isfinite(one):
                    raise ValueError(f"--{name} {one}: give a finite number")
                if isinstance(one, int | float) and name in LEAST and one < LEAST[name]:
                    raise ValueError(f"--{name} {one}: at least {LEAST[name]}")

    def error(self, message: str):
        raise ValueError(f"{message}; --help lists the flags")


def describe_unknown(unknown: list[str], known: Iterable[str]) -> str:
    """Words for arguments that a parser doesn't have, each flag with the nearest that it has."""
    flags = [argument.split("=")[0] for argument in unknown if argument.startswith("--")]
    if not flags:
        return f"unknown arguments: {' '.join(unknown)} (a flag that takes several values has them behind it once)"
    return "; ".join(f"unknown flag {flag}{_nearest(flag, known)}" for flag in flags)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def apply_recipe(
    parser: argparse.ArgumentParser, argv: list[str] | None = None, default: Path | None = None
) -> dict[str, Any]:
    """Set `parser`'s defaults from the file after `--recipe` in `argv` (or from `default`, where there is none).

    What was set. `ValueError` on a key without a flag, naming the nearest one, a value that the flag doesn't take, or
    a key that only the command line may set; `FileNotFoundError` where there is no such file.
    """
    finder = Parser(add_help=False)
    finder.add_argument("--recipe", type=Path, default=default)
    path = finder.parse_known_args(sys.argv[1:] if argv is None else argv)[0].recipe
    if path is None:
        return {}
    path = shipped(path)
    values = read_recipe(path)
    known = {action.dest: action for action in parser._actions}
    for key, value in values.items():
        if not isinstance(key, str) or key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
        if key in COMMAND_LINE_ONLY or key.startswith("hub_") or key.endswith("token"):
            raise ValueError(f"{path}: {key} is not for a recipe; give --{key} on the command line, if you mean it")
        values[key] = _checked(known[key], value, f"{path}: {key}")
        known[key].required = False
    parser.set_defaults(**values)
    return values


def read_recipe(path: Path, anchors: bool = False) -> dict:
    """One YAML mapping of a file; `ValueError` names the file and the line of what is wrong in it.

    With `anchors`, entries may repeat others (`<<: *name`), but none that repeats some itself: no file grows by that.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; the ones that are included are in recipes/")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes are no recipe; it is a short YAML file")
    text = read_text(path)
    try:
        depth, within = 0, None  # `within`: the depth of the anchored entry that this is in
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is built from it
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            alias = isinstance(event, yaml.AliasEvent) and (not anchors or within is not None)
            anchor = getattr(event, "anchor", None) and not isinstance(event, yaml.AliasEvent)
            if within is not None and depth < within:
                within = None
            if anchor and isinstance(event, yaml.CollectionStartEvent) and within is None:
                within = depth
            if alias or (anchor and not anchors) or depth > MAX_DEPTH:
                line, what = event.start_mark.line + 1, "an alias or anchor" if depth <= MAX_DEPTH else "deep nesting"
                raise ValueError(f"{path} line {line}: {what}; a recipe is `key: value` lines")
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, at = getattr(error, "problem_mark", None), getattr(error, "position", None)
        line = f" line {mark.line + 1}" if mark else f" line {text.count(chr(10), 0, at) + 1}" if at is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{path}{line}: not a YAML mapping ({' '.join(str(problem).split())[:200]})") from None
    if values is None:
        raise ValueError(f"{path} line 1: it is empty; a recipe is `key: value` lines")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping `key: value`, not a {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which a key may stand once."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # of a date or a number that YAML takes for one
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen if isinstance(key_node.value, str) else False:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} appears twice", mark)
            seen.add(key_node.value if isinstance(key_node.value, str) else id(key_node))
        return super().construct_mapping(node, deep)


def _checked(action: argparse.Action, value: Any, where: str) -> Any:
    """`value` as the flag would give it; `ValueError` where the flag takes another kind."""
    if action.nargs in ("+", "*") or isinstance(action.nargs, int):
        values = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and action.nargs and len(values) != action.nargs:
            raise ValueError(f"{where} takes {action.nargs} values, and has {len(values)}")
        if not values and action.nargs != "*":
            raise ValueError(f"{where} is an empty list")
        return [_scalar(action, item, where) for item in values] if action.nargs != 0 else _boolean(value, where)
    if isinstance(value, list):
        raise ValueError(f"{where} is a list, and the flag takes one value")
    return _scalar(action, value, where)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {_short(value)}; it is true or false")
    return value


def _scalar(action: argparse.Action, value: Any, where: str) -> Any:
    kind = action.type
    if value is None:
        raise ValueError(f"{where} has no value; leave the key out")
    if isinstance(action, argparse.BooleanOptionalAction) or getattr(kind, "__name__", "") == "string_to_bool":
        return _boolean(value, where)
    if isinstance(value, dict) and kind not in (dict, None):
        raise ValueError(f"{where} is a mapping, and the flag takes one value")
    if kind is float:
        value = _number(float, value, where)
    elif kind is int:
        if isinstance(value, str) or _number(float, value, where) != int(value):
            raise ValueError(f"{where} is {_short(value)}; it is a whole number")
        value = int(value)
    elif kind is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_short(value)}; it is a mapping")
    elif not isinstance(value, str):
        raise ValueError(f"{where} is {_short(value)}, which YAML takes for a {type(value).__name__}; quote it")
    elif isinstance(kind, Callable):
        try:
            value = kind(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{where}: {error}") from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{where} is {_short(value)}; use one of {', '.join(map(str, action.choices))}")
    return value


def _number(kind: type, value: Any, where: str) -> float:
    # YAML 1.1 reads 5e-5 as a string
    try:
        number = kind(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {_short(value)}; it is a number")
    return number


def _short(value: Any) -> str:
    return repr(value)[:80]
