"""The engine: rows that share steps. It yields events and never prints; callers present."""
