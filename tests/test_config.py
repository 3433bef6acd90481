"""Configurations: every shipped YAML loads, overrides arrive and YAML round trips are exact."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import schema
from configs.checks import ConfigError
from configs.schema import Config
from deploy.config import from_yaml, group_options, load, to_dict, to_yaml
from tasks.families.image_mlp import ImageMlp

ROOT = Path(str(resources.files("configs")))
OPTIONS = sorted((file.parent.name, file.stem) for file in ROOT.glob("*/*.yaml"))
# What an option asks of its user, and nothing else may.
NEEDS = {
    ("lopt", "celo_phase2"): ["lopt.init_from=/theta"],
    ("storage", "s3"): ["storage.root=s3://bucket/x"],
    ("experiment", "celo_phase2"): ["lopt.init_from=/theta"],
}


@pytest.fixture(scope="module")
def default() -> Config:
    return load([])


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a plain tree that holds no further section, with its value."""
    if isinstance(node, dict) and node:
        for name, item in node.items():
            yield from leaves(item, f"{path}.{name}" if path else name)
    else:
        yield path, node


# --- what is shipped ---


def test_every_yaml_file_is_an_option_of_a_group() -> None:
    assert [(group, option) for group, options in group_options().items() for option in options] == OPTIONS
    assert {path.name for path in ROOT.glob("*.yaml")} == {"config.yaml"}
    assert list(ROOT.rglob("*.yml")) == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_loads(group: str, option: str) -> None:
    config = load([f"{group}={option}", *NEEDS.get((group, option), [])])
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(("group", "option"), sorted(NEEDS))
def test_an_option_that_needs_something_says_what(group: str, option: str) -> None:
    needs = NEEDS[group, option]
    for missing in needs:
        with pytest.raises(ConfigError, match=re.escape(missing.partition("=")[0])):
            load([f"{group}={option}", *(need for need in needs if need != missing)])


@pytest.mark.parametrize("option", group_options()["experiment"])
def test_an_experiment_means_the_same_whatever_the_groups_default_to(option: str) -> None:
    """What config.yaml chooses is open to change; the groups that make the recipe are named by the experiment."""
    text = (ROOT / "experiment" / f"{option}.yaml").read_text()
    chosen = set(re.findall(r"override /(\w+):", text))
    assert {"task", "lopt", "estimator", "meta_optimizer"} <= chosen <= set(group_options())


def test_the_recipes_are_the_papers() -> None:
    celo = load(["experiment=celo_phase1", "task.data.root=/data"])
    assert celo.run.meta_steps == 100_000
    tasks = [family.task for family in celo.task.families.values()]
    assert sorted(task["dataset"] for task in tasks) == ["cifar10", "fashion_mnist", "mnist", "svhn"]
    for task in tasks:
        assert (task["image_size"], task["grey"], task["hidden"]) == (8, True, [32])
        assert (task["kind"], task["activation"], task["batch_size"]) == ("image_mlp", "relu", 64)
    assert celo.task.augment == [{"kind": "reparam", "level": "global", "low": 1e-3, "high": 1e3}]
    pes = schema.EstimatorConfig("pes", num_tasks=8, sigma=0.01, window=50, horizon_low=100, horizon_high=2000)
    assert celo.estimator == pes
    adamw = celo.meta_optimizer
    assert (adamw.name, adamw.learning_rate, adamw.weight_decay) == ("adamw", 3e-4, 1e-4)
    assert (adamw.normalize, adamw.clip_value, adamw.clip_norm) == ("none", None, None)
    second = load(["experiment=celo_phase2", "task.data.root=/data", "lopt.init_from=/theta"])
    assert replace(second, lopt=celo.lopt, run=celo.run) == celo
    assert (celo.lopt.arguments, second.lopt.arguments) == ({"phase": 1}, {"phase": 2})
    assert second.lopt.init_from == "/theta"
    velo = load(["meta_optimizer=adam"]).meta_optimizer
    assert (velo.name, velo.learning_rate, velo.clip_value, velo.normalize) == ("adam", 3e-4, 3.0, "unit")
    assert load(["lopt=small_fc_lopt"]).lopt == schema.LoptConfig("small_fc_lopt", {"hidden_size": 4})


