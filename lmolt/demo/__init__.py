"""The embedded default: pairs, stand-in models and triples made on the spot. Only scripts import it."""
