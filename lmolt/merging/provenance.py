"""What a merge came out as: merge.json, the model card, the table on the screen, the figure by layer."""

import json
import os
import re
from pathlib import Path

import numpy as np
import yaml

from lmolt.card import as_table, front_matter, usage
from lmolt.files import content_hash
from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.methods import cosines, effective_weights

ALIKE = "one equals what deltas are taken from, or two differ from it in one direction"


def summarise(records: list[dict], dtype: str, origin: str | None) -> dict:
    """Totals and per-tensor figures of a merge; `records` are merge_tensor's and copy_tensor's (see there).

    `effective_weights` are the least-squares fit of the *stored* values, as deltas from `origin` (the base; None: from
    the first model); `unrounded_weights` of what was worked out, where the method makes something else of the weights
    than what was asked for; None where the models are equal, and nothing tells their weights apart.
    """
    merged = [record for record in records if "inner" in record]
    count = len(merged[0]["shares"])
    tensors, sums, wanted, exact = {}, np.zeros_like(np.array(merged[0]["fit"])), 0.0, 0.0
    for record in merged:
        fit, inner, share = np.array(record["fit"]), np.array(record["inner"]), np.array(record["shares"])
        sums += fit
        factors = np.array(record.get("factors", record["shares"]))  # SLERP's, by the angle
        wanted = wanted + fit[:-1, :-1] @ share[count - len(fit) + 1 :]
        exact = exact + fit[:-1, :-1] @ factors[count - len(fit) + 1 :]
        row = {
            "asked": record["shares"],
            "effective_weights": complete(effective_weights(fit), factors),
            "equal_to_first": record["equal"] / max(1, record["looked"]),
            "cosines": cosines(inner),
        }
        if "conflicts" in record:
            row["unrounded_weights"] = effective_weights(inner)
            row["sign_conflict_share"] = record["conflicts"] / max(1, record["size"])
        if "linear" in record:
            row["treated_as_linear"] = record["linear"]
        tensors[record["tensor"]] = row
    everything = sum(np.array(record["inner"]) for record in merged)
    sizes = [record["size"] + 1e-9 for record in merged]
    mean = np.average([record["shares"] for record in merged], axis=0, weights=sizes)
    worked = np.average([record.get("factors", record["shares"]) for record in merged], axis=0, weights=sizes)
    asked_fit, exact_fit = sums.copy(), sums.copy()
    asked_fit[-1, :-1] = asked_fit[:-1, -1] = wanted
    exact_fit[-1, :-1] = exact_fit[:-1, -1] = exact
    total = {
        "tensors": len(records),
        "values": sum(record["size"] for record in records),
        "asked_weights": complete(effective_weights(asked_fit), mean) or mean.tolist(),
        "effective_weights": complete(effective_weights(sums), worked),
        "fitted_as": f"deltas from {origin or 'the first model'}, stored as {dtype}",
        "equal_to_first": sum(r["equal"] for r in merged) / max(1, sum(r["looked"] for r in merged)),
        "cosines": cosines(everything),
    }
    if copied := len(records) - len(merged):
        total["buffers_copied_from_the_first"] = copied
    if "factors" in merged[0] and not np.allclose(mean, worked, rtol=0.01):
        total["unrounded_weights"] = complete(effective_weights(exact_fit), worked)
    if "linear" in merged[0]:
        total["slerp_tensors_treated_as_linear"] = sum(record["linear"] for record in merged)
    if "conflicts" in merged[0]:
        total["unrounded_weights"] = effective_weights(everything)
        total["sign_conflict_share"] = sum(record["conflicts"] for record in merged) / max(1, total["values"])
    return {"total": total, "tensors": tensors}


def known_base(models: list[Checkpoint]) -> tuple[str | None, Checkpoint | None]:
    """The base that all models' cards name, if it is a folder here or in the Hub's cache, and has their tensors."""
    names = {_card_base(model.folder) for model in models}
    if len(names) != 1 or None in names:
        return None, None
    (name,) = names
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    cache = Path(os.path.expanduser(cache))  # noqa: PTH111 - pathlib's raises where there is no home
    folders = [Path(name), *(cache / f"models--{name.replace('/', '--')}" / "snapshots").glob("*")]
    for folder in folders:
        try:
            base = Checkpoint(folder)
        except (ValueError, OSError):
            continue
        shapes = [{name: entry.shape for name, entry in source.entries.items()} for source in (base, models[0])]
        if shapes[0] == shapes[1]:
            return name, base
    return None, None


