"""Which experts a row goes to."""
