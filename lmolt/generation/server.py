"""A served model as a translator: OpenAI's completions or chat API (docs/serving.md).

`Server` stands where a loaded model does: `translate`, `ranking.score` and whoever calls them take it as they take a
model. Its weights are unknown; what it is known by, for the journal, is its URL, the model's name, what /models says of
it, and its answers to three fixed prompts.
"""

import hashlib
import inspect
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from lmolt.generation.journal import Journal, read_journal
from lmolt.prompts import CAP2MOL, MOL2CAP, build_prompt, encode_prompt

APIS, PROMPTS = ("completions", "chat"), ("text", "ids")
PROBES = [(MOL2CAP, "CCO"), (CAP2MOL, "The molecule is an aromatic amine."), (MOL2CAP, "CC(=O)Nc1ccc(O)cc1")]
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # what another try may cure
LONGEST_PAUSE = 300.0  # seconds that a server may ask for


def is_server(name: str | Path) -> bool:
    return str(name).startswith(("http://", "https://"))


def check_entry(entry: dict, parts: dict, where: str) -> None:
    """A `server:` of a file of systems: `ValueError` names what is missing or unknown in it, or has no place there."""
    known = [name for name in inspect.signature(Server).parameters if name != "model"]
    if not isinstance(entry, dict) or not is_server(entry.get("url", "")) or entry.keys() - set(known):
        raise ValueError(
            f"{where}: server is {entry}; write {{url: http://HOST:PORT/v1}} and, of {', '.join(known)}, more"
        )
    if adapters := [part["adapter"] for part in parts.values() if isinstance(part, dict) and part.get("adapter")]:
        raise ValueError(f"{where}: adapter {adapters[0]!r}: a server has its own; name what it serves as the model")


class Refused(Exception):
    """The server answered, and has no output for this prompt."""


