"""Model cards: what a model is, how it came to be, how to use it, what evaluate.py found."""

import csv
import json
from pathlib import Path

import yaml

from lmolt.prompts import CAP2MOL, MOL2CAP, build_prompt

EXAMPLES = {MOL2CAP: "CCO", CAP2MOL: "The molecule is a primary alcohol that is ethane with a hydroxy group."}


def front_matter(tags: list[str], parents: list[str], **metadata) -> str:
    """A card's metadata. Only Hub ids may stand in `base_model`: the Hub refuses a card that names a folder there."""
    metadata["tags"] = tags
    metadata["base_model"] = [parent for parent in parents if not Path(parent).exists()]
    kept = {key: value for key, value in metadata.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n"


def usage(
    name: str, *, base: str = "", seq2seq: bool = False, trust_remote_code: bool = False, style: str = "paper"
) -> str:
    """Python that loads the model `name`, or the adapter of that name on `base`, and translates an example in each
    direction, as a card shows it: by plain transformers, and what LMolT's own `Translator` does beyond."""
    package, loader = "transformers", f"AutoModelFor{'Seq2SeqLM' if seq2seq else 'CausalLM'}"
    if base:
        package, loader = "peft", f"AutoPeft{loader[4:]}"
    remote = ", trust_remote_code=True" if trust_remote_code else ""
    lines = [
        "import torch",
        f"from {package} import {loader}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("{name}", dtype="auto"{remote})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})',
    ]
    if seq2seq:
        lines += ["", f'ids = tokenizer("{EXAMPLES[MOL2CAP]}").input_ids  # one direction, the one it was trained for']
        rest = "output[0]"
    else:
        for direction, example in EXAMPLES.items():
            lines += ["", f'{direction} = """{build_prompt(direction, example, style)}"""']
        lines += [
            "",
            f"ids = tokenizer({MOL2CAP}, add_special_tokens=False).input_ids  # or {CAP2MOL}",
            "if tokenizer.bos_token_id is not None:",
            "    ids = [tokenizer.bos_token_id, *ids]",
        ]
        rest = "output[0, len(ids) :]"
    lines += [
        "output = model.generate(input_ids=torch.tensor([ids]).to(model.device), max_new_tokens=250, do_sample=False)",
        f"print(tokenizer.decode({rest}, skip_special_tokens=True))",
    ]
    ours = ", ".join(f'"{part}"' for part in (base, name) if part)
    return (
        "```python\n" + "\n".join(lines) + "\n```\n\n"
        f"LMolT's `Translator({ours}{remote})` (`from lmolt import Translator`) takes texts in one line, makes several "
        "candidates, keeps those that RDKit reads, ranks and draws them; `scripts/translate.py` does it with files.\n"
    )


def as_table(rows: dict[str, object]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def write_card(folder: Path, output_dir: Path, run: dict) -> None:
    """Write README.md, the card of a trained adapter, into `folder`, which holds the adapter's other files.

    `run` is what `run.json` holds; `output_dir` is where the adapter will be, and where a log of emissions may be.
    """
    arguments, data, loss, identity = run["arguments"], run["data"], run["loss"], run["identity"]
    name = arguments["hub_model_id"] if arguments["push_to_hub"] else str(output_dir.absolute())
    base, revision = arguments["model"], arguments["revision"]
    if Path(base).is_dir() and not arguments["push_to_hub"]:
        base = str(Path(base).absolute())  # the card's Python runs from any folder
    lora = {key.removeprefix("adapter's "): value for key, value in identity.items() if key.startswith("adapter's ")}
    state = json.loads((folder / "trainer_state.json").read_text())
    efficiency = json.loads((folder / "efficiency.json").read_text())
    emissions = read_emissions(output_dir / "emissions.csv")
    kind = "pairs" if arguments["pairs"] else "triples"
    rows = {
        "base model": f"`{base}`{f', revision `{revision}`' if revision else ''}" + described_merge(Path(base)),
        "continues": f"`{arguments['adapter']}`" if arguments["adapter"] else "nothing: a fresh adapter",
        "loss": f"`{loss['name']}`: {loss['definition']}",
        **loss["parameters"],
        "reference": run["reference"],
        kind: f"`{Path(arguments[kind]).name}`, SHA-256 `{data['sha256']}`",
        "trained on": ", ".join(f"{n} {direction}" for direction, n in data["train"].items()),
        "held out": ", ".join(f"{n} {direction}" for direction, n in data["evaluation"].items()) or "none",
        "dropped": ", ".join(f"{n} {cause}" for cause, n in data["dropped"].items()) or "none",
        "base weights": "NF4 with double quantisation" if arguments["load_in_4bit"] else identity["base's dtype"],
        "mixed precision": {"no": "none"}.get(identity["precision"], identity["precision"]),
        "adapter": described_adapter(lora),
        "optimizer steps": run["step"],
        "changed when resumed": "; ".join(map(described_change, run["changes"])) or "nothing",
        "seed": arguments["seed"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    } | measured(state, efficiency, emissions, run["step"])
    warning = ""
    if Path(base).exists():
        warning = f"Its base model is a folder, `{base}`, which whoever uses the adapter needs at the same path.\n\n"
    metadata = front_matter(
        ["lora", "molecules", "smiles", "translation", "preference-optimization", loss["name"]],
        [base],
        library_name="peft",
        pipeline_tag="text-generation",
        co2_eq_emissions=emissions,
        **run["licence"],
    )
    (folder / "README.md").write_text(
        f"""{metadata}
# {Path(name).name}

A LoRA adapter that translates between molecules (SMILES) and captions, both ways, aligned with LMolT
(Gkoumas & Liakata, "Feedback-aligned Mixed LLMs for Machine Language-Molecule Translation").

{warning}{usage(name, base=base, trust_remote_code=arguments["trust_remote_code"], style=arguments["prompt_style"])}
{as_table(rows)}

All arguments are in `run.json`, the cost in `efficiency.json`, the log in `trainer_state.json`.
"""
    )


def described_adapter(lora: dict) -> str:
    """An adapter as PEFT's configuration has it; what is False, None or empty is left out."""
    named = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_dora": "DoRA", "use_rslora": "rsLoRA"}
    kind = [lora["peft_type"]] if lora.get("peft_type", "LORA") != "LORA" else []
    return ", ".join(kind + [f"{named[key]} {lora[key]}" for key in named if lora.get(key) not in (None, False)])


def described_change(change: dict) -> str:
    return f"from step {change['step']} on, {change['key']} {change['after']} (before: {change['before']})"


def measured(state: dict, efficiency: dict, emissions: dict, kept: int) -> dict[str, str]:
    """Rows for what the run measured of itself: held-out scores at step `kept`, the adapter's; energy; emissions."""
    rows = {}
    evaluations = {log["step"]: log for log in state["log_history"] if "eval_loss" in log}
    if evaluations and kept not in evaluations:
        rows["held-out"] = f"not evaluated at step {kept}, whose weights these are"
    elif evaluations:
        shown = {key.removeprefix("eval_"): value for key, value in evaluations[kept].items() if _is_score(key)}
        rows[f"held-out, step {kept}"] = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
    if efficiency["gpu_energy_joules"] is not None:
        rows["energy"] = f"{efficiency['gpu_energy_joules'] / 3.6e6:.3g} kWh of all GPUs (NVML)"
    if emissions:
        rows["emissions"] = f"{emissions['emissions']:.3g} g CO2-eq ({emissions['source']})"
    return rows


def _is_score(key: str) -> bool:
    direction, _, name = key.removeprefix("eval_").partition("/")
    return key == "eval_loss" or (direction in (MOL2CAP, CAP2MOL) and (name == "rewards/accuracies" or "/" not in name))


def read_emissions(path: Path) -> dict:
    """`co2_eq_emissions`, in grams, of CodeCarbon's log of a run (a row a start); empty where there is none."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        "emissions": 1000 * sum(float(row["emissions"]) for row in rows),
        "source": "CodeCarbon",
        "training_type": "fine-tuning",
        "geographical_location": rows[-1]["country_name"],
        "hardware_used": rows[-1]["gpu_model"] or rows[-1]["cpu_model"],
    }


def described_merge(folder: Path) -> str:
    """What a merged base model was made of, from its merge.json; nothing for other models."""
    if not (folder / "merge.json").is_file():
        return ""
    arguments = json.loads((folder / "merge.json").read_text())["arguments"]
    parents = [*arguments["models"], *filter(None, [arguments["base"], arguments["adapter"]])]
    how = arguments["method"] or "folding"
    weights = f" with weights {arguments['weights']}" if arguments["weights"] else ""
    return f", made by {how} of {', '.join(f'`{parent}`' for parent in parents)}{weights}"


def model_index(name: str, record: dict, url: str) -> list[dict]:
    """evaluate.py's metrics.json `record` as the `model-index` of a card; `url` is where the record can be read."""
    from huggingface_hub import EvalResult  # here: a merge writes its card without
    from huggingface_hub.repocard_data import eval_results_to_model_index

    arguments = record["arguments"]
    pairs = Path(arguments.get("pairs") or "molecule-captions")  # a file, or the name of a data set
    results = [
        EvalResult(
            task_type="translation",
            task_name=direction,
            dataset_type="molecule-captions" if pairs.exists() else str(pairs),
            dataset_name=pairs.name,
            dataset_config=direction,
            dataset_split=arguments.get("split") or "test",
            metric_type=key,
            metric_name=entry.get("label", key),
            metric_value=entry["value"],
            metric_args={"convention": entry["convention"]},
            source_name=f"LMolT, weights {record['weights']}" if "weights" in record else "LMolT",
            source_url=url,
        )
        for direction, part in record["directions"].items()
        for key, entry in part["metrics"].items()
        if "value" in entry and "/" not in key  # METRIC/CATEGORY are in the record
    ]
    return eval_results_to_model_index(name, results)
