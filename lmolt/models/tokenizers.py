"""A model's tokenizer: loaded, checked against the model and the texts, and what it can't write counted."""

import hashlib

from lmolt.files import content_hash


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
