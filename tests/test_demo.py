"""The embedded default: what captions say is true, pairs are split by scaffold, and the stand-ins load."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from rdkit import Chem
from rdkit.Chem import Descriptors
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

from lmolt.data.pairs import read_pairs
from lmolt.data.triples import read_triples
from lmolt.demo import build, captions
from lmolt.prompts import CAP2MOL, MOL2CAP, build_prompt, encode_prompt

# --- what a caption says, read back from the text

NUMBER = "an?|no|one|two|three|four|five|six|seven|eight|nine|ten|\\d+"
WORDS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
PROPERTY = "|".join(
    [
        f"(?:breaks|violates) (?:{NUMBER}) of Lipinski's rules",
        "obeys Lipinski's rules",
        "is drug-like by Lipinski's rules",
        "has a (?:small|medium|large) polar surface",
        "is (?:weakly|moderately|strongly) polar",
        "is lipophilic",
        "is hydrophilic",
        "is neither lipophilic nor hydrophilic",
        "prefers fat to water",
        "prefers water to fat",
        "is balanced between fat and water",
        f"is (?:small|medium-sized|large)(?: with (?:{NUMBER}) heavy atoms)?",
        f"has (?:{NUMBER}) hydrogen-bond donors?",
        f"donates (?:{NUMBER}) hydrogen bonds?",
    ]
)
FORMULA = r"[A-Z][a-z]?\d*(?: [A-Z][a-z]?\d*)*(?:[+-]\d*)?"
FORMS = [
    rf"The molecule is (?P<kind>an? .+) of formula (?P<formula>{FORMULA})\. It contains (?P<parts>.+)\. "
    rf"It (?P<first>{PROPERTY}) and (?P<second>{PROPERTY})\.",
    rf"The molecule has the formula (?P<formula>{FORMULA}) and bears (?P<parts>.+)\. "
    rf"It is (?P<kind>an? .+) that (?P<first>{PROPERTY}) and (?P<second>{PROPERTY})\.",
    rf"The molecule is (?P<kind>an? .+) that (?P<first>{PROPERTY})\. "
    rf"It has the formula (?P<formula>{FORMULA}), includes (?P<parts>.+), and (?P<second>{PROPERTY})\.",
]


def number(word: str) -> int:
    if word in ("a", "an"):
        return 1
    return WORDS.index(word) if word in WORDS else int(word)


# --- the same facts, derived from the graph, without SMARTS


def order(a, b):
    return a.GetOwningMol().GetBondBetweenAtoms(a.GetIdx(), b.GetIdx()).GetBondTypeAsDouble()


def bound(a, symbols="", multiplicity=1.0, **conditions):
    """Neighbours of `a` by element, bond order, and X (connections), H, q (charge)."""
    return [
        b
        for b in a.GetNeighbors()
        if (not symbols or b.GetSymbol() in symbols.split()) and order(a, b) == multiplicity and has(b, **conditions)
    ]


def has(b, X=None, H=None, q=None):
    values = (b.GetTotalDegree(), b.GetTotalNumHs(), b.GetFormalCharge())
    return all(wanted is None or wanted == value for wanted, value in zip((X, H, q), values, strict=True))


def plain_carbon(c):
    """Not acyl, thioacyl, imidoyl, nor cyano."""
    return c.GetIsAromatic() or not (bound(c, "O S N", 2.0) or bound(c, "N", 3.0))


def trigonal(c):
    return c.GetSymbol() == "C" and not c.GetIsAromatic() and c.GetTotalDegree() == 3


def pairs_of(n):
    return n * (n - 1) // 2


def graph_count(molecule, name: str) -> int:
    """How many of a functional group there are, by walking the neighbours of each atom."""
    atoms = list(molecule.GetAtoms())
    aliphatic = lambda symbol: [a for a in atoms if a.GetSymbol() == symbol and not a.GetIsAromatic()]
    carbonyl = [c for c in aliphatic("C") if trigonal(c) and bound(c, "O", 2.0)]
    acyl = [c for c in carbonyl if bound(c, "C")]
    sulfonyl = [s for s in aliphatic("S") if len(bound(s, "O", 2.0)) == 2 and s.GetTotalDegree() == 4]
    plain = lambda a: [c for c in bound(a, "C") if plain_carbon(c)]
    imines = [(c, n) for c in aliphatic("C") if trigonal(c) for n in bound(c, "N", 2.0, X=2)]
    halogens = {"fluoro": "F", "chloro": "Cl", "bromo": "Br", "iodo": "I"}
    if name.split()[0] in halogens:
        return sum(len(bound(a, halogens[name.split()[0]])) for a in atoms if a.GetSymbol() == "C")
    match name:
        case "carboxylic acid":
            return sum(len(bound(c, "O", X=2, H=1)) for c in acyl)
        case "ester":
            ends = lambda o, c: [e for e in bound(o, "C") if e.GetIdx() != c.GetIdx()]
            oxygens = [(e, c) for c in acyl for o in bound(c, "O", X=2, H=0) for e in ends(o, c)]
            return sum(e.GetIsAromatic() or not bound(e, "O S", 2.0) for e, _ in oxygens)
        case "carbamate":
            return sum(len(bound(c, "N", X=3)) * len(bound(c, "O", X=2)) for c in carbonyl)
        case "urea":
            return sum(pairs_of(len(bound(c, "N", X=3))) for c in carbonyl)
        case "thiourea":
            thiocarbonyl = [c for c in aliphatic("C") if trigonal(c) and bound(c, "S", 2.0)]
            return sum(pairs_of(len(bound(c, "N", X=3))) for c in thiocarbonyl)
        case "amide":
            return sum(len(bound(c, "N", X=3)) for c in acyl)
        case "aldehyde":
            return sum(has(c, H=1) for c in acyl)
        case "ketone":
            return sum(len(bound(c, "C")) == 2 for c in carbonyl)
        case "nitro group":
            nitrogens = [n for n in aliphatic("N") if has(n, X=3, q=1) and bound(n, "O", 2.0) and bound(n, "O", q=-1)]
            return sum(any(b.GetSymbol() != "O" for b in n.GetNeighbors()) for n in nitrogens)
        case "nitrile" | "thiocyanate":
            cyano = [c for c in aliphatic("C") if bound(c, "N", 3.0, X=1)]
            if name == "nitrile":
                return sum(len(bound(c, "C")) for c in cyano)
            return sum(len(bound(s, "C")) - 1 for c in cyano for s in bound(c, "S", X=2))
        case "azo group":
            return sum(len(bound(n, "C")) * len(bound(m, "C")) for n in aliphatic("N") for m in bound(n, "N", 2.0)) // 2
        case "oxime":
            return sum(len(bound(n, "O", X=2, H=1)) for _, n in imines)
        case "hydrazone":
            return sum(len(bound(n, "N", X=3)) for _, n in imines)
        case "sulfonamide":
            return sum(len(bound(s, "N", X=3)) * len(bound(s, "C")) for s in sulfonyl)
        case "sulfonic acid":
            return sum(len(bound(s, "O", X=2, H=1)) * len(bound(s, "C")) for s in sulfonyl)
        case "sulfone":
            return sum(len(bound(s, "C")) == 2 for s in sulfonyl)
        case "disulfide":
            doubled = [(s, t) for s in aliphatic("S") for t in bound(s, "S", X=2) if has(s, X=2)]
            return sum(bool(bound(s, "C")) and bool(bound(t, "C")) for s, t in doubled) // 2
        case "thiol":
            return sum(has(s, X=2, H=1) and len(plain(s)) for s in aliphatic("S"))
        case "thioether" | "ether":
            return sum(len(plain(a)) == 2 for a in aliphatic("S" if name == "thioether" else "O") if has(a, X=2))
        case "aromatic hydroxyl":
            return sum(len(bound(c, "O", X=2, H=1)) for c in atoms if c.GetSymbol() == "C" and c.GetIsAromatic())
        case "alcohol":
            return sum(len(bound(c, "O", X=2, H=1)) for c in aliphatic("C") if has(c, X=4))
        case "primary amine" | "secondary amine" | "tertiary amine":
            carbons = ("primary amine", "secondary amine", "tertiary amine").index(name) + 1
            nitrogens = [n for n in aliphatic("N") if has(n, X=3, H=3 - carbons, q=0)]
            return sum(len(plain(n)) == carbons for n in nitrogens)
        case "alkyne":
            return sum(len(bound(c, "C", 3.0)) for c in aliphatic("C")) // 2
        case "alkene":
            return sum(len(bound(c, "C", 2.0, X=3)) for c in aliphatic("C") if has(c, X=3)) // 2
        case "methyl group":
            return sum(has(c, X=4, H=3) for c in aliphatic("C"))
    raise AssertionError(f"a group without a derivation: {name}")


def ring_components(molecule) -> list[tuple[set[int], int]]:
    """Atoms of each connected part of the ring bonds, and its number of independent rings."""
    bonds = [{b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in molecule.GetBonds()]
    parts: list[set[int]] = []
    for bond in ({b.GetBeginAtomIdx(), b.GetEndAtomIdx()} for b in molecule.GetBonds() if b.IsInRing()):
        touching = [part for part in parts if part & bond]
        parts = [part for part in parts if not part & bond] + [bond.union(*touching)]
    return [(part, sum(bond <= part for bond in bonds) - len(part) + 1) for part in parts]


def ring_count(molecule, name: str) -> int:
    """How many ring systems a phrase's noun is true of; named ones by isomorphism with their parent."""
    components = ring_components(molecule)
    if found := re.fullmatch(r"(\w+)-membered ring", name):
        sizes = [len(part) for part, rings in components if rings == 1 and not is_named(molecule, part)]
        return sizes.count(number(found[1]))
    if found := re.fullmatch(r"systems? of (\w+) rings", name):
        return [rings for part, rings in components if not is_named(molecule, part)].count(number(found[1]))
    pattern, name = re.fullmatch(r"(?:(\S+)substituted )?(\w+) (?:ring|system)", name).groups()
    matching = [part for part, _ in components if matches(molecule, part, name)]
    if pattern:
        assert name == "benzene" and len(matching) == 1 and substitution(molecule, matching[0]) == pattern
    return len(matching)


