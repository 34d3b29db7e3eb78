"""Captions in L+M-24's manner for any molecule: templates that compose facts which RDKit computes.

A caption states the formula, charge and kind, the ring systems, how a lone benzene ring is substituted, functional
groups with their counts, and two properties. The facts are the molecule's; the wording, which groups are named where
there are many, and which properties, are drawn. Nothing claims to be exhaustive, and every statement is true
(tests/test_demo.py reads them back and derives each anew).
"""

import random
import re
from collections import Counter

from rdkit import Chem
from rdkit.Chem import Crippen, Descriptors, rdMolDescriptors

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_R = "[#6;!$(C=[O,S,N]);!$(C#N)]"  # a carbon that is neither acyl nor like it
# name -> SMARTS; a group counts once for each distinct set of atoms that matches. The most telling come first.
GROUPS = {
    "carboxylic acid": "[#6][CX3](=O)[OX2H1]",
    "ester": "[#6][CX3](=O)[OX2H0][#6;!$(C=[O,S])]",
    "carbamate": "[NX3][CX3](=O)[OX2]",
    "urea": "[NX3][CX3](=O)[NX3]",
    "thiourea": "[NX3][CX3](=S)[NX3]",
    "amide": "[#6][CX3](=O)[NX3]",
    "aldehyde": "[#6][CX3H1]=O",
    "ketone": "[#6][CX3](=O)[#6]",
    "nitro group": "[!#8][NX3+](=O)[O-]",
    "nitrile": "[#6][CX2]#[NX1]",
    "thiocyanate": "[#6][SX2]C#[NX1]",
    "azo group": "[#6][NX2]=[NX2][#6]",
    "oxime": "[CX3]=[NX2][OX2H1]",
    "hydrazone": "[CX3]=[NX2][NX3]",
    "sulfonamide": "[#6][SX4](=O)(=O)[NX3]",
    "sulfonic acid": "[#6][SX4](=O)(=O)[OX2H1]",
    "sulfone": "[#6][SX4](=O)(=O)[#6]",
    "disulfide": "[#6][SX2][SX2][#6]",
    "thiol": f"{_R}[SX2H1]",
    "thioether": f"{_R}[SX2]{_R}",
    "aromatic hydroxyl": "c[OX2H1]",
    "alcohol": "[CX4][OX2H1]",
    "primary amine": f"{_R}[NX3H2+0]",
    "secondary amine": f"{_R}[NX3H1+0]{_R}",
    "tertiary amine": f"{_R}[NX3H0+0]({_R}){_R}",
    "ether": f"{_R}[OX2]{_R}",
    "fluoro group": "[#6]F",
    "chloro group": "[#6]Cl",
    "bromo group": "[#6]Br",
    "iodo group": "[#6]I",
    "alkyne": "[CX2]#[CX2]",
    "alkene": "[CX3]=[CX3]",
    "methyl group": "[CX4H3]",
}
_PATTERNS = {name: Chem.MolFromSmarts(smarts) for name, smarts in GROUPS.items()}
_MOST_GROUPS = 4  # named in one caption

