"""Check a merged folder: the hashes of its files, and a sample of tensors worked out again by the plain formulas.

Plain: the whole tensor at once in float64, sorted where the merge itself streams, selects and counts bits.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.methods import TIE, dare_mask
from lmolt.merging.safetensors_io import Entry, entry_values, read_header
from lmolt.merging.settings import Recipe

LARGEST = 1 << 25  # values: 256 MiB in float64, of which a few copies are held
MIDPOINT = 0.501  # units in the last place: weights like 0.95 put many values on exact midpoints


def plain(recipe: Recipe, name: str, sources: list[Checkpoint], base: Checkpoint | None) -> np.ndarray:
    """One tensor, flat, float64, as merging/methods.py's docstring writes it; DARE with the merge's own seeded mask."""
    weights, models = recipe.weights_of(name), [whole(source, name) for source in sources]
    if recipe.method == "linear":
        return sum(w * x for w, x in zip(weights, models, strict=True)) / (sum(weights) if recipe.normalize else 1)
    if recipe.method in ("slerp", "nuslerp"):
        origin = whole(base, name) if base else 0.0
        t, (x0, x1) = weights[1] / sum(weights), [x - origin for x in models]
        norms = [norm if norm > 1e-8 else 1 for norm in (np.linalg.norm(x0), np.linalg.norm(x1))]
        cosine = np.clip(x0 @ x1 / norms[0] / norms[1], -1, 1)
        if abs(cosine) > (0.9995 if recipe.method == "slerp" else 1 - 1e-15):
            mixed = (1 - t) * x0 + t * x1
        else:
            theta = np.arccos(cosine)
            mixed = (np.sin((1 - t) * theta) * x0 + np.sin(t * theta) * x1) / np.sin(theta)
        return origin + (recipe.scale if base else 1) * mixed
    votes, origin = [], whole(base, name)
    densities = recipe.density_of(name) or [1.0] * len(models)
    for index, (x, w, density) in enumerate(zip(models, weights, densities, strict=True)):
        delta = x - origin
        kept = np.zeros_like(delta)
        if recipe.method == "task_arithmetic" or density == 1:
            kept = delta
        elif recipe.method == "dare_ties":
            kept[:] = delta * np.concatenate([*dare_mask(name, index, delta.size, density, recipe.seed)])
            kept *= np.abs(delta).sum() / max(np.abs(kept).sum(), 1e-300)
        else:
            first = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(density * delta.size))]
            kept[first] = delta[first]
        votes.append(w * kept)
    if recipe.method == "task_arithmetic":
        total = sum(votes)
        if recipe.normalize and abs(sum(weights)) >= 1e-8:
            total = total / sum(weights)
        return origin + recipe.scale * total
    tie = -TIE * sum(np.abs(vote) for vote in votes) if len(votes) > 1 else 0
    elected = np.where(sum(votes) >= tie, 1, -1)
    masks = [np.sign(vote) == elected for vote in votes]
    total = sum(vote * mask for vote, mask in zip(votes, masks, strict=True))
    if recipe.normalize:
        divisor = sum(w * mask for w, mask in zip(weights, masks, strict=True))
        total = total / np.where(divisor == 0, 1, divisor)
    return origin + recipe.scale * total


def whole(source: Checkpoint, name: str) -> np.ndarray:
    """A tensor, flat, in float64."""
    return np.concatenate([*source.read(name, np.float64), np.empty(0)])


def fold_by_peft(base: Checkpoint, folder: Path, fold_base: str, dtype: str) -> Callable[[str], np.ndarray]:
    """A function of a tensor's name: what PEFT's own layers merge, one at a time; PEFT reads the adapter itself.

    Where the base has no class in transformers (it brings its code), the formula in float64 instead.
    """
    import torch
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper, load_peft_weights

    from lmolt.merging.architecture import read_architecture
    from lmolt.merging.folding import FACTOR, TORCH, dequantised, modules_of

    architecture = read_architecture(base, modules_of(folder / "adapter_model.safetensors"))
    tensors = {entry.name: entry for entry in read_header(folder / "adapter_model.safetensors")}
    config = json.loads((folder / "adapter_config.json").read_text())

    def stored(name: str) -> torch.Tensor:
        entry = base.entries[name]
        if fold_base == "dequantised" and architecture.is_quantised(name, entry.shape):
            return dequantised(base, entry, architecture.kind(architecture.homes[name].parameter) == "Conv1D")
        return torch.from_numpy(whole(base, name).reshape(entry.shape))

    def by_formula(name: str) -> np.ndarray:
        read = lambda key: np.concatenate([*entry_values(tensors[key], np.float64)]).reshape(tensors[key].shape)
        module = "base_model.model." + name.removesuffix(".weight")
        for key in (f"base_model.model.{name}", f"{module}.modules_to_save.weight"):
            if key in tensors:
                return read(key).ravel()
        weight = stored(name).double().numpy()
        if f"{module}.lora_A.weight" in tensors:
            a, b = read(f"{module}.lora_A.weight"), read(f"{module}.lora_B.weight")
            alpha = config["lora_alpha"]
            for pattern, value in reversed((config.get("alpha_pattern") or {}).items()):
                alpha = value if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")) else alpha
            weight = weight + alpha / len(a) ** (0.5 if config.get("use_rslora") else 1) * (b @ a)
        return weight.ravel()

    if architecture.model is None:
        return by_formula
    shapes = {name: tuple(value.shape) for name, value in architecture.model.state_dict().items()}
    wrapped = get_peft_model(architecture.model, PeftConfig.from_pretrained(folder))
    saved = load_peft_weights(str(folder), device="cpu")
    set_peft_model_state_dict(wrapped, dict(saved), low_cpu_mem_usage=True)
    model = wrapped.base_model.model
    sources: dict[str, list[str]] = {}
    for name, home in architecture.homes.items():
        sources.setdefault(home.parameter, []).append(name)

    def stored_entry(parameter: str) -> Entry:  # or of the one that it is tied to
        return base.entries[
            next(sources[p][0] for p in [parameter, *architecture.ties.get(parameter, [])] if p in sources)
        ]

    def parameter_value(parameter: str) -> torch.Tensor:
        entry = stored_entry(parameter)
        names, experts = sources.get(parameter, [entry.name]), architecture.homes[entry.name].expert is not None
        kind = TORCH[entry.dtype] if entry.dtype == dtype else torch.float32
        value = torch.zeros(shapes[parameter], dtype=kind) if experts else stored(names[0]).to(kind)
        for name in names if experts else ():
            home, part = architecture.homes[name], stored(name)
            value[home.expert, home.row : home.row + len(part)] = part.to(kind)
        return value

    brought: dict[str, torch.Tensor] = {}

    def by_peft(name: str) -> np.ndarray:
        home = architecture.homes.get(name)
        if home is None and name in base.entries:  # nothing loads it
            return whole(base, name)
        parameter = home.parameter if home else name
        path, _, leaf = parameter.rpartition(".")
        module = layer = model.get_submodule(path)
        if isinstance(module, ModulesToSaveWrapper):
            layer = module.modules_to_save["default"]
        elif hasattr(module, "base_layer"):
            layer = module.get_base_layer()
        given = brought.setdefault(parameter, getattr(layer, leaf))  # real only where the adapter's file holds it
        if given.is_meta:
            given = parameter_value(parameter)
        elif hasattr(module, "merge"):
            given = given.to(TORCH[stored_entry(parameter).dtype])
        if hasattr(module, "merge"):  # its factors follow the weight from the meta device, and to its type
            set_weight = lambda value: setattr(layer, leaf, torch.nn.Parameter(value, requires_grad=False))
            set_weight(given.float())
            here = lambda key: key.startswith(f"base_model.model.{path}.")
            own = {key: value for key, value in saved.items() if here(key) == bool(FACTOR.match(key))}
            set_peft_model_state_dict(wrapped, own, low_cpu_mem_usage=True)
            set_weight(given.clone())
            given = None
        while hasattr(module, "base_layer"):
            if getattr(module, "parameter_name", "weight") == leaf:
                module.merged_adapters.clear()  # another part of these experts was asked for before
                module.merge()
            module = module.base_layer
        value = (getattr(layer, leaf) if given is None else given).detach()
        if home and home.expert is not None:
            value = value[home.expert][home.row : home.row + base.entries[name].shape[0]]
        return value.double().numpy().ravel()

    return by_peft


def units_apart(values: np.ndarray, exact: np.ndarray, dtype: str) -> np.ndarray:
    """|values - exact| in units in the last place of `dtype` at the exact value."""
    digits, smallest = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}[dtype]
    exponent = np.maximum(np.frexp(exact)[1] - digits, smallest)
    return np.ldexp(np.abs(values - exact), -exponent)


def verify(
    folder: Path,
    lineage: dict,
    formula: Callable[[str], np.ndarray],
    largest: Callable[[str], float] = lambda name: 0.0,
    count: int = 8,
) -> dict[str, float]:
    """Compare `count` tensors of `folder` with `formula(name)`; its files are those that `lineage` lists.

    `largest(name)`: the largest magnitude that the formula adds up, if it does; what is off by its last bits isn't off.
    Returns the share of each such tensor's values that lie more than half a unit in the last place off (a unit, if they
    were rounded by chance). `ValueError` where more than 0.1 % of a tensor's values differ (10 % if rounded
    after every step).
    """
    merged, rounding = Checkpoint(folder), lineage["arguments"]["rounding"]
    if odd := merged.files.keys() ^ lineage["outputs"].keys():
        raise ValueError(f"{folder}: {sorted(odd)[0]} is not of the files that were written, or not read; merge again")
    allowed = 0.1 if rounding == "mergekit" else 0.001
    folded = bool(lineage["arguments"]["adapter"])
    small = sorted(name for name, entry in merged.entries.items() if 0 < entry.size <= LARGEST)
    shares = {}
    for name in random.Random(0).sample(small, min(count, len(small))):
        exact, values, dtype = formula(name), whole(merged, name), merged.entries[name].dtype
        units = 1.001 if folded or rounding == "stochastic" else MIDPOINT  # what PEFT merges is rounded already
        off = units_apart(values, exact, dtype) > units
        # where large terms cancel, what is left is the working type's rounding, in units of next to nothing
        off &= np.abs(values - exact) > (2.0**-48 if dtype == "F32" else 2.0**-21) * largest(name)
        shares[name] = float(off.mean())
        if shares[name] > allowed:
            first = int(off.argmax())
            raise ValueError(
                f"{folder}: {name}: {shares[name]:.2%} of its values are not the formula's, such as {values[first]} "
                f"for {exact[first]} at {first}; the inputs or the output changed: merge again"
            )
    return shares
