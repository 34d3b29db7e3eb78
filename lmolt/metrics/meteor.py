"""METEOR over a whole corpus, equal to NLTK's `meteor_score` (Lavie & Agarwal 2007), and the WordNet it reads.

NLTK's own WordNet reader builds all 155,000 entries before the first look-up (seconds); here a word is looked up by
bisection in the sorted index files and only its synsets' lines are read.
"""

import bisect
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from lmolt.metrics import ngrams
from lmolt.metrics.caption import MAX_PIECES
from lmolt.metrics.metric import Metric

METRICS = (
    Metric(
        key="meteor",
        label="METEOR",
        better=1,
        convention=f"NLTK METEOR (alpha 0.9, beta 3, gamma 0.5), WordNet 3.0; {{pieces}}, first {MAX_PIECES}",
        paper=True,
    ),
    Metric(
        key="meteor_stem",
        label="METEOR (stems)",
        better=1,
        convention="METEOR (alpha 0.9, beta 3, gamma 0.5) of equal word pieces and equal Porter stems, without "
        f"WordNet's synonyms: not the published METEOR; {{pieces}}, first {MAX_PIECES}",
        instead_of="meteor",
    ),
)
_SUFFIXES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
# WordNet's detachment rules (morphy(7WN)): ending -> ending of the base form.
_ENDINGS = {
    "noun": "s: ses:s ves:f xes:x zes:z ches:ch shes:sh men:man ies:y",
    "verb": "s: ies:y es:e es: ed:e ed: ing:e ing:",
    "adj": "er: est: er:e est:e",
    "adv": "",
}


class WordNet:
    """Synonyms from WordNet's own files. `FileNotFoundError` (saying where it looked) where there are none."""

    def __init__(self, nltk_data: str | Path | None = None):
        places = [nltk_data] if nltk_data else _nltk_folders()
        for place in places:
            folder = Path(place) / "corpora"
            if (folder / "wordnet" / "index.noun").is_file():
                read = lambda name, folder=folder: (folder / "wordnet" / name).read_bytes()
                break
            if (folder / "wordnet.zip").is_file():
                archive = zipfile.ZipFile(folder / "wordnet.zip")
                read = lambda name, archive=archive: archive.read(f"wordnet/{name}")
                break
        else:
            raise FileNotFoundError(
                f"WordNet not found in {', '.join(map(str, places))}; run `python -m nltk.downloader wordnet`, or name "
                "the folder that holds corpora/wordnet(.zip) with --nltk_data"
            )
        self._index = {kind: read(f"index.{kind}").splitlines() for kind in _SUFFIXES}
        self._data = {kind: read(f"data.{kind}") for kind in _SUFFIXES}
        self._exceptions = {
            kind: {words[0]: words[1:] for words in map(str.split, read(f"{kind}.exc").decode().splitlines())}
            for kind in _SUFFIXES
        }
        self._endings = {kind: [e.split(":") for e in rules.split()] for kind, rules in _ENDINGS.items()}
        self._members = {}

    def synonyms(self, word: str) -> set[str]:
        """Single words that share a synset with `word` or one of its base forms, in WordNet's own spelling."""
        word = word.lower()
        found = set()
        for kind in _SUFFIXES:
            for form in self._base_forms(word, kind):
                for offset in self._offsets(form, kind):
                    found |= self._synset(kind, offset)
        return found

    def _base_forms(self, word: str, kind: str) -> list[str]:
        """Morphy as NLTK has it: the word and its exceptions, or else the word and each single detachment."""
        forms = self._exceptions[kind].get(word)
        if forms is None:
            forms = [word[: -len(a)] + b for a, b in self._endings[kind] if word.endswith(a)]
        return [f for f in (word, *forms) if self._offsets(f, kind)]

    def _offsets(self, form: str, kind: str) -> list[int]:
        lines, start = self._index[kind], form.encode() + b" "
        at = bisect.bisect_left(lines, start)
        if not form or at == len(lines) or not lines[at].startswith(start):
            return []
        fields = lines[at].split()  # lemma pos synset_cnt p_cnt [symbol...] sense_cnt tagsense_cnt offset...
        return [int(f) for f in fields[-int(fields[2]) :]]

    def _synset(self, kind: str, offset: int) -> set[str]:
        if (kind, offset) not in self._members:
            data = self._data[kind]
            fields = data[offset : data.index(b"|", offset)].decode().split()  # offset file type w_cnt (word lex_id)...
            words = (w.partition("(")[0] for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2])
            self._members[kind, offset] = {w for w in words if "_" not in w}
        return self._members[kind, offset]


def _nltk_folders() -> list[str]:
    """Where NLTK looks for its data, in its order (without importing NLTK, which takes a second)."""
    folders = [f for f in os.environ.get("NLTK_DATA", "").split(os.pathsep) if f]
    folders += [os.path.expanduser("~/nltk_data")]  # noqa: PTH111 - pathlib's raises where there is no home
    folders += [f"{sys.prefix}/{part}nltk_data" for part in ("", "share/", "lib/")]
    return folders + [f"/usr/{part}nltk_data" for part in ("share/", "local/share/", "lib/", "local/lib/")]


