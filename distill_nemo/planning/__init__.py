"""What a run needs, computed from its config before any GPU is asked for: docs/planning.md."""
