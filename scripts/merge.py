"""Fuse models of one architecture (TIES, SLERP, linear), or fold a LoRA adapter into its base.

    python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O
    python scripts/merge.py --method ties --models A B --base C --weights 0.95 0.05 --density 0.5 --output O
    python scripts/merge.py --recipe recipes/merge/slerp_19_1.yaml --models A B --output O
    python scripts/merge.py --models A --adapter X --output O
    python scripts/merge.py --verify O
    python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O --push_to_hub

A, B, C are folders with safetensors or Hub ids. Memory stays below 300 MB whatever the models' size.
Writes the model with config and tokenizer of the first, merge.json and README.md; --resume goes on after a kill.
"""

import os
import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from math import prod

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin while they wait: CPU time for nothing
from tqdm import tqdm

from lmolt import ownership
from lmolt.files import run_main, versions
from lmolt.merging import methods
from lmolt.merging.provenance import plot, summarise, summarise_fold, table, write_lineage
from lmolt.merging.safetensors_io import (
    NAMES,
    Checkpoint,
    OutputFolder,
    check_room,
    find_folder,
    inspect_file,
    partial_folder,
    replaced_folder,
)
from lmolt.recipes import Parser, apply_recipe

SAVED = ("method", "models", "revision", "weights", "t", "weights_for", "base", "density", "normalize", "lambda")
SAVED += ("rounding", "seed", "dtype", "adapter", "fold_base")  # what merge.json repeats; the rest doesn't change bytes


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", help="YAML file of defaults for these flags (recipes/merge/)")
    add("--method", choices=methods.METHODS)
    add("--models", nargs="+", metavar="MODEL", help="folders or Hub ids; config and tokenizer are the first's")
    add("--revision", help="of the Hub ids: a branch, tag or commit")
    add("--weights", nargs="+", type=float, help="one a model; with slerp, t = second / sum")
    add("--t", type=float, help="slerp: the way from the first model to the second, instead of --weights")
    add("--weights_for", nargs="+", metavar="PATTERN=W,W", help="other weights for tensors whose name matches")
    add("--base", help="ties: the model that all of --models were trained from")
    add("--density", nargs="+", type=float, default=[0.5], help="ties: share of each delta kept (default 0.5)")
    add(
        "--normalize",
        action="store_true",
        default=True,
        help="linear, ties: divide by the sum of (agreeing) weights (default)",
    )
    add("--no_normalize", dest="normalize", action="store_false")
    add("--lambda", type=float, default=1.0, help="ties: factor of the merged delta (default 1)")
    add(
        "--rounding", choices=["once", "mergekit"], default="once", help="mergekit: after every step, as mergekit 0.1.5"
    )
    add("--seed", type=int, default=0, help="of dare_ties' mask")
    add("--dtype", choices=NAMES, help="of the output; needed if the inputs differ")
    add("--adapter", help="folder or Hub id of a LoRA or QLoRA adapter to fold into the one of --models")
    add("--fold_base", choices=["original", "dequantised"], default="original", help="what the adapter is added to")
    add("--output", type=Path)
    add("--overwrite", action="store_true", help="replace an earlier merge at --output once the new one is whole")
    add("--resume", action="store_true", help="go on with a merge that was killed")
    add("--verify", nargs="?", const=True, metavar="FOLDER", help="check a merged folder (default: --output, after it)")
    add("--push_to_hub", action="store_true", help="upload the merged model with its card")
    add("--hub_model_id", metavar="OWNER/NAME", help="where to (default: your own, the name of --output)")
    add("--hub_private_repo", action="store_true", default=None, help="make that repository private")
    add("--plot", type=Path, metavar="FILE.png", help="effective weights and cosines by layer")
    return parser


