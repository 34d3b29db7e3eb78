"""Hallucination measures: those of the paper (Gkoumas & Liakata 2024, section 3.4) and functional groups claimed."""

import functools
import re

import numpy as np

from lmolt.metrics import ngrams
from lmolt.metrics.metric import Metric

EMPTY_IS_NOT_ENTAILED = "an empty output counts as not entailed (probability 0)"
_TOKENS_PER_BATCH = 8192


def chrf(references: list[str], predictions: list[str]) -> np.ndarray:
    """Chr-F of n pairs, `(n,)`: mean of the character F1 for n = 1, 2, 3 (Popovic 2015 with beta 1).

    As NLTK's `sentence_chrf(min_len=1, max_len=3, beta=1)`: spaces are left out, an undefined order counts as 0.
    """
    corpora = [ngrams.characters(["".join(text.split()) for text in texts]) for texts in (references, predictions)]
    return ngrams.f1(*ngrams.overlap(*corpora, 3)).mean(1)


def win(chrf_scores, delta_length, valid, chrf_threshold: float = 0.3, delta_threshold: int = 5) -> np.ndarray:
    """1 where a molecule wins, `(n,)`: Chr-F > 0.3, |delta length| < 5 and valid."""
    return ((chrf_scores > chrf_threshold) & (np.abs(delta_length) < delta_threshold) & valid).astype(float)


def entailment(references: list[str], predictions: list[str], model: str) -> tuple[np.ndarray, np.ndarray]:
    """Probability that the reference entails the prediction, and 1 where that is the arg-max label, `(n,)` each.

    `model`: folder or Hub id of a sequence-classification model whose `id2label` names an entailment label. Premise =
    reference, hypothesis = prediction, truncated to the model's length; an empty prediction scores 0 and 0.
    `OSError` where no model can be loaded, `ValueError` where its labels name no entailment.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
    label = entailment_label(classifier.config.id2label, model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = classifier.to(device, torch.float32).eval()
    limit = min(tokenizer.model_max_length, getattr(classifier.config, "max_position_embeddings", None) or 512)
    encoded = tokenizer(references, predictions, truncation=True, max_length=limit)
    probability, wins = np.zeros(len(references)), np.zeros(len(references))
    order = [i for i, text in enumerate(predictions) if text.strip()]
    order.sort(key=lambda i: -len(encoded["input_ids"][i]))  # the longest first: too big a batch shows at once
    while order:
        size = max(1, _TOKENS_PER_BATCH // len(encoded["input_ids"][order[0]]))
        batch, order = order[:size], order[size:]
        inputs = tokenizer.pad({k: [encoded[k][i] for i in batch] for k in encoded}, return_tensors="pt").to(device)
        with torch.inference_mode():
            logits = classifier(**inputs).logits.float().cpu()  # (B, labels)
        probability[batch] = logits.softmax(-1)[:, label].numpy()
        wins[batch] = (logits.argmax(-1) == label).numpy()
    return probability, wins


def check_labels(model: str) -> None:
    """`ValueError` where a model's config names no entailment label; what can't be read is found as it is loaded."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return
    entailment_label(config.id2label, model)


def entailment_label(id2label: dict[int, str], model: str) -> int:
    """Index of the entailment label: checkpoints order theirs differently, so only the names can tell."""
    found = [int(i) for i, name in id2label.items() if re.fullmatch(r"(?i)entail(s|ed|ment)?", name.strip())]
    if len(found) != 1:
        raise ValueError(
            f"{model}: id2label {dict(id2label)} names no entailment label; write the names its training used into the "
            'model\'s config.json, for example {"0": "contradiction", "1": "entailment", "2": "neutral"}'
        )
    return found[0]


