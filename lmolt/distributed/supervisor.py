"""Runs this machine's part of a job, on one machine or several, and ends it when another machine's part is lost.

    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 python -m lmolt.distributed.supervisor COMMAND...    # as ./launch.sh does

A collective waits for a lost process until its own timeout, which has to outlast the slowest checkpoint. So each
machine keeps a TCP connection to the main one, at MASTER_PORT + 1. The kernel closes it when a process dies; a dead
machine, a cut network or a stopped supervisor gives no sign of life for LMOLT_LOST_AFTER seconds (30). Whoever sees
that tells the others which machine it was and ends its COMMAND. The processes of one machine are watched by their
launcher, and by each other (heartbeat.py). COMMAND ends with its supervisor, however that ends.

The job doesn't start before NNODES machines are there; after LMOLT_START_TIMEOUT seconds (100) an error names what is
missing. A connection counts when it has proved, by HMAC over both sides' random numbers, that it knows the job's
secret: LMOLT_SECRET, or `.lmolt.secret` in the folder that all machines share, which the first of them makes.
SIGTERM and SIGUSR1 are passed on. The exit code is COMMAND's; 75, "try again", if it was asked to stop and has saved a
checkpoint (preemption.py says so in a file).
"""

import contextlib
import hashlib
import hmac
import itertools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from lmolt.files import end_with_parent

START_TIMEOUT = float(os.environ.get("LMOLT_START_TIMEOUT", 100))
LOST_AFTER = float(os.environ.get("LMOLT_LOST_AFTER", 30))
GRACE = 5  # seconds in which a command may end by itself, and say more of its error than is known here
LONGEST = 1 << 16  # bytes of a message
STRANGERS = 64  # connections at a time that have proved nothing yet


class Peer:
    """A connection to another machine's part; messages are lines of JSON, of bounded length."""

    def __init__(self, connection: socket.socket, name: str = "the main node"):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.name, self.buffer, self.unread = connection, name, b"", []
        self.nonce, self.heard, self.since = secrets.token_hex(16), time.monotonic(), time.monotonic()

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):  # where it is gone, reading says so
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict]:
        """Its messages that are there, perhaps none; `ConnectionError` where there will be no more."""
        try:
            received = self.connection.recv(LONGEST)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None
        if not received:
            raise ConnectionError("its process ended")
        self.heard = time.monotonic()
        *lines, self.buffer = (self.buffer + received).split(b"\n")
        if len(self.buffer) > LONGEST:
            raise ConnectionError("what it sends is no message")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise ConnectionError("what it sends is no message") from None
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("what it sends is no message")
        return messages

    def wait(self, end: float) -> dict:
        """Its next message; `ConnectionError` where there is none before `end`."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            while not self.unread:
                if (left := end - time.monotonic()) <= 0:
                    raise ConnectionError("it doesn't answer")
                if selector.select(left):
                    self.unread += self.receive()
        return self.unread.pop(0)


def job_secret() -> bytes:
    """What the machines of a job share and nobody else knows; `ValueError` where a file of it could be another's."""
    if given := os.environ.get("LMOLT_SECRET"):
        return given.encode()
    path = Path(".lmolt.secret")
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    for _ in range(50):  # another machine may be writing it
        if len(secret := path.read_bytes()) == 64:
            break
        time.sleep(0.1)
    else:
        raise ValueError(f"{path.absolute()}: holds no secret; delete it, it is made anew")
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o077:
        raise ValueError(f"{path.absolute()}: others may read or own it; delete it, it is made anew")
    return secret


def proof(secret: bytes, role: str, theirs: str, ours: str) -> str:
    return hmac.new(secret, f"{role} {theirs} {ours}".encode(), hashlib.sha256).hexdigest()


def _equal(theirs: object, ours: str) -> bool:
    return isinstance(theirs, str) and hmac.compare_digest(theirs.encode(errors="replace"), ours.encode())


