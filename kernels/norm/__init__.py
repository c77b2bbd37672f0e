"""Residual sum and RMSNorm, SwiGLU."""