class Server:
    """`url` is that of the API (http://127.0.0.1:8000/v1), with the model's name after a # or in `model`; without
    either the one model that the server has.

    `prompts` says how: as "text", or as token "ids" of `tokenizer`, a folder. With text, `bos` is put before each
    prompt; by default what `tokenizer`'s own encoding lacks. `key` names an environment variable. `extra` is added to
    each request, `sampling` to those that sample. At most `concurrency` requests run at once; one may take `timeout`
    seconds, and is tried `attempts` times, after 1, 2, 4 ... times `wait` seconds or those the server asks for.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api: str = "completions",
        prompts: str = "text",
        tokenizer: str | None = None,
        bos: str | None = None,
        key: str = "OPENAI_API_KEY",
        extra: dict | None = None,
        sampling: dict | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        attempts: int = 6,
        wait: float = 1.0,
    ):
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "a server's URL holds no user, password or query; put the key into an environment variable"
            )
        self.url, self.model = url.partition("#")[0].rstrip("/"), model or parts.fragment or None
        if api not in APIS or prompts not in PROMPTS:
            raise ValueError(
                f"api {api!r}, prompts {prompts!r}: use one of {', '.join(APIS)}, and of {', '.join(PROMPTS)}"
            )
        if prompts == "ids" and (tokenizer is None or api == "chat"):
            raise ValueError("prompts as ids need a tokenizer, a folder, and api completions")
        if concurrency < 1 or attempts < 1 or timeout <= 0 or wait < 0:
            raise ValueError(
                f"concurrency {concurrency}, attempts {attempts}, timeout {timeout}, wait {wait}: too small"
            )
        self.api, self.as_ids, self.bos = api, prompts == "ids", bos
        self.extra, self.sampling = extra or {}, sampling or {}
        self.concurrency, self.timeout, self.attempts, self.wait = concurrency, timeout, attempts, wait
        self._key = os.environ.get(key, "")
        self.tokenizer = None
        if tokenizer is not None:
            from lmolt.models.loading import load_tokenizer

            self.tokenizer = load_tokenizer(tokenizer)
        self.config = SimpleNamespace(is_encoder_decoder=False, model_type="server")  # prompts are as a causal model's
        self.config.get_text_config = lambda **_: self.config  # it has no positions that are known
        self.counts = Counter()  # of one `translate`
        self.scores: dict[tuple[str, str], tuple[float, int]] = {}  # (prompt, output): log-probability, tokens
        self._pause_until, self._lock, self._wants_logps = 0.0, threading.Lock(), True

    # --- one request

    @cached_property
    def _client(self):
        import httpx2

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=self.concurrency)
        return httpx2.Client(headers=headers, timeout=self.timeout, limits=limits)

    def _hidden(self, text: str) -> str:
        text = " ".join(text.split())[:300]
        return text.replace(self._key, "***") if self._key else text

    def _request(self, method: str, path: str, body: dict | None = None) -> dict:
        """The answer's JSON. `Refused` where the server won't, `TimeoutError` where it doesn't, `ConnectionError` where
        there is none, `ValueError` where it takes neither key nor model."""
        import httpx2

        for attempt in range(1, self.attempts + 1):
            time.sleep(max(0.0, self._pause_until - time.monotonic()))
            pause = self.wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            try:
                answer = self._client.request(method, self.url + path, json=body)
            except httpx2.TimeoutException:
                failure = TimeoutError(f"{self.url}: no answer within {self.timeout:g} s, {attempt} times")
            except httpx2.TransportError as error:
                failure = ConnectionError(f"{self.url}: {self._hidden(str(error)) or type(error).__name__}")
            else:
                if answer.status_code < 300:
                    try:
                        found = answer.json()
                        if isinstance(found, dict):
                            return found
                        failure = Refused(f"an answer that is no JSON object: {found!r:.80}")
                    except ValueError:
                        failure = Refused(f"an answer that is no JSON: {answer.text[:80]!r}")
                elif answer.status_code in (401, 403, 404):
                    raise ValueError(f"{self.url}{path}: {answer.status_code}, {self._hidden(answer.text)}")
                elif answer.status_code not in AGAIN:
                    raise Refused(f"{answer.status_code}: {self._hidden(answer.text)}")
                else:
                    failure = Refused(f"{answer.status_code}, {attempt} times: {self._hidden(answer.text)}")
                    asked = answer.headers.get("retry-after", "")
                    if asked.replace(".", "", 1).isdigit():
                        pause = min(float(asked), LONGEST_PAUSE)
                        with self._lock:  # all requests wait, not this one alone
                            self._pause_until = max(self._pause_until, time.monotonic() + pause)
            if attempt < self.attempts:
                self.counts["requests tried again"] += 1
                time.sleep(pause)
        raise failure

    def _body(self, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> dict:
        body = {"model": self.model, "max_tokens": max_new_tokens, "temperature": temperature, "stream": False}
        if self.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        elif self.as_ids:
            body["prompt"] = encode_prompt(self.tokenizer, prompt)
        else:
            bos = self.bos
            if bos is None and self.tokenizer is not None:
                plain = self.tokenizer(prompt)["input_ids"] == encode_prompt(self.tokenizer, prompt)
                bos = "" if plain else self.tokenizer.bos_token
            body["prompt"] = (bos or "") + prompt
        if temperature > 0:
            body |= {"top_p": top_p, "seed": seed} | self.sampling
        if self._wants_logps:
            body["logprobs"] = True if self.api == "chat" else 1
        return body | self.extra

    def _ask(self, *settings) -> tuple[str, float | None, int | None]:
        """An output, its log-probability and tokens as far as the server tells; `settings` are `_body`'s."""
        answer = self._request(
            "POST", "/chat/completions" if self.api == "chat" else "/completions", self._body(*settings)
        )
        try:
            choice = answer["choices"][0]
            message = choice["message"] if self.api == "chat" else choice
            text = message["content"] if self.api == "chat" else message["text"]
            refusal = message.get("refusal") or (choice.get("finish_reason") == "content_filter" and "content_filter")
        except (KeyError, IndexError, TypeError):
            raise Refused(f"an answer without an output: {str(answer)[:80]!r}") from None
        if refusal or not isinstance(text, str):
            raise Refused(self._hidden(str(refusal or f"its output is {text!r}")))
        usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                self.counts[name.replace("_", " ")] += usage.get(name) or 0
        told = choice.get("logprobs") if isinstance(choice.get("logprobs"), dict) else {}
        logps = (
            [t.get("logprob") for t in told.get("content") or []] if self.api == "chat" else told.get("token_logprobs")
        )
        if not logps or not all(isinstance(logp, (int, float)) for logp in logps):
            return text.strip(), None, None
        return text.strip(), float(sum(logps)), len(logps)

    # --- what it is known by

    @cached_property
    def identity(self) -> str:
        """The first call finds out whether there is such a server, such a model, and log-probabilities. Errors as
        `_request`'s; `ValueError` where the model's name is missing."""
        try:
            listed = self._request("GET", "/models").get("data") or []
        except (Refused, TimeoutError) as error:  # transformers serve without a cache folder: 500
            listed = [] if self.model else self._fail(error)
        names = [entry.get("id") for entry in listed if isinstance(entry, dict)]
        if self.model is None:
            if len(names) != 1:
                raise ValueError(f"{self.url} serves {', '.join(map(str, names)) or 'nothing'}; write {self.url}#MODEL")
            self.model = names[0]
        about = next((entry for entry in listed if isinstance(entry, dict) and entry.get("id") == self.model), {})
        about = {key: about[key] for key in sorted(about) if key in ("id", "root", "owned_by", "max_model_len", "meta")}
        answers = []
        for direction, source in PROBES:
            try:
                answers.append(self._ask(build_prompt(direction, source), 16, 0.0, 1.0, None))
            except Refused as error:
                if not self._wants_logps:
                    self._fail(error)
                self._wants_logps = False  # some refuse a request for log-probabilities
                try:
                    answers.append(self._ask(build_prompt(direction, source), 16, 0.0, 1.0, None))
                except Refused as refused:
                    self._fail(refused)
        self._wants_logps = self._wants_logps and any(logp is not None for _, logp, _ in answers)
        self.counts.clear()
        known = (self.url, self.model, self.api, about, [text for text, *_ in answers])
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def _fail(self, error: Exception):
        raise ValueError(f"{self.url}, model {self.model!r}: {error}") from None

    @property
    def gives_logps(self) -> bool:
        return bool(self.identity) and self._wants_logps

    # --- many

    def translate(
        self,
        prompts: list[str],
        *,
        max_new_tokens: int = 250,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        counts: Counter | None = None,
        journal: str | Path | None = None,
        progress: str = "",
    ) -> list[str]:
        """As `translate.translate`: an output a prompt, by the first process, told to the others.

        A prompt that the server refuses or doesn't answer has an empty output and is counted, as are tokens; it isn't
        in the journal, so that another run asks again. `ConnectionError` where the server went away: what is finished
        is in the journal.
        """
        from lmolt.generation.translate import process_state

        outputs, failure = None, None
        if process_state().is_main_process:
            try:
                settings = (max_new_tokens, temperature, top_p)
                outputs = self._translate(prompts, settings, seed, journal, progress)
            except (ConnectionError, ValueError) as error:
                failure = error
        told = [outputs, failure, self.scores, self.counts]
        if process_state().num_processes > 1:
            broadcast_object_list(told)
        outputs, failure, self.scores, made = told
        if failure is not None:
            raise failure
        if counts is not None:
            counts.update(+made)
        self.counts = Counter()
        return outputs

    def _translate(self, prompts, settings: tuple, seed: int, journal, progress: str) -> list[str]:
        keys, asked, seen = [], {}, Counter()
        for prompt in prompts:
            seen[prompt] += 1
            nth = seen[prompt] if settings[1] > 0 else 1
            known = (self.identity, self.as_ids, self.bos, self.extra, self.sampling, settings, seed, prompt, nth)
            keys.append(hashlib.sha256(repr(known).encode()).hexdigest()[:32])
            asked[keys[-1]] = prompt
        made = {key: tuple(value) for key, value in read_journal(journal).items() if key in asked}
        if made:
            tqdm.write(f"{progress}: {len(made)} of {len(asked)} rows are in {journal}")
        todo = [key for key in asked if key not in made]
        bar = tqdm(desc=progress, total=len(todo), unit="row", disable=not progress)
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with bar, Journal(journal, 0) as record:
                row_seed = lambda key: (seed + int(key[:8], 16)) % 2**31
                futures = {pool.submit(self._ask, asked[key], *settings, row_seed(key)): key for key in todo}
                for future in as_completed(futures):
                    try:
                        made[futures[future]] = future.result()
                        record({futures[future]: list(made[futures[future]])})
                    except (Refused, TimeoutError) as error:
                        cause = "timed out" if isinstance(error, TimeoutError) else "refused by the server"
                        if not self.counts[cause]:
                            tqdm.write(f"{progress}: {cause}, its output is empty: {error}")
                        self.counts[cause] += 1
                        made[futures[future]] = ("", None, None)
                    bar.update()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        for key, prompt in asked.items():
            text, logp, tokens = made[key]
            if logp is not None:
                self.scores[prompt, text] = max(self.scores.get((prompt, text), (logp, tokens)), (logp, tokens))
        return [made[key][0] for key in keys]
