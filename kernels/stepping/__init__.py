"""What begins and ends a step."""
