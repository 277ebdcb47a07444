"""A representative part of the matrix of docs/parity.md, one test per layout (`make parity` computes all of it)."""

import pytest

from distill_nemo.models.families import FAMILIES
from tests.conversations import MISTAKES, PACKS, Mistaken
from tests.distillation import Case
from tests.parity.__main__ import page, read_page
from tests.parity.cells import (
    HIDDEN,
    LAYOUTS,
    OFFSET,
    TOLERANCE,
    Cell,
    Errors,
    cells,
    errors_of,
    family_of,
    measure,
    write_models,
)
from tests.spawn import Gloo
from tests.tiny_models import MODEL_TYPES, REFUSED, write_hf

ALWAYS = ("CP=2", "TP=2, PP=2", "EP=2, DP=2")
EVERYWHERE = ("forward KL, T=2, and LM", HIDDEN)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def groups(one, two):
    """Return the processes by number, started on first use."""
    with Gloo(4, init=False, timeout=600) as four, Gloo(8, init=False, timeout=600) as eight:
        yield {1: one, 2: two, 4: four, 8: eight}


def chosen(layout: str) -> list[Cell]:
    """Return some cells of a layout.

    TP=2 has every loss and offset, TP=2 x PP=2 every other pair of models, the virtual pipeline every way, and each
    kind of parallelism a student of stored targets.
    By default the losses are fused with the output layers; "whole logits" turns that off.
    """
    of_layout = [cell for cell in cells() if cell.layout == layout]
    dense = [cell for cell in of_layout if cell.models == ("llama", "teacher") and not cell.pack]
    offset = [cell for cell in of_layout if (cell.models, cell.loss) in OFFSET]
    usual = [cell for cell in dense if cell.loss in EVERYWHERE and not cell.way]
    if layout in ("DP=2", "TP=2, SP", "PP=2", "CP=2"):
        usual += [cell for cell in dense if cell.loss == "sampled, T=2, and LM" and not cell.way]
    more = {
        "TP=2": [cell for cell in dense if not cell.way] + offset,
        "TP=2, PP=2": [cell for cell in of_layout if not cell.way and cell.models[0] != "llama" and cell not in offset],
        "PP=4, VPP=2": [cell for cell in of_layout if cell.way],
        "DP=4": [cell for cell in of_layout if cell.way in ("distributed optimizer", "an all-masked micro batch")],
        "EP=2, DP=2": [cell for cell in of_layout if not cell.pack],
        "TP=4": [cell for cell in of_layout if cell.models[0] == "two query groups"],
        "TP=2, SP": [cell for cell in of_layout if cell.way == "whole logits"],
    }
    packed = [cell for cell in of_layout if cell.pack == "packs of 32" and cell.changes]
    return list(dict.fromkeys(usual + more.get(layout, []) + packed))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[] if layout in ALWAYS else pytest.mark.long)
        for layout in LAYOUTS
        if layout != "one process"
    ],
)
def test_metrics_and_every_gradient_are_those_of_one_process_in_fp64(models, groups, one, layout):
    wanted = chosen(layout)
    assert wanted
    beyond = {
        cell: errors for cell, errors in measure(wanted, models, groups[LAYOUTS[layout][0]], one) if errors.beyond
    }
    assert not beyond


def test_packs_of_every_width_are_the_unpacked_conversations_and_a_mistake_in_them_is_seen(models, one):
    wanted = [cell for cell in cells() if cell.layout == "one process" and cell.pack and not cell.changes]
    assert [cell.pack for cell in wanted] == [*PACKS]
    assert not any(errors.beyond for _, errors in measure(wanted, models, one, one))
    packed = wanted[1].case(models)
    fields = packed.student, packed.teacher, packed.distillation
    mistaken: list[Case] = [Mistaken(*fields, pack=wanted[1].pack, mistake=mistake) for mistake in MISTAKES]
    for mistake, (_, gradient) in zip(MISTAKES, errors_of(mistaken, [wanted[1].sizes] * 3, one, one), strict=True):
        assert gradient > 1000 * TOLERANCE, mistake


def test_the_page_counts_the_cells_that_were_not_computed_and_gives_the_others_back(tmp_path):
    rows = {cell: Errors(0.0, 0.0) for cell in cells()}
    assert "Not computed" not in page(rows)
    others = [cell for cell in rows if cell.layout == "DP=2"]
    first, second, *_ = rows
    some = {cell: errors for cell, errors in rows.items() if cell not in (first, *others)}
    some[second] = Errors(1e-7, 1.0)
    (tmp_path / "page.md").write_text(page(some))
    assert f"**Not computed, by layout: one process: 1; DP=2: {len(others)}.**" in page(some)
    found = read_page(tmp_path / "page.md")
    assert found.keys() == some.keys() and page(found) == page(some)
    assert [cell for cell, errors in found.items() if errors.beyond] == [second]


def test_every_family_is_in_a_pair():
    used = {family_of(model) for cell in cells() for model in cell.models}
    assert {MODEL_TYPES.get(family, family) for family in used} == FAMILIES.keys()


@pytest.mark.parametrize("family", REFUSED)
def test_a_layout_without_cells_is_refused_at_the_start(tmp_path, family):
    from distill_nemo.training.entry import resolve_models

    fields = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size", "CP": "context_parallel_size"}
    path = write_hf(tmp_path / "model", family)
    for part in REFUSED[family]:
        sizes = next(sizes for layout, (_, sizes) in LAYOUTS.items() if part in layout.split(", "))
        with pytest.raises(ValueError, match=fields[part.split("=")[0]]):
            resolve_models(Case(path, path, {}).run_config(str(tmp_path / "run"), sizes))