def test_quick_has_two_workers_an_evaluator_and_data_that_needs_no_download() -> None:
    config = load(["experiment=quick"])
    assert (config.lopt, config.estimator.name) == (schema.LoptConfig("celo", {"phase": 1}), "pes")
    assert (config.cluster.address, config.cluster.num_workers, config.cluster.num_evaluators) == ("local", 2, 1)
    assert config.evaluation.tasks
    assert config.run.meta_steps >= config.evaluation.every  # at least one evaluation before the last


def test_sync_is_synchronous() -> None:
    assert load(["experiment=sync"]).run.mode == "sync"


def test_evaluation_tasks_are_held_out_and_have_a_loss_floor(default: Config) -> None:
    seen = [family.task["hidden"] for family in default.task.families.values()]
    assert len(default.evaluation.tasks) == 2
    for entry in default.evaluation.tasks.values():
        assert entry.task["hidden"] not in seen
        assert entry.task["shift"] > 0
        assert entry.task["noise"] > 0
    assert len(default.task.families) > 1


# --- loading ---


def test_every_field_can_be_set_from_the_command_line(default: Config) -> None:
    client = "{endpoint_url: 'http://h:1', region: r, anon: true}"
    config = load([f"storage.options={client}", f"task.data.options={client}"])
    paths = dict(leaves(to_dict(config)))
    tables = re.compile(r"(families|tasks|options|arguments)\.\w+(\.task)?(?:(?<=task)\.\w+)?")
    assert set(schema_paths(Config)) == {tables.sub(r"\1.*\2", path) for path in paths}
    plain = [f"'{value}'" if isinstance(value, str) else json.dumps(value) for value in paths.values()]
    written = [re.sub(r'"(\w+)": ', r"\1: ", value) for value in plain]  # Hydra's keys have no quotes
    assert load([f"{path}={value}" for path, value in zip(paths, written, strict=True)]) == config


def schema_paths(kind: Any, path: str = "") -> Iterator[str]:
    """Every leaf of the schema; ``*`` stands for a free name."""
    if is_dataclass(kind):
        for name, inner in get_type_hints(kind).items():
            yield from schema_paths(inner, f"{path}.{name}" if path else name)
    elif get_origin(kind) is dict:
        yield from schema_paths(get_args(kind)[1], f"{path}.*")
    else:
        yield path


def test_fields_families_and_locations_can_be_overridden(default: Config) -> None:
    config = load(
        [
            "task.families.digits_mlp32.task.hidden=[16,16]",
            "+task.families.mine={task: {kind: image_mlp, dataset: digits, hidden: [8]}, weight: 2}",
            "+task.families.yours.sample=resnet",
            "~task.families.digits_mlp16x16",
            "task.data.root=/path",
            "storage.root=s3://bucket/x",
            "storage.options.endpoint_url=http://127.0.0.1:8333",
            "evaluation.tasks.digits_mlp24_gelu.task.noise=0",
            "run={seed: 3, max_seconds: 5}",
        ]
    )
    mine = schema.FamilyConfig(task=ImageMlp(dataset="digits", hidden=(8,)).to_dict(), weight=2.0)
    yours = schema.FamilyConfig(sample="resnet")
    first = default.task.families["digits_mlp32"]
    changed = replace(first, task=first.task | {"hidden": [16, 16]})
    assert config.task.families == {"digits_mlp32": changed, "mine": mine, "yours": yours}
    assert config.task.data.root == "/path"
    assert config.storage.root == "s3://bucket/x"
    assert config.storage.options == {"endpoint_url": "http://127.0.0.1:8333"}
    assert config.evaluation.tasks["digits_mlp24_gelu"].task["noise"] == 0.0
    assert config.run == replace(default.run, seed=3, max_seconds=5.0)


