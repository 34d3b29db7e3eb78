"""A function of RDKit's over many items, in processes of their own with a limit of time and memory an item.

RDKit may take hours, gigabytes or a segmentation fault over one string of a hundred characters (dense ring closures,
star-like metals). Here such an item is `Unfinished`, and all others have their results. The time is the processor's,
not the clock's, so that what is finished does not depend on what else the machine does.

A worker is a Python of its own, started once and kept: no threads of torch's are forked, and a script without a main
guard isn't run again. It takes a list of items and hands back a result at a time, so that the item that it died of is
known. Where the platform has no such limits (Windows), there are none.
"""

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 5.0  # of processor time an item; an ordinary molecule takes thousandths
MEMORY = 2 * 2**30  # bytes of address space a worker
_FEW = 60  # items that aren't worth another worker
_OUT_OF_MEMORY = 77  # a worker's exit code
_IDLE: list["_Worker"] = []


class Unfinished(str):
    """Why there is no result for an item."""


class _Worker:
    def __init__(self):
        folders = dict.fromkeys([str(Path(__file__).parents[2]), *(str(Path(p or ".").resolve()) for p in sys.path)])
        environment = {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", "from lmolt.metrics.workers import serve; serve()"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C is its parent's to answer; it ends when its parent does
        )
        self.owner, self.ready = os.getpid(), False

    def results(self, function, items: list):
        """Results in the items' order, as far as the worker lives."""
        try:
            pickle.dump((function, items, SECONDS), self.process.stdin)
            self.process.stdin.flush()
            if not self.ready:
                self.ready = pickle.load(self.process.stdout)
            for _ in items:
                yield pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self.process.wait()
            if not self.ready:
                raise RuntimeError(f"a worker for RDKit did not start (exit code {code})") from None

    def cause(self) -> Unfinished:
        """Why the worker is dead; `RuntimeError` where its Python ended by an error of ours."""
        code = self.process.wait()
        if code == 1:
            raise RuntimeError("a worker for RDKit ended by the error above")
        if code == -signal.SIGPROF:
            return Unfinished(f"RDKit did not finish it in {SECONDS:g} s")
        if code in (_OUT_OF_MEMORY, -signal.SIGKILL):
            return Unfinished(f"RDKit needed more than {MEMORY / 2**30:g} GiB for it")
        return Unfinished(f"RDKit crashed over it ({signal.Signals(-code).name if code < 0 else code})")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def in_processes(function, items: list, num_workers: int | None = None) -> list:
    """`[function(item) for item in items]`, `Unfinished` where RDKit did not come to an end; its log is silenced.

    `function` is a module's. Its `ValueError` is raised here; RDKit's own `RuntimeError` is `Unfinished`; of any other
    error, a bug, the worker shows the traceback and ends, which is a `RuntimeError` here.
    The longest items go first, for balance. `num_workers`: processes, default one a core.
    """
    if not items:
        return []
    length = lambda item: len(item) if isinstance(item, str) else sum(map(len, item[:2]))
    order = sorted(range(len(items)), key=lambda i: -length(items[i]))
    count = min(num_workers or len(os.sched_getaffinity(0)), -(-len(items) // _FEW))
    size = -(-len(order) // (16 * count))
    chunks = deque(order[start : start + size] for start in range(0, len(order), size))
    results = [None] * len(items)
    workers = [_take() for _ in range(count)]
    with ThreadPoolExecutor(count) as threads:
        try:
            for _ in threads.map(lambda at: _work(workers, at, function, items, chunks, results), range(count)):
                pass
        except BaseException:  # Ctrl-C too
            chunks.clear()
            for worker in workers:
                worker.end()
            raise
    _IDLE.extend(workers)
    return results


def _take() -> _Worker:
    while _IDLE:
        worker = _IDLE.pop()
        if worker.owner == os.getpid() and worker.process.poll() is None:
            return worker
    return _Worker()


def _work(workers: list, at: int, function, items: list, chunks: deque, results: list) -> None:
    """One thread: hands chunks to its worker until there is none, and starts another where the worker has died."""
    while True:
        try:
            left = deque(chunks.popleft())
        except IndexError:  # another thread took the last one
            return
        again = None  # the item that a worker died of, and may not have been to blame: the system may have killed it
        while left:
            for good, result in workers[at].results(function, [items[i] for i in left]):
                if not good:
                    raise result
                results[left.popleft()] = result
            if left:  # the worker died of the first of them
                cause, timed = workers[at].cause(), workers[at].process.returncode == -signal.SIGPROF
                workers[at].end()
                workers[at] = _Worker()
                if timed or again == left[0]:
                    results[left.popleft()] = cause
                else:
                    again = left[0]


@atexit.register
def _end_idle() -> None:
    for worker in _IDLE:
        if worker.owner == os.getpid():
            worker.end()


def serve() -> None:
    """The worker: reads `(function, items, seconds)`, writes True when it is ready and then a result an item."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    limited = hasattr(signal, "setitimer")
    if limited:
        import fcntl
        import resource

        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(0, fcntl.F_GETFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from rdkit.rdBase import BlockLogs

    with BlockLogs(), contextlib.suppress(EOFError, BrokenPipeError):
        pickle.dump(True, results)
        results.flush()
        while True:
            function, items, seconds = pickle.load(sys.stdin.buffer)
            for item in items:
                if limited:
                    signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
                    fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)  # and SIGIO, when its parent's end is closed
                try:
                    result = True, function(item)
                except MemoryError:
                    os._exit(_OUT_OF_MEMORY)
                except RuntimeError as error:
                    result = True, Unfinished(f"RDKit gave up on it: {' '.join(str(error).split())[:200]}")
                except ValueError as error:
                    result = False, error
                if limited:
                    fcntl.fcntl(0, fcntl.F_SETFL, flags)
                    signal.setitimer(signal.ITIMER_PROF, 0)
                pickle.dump(result, results)
                results.flush()
