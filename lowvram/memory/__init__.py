"""Memory of a training step. Imports torch and nothing of ours but errors."""
