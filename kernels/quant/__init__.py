"""Block quantisation to E4M3, and back."""
