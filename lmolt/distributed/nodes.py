"""Runs this machine's part of a job on several machines, and ends it when another machine's part is lost.

    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 python -m lmolt.distributed.nodes COMMAND...    # as ./launch.sh does

A collective waits for a lost process until its own timeout, which has to outlast the slowest checkpoint. So each
machine keeps a TCP connection to the main one, at MASTER_PORT + 1: the kernel closes it when a process dies, and its
keep-alive packets find a dead machine or a cut network within LMOLT_LOST_AFTER seconds (30). Whoever sees that tells
the others which machine it was and ends its COMMAND. The processes of one machine are watched by their launcher.

The job doesn't start before NNODES machines are there; after LMOLT_START_TIMEOUT seconds (100) an error names what is
missing. SIGTERM and SIGUSR1 are passed on; a COMMAND that then ends unfinished has exit code 75, "try again".
"""

import contextlib
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

import psutil

START_TIMEOUT = float(os.environ.get("LMOLT_START_TIMEOUT", 100))
LOST_AFTER = int(os.environ.get("LMOLT_LOST_AFTER", 30))
GRACE = 5  # seconds in which a command may end by itself, and say more of its error than is known here


class Peer:
    """A connection to another machine's part; messages are lines of JSON."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(GRACE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, LOST_AFTER // 3))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, LOST_AFTER // 6))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        self.connection, self.name = connection, "the main node"
        self.lines = connection.makefile("r")

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message) -> None:
        with contextlib.suppress(OSError):  # where it is gone, reading says so
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict:
        """Its next message; `ConnectionError` or `TimeoutError` where there will be none."""
        line = self.lines.readline()
        if not line:
            raise ConnectionError("its process ended")
        return json.loads(line)


def wait_for_the_others(nodes: int, address: str, port: int, command: list[str]) -> list[Peer]:
    """The main node's connections to all others."""
    for wanted in (port, port + 1):  # the first is torch's, a moment later
        try:
            listener = socket.create_server(("", wanted), backlog=nodes)
        except OSError as error:
            reason = os.strerror(error.errno)
            raise ValueError(f"port {wanted} of the main node: {reason}; set another MASTER_PORT") from error
        if wanted == port:
            listener.close()
    peers, end = {}, time.monotonic() + START_TIMEOUT
    try:
        while missing := [str(node) for node in range(1, nodes) if node not in peers]:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                admit(Peer(listener.accept()[0]), peers, nodes, command)
            except TimeoutError:
                raise ValueError(
                    f"{len(missing)} of {nodes} nodes didn't come within {START_TIMEOUT:g} s: those with NODE_RANK "
                    f"{', '.join(missing)}; start each with MASTER_ADDR={address} MASTER_PORT={port}"
                ) from None
    except ValueError as error:
        for peer in peers.values():
            peer.send(lost=str(error))
        raise
    listener.close()
    for peer in peers.values():
        peer.send(go=True)
    return list(peers.values())


def admit(peer: Peer, peers: dict[int, Peer], nodes: int, command: list[str]) -> None:
    """Adds another node to `peers`; `ValueError`, here and there, if it was started for another job than this."""
    try:
        hello = peer.receive()
        node, host, theirs = hello["node"], hello["host"], hello["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a stranger
    peer.name = f"node {node} ({host})"
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
    peers[node] = peer


def join(node: int, nodes: int, address: str, port: int, command: list[str]) -> list[Peer]:
    """The connection of another node to the main one."""
    end, reason = time.monotonic() + START_TIMEOUT, None
    while (left := end - time.monotonic()) > 0:
        try:
            peer = Peer(socket.create_connection((address, port + 1), timeout=left))
            break
        except OSError as error:
            reason = error
            time.sleep(0.5)
    else:
        raise ValueError(
            f"node {node} of {nodes} can't reach the main node at {address}, port {port + 1}, within "
            f"{START_TIMEOUT:g} s ({reason}); is MASTER_ADDR right, and is NODE_RANK=0 started there?"
        )
    peer.send(node=node, host=socket.gethostname(), command=command)
    peer.connection.settimeout(START_TIMEOUT + GRACE)
    try:
        answer = peer.receive()
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(f"the main node at {address} was lost before the job began: {error}") from error
    if "go" not in answer:
        raise ValueError(answer["lost"])
    peer.connection.settimeout(GRACE)
    return [peer]


def loss(peers: list[Peer]) -> str | None:
    """What a peer says was lost, or that the peer itself is; None if nothing within a moment."""
    for peer in select.select(peers, [], [], 0.2)[0]:
        try:
            message = peer.receive()
        except (ConnectionError, TimeoutError, OSError) as error:
            return f"{peer.name} is lost: {error.strerror or error}"
        if "lost" in message:
            return message["lost"]
        peers.remove(peer)  # it ended well
    return None


def end(child: subprocess.Popen) -> None:
    """Ends a command and all that it started, after the moment in which it may end by itself."""
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(child.pid).children(recursive=True), child]:
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
        where = nodes, address, port, command
        peers = join(node, *where) if node else wait_for_the_others(*where)
        # gloo listens where this host's name points to, which on Debian is 127.0.0.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(peers[0].connection))
    child, signals = subprocess.Popen(command), []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: (signals.append(number), child.send_signal(number)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command as well

    lost = None
    while child.poll() is None and lost is None:
        lost = loss(peers)
    if lost:
        end(child)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode  # as a shell counts signals
    if code and signals:
        code, lost = os.EX_TEMPFAIL, None
    elif code:
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
    except ValueError as error:
        sys.exit(f"error: {error}")
