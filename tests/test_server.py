"""Served models: one that fails in each way, and `transformers serve` with a tiny model."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import load_script

from lmolt import Translator
from lmolt.card import model_index
from lmolt.files import read_table, write_table
from lmolt.generation.server import Server
from lmolt.generation.systems import load, read_system
from lmolt.generation.translate import load_translator, prompts_for, translate
from lmolt.prompts import MOL2CAP

KEY = "sk-a-secret-0123456789"


class Served(BaseHTTPRequestHandler):
    """Answers a prompt by the word in it: good, refused, filtered, slow, busy, broken, empty, null, limited."""

    def do_GET(self):
        self.answer(200, self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append((self.path, body, self.headers.get("authorization")))
        chat = self.path.endswith("chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        word = next((w for w in self.server.words if w in prompt), "good")
        with self.server.lock:
            self.server.asked[word] += 1
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
            nth = self.server.asked[word]
        time.sleep(0.02)
        with self.server.lock:
            self.server.now -= 1
        match word:
            case "refused":
                return self.answer(400, {"error": {"message": f"too long; key {KEY}"}})
            case "slow":
                return self.server.over.wait(60)
            case "busy" if nth < 3:
                return self.answer(503, {"error": "busy"})
            case "down":
                return self.answer(500, {"error": "always"})
            case "limited" if nth == 1:
                return self.answer(429, {"error": "slow down"}, {"Retry-After": "0.3"})
            case "broken":
                return self.answer(200, b"{nothing")
            case "list":
                return self.answer(200, ["x"])
            case "hollow":
                return self.answer(200, {"choices": []})
            case "torn":
                self.connection.close()
                return None
        text = {"null": None, "empty": ""}.get(word, f" {word} {body.get('seed', '')}".rstrip())
        choice = {"message": {"content": text}} if chat else {"text": text}
        choice["finish_reason"] = "content_filter" if word == "filtered" else "stop"
        if chat and word == "declined":
            choice["message"] = {"content": None, "refusal": "I can't help with that."}
        if self.server.logps and body.get("logprobs"):
            values = [-0.5, -0.25]
            choice["logprobs"] = {"content": [{"logprob": v} for v in values]} if chat else {"token_logprobs": values}
        usage = {"prompt_tokens": 7, "completion_tokens": 2}
        return self.answer(200, {"choices": [choice], "usage": usage})

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    """A server on this machine and its URL."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    server.models = {"data": [{"id": "tiny", "created": 1, "owned_by": "me"}]}
    server.words = ("refused", "filtered", "declined", "slow", "busy", "down", "limited", "broken", "list", "hollow")
    server.words += ("torn", "null", "empty")
    server.asked, server.bodies, server.logps, server.lock = Counter(), [], False, threading.Lock()
    server.now = server.most = 0
    server.over = threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_each_failure_is_a_counted_empty_output(served, tmp_path, capsys):
    server = Server(served.url, attempts=3, wait=0.01)
    prompts = ["good 1", "refused", "filtered", "busy", "down", "limited", "broken", "list", "hollow", "null"]
    prompts += ["empty", "good 2"]
    counts = Counter()
    outputs = translate(server, None, prompts, counts=counts, journal=tmp_path, progress="asks")
    assert dict(zip(prompts, outputs, strict=True)) == {
        **dict.fromkeys(prompts, ""),
        "good 1": "good",
        "good 2": "good",
        "busy": "busy",
        "limited": "limited",
    }
    assert counts == {
        "refused by the server": 7,  # refused, filtered, down, broken, list, hollow, null
        "requests tried again": 2 + 2 + 1 + 2 + 2,  # busy, down, limited, broken, list
        "prompt tokens": 5 * 7,
        "completion tokens": 5 * 2,
    }
    assert KEY not in capsys.readouterr().out and {key for *_, key in served.bodies} == {f"Bearer {KEY}"}
    # what has an answer is in the journal, an empty one too; what failed is asked again
    kept = (tmp_path / "process-0.jsonl").read_text()
    assert len(kept.splitlines()) == 5 and KEY not in kept
    before = served.asked["good"]
    assert translate(Server(served.url, attempts=1), None, prompts, journal=tmp_path) == outputs
    assert served.asked["good"] == before + 3 and served.asked["refused"] == 2  # of those, the probes alone


