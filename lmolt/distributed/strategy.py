"""How processes share out the work: what really runs, what it can't do, what can be resumed, and how they part."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from xxhash import xxh3_128_hexdigest

from lmolt.distributed.heartbeat import HEARTBEAT

FILE = "strategy.json"
REMEDIES = {
    DistributedType.DEEPSPEED: "leave `use_cpu` false in its configuration; on CPUs set DS_ACCELERATOR=cpu",
    DistributedType.FSDP: "it needs GPUs; on CPUs take accelerate_configs/zero3.yaml",
}


def strategy_of(accelerator: Accelerator) -> dict:
    """`name` (single, DDP, ZeRO-2, ...), `offload`, `world_size`. `ValueError` where it isn't what was asked for.

    accelerate falls back to DDP without a word where a CPU's run asks for FSDP, or sets `use_cpu` for DeepSpeed.
    """
    kind, plugin = accelerator.distributed_type, accelerator.state.deepspeed_plugin
    for wanted, remedy in REMEDIES.items():
        if os.environ.get(f"ACCELERATE_USE_{wanted.value}", "false").lower() == "true" and kind != wanted:
            raise ValueError(f"{wanted.value} was asked for and {kind.value} would run; {remedy}")
    name, offload = "DDP", "none"
    if kind == DistributedType.NO:
        name = "single"
    elif kind == DistributedType.FSDP:
        name = "FSDP"
    elif kind == DistributedType.DEEPSPEED:
        name, offload = f"ZeRO-{plugin.zero_stage}", plugin.offload_param_device
    return {"name": name, "offload": offload or "none", "world_size": accelerator.num_processes}


def wait_for_compiler(patience: float = 900) -> None:
    """Wait while another start compiles DeepSpeed's kernels; `ValueError` where a killed one left its lock for ever.

    That lock is a file which its process keeps open (torch.utils.file_baton), and which DeepSpeed waits for without a
    word and without end. One that no process of this machine has open may be another machine's, of a shared folder:
    only one of more than `patience` seconds is taken for a killed start's.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()).resolve()
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        told = False
        while not is_open(lock) and (age := _age(lock)) is not None:
            if age > patience:
                raise ValueError(
                    f"{lock} is {age / 60:.0f} min old and no process of this machine has it open: a start was killed "
                    "while DeepSpeed compiled, and each later one would wait for it for ever; delete that file"
                )
            if not told and os.environ.get("RANK", "0") == "0":
                print(f"waits at most {patience / 60:.0f} min for another machine that compiles: {lock}", flush=True)
            told = True
            time.sleep(0.5)


def _age(path: Path) -> float | None:
    """Seconds since it was made; None where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return None


def is_open(path: Path) -> bool:
    """Whether a process of this machine has it open, of those that one may look at."""
    for process in Path("/proc").iterdir() if Path("/proc").exists() else ():
        with contextlib.suppress(OSError):  # it is none, has ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
                    if descriptor.readlink() == path:
                        return True
    return False


def keep_outputs_exact(plugin) -> None:
    """FSDP in bf16 would round log-probabilities, which the model gives in fp32, and sum gradients in bf16."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )


def unused_accelerator() -> str | None:
    """Why training runs on the CPU though there is something faster; None where there is nothing."""
    if torch.backends.mps.is_available():
        return "Apple's GPU has neither NF4 nor float64, which the losses are summed in: this runs on the CPU"
    if Path("/dev/accel0").exists() or os.environ.get("PJRT_DEVICE") == "TPU":
        return "TPUs aren't supported (no NF4, no shapes known ahead): this runs on the CPU"
    return None


def check_translations(strategy: dict) -> None:
    """`ValueError` where no process holds the whole model: each translates another number of tokens, and would wait."""
    if strategy["name"] in ("ZeRO-3", "FSDP"):
        raise ValueError(
            f"--eval_translations needs the whole model in each process, and {strategy['name']} shards it; take "
            "accelerate_configs/zero2.yaml, or translate with scripts/evaluate.py after training"
        )


def write(checkpoint: Path, strategy: dict) -> None:
    (checkpoint / FILE).write_text(json.dumps(strategy, indent=1))


