"""Attention over a paged cache, of a prompt and of decode steps, and what restores the cache for a prompt."""
