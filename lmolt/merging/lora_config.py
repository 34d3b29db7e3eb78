"""adapter_config.json as an allow-list: each key does no harm, is followed, or is refused by name with the way out."""

import json
import math
import re
from pathlib import Path

from lmolt.files import read_json

# adapter_config.json of PEFT 0.3 to 0.21: keys that say how it was trained, named, or found its modules
HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "megatron_core", "qalora_group_size", "runtime_config", "modules_to_save"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),  # of an initialisation; that is checked
    *("fan_in_fan_out", "merge_weights"),  # the architecture decides on the first
}
FOLLOWED = {"lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights", "target_parameters"}
REFUSED = {
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "LoRA's bias",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's layers",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "ensure_weight_tying": "tied adapters",
    "enable_lora": "LoRA on parts of a fused layer",
}
INITS = (True, False, "gaussian", "orthogonal", "eva")  # these leave the base as it is
WAY_OUT = "merge it with PEFT's merge_and_unload, and save that"


def read_config(folder: Path) -> dict:
    """adapter_config.json, checked key by key against the allow-list; `ValueError` names what is refused."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; --adapter takes the folder of a PEFT adapter")
    config = read_json(file)
    if not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{file}: names no peft_type; save the adapter again")
    if config["peft_type"] != "LORA":
        raise ValueError(f"{file}: peft_type {config['peft_type']} is not supported, only LORA; {WAY_OUT}")
    for key, value in config.items():
        if key in HARMLESS | FOLLOWED or value in (None, False) or value in ([], {}, ""):
            continue
        what = REFUSED.get(key, "which no PEFT up to 0.21 writes")
        raise ValueError(f"{file}: {key} = {json.dumps(value)[:60]} ({what}) is not supported; {WAY_OUT}")
    _check_kinds(file, config)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() in ("true", "false"):
        init = init.lower() == "true"
    if init not in INITS:
        raise ValueError(
            f"{file}: init_lora_weights = {init!r} is not supported: it may change the base before training, and the "
            "file's factors belong to that base. Save the adapter where it was trained with PEFT's "
            f"save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL), or there {WAY_OUT}"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"{file}: bias = {config['bias']!r} is none, all or lora_only")
    patterns = config.get("alpha_pattern") or {}
    for value in (config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{file}: lora_alpha and alpha_pattern hold numbers, not {value!r}")
    return config


KINDS = dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out"), bool) | {
    **dict.fromkeys(("alpha_pattern", "rank_pattern"), dict),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), str | list),
    **dict.fromkeys(("modules_to_save", "target_parameters"), list),
    "layers_to_transform": int | list,
}


def _check_kinds(file: Path, config: dict) -> None:
    """`ValueError` on a value of another kind than PEFT writes, or a pattern that is none."""
    for key, kind in KINDS.items():
        value, inner = config.get(key), int if key == "layers_to_transform" else str
        odd = isinstance(value, list) and not all(type(item) is inner for item in value)
        if value is not None and (odd or not isinstance(value, kind)):
            raise ValueError(
                f"{file}: {key} = {json.dumps(value)[:60]} is not what PEFT writes; save the adapter again"
            )
        patterns = [value] if isinstance(value, str) else list(value) if kind is dict and value else []
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{file}: {key}: {pattern!r} is no pattern ({error}); save the adapter again"
                ) from None


def is_targeted(config: dict, module: str) -> bool:
    """Whether PEFT would load factors of `module`, by its name in the model that was trained, or ignore them."""

    def named(names: str | list[str]) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(f".{module}".endswith(f".{name}") for name in names)

    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if config.get("exclude_modules") and named(config["exclude_modules"]):
        return False
    if not targets or targets == "all-linear":
        return True
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return named(targets)
    patterns = config.get("layers_pattern") or "[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = next((m for p in patterns if (m := re.match(rf".*?\.{p}\.(\d+)\.", f".{module}"))), None)
    return named(targets) and found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
