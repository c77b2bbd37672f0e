"""Noise with an address, filters, the draw, and what stood behind it."""