def resolve(args: argparse.Namespace) -> tuple[list[Checkpoint], Checkpoint | None, methods.Recipe | None]:
    """The models, the base and how to merge them (None: fold), checked as far as headers and configs tell."""
    if not args.models:
        raise ValueError("--models names what to merge: folders or Hub ids")
    if not args.adapter and not args.method:
        raise ValueError(f"--method is one of {', '.join(methods.METHODS)} (or give --adapter to fold one)")
    if args.adapter and (len(args.models) != 1 or args.method or args.base):
        raise ValueError("--adapter is folded into one model: no --method, no --base; merge in a second run")
    models = [Checkpoint(find_folder(name, args.revision)) for name in args.models]
    base = Checkpoint(find_folder(args.base, args.revision)) if args.base else None
    if args.adapter:
        return models, base, None
    if args.t is not None and (args.weights or args.method != "slerp" or not 0 <= args.t <= 1):
        raise ValueError(f"--t (here {args.t}) is slerp's, within [0, 1], instead of --weights")
    args.weights = args.weights if args.t is None else [1 - args.t, args.t]
    if not args.weights:
        raise ValueError("--weights: give one weight a model, such as --weights 0.95 0.05")
    weights_for = {}
    for text in args.weights_for or []:
        pattern, _, numbers = text.rpartition("=")
        try:
            weights_for[pattern] = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise ValueError(f"--weights_for {text!r}: write PATTERN=W,W such as embed_tokens=1,0") from error
    density = args.density * len(models) if len(args.density) == 1 else args.density
    scale = vars(args)["lambda"]
    recipe = methods.Recipe(
        args.method, args.weights, density, args.normalize, scale, args.rounding, args.seed, weights_for
    )
    methods.check_recipe(recipe, models, base)
    return models, base, recipe


def check_output(args: argparse.Namespace, sources: list[Checkpoint]) -> None:
    """Lock --output; `ValueError` where it is or holds an input, or anything that merge.py didn't write."""
    if args.output is None:
        raise ValueError("--output names the folder to write")
    inputs = {f"model {i + 1}": source.folder for i, source in enumerate(sources)} | {"--adapter": args.adapter}
    ownership.check_inputs("--output", args.output, inputs)
    ownership.hold(args.output, beside=True)
    if args.output.exists() and any(args.output.iterdir()):
        if not args.overwrite:
            raise ValueError(f"{args.output} exists; --overwrite replaces it, or take another folder")
        ownership.check_deletable("--output", args.output)
        if not (args.output / "merge.json").is_file():
            raise ValueError(f"{args.output} holds no merge.json: not a merge, and not ours to overwrite; remove it")
    for folder in (args.output, partial_folder(args.output), replaced_folder(args.output)):
        ownership.check_free(folder, "merge", ["*"])


def check_files(sources: dict[str, Checkpoint]) -> dict[str, str]:
    """SHA-256 of the inputs' files by `model/file`, whose values are finite: one reading, two files at a time."""
    files = {f"{name}/{file}": entries for name, source in sources.items() for file, entries in source.files.items()}
    values = sum(entry.size for entries in files.values() for entry in entries)
    with tqdm(total=values, unit_scale=True, desc="check") as bar, ThreadPoolExecutor(2) as pool:
        digests = pool.map(lambda entries: inspect_file(entries, bar.update), files.values())
        return dict(zip(files, digests, strict=True))


def verify_folder(folder: Path) -> None:
    """Check what --output of an earlier merge holds, from its merge.json and the inputs that it names."""
    from lmolt.merging import verification

    lineage_file = folder / "merge.json"
    if not lineage_file.is_file():
        raise FileNotFoundError(f"{lineage_file}: there is no such file; --verify checks what merge.py wrote")
    lineage = json.loads(lineage_file.read_text())
    args = argparse.Namespace(**lineage["arguments"])
    models, base, recipe = resolve(args)
    if args.adapter:
        formula = verification.fold_by_peft(
            models[0], find_folder(args.adapter, args.revision), args.fold_base, Checkpoint(folder).dtype
        )
    else:
        formula = lambda name: verification.plain(recipe, name, models, base)
    shares = verification.verify(folder, lineage, formula)
    worst = f", at most {max(shares.values()):.4%} of a tensor's values off the formula" if shares else ""
    print(
        f"verified {folder}: SHA-256 of {len(lineage['outputs'])} files, {len(shares)} tensors worked out again{worst}"
    )


