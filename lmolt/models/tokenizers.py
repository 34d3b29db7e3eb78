"""A model's tokenizer: loaded, checked against the model and the texts, and what it can't write counted."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable

from lmolt.files import content_hash

SAMPLE = 200  # texts that are decoded again


def check_tokenizer(tokenizer, config, name: str) -> None:
    """`ValueError` where a tokenizer can't be the model's: far fewer tokens than embeddings, or ends beyond them."""
    rows = config.get_text_config(decoder=True).vocab_size
    if rows - len(tokenizer) > max(256, rows // 10):
        raise ValueError(
            f"{name!r}: its tokenizer has {len(tokenizer):,} tokens and the model {rows:,}: tokenizer files are "
            "missing (tokenizer.json, tokenizer.model, spiece.model, vocab.json); copy them from the model's source"
        )
    for what in ("bos", "eos"):
        token = getattr(tokenizer, f"{what}_token_id")
        if token is not None and token >= rows:
            raise ValueError(f"{name!r}: its tokenizer's {what} token is number {token:,} and the model has {rows:,}")


def check_texts(tokenizer, config, what: str, texts: Iterable[tuple[str | None, list[int]]], say: Callable) -> Counter:
    """Look at texts as the model sees them: (text, its token ids), before any compute.

    `ValueError` for ids that the model has no embedding for, or where no text comes back from the tokenizer. Counted
    and said: texts with unknown tokens, and (of `SAMPLE` of them) texts that come back changed.
    """
    texts, counts = list(texts), Counter()
    rows = config.get_text_config(decoder=True).vocab_size
    for text, ids in texts:
        if len(ids) and max(ids) >= rows:
            raise ValueError(
                f"{what}: {(text or '')[:80]!r} has the token number {max(ids):,} and the model {rows:,} embeddings; "
                "tokenizer and model don't belong together"
            )
    unknown = [text for text, ids in texts if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids]
    counts[f"unk_in_{what}"] = len(unknown)
    if unknown:
        example = next((f", such as {text[-80:]!r}" for text in unknown if text), "")
        say(
            f"{what}: {len(unknown)} of {len(texts)} have characters that the tokenizer doesn't know "
            f"({tokenizer.unk_token}){example}"
        )
    known = [(text, ids) for text, ids in texts if text and text.strip()]
    sample = known[:: max(1, len(known) // SAMPLE)]
    changed, emptied = [], 0
    for text, ids in sample:
        back = _letters(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        emptied += 2 * len(back) < len(_letters(text))
        if back != _letters(text) and tokenizer.unk_token_id not in ids:
            changed.append((text, back))
    if sample and (emptied == len(sample) or len(changed) == len(sample)):
        text, ids = sample[0]
        back = tokenizer.decode(list(ids), skip_special_tokens=True)
        raise ValueError(
            f"{what}: no text comes back from the tokenizer as it went in, such as {text[-60:]!r} as {back[-60:]!r}; "
            "its files are missing or another model's"
        )
    if changed:
        say(
            f"{what}: {len(changed)} of {len(sample)} looked at come back changed from the tokenizer, such as "
            f"{changed[0][0][-60:]!r}"
        )
    counts[f"changed_{what}"] = len(changed)
    return counts


def _letters(text: str) -> str:
    return "".join(text.split())


def tokenizer_identity(tokenizer) -> str:
    """What tells one tokenizer from another: its vocabulary, special tokens and rules."""
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.special_tokens_map.items()),
    ]
    if tokenizer.is_fast:
        parts.append(tokenizer.backend_tokenizer.to_str())
    elif vocabulary := getattr(tokenizer, "vocab_file", None):
        parts.append(content_hash(vocabulary))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Reader:
    """Token ids -> texts, special tokens and outer blanks removed; an unknown token, or an id without one, is `unk`."""

    def __init__(self, tokenizer, unk: str = ""):
        self.tokenizer, self.unk = tokenizer, unk
        self.size = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self.unknown = tokenizer.unk_token_id

    def texts(self, rows: list[list[int]]) -> list[tuple[str, int]]:
        """Each row's text, and how many of its tokens have none."""
        return [self._read(row) for row in rows]

    def _read(self, row: list[int]) -> tuple[str, int]:
        lost = lambda token: token >= self.size or token == self.unknown
        count = sum(map(lost, row))
        decode = lambda ids, skip: self.tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        if not (count and self.unk):
            return decode([token for token in row if token < self.size], True).strip(), count
        special = set(self.tokenizer.all_special_ids)
        kept = [self.unknown if lost(token) else token for token in row if lost(token) or token not in special]
        return decode(kept, False).replace(self.tokenizer.unk_token, self.unk).strip(), count
