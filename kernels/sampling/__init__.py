"""Noise with an address, filters, the draw, and the numbers behind a draw."""
