"""Finished rows on disk, so that a killed run makes none twice: a folder with a file a process, a line a row."""

import json
import os
from pathlib import Path


def read_journal(journal: str | Path | None) -> dict:
    """Finished rows, key -> output. A line that a kill cut off is passed over: its row is translated again."""
    finished = {}
    for file in sorted(Path(journal).glob("*.jsonl")) if journal else []:
        for line in file.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                finished[row["key"]] = row["output"]
            except (ValueError, KeyError, TypeError):
                continue
    return finished


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
            self.file.write(json.dumps({"key": key, "output": text}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, *_):
        if self.path is not None:
            self.file.close()