def matches(molecule, part: set[int], name: str) -> bool:
    parent = Chem.MolFromSmiles(captions.RING_SYSTEMS[name])
    ring = {a.GetIdx() for a in parent.GetAtoms() if a.IsInRing()}
    bonds = lambda m, inside: sorted(
        b.GetBondTypeAsDouble() for b in m.GetBonds() if {b.GetBeginAtomIdx(), b.GetEndAtomIdx()} <= inside
    )
    charges = lambda m, inside: sorted(m.GetAtomWithIdx(i).GetFormalCharge() for i in inside)
    if len(part) != len(ring) or bonds(molecule, part) != bonds(parent, ring):
        return False
    return charges(molecule, part) == charges(parent, ring) and any(
        part <= set(match) for match in molecule.GetSubstructMatches(parent, maxMatches=10_000)
    )


def is_named(molecule, part: set[int]) -> bool:
    return any(matches(molecule, part, name) for name in captions.RING_SYSTEMS)


def substitution(molecule, benzene: set[int]) -> str:
    taken = [i for i in benzene if any(n.GetIdx() not in benzene for n in molecule.GetAtomWithIdx(i).GetNeighbors())]
    distances = Chem.GetDistanceMatrix(molecule)
    spread = sorted(int(distances[i][j]) for i in taken for j in taken if i < j)
    if len(taken) < 2:
        return ("un", "mono")[len(taken)]
    names = {(1,): "ortho-di", (2,): "meta-di", (3,): "para-di"}
    names |= {(1, 1, 2): "1,2,3-tri", (1, 2, 3): "1,2,4-tri", (2, 2, 2): "1,3,5-tri"}
    return names[tuple(spread)]