def meteor(
    references: tuple, predictions: tuple, words: list[str], wordnet: WordNet | None = None
) -> dict[str, np.ndarray]:
    """METEOR of n pairs, `(n,)` a key, with NLTK's defaults (alpha 0.9, beta 3, gamma 0.5), as `meteor_score` gives it.

    `references`, `predictions`: `(tokens, lengths)` of indices into `words`. Alignment: equal words, then equal Porter
    stems (`meteor_stem` ends here), then WordNet synonyms (`meteor`, with a `wordnet`), each from the last word to the
    first.
    """
    from nltk.stem.porter import PorterStemmer

    n = len(references[1])
    # What is compared is lower-cased, so pieces that differ in case alone are one word.
    number = {}
    same = np.array([number.setdefault(w.lower(), len(number)) for w in words], np.int64)
    symbols = [same[tokens] for tokens, _ in (references, predictions)]
    rows = [np.repeat(np.arange(n), lengths) for _, lengths in (references, predictions)]
    matched_reference = np.full(len(symbols[1]), -1)  # for each prediction token, the reference token it is aligned to
    left = [np.arange(len(s)) for s in symbols]

    def align(ours: np.ndarray, theirs: np.ndarray) -> None:
        matched_reference[left[1][theirs]] = left[0][ours]
        left[:] = np.delete(left[0], ours), np.delete(left[1], theirs)
        for side, taken in enumerate((ours, theirs)):
            rows[side], symbols[side] = np.delete(rows[side], taken), np.delete(symbols[side], taken)

    align(*_pair_equal(rows, symbols))
    stemmer, lowered, number = PorterStemmer(), list(number), {}
    stems = np.zeros(len(lowered), np.int64)
    for w in np.unique(np.concatenate(symbols)):
        stems[w] = number.setdefault(stemmer.stem(lowered[w]), len(number))
    symbols = [stems[s] for s in symbols]
    align(*_pair_equal(rows, symbols))
    scores = {"meteor_stem": _score_of(matched_reference, references[1], predictions[1])}
    if wordnet is not None:
        align(*_pair_synonyms(rows, symbols, list(number), wordnet))  # NLTK looks up the stems, not the words
        scores["meteor"] = _score_of(matched_reference, references[1], predictions[1])
    return scores


def _score_of(matched_reference: np.ndarray, reference_lengths, prediction_lengths) -> np.ndarray:
    """METEOR `(n,)` of an alignment: for each prediction token its reference token, -1 for none."""
    n = len(reference_lengths)
    hits = np.flatnonzero(matched_reference >= 0)
    partner, row = matched_reference[hits], np.repeat(np.arange(n), prediction_lengths)[hits]
    count = np.bincount(row, minlength=n)
    continues = (hits[1:] == hits[:-1] + 1) & (partner[1:] == partner[:-1] + 1) & (row[1:] == row[:-1])
    chunks = count - np.bincount(row[1:][continues], minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = count / prediction_lengths, count / reference_lengths
        f_mean = precision * recall / (0.9 * precision + 0.1 * recall)
        score = f_mean * (1 - 0.5 * (chunks / count) ** 3)
    return np.where(count > 0, score, 0.0)


def _pair_equal(rows: list, symbols: list) -> tuple[np.ndarray, np.ndarray]:
    """Indices that pair equal symbols of a row: the k-th last on one side with the k-th last on the other.

    That is the pairing NLTK makes when it walks the prediction from its end and takes the last free reference word:
    of the reference "a b a" and the prediction "a c a a", (2, 3) and (0, 2); the prediction's first "a" stays free.
    """
    size = max(s.max(initial=0) for s in symbols) + 1
    both = np.concatenate([r * size + s for r, s in zip(rows, symbols, strict=True)])
    both = np.split(np.unique(both, return_inverse=True)[1], [len(rows[0])])
    keys = []
    for side in both:
        order = np.argsort(side[::-1], kind="stable")  # by symbol, the last occurrence first
        ordered = side[::-1][order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])[: len(ordered)]
        rank = np.empty(len(side), np.int64)
        rank[len(side) - 1 - order] = np.arange(len(side)) - np.repeat(starts, np.diff(np.r_[starts, len(side)]))
        keys.append(side * (max(map(len, both)) + 1) + rank)
    _, ours, theirs = np.intersect1d(*keys, assume_unique=True, return_indices=True)
    return ours, theirs


def _pair_synonyms(rows: list, symbols: list, words: list[str], wordnet: WordNet) -> tuple[list, list]:
    """Indices that pair synonyms of a row: from the prediction's end, each word takes the last that is still free."""
    number = {words[w]: w for w in np.unique(symbols[0])}
    synonyms = [[] for _ in words]
    for w in np.unique(symbols[1]):
        synonyms[w] = [number[s] for s in wordnet.synonyms(words[w]) if s in number]
    flat, counts = ngrams.flatten(synonyms)
    # Only words with a synonym in their own row go through the loop: a few in a hundred.
    sizes = counts[symbols[1]]
    theirs = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(theirs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    synonym = flat[np.repeat((np.cumsum(counts) - counts)[symbols[1]], sizes) + within]
    present = np.isin(rows[1][theirs] * len(words) + synonym, rows[0] * len(words) + symbols[0])
    wanted = {}
    for i, row, word in zip(*(x[present].tolist() for x in (theirs, rows[1][theirs], synonym)), strict=True):
        wanted.setdefault(i, []).append((row, word))
    places = {place: [] for options in wanted.values() for place in options}
    for j, place in enumerate(zip(rows[0].tolist(), symbols[0].tolist(), strict=True)):
        if place in places:
            places[place].append(j)
    pairs = []
    for i in sorted(wanted, reverse=True):
        free = [places[place] for place in wanted[i] if places[place]]
        if free:
            pairs.append((max(free, key=lambda positions: positions[-1]).pop(), i))
    return [j for j, _ in pairs], [i for _, i in pairs]
