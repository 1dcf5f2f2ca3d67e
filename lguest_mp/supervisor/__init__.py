"""The parent of every process of a guest."""
