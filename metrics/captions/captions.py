"""`evaluate.load("metrics/captions")`: LMolT's caption metrics as a Hugging Face metric.

`evaluate` copies this one file elsewhere and imports it there, so it may import lmolt (installed, or on the path) but
nothing beside itself; and it wants a folder that bears the module's name, which is why it is not in lmolt/metrics.
"""

import datasets
import evaluate

from lmolt.metrics import score

_DESCRIPTION = """\
Generated captions of molecules against reference captions: BLEU-2, BLEU-4, ROUGE-1/2/L, METEOR, delta length, NLI
entailment and win rate, functional groups claimed that the molecule lacks, L+M-24's property precision/recall/F1, and
BLEU-2 and ROUGE-L less those of the same captions shuffled among the molecules (what they owe to the molecule). The
numbers equal those of MolT5's and L+M-24's scripts to 1e-6, and each comes with a 95 % bootstrap interval, n and the
convention it holds under.
"""
_INPUTS = """\
Args:
    predictions (list of str): generated captions; an empty one is counted.
    references (list of str): one reference caption each.
    sources (list of str, optional): the molecules as SMILES, for the functional groups.
    text_tokenizer, nli_model, nltk_data, property_tree, n_shuffles, n_bootstrap, seed, num_workers: as
        lmolt.metrics.score. Without `text_tokenizer` (SciBERT's, for published numbers) plain words are used and the
        numbers are not comparable.
Returns:
    dict: each defined metric's value by name, and "details": {"counts", "metrics"} with intervals and conventions,
        where a metric that could not be computed has its reason.
Examples:
    >>> captions = evaluate.load("metrics/captions")
    >>> round(captions.compute(predictions=["It is an acid."], references=["It is an amine."])["rouge1"], 2)
    0.75
"""
_CITATION = """\
@inproceedings{edwards-etal-2022-translation, title = "Translation between Molecules and Natural Language",
  author = "Edwards, Carl and Lai, Tuan and Ros, Kevin and Honke, Garrett and Cho, Kyunghyun and Ji, Heng",
  booktitle = "EMNLP", year = "2022"}
"""


class Captions(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, sources=None, **options):
        details, _ = score("mol2cap", sources or [""] * len(references), references, predictions, **options)
        values = {key: m["value"] for key, m in details["metrics"].items() if "value" in m}
        return values | {"details": details}