# name -> the ring system as a molecule; elements, charges and bonds in the rings agree, what is bound to them may not
RING_SYSTEMS = {
    "benzene": "c1ccccc1",
    "naphthalene": "c1ccc2ccccc2c1",
    "anthracene": "c1ccc2cc3ccccc3cc2c1",
    "phenanthrene": "c1ccc2c(c1)ccc1ccccc12",
    "dihydroanthracene": "C1c2ccccc2Cc2ccccc21",
    "fluorene": "c1ccc2c(c1)Cc1ccccc1-2",
    "indane": "c1ccc2c(c1)CCC2",
    "tetralin": "c1ccc2c(c1)CCCC2",
    "pyridine": "c1ccncc1",
    "pyridinium": "c1cc[nH+]cc1",
    "pyrimidine": "c1cncnc1",
    "pyrazine": "c1cnccn1",
    "triazine": "c1ncncn1",
    "quinoline": "c1ccc2ncccc2c1",
    "isoquinoline": "c1ccc2cnccc2c1",
    "acridine": "c1ccc2nc3ccccc3cc2c1",
    "quinazoline": "c1ccc2ncncc2c1",
    "pteridine": "c1cnc2ncncc2n1",
    "purine": "c1ncc2nc[nH]c2n1",
    "pyrazolopyrimidine": "c1ncc2cn[nH]c2n1",
    "indole": "c1ccc2[nH]ccc2c1",
    "carbazole": "c1ccc2c(c1)[nH]c1ccccc12",
    "benzimidazole": "c1ccc2[nH]cnc2c1",
    "benzothiazole": "c1ccc2scnc2c1",
    "isoindoline": "C1NCc2ccccc12",
    "phenothiazine": "c1ccc2c(c1)Nc1ccccc1S2",
    "benzodioxole": "c1ccc2c(c1)OCO2",
    "pyrrole": "c1cc[nH]c1",
    "imidazole": "c1c[nH]cn1",
    "pyrazole": "c1cn[nH]c1",
    "furan": "c1ccoc1",
    "thiophene": "c1ccsc1",
    "thiazole": "c1cscn1",
    "tetrazole": "c1nnn[nH]1",
    "cyclopropane": "C1CC1",
    "cyclobutane": "C1CCC1",
    "cyclopentane": "C1CCCC1",
    "cyclohexane": "C1CCCCC1",
    "cycloheptane": "C1CCCCCC1",
    "cyclopentene": "C1=CCCC1",
    "cyclohexene": "C1=CCCCC1",
    "norbornane": "C1CC2CCC1C2",
    "adamantane": "C1C2CC3CC1CC(C2)C3",
    "oxirane": "C1CO1",
    "aziridine": "C1CN1",
    "oxolane": "C1CCOC1",
    "oxane": "C1CCOCC1",
    "dioxolane": "C1COCO1",
    "dioxane": "C1COCCO1",
    "pyrrolidine": "C1CCNC1",
    "piperidine": "C1CCNCC1",
    "piperazine": "C1CNCCN1",
    "morpholine": "C1COCCN1",
}
# positions of the substituents, turned and mirrored to the smallest -> name
_SUBSTITUTIONS = {
    (): "un",
    (0,): "mono",
    (0, 1): "ortho-di",
    (0, 2): "meta-di",
    (0, 3): "para-di",
    (0, 1, 2): "1,2,3-tri",
    (0, 1, 3): "1,2,4-tri",
    (0, 2, 4): "1,3,5-tri",
}

_TEMPLATES = (
    "The molecule is {kind} of formula {formula}. It contains {parts}. It {first} and {second}.",
    "The molecule has the formula {formula} and bears {parts}. It is {kind} that {first} and {second}.",
    "The molecule is {kind} that {first}. It has the formula {formula}, includes {parts}, and {second}.",
)


def caption(molecule: Chem.Mol, seed: int = 0) -> str:
    """One caption; the same for the same canonical SMILES and seed, whatever else is captioned."""
    draw = random.Random(f"{seed} {Chem.MolToSmiles(molecule)}")
    first, second = draw.sample(properties(molecule), 2)
    parts = [*ring_phrases(molecule), *group_phrases(molecule)]
    return draw.choice(_TEMPLATES).format(
        kind=kind(molecule),
        formula=re.sub("(?<=.)([A-Z])", r" \1", rdMolDescriptors.CalcMolFormula(molecule)),  # as CIF has it
        parts=_enumerate(parts or ["no ring"]),
        first=draw.choice(first),
        second=draw.choice(second),
    )


def kind(molecule: Chem.Mol) -> str:
    """Noun phrase of charge and skeleton, such as "a cationic heteroaromatic compound"."""
    charge = Chem.GetFormalCharge(molecule)
    components = len(Chem.GetMolFrags(molecule))
    aromatic = {atom.GetAtomicNum() for atom in molecule.GetAtoms() if atom.GetIsAromatic()}
    if components > 1:
        phrase = f"mixture of {_number(components)} components"
    elif aromatic - {6}:
        phrase = "heteroaromatic compound"
    elif aromatic:
        phrase = "aromatic compound"
    elif molecule.GetRingInfo().NumRings():
        phrase = "non-aromatic ring compound"
    else:
        phrase = "acyclic compound"
    if charge:
        phrase = f"{'cationic' if charge > 0 else 'anionic'} {phrase}"
    return _article(phrase)


def ring_phrases(molecule: Chem.Mol) -> list[str]:
    """One phrase for each kind of ring system, such as "two benzene rings"; a lone benzene with its substitution."""
    rings = [set(ring) for ring in molecule.GetRingInfo().AtomRings()]
    systems: list[set[int]] = []  # rings that share an atom belong together
    for ring in rings:
        apart = [system for system in systems if not system & ring]
        systems = [*apart, ring.union(*(system for system in systems if system & ring))]
    names = Counter()
    for system in systems:
        bonds = sum({b.GetBeginAtomIdx(), b.GetEndAtomIdx()} <= system for b in molecule.GetBonds())
        size = bonds - len(system) + 1  # independent rings
        name = _RING_NAMES.get(_ring_key(molecule, system))
        if name:
            names[f"{name} {'ring' if size == 1 else 'system'}"] += 1
        elif size == 1:
            names[f"{_number(len(system))}-membered ring"] += 1
        else:
            names[f"system of {_number(size)} rings"] += 1
    if names["benzene ring"] == 1:
        benzene = next(system for system in systems if _RING_NAMES.get(_ring_key(molecule, system)) == "benzene")
        names[f"{_substitution(molecule, benzene)}benzene ring"] = names.pop("benzene ring")
    return [_counted(name, count) for name, count in names.items() if count]


