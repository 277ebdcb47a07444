"""Stores of a teacher's targets: windows of tokens, and what the teacher predicts for each token that counts. No torch.

A store is a directory with a manifest and shards of windows. The job that runs the teacher is in `teacher_store_jobs`.
"""
