"""Memory of a rank, reckoned before it is taken: of a pass, of all that a step needs, and what a fallback does about it."""