def test_an_answer_that_does_not_come_is_a_counted_empty_output(served):
    counts = Counter()
    server = Server(served.url, timeout=1.5, attempts=2, wait=0.01)
    assert translate(server, None, ["good", "slow", "good 2"], counts=counts) == ["good", "", "good"]
    assert counts["timed out"] == 1 and "refused by the server" not in counts


def test_requests_at_once_are_bounded_and_wait_where_they_are_asked_to(served):
    server = Server(served.url, concurrency=3, wait=0.01)
    assert translate(server, None, [f"good {i}" for i in range(24)]) == ["good"] * 24
    assert 2 <= served.most <= 3
    start = time.monotonic()
    assert translate(server, None, ["limited"]) == ["limited"]
    assert time.monotonic() - start >= 0.3


def test_a_server_that_is_not_there_or_goes_away_is_one_line(served, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"http://127.0.0.1:{port}/v1: .*refused"):
        translate(Server(f"http://127.0.0.1:{port}/v1", "m", attempts=2, wait=0.01), None, ["x"])
    server = Server(served.url, attempts=2, wait=0.01, concurrency=1)
    with pytest.raises(ConnectionError):
        translate(server, None, ["good 1", "torn", "good 2"], journal=tmp_path)
    assert len((tmp_path / "process-0.jsonl").read_text().splitlines()) == 1  # what was finished


def test_what_is_sent(served, tiny_policy):
    served.logps = True
    server = Server(served.url, api="chat", extra={"top_k": 1}, sampling={"min_p": 0.1}, bos="<s>")
    assert translate(server, None, ["good"]) == ["good"] and server.gives_logps
    path, body, _ = served.bodies[-1]
    assert path == "/v1/chat/completions" and body == {
        "model": "tiny",
        "max_tokens": 250,
        "temperature": 0.0,
        "stream": False,
        "messages": [{"role": "user", "content": "good"}],
        "logprobs": True,
        "top_k": 1,
    }
    texts = translate(server, None, ["good", "good"], temperature=0.7, top_p=0.9, seed=3, max_new_tokens=9)
    assert len(set(texts)) == 2  # other seeds
    assert {k: served.bodies[-1][1][k] for k in ("temperature", "top_p", "min_p", "max_tokens")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "max_tokens": 9,
    }
    translate(Server(served.url, tokenizer=str(tiny_policy), prompts="ids"), None, ["good C"])
    assert served.bodies[-1][1]["prompt"][0] == 1 and isinstance(served.bodies[-1][1]["prompt"][-1], int)
    translate(Server(served.url, tokenizer=str(tiny_policy)), None, ["good C"])
    assert served.bodies[-1][1]["prompt"] == "<s>good C"  # its own encoding adds none