def wait_for_the_others(nodes: int, address: str, port: int, command: list[str], secret: bytes) -> list[Peer]:
    """The main node's connections to all others."""
    for wanted in (port, port + 1):  # the first is torch's, a moment later
        try:
            listener = socket.create_server(("", wanted), backlog=nodes + STRANGERS)
        except OSError as error:
            reason = os.strerror(error.errno)
            raise ValueError(f"port {wanted} of the main node: {reason}; set another MASTER_PORT") from error
        if wanted == port:
            listener.close()
    peers, unknown, end = {}, [], time.monotonic() + START_TIMEOUT
    listener.setblocking(False)
    try:
        while missing := [str(node) for node in range(1, nodes) if node not in peers]:
            if time.monotonic() > end:
                raise ValueError(
                    f"{len(missing)} of {nodes} nodes didn't come within {START_TIMEOUT:g} s: those with NODE_RANK "
                    f"{', '.join(missing)}; start each with MASTER_ADDR={address} MASTER_PORT={port}"
                )
            with selectors.DefaultSelector() as selector:
                for each in (listener, *unknown, *peers.values()):
                    selector.register(each, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(0.2)]
            if listener in ready:
                with contextlib.suppress(OSError):
                    unknown.append(Peer(listener.accept()[0], "a stranger"))
                    unknown[-1].send(nonce=unknown[-1].nonce)
            for peer in [peer for peer in peers.values() if peer in ready]:
                try:
                    peer.receive()
                except ConnectionError as error:
                    raise ValueError(f"{peer.name} is lost: {error}") from None
            for peer in list(unknown):
                done = time.monotonic() - peer.since > GRACE or len(unknown) > STRANGERS
                if peer in ready:
                    try:
                        hellos = peer.receive()
                        done = done or bool(hellos) and not admit(peer, hellos[0], peers, nodes, command, secret)
                    except ConnectionError:
                        done = True
                if done:
                    peer.connection.close()
                if done or peer in peers.values():
                    unknown.remove(peer)
    except ValueError as error:
        for peer in peers.values():
            peer.send(lost=str(error))
        raise
    finally:
        for each in (listener, *(peer.connection for peer in unknown)):
            each.close()
    for peer in peers.values():
        peer.send(go=True)
    return list(peers.values())


def admit(peer: Peer, hello: dict, peers: dict, nodes: int, command: list[str], secret: bytes) -> bool:
    """Adds another node to `peers`; `ValueError`, here and there, if it was started for another job than this.

    False for a stranger, who is told only that the secret isn't this job's.
    """
    node, host, theirs = (hello.get(key) for key in ("node", "host", "command"))
    nonce, mac = hello.get("nonce"), hello.get("mac")
    sound = isinstance(node, int) and isinstance(host, str) and isinstance(theirs, list)
    if not sound or not _equal(mac, proof(secret, f"node {node}", peer.nonce, str(nonce))):
        peer.send(lost="the main node has another LMOLT_SECRET (or .lmolt.secret, where no folder is shared)")
        return False
    peer.name = f"node {node} ({''.join(c for c in host if c.isprintable())[:64]})"
    differing = [pair for pair in itertools.zip_longest(theirs, command) if pair[0] != pair[1]]
    differing = [pair for pair in differing if pair != (str(node), "0")]  # accelerate's --machine_rank
    wrong = None
    if not 0 < node < nodes or node in peers:
        wrong = f"{peer.name}: NODE_RANK={node} is there twice, or none of 0 to {nodes - 1}"
    elif differing:
        wrong = f"{peer.name} was started differently: {differing[0][0]!r} instead of {differing[0][1]!r}"
    if wrong:
        peer.send(lost=wrong)
        raise ValueError(wrong)
    peer.send(mac=proof(secret, "main", str(nonce), peer.nonce))
    peers[node] = peer
    return True