def _card_base(folder: Path) -> str | None:
    """`base_model` of a card that names one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        base = yaml.safe_load(text.split("---")[1])["base_model"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return None
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) and base else None


def complete(fitted: list[float] | None, shares: np.ndarray) -> list[float] | None:
    """All weights: where the first model was the origin, its weight is what the others leave of the sum."""
    if fitted is None or len(fitted) == len(shares):
        return fitted
    return [float(sum(shares) - sum(fitted)), *fitted]


def warnings(lineage: dict) -> list[str]:
    """What became of the weights, where that is more than 10 % off what was asked for, and the cure."""
    total, said = lineage["total"], []
    if lineage["arguments"]["adapter"]:
        changed = any(
            row.get("relative_delta", 1) != 0 for row in lineage["tensors"].values() if row["how"] != "copied"
        )
        return [] if changed else ["the adapter changes nothing: its factors' product is 0 in all tensors"]
    asked, stored = total["asked_weights"], total["effective_weights"]
    if stored is None:
        return [f"nothing tells the models' weights apart: {ALIKE}"]
    off = lambda one, other: any(abs(x - y) > 0.1 * abs(y) + 1e-6 for x, y in zip(one, other, strict=True))
    exact = total.get("unrounded_weights") or asked
    if off(exact, asked):
        said.append(
            f"asked for {ratio(asked)}, and {lineage['arguments']['method']} makes {ratio(exact)} of it: trimming, "
            "votes and normalisation, or the angle (docs/merging.md)"
        )
    if off(stored, exact):
        said.append(
            f"rounding left {ratio(stored)} of {ratio(exact)} ({total['fitted_as']}): {total['equal_to_first']:.0%} of "
            "the values equal the first model's. --dtype float32 keeps the ratio, --rounding stochastic on average"
        )
    return said


def summarise_fold(records: list[dict]) -> dict:
    """The same for a folded adapter; `records` are fold_tensor's."""
    ways = [record["how"] for record in records]
    total = {"tensors": len(records), "values": sum(record["size"] for record in records)}
    tensors = {
        record["tensor"]: {key: record[key] for key in record if key not in ("tensor", "size")} for record in records
    }
    return {"total": {**total, **{way: ways.count(way) for way in sorted(set(ways))}}, "tensors": tensors}


def ratio(weights: list[float]) -> str:
    """[0.93, 0.47] as `0.930 : 0.470 = 2.0 : 1`."""
    text = " : ".join(f"{weight:.3f}" for weight in weights)
    return f"{text} = {weights[0] / weights[1]:.1f} : 1" if len(weights) == 2 and weights[1] else text


def table(lineage: dict) -> str:
    """The totals, and the asked-for weights beside what they became, as a Markdown table."""
    total = lineage["total"]
    rows = {"tensors, values": f"{total['tensors']}, {total['values']:,}"}
    if "asked_weights" in total:
        stored = total["effective_weights"]
        rows["weights asked for"] = ratio(total["asked_weights"])
        if total.get("unrounded_weights"):
            rows["before rounding"] = ratio(total["unrounded_weights"])
        rows[f"effective weights ({total['fitted_as']})"] = ratio(stored) if stored else ALIKE
        rows["values equal to the first model's, bit for bit"] = f"{total['equal_to_first']:.1%}"
        of = "deltas from the base" if lineage["arguments"]["base"] else "models"
        rows[f"cosine between the {of}"] = ", ".join(f"{cosine:.4f}" for cosine in total["cosines"])
    shown = ("tensors", "values", "asked_weights", "effective_weights", "unrounded_weights", "fitted_as", "cosines")
    for key, value in total.items():
        if key not in (*shown, "equal_to_first"):
            rows[key.replace("_", " ")] = f"{value:.1%}" if isinstance(value, float) else str(value)
    return as_table(rows)


