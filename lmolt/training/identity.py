"""What a run is: hashes of all that it reads, its loss, adapter, optimizer, schedule, seeds and precision.

It lies in every checkpoint. A resumed run has the same identity, or is refused by name; what may change between two
starts (`MAY_CHANGE`) is recorded with the step at which it did.
"""

import json
import socket
from pathlib import Path

from lmolt.files import content_hash, write_whole
from lmolt.models.excerpt import four_bit
from lmolt.models.hashes import adapter_hash, model_hashes
from lmolt.training import flags
from lmolt.training.losses import LOSSES, PARAMETERS

FILE = "identity.json"
KEYS = {"fixed": dict, "chosen": dict, "may_change": dict, "changes": list}
# LMolT's own flags that may differ when a run is resumed; what is named by a path is compared by its content.
OWN_MAY_CHANGE = (
    "model",
    "revision",
    "adapter",
    "triples",
    "pairs",
    "eval_triples",
    "overwrite_output_dir",
    "trust_remote_code",
)
OWN_MAY_CHANGE += ("eval_translations", "eval_max_new_tokens", "early_stopping_patience", "stalled_after")


def of_inputs(args) -> dict:
    """What is known before the model is loaded: content of all inputs, loss, and each flag that may not change."""
    inputs = model_hashes(args.model, args.revision)
    inputs["start adapter"] = adapter_hash(args.adapter) if args.adapter else None
    for name in ("triples", "pairs", "eval_triples"):
        inputs[f"--{name}"] = content_hash(getattr(args, name)) if getattr(args, name) else None
    own = args.loss_parameters
    skipped = {*flags.MAY_CHANGE, *flags.REFUSED, *OWN_MAY_CHANGE, *(PARAMETERS.keys() - own.keys())}
    fixed = {f"--{name}": value for name, value in args.to_dict().items() if name not in skipped}
    fixed["--metric_for_best_model"] = args.metric_for_best_model or "loss"  # unset where nothing is evaluated
    fixed["--greater_is_better"] = bool(args.greater_is_better)
    if LOSSES[args.loss].depends_on_split and not args.tokens_per_batch:
        fixed["triples a micro-batch"] = args.per_device_train_batch_size
    return _plain(inputs | fixed)


def of_policy(model, accelerator) -> dict:
    """What is known once the policy is there: LoRA as PEFT has it, precision as accelerate runs it."""
    (config,) = model.peft_config.values()
    lora = config.to_dict()
    for name in ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"):
        lora.pop(name, None)
    lora = {f"adapter's {name}": value for name, value in lora.items() if value is not None}
    precision = {"precision": accelerator.mixed_precision, "base's dtype": str(model.dtype)}
    computes = sorted({str(module.compute_dtype) for module in four_bit(model)})
    return _plain(lora | precision | {"NF4 computes in": ", ".join(computes) or "not quantised"})


def unlike(first: dict, own: dict) -> str | None:
    """What of this process's policy (`of_policy`) is not as the first process has it; None where all is."""
    differing = [
        f"{key} is {_short(own.get(key))}, and {_short(first.get(key))}"
        for key in first | own
        if own.get(key) != first.get(key)
    ]
    if not differing:
        return None
    return (
        f"{'; '.join(differing)} in the first process: the machine {socket.gethostname()} is of another kind; --bf16 "
        "true or false may say the same to both, or leave it out"
    )


def _plain(values: dict) -> dict:
    """As JSON gives it back: sets in order, enumerations by value, what JSON doesn't know as text."""
    as_text = lambda value: sorted(value) if isinstance(value, set | frozenset) else str(value)
    return json.loads(json.dumps(values, default=as_text, sort_keys=True))


# --- in a checkpoint


def write(checkpoint: Path, fixed: dict, may_change: dict, chosen: dict, changes: list[dict]) -> None:
    """`fixed` has to be the same at a resumption, `chosen` is taken over by it; `changes` are those so far."""
    record = {"fixed": fixed, "chosen": chosen, "may_change": may_change, "changes": changes}
    write_whole(checkpoint / FILE, json.dumps(record, indent=1))


def read(checkpoint: Path) -> dict:
    """What `write` wrote; `ValueError` for a checkpoint without it."""
    try:
        record = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
        if not all(isinstance(record[key], kind) for key, kind in KEYS.items()):
            raise TypeError("it has other entries")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / FILE} doesn't say what the checkpoint was trained with ({type(error).__name__}: {error}), "
            f"so it can't be resumed; train on from the adapter in it: --adapter {checkpoint}"
        ) from None
    return record


def check_same(checkpoint: Path, before: dict, now: dict) -> None:
    """`ValueError` names what differs, old value beside new, of the keys in `now`."""
    absent = object()
    differing = [key for key in now if before.get(key, absent) != now[key]]
    if differing:
        shown = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now[key])}" for key in differing)
        raise ValueError(
            f"{checkpoint} is of another run: {shown}. Resume with what it was, choose another --output_dir, or start "
            f"anew from the adapter in it (--adapter {checkpoint})"
        )


def changes_since(record: dict, may_change: dict, step: int) -> list[dict]:
    """The changes recorded so far, and what differs now of what may, with the step from which it counts."""
    before = record["may_change"]
    differing = {key: value for key, value in may_change.items() if before.get(key) != value}
    new = [{"step": step, "key": key, "before": before.get(key), "after": now} for key, now in differing.items()]
    return record["changes"] + new


def may_change(args, versions: dict[str, str]) -> dict:
    """What may be another in a resumed run, and is recorded: flags, and the versions of packages."""
    changing = {*flags.MAY_CHANGE, *OWN_MAY_CHANGE} - {"resume_from_checkpoint", "overwrite_output_dir"}
    values = {f"--{name}": value for name, value in args.to_dict().items() if name in changing and "token" not in name}
    return _plain(values | {f"{name}'s version": version for name, version in versions.items()})


def _short(value) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
