"""How the embedded model was made: `python -m playground.train`."""