def group_phrases(molecule: Chem.Mol) -> list[str]:
    """The functional groups that come first in `GROUPS`, with their counts, such as "a ketone"."""
    counts = {name: len(molecule.GetSubstructMatches(pattern)) for name, pattern in _PATTERNS.items()}
    return [_counted(name, count) for name, count in counts.items() if count][:_MOST_GROUPS]


def properties(molecule: Chem.Mol) -> list[tuple[str, ...]]:
    """Verb phrases: for each property of the molecule the wordings that state it."""
    logp = Crippen.MolLogP(molecule)
    area = rdMolDescriptors.CalcTPSA(molecule)
    donors = rdMolDescriptors.CalcNumLipinskiHBD(molecule)
    size = molecule.GetNumHeavyAtoms()
    broken = sum(
        [Descriptors.MolWt(molecule) > 500, logp > 5, donors > 5, rdMolDescriptors.CalcNumLipinskiHBA(molecule) > 10]
    )
    if broken:
        rule = (f"breaks {_number(broken)} of Lipinski's rules", f"violates {_number(broken)} of Lipinski's rules")
    else:
        rule = ("obeys Lipinski's rules", "is drug-like by Lipinski's rules")
    degree = "small" if area < 40 else "medium" if area < 90 else "large"
    polarity = {"small": "weakly", "medium": "moderately", "large": "strongly"}[degree]
    if logp > 3:
        affinity = ("is lipophilic", "prefers fat to water")
    elif logp < 0:
        affinity = ("is hydrophilic", "prefers water to fat")
    else:
        affinity = ("is neither lipophilic nor hydrophilic", "is balanced between fat and water")
    bulk = "small" if size <= 12 else "medium-sized" if size <= 25 else "large"
    return [
        rule,
        (f"has a {degree} polar surface", f"is {polarity} polar"),
        affinity,
        (f"is {bulk}", f"is {bulk} with {_number(size)} heavy atoms"),
        (f"has {_counted('hydrogen-bond donor', donors)}", f"donates {_counted('hydrogen bond', donors)}"),
    ]


def _substitution(molecule: Chem.Mol, benzene: set[int]) -> str:
    """ "para-disubstituted " and the like; empty where the pattern has no such name."""
    ring = next(ring for ring in molecule.GetRingInfo().AtomRings() if set(ring) == benzene)
    taken = [any(n.GetIdx() not in benzene for n in molecule.GetAtomWithIdx(i).GetNeighbors()) for i in ring]
    positions = [
        tuple(sorted(sign * (i - shift) % 6 for i in range(6) if taken[i])) for shift in range(6) for sign in (1, -1)
    ]
    name = _SUBSTITUTIONS.get(min(positions))
    return f"{name}substituted " if name else ""


def _ring_key(molecule: Chem.Mol, system: set[int]) -> str:
    """Canonical SMILES of a ring system alone, without its hydrogens."""
    symbols = []
    for atom in molecule.GetAtoms():
        symbol = atom.GetSymbol().lower() if atom.GetIsAromatic() else atom.GetSymbol()
        symbols.append(f"[{symbol}{atom.GetFormalCharge() or ''}]")
    return Chem.MolFragmentToSmiles(molecule, sorted(system), atomSymbols=symbols, isomericSmiles=False)


def _names_by_key() -> dict[str, str]:
    names = {}
    for name, smiles in RING_SYSTEMS.items():
        molecule = Chem.MolFromSmiles(smiles)
        names[_ring_key(molecule, {a.GetIdx() for a in molecule.GetAtoms() if a.IsInRing()})] = name
    return names


_RING_NAMES = _names_by_key()


def _number(n: int) -> str:
    return NUMBERS[n] if n < len(NUMBERS) else str(n)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _counted(noun: str, count: int) -> str:
    if count == 1:
        return _article(noun)
    plural = noun.replace("system of", "systems of") if "system of" in noun else f"{noun}s"
    return f"{_number(count)} {plural}" if count else f"no {noun}"


def _enumerate(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
