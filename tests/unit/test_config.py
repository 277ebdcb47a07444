"""Configs: the YAML round trip, and every refusal."""

import dataclasses
import inspect
import re
import typing

import pytest

from distill_nemo.checks import check
from distill_nemo.cli.arguments import parse_arguments
from distill_nemo.config import (
    DataConfig,
    ParallelismConfig,
    PruneConfig,
    RunConfig,
    StoreConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
)
from distill_nemo.config_files import from_dict, load_yaml, save_yaml, to_dict
from distill_nemo.executors import run_config_of
from distill_nemo.fields import plain_type
from distill_nemo.training.entry import distill
from recipes.base import base

EP2 = {"parallelism__expert_model_parallel_size": 2}
MOE_TEACHER = {"teacher__num_experts": 4, "teacher__family": "qwen3_moe"}


def config(**changes):
    run = RunConfig("out", StudentConfig(num_layers=4, num_attention_heads=4), TeacherConfig(num_layers=8))
    run.data = DataConfig(train=["corpus"])
    for path, value in changes.items():
        section, name = path.split("__")
        setattr(getattr(run, section), name, value)
    return run


def test_yaml_round_trip_is_the_identity_and_keeps_student_and_teacher_apart(tmp_path):
    run = config(student__rope_scaling={"factor": 8.0}, teacher__checkpoint="dir", optimizer__lr=1e-4)
    save_yaml(run, tmp_path / "config.yaml")
    again = load_yaml(tmp_path / "config.yaml")
    assert again == run
    assert type(again.student) is StudentConfig and type(again.teacher) is TeacherConfig
    assert again.student is not again.teacher
    assert {f.name for f in dataclasses.fields(RunConfig)} == set(to_dict(run))


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    save_yaml(config(), tmp_path / "config.yaml")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_yaml(config(student__checkpoint="another"), tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == config() and len(list(tmp_path.iterdir())) == 1


ODD = [
    "null",
    "1e-4",
    "yes",
    "a: b # c",
    "weiß 東京 🦙",
    'quote"d',
    "line\nbreak",
    " space ",
    "~",
    "{}",
    "0x1F",
    "\u2028",
]


def all_different(cls, odd):
    """Return a `cls` whose fields all differ from their defaults, with odd strings."""
    values = {}
    for name, hint in typing.get_type_hints(cls).items():
        hint = plain_type(hint)
        default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
        number = default if isinstance(default, int | float) else 0
        if typing.get_origin(hint) is typing.Literal:
            values[name] = next(choice for choice in typing.get_args(hint) if choice != default)
            continue
        makers = {int: lambda n=number: n + 8, float: lambda n=number: n / 3 + 1e-9, bool: lambda n=number: not n}
        makers |= {str: lambda: next(odd), list[str]: lambda: [next(odd), next(odd)]}
        makers |= {dict[str, str]: lambda: {next(odd): next(odd)}}
        makers |= {dict[str, typing.Any]: lambda: {next(odd): [1.5, None, True], "nested": {"x": next(odd)}}}
        makers[list[dict[str, typing.Any]]] = lambda m=makers: [m[dict[str, typing.Any]](), {}]
        values[name] = all_different(hint, odd) if dataclasses.is_dataclass(hint) else makers[hint]()
        assert values[name] != default, name
    return cls(**values)


def test_every_field_survives_yaml_with_a_value_of_its_own(tmp_path):
    run = all_different(RunConfig, (f"{text}{i}" if i >= len(ODD) else text for i, text in enumerate(ODD * 9)))
    save_yaml(run, tmp_path / "config.yaml")
    again = load_yaml(tmp_path / "config.yaml")
    assert again == run and repr(again) == repr(run)  # 1 == 1.0 == True, but not in repr
    assert to_dict(again) == to_dict(run)
    save_yaml(again, tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "config.yaml").read_bytes()


def test_equal_student_and_teacher_stay_two_objects(tmp_path):
    """YAML would write one object twice as an anchor and an alias."""
    run = config()
    run.student.rope_scaling = run.teacher.rope_scaling = {"factor": 8.0}
    save_yaml(run, tmp_path / "config.yaml")
    again = load_yaml(tmp_path / "config.yaml")
    assert again == run
    again.student.rope_scaling["factor"] = 1.0
    assert again.teacher.rope_scaling == {"factor": 8.0}


def test_a_run_without_a_teacher_survives_its_file(tmp_path):
    run = config()
    run.teacher = None
    save_yaml(run, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == run


def scheduled(**schedules):
    return {"distillation__schedules": schedules}


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"parallelism__tensor_model_parallel_size": 2}, 3, "world size 3 is not divisible"),
        ({"parallelism__tensor_model_parallel_size": 8}, 8, "student.num_attention_heads = 4 is not divisible"),
        ({"parallelism__pipeline_model_parallel_size": 5}, 5, "student.num_layers = 4 cannot fill 5 pipeline stages"),
        ({"training__global_batch_size": 10, "training__micro_batch_size": 4}, 1, "global_batch_size 10 is not"),
        ({"training__dtype": "float8"}, 1, 'training.dtype = "float8" is not known. Did you mean'),
        ({"distillation__divergence": "foward_kl"}, 1, "Did you mean forward_kl"),
        ({"distillation__temperature": 0.0}, 1, "temperature must be above 0 and at most 100, got 0.0"),
        ({"distillation__hidden_loss": "mse"}, 1, "go together"),
        ({"distillation__hidden_loss": "mse", "distillation__hidden_layers": ["a"]}, 1, "student_layer:teacher_layer"),
        ({"data__train": []}, 1, "data.train is empty"),
        ({"parallelism__context_parallel_size": 2, "data__sequence_length": 30}, 2, "30 is not divisible by 4"),
        ({"parallelism__virtual_pipeline_model_parallel_size": 2}, 1, "model_parallel_size > 1, got 1"),
        ({"parallelism__virtual_pipeline_model_parallel_size": 1}, 1, "must be at least 2, got 1"),
        (
            {
                "parallelism__pipeline_model_parallel_size": 2,
                "parallelism__virtual_pipeline_model_parallel_size": 2,
                "training__global_batch_size": 3,
            },
            2,
            "micro batches in multiples of pipeline_model_parallel_size = 2, got 3",
        ),
        ({"distillation__hidden_weight": 0.5}, 1, "hidden_weight = 0.5 needs hidden_loss and hidden_layers"),
        (
            {"distillation__temperature": 200.0},
            1,
            "distillation.temperature must be above 0 and at most 100, got 200",
        ),
        ({"distillation__lm_weight": float("inf")}, 1, "distillation.lm_weight must be a finite number, got inf"),
        ({"distillation__kd_loss_scale": -1.0}, 1, "distillation.kd_loss_scale must be at least 0, got -1"),
        (
            {"distillation__balancer": "dynamic", "distillation__lm_weight": 0.5, "distillation__logits_weight": 0.0},
            1,
            'balancer = "dynamic" ignores lm_weight = 0.5, logits_weight = 0.0: leave that out',
        ),
        ({"distillation__skip_lm_loss": False}, 1, 'balancer = "static" ignores skip_lm_loss = False'),
        (
            {"student__num_query_groups": 3},
            1,
            "num_attention_heads = 4 is not divisible by student.num_query_groups = 3",
        ),
        ({"quantization__kv_cache": "fp8"}, 1, 'kv_cache = "fp8" without quantization.format cannot be exported: set'),
        (
            {"quantization__format": "fp8", "quantization__exclude": ["output_layer", "**"]},
            1,
            "quantization.exclude = ['output_layer', '**'] leaves no linear layer to quantise",
        ),
        ({"quantization__exclude": ["*.linear_qkv"]}, 1, "['*.linear_qkv'] needs a quantization.format, got \"none\""),
        (
            {"quantization__block_size": 64},
            1,
            'quantization.block_size = 64 needs quantization.format = "int4_weights"',
        ),
        ({"distillation__top_k": 0}, 1, "distillation.top_k must be at least 1"),
        (
            {"distillation__top_k": 5, "distillation__divergence": "reverse_kl"},
            1,
            'needs divergence = "forward_kl"',
        ),
        ({"distillation__fused_linear": True, "distillation__logits_weight": 0.0}, 1, "fused_linear = true needs a"),
        ({"distillation__beta": 1.0}, 1, "distillation.beta must be above 0 and below 1, got 1.0"),
        ({"distillation__beta": 0.1}, 1, 'beta = 0.1 needs divergence = "jensen_shannon", not "forward_kl"'),
        (
            {"distillation__balancer": "dynamic", "distillation__kd_loss_scale": 0.1},
            1,
            "distillation.kd_loss_scale = 0.1 weighs the loss beside the LM loss, which",
        ),
        ({"distillation__logits_weight": 0.0}, 1, "are all 0: there is nothing to learn"),
        (scheduled(beta="linear 1:0 9:1"), 1, 'distillation.schedules has "beta". Known: lm_weight, logits_weight'),
        (scheduled(temperature="linear 1:2 9:0"), 1, 'schedules["temperature"] at step 9 must be above 0 and at most'),
        (scheduled(lm_weight="constant 1:-1"), 1, 'schedules["lm_weight"] at step 1 must be at least 0, got -1.0'),
        (
            scheduled(temperature="linear 1:2 9:1") | {"distillation__temperature": 3.0},
            1,
            "distillation.temperature = 3.0 is beside its schedule, which gives it for every step; leave one out",
        ),
        (scheduled(kd_loss_scale="constant 1:2"), 1, '"static" ignores the schedule of kd_loss_scale = constant 1:2'),
        (
            scheduled(kd_loss_scale="constant 1:2") | {"distillation__balancer": "dynamic"},
            1,
            "distillation.kd_loss_scale = constant 1:2 weighs the loss beside the LM loss",
        ),
        (scheduled(hidden_weight="constant 1:2"), 1, "hidden_weight = constant 1:2 needs hidden_loss and hidden_lay"),
        (scheduled(logits_weight="constant 0:1 9:0"), 1, "are all 0 at step 9: there is nothing to learn"),
        (
            scheduled(logits_weight="constant 0:0") | {"distillation__fused_linear": True},
            1,
            "fused_linear = true needs a logits loss",
        ),
        ({"training__seed": -1}, 1, "training.seed must be at least 0 and below 2147483648, got -1"),
        ({"training__data_seed": 2**40}, 1, "training.data_seed must be at least 0 and below 2147483648"),
        ({"optimizer__adam_beta2": 1.0}, 1, "optimizer.adam_beta2 must be at least 0 and below 1, got 1.0"),
        ({"training__recompute": "ful"}, 1, "Did you mean full"),
        ({"parallelism__sequence_parallel": True}, 1, "needs parallelism.tensor_model_parallel_size"),
        ({"optimizer__warmup_steps": 1000}, 1, "warmup_steps must be below the 1000 steps"),
        ({"training__steps": 0}, 1, "training.steps must be at least 1"),
        ({"checkpoint__save_interval": 0}, 1, "checkpoint.save_interval must be at least 1, got 0"),
        ({"logging__log_interval": 0}, 1, "logging.log_interval must be at least 1, got 0"),
        ({"optimizer__lr": float("nan")}, 1, "optimizer.lr must be a finite number, got nan"),
        ({"optimizer__min_lr": 1.0}, 1, "optimizer.min_lr = 1.0 is above optimizer.lr"),
        ({"optimizer__decay_style": "cosin"}, 1, "Did you mean cosine"),
        ({"optimizer__weight_decay": -0.1}, 1, "optimizer.weight_decay must be at least 0, got -0.1"),
        (
            {
                "parallelism__tensor_model_parallel_size": 4,
                "parallelism__sequence_parallel": True,
                "data__sequence_length": 30,
            },
            4,
            "data.sequence_length = 30 is not divisible",
        ),
        ({"parallelism__tensor_model_parallel_size": 4, "student__ffn_hidden_size": 6}, 4, "ffn_hidden_size = 6"),
        (
            {
                "parallelism__tensor_model_parallel_size": 4,
                "student__num_attention_heads": 12,
                "student__num_query_groups": 6,
            },
            4,
            "student.num_query_groups = 6 is neither a multiple nor a divisor of parallelism.tensor_model",
        ),
        (EP2, 2, "expert_model_parallel_size = 2 needs a student or a teacher with experts"),
        (
            EP2 | MOE_TEACHER | {"parallelism__tensor_model_parallel_size": 2},
            2,
            "expert_model_parallel_size = 2 does not divide 1: world size 2 / (tensor x pipeline parallel size = 2 x",
        ),
        (EP2 | MOE_TEACHER | {"teacher__num_experts": 5}, 2, "teacher.num_experts = 5 is not divisible by parallelism"),
        (
            {"student__num_experts": 4, "parallelism__tensor_model_parallel_size": 2},
            2,
            "trains under parallelism.tensor_model_parallel_size = 2 with parallelism.sequence_parallel=true only",
        ),
        (
            {
                "student__num_experts": 4,
                "student__moe_ffn_hidden_size": 7,
                "parallelism__tensor_model_parallel_size": 2,
                "parallelism__sequence_parallel": True,
            },
            2,
            "student.moe_ffn_hidden_size = 7 is not divisible",
        ),
    ],
)
def test_what_cannot_run_is_refused_by_name(changes, world_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(from_dict(to_dict(config(**changes))), world_size)


def test_what_must_be_named_is_not_empty():
    for made in (RunConfig("", StudentConfig()), StoreConfig(""), PruneConfig(model="", output="o", data="d")):
        name = next(name for name, value in vars(made).items() if value == "")
        with pytest.raises(ValueError, match=f"{name} is empty, and must name a directory or files"):
            from_dict(to_dict(made), type(made))


def test_either_token_file_names_both():
    assert PruneConfig(model="m", output="o", data="a/b.bin").data == "a/b"


def test_a_weight_that_is_zero_before_the_first_step_only_is_let_through():
    check(config(**scheduled(logits_weight="linear 0:0 9:1")), 1)


def test_what_can_run_is_let_through():
    check(config(parallelism__tensor_model_parallel_size=2, parallelism__pipeline_model_parallel_size=2), 8)
    check(config(**EP2, **MOE_TEACHER), 4)
    check(config(**EP2, teacher__checkpoint="not read yet"), 4)
    check(config(**EP2, **MOE_TEACHER, parallelism__context_parallel_size=2), 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"studnet": {}}, 'unknown field "studnet". Did you mean student'),
        ({"student": {"num_layer": 1}}, 'unknown field "student.num_layer". Did you mean num_layers'),
        ({"student": {"num_layers": "x"}}, "student.num_layers must be int | None, got 'x'"),
        ({"student": {"num_layers": True}}, "student.num_layers must be int | None, got True"),
        ({"student": []}, "must be a mapping"),
        ({"student": {}}, "config leaves out output_dir, which must be set"),
        ({"output_dir": "out", "student": {}, "training": 5}, "training must be a mapping of fields, got int"),
        ({"data": {"train": [1]}}, """data.train must be list[str], such as '["a", "b"]', got [1]"""),
        ({"data": {"train": "corpus"}}, "data.train must be list[str]"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr must be float, got 'fast'"),
        ({"optimizer": {"decay_steps": 0}}, "optimizer.decay_steps must be at least 1, got 0"),
        (
            {"parallelism": {"timeout_minutes": 1e300}},
            "timeout_minutes must be above 0 and at most 1000000, got 1e+300",
        ),
        ({"student": {"checkpoint": ""}}, "student.checkpoint is empty; give it a value, or None"),
        ({"distillation": {"schedules": "x"}}, """must be dict[str, str], such as '{"a": "b"}', got 'x'"""),
        ({"training": {"recompute": 5}}, "training.recompute must be full | selective | None, got 5"),
        ({"training": None}, "training must be a mapping of fields, got NoneType"),
        ({"student": None}, "student must be a mapping of fields, got NoneType"),
    ],
)
def test_bad_fields_are_named(values, message):
    with pytest.raises(ValueError) as raised:
        from_dict(values)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("path", "text", "value", "message"),
    [
        ("training.steps", "0", 0, "training.steps must be at least 1, got 0"),
        (
            "training.dtype",
            "float8",
            "float8",
            'training.dtype = "float8" is not known. Did you mean float32 or bfloat16?',
        ),
        ("optimizer.lr", "fast", "fast", "optimizer.lr must be float, got 'fast'"),
        ("optimizer.lr", "nan", float("nan"), "optimizer.lr must be a finite number, got nan"),
        ("distillation.beta", "1.5", 1.5, "distillation.beta must be above 0 and below 1, got 1.5"),
    ],
)
def test_the_command_line_python_and_yaml_refuse_a_wrong_value_in_the_same_words(tmp_path, path, text, value, message):
    section, name = path.split(".")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_arguments(distill, [f"{path}={text}"], "train")
    recipe = base("one")
    setattr(getattr(recipe, section), name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run_config_of(recipe)
    run = config(**{f"{section}__{name}": value})
    save_yaml(run, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_yaml(tmp_path / "config.yaml")


def test_a_recipe_and_the_command_line_take_the_fields_of_run_config():
    names = [field.name for field in dataclasses.fields(RunConfig)]
    assert list(inspect.signature(distill).parameters) == names
    assert set(base("one").__arguments__) == set(names)


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ("output_dir: a\nstudent: {}\noutput_dir: b\n", "output_dir"),
        ("output_dir: a\ntraining:\n  steps: 5\n  seed: 1\n  steps: 6\n", "steps"),
        ("output_dir: a\nmodel: {family_fields: {x: 1, 'x': 2}}\n", "x"),
        ("{output_dir: a, training: {}, training: {steps: 5}}", "training"),
    ],
)
def test_a_field_that_stands_twice_in_a_file_is_refused(tmp_path, text, twice):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f'config.yaml is not valid YAML: the field "{twice}" is there twice'):
        load_yaml(tmp_path / "config.yaml")


