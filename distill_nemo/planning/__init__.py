"""Memory and time of a run, computed from its config before any GPU is asked for: docs/planning.md."""
