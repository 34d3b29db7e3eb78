"""Two machines: network namespaces of their own addresses, joined by a cable; `launch.sh train` on each as users do."""

import json
import sys
import time
from pathlib import Path

import pytest
from machines import CPO, one_process, steps

from lmolt.data.triples import write_triples

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory, tiny_policy, few_triples):
    """Arguments, and the losses of one process."""
    folder = tmp_path_factory.mktemp("one")
    write_triples(few_triples, folder / "triples.jsonl")
    arguments = ["--model", tiny_policy, "--triples", folder / "triples.jsonl", "--save_strategy", "epoch"]
    arguments += ["--num_train_epochs", "1", *CPO]
    return arguments, one_process(folder / "out", *arguments, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "second_nodes_share"),
    [
        ("zero2", {"zero_pp_rank_1_mp_rank_00_optim_states.pt"}),
        ("zero3", {"zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"}),
    ],
)
def test_two_nodes_equal_one_process(strategy, second_nodes_share, two_nodes, qlora, tmp_path, compiled):
    arguments, expected = qlora
    nodes = two_nodes.train(*arguments, 2, "--output_dir", tmp_path / "out", STRATEGY=strategy)
    assert [node.wait(timeout=120) for node in nodes] == [0, 0], two_nodes.said(0) + two_nodes.said(1)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["world_size"] == 2
    share = {file.name for file in tmp_path.glob("out/checkpoint-*/global_step*/*_rank_1_*")}
    assert share == second_nodes_share  # what DeepSpeed at this stage leaves to it, and DDP doesn't
    for two, one in zip(steps(tmp_path / "out"), expected, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4), one["step"]
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3), one["step"]
    assert "wrote" in two_nodes.said(0) and "wrote" not in two_nodes.said(1)


def test_what_is_missing_at_the_start_is_named(two_nodes):
    """In seconds here, in LMOLT_START_TIMEOUT (100) else."""
    train = [sys.executable, "-m", "lmolt.distributed.supervisor", "true"]
    waiting = two_nodes.run(0, *train, MASTER_PORT="29500", LMOLT_START_TIMEOUT="2")
    assert waiting.wait(timeout=60) == 1
    assert "1 of 2 nodes didn't come within 2 s: those with NODE_RANK 1;" in two_nodes.said(0)
    for address, reason in ((two_nodes.addresses[0], "Connection refused"), ("10.77.77.3", "")):
        lonely = two_nodes.run(1, *train, MASTER_ADDR=address, MASTER_PORT="29500", LMOLT_START_TIMEOUT="1")
        assert lonely.wait(timeout=60) == 1
        assert f"can't reach the main node at {address}, port 29501, within 1 s" in two_nodes.said(1)
        assert reason in two_nodes.said(1)
    listen = "import socket, time; s = socket.create_server(('', 29500)); print('there', flush=True); time.sleep(60)"
    squatter = two_nodes.run(0, sys.executable, "-c", listen)
    while "there" not in two_nodes.said(0):
        time.sleep(0.05)
    blocked = two_nodes.run(0, *train, MASTER_PORT="29500")
    assert blocked.wait(timeout=60) == 1
    assert "port 29500 of the main node: Address already in use; set another MASTER_PORT" in two_nodes.said(0)
    squatter.kill()
    squatter.wait()


@pytest.mark.parametrize(
    ("ranks", "arguments", "wrong"),
    [
        ((1, 1), ("--lr", "1"), "NODE_RANK=1 is there twice, or none of 0 to 2"),
        ((1, 3), ("--lr", "1"), "NODE_RANK=3 is there twice, or none of 0 to 2"),
        ((1, 2), ("--lr", "2"), "was started differently: '2' instead of '1'"),
    ],
)
def test_nodes_that_do_not_fit_together(ranks, arguments, wrong, two_nodes):
    launch = lambda node, rank, *more: two_nodes.run(
        node,
        sys.executable,
        "-m",
        "lmolt.distributed.supervisor",
        "true",
        rank,
        *more,
        NODE_RANK=str(rank),
        NNODES="3",
        MASTER_PORT="29500",
    )
    main = launch(0, 0, "--lr", "1")
    others = [launch(1, ranks[0], "--lr", "1"), launch(1, ranks[1], *arguments)]
    assert main.wait(timeout=60) == 1
    for node in others:  # who came after the main node had ended still waits for it
        node.kill()
        node.wait()
    assert wrong in two_nodes.said(0) and "Traceback" not in two_nodes.said(0) + two_nodes.said(1)