def test_yaml_cannot_execute_code(tmp_path):
    (tmp_path / "bad.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="no such config file"):
        load_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="cannot be read"):
        load_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        load_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("trained", "ranks", "expected"),
    [
        ((8, 4, 1), 32, (8, 4, 1)),
        ((8, 4, 1), 16, (8, 2, 1)),
        ((8, 4, 1), 4, (4, 1, 1)),
        ((8, 4, 1), 1, (1, 1, 1)),
        ((4, 1, 8), 8, (4, 1, 2)),
        ((1, 1, 8), 16, (1, 1, 8)),
        ((2, 1, 1), 3, (1, 1, 1)),
    ],
)
def test_a_layout_is_reduced_to_other_ranks(trained, ranks, expected):
    tensor, pipeline, expert = trained
    layout = ParallelismConfig(tensor, pipeline, 2, 2, expert, sequence_parallel=True, timeout_minutes=3).on(ranks)
    tensor, pipeline, expert = expected
    assert layout == ParallelismConfig(tensor, pipeline, None, 1, expert, tensor > 1, 3)


def test_no_name_is_suggested_in_place_of_a_known_one(monkeypatch):
    """The search takes most of the time, of which the manifest of a store with 38,000 shards needs 38,000 times."""

    def never(*_):
        raise AssertionError("suggested a name")

    monkeypatch.setattr("distill_nemo.config_files.suggest", never)
    config = TrainingConfig(steps=3)
    assert from_dict(dataclasses.asdict(config), TrainingConfig) == config
