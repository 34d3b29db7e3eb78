"""A model's tokenizer: loaded, checked against the model and the texts, and what it can't write counted."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable

from lmolt.files import content_hash
from lmolt.prompts import unknown_id

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
    and said: texts with unknown tokens, and texts that come back changed: all that have a character which the tokenizer
    drops or writes as another, and of `SAMPLE` of them what else changes.
    """
    texts, counts, unk = list(texts), Counter(), unknown_id(tokenizer)
    rows = config.get_text_config(decoder=True).vocab_size
    for text, ids in texts:
        if len(ids) and max(ids) >= rows:
            raise ValueError(
                f"{what}: {(text or '')[:80]!r} has the token number {max(ids):,} and the model {rows:,} embeddings; "
                "tokenizer and model don't belong together"
            )
    unknown = [text for text, ids in texts if unk in ids]
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
        back = _read(tokenizer, ids)
        emptied += 2 * len(back) < len(_letters(text))
        if back != _letters(text) and unk not in ids:
            changed.append(text)
    if sample and (emptied == len(sample) or len(changed) == len(sample)):
        text, ids = sample[0]
        back = tokenizer.decode(list(ids), skip_special_tokens=True)
        raise ValueError(
            f"{what}: no text comes back from the tokenizer as it went in, such as {text[-60:]!r} as {back[-60:]!r}; "
            "its files are missing or another model's"
        )
    odd, seen = _changed_characters(tokenizer, {text for text, _ in known}), set(changed)
    changed = [text for text, _ in known if text in seen or not odd.isdisjoint(text)]
    if changed:
        which = f" ({', '.join(map(repr, sorted(odd)[:5]))})" if odd else f" (of {len(sample)} looked at)"
        say(
            f"{what}: {len(changed)} of {len(texts)} come back changed from the tokenizer{which}, such as "
            f"{changed[0][-60:]!r}"
        )
    counts[f"changed_{what}"] = len(changed)
    return counts


def _changed_characters(tokenizer, texts: Iterable[str]) -> set[str]:
    """The characters that the tokenizer drops or writes as others, unknown ones aside: they don't come back."""
    changed, unk = set(), unknown_id(tokenizer)
    for character in set().union(*texts):
        ids = tokenizer(f"C{character}C", add_special_tokens=False)["input_ids"]
        if unk not in ids and _read(tokenizer, ids) != _letters(f"C{character}C"):
            changed.add(character)
    return changed


def _read(tokenizer, ids: Iterable[int]) -> str:
    return _letters(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def as_written(tokenizer, texts: Iterable[str]) -> list[str]:
    """What becomes of texts that a model writes without an error: what its tokenizer lacks is not in them."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [text for text, _ in Reader(tokenizer).texts(ids)]


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
        self.known = set(tokenizer.get_vocab().values())  # there may be gaps between
        self.unknown = unknown_id(tokenizer)
        self.special = set(tokenizer.all_special_ids) - {self.unknown}  # what begins and ends an output says nothing

    def texts(self, rows: list[list[int]]) -> list[tuple[str, int]]:
        """Each row's text, and how many of its tokens have none: unknown ones, and special ones amid it."""
        return [self._read(row) for row in rows]

    def _read(self, row: list[int]) -> tuple[str, int]:
        lost = lambda token: token not in self.known or token == self.unknown
        special = self.special.__contains__
        inner = list(itertools.dropwhile(special, row))
        inner = list(itertools.dropwhile(special, reversed(inner)))
        count = sum(lost(token) or special(token) for token in inner)
        decode = lambda ids, skip: self.tokenizer.decode(
            ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        if not (count and self.unk) or self.unknown is None:
            return decode([token for token in row if token in self.known], True).strip(), count
        kept = [self.unknown if lost(token) else token for token in row if not special(token)]
        return decode(kept, False).replace(self.tokenizer.unk_token, self.unk).strip(), count
