"""Rotary embedding, and what goes into the cache."""
