"""Captions against captions: word pieces, BLEU, ROUGE; METEOR is in meteor.py."""

import json
import re
from pathlib import Path

import numpy as np

from lmolt.files import known_as
from lmolt.metrics import ngrams
from lmolt.metrics.metric import NOT_COMPARABLE, Metric
from lmolt.metrics.smiles import SPECIAL_TOKEN, oddity

MAX_PIECES = 512  # the reference scripts truncate there, without special tokens
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]")  # and then drop these where they occur in the text itself


def tokenizer_name(tokenizer) -> str:
    """The word pieces of `tokenize`, as conventions name them."""
    if tokenizer is None:
        return f"plain words and punctuation marks: {NOT_COMPARABLE}, which need SciBERT's"
    if callable(tokenizer):
        return getattr(tokenizer, "__name__", "a callable")
    return f"word pieces of {known_as(tokenizer)}"


def word_pieces(
    texts: list[str], tokenizer=None, max_pieces: int | None = MAX_PIECES
) -> tuple[list[list[int]], list[str]]:
    """`(pieces, vocabulary)`: the first `max_pieces` of each text less special ones, as indices into names."""
    ids, names = tokenize(texts, tokenizer, max_pieces)
    return drop_special(ids, names), names


def drop_special(ids: list[list[int]], names: list[str]) -> list[list[int]]:
    """Texts' pieces without [PAD], [CLS] and [SEP]."""
    special = {i for i, name in enumerate(names) if name in _SPECIAL}
    return [row if special.isdisjoint(row) else [i for i in row if i not in special] for row in ids]


def tokenize(texts: list[str], tokenizer, max_pieces: int | None) -> tuple[list[list[int]], list[str]]:
    """`(pieces, vocabulary)`: each text as indices into the vocabulary's names, special ones included.

    `tokenizer`: folder or Hub id of a tokenizer, a callable `str -> list[str]`, or None for lower-cased words and
    punctuation marks (plain, and not comparable with published numbers). `FileNotFoundError` for a folder without one.
    """
    if tokenizer is None:
        tokenizer = lambda text: re.findall(r"\w+|[^\w\s]", text.lower())
    if callable(tokenizer):
        number = {}
        ids = [[number.setdefault(p, len(number)) for p in tokenizer(text)[:max_pieces]] for text in texts]
        return ids, list(number)
    return _ids_of_folder(texts, str(tokenizer), max_pieces)


