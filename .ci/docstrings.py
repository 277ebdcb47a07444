"""Refuse docstrings that begin with a question word: a docstring begins with a verb or a noun."""

import ast
import sys
from pathlib import Path

ROOTS = "distill_nemo recipes benchmarks examples docs tests".split()
REFUSED = "As How In Its Of That Those To What Where Whether Which Who Whose".split()
found = 0
for path in sorted(path for root in ROOTS for path in Path(root).rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").split(maxsplit=1)[:1]
            if first and first[0] in REFUSED:
                found += 1
                print(f"{path}:{node.body[0].lineno}: docstring begins with {first[0]}")
sys.exit(found > 0)