# What a caption may claim and what the molecule must then have: group -> (SMARTS, words). The words are those ChEBI's
# captions use for a class of compounds; substituent prefixes inside names (methoxy-, 3-amino-) are not claims.
GROUPS = {
    "carboxylic acid": ("[CX3](=O)[OX2H1,OX1-]", r"\w*carboxylic acids?(?! (amide|ester|deriv))|\w*carboxylates?"),
    "ester": ("[C,P,S;$(*=O)][OX2][#6]", r"\w*esters?"),
    "lactone": ("[#6;R](=O)@[OX2;R]", r"\w*lactones?"),
    "amide": ("[CX3](=[O,S])[#7]", r"amides?|\w*carboxamides?|\w*lactams?|acid amides?"),
    "sulfonamide": ("S(=O)(=O)[#7]", r"\w*sulfonamides?"),
    "urea": ("[#7][CX3](=O)[#7]", r"ureas?"),
    "amine": (
        "[NX3,NX4+;!$(N*=[O,S]);!$(N=*);!$(N#*)]",
        r"(primary|secondary|tertiary|aromatic)? ?amines?|amino compounds?",
    ),
    "quaternary ammonium": ("[NX4+;H0]", r"quaternary ammonium( ions?)?"),
    "alcohol": ("[CX4][OX2H]", r"\w*alcohols?|\w*diols?|\w*triols?|polyols?"),
    "phenol": ("c[OX2H,OX1-]", r"phenols?|\w*phenols"),
    "ether": ("[#6;!$(C=O)][OX2][#6;!$(C=O)]", r"\w*ethers?"),
    "epoxide": ("C1OC1", r"epoxides?"),
    "peroxide": ("[OX2,OX1-][OX2]", r"\w*peroxides?"),
    "ketone": ("[#6][CX3](=O)[#6]", r"\w*ketones?|\w*diones?"),
    "aldehyde": ("[CX3;H1,H2]=O", r"\w*aldehydes?"),
    "oxime": ("[CX3]=[NX2][OX2]", r"oximes?"),
    "nitrile": ("C#N", r"\w*nitriles?"),
    "nitro": ("[$([NX3](=O)=O),$([NX3+](=O)[O-])]", r"(c-)?nitro compounds?|nitrobenzenes?|nitroarenes?"),
    "fluorine": ("F", r"organofluorine|fluorocarbons?|\w*fluorobenzenes?"),
    "chlorine": ("[Cl]", r"organochlorine|\w*chlorobenzenes?"),
    "bromine": ("[Br]", r"organobromine|\w*bromobenzenes?"),
    "iodine": ("[I]", r"organoiodine|\w*iodobenzenes?"),
    "phosphate": ("[PX4](=O)([OX2,OX1-])[OX2,OX1-]", r"\w*phosphates?|phosphate esters?|phospholipids?"),
    "sulfate or sulfonate": ("S(=O)(=O)[OX2,OX1-]", r"\w*sulfates?|\w*sulfonates?|\w*sulfonic acids?"),
    "thiol": ("[SX2H]", r"\w*thiols?"),
    "sulfide": ("[#6][SX2][#6]", r"(organic|aryl|alkyl|methyl) sulfides?|thioethers?"),
    "benzene ring": ("c1ccccc1", r"benzenes|\w*benzoic acids?|phenols|benzamides"),
    "pyridine ring": ("n1ccccc1", r"pyridines?"),
    "pyrimidine ring": ("c1cncnc1", r"pyrimidines?"),
    "imidazole ring": ("[#7]1~[#6]~[#7]~[#6]~[#6]1", r"imidazoles?"),
    "indole ring": ("[#6]1~[#6]~[#6]~[#6]~c2~c1~[#6]~[#6]~[#7]2", r"indoles"),
    "quinoline ring": ("[#7]1~[#6]~[#6]~[#6]~[#6]2~[#6]1~[#6]~[#6]~[#6]~[#6]2", r"quinolines?"),
    "furan ring": ("o1cccc1", r"furans?"),
    "thiophene ring": ("s1cccc1", r"thiophenes?"),
    "piperidine ring": ("[#7]1~[#6]~[#6]~[#6]~[#6]~[#6]1", r"piperidines?"),
    "piperazine ring": ("[#7]1~[#6]~[#6]~[#7]~[#6]~[#6]1", r"piperazines?"),
}
# A caption says much about other molecules: what it derives from, what was condensed to make it.
_OTHER_MOLECULES = re.compile(
    r"(deriv\w+ (from|of)|functionally related to|conjugate (acid|base) of|enantiomer of|tautomer of|"
    r"obtained (by|from)|resulting from|arising from|formal condensation|parent|in which|where)[^.]*"
)


@functools.cache
def _patterns() -> tuple[list, list]:
    from rdkit import Chem

    smarts = [Chem.MolFromSmarts(s) for s, _ in GROUPS.values()]
    return smarts, [re.compile(rf"(?<![\w\])-])({words})(?![\w-])") for _, words in GROUPS.values()]


def groups_claimed(caption: str) -> list[bool]:
    """Whether the caption claims each of `GROUPS` for its molecule; clauses about other molecules are left out."""
    text = _OTHER_MOLECULES.sub("", caption.lower())
    return [bool(words.search(text)) for words in _patterns()[1]]


