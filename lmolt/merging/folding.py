"""Folding a LoRA or QLoRA adapter into its base: W + scale * B A, streamed, as PEFT's `merge_and_unload` does it.

scale = alpha / r, with rsLoRA alpha / sqrt(r). Bit for bit PEFT's result on the full-precision base, so the product is
torch's, in blocks of rows: numpy's BLAS adds in another order. Never into 4-bit weights in place: quantised again, they
keep 1 to 4 % of the delta.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lmolt.merging.safetensors_io import STORAGE, Checkpoint, decode, encode, read_bits

BLOCK = 1 << 22  # values of the delta at a time: 16 MiB
UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA on bare parameters",
    "lora_bias": "LoRA's bias",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's layers",
}


class Adapter:
    """A PEFT LoRA folder: `factors` {tensor of the base: (key of A, key of B)}, `replaced` {tensor: key}."""

    def __init__(self, folder: Path, base: Checkpoint):
        config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        for file in (config, weights):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: there is no such file; --adapter takes the folder of a PEFT adapter")
        self.config = json.loads(config.read_text())
        if self.config["peft_type"] != "LORA":
            raise ValueError(f"{config}: {self.config['peft_type']} is not supported, only LORA; fold it with PEFT")
        for key, name in UNSUPPORTED.items():
            if self.config.get(key):
                raise ValueError(f"{config}: {name} ({key}) is not supported; fold it with PEFT's merge_and_unload")
        self.file = weights
        with weights.open("rb") as stream:
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        try:
            self.tensors = safe_open(weights, "pt")
        except SafetensorError as error:
            raise ValueError(f"{weights}: not a safetensors file, or cut off ({error}); save it again") from error
        self.factors, self.replaced = {}, {}
        shapes = {name: entry.shape for name, entry in base.entries.items()}
        keys = set(self.tensors.keys())
        for key in sorted(keys):
            name = re.sub(r"\.(modules_to_save|base_layer)", "", key.removeprefix("base_model.model."))
            module = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
            if module and (home := module[1] + ".weight") in shapes:
                pair = tuple(re.sub(r"lora_[AB]\.weight$", f"lora_{side}.weight", key) for side in "AB")
                if not keys.issuperset(pair):
                    raise ValueError(f"{weights}: {key} lacks its other half; save the adapter again")
                self.factors[home] = pair
                columns, rows = (self._shape(key)[axis] for key, axis in zip(pair, (1, 0), strict=True))
                rows, columns = (columns, rows) if self.config.get("fan_in_fan_out") else (rows, columns)
                if (rows, columns) != shapes[home]:
                    raise ValueError(
                        f"{weights}: {module[1]} adds {rows} x {columns} to {list(shapes[home])} in {base.folder};"
                        f" the adapter was trained on {self.config['base_model_name_or_path']}"
                    )
            elif name in shapes and self._shape(key) == shapes[name]:
                self.replaced[name] = key
            else:
                raise ValueError(
                    f"{weights}: {key} {list(self._shape(key))} finds no home in {base.folder};"
                    f" the adapter was trained on {self.config['base_model_name_or_path']}"
                )
        for key in keys:
            if not torch.isfinite(self.tensors.get_tensor(key)).all():
                raise ValueError(f"{weights}: {key} holds NaN or infinity; take an earlier checkpoint")

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors.get_slice(key).get_shape())

    def scale(self, name: str, rank: int) -> float:
        """alpha / r (rsLoRA: / sqrt(r)) of a tensor; PEFT's `alpha_pattern` matches the end of a module's name."""
        module, alpha = name.removesuffix(".weight"), self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def fold_tensor(
    name: str, base: Checkpoint, adapter: Adapter, fold_base: str, dtype: str, write: Callable[[np.ndarray], None]
) -> dict:
    """Write one tensor of the base with the adapter folded in; returns `size`, `how`, and the delta's relative norm.

    `fold_base="dequantised"` adds to what NF4 with double quantisation made of the weight, which QLoRA saw in training.
    """
    entry = base.entries[name]
    record = {"size": entry.size}
    if name in adapter.replaced:
        values = adapter.tensors.get_tensor(adapter.replaced[name]).float().numpy().ravel()
        write(encode(values, dtype))
        return {**record, "how": "replaced"}
    storage = STORAGE[entry.dtype]
    quantised = fold_base == "dequantised" and is_quantised_by_qlora(entry)
    if name not in adapter.factors and not quantised:
        for bits in read_bits(entry.file, storage, entry.offset, entry.size):
            write(bits if dtype == entry.dtype else encode(decode(bits, entry.dtype), dtype))
        return {**record, "how": "copied"}
    if quantised:
        weight = dequantised(base, entry)
    if name not in adapter.factors:
        write(encode(weight.numpy().ravel(), dtype))
        return {**record, "how": "dequantised"}

    down, up = (adapter.tensors.get_tensor(key).float() for key in adapter.factors[name])  # (r, in), (out, r)
    scale = adapter.scale(name, len(down))
    if adapter.config.get("fan_in_fan_out"):  # Conv1D stores (in, out)
        blocks = [(up @ down).T.contiguous()]
    else:  # blocks of even height: torch adds in another order in one of a few rows
        count = max(1, min(entry.size // BLOCK, len(up) // 64))
        blocks = (block @ down for block in torch.tensor_split(up, count))
    start, before, added = 0, 0.0, 0.0
    for block in blocks:
        delta = (block * scale).numpy()
        if quantised:
            rows = weight[start : start + len(delta)].numpy()
        else:
            offset = entry.offset + start * delta.shape[1] * storage.itemsize
            (bits,) = read_bits(entry.file, storage, offset, delta.size, delta.size)
            rows = decode(bits, entry.dtype).reshape(delta.shape)
        write(encode(rows + delta, dtype))
        before += float(np.vdot(rows, rows))
        added += float(np.vdot(delta, delta))
        start += len(delta)
    return {**record, "how": "folded", "relative_delta": math.sqrt(added / before) if before else None}


def is_quantised_by_qlora(entry) -> bool:
    """Whether transformers stores this tensor in 4 bits: the linear layers' weights but for the head's."""
    return len(entry.shape) == 2 and not re.search(r"embed|lm_head|wte|wpe|shared", entry.name)


def dequantised(base: Checkpoint, entry) -> torch.Tensor:
    """The weight as float32, after NF4 with double quantisation and back, in bf16 as the paper's QLoRA computes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.from_numpy(np.concatenate(list(base.read(entry.name)))).reshape(entry.shape).bfloat16()
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).float()


def plain_fold(name: str, base: Checkpoint, adapter: Adapter, fold_base: str) -> np.ndarray:
    """The same tensor by the formula, flat, in float64, for --verify."""
    entry = base.entries[name]
    if name in adapter.replaced:
        return adapter.tensors.get_tensor(adapter.replaced[name]).double().numpy().ravel()
    if fold_base == "dequantised" and is_quantised_by_qlora(entry):
        weight = dequantised(base, entry).double().numpy()
    else:
        weight = np.concatenate(list(base.read(name, np.float64))).reshape(entry.shape)
    if name in adapter.factors:
        down, up = (adapter.tensors.get_tensor(key).double().numpy() for key in adapter.factors[name])
        delta = adapter.scale(name, len(down)) * up @ down
        weight = weight + (delta.T if adapter.config.get("fan_in_fan_out") else delta)
    return weight.ravel()
