"""Folding a LoRA or QLoRA adapter into its base: W + scale * B A, streamed, as PEFT's `merge_and_unload` does it.

scale = alpha / r, with rsLoRA alpha / sqrt(r); DoRA: m (W + scale * B A) / |W + scale * B A|, norms by output row.
Bit for bit PEFT's result on the full-precision base, so the product is torch's, in blocks of rows: numpy's BLAS adds in
another order. Never into 4-bit weights in place: quantised again, they keep 1 to 4 % of the delta.

What is folded is an allow-list: each key of adapter_config.json is known to leave the arithmetic alone, or is followed,
or is refused by name; each tensor of the adapter finds its home, or is refused.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lmolt.files import content_hash
from lmolt.merging.architecture import read_architecture
from lmolt.merging.checkpoints import Checkpoint
from lmolt.merging.lora_config import WAY_OUT, is_targeted, read_config
from lmolt.merging.safetensors_io import FLOATS, STORAGE, Entry, decode, encode, read_bits

BLOCK = 1 << 22  # values of the delta at a time: 16 MiB
PREFIX = "base_model.model."
FACTOR = re.compile(rf"(?:{re.escape(PREFIX)})?(.+?)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$")


@dataclass
class Change:
    """What an adapter does to one parameter: its keys in the adapter's file, and how they are meant."""

    kind: str  # Linear, Conv1D, Embedding; parameter: a bare one; replaced: by the tensor `copy`
    factors: tuple[str, str] | None = None  # A, B
    magnitude: str | None = None  # DoRA's
    copy: str | None = None  # the adapter's own copy of the base's tensor, which PEFT loads over the base's
    scale: float = 1.0
    experts: int = 1
    transposed: bool = False  # the experts are stored (experts, in, out)


@dataclass(frozen=True)
class Job:
    """One tensor of the output: what it is read from, and what becomes of it."""

    entry: Entry
    parameter: str | None = None
    expert: int | None = None
    row: int = 0


def modules_of(file: Path) -> set[str]:
    """The modules of which a PEFT file holds factors."""
    with safe_open(file, "pt") as tensors:
        return {match[1].replace(".base_layer", "") for match in map(FACTOR.match, tensors.keys()) if match}