def check_formula(text: str, molecule) -> None:
    symbols = [atom.GetSymbol() for atom in Chem.AddHs(molecule).GetAtoms()]
    atoms, sign, charge = re.fullmatch(r"([^+-]+)([+-]?)(\d*)", text).groups()
    said = [(symbol, int(count or 1)) for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", atoms)]
    assert sorted(said) == sorted((symbol, symbols.count(symbol)) for symbol in set(symbols))
    total = sum(atom.GetFormalCharge() for atom in molecule.GetAtoms())
    assert (int(f"{sign}{charge or 1}") if sign else 0) == total


def kind(molecule, smiles: str) -> str:
    aromatic = {b.GetBeginAtom().GetSymbol() for b in molecule.GetBonds() if b.GetIsAromatic()}
    aromatic |= {b.GetEndAtom().GetSymbol() for b in molecule.GetBonds() if b.GetIsAromatic()}
    pieces = smiles.count(".") + 1
    if pieces > 1:
        noun = f"mixture of {WORDS[pieces] if pieces <= 10 else pieces} components"
    elif aromatic:
        noun = "aromatic compound" if aromatic == {"C"} else "heteroaromatic compound"
    else:
        noun = "non-aromatic ring compound" if ring_components(molecule) else "acyclic compound"
    charge = sum(atom.GetFormalCharge() for atom in molecule.GetAtoms())
    noun = {-1: "anionic ", 0: "", 1: "cationic "}[(charge > 0) - (charge < 0)] + noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def check_property(text: str, molecule) -> None:
    logp, area = Descriptors.MolLogP(molecule), Descriptors.TPSA(molecule)
    polar = [a for a in Chem.AddHs(molecule).GetAtoms() if a.GetSymbol() in ("N", "O")]
    donors = sum(n.GetAtomicNum() == 1 for a in polar for n in a.GetNeighbors())
    weight = sum(a.GetMass() for a in Chem.AddHs(molecule).GetAtoms())
    broken = (weight > 500) + (logp > 5) + (donors > 5) + (len(polar) > 10)
    heavy = sum(a.GetAtomicNum() > 1 for a in molecule.GetAtoms())
    if "Lipinski" in text:
        found = re.search("(?:breaks|violates) (\\w+)", text)
        assert broken == (number(found[1]) if found else 0)
    elif "polar" in text:
        degree = {"small": 0, "weakly": 0, "medium": 1, "moderately": 1, "large": 2, "strongly": 2}
        assert degree[next(word for word in text.split() if word in degree)] == (area >= 40) + (area >= 90)
    elif "fat" in text or "philic" in text:
        affinity = 1 if "fat to" in text or text == "is lipophilic" else -1
        affinity = 0 if "balanced" in text or "neither" in text else affinity
        assert affinity == (1 if logp > 3 else -1 if logp < 0 else 0)
    elif "hydrogen" in text:
        assert number(re.search(f"({NUMBER}) hydrogen", text)[1]) == donors
    else:
        assert ("small" in text, "medium" in text, "large" in text) == (heavy <= 12, 12 < heavy <= 25, heavy > 25)
        if found := re.search("with (\\w+) heavy", text):
            assert number(found[1]) == heavy


def check_caption(smiles: str, text: str) -> set[str]:
    """Assert every statement of a caption; returns the nouns that it used."""
    molecule = Chem.MolFromSmiles(smiles)
    said = next((found for form in FORMS if (found := re.fullmatch(form, text))), None)
    assert said, f"no form of caption reads {text!r}"
    check_formula(said["formula"], molecule)
    assert said["kind"] == kind(molecule, smiles), (smiles, text)
    nouns = set()
    for part in re.split(", | and ", said["parts"]):
        count, noun = part.split(" ", 1)
        if part == "no ring":
            assert not ring_components(molecule), (smiles, text)
            continue
        singular = noun.removesuffix("s") if number(count) > 1 else noun
        group = singular in captions.GROUPS
        derived = graph_count(molecule, singular) if group else ring_count(molecule, noun if "of" in noun else singular)
        assert derived == number(count), (smiles, part, derived)
        nouns.add(singular)
    check_property(said["first"], molecule)
    check_property(said["second"], molecule)
    return nouns


# --- tests


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """runs/demo, the smallest, of a folder that isn't the project's."""
    root = tmp_path_factory.mktemp("elsewhere") / "runs" / "demo"
    build.build_models(root, "tiny")
    return root


def nci(every: int) -> list[str]:
    lines = (Path(Chem.RDConfig.RDDataDir) / "NCI" / "first_5K.smi").read_text().splitlines()[::every]
    molecules = [Chem.MolFromSmiles(line.split()[0]) for line in lines]
    return [Chem.MolToSmiles(molecule) for molecule in molecules if molecule is not None]


def test_every_statement_of_a_caption_is_true():
    nouns, kinds_of_form = set(), set()
    for smiles in nci(every=6):
        text = captions.caption(Chem.MolFromSmiles(smiles), 0)
        nouns |= check_caption(smiles, text)
        kinds_of_form.add(next(i for i, form in enumerate(FORMS) if re.fullmatch(form, text)))
    assert kinds_of_form == {0, 1, 2}
    assert len(nouns & set(captions.GROUPS)) > 25


def test_a_false_statement_is_noticed():
    text = captions.caption(Chem.MolFromSmiles("Cc1ccc(Cl)cc1"), 0)
    check_caption("Cc1ccc(Cl)cc1", text)
    for wrong in ("Cc1cccc(Cl)c1", "Cc1ccc(Br)cc1", "CCc1ccc(Cl)cc1", "Clc1ccccc1"):
        with pytest.raises(AssertionError):
            check_caption(wrong, text)


@pytest.mark.parametrize(
    ("smiles", "phrases"),
    [
        ("Cn1c(=O)c2c(ncn2C)n(C)c1=O", ["a purine system", "three methyl groups"]),  # caffeine
        ("CC(=O)Oc1ccccc1C(=O)O", ["an ortho-disubstituted benzene ring", "a carboxylic acid", "an ester"]),  # aspirin
        ("CC(=O)Nc1ccc(O)cc1", ["a para-disubstituted benzene ring", "an amide", "an aromatic hydroxyl"]),
        ("c1ccc2ncccc2c1", ["a quinoline system"]),
        ("CC(=O)OC(C)=O", []),  # an anhydride is no ester
        ("CCO[N+](=O)[O-]", []),  # a nitrate is no nitro compound
        ("Cc1c([N+](=O)[O-])cc([N+](=O)[O-])cc1[N+](=O)[O-]", ["three nitro groups"]),  # TNT
    ],
)  # fmt: skip
def test_known_molecules(smiles, phrases):
    molecule = Chem.MolFromSmiles(smiles)
    said = captions.ring_phrases(molecule) + captions.group_phrases(molecule)
    assert set(phrases) <= set(said)
    assert not {"an ester", "a nitro group"} & set(said) - set(phrases)


def test_captions_depend_on_molecule_and_seed_only():
    smiles = nci(every=100)
    ours = [captions.caption(Chem.MolFromSmiles(s), 0) for s in smiles]
    again = [captions.caption(Chem.MolFromSmiles(s), 0) for s in reversed(smiles)]
    assert ours == again[::-1]
    assert ours != [captions.caption(Chem.MolFromSmiles(s), 1) for s in smiles]


def test_pairs(tiny, capsys):
    rows = build.pairs(tiny)
    assert list(rows[0]) == ["id", "molecule", "caption", "split"]
    assert len({row["id"] for row in rows}) == len({row["molecule"] for row in rows}) == len(rows)
    scaffolds: dict[str, set] = {}
    for row in rows:
        molecule = Chem.MolFromSmiles(row["molecule"])
        assert Chem.MolToSmiles(molecule) == row["molecule"]
        scaffolds.setdefault(MurckoScaffoldSmiles(mol=molecule), set()).add(row["split"])
    assert all(len(splits) == 1 for splits in scaffolds.values())
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def test_models_load_and_were_trained_from_one_start(tiny):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    shapes = []
    for direction in (CAP2MOL, MOL2CAP):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "models" / direction)
        assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
        model = AutoModelForCausalLM.from_pretrained(tiny / "models" / direction)
        linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
        assert linear and all(side % 64 == 0 for m in linear for side in m.weight.shape)
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
        text = "CC(=O)Nc1ccc(O)cc1 [Pt+2] é"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        ids = torch.tensor([encode_prompt(tokenizer, build_prompt(direction, "C"))])
        assert ids[0, 0] == tokenizer.bos_token_id and torch.isfinite(model(ids).logits).all()
        t5 = AutoModelForSeq2SeqLM.from_pretrained(tiny / "models" / f"t5_{direction}")
        assert t5.config.decoder_start_token_id == tokenizer.pad_token_id
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_muon_in_fp32_is_torchs_in_bf16(shape):
    torch.manual_seed(0)
    gradient, settings = torch.randn(shape), ((3.4445, -4.775, 2.0315), 5, 1e-7)
    expected = torch.optim._muon._zeropower_via_newtonschulz(gradient, *settings)
    found = build._orthogonalise(gradient, *settings)
    assert found.dtype == torch.float32 and (found - expected.float()).norm() < 0.02 * found.norm()
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3