def join(node: int, nodes: int, address: str, port: int, command: list[str], secret: bytes) -> list[Peer]:
    """The connection of another node to the main one."""
    end, reason = time.monotonic() + START_TIMEOUT, None
    while (left := end - time.monotonic()) > 0:
        try:
            peer = Peer(socket.create_connection((address, port + 1), timeout=left))
            nonce = str(peer.wait(time.monotonic() + GRACE).get("nonce"))
            mac = proof(secret, f"node {node}", nonce, peer.nonce)
            peer.send(node=node, host=socket.gethostname(), command=command, nonce=peer.nonce, mac=mac)
            answer = peer.wait(time.monotonic() + GRACE)
            break
        except OSError as error:
            reason = error
            time.sleep(0.5)
    else:
        raise ValueError(
            f"node {node} of {nodes} can't reach the main node at {address}, port {port + 1}, within "
            f"{START_TIMEOUT:g} s ({reason}); is MASTER_ADDR right, and is NODE_RANK=0 started there?"
        )
    if "lost" not in answer:
        if not _equal(answer.get("mac"), proof(secret, "main", peer.nonce, nonce)):
            raise ValueError(f"what listens at {address}, port {port + 1}, isn't this job's main node")
        try:
            answer = peer.wait(time.monotonic() + START_TIMEOUT + GRACE)
        except ConnectionError as error:
            raise ValueError(f"the main node at {address} was lost before the job began: {error}") from error
    if "go" not in answer:
        raise ValueError(str(answer.get("lost", "the main node refused this one")))
    return [peer]


def loss(peers: list[Peer]) -> str | None:
    """What a peer says was lost, or that the peer itself is; None if nothing within a moment. One that ended goes."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        ready = [key.fileobj for key, _ in selector.select(0.2)] if peers else time.sleep(0.2) or []
    for peer in list(peers):
        try:
            messages = peer.unread + (peer.receive() if peer in ready else [])
        except ConnectionError as error:
            return f"{peer.name} is lost: {error}"
        peer.unread = []
        for message in messages:
            if "lost" in message:
                return str(message["lost"])
            if "ended" in message:
                peers.remove(peer)
        if time.monotonic() - peer.heard > LOST_AFTER:
            return f"{peer.name} is lost: no sign of life for {LOST_AFTER:g} s; it is stopped, dead or cut off"
    return None


def watch(child: subprocess.Popen, peers: list[Peer]) -> str | None:
    """Until the command ends (None) or something is lost (what); gives signs of life meanwhile."""
    process, stopped, sent = psutil.Process(child.pid), time.monotonic(), 0.0
    while child.poll() is None:
        if lost := loss(peers):
            return lost
        now = time.monotonic()
        if now - sent > LOST_AFTER / 6:
            sent = now
            for peer in peers:
                peer.send(beat=True)
        with contextlib.suppress(psutil.NoSuchProcess):
            stopped = stopped if process.status() == psutil.STATUS_STOPPED else now
        if now - stopped > LOST_AFTER:
            return f"the command (process {child.pid} on {socket.gethostname()}) is stopped, for {LOST_AFTER:g} s now"
    return None


def end(child: subprocess.Popen) -> None:
    """Ends a command and all that it started, after the moment in which it may end by itself."""
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.wait()


def interface_of(connection: socket.socket) -> str:
    """The network interface that a connection uses."""
    mine = connection.getsockname()[0]
    return next(name for name, its in psutil.net_if_addrs().items() if mine in [entry.address for entry in its])


def main(command: list[str]) -> int:
    nodes, node = int(os.environ.get("NNODES", 1)), int(os.environ.get("NODE_RANK", 0))
    host, peers = socket.gethostname(), []
    if nodes > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        where = nodes, address, port, command, job_secret()
        peers = join(node, *where) if node else wait_for_the_others(*where)
        # gloo listens where this host's name points to, which on Debian is 127.0.0.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(peers[0].connection))

    with tempfile.TemporaryDirectory(prefix="lmolt-") as folder:
        os.environ["LMOLT_SAVED"] = saved = f"{folder}/saved"  # where preemption.py says that a checkpoint is there
        child, lost = subprocess.Popen(command, preexec_fn=end_with_parent), None
        try:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, lambda number, _: child.send_signal(number))
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command as well
            lost = watch(child, peers)
        finally:
            if child.poll() is None:
                end(child)
        asked = Path(saved).exists()
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode  # as a shell counts signals
    if code and asked:
        code, lost = os.EX_TEMPFAIL, None
    elif code or lost:
        code = code or 1
        lost = lost or loss(peers)  # told at the moment of our own failure, which follows from it
        if lost:
            print(f"error: {lost}; with its cause mended, --resume_from_checkpoint true goes on", file=sys.stderr)
    message = {"ended": code}
    if code not in (0, os.EX_TEMPFAIL):
        message = {"lost": lost or f"node {node} ({host}) failed with exit code {code}"}
    for peer in peers:
        peer.send(**message)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