def write_lineage(folder: Path, name: str, lineage: dict, *, seq2seq: bool = False) -> None:
    """merge.json and README.md, the card of the model that can be loaded as `name`, into `folder`."""
    (folder / "merge.json").write_text(json.dumps(lineage, indent=1) + "\n")
    arguments = lineage["arguments"]
    parents = [*arguments["models"], *filter(None, [arguments["base"], arguments["adapter"]])]
    method = "a folded adapter" if arguments["adapter"] else f"a merge by {arguments['method']}"
    command = "\n".join(f"| {key} | {value} |" for key, value in arguments.items() if value not in (None, [], {}))
    sums = "\n".join(
        f"| `{file}` | `{digest}` |" for file, digest in {**lineage["inputs"], **lineage["outputs"]}.items()
    )
    published = "".join(f"\nSHA-256 of `{name}`: `{digest}`\n" for name, digest in lineage.get("sha256", {}).items())
    versions = ", ".join(f"{package} {number}" for package, number in lineage["versions"].items())
    metadata = front_matter(
        ["merge", "molecules", "smiles", "translation"],
        parents,
        library_name="transformers",
        pipeline_tag="translation" if seq2seq else "text-generation",
        base_model_relation="finetune" if arguments["adapter"] else "merge",
        **lineage["licence"],
    )
    (folder / "README.md").write_text(
        f"""{metadata}
# {Path(name).name}

{method.capitalize()}, made with LMolT ({versions}).

{usage(name, seq2seq=seq2seq)}
{table(lineage)}

Effective weights are the least-squares fit of the stored values on the inputs' deltas: what is left of the weights
asked for. They are fitted on one stretch of 64K values in eight.

| argument | |
|---|---|
{command}

| file | size and XXH3-128 |
|---|---|
{sums}
{published}
Every tensor's figures are in `merge.json`.
"""
    )


def check_recorded(folder: Path, lineage: dict, named: dict[str, Checkpoint]) -> None:
    """`ValueError` where a file of the merge, or one that it was made from, isn't what merge.json says.

    `named` {model as merge.json names it: its checkpoint}.
    """
    outputs, copied, inputs = (lineage.get(key, {}) for key in ("outputs", "copied", "inputs"))
    if not all(isinstance(hashes, dict) for hashes in (outputs, copied, inputs)):
        raise ValueError(f"{folder / 'merge.json'}: outputs, copied and inputs are no {{file: hash}}; merge again")
    places = {folder / file: digest for file, digest in (outputs | copied).items()}
    for key, digest in inputs.items():
        name, _, file = key.rpartition("/")
        places[(named[name].folder if name in named else Path(name)) / file] = digest
    for file, digest in places.items():
        if not file.is_file() or content_hash(file, remember=folder not in file.parents) != digest:
            was = "written" if folder in file.parents else f"merged into {folder}"
            raise ValueError(f"{file} is not what was {was} (its XXH3-128 differs); merge again")


def plot(lineage: dict, file: Path) -> None:
    """Effective weights and cosine by layer: mean over a layer's tensors, whatever has no layer at the left as -1."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    layers: dict[int, list[dict]] = {}
    for name, row in lineage["tensors"].items():
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(int(number[1]) if number else -1, []).append(row)
    x = sorted(layers)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    for index, model in enumerate(lineage["arguments"]["models"]):
        for key, style in (("effective_weights", "o-"), ("asked", ":")):
            known = [[row[key][index] for row in layers[layer] if row[key]] for layer in x]
            label = Path(model).name + (", asked" if key == "asked" else "")
            above.plot(x, [np.mean(values) if values else np.nan for values in known], style, label=label)
    above.set_ylabel("effective weight")
    above.legend()
    below.plot(
        x, [np.mean([np.mean(row["cosines"]) for row in layers[layer]]) for layer in x], marker="o", color="black"
    )
    below.set(ylabel="cosine of the inputs", xlabel="layer (-1: embedding, head, last norm)")
    if "sign_conflict_share" in lineage["total"]:
        shares = [np.mean([row["sign_conflict_share"] for row in layers[layer]]) for layer in x]
        other = below.twinx()
        other.plot(x, shares, marker="s", color="tab:red")
        other.set_ylabel("share of sign conflicts", color="tab:red")
    figure.savefig(file, dpi=150)
    plt.close(figure)
