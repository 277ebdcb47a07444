"""Stores that do not fit a run are refused, with what would fit."""

import base64
import zlib

import pytest

from distill_nemo.config import DataConfig, DistillationConfig, RunConfig, StudentConfig, TeacherConfig
from distill_nemo.data.manifest import pack_vocabulary, vocabulary
from distill_nemo.models.architecture import Architecture
from distill_nemo.training.data import check_tokenizers
from distill_nemo.training.stores import check_stores
from tests.stores import L, V, manifest_of, write_store


def run_from(*stores, teacher=None, valid=(), **losses):
    data = DataConfig([str(store) for store in stores], [str(store) for store in valid], sequence_length=L)
    return RunConfig("out", StudentConfig(), teacher, DistillationConfig(**losses), data=data)


@pytest.mark.parametrize(
    ("codec", "losses", "message"),
    [
        ("sampled", {"temperature": 2.0}, r"distillation\.temperature=1\.0 would fit"),
        ("sampled", {"divergence": "reverse_kl"}, r"distillation\.divergence=forward_kl would fit"),
        ("sampled", {"top_k": 5}, r"distillation\.top_k=None would fit"),
        (
            "sampled",
            {"schedules": {"temperature": "constant 0:1", "lm_weight": "linear 0:1 9:0"}},
            r"distillation\.schedules=\{'lm_weight': 'linear 0:1 9:0'\} would fit",
        ),
        ("top_k", {}, r"distillation\.top_k=5 would fit"),
        ("top_k", {"top_k": 5, "temperature": 0.5}, r"distillation\.temperature=1\.0 would fit"),
        ("hidden", {"fused_linear": False}, r"distillation\.fused_linear=None would fit"),
        ("hidden", {"offload_teacher": True}, r"distillation\.offload_teacher=False would fit"),
        (
            "hidden",
            {"hidden_loss": "mse", "hidden_layers": ["a:b"], "hidden_weight": 1.0},
            r"distillation\.hidden_loss=None distillation\.hidden_layers=\[\] distillation\.hidden_weight=0\.0 would",
        ),
    ],
)
def test_losses_that_a_codec_cannot_serve_are_refused(codec, losses, message, tmp_path):
    write_store(tmp_path / "store", manifest_of(codec))
    with pytest.raises(ValueError, match=rf"data\.train: .*of codec {codec} at temperature 1, cannot .*{message}"):
        check_stores(run_from(tmp_path / "store", **losses), V)


@pytest.mark.parametrize(
    ("codec", "losses"),
    [
        ("sampled", {"lm_weight": 1.0}),
        ("top_k", {"top_k": 5, "balancer": "dynamic"}),
        ("hidden", {"divergence": "jensen_shannon", "temperature": 3.0}),
        ("hidden", {"top_k": 2}),
        ("hidden", {"schedules": {"temperature": "linear 0:4 9:1"}}),
        ("sampled", {"schedules": {"lm_weight": "linear 0:1 9:0"}}),
    ],
)
def test_losses_that_a_codec_serves_are_accepted(codec, losses, tmp_path):
    write_store(tmp_path / "store", manifest_of(codec))
    check_stores(run_from(tmp_path / "store", valid=[tmp_path / "store"], **losses), V)


def test_another_vocabulary_is_refused(tmp_path):
    write_store(tmp_path / "store", manifest_of())
    with pytest.raises(ValueError, match=r"store holds targets over 512 ids, but student\.vocab_size = 507"):
        check_stores(run_from(tmp_path / "store"), 507)


def test_a_store_and_a_teacher_are_one_too_many(tmp_path):
    write_store(tmp_path / "store", manifest_of())
    with pytest.raises(ValueError, match="a run has a store or a teacher: set teacher=None, or name token files"):
        check_stores(run_from(tmp_path / "store", teacher=TeacherConfig()), V)
    with pytest.raises(ValueError, match=r"data\.valid: .*store is a store, but data\.train names none"):
        check_stores(run_from(tmp_path / "corpus", valid=[tmp_path / "store"]), V)


@pytest.mark.parametrize(
    ("codec", "changed", "message"),
    [
        ("sampled", {"num": 50}, "b has num=50, and .*a has other values"),
        ("sampled", {"temperature": 2.0}, r"b has temperature=2\.0, and"),
        ("hidden", {"logit_softcap": 30.0}, r"b has logit_softcap=30\.0, and"),
        ("hidden", {"dtype": "bfloat16"}, "b has dtype=bfloat16, and"),
    ],
)
def test_stores_of_one_run_have_one_codec_and_numbers(codec, changed, message, tmp_path):
    write_store(tmp_path / "a", manifest_of(codec))
    write_store(tmp_path / "b", manifest_of(codec, **changed))
    with pytest.raises(ValueError, match=rf"data\.train: .*{message}"):
        check_stores(run_from(tmp_path / "a", tmp_path / "b"), V)
    write_store(tmp_path / "c", manifest_of(codec, seed=9, teacher={"weights": "another"}))
    check_stores(run_from(tmp_path / "a", tmp_path / "c"), V)


def test_hidden_stores_of_two_teachers_are_refused(tmp_path):
    write_store(tmp_path / "a", manifest_of("hidden"))
    write_store(tmp_path / "b", manifest_of("hidden"), layer_seed=1)
    with pytest.raises(ValueError, match=r"b has another output layer than .*a"):
        check_stores(run_from(tmp_path / "a", tmp_path / "b"), V)


def test_an_incomplete_store_is_refused(tmp_path):
    write_store(tmp_path / "store", manifest_of())
    (tmp_path / "store" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"store/manifest\.json has the format None"):
        check_stores(run_from(tmp_path / "store"), V)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path):
    """Compared token by token: the name and the size of a tokenizer may be the same."""
    names = {i: f"token {i}" for i in range(V)}
    write_store(tmp_path / "a", manifest_of(teacher_vocabulary=pack_vocabulary(names)))
    few, many = names | {3: "renamed"}, {i: f"other {i}" for i in range(V)}
    write_store(tmp_path / "few", manifest_of(teacher_vocabulary=pack_vocabulary(few)))
    write_store(tmp_path / "many", manifest_of(teacher_vocabulary=pack_vocabulary(many)))
    student = Architecture.__new__(Architecture)
    check_tokenizers(run_from(tmp_path / "a", tmp_path / "few").data, {"student": None}, student)
    with pytest.raises(ValueError, match=r"a \(its teacher\) and data\.train = .*many \(its teacher\) have"):
        check_tokenizers(run_from(tmp_path / "a", tmp_path / "many").data, {"student": None}, student)


@pytest.mark.parametrize("content", [b"[" * 10**6, b"[]", b'{"x": "a"}', b"\xff"])
def test_a_vocabulary_that_is_none_is_not_compared(content):
    assert vocabulary({"vocabulary": base64.b64encode(zlib.compress(content)).decode()}) is None
