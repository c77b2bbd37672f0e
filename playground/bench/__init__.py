"""How fast it is: `python -m playground.bench`."""
