"""Read chat templates: from a file, or from where Hugging Face keeps them beside a tokenizer."""

from pathlib import Path

from distill_nemo.runtime.files import read_object_if_any

FOR_TOOLS = "tool_use"  # name of a second template, which `apply_chat_template` takes for conversations with tools
MAX_TEMPLATE_BYTES = 1 << 20


def read_templates(directory: str, file: str | None) -> tuple[str, str | None]:
    """Return the chat template in a file, or else beside a tokenizer, and the one for tools, if that is another.

    Raises:
        ValueError: if there is none.
    """
    if file is not None:
        return _read(Path(file).expanduser()), None
    path = Path(directory)
    if (beside := path / "chat_template.jinja").is_file():
        tools = path / "additional_chat_templates" / f"{FOR_TOOLS}.jinja"
        return _read(beside), _read(tools) if tools.is_file() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_object_if_any(path / name).get("chat_template")
        tools = None
        if isinstance(found, list):  # several, by name
            named = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
            found, tools = named.get("default"), named.get(FOR_TOOLS)
        if isinstance(found, str):
            return found, tools
    raise ValueError(
        f"the tokenizer {directory} has no chat template, so conversations cannot be rendered: use the tokenizer of an "
        "instruct model, or pass chat_template=FILE with a Jinja template"
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"no such chat template: {path}")
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ValueError(f"the chat template {path} has more than {MAX_TEMPLATE_BYTES:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the chat template {path} is not UTF-8: {error}") from None