class Adapter:
    """A PEFT LoRA folder over its base: `changes` {parameter: Change}, `jobs` {tensor of the output: Job}.

    `untied` names parameters that the base ties to its embedding and the output can't: they are written apart, and the
    config says so. `notes` are for the user.
    """

    def __init__(self, folder: Path, base: Checkpoint):
        self.config, self.base, self.folder = read_config(folder), base, folder
        self.file = folder / "adapter_model.safetensors"
        if not self.file.is_file():
            pickled = (
                " (adapter_model.bin is a pickle, and isn't read)" if (folder / "adapter_model.bin").exists() else ""
            )
            raise FileNotFoundError(f"{self.file}: there is no such file{pickled}; save the adapter with PEFT again")
        try:
            self.tensors = safe_open(self.file, "pt")
        except SafetensorError as error:
            raise ValueError(f"{self.file}: not a safetensors file, or cut off ({error}); save it again") from None
        self.hash = content_hash(self.file, remember=False)
        self.changes: dict[str, Change] = {}
        self.untied: list[str] = []
        self.notes: list[str] = []
        keys = sorted(self.tensors.keys())
        for key in keys:
            dtype = self.tensors.get_slice(key).get_dtype()
            if dtype not in FLOATS:
                raise ValueError(f"{self.file}: {key} is of type {dtype}; an adapter holds bf16, fp16 and fp32")
            if not torch.isfinite(self.tensors.get_tensor(key)).all():
                raise ValueError(f"{self.file}: {key} holds NaN or infinity; take an earlier checkpoint")
        self.architecture = read_architecture(base, modules_of(self.file))
        if unlike := self.architecture.unlike:
            name, (held, wanted) = next(iter(unlike.items()))
            raise ValueError(
                f"{base.folder}: {name} is {held} and config.json makes it {wanted}, so no loader takes the model "
                f"({len(unlike)} such tensors); correct config.json (vocab_size?), or save it again"
            )
        self._find_changes(keys)
        self._check_whole(keys)
        self.jobs = self._plan()
        trained_on = self.config.get("base_model_name_or_path")
        if trained_on and Path(trained_on).name != base.folder.name and str(trained_on) != str(base.folder):
            self.notes.append(f"the adapter says it was trained on {trained_on}; it is folded into {base.folder}")

    def _find_changes(self, keys: list[str]) -> None:
        """Each key of the file finds what it changes; `ValueError` names one that doesn't."""
        parts: dict[str, dict[str, str]] = {}  # parameter -> {A, B, magnitude, copy: key}
        for key in keys:
            match = FACTOR.match(key)
            if match:
                parameter, part = (
                    self._target(match[1]),
                    match[2][-1] if match[2][-1] in "AB" else "magnitude",
                )
            else:
                parameter, part = re.sub(r"\.(modules_to_save|base_layer)\b", "", key).removeprefix(PREFIX), "copy"
            if part in parts.setdefault(parameter, {}):
                raise ValueError(f"{self.file}: {key} and {parts[parameter][part]} change the same tensor")
            parts[parameter][part] = key
        homes = {home.parameter: name for name, home in self.architecture.homes.items()}
        for parameter, part in parts.items():
            tied = next((p for p in self.architecture.ties.get(parameter, [parameter]) if p in homes), parameter)
            key = next(iter(part.values()))
            if tied not in homes:
                raise ValueError(
                    f"{self.file}: {key} {self._shape(key)} finds no home in {self.base.folder}, which has no "
                    f"{parameter}; the adapter was trained on {self.config.get('base_model_name_or_path')}"
                )
            if self.architecture.homes[homes[tied]].converted:
                raise ValueError(
                    f"{self.file}: {key} changes {parameter}, which {self.base.folder} stores in another form than the "
                    f"model has it; {WAY_OUT}"
                )
            change = self._change(parameter, part)
            self._check_shape(parameter, change, part, self._full_shape(tied))
            self.changes[parameter] = change

    def _check_whole(self, keys: list[str]) -> None:
        """`ValueError` where the file lacks what the config says was saved; a note on modules without factors."""
        if not keys:
            raise ValueError(f"{self.file}: holds no tensor; save the adapter again")
        for module in self.config.get("modules_to_save") or []:
            if not any(f".{module}." in f".{key}" for key in keys):
                raise ValueError(
                    f"{self.file}: holds no {module}, which modules_to_save of adapter_config.json names; save the "
                    "adapter again"
                )
        if self.config.get("target_modules") in (None, [], "all-linear"):
            return
        layers = {home.parameter for home in self.architecture.homes.values() if home.parameter.endswith(".weight")}
        lacking = [
            parameter.removesuffix(".weight")
            for parameter in sorted(layers - self.changes.keys())
            if self.architecture.kind(parameter) != "other" and is_targeted(self.config, parameter[: -len(".weight")])
        ]
        if lacking:
            self.notes.append(
                f"adapter_config.json targets {lacking[0]} ({len(lacking)} modules) of which {self.file} has no "
                "factors; they stay as they are"
            )

    def _target(self, module: str) -> str:
        """The parameter that the factors of `module` change; bare ones of one module are wrapped in each other."""
        depth, module = module.count(".base_layer"), module.replace(".base_layer", "")
        bare = self.config.get("target_parameters") or []
        holder = self.architecture.module(module) if bare and self.architecture.model is not None else None
        names = [name for name, _ in holder.named_parameters(recurse=False)] if holder is not None else []
        hits = [n for n in names if any(f"{module}.{n}" == t or f"{module}.{n}".endswith(f".{t}") for t in bare)]
        if hits:
            return f"{module}.{hits[-1 - depth] if depth < len(hits) else hits[0]}"
        return f"{module}.weight"

    def _change(self, parameter: str, part: dict[str, str]) -> Change:
        if part.keys() == {"copy"}:
            return Change("replaced", copy=part["copy"])
        key = next(iter(part.values()))
        if not {"A", "B"} <= part.keys():
            raise ValueError(
                f"{self.file}: {part.get('A') or part.get('B') or key} lacks its other half; save it again"
            )
        if bool(self.config.get("use_dora")) != ("magnitude" in part):
            raise ValueError(f"{self.file}: {key}: use_dora and the stored magnitudes disagree; save the adapter again")
        bare = self.config.get("target_parameters") or []
        kind = self.architecture.kind(parameter)
        if any(parameter == name or parameter.endswith(f".{name}") for name in bare):
            kind = "parameter"
        module = parameter if kind == "parameter" else parameter.rpartition(".")[0]
        if kind != "parameter" and not is_targeted(self.config, module):
            raise ValueError(
                f"{self.file}: {key} is of a module that adapter_config.json leaves out (target_modules, "
                "exclude_modules, layers_to_transform), and PEFT would ignore it; save the adapter again"
            )
        if kind == "other" or (kind == "Embedding") != ("embedding" in part["A"]):
            raise ValueError(f"{self.file}: {key} is LoRA on a layer of another kind ({parameter}); {WAY_OUT}")
        rank, experts = self._shape(part["A"])[0], 1
        if kind == "parameter" and len(shape := self._parameter_shape(parameter)) == 3:
            experts, rank = shape[0], rank // shape[0]
        of = lambda patterns, rest: next(  # as PEFT: the first that is the end of the name
            (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), rest
        )
        alpha = of(self.config.get("alpha_pattern"), self.config["lora_alpha"])
        said = of(self.config.get("rank_pattern"), self.config.get("r", 8))
        if rank != said and rank * experts == self._shape(part["B"])[-1]:  # else the two don't fit each other
            raise ValueError(f"{self.file}: {key} has rank {rank}, adapter_config.json says {said}; save it again")
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        transposed = experts > 1 and self._is_transposed(parameter)
        return Change(kind, (part["A"], part["B"]), part.get("magnitude"), part.get("copy"), scale, experts, transposed)

    def _check_shape(self, parameter: str, change: Change, part: dict[str, str], shape: tuple) -> None:
        """`ValueError` where the adapter's tensors don't fit the base's."""
        trained = f"the adapter was trained on {self.config.get('base_model_name_or_path')}"
        if change.copy and (copied := self._shape(change.copy)) != shape:
            if copied[1:] == shape[1:] and re.search(r"embed|lm_head|wte|shared", parameter):
                raise ValueError(
                    f"{self.file}: brings a vocabulary of {copied[0]} ({parameter}), {self.base.folder} has "
                    f"{shape[0]}. Resize the base first, model.resize_token_embeddings({copied[0]}), save it and "
                    "fold into that"
                )
            raise ValueError(
                f"{self.file}: {change.copy} is {list(copied)}, {list(shape)} in {self.base.folder}; {trained}"
            )
        if change.factors is None:
            return
        a, b = (self._shape(key) for key in change.factors)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(
                f"{self.file}: {change.factors[0]}: the factors {list(a)} and {list(b)} don't fit each other"
            )
        added = (b[0], a[1])
        if change.kind in ("Conv1D", "Embedding"):
            added = added[::-1]
        if change.kind == "parameter" and len(shape) == 3:
            added = (shape[0], *(added[::-1] if self._is_transposed(parameter) else added))
            if a[0] % shape[0]:
                raise ValueError(f"{self.file}: {change.factors[0]}: {a[0]} rows aren't shared by {shape[0]} experts")
        if added != shape:
            what = f"{parameter.removesuffix('.weight')} adds {' x '.join(map(str, added))}"
            raise ValueError(f"{self.file}: {what} to {list(shape)} in {self.base.folder}; {trained}")
        if change.magnitude and self._shape(change.magnitude) != (b[0],):
            raise ValueError(f"{self.file}: {change.magnitude} is {list(self._shape(change.magnitude))}, not [{b[0]}]")

    def _is_transposed(self, parameter: str) -> bool:  # experts stored as (experts, in, out)
        return bool(getattr(self.architecture.module(parameter.rpartition(".")[0]), "is_transposed", False))

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors.get_slice(key).get_shape())

    def _parameter_shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self.architecture.model.get_parameter(parameter).shape)

    def _full_shape(self, parameter: str) -> tuple[int, ...]:
        """The parameter's shape: the stored tensor's, or the class's where it is stored in parts."""
        name, home = next((name, home) for name, home in self.architecture.homes.items() if home.parameter == parameter)
        return self._parameter_shape(parameter) if home.expert is not None else self.base.entries[name].shape

    def _plan(self) -> dict[str, Job]:
        """The tensors of the output in the base's order, then those that are no longer tied."""
        homes, ties = self.architecture.homes, self.architecture.ties
        jobs = {name: Job(entry) for name, entry in self.base.entries.items()}
        for name, home in homes.items():
            jobs[name] = Job(self.base.entries[name], home.parameter, home.expert, home.row)
        stored = {home.parameter: name for name, home in homes.items()}
        for group in {id(group): group for group in ties.values()}.values():
            if not any(parameter in self.changes for parameter in group):
                continue
            if self._stored_apart(group, stored):
                continue
            if len(group) != 2 or self.base.config.get("is_encoder_decoder"):
                raise ValueError(
                    f"{self.file}: changes {next(p for p in group if p in self.changes)}, which a "
                    f"{self.base.config.get('model_type')} shares between {', '.join(group)}, whatever its config "
                    f"says; train without it, or {WAY_OUT}"
                )
            source = next(stored[parameter] for parameter in group if parameter in stored)
            for parameter in group:
                name = stored.get(parameter) or self.architecture.stored_name(parameter)
                jobs[name] = Job(jobs[name].entry if name in jobs else self.base.entries[source], parameter)
            self.untied += [parameter for parameter in group if parameter not in stored] or group[1:]
            self.notes.append(
                f"{' and '.join(group)} were one tensor; the adapter changes them apart, so the output says "
                "tie_word_embeddings: false and holds both"
            )
        return jobs

    def _stored_apart(self, group: list[str], stored: dict[str, str]) -> bool:
        """Whether the file holds all of the group and they differ: then transformers doesn't tie them."""
        names = [stored.get(parameter) for parameter in group]
        if None in names:
            return False
        first, *others = names
        return any(
            any(not np.array_equal(x, y) for x, y in zip(self.base.read(first), self.base.read(other), strict=True))
            for other in others
        )