def test_only_what_lacks_is_built(tiny, capsys):
    models = tiny / "models"
    before = {path: path.stat().st_mtime_ns for path in models.rglob("model.safetensors")}
    weights = (models / "mol2cap" / "model.safetensors").read_bytes()
    (models / "finished").unlink()
    (models / "mol2cap").rename(models / ".mol2cap.partial")  # as a killed run leaves it
    build.build_models(tiny, "tiny")
    after = {path: path.stat().st_mtime_ns for path in models.rglob("model.safetensors")}
    assert {path.parent.name for path in after if after[path] != before.get(path)} == {"mol2cap"}
    assert (models / "mol2cap" / "model.safetensors").read_bytes() == weights  # deterministic
    capsys.readouterr()
    build.build_models(tiny, "tiny")
    assert capsys.readouterr().out == ""


def test_reading_never_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="python -m lmolt.demo.build makes it here"):
        read_pairs("demo")
    assert not list(tmp_path.iterdir())


def test_triples_are_made_in_the_working_directory_of_training_pairs(tiny):
    command = [sys.executable, ROOT / "scripts" / "make_triples.py", "--recipe", ROOT / "recipes" / "demo_triples.yaml"]
    done = subprocess.run([*command, "--fraction", "0.5", "--max_new_tokens", "8"], cwd=tiny.parents[1])
    assert done.returncode == 0
    triples = read_triples(tiny / "triples.parquet")
    train = {pair["molecule"] for pair in build.pairs(tiny) if pair["split"] == "train"}
    assert {t["chosen"] if t["direction"] == CAP2MOL else t["source"] for t in triples} <= train


def test_importing_the_demo_needs_neither_torch_nor_rdkit():
    code = "import sys; from lmolt.demo import build; print({'torch', 'rdkit', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "set()"
