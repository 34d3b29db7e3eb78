"""The model card of a trained adapter: what it is, and how it came to be."""

from pathlib import Path

LOSSES = {
    "sft": "negative log-likelihood of the preferred outputs (Eq. 4)",
    "dpo": "direct preference optimisation (Eq. 5)",
    "cpo": "contrastive preference optimisation with its NLL term (Eqs. 6 and 8)",
    "kto": "Kahneman-Tversky optimisation (Eqs. 9 to 13)",
    "kto_pair": "TRL 0.8's kto_pair, the loss that the paper's authors ran as DPO",
}


def write_card(folder: Path, name: Path, run: dict) -> None:
    """Write README.md into `folder` from what `run.json` holds; `name` is the path that the adapter will have."""
    arguments, data = run["arguments"], run["data"]
    base = arguments["model"]
    rows = {
        "loss": f"`{arguments['loss']}`: {LOSSES[arguments['loss']]}",
        "beta, alpha, nll": f"{arguments['beta']}, {arguments['alpha']}, {arguments['nll']}",
        "reference": run["reference"],
        "triples": f"`{Path(arguments['triples']).name}`, SHA-256 `{data['triples_sha256']}`",
        "trained on": ", ".join(f"{n} {direction}" for direction, n in data["train"].items()),
        "held out": ", ".join(f"{n} {direction}" for direction, n in data["evaluation"].items()) or "none",
        "dropped": ", ".join(f"{n} {cause}" for cause, n in data["dropped"].items()) or "none",
        "base weights": "NF4 with double quantisation, bf16 compute" if arguments["load_in_4bit"] else "unquantised",
        "adapter": f"r {arguments['lora_r']}, alpha {arguments['lora_alpha']}, dropout {arguments['lora_dropout']}",
        "seed": arguments["seed"],
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    (folder / "README.md").write_text(
        f"""---
library_name: peft
base_model: {base}
tags: [lora, molecules, smiles, translation, preference-optimization, {arguments["loss"]}]
---

# {name.name}

A LoRA adapter that translates between molecules (SMILES) and captions, both ways, aligned with LMolT
(Gkoumas & Liakata, "Feedback-aligned Mixed LLMs for Machine Language-Molecule Translation").

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

| | |
|---|---|
{table}

All arguments are in `run.json`, the cost in `efficiency.json`, the log in `trainer_state.json`.
"""
    )
