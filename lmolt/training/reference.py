"""Log-probabilities under the frozen reference: computed once before training, cached on disk.

The reference is the policy as it stands before its first step: the base model of a fresh LoRA (whose B is zero), or
the adapter that training continues. So one pass of the model at start serves every case, and no second model is held.
"""

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save
from tqdm import tqdm

from lmolt.files import cache_folder, sha256_file, write_whole
from lmolt.training.batches import Example, tree_costs


def weights_identity(name: str, config: str, revision: str | None = None) -> str:
    """What tells one set of weights from another: the Hub's commit, or the hash of a local folder's files.

    `config` is the file by which the commit is found: it lies in .../snapshots/COMMIT/ of the Hub's cache.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{Path(hf_hub_download(name, config, revision=revision)).parent.name}"
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith("config.json"))
    return hashlib.sha256("".join(f"{p.name}:{sha256_file(p)};" for p in files).encode()).hexdigest()


def cache_key(identity: dict, examples: list[Example]) -> str:
    """Key of a reference: base weights, quantisation, dtype, adapter, and every token id. Nothing random in it.

    `identity` holds the first four as strings. A fresh LoRA adds nothing to it, since its B is zero.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected, example.mismatched):
            digest.update(len(ids).to_bytes(4, "little") + b"".join(i.to_bytes(4, "little") for i in ids))
    return digest.hexdigest()


def read_cache(key: str) -> torch.Tensor | None:
    """(num_examples, 3) log-probabilities of chosen, rejected, mismatched; None if they are not there."""
    path = cache_folder() / "reference" / f"{key}.safetensors"
    return load_file(path)["logps"] if path.exists() else None


def write_cache(key: str, logps: torch.Tensor) -> None:
    path = cache_folder() / "reference" / f"{key}.safetensors"
    write_whole(path, save({"logps": logps.contiguous()}))


@torch.no_grad()
def compute(trainer, examples: list[Example]) -> torch.Tensor:
    """(num_examples, 3) log-probabilities under the trainer's model as it stands; all processes share the work."""
    if not trainer.args.load_in_4bit:
        trainer.model.to(trainer.args.device)  # where DeepSpeed and FSDP would bring it later
    trainer.model.eval()
    per_pass = trainer.args.eval_batch_size * trainer.args.world_size
    sampler = trainer._sampler(tree_costs(examples), per_pass, shuffle=False)
    logps = torch.zeros(len(examples), 3, dtype=torch.float64, device=trainer.args.device)
    for drawn in tqdm(sampler, desc="reference log-probabilities", disable=not trainer.is_world_process_zero()):
        rows = [index for index, _ in drawn]
        outputs = [(i, c, ids) for i in rows for c, ids in enumerate(_outputs(examples[i])) if ids]
        with trainer.accelerator.autocast():
            scored = trainer._logps(trainer.model, [(examples[i].prompt, ids) for i, _, ids in outputs])
        if drawn[0][1]:
            logps[[i for i, _, _ in outputs], [c for _, c, _ in outputs]] = scored
    return trainer.accelerator.reduce(logps, "sum").cpu()


def _outputs(example: Example) -> tuple[list[int], list[int], list[int]]:
    return example.chosen, example.rejected, example.mismatched
