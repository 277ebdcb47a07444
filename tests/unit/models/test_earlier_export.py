"""An export replaces the files of an earlier one. What somebody added to it, or wrote into its card, stays."""

import pytest

from distill_nemo.runtime.device import setup_device
from tests.unit.models.test_export_files import export_directory


@pytest.fixture
def out(tmp_path):
    """Return a directory with a file of every kind that exports and cuts write."""
    setup_device()
    from distill_nemo.models.checkpoints.earlier_export import sealed

    out = export_directory(tmp_path / "out")
    names = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json")
    names += ("generation_config.json", "hf_quant_config.json", "LICENSE.txt", "pruning.json", "chat_template.jinja")
    for name in (*names, "preprocessor_config.json", "additional_chat_templates/tool_use.jinja"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    (out / "README.md").write_text(sealed("# A student <!-- with a comment -->\n\n"))
    return out


def test_all_that_an_export_writes_is_replaced(out):
    from distill_nemo.models.checkpoints.huggingface import writing_export

    with writing_export(out) as partial:
        (partial / "config.json").write_text("new")
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("config.json", "new")]


@pytest.mark.parametrize(
    "name",
    [
        "model-q4_k_m.gguf",
        ".git/config",
        "adapter_model.safetensors",
        "model-00001-of-00002.safetensors.bak",
        "tokenizer.d/config.json",
        "additional_chat_templates/notes.md",
        "README.md",
    ],
)
def test_what_was_added_or_edited_is_refused_by_name_and_stays(out, name):
    from distill_nemo.models.checkpoints.huggingface import check_target, writing_export

    (out / name).parent.mkdir(exist_ok=True)
    with (out / name).open("a") as file:
        file.write("years of work")
    before = sorted(out.rglob("*"))
    (what, _, _) = name.partition("/")
    with pytest.raises(ValueError, match=rf"added or edited since the last one: {what}; move that elsewhere"):
        check_target(out)
    with pytest.raises(ValueError, match="would be replaced"), writing_export(out):
        pass
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("card", ["", "# Mine\n", "<!--", "# A <!-- distill-nemo wrote the text above", "\udcff"])
def test_a_card_of_another_hand_is_no_card_of_ours(out, card):
    from distill_nemo.models.checkpoints.earlier_export import added_to

    (out / "README.md").write_bytes(card.encode(errors="surrogateescape"))
    assert added_to(out) == ["README.md"]
