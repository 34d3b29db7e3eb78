"""What a merge came out as: merge.json, the model card, the table on the screen, the figure by layer."""

import json
import re
from pathlib import Path

import numpy as np

from lmolt.card import front_matter, usage
from lmolt.merging.methods import cosines, effective_weights


def summarise(records: list[dict]) -> dict:
    """Totals and per-tensor figures of a merge; `records` are merge_tensor's (see there)."""
    inner = [np.array(record["inner"]) for record in records]
    total = {
        "tensors": len(records),
        "values": sum(record["size"] for record in records),
        "effective_weights": effective_weights(sum(inner)),
        "cosines": cosines(sum(inner)),
    }
    if "linear" in records[0]:
        total["slerp_tensors_treated_as_linear"] = sum(record["linear"] for record in records)
    if "conflicts" in records[0]:
        total["sign_conflict_share"] = sum(record["conflicts"] for record in records) / max(1, total["values"])
    tensors = {}
    for record, products in zip(records, inner, strict=True):
        row = {"effective_weights": effective_weights(products), "cosines": cosines(products)}
        if "linear" in record:
            row["treated_as_linear"] = record["linear"]
        if "conflicts" in record:
            row["sign_conflict_share"] = record["conflicts"] / max(1, record["size"])
        tensors[record["tensor"]] = row
    return {"total": total, "tensors": tensors}


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
    total, asked = lineage["total"], lineage["arguments"].get("weights")
    rows = {"tensors, values": f"{total['tensors']}, {total['values']:,}"}
    if asked:
        of = "deltas from the base" if lineage["arguments"]["base"] else "models"
        rows["weights asked for"] = ratio(asked)
        rows[f"effective weights of the {of}"] = ratio(total["effective_weights"])
        rows[f"cosine between the {of}"] = ", ".join(f"{cosine:.4f}" for cosine in total["cosines"])
    for key, value in total.items():
        if key not in ("tensors", "values", "effective_weights", "cosines"):
            rows[key.replace("_", " ")] = f"{value:.1%}" if isinstance(value, float) else str(value)
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


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

Effective weights are the least-squares fit of the output on its inputs: what the merge made of the weights asked for.

| argument | |
|---|---|
{command}

| file | SHA-256 |
|---|---|
{sums}

Every tensor's figures are in `merge.json`.
"""
    )


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
    for index, (model, asked) in enumerate(
        zip(lineage["arguments"]["models"], lineage["arguments"]["weights"], strict=True)
    ):
        weights = [np.mean([row["effective_weights"][index] for row in layers[layer]]) for layer in x]
        above.plot(x, weights, marker="o", label=f"{Path(model).name}, asked {asked:g}")
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
