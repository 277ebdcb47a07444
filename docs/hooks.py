"""Pages of the site that are made from other files: the README, CONTRIBUTING, CHANGELOG, the map and the reference."""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# What users call from Python. The rest of the package is on the map, with its sources.
PUBLIC = """
    recipes distill_nemo.config distill_nemo.balancers distill_nemo.evaluation distill_nemo.executors
    distill_nemo.models.provider distill_nemo.models.distillation distill_nemo.training.entry
    distill_nemo.training.forward_step distill_nemo.losses.logits distill_nemo.losses.hidden
    distill_nemo.losses.fused_linear
""".split()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    pages = {
        "index.md": _of_root("README.md"),
        "contributing.md": _of_root("CONTRIBUTING.md"),
        "changelog.md": _of_root("CHANGELOG.md"),
        "code.md": "# The code\n\n" + "\n".join(_map()),
        "reference.md": "# Reference\n\n" + "\n\n".join(f"::: {module}" for module in PUBLIC),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Leave out links to files that the site does not have, such as examples and sources."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)(?:\.\./)*([^)#]+\.(?:py|toml|txt)|[^)]+/)\)", r"\1", markdown)


def _of_root(name: str) -> str:
    """Return a page of the root directory with its links as they are from docs/."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    return text.replace("](CONTRIBUTING.md", "](contributing.md").replace("](CHANGELOG.md", "](changelog.md")


def _map() -> list[str]:
    """Return every module with the first sentence of its docstring, by package."""
    lines = []
    for package in sorted(
        {path.parent for root in ("recipes", "distill_nemo") for path in (ROOT / root).rglob("*.py")}
    ):
        lines += [f"\n## {package.relative_to(ROOT)}/\n", "| file | |", "|---|---|"]
        for path in sorted(package.glob("*.py")):
            about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            first = " ".join(about.split("\n\n")[0].split())
            lines.append(f"| `{path.name}` | {first.replace('|', chr(92) + '|')} |")
    return lines
