"""Checkpoints that can be trusted: each carries a manifest, and an incomplete one is passed over, aloud."""

import json
import logging
import re
from pathlib import Path

from lmolt.files import sha256_file, write_whole

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
    for name, (size, digest) in json.loads((checkpoint / MANIFEST).read_text()).items():
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if sha256_file(file) != digest:
            return f"{name} has changed since it was saved"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, the latest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: -int(p.name.split("-")[1]))


def last_good_checkpoint(output_dir: Path) -> Path | None:
    """The latest checkpoint that is whole; each one passed over is named in a warning. None if there is none."""
    for checkpoint in checkpoints(output_dir):
        wrong = what_is_wrong(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning("%s can't be resumed from: %s; trying the one before", checkpoint, wrong)
    return None
