"""Log-probabilities under the frozen reference: computed before training, saved as they are made, cached on disk.

The reference is the policy as it stands before its first step: the base model of a fresh LoRA (whose B is zero), or
the adapter that training continues. So one pass of the model at start serves every case, and no second model is held.
The first process alone reads and writes the cache, and tells the others what is in it.
"""

import hashlib
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
import xxhash
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from lmolt.files import cache_folder, write_cache
from lmolt.models.tree import padded_logps
from lmolt.training.batches import Example, tree_costs

logger = logging.getLogger(__name__)
SAVE_EVERY = 60  # seconds between savings of what is there so far
CHECKED = 2  # examples whose log-probabilities are computed again, to see that they are this model's


def cache_key(identity: dict, examples: list[Example]) -> str:
    """Key of a reference: `identity` (hashes, precision, packing, ...) and every token id. Nothing random in it.

    A fresh LoRA adds nothing to it, since its B is zero.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected, example.mismatched):
            digest.update(len(ids).to_bytes(4, "little") + np.asarray(ids, "<i4").tobytes())
    return digest.hexdigest()


def path_of(key: str) -> Path:
    return cache_folder() / "reference" / f"{key}.safetensors"


def read_cache(path: Path, num_examples: int) -> torch.Tensor | None:
    """(num_examples, 3) log-probabilities, NaN in rows that are not there yet; None, with a warning, if unreadable."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            logps, digest = file.get_tensor("logps").clone(), (file.metadata() or {}).get("xxh3_128")
        if digest != _digest(logps):
            raise ValueError("it has changed since it was written")
        if logps.shape != (num_examples, 3) or logps.dtype != torch.float64:
            raise ValueError(f"it holds {logps.dtype} {tuple(logps.shape)} instead of float64 {(num_examples, 3)}")
        lacking = logps.isnan().any(1)
        if not lacking.eq(logps.isnan().all(1)).all() or logps.isinf().any():
            raise ValueError("it holds values that are not finite")
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        logger.warning("%s is damaged (%s): computed again", path, " ".join(str(error).split()))
        return None
    return logps


def as_file(logps: torch.Tensor) -> bytes:
    """What `read_cache` reads: the log-probabilities and their checksum."""
    return save({"logps": logps}, metadata={"xxh3_128": _digest(logps)})