def groups_present(smiles: str) -> list[bool] | None:
    """Whether the molecule has each of `GROUPS`; None where RDKit cannot read it."""
    from lmolt.metrics.smiles import parse

    molecule = parse(smiles)
    return None if molecule is None else [molecule.HasSubstructMatch(s) for s in _patterns()[0]]


def group_scores(molecules, references, predictions, num_workers=None) -> dict[str, np.ndarray]:
    """Functional groups in captions against the molecule itself, `(n,)` each, NaN where undefined.

    Where `references` is None, what needs none.
    `group_hallucination`: share of the groups the prediction claims that the molecule lacks (captions which claim any).
    `group_hallucination_reference`: the same of the reference caption: the floor that vocabulary and data set.
    `group_unclaimed`: share of the molecule's groups which the prediction does not claim.
    `group_missed`: share of the groups which the reference rightly claims and the prediction does not.
    """
    from lmolt.metrics.workers import Unfinished, in_processes

    distinct = list(dict.fromkeys(molecules))
    of = dict(zip(distinct, in_processes(groups_present, distinct, num_workers), strict=True))
    readable = np.array([isinstance(of[m], list) for m in molecules])
    present = np.array([of[m] if isinstance(of[m], list) else [False] * len(GROUPS) for m in molecules])
    said = np.array([groups_claimed(text) for text in predictions])

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        total = whole.sum(1)
        return np.divide(part.sum(1), total, out=np.full(len(total), np.nan), where=(total > 0) & readable)

    unfinished = np.array([float(isinstance(of[m], Unfinished)) for m in molecules])
    found = {
        "count_unreadable_source": np.array([float(m.strip() != "") for m in molecules]) * ~readable,
        "count_unfinished_source": unfinished,
        "group_hallucination": share(said & ~present, said),
        "group_unclaimed": share(present & ~said, present),
    }
    if references is not None:
        truth = np.array([groups_claimed(text) for text in references])
        found["group_hallucination_reference"] = share(truth & ~present, truth)
        found["group_missed"] = share(truth & present & ~said, truth & present)
    return found


_NLI = f"premise = reference, hypothesis = prediction, {{nli_model}}; {EMPTY_IS_NOT_ENTAILED}"
_GROUPS = f"{len(GROUPS)} functional groups by ChEBI's class words (docs/metrics.md), RDKit {{rdkit}}"
_AS_IS = "characters as they are in the file"
CAPTION_METRICS = (
    Metric(
        key="delta_len",
        label="Δ length",
        better=0,
        decimals=1,
        convention="prediction minus reference; {pieces}",
        paper=True,
    ),
    Metric(key="nli_entailment", label="Entailment", better=1, convention=f"mean probability; {_NLI}", paper=True),
    Metric(
        key="nli_win_rate",
        label="NLI wins",
        better=1,
        convention=f"share with entailment the arg-max; {_NLI}",
        paper=True,
    ),
    Metric(
        key="group_hallucination",
        label="Groups claimed that are not there",
        better=-1,
        convention=f"share of claimed groups the molecule lacks, over captions that claim any; {_GROUPS}",
        undefined="no prediction names one of the functional groups",
    ),
    Metric(
        key="group_hallucination_reference",
        label="The same of the references",
        better=0,
        convention=f"the floor that vocabulary and data set; {_GROUPS}",
        undefined="no reference names one of the functional groups",
    ),
    Metric(
        key="group_unclaimed",
        label="Groups not claimed",
        better=-1,
        convention=f"share of the molecule's groups not claimed; {_GROUPS}",
        undefined="no molecule has one of the functional groups",
    ),
    Metric(
        key="group_missed",
        label="Groups of the reference missed",
        better=-1,
        convention=f"share of the groups the reference rightly claims that the prediction does not; {_GROUPS}",
        undefined="no reference names one of the functional groups that its molecule has",
    ),
)
MOLECULE_METRICS = (
    Metric(
        key="chrf",
        label="Chr-F",
        better=1,
        convention=f"mean of character F1 for n = 1, 2, 3; {_AS_IS}",
        paper=True,
    ),
    Metric(
        key="delta_len",
        label="Δ length",
        better=0,
        decimals=1,
        convention=f"prediction minus reference; {_AS_IS}",
        paper=True,
    ),
    Metric(
        key="win_rate",
        label="Wins",
        better=1,
        convention="Chr-F > {chrf_threshold}, |delta length| < {delta_threshold} and valid, RDKit {rdkit}",
        paper=True,
    ),
    Metric(
        key="chrf_undoubled",
        label="Chr-F, backslashes made single",
        better=1,
        convention="as chrf; ChEBI-20's doubled backslashes made single on both sides",
    ),
)
