"""Bad configurations: every one is refused, in one line that names the field, the value and what was expected."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import yaml

import deploy.config
from configs.checks import ConfigError
from configs.schema import Config
from deploy.config import from_yaml, load, to_dict

MLP32 = "task.families.digits_mlp32.task"
COMPOSE = cache(deploy.config._compose)


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra takes 0.1 s for the same groups each time; the tests of a hundred bad fields need it once."""
    monkeypatch.setattr(deploy.config, "_compose", lambda selections: deepcopy(COMPOSE(tuple(selections))))


@pytest.fixture(scope="module")
def default() -> Config:
    """Small: one family, one evaluation task."""
    return load(["~task.families.digits_mlp16x16", "~evaluation.tasks.digits_mlp24_gelu"])


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted path of a plain tree that holds no further section, with its value."""
    if isinstance(node, dict) and node:
        for name, item in node.items():
            yield from leaves(item, f"{path}.{name}" if path else name)
    else:
        yield path, node


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(caught.value.field)
    return message


def planted(config: Config, path: str, value: object) -> str:
    """The YAML of ``config`` with the value at ``path`` exchanged."""
    tree = to_dict(config)
    node = tree
    *parents, last = path.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    return yaml.safe_dump(tree)


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("lopt=cello", ["lopt = 'cello'", "celo_phase1, celo_phase2, fromage", "did you mean 'celo"]),
        ("experiment=qiuck", ["experiment = 'qiuck'", "sync", "did you mean 'quick'?"]),
        ("lopt=null", ["lopt = None", "one of adabelief"]),
        ("lpot=celo_phase1", ["lpot = 'celo_phase1'", "task, lopt, run", "did you mean 'lopt'?"]),
        ("estimator.widnow=3", ["estimator.widnow = 3", "sigma, window", "did you mean 'window'?"]),
        ("+estimator.widnow=3", ["estimator.widnow = 3", "did you mean 'window'?"]),
        ("estimator={widnow: 3}", ["estimator.widnow = 3", "did you mean 'window'?"]),
        ("+foo.bar=1", ["foo.bar = 1", "a field of the configuration: task, lopt"]),
        ("hydra.run.dir=x", ["hydra.run.dir = 'x'", "a field of the configuration"]),
        ("run.meta_steps=many", ["run.meta_steps = 'many'", "a whole number"]),
        ("run.meta_steps=1e5", ["run.meta_steps = 100000.0", "a whole number, written 100000"]),
        ("run.meta_steps=3.5", ["run.meta_steps = 3.5", "a whole number"]),
        ("run.meta_steps='3'", ["run.meta_steps = '3'", "a whole number"]),
        ("run.meta_steps=true", ["run.meta_steps = True", "a whole number"]),
        ("run.meta_steps=null", ["run.meta_steps = None", "a whole number"]),
        ("run.meta_steps=0", ["run.meta_steps = 0", "a number >= 1"]),
        ("run.max_seconds=soon", ["run.max_seconds = 'soon'", "a number"]),
        ("run.name=null", ["run.name = None", "text"]),
        ("run.name=[a]", ["run.name = ['a']", "text"]),
        ("run.name=-x", ["run.name = '-x'", "letters, digits"]),
        ("run.seed=9223372036854775808", ["run.seed = 9223372036854775808", "2**63 - 1"]),
        ("run.mode=snyc", ["run.mode = 'snyc'", "async, sync", "did you mean 'sync'?"]),
        ("estimator.sigma=nan", ["estimator.sigma = nan", "a finite number"]),
        ("estimator.sigma=inf", ["estimator.sigma = inf", "a finite number"]),
        ("estimator.sigma=-inf", ["estimator.sigma = -inf", "a finite number"]),
        ("estimator.sigma='1e999'", ["estimator.sigma = inf", "a finite number"]),
        ("estimator.sigma=1" + "0" * 400, ["estimator.sigma = inf", "a finite number"]),
        ("estimator.window=1" + "0" * 4400, ["estimator.window", "one value"]),
        ("estimator.sigma=true", ["estimator.sigma = True", "a number"]),
        ("estimator.sigma=1e-3x", ["estimator.sigma = '1e-3x'", "a number"]),
        ("estimator.sigma=0", ["estimator.sigma = 0.0", "a number > 0"]),
        ("estimator.window=1,2", ["estimator.window = '1,2'", "sweeps are not run"]),
        ("estimator.window=range(1,3)", ["estimator.window = 'range(1,3)'", "sweeps are not run"]),
        (f"{MLP32}.batch_size=-1", [f"{MLP32}.batch_size = -1", "a number >= 1"]),
        (f"{MLP32}.bacth_size=1", [f"{MLP32}.bacth_size = 1", "a field of image_mlp", "'batch_size'?"]),
        (f"{MLP32}.kind=image_mpl", [f"{MLP32}.kind = 'image_mpl'", "'image_mlp'?"]),
        (f"{MLP32}.hidden=8", [f"{MLP32}.hidden = 8", "a list"]),
        (f"{MLP32}.hidden=[8,x]", [f"{MLP32}.hidden[1] = 'x'", "a whole number"]),
        (f"{MLP32}.hidden=[0]", [f"{MLP32}.hidden[0] = 0", "a number >= 1"]),
        (f"{MLP32}.hidden.0=8", [f"{MLP32}.hidden = [32]", "a plain value"]),
        (f"{MLP32}.noise=${{x}}", [f"{MLP32}.noise", "interpolations are not resolved"]),
        ("task.augment=[{kind: reprm}]", ["task.augment[0].kind = 'reprm'", "'reparam'?"]),
        ("task.augment=[{kind: reparam, levle: x}]", ["task.augment[0].levle", "'level'?"]),
        ("task.augment=[{kind: reparam, level: tenser, low: 1, high: 2}]", ["task.augment[0].level", "'tensor'?"]),
        ("task.augment=[{kind: bfloat16, probability: 2}]", ["task.augment[0].probability = 2"]),
        ("task.augment=5", ["task.augment = 5", "a list"]),
        (
            "task.families.digits_mlp32.task=ImageMLP_Fashion",
            ["digits_mlp32.task = 'ImageMLP_Fashion'", "did you mean"],
        ),
        ("task.families.digits_mlp32.task=5", ["digits_mlp32.task = 5", "a mapping with kind"]),
        ("task.families.digits_mlp32.sample=vit", ["digits_mlp32.sample = 'vit'", "one or the other"]),
        ("+task.families.mine={sample: viit}", ["task.families.mine.sample = 'viit'", "'vit'?"]),
        ("+task.families.mine={}", ["task.families.mine.task = 'mine'"]),
        ("task.texts=[pydoc]", ["task.texts = 'pydoc'", "corpus/vocabulary"]),
        ("task.resample=1.5", ["task.resample = 1.5", "a probability"]),
        ("task.time.max_seconds=[1e-4]", ["task.time.weights = []", "1 numbers"]),
        ("task.size_schedule=[{version: 0, factor: 2}]", ["task.size_schedule", "time.max_seconds"]),
        ("task.data.missing=ignore", ["task.data.missing = 'ignore'", "error, skip"]),
        (
            "estimator.horizon_schedule=[{version: 5}, {version: 5}]",
            ["estimator.horizon_schedule = [5, 5]", "versions that ascend"],
        ),
        ("estimator.horizon_schedule=[{low: 9, high: 3}]", ["estimator.horizon_schedule[0].high = 3", ">= 9"]),
        ("task.families.digits_mlp3.weight=1", ["task.families.digits_mlp3.weight = 1", "'digits_mlp32'?"]),
        ("task.families.mine={sample: vit}", ["task.families.mine", "+ adds one"]),
        ("+task.families.digits_mlp32={sample: vit}", ["task.families.digits_mlp32", "without +"]),
        ("+task.families.mine={smaple: vit}", ["task.families.mine.smaple = 'vit'", "did you mean 'sample'?"]),
        ("+task.families.mine=8", ["task.families.mine = 8", "a section with task, sample"]),
        ("+task.families.0x={}", ["override = '+task.families.0x={}'", "key=value"]),
        ("task.families={1: {}}", ["task.families = 1", "text"]),
        ("task.families={}", ["task.families = {}", "at least one task family"]),
        ("task.families=null", ["task.families = None", "a table of named entries"]),
        ("~task.families.digits_mlp3", ["task.families.digits_mlp3", "'digits_mlp32'?"]),
        ("~task.families.digits_mlp32=3", ["~task.families.digits_mlp32=3", "~table.name"]),
        ("~task.families", ["~task.families", "a field cannot be removed"]),
        ("~storage.options.region", ["storage.options.region", "a name that storage.options has"]),
        ("~run.name", ["~run.name", "a field cannot be removed"]),
        ("~lopt", ["~lopt", "neither added nor removed"]),
        ("+lopt=celo_phase1", ["+lopt=celo_phase1", "neither added nor removed"]),
        ("+run.name=x", ["+run.name=x", "without +"]),
        ("++run.name=x", ["++run.name=x", "key=value"]),
        ("task@other=digits", ["task@other=digits", "key=value"]),
        ("task/digits=x", ["task/digits = 'x'", "a field of the configuration"]),
        ("run=5", ["run = 5", "a section with name, seed"]),
        ("run.name.x=3", ["run.name.x = 3", "nothing below run.name, which is text"]),
        ("run.name", ["'run.name'", "key=value"]),
        ("", ["''", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("run.name=a(b", ["run.name = 'a(b'", "run.name='\"a(b\"'"]),
        ("run.name=${oc.env:HOME}", ["run.name = '${oc.env:HOME}'", "interpolations are not resolved"]),
        ("run.name=???", ["run.name = '???'", "text"]),
        ("evaluation.suite='../x'", ["evaluation.suite = '../x'", "letters"]),
        ("+evaluation.tasks.mine={num_steps: 3}", ["evaluation.tasks.mine.num_steps = 3", "a number >= 10"]),
        ("evaluation.tasks.digits_mlp24_gelu.task.dataset=svnh", ["digits_mlp24_gelu.task", "svnh", "'svhn'?"]),
        ("evaluation.tasks.digits_mlp24_gelu.task=null", ["evaluation.tasks.digits_mlp24_gelu.task"]),
        ("storage.every=30", ["evaluation.every = 100", "storage.every = 30"]),
        ("storage.root=", ["storage.root = ''", "a path or URL"]),
        ("run.mode=sync", ["meta_optimizer.meta_batch = 4", "cluster.num_workers = 2"]),
        ("cluster.address=lcoal", ["cluster.address = 'lcoal'", "host:port", "did you mean 'local'?"]),
        ("cluster.control_port=65536", ["cluster.control_port = 65536", "0 to 65535"]),
        ("lopt.name=cello", ["lopt.name = 'cello'", "one of small_fc_lopt, mulo", "did you mean 'celo'?"]),
        ("lopt.name=star", ["lopt.arguments.phase = 1", "an argument of star: hidden_size"]),
        ("lopt.phase=2", ["lopt.phase = 2", "a field of lopt: name, arguments, init_from"]),
        ("lopt.arguments.phase=2", ["lopt.init_from = None", "a phase 1 checkpoint"]),
        ("lopt.arguments.phase=3", ["lopt.arguments.phase = 3", "1 (update rule)"]),
        ("lopt.arguments.phase='1'", ["lopt.arguments.phase = '1'", "a whole number"]),
        ("lopt.arguments.phase=true", ["lopt.arguments.phase = True", "a whole number"]),
        ("lopt.arguments.phase=null", ["lopt.arguments.phase = None", "a whole number"]),
        ("lopt.arguments.phase=[1]", ["lopt.arguments.phase = [1]", "a whole number"]),
        ("lopt.arguments.phsae=1", ["lopt.arguments.phsae = 1", "an argument of celo: phase", "did you mean 'phase'?"]),
        ("~lopt.arguments.phase", ["lopt.arguments.phase = None", "a whole number, because celo has no default"]),
        ("lopt={name: velo, arguments: {lstm_size: 0}}", ["lopt.arguments.lstm_size = 0", "a number >= 1"]),
        ("lopt={name: velo, arguments: {compat: 1}}", ["lopt.arguments.compat = 1", "true or false"]),
        ("lopt={name: mulo, arguments: {step_mult: -1}}", ["lopt.arguments.step_mult = -1.0", "a number > 0"]),
        ("lopt={name: adam, arguments: {log_spcae: true}}", ["lopt.arguments.log_spcae = True", "'log_space'?"]),
        ("lopt={name: celo_adam, arguments: {phase: 1}}", ["lopt.arguments.phase = 1", "celo_adam: (none)"]),
        ("meta_optimizer.beta2=1", ["meta_optimizer.beta2 = 1.0", "[0, 1)"]),
    ],
)
def test_bad_input_names_field_value_and_expectation(override: str, parts: list[str]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message


def test_a_section_broken_by_an_earlier_override_is_still_an_error_for_the_user() -> None:
    assert "run = 5" in refused("run=5", "run.name=x")
    assert "task.data = 5" in refused("task={data: 5}", "task.data.root=/x")


@pytest.mark.usefixtures("composed_once")
@pytest.mark.parametrize(
    "override",
    [
        "storage.options.secret=hunter2",
        "storage.options.key=hunter2",
        "+storage.options.token=hunter2",
        "storage.options={client_kwargs: {aws_secret_access_key: hunter2}}",
        "storage={options: {key: hunter2}}",
        "storage.options=hunter2",
        "storage.options.anon=hunter2",
        "storage.options.secret=hunter2(",
        "storage.options.secret.x=hunter2",
        "storage.options.secret=hunter2,3",
        "storage.secret_access_key=hunter2",
        "aws_secret=hunter2",
        "++storage.options.secret=hunter2",
        "~storage.options.secret=hunter2",
        "storage.root=s3://key:hunter2@bucket/x",
        "storage.options.endpoint_url=http://key:hunter2@host",
        "task.data.root=s3://key:hunter2@bucket/x",
        "lopt.init_from=https://key:hunter2@host/x",
        "run.log_dir=s3://key:hunter2@bucket/x",
    ],
)
def test_secrets_are_refused_and_never_repeated(override: str) -> None:
    assert "hunter2" not in refused(override)


def test_a_refused_client_option_is_named_with_the_allowed_ones() -> None:
    message = refused("storage.options.endpoint=http://h")
    for part in ("storage.options.endpoint", "endpoint_url, region, anon", "did you mean 'endpoint_url'?"):
        assert part in message


@pytest.mark.parametrize("value", [float("nan"), {"no": 1}, [[1]], "${x}"], ids=repr)
def test_no_field_accepts_what_has_no_meaning(default: Config, value: object) -> None:
    full = replace(default, storage=replace(default.storage, options={"endpoint_url": "http://h", "anon": True}))
    for path, _ in leaves(to_dict(full)):
        with pytest.raises(ConfigError) as caught:
            from_yaml(planted(full, path, value))
        assert caught.value.field.startswith(path)


def test_null_is_refused_where_the_schema_does_not_allow_it(default: Config) -> None:
    optional = {"task.data.root", "lopt.init_from", "run.max_seconds", "task.slots"}
    optional |= {"task.families.digits_mlp32.sample", f"{MLP32}.num_classes"}
    optional |= {"evaluation.tasks.digits_mlp48x48_tanh.task.num_classes"}
    optional |= {"meta_optimizer.clip_value", "meta_optimizer.clip_norm"}
    optional |= {"estimator.noise_period", "estimator.clip_loss_diff", "estimator.sign_delta_loss"}
    for path, _ in leaves(to_dict(default)):
        if path not in optional:
            with pytest.raises(ConfigError, match=re.escape(path)):
                from_yaml(planted(default, path, None))


def test_an_unknown_key_is_refused_in_every_section_of_a_stored_configuration(default: Config) -> None:
    sections = {path.rpartition(".")[0] for path, _ in leaves(to_dict(default))}
    assert {"run", "task.data", MLP32, "task.time", "lopt.arguments"} <= sections
    for section in sections:
        with pytest.raises(ConfigError, match=re.escape(f"{section}.unheard_of = 1")):
            from_yaml(planted(default, f"{section}.unheard_of", 1))


@pytest.mark.parametrize("name", ["../x", "a b", "0x", "", "a.b", "x" * 65])
def test_names_that_become_labels_and_files_are_plain(default: Config, name: str) -> None:
    tree = to_dict(default)
    tree["task"]["families"][name] = {}
    with pytest.raises(ConfigError, match=r"^task\.families = .*letters, digits"):
        from_yaml(yaml.safe_dump(tree))
    tree = to_dict(default)
    tree["evaluation"]["tasks"][name] = {}
    with pytest.raises(ConfigError, match=r"^evaluation\.tasks = .*letters, digits"):
        from_yaml(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "config = None: expected a section with task"),
        ("hello", "config = 'hello': expected a section"),
        ("[1]", "config = [1]: expected a section"),
        ("a: [", "config = 'line 1': expected YAML"),
        ("task: {}\nlopt: {}\ntask: {}\n", "config = 'line 3': expected YAML of plain values (a key appears twice"),
        ("? [a]\n: 3\n", "config = 'line 1': expected YAML"),
        ("task: {}\n--- {}\n", "config = 'line 2': expected YAML"),
        ("a: 2020-99-99", "config = 'text': expected YAML"),
        ("\x00", "config = 'text': expected YAML"),
        ("a: !!python/object/apply:os.system ['exit 1']", "config = 'line 1': expected YAML"),
        ("lopt: {name: celo}", "task = None: expected a section with data, families"),
        ("task: {families: {a: {}}}", "lopt = None: expected a section with name, arguments, init_from"),
    ],
)
def test_a_damaged_stored_configuration_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        from_yaml(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_schema_by_itself_refuses_what_is_not_a_finite_number(default: Config, value: float) -> None:
    """The rooms build its classes without the loader."""
    for section in (default.estimator, default.meta_optimizer, default.cluster, default.evaluation):
        for field in fields(section):
            if field.type in ("float", "float | None"):
                with pytest.raises(ConfigError, match=field.name):
                    replace(section, **{field.name: value})


def test_a_config_error_says_the_same_after_a_process_boundary() -> None:
    with pytest.raises(ConfigError) as caught:
        load(["estimator.sigma=0"])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.field) == (str(caught.value), "estimator.sigma")


def test_configurations_cannot_be_changed_after_the_checks(default: Config) -> None:
    for field in fields(default):
        with pytest.raises(AttributeError):
            setattr(default, field.name, None)
