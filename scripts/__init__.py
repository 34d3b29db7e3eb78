"""The commands; an installed LMolT has them as lmolt.commands."""
