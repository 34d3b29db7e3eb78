"""Fuse models of one architecture (TIES, SLERP, linear, task arithmetic), or fold a LoRA adapter into its base.

    python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O
    python scripts/merge.py --method ties --models A B --base C --weights 0.95 0.05 --density 0.5 --output O
    python scripts/merge.py --recipe recipes/merge/slerp_19_1.yaml --models A B --output O
    python scripts/merge.py --recipe mergekit.yaml --output O
    python scripts/merge.py --models A --adapter X --output O
    python scripts/merge.py --verify O
    python scripts/merge.py --method slerp --models A B --weights 0.95 0.05 --output O --push_to_hub

A, B, C are folders with safetensors or Hub ids. Memory stays below 100 MB whatever the models' size (fusing; folding
takes torch). Writes the model with config and tokenizer of the first, merge.json and README.md; --resume goes on after
a kill. --recipe also reads mergekit's YAML.
"""

import os
import sys
from pathlib import Path

if not __package__:  # `scripts/` first on the path would shadow the library `evaluate` and hide `lmolt`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import re
import time
from math import prod

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads spin while they wait: CPU time for nothing
from tqdm import tqdm

from lmolt import ownership
from lmolt.files import content_hash, read_json, run_main, sha256_file, shipped, versions
from lmolt.merging import methods
from lmolt.merging.agreement import check_checkpoints
from lmolt.merging.beside import check_beside, files_to_copy, read_back
from lmolt.merging.checkpoints import Checkpoint, find_folder, find_folders
from lmolt.merging.provenance import (
    check_recorded,
    known_base,
    plot,
    summarise,
    summarise_fold,
    table,
    warnings,
    write_lineage,
)
from lmolt.merging.reading import read_inputs
from lmolt.merging.safetensors_io import NAMES, OutputFolder, check_room, partial_folder, replaced_folder
from lmolt.merging.settings import METHODS, TAKES, Recipe, check_recipe, check_setting, read_mergekit
from lmolt.recipes import Parser, apply_recipe, read_recipe