def test_a_mapping_changes_a_section_and_replaces_a_table(default: Config) -> None:
    config = load(["task={families: {only: {sample: vit}}}", "task.families.only={weight: 7}"])
    assert config.task.families == {"only": schema.FamilyConfig(sample="vit", weight=7.0)}
    assert config.task.data == default.task.data


def test_an_argument_of_the_learned_optimizer_is_changed_or_added_by_its_name() -> None:
    overrides = [
        "lopt=star",
        "lopt.arguments.hidden_size=8",
        "lopt.arguments.weight_decay=0",
        "lopt.arguments.normalize_blackbox=false",
    ]
    before, after = (
        load(["lopt=star"]).lopt.arguments,
        load([*overrides, "lopt.arguments.nominal_grad_estimator=SGD"]).lopt.arguments,
    )
    changes = {"hidden_size": 8, "weight_decay": 0.0, "normalize_blackbox": False, "nominal_grad_estimator": "SGD"}
    assert after == before | changes
    assert type(after["weight_decay"]) is float
    assert load(["lopt=velo", "lopt.arguments={bank_size: 4}"]).lopt.arguments == {"bank_size": 4}


def test_an_option_of_the_storage_client_can_be_taken_back() -> None:
    assert load(["storage.options={anon: true, region: r}", "~storage.options.anon"]).storage.options == {"region": "r"}


def test_checkpoints_may_be_taken_at_any_interval_when_nothing_is_evaluated() -> None:
    assert load(["evaluation=none", "storage.every=30"]).storage.every == 30


def test_groups_come_before_fields_and_the_last_word_counts() -> None:
    config = load(
        ["run.seed=1", "run.meta_steps=7", "experiment=quick", "lopt=celo_phase1", "lopt=small_fc_lopt", "run.seed=2"]
    )
    assert (config.lopt.name, config.run.seed, config.run.meta_steps, config.run.name) == (
        "small_fc_lopt",
        2,
        7,
        "quick",
    )
    assert load(["experiment=quick", "experiment=null"]) == load([])


@pytest.mark.parametrize("name", ["2026", "1e3", "1e-3", "007", "1_000", "true", "nan", "a.b-c_d"])
def test_a_run_name_that_looks_like_a_number_stays_as_it_was_typed(name: str) -> None:
    config = load([f"run.name={name}"])
    assert config.run.name == name
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(("text", "value"), [("3", 3.0), ("1e-3", 0.001), ("'1e-3'", 0.001), (".5", 0.5)])
def test_numbers_are_read_as_floats(text: str, value: float) -> None:
    sigma = load([f"estimator.sigma={text}"]).estimator.sigma
    assert sigma == value
    assert type(sigma) is float


def test_two_loads_share_nothing() -> None:
    first, second = load([]), load([])
    assert first == second
    first.task.families["digits_mlp32"].task["hidden"].append(1)
    to_dict(second)["task"]["families"].clear()
    assert first != second
    assert second == load([])


