"""Fuse models of one architecture (SLERP, TIES, DARE-TIES, linear), or fold an adapter into its base, streamed.

    python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O
    python scripts/merge.py --method ties --base BASE --models A B --weights 0.95 0.05 --density 0.5 --output O
    python scripts/merge.py --method linear --models A B C --weights 1 1 2 --output O
    python scripts/merge.py --recipe recipes/merge/slerp_19to1.yaml --models A B --output O
    python scripts/merge.py --adapter ADAPTER --output O

A, B, BASE: folders or Hub ids of safetensors models. Config and tokenizer are the first model's. Memory does not grow
with the models. Beside the weights: merge.json (what the merge made of the weights that were asked for, checksums,
versions, arguments) and a model card. A killed merge goes on with --resume; nothing appears at O before it is whole.
"""

import argparse
import json
import re
import sys
from datetime import date
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # `scripts/` first would shadow `evaluate` and hide `lmolt`

from lmolt.recipes import apply_recipe


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", help="YAML file of defaults for these flags")
    add("--method", choices=("slerp", "ties", "dare_ties", "linear"))
    add("--models", nargs="+", metavar="MODEL", help="folders or Hub ids")
    add("--base", help="ties, dare_ties: what the models were trained from")
    add("--weights", nargs="+", type=float, metavar="W", help="one a model, in order (default: equal)")
    add("--t", type=float, help="slerp: the way from the first model to the second, 0 to 1 (= the second's weight)")
    add(
        "--weights_for",
        action="append",
        default=[],
        metavar="PATTERN=W,W",
        help="other weights where the regular expression is found in a tensor's name; the last that fits decides",
    )
    add("--density", nargs="+", type=float, default=[0.5], help="share of each delta that stays: one, or one a model")
    add("--normalize", action=argparse.BooleanOptionalAction, default=True, help="divide by the sum of weights")
    add("--no_normalize", dest="normalize", action="store_false", help=argparse.SUPPRESS)
    add("--lambda", dest="scale", type=float, default=1.0, help="ties: factor of the merged delta")
    add("--seed", type=int, default=0, help="dare_ties: of the random mask")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of the output (default: the inputs')")
    add("--rounding", choices=("once", "mergekit"), default="once", help="mergekit: to the type after every step")
    add("--adapter", help="a LoRA adapter's folder or Hub id, folded into --models (default: the base that it names)")
    add("--fold_base", choices=("original", "dequantised"), help="of a QLoRA adapter: exact weights, or what it saw")
    add("--revision", help="of Hub ids: a branch, tag or commit")
    add("--output", required=True, type=Path)
    add("--overwrite", action="store_true", help="replace --output once the new one is whole")
    add("--resume", action="store_true", help="go on with a merge that was killed")
    add("--verify", action="store_true", help="recompute a sample of tensors by the plain formula and compare")
    add("--plot", action="store_true", help="merge.png: effective weights and cosines by layer")
    apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    if bool(args.method) == bool(args.adapter):
        raise ValueError("give either --method, to fuse models, or --adapter, to fold one")
    if args.method and not args.models:
        raise ValueError("--models is empty: give the folders or Hub ids of the models to fuse")
    return args


def locate(name: str, revision: str | None) -> Path:
    """The folder of a model; a Hub id is downloaded (weights in safetensors, config, tokenizer)."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the Hub: {reason}") from error


def read_weights(args: argparse.Namespace) -> tuple[list[float], dict[str, list[float]]]:
    """Weights of the models, and of the patterns."""
    count = len(args.models)
    if args.t is not None:
        if args.method != "slerp" or args.weights:
            raise ValueError("--t is SLERP's, in place of --weights 1-t t; give one of the two")
        if not 0 <= args.t <= 1:
            raise ValueError(f"--t must lie in [0, 1], not {args.t}")
        args.weights = [1 - args.t, args.t]
    weights_for = {}
    for text in args.weights_for:
        pattern, _, values = text.rpartition("=")
        try:
            weights_for[pattern] = [float(value) for value in values.split(",")]
            re.compile(pattern)
        except (ValueError, re.error) as error:
            raise ValueError(f"--weights_for {text!r}: not PATTERN=W,W ({error})") from error
    return args.weights or [1 / count] * count, weights_for


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)

    from lmolt import merging
    from lmolt.checkpoints import NAMES, Checkpoint, OutputFolder, hash_inputs

    # --- headers: whatever is wrong is found here, before a byte is written
    if args.output.exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists; choose another --output, or --overwrite")
    weights, weights_for = read_weights(args)
    models = [Checkpoint(locate(name, args.revision)) for name in args.models]
    base = Checkpoint(locate(args.base, args.revision)) if args.base else None
    density = args.density * len(models) if len(args.density) == 1 else args.density
    recipe = merging.Recipe(
        args.method, weights, density, args.normalize, args.scale, args.rounding, args.seed, weights_for
    )
    merging.check_recipe(recipe, models, base)
    sources = [*models, base] if base else models
    dtype = merging.check_checkpoints(sources, NAMES.get(args.dtype))

    # --- checksums of the inputs, NaN and infinity
    inputs = [hash_inputs(source) for source in sources]
    plan = {"recipe": vars(recipe), "dtype": dtype, "inputs": inputs}

    # --- merge
    layout = {file: [(entry.name, entry.shape) for entry in entries] for file, entries in models[0].files.items()}
    output = OutputFolder(args.output, layout, dtype, plan, args.resume)
    produce = lambda name, write: merging.merge_tensor(name, models, base, recipe, dtype, write)
    records, digests = output.write_tensors(produce)
    output.finish(models[0])
    print(f"wrote {args.output}: {len(records)} tensors, {date.today()}")
    json.dumps(digests)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; go on with the same command and --resume", file=sys.stderr)
        sys.exit(130)