SAVED = ("method", "models", "revision", "weights", "t", "weights_for", "base", "density", "density_for", "normalize")
SAVED += ("lambda", "rounding", "seed", "dtype", "adapter", "fold_base")  # what merge.json repeats: what changes bytes
takes = lambda parameter: tuple(method for method in METHODS if parameter in TAKES[method])
TAKEN_BY = {  # flags that mean something for these methods only; a fold, which has none, takes none of them
    **dict.fromkeys(("weights", "t", "weights_for", "rounding"), METHODS),
    **dict.fromkeys(("density", "density_for"), takes("density")),
    "normalize": takes("normalize"),
    "lambda": (*takes("lambda"), "nuslerp"),
    "fold_base": (None,),
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipe", help="YAML file of defaults for these flags (recipes/merge/), or of mergekit")
    add("--method", choices=METHODS)
    add("--models", nargs="+", metavar="MODEL", help="folders or Hub ids; config and tokenizer are the first's")
    add("--revision", help="of the Hub ids: a branch, tag or commit")
    add("--weights", nargs="+", type=float, help="one a model; with slerp, t = second / sum")
    add("--t", nargs="+", type=float, help="slerp: the way to the second model, instead of --weights; more: a gradient")
    add("--weights_for", nargs="+", metavar="PATTERN=W,W", help="other weights for tensors whose name matches")
    add("--base", help="ties, dare_ties, task_arithmetic, nuslerp: what all of --models were trained from")
    add("--density", nargs="+", type=float, help="ties: share of each delta kept (default 0.5)")
    add("--density_for", nargs="+", metavar="PATTERN=D,D", help="other densities for tensors whose name matches")
    add("--normalize", action="store_true", default=None, help="divide by the sum of (agreeing) weights")
    add("--no_normalize", dest="normalize", action="store_false", default=None, help="don't (linear and ties do)")
    add("--lambda", type=float, default=1.0, help="with a base: factor of the merged delta (default 1)")
    add("--rounding", choices=["once", "mergekit", "stochastic"], default="once", help=ROUNDING)
    add("--seed", type=int, default=0, help="of dare_ties' mask and of stochastic rounding")
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


ROUNDING = "mergekit: after every step, as mergekit 0.1.5; stochastic: up or down by seeded chance, right on average"


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The flags, over a recipe of theirs or of mergekit's."""
    parser, layers = build_parser(), None
    defaults = {flag: parser.get_default(flag) for flag in TAKEN_BY}  # before a recipe's
    finder = Parser(add_help=False)
    finder.add_argument("--recipe", type=Path)
    file = finder.parse_known_args(argv)[0].recipe
    content = read_recipe(shipped(file), anchors=True) if file is not None else {}
    if "merge_method" in content:
        settings, notes = read_mergekit(content, file)
        for note in notes:
            print(f"note: {file}: {note}")
        layers = settings.pop("layers")
        parser.set_defaults(**settings)
    else:
        apply_recipe(parser, argv)
    args = parser.parse_args(argv)
    if "--t" in argv:  # flags win
        args.weights = None
    elif "--weights" in argv:
        args.t = None
    args.layers = layers
    for flag, methods_of in TAKEN_BY.items():
        value = vars(args)[flag]
        if value != defaults[flag] and args.method not in methods_of and (args.method or args.adapter):
            raise ValueError(f"--{flag} (here {value}) has no meaning for {args.method or 'a fold'}; leave it out")
    if vars(args)["lambda"] != 1 and not args.base:
        raise ValueError(
            f"--lambda (here {vars(args)['lambda']:g}) is of deltas from --base; give one, or leave it out"
        )
    if args.method in TAKEN_BY["density"] and args.density is None:
        args.density = [0.5]
    if args.plot and (args.adapter or not args.plot.absolute().parent.is_dir()):
        raise ValueError(
            f"--plot {args.plot}: " + ("a fold has no weights" if args.adapter else "there is no such folder")
        )
    return args


def with_patterns(values: list, flag: str, patterns: list[str] | None) -> list:
    """The settings of each model, `patterns` (PATTERN=N,N; the last that fits counts) before its own value."""
    cases = []
    for text in reversed(patterns or []):
        pattern, _, numbers = text.rpartition("=")
        try:
            re.compile(pattern)
            numbers = [float(number) for number in numbers.split(",")]
        except (ValueError, re.error):
            numbers = []
        if not pattern or len(numbers) != len(values):
            form = f"PATTERN={','.join(flag[2].upper() * len(values))}"
            raise ValueError(f"{flag} {text!r}: write {form} such as embed_tokens={','.join('1' * len(values))}")
        cases.append((pattern, numbers))
    rest = lambda value: value if isinstance(value, list) and isinstance(value[0], dict) else [{"value": value}]
    if not cases:
        return values
    return [[{"pattern": p, "value": n[i]} for p, n in cases] + rest(value) for i, value in enumerate(values)]


def resolve(args: argparse.Namespace) -> tuple[list[Checkpoint], Checkpoint | None, Recipe | None, list[str]]:
    """The models, the base, how to merge them (None: fold) and notes, checked as far as headers and configs tell."""
    if not args.models:
        raise ValueError("--models names what to merge: folders or Hub ids")
    if not args.adapter and not args.method:
        raise ValueError(f"--method is one of {', '.join(METHODS)} (or give --adapter to fold one)")
    if args.adapter and (len(args.models) != 1 or args.method or args.base):
        raise ValueError("--adapter is folded into one model: no --method, no --base; merge in a second run")
    recipe = None
    if not args.adapter:
        if args.t is not None and (args.weights or args.method != "slerp"):
            raise ValueError(f"--t (here {args.t}) is slerp's, within [0, 1], instead of --weights")
        if not args.weights and args.t is None:
            raise ValueError("--weights: give one weight a model, such as --weights 0.95 0.05")
        count, t = len(args.models), args.t
        if t is not None:
            t = t[0] if isinstance(t, list) and len(t) == 1 and not isinstance(t[0], dict) else t
            t = check_setting("--t", t)
        # an older merge.json has one for all methods
        density = (args.density or []) if args.method in TAKEN_BY["density"] else []
        density = density * count if len(density) == 1 else density
        weights = with_patterns(args.weights or [], "--weights_for", args.weights_for)
        if args.weights_for and t is not None:
            raise ValueError("--weights_for goes with --weights, not with --t")
        density = with_patterns(density, "--density_for", args.density_for)
        options = args.normalize, vars(args)["lambda"], args.rounding, args.seed
        recipe = Recipe(args.method, weights, density, *options, t)
    names = [*args.models, args.base, args.adapter]
    if args.revision and all(Path(name).is_dir() for name in filter(None, names)):
        raise ValueError(f"--revision {args.revision} is of Hub ids, and all that is named is a folder; leave it out")
    folders = find_folders([*args.models, *([args.base] if args.base else [])], args.revision)
    sources = [Checkpoint(folder) for folder in folders]
    models, base = sources[: len(args.models)], sources[-1] if args.base else None
    notes = check_recipe(recipe, list(models[0].entries), len(models), base is not None) if recipe else []
    if getattr(args, "layers", None) and recipe and args.layers != max(recipe.layers.values(), default=0):
        have = max(recipe.layers.values(), default=0)
        raise ValueError(
            f"{args.recipe}: slices: layer_range ends at {args.layers}, {args.models[0]} has {have} layers"
        )
    return models, base, recipe, notes


def check_output(args: argparse.Namespace, sources: list[Checkpoint]) -> None:
    """Lock --output; `ValueError` where it is or holds an input, or anything that merge.py didn't write."""
    if args.output == Path.cwd():
        raise ValueError(
            f"--output {args.output} is where you are, and can't be put in place whole; name another folder"
        )
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; name a folder")
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


def check_finished(args: argparse.Namespace, arguments: dict, named: dict[str, Checkpoint]) -> None:
    """--resume on a merge that is finished: `ValueError` where it is another one, of other inputs, or damaged."""
    lineage = read_json(args.output / "merge.json")
    written = lineage.get("arguments") or {}
    if odd := [key for key in arguments if written.get(key) != json.loads(json.dumps(arguments[key]))]:
        raise ValueError(
            f"{args.output} is a finished merge with {odd[0]} {written.get(odd[0])!r}, not {arguments[odd[0]]!r}; "
            "leave --resume out (--overwrite replaces it), or take another folder"
        )
    check_recorded(args.output, lineage, named)
    if args.push_to_hub:
        from lmolt import hub

        later = hub.upload_command(args.output, "merge", args.hub_model_id or args.output.name)
        raise ValueError(f"{args.output} is already finished; upload it with: {later}")
    print(f"{args.output} is already finished")


def check_files(
    named: dict[str, Checkpoint], models: list, base: Checkpoint | None, recipe: Recipe | None, dtype: str
) -> tuple[dict[str, str], dict[str, list]]:
    """Size and XXH3-128 of the inputs' files by `model/file`, and what the method has to know of each tensor."""
    sources = [*models, base] if base else models
    values = sum(entry.size for source in sources for entries in source.files.values() for entry in entries)
    with tqdm(total=values, unit_scale=True, desc="check") as bar:
        hashes, known = read_inputs(models, base, recipe, dtype, bar.update)
    return {f"{name}/{file}": hashes[sources.index(s)][file] for name, s in named.items() for file in s.files}, known


def published_hashes(sources: dict[str, Checkpoint]) -> dict[str, str]:
    """SHA-256 of the files that lie in the Hub's cache, where a blob's name is its SHA-256."""
    files = {
        f"{n}/{file}": entries[0].file.resolve().name for n, s in sources.items() for file, entries in s.files.items()
    }
    return {file: name for file, name in files.items() if re.fullmatch("[0-9a-f]{64}", name)}


def verify_folder(folder: Path) -> None:
    """Check what --output of an earlier merge holds, from its merge.json and the inputs that it names."""
    from lmolt.merging import verification

    if not (folder / "merge.json").is_file():
        raise FileNotFoundError(f"{folder / 'merge.json'}: there is no such file; --verify checks what merge.py wrote")
    lineage = read_json(folder / "merge.json")
    if not isinstance(lineage.get("arguments"), dict) or not isinstance(lineage.get("outputs"), dict):
        raise ValueError(f"{folder / 'merge.json'}: names no arguments or outputs; merge again")
    args = argparse.Namespace(**dict.fromkeys(SAVED) | lineage["arguments"])
    models, base, recipe, _ = resolve(args)
    check_recorded(folder, lineage, dict(zip([*args.models, args.base], [*models, base], strict=True)))
    if args.adapter:
        adapter = find_folder(args.adapter, args.revision)
        formula = verification.fold_by_peft(models[0], adapter, args.fold_base, Checkpoint(folder).dtype)
        largest = lambda name: 0.0  # PEFT's merge is the same to the last bit
    else:
        formula = lambda name: verification.plain(recipe, name, models, base)
        largest = lambda name: max(float(abs(x).max()) for s in [*models, base] if s for x in s.read(name))
    shares = verification.verify(folder, lineage, formula, largest)
    config, dtype = read_json(folder / "config.json"), Checkpoint(folder).dtype
    wanted = [output_config(models[0], dtype, {})]
    wanted += [output_config(models[0], dtype, {"tie_word_embeddings": False})] if args.adapter else []
    if config not in wanted:
        odd = min((key for key in config | wanted[-1] if config.get(key) != wanted[-1].get(key)), default="it")
        raise ValueError(f"{folder / 'config.json'}: {odd} is not what was written or read from; merge again")
    worst = f", at most {max(shares.values()):.4%} of a tensor's values off the formula" if shares else ""
    print(
        f"verified {folder}: hashes of {len(lineage['outputs'])} files of weights, {len(lineage.get('copied', {}))} "
        f"others and {len(lineage.get('inputs', {}))} inputs, {len(shares)} tensors worked out again{worst}"
    )


def output_config(model: Checkpoint, dtype: str, changes: dict) -> dict:
    """The model's config.json with the type that is written, without what is left of a quantisation."""
    config = {key: value for key, value in model.config.items() if key != "quantization_config"} | changes
    name = {dtype: name for name, dtype in NAMES.items()}[dtype]
    for key in [key for key in config if key.endswith("_config") and isinstance(config[key], dict)]:
        inner = config[key] | {name: value for name, value in changes.items() if name in config[key]}
        config[key] = inner | {key: name for key in ("dtype", "torch_dtype") if key in inner}  # of a composite model
    return config | {"torch_dtype" if "torch_dtype" in config else "dtype": name}  # transformers 4 reads the first


def stream(output: OutputFolder, layout: dict, kept: dict, produce, description: str) -> tuple[list[dict], dict]:
    """Write one tensor after the other, what is `kept` as it is: their records, and the hash of each file."""
    sizes = {name: prod(shape) for tensors in layout.values() for name, _, shape in tensors}
    done = sum(sizes[record["tensor"]] for record, _ in output.done)
    with tqdm(total=sum(sizes.values()), initial=done, unit_scale=True, desc=description) as bar:

        def step(name: str, write) -> dict:
            record = methods.copy_tensor(kept[name], write) if name in kept else produce(name, write)
            bar.update(sizes[name])
            return record

        return output.write_tensors(step)


def main(argv: list[str]) -> None:
    args = read_arguments(argv)
    if isinstance(args.verify, str):
        return verify_folder(Path(args.verify))

    # --- what goes in, checked before a byte is written
    if args.output is None:
        raise ValueError("--output names the folder to write")
    args.output = args.output.resolve()  # a link's target is what is written
    models, base, recipe, notes = resolve(args)
    sources = [*models, base] if base else models
    here = lambda name: str(Path(name).resolve()) if name and Path(name).is_dir() else name  # for a later --verify
    args.models, args.base, args.adapter = [here(name) for name in args.models], here(args.base), here(args.adapter)
    named = dict(zip([*args.models, args.base], sources, strict=False))
    arguments = {key: vars(args)[key] for key in SAVED} | ({"normalize": recipe.normalize} if recipe else {})
    if args.resume and (args.output / "merge.json").is_file():
        return check_finished(args, arguments, named)
    check_output(args, sources)
    dtype, said = check_checkpoints(sources, NAMES.get(args.dtype))
    files, links = files_to_copy(models[0].folder)
    links += filter(None, [check_beside(models[0].folder, files)])
    layout = {
        file: [(e.name, e.dtype if e.name in models[0].kept else dtype, e.shape) for e in entries]
        for file, entries in models[0].files.items()
    }
    changes, origin = {}, None
    if args.adapter:
        from lmolt.merging.folding import Adapter, fold_tensor  # imports torch and transformers

        adapter = Adapter(find_folder(args.adapter, args.revision), models[0])
        said += adapter.notes
        new = {name: job.entry for name, job in adapter.jobs.items() if name not in models[0].entries}
        layout[list(layout)[-1]] += [(name, dtype, entry.shape) for name, entry in new.items()]
        changes = {"tie_word_embeddings": False} if adapter.untied else {}
        produce = lambda name, write: fold_tensor(name, adapter, args.fold_base, dtype, write)
    else:
        origin = (args.base, None) if base else known_base(models)
        produce = lambda name, write: methods.merge_tensor(
            name, models, base, recipe, dtype, write, origin[1], known[name]
        )
    for note in dict.fromkeys([*notes, *said, *links]):
        print(f"note: {note}")
    check_room(args.output, layout, sum((models[0].folder / file).stat().st_size for file in files))
    name, licence = str(args.output), {}
    if args.push_to_hub:
        from lmolt import hub

        name = hub.reserve(args.hub_model_id or args.output.name, args.hub_private_repo)
        licence = hub.licence([*filter(None, [*args.models, args.base, args.adapter])])
    inputs, known = check_files(named, models, base, recipe, dtype)
    if args.adapter:
        inputs[f"{args.adapter}/{adapter.file.name}"] = adapter.hash
    output = OutputFolder(
        args.output, layout, json.loads(json.dumps({"arguments": arguments, "inputs": inputs})), args.resume
    )

    # --- one tensor after the other
    began = time.perf_counter()
    records, outputs = stream(output, layout, models[0].kept, produce, args.method or "fold")

    # --- what came out
    packages = ("numpy", "torch", "transformers", "peft", "bitsandbytes") if args.adapter else ("numpy",)
    lineage = {
        "arguments": arguments,
        "versions": versions(*packages),
        "inputs": inputs,
        "inputs_sha256": published_hashes(named),
        "outputs": outputs,
        "copied": {str(file): content_hash(models[0].folder / file) for file in files},
        "sha256": {file: sha256_file(output.partial / file) for file in outputs} if args.push_to_hub else {},
        "licence": licence,
        **(summarise_fold(records) if args.adapter else summarise(records, dtype, origin[0])),
    }
    config = output_config(models[0], dtype, changes)
    write_lineage(output.partial, name, lineage, seq2seq=config.get("is_encoder_decoder", False))
    output.finish(models[0].folder, files, config, lambda: read_back(output.partial, models[0].folder, files))
    print(table(lineage))
    for warning in warnings(lineage):
        print(f"warning: {warning}")
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