def _ids_of_folder(texts: list[str], name: str, max_pieces: int | None) -> tuple[list[list[int]], list[str]]:
    folder = Path(name)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    plain_bert = (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").is_file()
    if plain_bert and settings.get("tokenizer_class") in ("BertTokenizer", "BertTokenizerFast"):
        # The same Rust tokenizer that transformers would build, without transformers' two seconds of import.
        from tokenizers import BertWordPieceTokenizer

        tokenizer = BertWordPieceTokenizer(
            str(folder / "vocab.txt"),
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        # BERT never joins across a space, so each distinct chunk between spaces is tokenized once.
        number = {}
        chunks = [[number.setdefault(c, len(number)) for c in text.split(" ")] for text in texts]
        pieces = [e.ids for e in tokenizer.encode_batch(list(number), add_special_tokens=False)]
        ids = [[i for c in row for i in pieces[c]][:max_pieces] for row in chunks]
        return ids, [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no tokenizer could be loaded from {name!r} (a folder with tokenizer files, or a Hub id such as "
            f"allenai/scibert_scivocab_uncased): {str(error).splitlines()[0]}"
        ) from None
    # `tokenize()` ignores truncation in transformers 5, so the tokenizer itself is called.
    ids = tokenizer(texts, add_special_tokens=False, truncation=max_pieces is not None, max_length=max_pieces)[
        "input_ids"
    ]
    return ids, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


def oddities(predictions: list[str]) -> dict[str, np.ndarray]:
    """Columns `count_CAUSE`, `(n,)` each: which outputs are no caption, or have a tokenizer's special token in them."""
    found = {
        cause: [oddity(prediction) == cause for prediction in predictions]
        for cause in ("missing_value", "number", "list")
    }
    found["special_token"] = [SPECIAL_TOKEN.search(prediction) is not None for prediction in predictions]
    return {f"count_{cause}_prediction": np.array(its, float) for cause, its in found.items()}


def bleu_columns(references: tuple, predictions: tuple) -> dict[str, np.ndarray]:
    """Sufficient statistics of corpus BLEU-1 to 4, one float column `(n,)` each; sums of them give the score.

    Arguments are `(tokens, lengths)` as in ngrams.py. Each text's total is at least 1, as in NLTK, which is why
    `total_k` is not the length minus k - 1.
    """
    matches, _, totals = ngrams.overlap(references, predictions, 4)
    columns = {f"match_{k + 1}": matches[:, k] for k in range(4)}
    columns |= {f"total_{k + 1}": np.maximum(totals[:, k], 1) for k in range(4)}
    return columns | {"len_pred": predictions[1].astype(float), "len_ref": references[1].astype(float)}


BLEU_COLUMNS = [f"{kind}_{k}" for kind in ("match", "total") for k in (1, 2, 3, 4)] + ["len_pred", "len_ref"]


def bleu_of_sums(sums: np.ndarray, order: int = 4) -> np.ndarray:
    """Corpus BLEU up to `order` from summed `BLEU_COLUMNS`, `(..., 10) -> (...,)`."""
    return ngrams.bleu(sums[..., :order], sums[..., 4 : 4 + order], sums[..., 8], sums[..., 9])


def rouge(references: list[str], predictions: list[str]) -> dict[str, np.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 of n pairs, `(n,)` each, as rouge-score without stemming (Lin 2004)."""
    sides = _rouge_words(references, predictions)
    scores = ngrams.f1(*ngrams.overlap(*map(ngrams.flatten, sides), 2))
    return {"rouge1": scores[:, 0], "rouge2": scores[:, 1], "rougeL": _rouge_l(*map(_as_text, sides))}


def shuffled_rouge_l(references: list[str], predictions: list[str], shuffles: np.ndarray) -> np.ndarray:
    """ROUGE-L F1, `(S, n)`, of reference i with prediction `shuffles[s, i]`."""
    ours, theirs = map(_as_text, _rouge_words(references, predictions))
    return np.array([_rouge_l(ours, [theirs[j] for j in shuffle]) for shuffle in shuffles])


def _rouge_words(*sides: list[str]) -> list[list[list[int]]]:
    """Each text's words as numbers."""
    number = {}
    return [
        [[number.setdefault(w, len(number)) for w in re.findall("[a-z0-9]+", text.lower())] for text in texts]
        for texts in sides
    ]


def _rouge_l(references: list, predictions: list) -> np.ndarray:
    from rapidfuzz.distance import LCSseq
    from rapidfuzz.process import cpdist

    longest = cpdist(references, predictions, scorer=LCSseq.similarity, dtype=np.int64).astype(float)
    return ngrams.f1(longest, *(np.array([len(text) for text in side], float) for side in (references, predictions)))


def _as_text(sequences: list[list[int]]) -> list:
    """Word numbers as characters, which rapidfuzz compares fastest; as they are where they outnumber Unicode."""
    if max((max(s) for s in sequences if s), default=0) >= 0x10FFFF:
        return sequences
    return ["".join(map(chr, s)) for s in sequences]


_STATISTICS = tuple(f"stat_bleu_{column}" for column in BLEU_COLUMNS)
_BLEU = "NLTK corpus BLEU, weights 1/{order} each, no smoothing; {{pieces}}, first {max_pieces}"
_ROUGE = "rouge-score F1, lower-cased words, no stemming"
METRICS = (
    Metric(
        key="bleu2",
        label="BLEU-2",
        better=1,
        convention=_BLEU.format(order=2, max_pieces=MAX_PIECES),
        paper=True,
        columns=_STATISTICS,
        value=lambda sums: bleu_of_sums(sums, 2),
    ),
    Metric(
        key="bleu4",
        label="BLEU-4",
        better=1,
        convention=_BLEU.format(order=4, max_pieces=MAX_PIECES),
        paper=True,
        columns=_STATISTICS,
        value=bleu_of_sums,
    ),
    Metric(key="rouge1", label="ROUGE-1", better=1, convention=_ROUGE, paper=True),
    Metric(key="rouge2", label="ROUGE-2", better=1, convention=_ROUGE, paper=True),
    Metric(key="rougeL", label="ROUGE-L", better=1, convention=_ROUGE, paper=True),
)
