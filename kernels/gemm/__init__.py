"""Products: FP8 with block scales, plain ones, and those of a mixture's experts."""