def fold_tensor(name: str, adapter: Adapter, fold_base: str, dtype: str, write: Callable[[np.ndarray], None]) -> dict:
    """Write one tensor of the output; returns `size`, `how`, and the delta's relative norm.

    `fold_base="dequantised"` adds to what NF4 with double quantisation made of the weight, which QLoRA saw in training.
    """
    job, base = adapter.jobs[name], adapter.base
    entry, change = job.entry, adapter.changes.get(job.parameter)
    record = {"size": entry.size}
    tensor = lambda key: adapter.tensors.get_tensor(key)
    if change and change.kind == "replaced":
        write(encode(_part(tensor(change.copy), job, entry.shape).float().numpy().ravel(), dtype))
        return {**record, "how": "replaced"}
    storage = STORAGE[entry.dtype]
    quantised = fold_base == "dequantised" and adapter.architecture.is_quantised(name, entry.shape)
    if not change and not quantised:
        for bits in read_bits(entry.file, storage, entry.offset, entry.size):
            write(bits if dtype == entry.dtype else encode(decode(bits, entry.dtype), dtype))
        return {**record, "how": "copied"}
    weight = None  # read by rows, unless it has to be whole
    if quantised:
        weight = dequantised(base, entry, adapter.architecture.kind(job.parameter or name) == "Conv1D").numpy()
    elif change and change.copy:
        weight = tensor(change.copy).to(TORCH[entry.dtype]).float().numpy()
    if not change:
        write(encode(weight.ravel(), dtype))
        return {**record, "how": "dequantised"}

    down, up = (tensor(key).float() for key in change.factors)  # (r, in), (out, r)
    magnitude = tensor(change.magnitude).float() if change.magnitude else None
    start, before, added = 0, 0.0, 0.0
    for delta in _deltas(change, job, entry.shape, down, up):  # blocks of rows of the stored tensor
        if weight is not None:
            rows = weight[start : start + len(delta)]
        else:
            offset = entry.offset + start * math.prod(delta.shape[1:]) * storage.itemsize
            (bits,) = read_bits(entry.file, storage, offset, delta.numel(), delta.numel())
            rows = decode(bits, entry.dtype).reshape(delta.shape)
        if (
            change.kind in ("Embedding", "parameter") and magnitude is None and dtype == entry.dtype
        ):  # PEFT rounds twice
            delta = delta.to(TORCH[entry.dtype]).float()
        merged = torch.from_numpy(rows) + delta
        if magnitude is not None:
            merged = _dora(merged, magnitude[start : start + len(delta)], magnitude, change.kind)
        write(encode(merged.numpy(), dtype))
        before += float(np.vdot(rows, rows))
        difference = merged.numpy() - rows
        added += float(np.vdot(difference, difference))
        start += len(delta)
    return {**record, "how": "folded", "relative_delta": math.sqrt(added / before) if before else None}


TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def _part(whole: torch.Tensor, job: Job, shape: tuple) -> torch.Tensor:
    return whole if job.expert is None else whole[job.expert][job.row : job.row + shape[0]]


def _deltas(change: Change, job: Job, shape: tuple, down: torch.Tensor, up: torch.Tensor):
    """scale * B A as the stored tensor has it, in blocks of its first dimension; float32."""
    if change.experts > 1:
        a = down.reshape(change.experts, -1, down.shape[1])  # (experts, r, in)
        b = up.reshape(len(up), -1, change.experts)  # (out, r, experts)
        for expert in range(change.experts) if job.expert is None else [job.expert]:
            one = slice(expert, expert + 1)
            into = "e i o" if change.transposed else "e o i"
            delta = torch.einsum(f"o r e, e r i -> {into}", b[:, :, one], a[one]) * change.scale
            yield delta if job.expert is None else delta[0][job.row : job.row + shape[0]]
    elif change.kind in ("Conv1D", "Embedding"):  # stored (in, out)
        yield ((up @ down).T * change.scale).contiguous()
    else:  # blocks of even height: torch adds in another order in one of a few rows
        count = max(1, min(math.prod(shape) // BLOCK, len(up) // 64))
        for block in torch.tensor_split(up, count):
            yield (block @ down) * change.scale


def _dora(merged: torch.Tensor, rows: torch.Tensor, magnitude: torch.Tensor, kind: str) -> torch.Tensor:
    """Each output's weights at the trained length: a linear layer's rows, columns of what is stored (in, out)."""
    if kind == "Linear":
        return (rows / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
    return (magnitude / torch.linalg.norm(merged.T, dim=1)).view(1, -1) * merged


def dequantised(base: Checkpoint, entry: Entry, transposed: bool = False) -> torch.Tensor:
    """The weight as float32, after NF4 with double quantisation and back, in bf16 as the paper's QLoRA computes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.from_numpy(np.concatenate(list(base.read(entry.name)))).reshape(entry.shape).bfloat16()
    if transposed:  # transformers turns a Conv1D before it is quantised
        weight = weight.T.contiguous()
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    weight = dequantize_4bit(packed, state).float()
    return weight.T.contiguous() if transposed else weight
