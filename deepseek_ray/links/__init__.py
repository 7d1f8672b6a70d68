"""How frames travel between two processes. No Ray."""