def _digest(logps: torch.Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(logps.contiguous().numpy().tobytes())


def log_probabilities(trainer, examples: list[Example], identity: dict) -> tuple[torch.Tensor, str]:
    """(num_examples, 3) log-probabilities of chosen, rejected and mismatched outputs, and "cached" or "computed".

    Rows that an interrupted start saved are taken over. A few are computed anew and compared before anything is
    written: another model's are dropped, with a warning. `ValueError` where what was just computed doesn't agree.
    """
    device, first = trainer.args.device, trainer.is_world_process_zero()
    path, logps = None, [None]
    if first:
        path = path_of(cache_key(identity, examples))
        logps = [read_cache(path, len(examples))]
    if trainer.args.world_size > 1:
        broadcast_object_list(logps)
    logps = torch.full((len(examples), 3), torch.nan, dtype=torch.float64) if logps[0] is None else logps[0]
    if any(p.is_meta for p in trainer.model.parameters()):
        raise ValueError(
            "the reference needs the model's weights in every process before they are shared out; set "
            "fsdp_cpu_ram_efficient_loading: false in accelerate's configuration, or use --load_in_4bit true"
        )
    if not trainer.args.load_in_4bit and all(p.numel() for p in trainer.model.parameters()):
        trainer.model.to(device)  # where DeepSpeed and FSDP would bring it later
    trainer.model.eval()
    found = _rows(~logps.isnan().any(1))
    if found:
        difference, allowed = _difference(trainer, examples, logps, found)
        if not difference <= allowed:
            if first:
                logger.warning(
                    "%s: its log-probabilities differ by %.2g a token from this model's, over the %.2g that rounding "
                    "explains: computed again", path, difference, allowed,
                )  # fmt: skip
            logps[:] = torch.nan
    lacking = _rows(logps.isnan().any(1))
    if not lacking:
        return logps, "cached"
    checked, saved = False, time.monotonic()
    for rows, part in _passes(trainer, [examples[row] for row in lacking]):
        logps[[lacking[row] for row in rows]] = part
        if not checked:
            at = [lacking[row] for row in rows]
            difference, allowed = _difference(trainer, examples, logps, at)
            if not difference <= allowed:
                raise ValueError(
                    f"triple {examples[at[0]].id!r}: the reference's log-probabilities differ by {difference:.2g} a "
                    f"token from padded rows', over the {allowed:g} that rounding explains. Use --packing padded"
                )
            checked = True
        if first and time.monotonic() > saved + SAVE_EVERY:
            write_cache(path, as_file(logps))
            saved = time.monotonic()
    if logps.isnan().any() or logps.isinf().any():
        row = int((~logps.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"triple {examples[row].id!r} has a log-probability that isn't finite under the reference")
    if first:
        write_cache(path, as_file(logps))
    return logps, "computed" if len(lacking) == len(examples) else f"cached, {len(lacking)} of them computed"


def _rows(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


@torch.no_grad()
def compute(trainer, examples: list[Example]) -> torch.Tensor:
    """(num_examples, 3) log-probabilities under the trainer's model as it stands; all processes share the work."""
    logps = torch.zeros(len(examples), 3, dtype=torch.float64)
    for rows, part in _passes(trainer, examples):
        logps[rows] = part
    return logps


@torch.no_grad()
def _passes(trainer, examples: list[Example]):
    """Rows, and their log-probabilities on the CPU, of one forward pass of every process after the other."""
    per_pass = trainer.args.eval_batch_size * trainer.args.world_size
    sampler = trainer._sampler(tree_costs(examples), per_pass, shuffle=False)
    steps = sampler.steps()
    trainer.model.eval()
    bar = tqdm(sampler, desc="reference log-probabilities", disable=not trainer.is_world_process_zero())
    for step, drawn in zip(steps, bar, strict=True):
        place = {row: at for at, row in enumerate(step)}
        rows = [index for index, _ in drawn]
        outputs = [(i, c, ids) for i in rows for c, ids in enumerate(_outputs(examples[i])) if len(ids)]
        with trainer.accelerator.autocast():
            scored = trainer._logps(trainer.model, [(examples[i].prompt, ids) for i, _, ids in outputs])
        part = torch.zeros(len(step), 3, dtype=torch.float64, device=trainer.args.device)
        if drawn[0][1]:
            part[[place[i] for i, _, _ in outputs], [c for _, c, _ in outputs]] = scored.double()
        yield step, trainer.accelerator.reduce(part, "sum").cpu()


@torch.no_grad()
def _difference(trainer, examples: list[Example], logps: torch.Tensor, rows: list[int]) -> tuple[float, float]:
    """How far, a token, `logps` of a few short examples are from padded rows', and how far rounding may take them."""
    rows = sorted(rows, key=lambda row: len(examples[row].prompt) + len(examples[row].chosen))[:CHECKED]
    sequences = [(examples[row].prompt, ids) for row in rows for ids in _outputs(examples[row])[:2] if len(ids)]
    kept = torch.stack([logps[row, c] for row in rows for c, ids in enumerate(_outputs(examples[row])[:2]) if len(ids)])
    trainer.model.eval()
    with trainer.accelerator.autocast():
        padded = padded_logps(trainer.model, sequences).double().cpu()
    tokens = torch.tensor([len(output) for _, output in sequences])
    low = trainer.accelerator.mixed_precision != "no" or trainer.model.dtype != torch.float32
    return ((padded - kept).abs() / tokens).max().item(), 0.05 if low or trainer.args.load_in_4bit else 1e-4


def _outputs(example: Example) -> tuple[list[int], list[int], list[int]]:
    return example.chosen, example.rejected, example.mismatched
