"""Evaluation of finished models: held-out metrics, and benchmarks by lm-evaluation-harness."""