def check_resumable(checkpoint: Path, strategy: dict) -> None:
    """`ValueError` where `strategy` can't go on from a checkpoint: its optimizer's shards or its batches don't fit, or
    it is another user's and would run code: DeepSpeed and FSDP unpickle what they find there."""
    before = json.loads((checkpoint / FILE).read_text())
    words = lambda s: f"{s['name']} in {s['world_size']} process{'es' * (s['world_size'] > 1)}"
    whole = {"single", "DDP"}  # the optimizer's states are in one file, whatever the number of processes
    fits = before["name"] == strategy["name"] and before["world_size"] == strategy["world_size"]
    if not (fits or {before["name"], strategy["name"]} <= whole):
        raise ValueError(
            f"{checkpoint} was saved by {words(before)} and holds its shards; it can't be resumed by "
            f"{words(strategy)}. Resume as it was, or train on from the adapter in it: --adapter {checkpoint}"
        )
    if strategy["name"].startswith("ZeRO") or strategy["name"] == "FSDP":
        for path in (checkpoint, *checkpoint.rglob("*")):
            link, its = path.lstat(), path.stat()
            whose = "belongs to another user" if {link.st_uid, its.st_uid} != {os.getuid()} else ""
            if whose := whose or ("can be written by any user" if its.st_mode & 0o002 else ""):
                raise ValueError(
                    f"{path} {whose}, and resuming under {strategy['name']} would run any code in it "
                    f"(its shards are pickles); train on from the adapter, which holds none: --adapter {checkpoint}"
                )
    if before["triples_per_step"] != strategy["triples_per_step"]:
        raise ValueError(
            f"{checkpoint} was saved with {before['triples_per_step']} triples a step, and this run has "
            f"{strategy['triples_per_step']}; give --gradient_accumulation_steps so that processes x batch size x "
            "accumulation stay the same"
        )


@contextlib.contextmanager
def gathered(model):
    """For forward passes of weights that were shared out as they were loaded (ZeRO-3 without NF4), without an engine.

    All processes have to make the same passes: a decoder layer is whole on each of them while it computes, no longer.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    import deepspeed

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    whole, layers = [m for m in base.modules() if type(m).__name__ in (base._no_split_modules or ())], set()
    for layer in whole:
        layers.update(layer.modules())
    handles = []
    for module in [*whole, *(m for m in base.modules() if m not in layers)]:
        parameters = [p for p in module.parameters(recurse=module in layers) if hasattr(p, "ds_id")]
        if parameters:
            at_hand = deepspeed.zero.GatheredParameters(parameters)
            handles.append(module.register_forward_pre_hook(lambda *_, gather=at_hand: gather.__enter__()))
            leave = lambda *_, gather=at_hand: gather.__exit__(None, None, None)
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_decides(function: Callable[[], Any]) -> Any:
    """What `function()` gives on the first process, on all of them; so also its `ValueError` or `OSError`."""
    state, outcome = PartialState(), [None, None]
    if state.is_main_process:
        try:
            outcome[0] = function()
        except (ValueError, OSError) as error:
            if state.num_processes == 1:
                raise
            outcome[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def all_agree(wrong: str | None) -> None:
    """`ValueError` in all processes where one of them says what is `wrong`."""
    state = PartialState()
    said = gather_object([wrong]) if state.num_processes > 1 else [wrong]
    for rank, text in enumerate(said):
        if text:
            raise ValueError(text + f" (process {rank})" * (state.num_processes > 1))


def all_have(value: Any, otherwise: str) -> None:
    """`ValueError` in all processes where one has another `value` (its `repr`) than the first, said by `otherwise`."""
    state, digest = PartialState(), xxh3_128_hexdigest(repr(value).encode())
    seen = gather_object([digest]) if state.num_processes > 1 else [digest]
    for rank, other in enumerate(seen):
        if other != seen[0]:
            raise ValueError(f"process {rank} {otherwise}")


def shared_out(function: Callable[[Any], Any], rows: list) -> list:
    """[function(row) for row in rows] on all processes, each of which computes its share.

    A `ValueError` of one is one of all, and so are rows that differ between them: another machine's file may be older.
    """
    state = PartialState()
    if state.num_processes == 1:
        return list(map(function, rows))
    all_have(rows, "reads other rows than the first; give all machines the same file")
    own, wrong = [], None
    try:
        own = [function(row) for row in rows[state.process_index :: state.num_processes]]
    except ValueError as error:
        wrong = str(error)
    all_agree(wrong)
    whole: list = [None] * len(rows)
    for rank, share in enumerate(gather_object([own])):
        whole[rank :: state.num_processes] = share
    return whole


def exit_other_processes(code: int = 0) -> None:
    """The end of what the processes do together: the first goes on alone for as long as it takes, the others end here.

    They end without ado, with exit code `code`: an interpreter that finalizes while a thread of gloo's still frees a
    tensor of an exchange is aborted ("terminate called without an active exception"), and the launcher would then end
    the first process, which still writes or uploads. No barrier helps: FSDP and DeepSpeed have groups of their own.
    """
    state = PartialState()
    state.wait_for_everyone()
    HEARTBEAT.stop()
    state.destroy_process_group()
    if not state.is_main_process:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