def test_mistakes_about_a_server(served):
    for how, message in (
        ({"url": "http://me:secret@127.0.0.1/v1"}, "holds no user, password or query"),
        ({"url": served.url, "api": "responses"}, "api 'responses'"),
        ({"url": served.url, "prompts": "ids"}, "need a tokenizer"),
        ({"url": served.url, "concurrency": 0}, "concurrency 0"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Server(**how)
        assert "secret" not in str(error.value)
    served.models = {"data": [{"id": "one"}, {"id": "two"}]}
    with pytest.raises(ValueError, match="serves one, two; write http://127.0.0.1.*/v1#MODEL"):
        translate(Server(served.url), None, ["x"])
    assert translate(Server(served.url + "#two"), None, ["x"]) == ["good"]
    assert served.bodies[-1][1]["model"] == "two"
    with pytest.raises(ValueError, match="beams and penalties are its own"):
        translate(Server(served.url + "#two"), None, ["x"], num_beams=3)
    with pytest.raises(ValueError, match="is a server: it has its own adapter"):
        load_translator(served.url, "adapter")


def test_another_model_behind_the_same_name_is_another_one(served):
    first = Server(served.url).identity
    served.models["data"][0]["created"] = 2
    assert Server(served.url).identity == first
    served.models["data"][0]["root"] = "/other"
    assert Server(served.url).identity != first


def test_candidates_of_a_server(served):
    with pytest.raises(ValueError, match="tells no log-probabilities to rank by; say rank votes"):
        Translator(served.url)("CCO", num_candidates=3)
    with pytest.raises(ValueError, match="a server can't score a given input"):
        Translator(served.url)("CCO", num_candidates=3, rank="channel")
    found = Translator(served.url)("CCO", num_candidates=3, rank="votes")
    assert [c.rank for c in found] == [1, 2, 3] and found[0].logp is None
    assert found.counts["prompt tokens"] == 3 * 7
    served.logps = True
    found = Translator(served.url)(["CCO", "C1C"], MOL2CAP, num_candidates=3)
    assert [(c.rank, c.logp, c.tokens) for c in found][:3] == [(n, -0.75, 2) for n in (1, 2, 3)]
    assert found[-1].note == "RDKit can't read this molecule"


def test_a_server_is_a_system_and_a_model_of_each_script(served, tmp_path):
    entry = f"it:\n  server: {{url: '{served.url}', attempts: 2}}\n  prompt: bare\n  both: {{model: tiny}}\n"
    (tmp_path / "systems.yaml").write_text(entry)
    system = read_system("it", tmp_path / "systems.yaml")
    server, tokenizer = load(system, MOL2CAP)
    assert tokenizer is None and server.model == "tiny" and "its weights are unknown" in system.needs
    for wrong, message in (
        (entry.replace("attempts", "tries"), "tries.*write {url"),
        (entry.replace(served.url, "ftp://x"), "server is"),
        (entry.replace("tiny}", "tiny, adapter: x}"), "adapter 'x': a server has its own"),
    ):
        (tmp_path / "wrong.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_system("it", tmp_path / "wrong.yaml")

    pairs = [{"id": str(i), "molecule": "C" * i, "caption": f"A chain of {i}."} for i in range(1, 5)]
    write_table(pairs, tmp_path / "pairs.csv")
    args = ["--pairs", str(tmp_path / "pairs.csv"), "--output", str(tmp_path / "evaluation"), "--no_fcd"]
    args += ["--system", "it", "--systems", str(tmp_path / "systems.yaml"), "--n_bootstrap", "20"]
    load_script("evaluate").main(args)
    record = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert record["directions"]["mol2cap"]["counts"]["prompt tokens"] == 28
    assert record["weights"] == "unknown: they are the server's"
    sources = {result["source"]["name"] for result in model_index("M", record, "https://u")[0]["results"]}
    assert sources == {"LMolT, weights unknown: they are the server's"}
    assert [row["prediction"] for row in read_table(tmp_path / "evaluation" / "predictions.parquet")] == ["good"] * 8
    assert KEY not in "".join(p.read_text(errors="ignore") for p in (tmp_path / "evaluation").rglob("*") if p.is_file())

    args = ["--pairs", str(tmp_path / "pairs.csv"), "--fraction", "1", "--directions", "mol2cap"]
    args += ["--mol2cap_model", served.url, "--output", str(tmp_path / "triples.parquet")]
    load_script("make_triples").main(args)
    assert "unknown: they are the server's; what it is known by" in (tmp_path / "triples.json").read_text()
    assert [row["rejected"] for row in read_table(tmp_path / "triples.parquet")] == ["good"] * 4

    (tmp_path / "in.smi").write_text("CCO\nrefused\nCCN\n")
    args = ["--input", str(tmp_path / "in.smi"), "--model", served.url, "--output", str(tmp_path / "out.csv")]
    load_script("translate").main(args)
    assert [row["output"] for row in read_table(tmp_path / "out.csv")] == ["good", "", "good"]


needed = ("fastapi", "uvicorn", "openai")
missing = [name for name in needed if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"transformers serve needs {', '.join(missing)}")
def test_greedy_outputs_of_transformers_serve_are_the_models_own(tiny_policy, tmp_path):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_policy)
    with torch.no_grad():  # so that outputs depend on prompts
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    tokenizer.save_pretrained(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [str(tmp_path / "tiny"), "--device", "cpu", "--port", str(port)]
    (tmp_path / "hub").mkdir()
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.5)
        server = Server(url, str(tmp_path / "tiny"), tokenizer=str(tmp_path / "tiny"), attempts=2)
        model, tokenizer = load_translator(str(tmp_path / "tiny"))
        prompts = prompts_for(model.config, MOL2CAP, ["C" * n + "O" for n in range(1, 8)])
        own = translate(model, tokenizer, prompts, max_new_tokens=12)
        assert len(set(own)) > 3
        counts = Counter()
        assert translate(server, None, prompts, max_new_tokens=12, counts=counts) == own
        assert counts["refused by the server"] == counts["timed out"] == 0
    finally:
        process.terminate()
        process.wait(20)
