"""`evaluate.load("metrics/molecules")`: LMolT's molecule metrics as a Hugging Face metric.

`evaluate` copies this one file elsewhere and imports it there, so it may import lmolt (installed, or on the path) but
nothing beside itself; and it wants a folder that bears the module's name, which is why it is not in lmolt/metrics.
"""

import datasets
import evaluate

from lmolt.metrics import score

_DESCRIPTION = """\
Generated SMILES against reference SMILES: character BLEU, exact match (InChI, canonical, without stereochemistry,
scaffold), Levenshtein, validity, uniqueness, MACCS, RDK and Morgan similarity (over valid pairs and with invalid as 0),
Fréchet ChemNet Distance (fcd 1.2.2 and the 1.1 rule), Chr-F, delta length, win rate. The numbers equal those of MolT5's
and L+M-24's scripts to 1e-6 (FCD 1e-3), and each comes with n, the convention it holds under and, but for FCD, a 95 %
bootstrap interval.
"""
_INPUTS = """\
Args:
    predictions (list of str): generated SMILES; empty and unreadable ones are counted invalid.
    references (list of str): one reference SMILES each; one that RDKit cannot read is a ValueError.
    chrf_threshold, delta_threshold, fcd, cache_dir, n_bootstrap, seed, num_workers: as lmolt.metrics.score.
Returns:
    dict: each defined metric's value by name, and "details": {"counts", "metrics"} with intervals and conventions,
        where a metric that could not be computed has its reason.
Examples:
    >>> molecules = evaluate.load("metrics/molecules")
    >>> molecules.compute(predictions=["OCC", "C("], references=["CCO", "CC"], fcd=False)["exact_match"]
    0.5
"""
_CITATION = """\
@inproceedings{edwards-etal-2022-translation, title = "Translation between Molecules and Natural Language",
  author = "Edwards, Carl and Lai, Tuan and Ros, Kevin and Honke, Garrett and Cho, Kyunghyun and Ji, Heng",
  booktitle = "EMNLP", year = "2022"}
"""


class Molecules(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, **options):
        details, _ = score("cap2mol", [""] * len(references), references, predictions, **options)
        values = {key: m["value"] for key, m in details["metrics"].items() if "value" in m}
        return values | {"details": details}
