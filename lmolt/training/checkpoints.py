"""Checkpoints that can be trusted: each carries a manifest, and an incomplete one is passed over, aloud."""

import contextlib
import errno
import json
import logging
import os
import re
import socket
import tempfile
import time
from pathlib import Path

from safetensors import SafetensorError

from lmolt.distributed import strategy
from lmolt.files import read_json, sha256_file, write_whole

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)


def write_manifest(checkpoint: Path) -> None:
    """Record size and hash of every file. Written last and by rename: a checkpoint without it is not finished."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {str(p.relative_to(checkpoint)): [p.stat().st_size, sha256_file(p)] for p in files}
    write_whole(checkpoint / MANIFEST, json.dumps(entries, indent=1))


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be used, in words; None if each file is there and unchanged."""
    if not (checkpoint / MANIFEST).exists():
        return "its saving was interrupted (no manifest.json)"
    try:
        entries = [(name, int(size), str(digest)) for name, (size, digest) in read_json(checkpoint / MANIFEST).items()]
    except (ValueError, TypeError):
        return "its manifest.json is damaged"
    for name, size, digest in entries:
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256_file(file) != digest:
            return f"{name} has changed since it was saved"
    try:
        held = step_of(checkpoint)
    except (OSError, ValueError, KeyError, TypeError):
        return "its trainer_state.json says no step"
    if re.fullmatch(r"checkpoint-\d+", checkpoint.name) and checkpoint.name != f"checkpoint-{held}":
        return f"it is of step {held}, and was renamed"
    return None


def step_of(checkpoint: Path) -> int:
    """How many optimizer steps a whole checkpoint has behind it, whatever its folder is called."""
    return int(read_json(checkpoint / "trainer_state.json")["global_step"])


def check_seen_alike(checkpoint: Path, patience: float = 30.0) -> None:
    """`ValueError` on all processes where one doesn't see the checkpoint as the first does.

    A shared disk may show a new checkpoint to other machines some seconds late (`patience`).
    """
    manifest = strategy.first_decides(lambda: (checkpoint / MANIFEST).read_text())
    end, same = time.monotonic() + patience, False
    while not same:
        with contextlib.suppress(OSError, ValueError):
            same = (checkpoint / MANIFEST).read_text() == manifest
        if same or time.monotonic() > end:
            break
        time.sleep(1)
    strategy.all_agree(
        None
        if same
        else f"the first process resumes from {checkpoint}, which is another one, or none, on {socket.gethostname()}; "
        "all machines need the same --output_dir, on a disk that they share"
    )


@contextlib.contextmanager
def full_disk_is_named(folder: Path):
    """Where a disk that is full stops what is done inside, an `OSError` says so and names `folder`.

    torch, safetensors and tokenizers have errors of their own for that, without the folder, and some without the cause.
    Others, such as a `ValueError` about what the user gave, pass as they are.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise  # tokenizers' Rust raises Exception itself
        try:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(bytes(1 << 20))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as full:
            if full.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    full.errno,
                    f"{full.strerror}; make room there, and --resume_from_checkpoint true goes on",
                    str(folder),
                ) from error
        raise


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, the latest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a checkpoint holds its optimizer's states and its schedule, in one of the strategies' formats."""
    states = [*checkpoint.glob("optimizer*"), *checkpoint.glob("global_step*")]  # DDP and FSDP; DeepSpeed
    return bool(states) and (checkpoint / "scheduler.pt").exists()


def best_so_far(checkpoint: Path, output_dir: Path) -> Path | None:
    """The best checkpoint up to `checkpoint`, by its name, in the folders as they are now; None if it names none.

    `ValueError` where it isn't there, or isn't as it was saved.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    if not state.get("best_global_step"):
        return None
    name = f"checkpoint-{state['best_global_step']}"
    folders = [folder / name for folder in (output_dir, checkpoint.parent) if (folder / name).is_dir()]
    wrong = what_is_wrong(folders[0]) if folders else "it isn't there"
    if wrong:
        raise ValueError(
            f"{output_dir / name} is the best checkpoint so far, and can't be used: {wrong}; put it back, or keep the "
            "last one instead of the best with --load_best_model_at_end false"
        )
    return folders[0]


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """The latest checkpoint that is whole; each one passed over is named in a warning. None if there is none."""
    for checkpoint in checkpoints(output_dir):
        wrong = what_is_wrong(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning("%s can't be resumed from: %s; trying the one before", checkpoint, wrong)
    if checkpoints(output_dir):
        logger.warning("%s holds no checkpoint that can be resumed from: training starts anew", output_dir)
    return None