def main(argv: list[str]) -> None:
    parser = build_parser()
    apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    if isinstance(args.verify, str):
        return verify_folder(Path(args.verify))

    # --- what goes in, checked before a byte is written
    models, base, recipe = resolve(args)
    sources = [*models, base] if base else models
    if args.resume and (args.output / "merge.json").is_file():
        if args.push_to_hub:
            from lmolt import hub

            later = hub.upload_command(args.output, "merge", args.hub_model_id or args.output.name)
            raise ValueError(f"{args.output} is already finished; upload it with: {later}")
        return print(f"{args.output} is already finished")
    check_output(args, sources)
    dtype = methods.check_checkpoints(sources, NAMES.get(args.dtype))
    layout = {file: [(e.name, e.shape) for e in entries] for file, entries in models[0].files.items()}
    if args.adapter:
        from lmolt.merging.folding import Adapter, fold_tensor  # imports torch and transformers

        adapter = Adapter(find_folder(args.adapter, args.revision), models[0])
        for note in adapter.notes:
            print(f"note: {note}")
        new = {name: job.entry for name, job in adapter.jobs.items() if name not in models[0].entries}
        layout[list(layout)[-1]] += [(name, entry.shape) for name, entry in new.items()]
    check_room(args.output, layout, dtype)
    name, licence = str(args.output), {}
    if args.push_to_hub:
        from lmolt import hub

        name = hub.reserve(args.hub_model_id or args.output.name, args.hub_private_repo)
        licence = hub.licence([*filter(None, [*args.models, args.base, args.adapter])])
    if args.adapter:
        produce = lambda name, write: fold_tensor(name, adapter, args.fold_base, dtype, write)
    else:
        produce = lambda name, write: methods.merge_tensor(name, models, base, recipe, dtype, write)
    inputs = check_files(dict(zip([*args.models, args.base], sources, strict=False)))
    if args.adapter:
        inputs[f"{args.adapter}/{adapter.file.name}"] = adapter.sha256
    arguments = {key: vars(args)[key] for key in SAVED}
    plan = {"arguments": arguments, "inputs": inputs}
    output = OutputFolder(args.output, layout, dtype, json.loads(json.dumps(plan)), args.resume)

    # --- one tensor after the other
    began = time.perf_counter()
    sizes = {name: prod(shape) for tensors in layout.values() for name, shape in tensors}
    done = sum(sizes[record["tensor"]] for record, _ in output.done)
    with tqdm(total=sum(sizes.values()), initial=done, unit_scale=True, desc=args.method or "fold") as bar:
        records, outputs = output.write_tensors(lambda *job: (produce(*job), bar.update(sizes[job[0]]))[0])

    # --- what came out
    packages = ("numpy", "torch", "peft", "bitsandbytes") if args.adapter else ("numpy",)
    lineage = {
        "arguments": arguments,
        "versions": versions(*packages),
        "inputs": inputs,
        "outputs": outputs,
        "licence": licence,
        **(summarise_fold if args.adapter else summarise)(records),
    }
    config = json.loads((models[0].folder / "config.json").read_text())
    write_lineage(output.partial, name, lineage, seq2seq=config.get("is_encoder_decoder", False))
    output.finish(models[0], {"tie_word_embeddings": False} if args.adapter and adapter.untied else {})
    print(table(lineage))
    print(f"wrote {args.output} in {time.perf_counter() - began:.1f} s: the model, its card, merge.json")
    if args.plot:
        plot(lineage, args.plot)
        print(f"wrote {args.plot}")
    if args.verify:
        verify_folder(args.output)
    if args.push_to_hub:
        print(f"uploaded {hub.push(args.output, 'merge', name, args.hub_private_repo)}")
    return None


def command() -> None:
    run_main(main, kept="nothing is at --output yet, and the same command with --resume goes on")


if __name__ == "__main__":
    command()