def test_hydra_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load(["experiment=quick"])
    with pytest.raises(ConfigError):
        load(["lopt=cello"])
    assert not GlobalHydra.instance().is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_a_hydra_that_the_caller_set_up_is_kept(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "mine.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        load([])
        assert compose("mine") == {"x": 1}
    Singleton._instances.pop(GlobalHydra, None)


# --- round trip ---

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,20}", fullmatch=True)
positive = st.floats(min_value=1e-300, max_value=1e300)
counts = st.integers(1, 2**40)
text = st.text(min_size=1).filter(
    lambda value: value.strip() and "${" not in value and "@" not in value and value != "???"
)
statics = st.builds(
    ImageMlp,
    dataset=st.just("digits"),
    image_size=st.integers(10, 40),
    hidden=st.lists(st.integers(1, 9999), max_size=4).map(tuple),
    activation=st.sampled_from(["relu", "tanh", "dynamic"]),
    batch_size=counts,
    shift=st.integers(0, 9),
    noise=st.floats(0, 1e9),
)
families = st.builds(
    schema.FamilyConfig,
    task=statics.map(lambda static: static.to_dict()) | st.just("Conv_Cifar10_32x64x64"),
    weight=positive,
    augment=st.lists(st.sampled_from([{"kind": "bfloat16", "probability": 0.5}, {"kind": "velo"}]), max_size=2),
) | st.builds(schema.FamilyConfig, sample=st.sampled_from(["image_mlp", "rnn_lm"]), min_seconds=st.floats(0, 1))
star_arguments = st.fixed_dictionaries(
    {},
    optional={
        "hidden_size": st.integers(1, 2**20),
        "nominal_stepsize": st.floats(0, 1e9),
        "nominal_controller": st.booleans(),
        "nominal_grad_estimator": st.sampled_from(["SGD", "Adam"]),
    },
)
configs = st.builds(
    Config,
    task=st.builds(
        schema.TaskConfig,
        data=st.builds(schema.DataConfig, root=st.none() | text, cache=text),
        families=st.dictionaries(names, families, min_size=1, max_size=3),
        time=st.builds(
            schema.TimeConfig, max_seconds=st.just([1e-4, 1.0]), weights=st.just([0.5, 2.0]), scale=positive
        ),
        slots=st.none() | counts,
        resample=st.floats(0, 1),
    ),
    lopt=st.builds(schema.LoptConfig, name=st.just("celo"), arguments=st.just({"phase": 2}), init_from=text)
    | st.builds(schema.LoptConfig, name=st.just("star"), arguments=star_arguments, init_from=st.none() | text),
    run=st.builds(
        schema.RunConfig,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        seed=st.integers(0, 2**63 - 1),
        meta_steps=counts,
        max_seconds=st.none() | positive,
        log_dir=text,
    ),
    meta_optimizer=st.builds(
        schema.MetaOptimizerConfig, learning_rate=positive, clip_norm=st.none() | positive, beta1=st.floats(0, 0.99)
    ),
    storage=st.builds(
        schema.StorageConfig,
        root=text,
        options=st.fixed_dictionaries({}, optional={"endpoint_url": text, "region": text, "anon": st.booleans()}),
    ),
)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_yaml_gives_back_exactly_what_was_stored(config: Config) -> None:
    again = from_yaml(to_yaml(config))
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert repr(again) == repr(config)  # the types too: 1 == 1.0


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    sigma=positive,
    noise=st.floats(0, 1e6),
    hidden=st.lists(st.integers(1, 9999), max_size=4),
    family=names.filter(lambda name: name[0] != "-" and name not in ("digits_mlp32", "digits_mlp16x16")),
)
def test_overrides_arrive_exactly(seed: int, sigma: float, noise: float, hidden: list[int], family: str) -> None:
    config = load(
        [
            f"run.seed={seed}",
            f"estimator.sigma={sigma!r}",
            f"+task.families.{family}={{task: {{kind: image_mlp, hidden: {hidden}, noise: {noise!r}}}}}",
        ]
    )
    assert (config.run.seed, config.estimator.sigma) == (seed, sigma)
    expected = ImageMlp(hidden=tuple(hidden), noise=noise).to_dict()
    assert config.task.families[family] == schema.FamilyConfig(task=expected)
    assert from_yaml(to_yaml(config)) == config


def test_a_field_that_an_older_version_did_not_write_has_its_default(default: Config) -> None:
    tree = to_dict(default)
    del tree["run"], tree["cluster"]["control_port"]
    assert from_yaml(yaml.safe_dump(tree)) == default
