"""Signs of life between a run's processes: one that is stopped, dead or stuck is named within a minute, not waited for.

A thread of each process writes a count to the store by which the processes found each other (torch's TCPStore, over a
connection of its own) every few seconds, and reads that of the next. One that gives none for LMOLT_LOST_AFTER seconds
(30) is named, ended if it is on this machine, and the launcher ends the others. The same thread looks at its own main
thread: in training, where the time from one micro-batch to the next is much longer than any before, the process that is
behind is named (`limit`). Loading, evaluating and saving take as long as they take, and what a process waits for a CPU
or for its pages doesn't count: a busy machine is slow, not stuck.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
from torch.distributed import DistStoreError, TCPStore, is_initialized
from transformers import TrainerCallback

LOST_AFTER = float(os.environ.get("LMOLT_LOST_AFTER", 30))
GRACE = 10  # seconds in which the launcher may end this process, once it is told


class Heartbeat:
    """This process's signs of life; `start` once the processes have found each other, `stop` before they part."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.store, self.running = None, False
        self.limit: float | None = None  # seconds without progress; None: ten times the longest so far, at least 60
        self.done = self.steps = 0
        self.longest, self.last = 0.0, None  # seconds; when the last micro-batch ended, None while none is expected

    def start(self) -> None:
        if self.running or (self.world > 1 and not is_initialized()):
            return
        if self.world > 1:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            with contextlib.suppress(DistStoreError):  # another kind of rendezvous, without a store at that place
                self.store = TCPStore(address, port, None, False, timeout=timedelta(seconds=max(2, LOST_AFTER / 3)))
        self.running = True
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def stop(self) -> None:
        self.running, self.last = False, None
        with contextlib.suppress(DistStoreError, RuntimeError):
            if self.store is not None:
                self.store.set(f"lmolt/beat/{self.rank}", "left")

    def progress(self) -> None:
        """A micro-batch is done, or the first of some begins."""
        now = time.monotonic()
        if self.last is not None:
            self.longest = max(self.longest, now - self.last)
        self.last, self.done = now, self.done + 1

    def pause(self) -> None:
        self.last = None

    def _run(self) -> None:
        beat, neighbour, seen, before, worked = 0, (self.rank + 1) % self.world, None, time.monotonic(), 0.0
        heard, done, stalled, waits = time.monotonic(), 0, 0.0, _waits()
        while self.running:
            time.sleep(LOST_AFTER / 10)
            now, beat = time.monotonic(), beat + 1
            if now - before > LOST_AFTER / 2:  # this process itself was stopped, and perhaps all were
                heard, stalled = now, 0.0
            if self.last is None or self.done != done:
                done, stalled = self.done, 0.0
            earlier, waits = waits, _waits()
            if not any(now_waited - earlier.get(what, 0.0) > (now - before) / 2 for what, now_waited in waits.items()):
                stalled += now - before
            before = now
            if self.steps and stalled > self._limit():
                self._give_up(self._who_is_behind(stalled))
            if self.store is None:
                continue
            try:
                self.store.set(f"lmolt/beat/{self.rank}", f"{beat} {self.done} {os.getpid()} {socket.gethostname()}")
                theirs = self._read(neighbour)
            except (DistStoreError, RuntimeError) as error:
                if self.running:
                    reason = " ".join(str(error).split())[:100]
                    self._give_up(f"the machine of the first process is lost, or its launcher is ({reason})")
                return
            if theirs != seen or theirs in (None, "left"):
                seen, heard = theirs, now
            elif now - heard > LOST_AFTER:
                _, _, pid, host = theirs.split(" ", 3)
                here = host == socket.gethostname()
                state, work = _state(int(pid)) if here else (None, 0.0)
                if here and state not in (None, psutil.STATUS_STOPPED) and work > worked:
                    heard, worked = now, work  # it computes, without letting its other threads run
                    continue
                what = "is stopped" if state == psutil.STATUS_STOPPED else "is lost"
                self._give_up(
                    f"process {neighbour} of {self.world} (pid {pid} on {host}) {what}: no sign of life for "
                    f"{LOST_AFTER:g} s",
                    int(pid) if here else None,
                )

    def _read(self, rank: int) -> str | None:
        key = f"lmolt/beat/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _limit(self) -> float:
        return self.limit if self.limit is not None else max(60.0, 10 * self.longest)

    def _who_is_behind(self, seconds: float) -> str:
        where = sys._current_frames().get(threading.main_thread().ident)
        place = f", in {where.f_code.co_filename} line {where.f_lineno}" if where else ""
        who, done = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})", self.done
        if self.store is not None:
            beats = [
                (int(b.split(" ")[1]), r, b) for r in range(self.world) if (b := self._read(r)) not in (None, "left")
            ]
            least, rank, theirs = min(beats, default=(done, self.rank, ""))
            if least < done:
                _, _, pid, host = theirs.split(" ", 3)
                who, place, done = f"process {rank} of {self.world} (pid {pid} on {host})", "", least
        return (
            f"{who} makes no progress: none for {seconds:.0f} s{place}, after {done} micro-batches of at most "
            f"{self.longest:.1f} s; --stalled_after gives more time"
        )

    def _give_up(self, reason: str, process: int | None = None) -> None:
        print(f"error: {reason}; --resume_from_checkpoint true goes on from the last checkpoint", file=sys.stderr)
        sys.stderr.flush()
        if process is not None:  # the launcher sees that at once, and ends the others
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            time.sleep(GRACE)
        os._exit(1)


def _waits() -> dict[str, float]:
    """Seconds that each thread has been ready to run and had no CPU; a page read from disk again counts as many."""
    waits = {}
    with contextlib.suppress(OSError, IndexError, ValueError):  # Linux tells, and a thread may end meanwhile
        waits["pages"] = 1e9 * int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])  # majflt
        for thread in Path("/proc/self/task").iterdir():
            waits[thread.name] = int((thread / "schedstat").read_text().split()[1]) / 1e9
    return waits


def _state(pid: int) -> tuple[str | None, float]:
    """A process's state, and the seconds that it has computed."""
    try:
        process = psutil.Process(pid)
        return process.status(), sum(process.cpu_times()[:2])
    except psutil.Error:
        return None, 0.0


HEARTBEAT = Heartbeat()


class HeartbeatCallback(TrainerCallback):
    """Tells of each micro-batch, and when none is expected; to be added last, so that all else of a step is done."""

    def __init__(self, limit: float | None):
        HEARTBEAT.limit = limit

    def on_train_begin(self, args, state, control, **kwargs):
        HEARTBEAT.start()

    def on_step_begin(self, args, state, control, **kwargs):
        HEARTBEAT.progress()

    def on_substep_end(self, args, state, control, **kwargs):
        HEARTBEAT.progress()

    def on_step_end(self, args, state, control, **kwargs):
        HEARTBEAT.progress()
        HEARTBEAT.steps += 1
        if control.should_save or control.should_evaluate or control.should_training_stop:
            HEARTBEAT.pause()

    def on_epoch_end(self, args, state, control, **kwargs):
        HEARTBEAT.pause()

    def on_train_end(self, args, state, control, **kwargs):
        HEARTBEAT.pause()
