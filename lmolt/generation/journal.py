"""Finished rows on disk, so that a killed run makes none twice: a folder with a file a process, a line a row."""

import json
import logging
import os
import zlib
from pathlib import Path

logger = logging.getLogger(__name__)


def read_journal(journal: str | Path | None) -> dict:
    """Finished rows, key -> output. A line that a kill cut off is passed over: its row is translated again.

    So is a whole line that isn't as it was written, with a warning.
    """
    finished = {}
    for file in sorted(Path(journal).glob("*.jsonl")) if journal else []:
        for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
            try:
                row = json.loads(line)
                if row["crc"] != _checksum(row["key"], row["output"]):
                    raise ValueError("it has changed since it was written")
                finished[row["key"]] = row["output"]
            except (ValueError, KeyError, TypeError, RecursionError):
                if line.endswith(b"}"):
                    logger.warning("%s line %d is damaged: its row is translated again", file, number)
    return finished


def _checksum(key: str, output) -> int:
    return zlib.crc32(json.dumps([key, output]).encode())


class Journal:
    """Appends finished rows to this process's file of the journal; each batch is on disk before the next starts."""

    def __init__(self, journal: str | Path | None, process: int):
        self.path = None if journal is None else Path(journal) / f"process-{process}.jsonl"

    def __enter__(self):
        if self.path is None:
            return lambda _: None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("ab")
        if self.file.tell():
            self.file.write(b"\n")  # ends a line that a kill cut off
        return self._record

    def _record(self, finished: dict) -> None:
        for key, text in finished.items():
            row = {"key": key, "output": text, "crc": _checksum(key, text)}
            self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, *_):
        if self.path is not None:
            self.file.close()
