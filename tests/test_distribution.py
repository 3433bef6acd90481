"""What a run draws its tasks from: families by weight, thresholds, data that is missing, augmentations."""

from collections import Counter

import numpy as np
import pytest

import tasks
from configs.checks import ConfigError
from configs.schema import DataConfig, FamilyConfig, TaskConfig, TimeConfig
from deploy.config import load
from tasks import distribution
from tasks.augmentations.augmented import innermost
from tasks.families.draws import Pool, choice, log_integer, log_number
from tasks.families.image_mlp import ImageMlp

LIBRARY = tasks.Library(DataConfig())
MLP = {"kind": "image_mlp", "hidden": [4]}
EMBEDDED = {"images": ["digits"], "texts": ["pydoc/bytes"]}


def made(families, **settings):
    families = {name: FamilyConfig(**entry) for name, entry in families.items()}
    config = TaskConfig(families=families, **({"data": DataConfig()} | settings))
    return tasks.TaskDistribution(config, tasks.Library(config.data))


def draws(found, count=300, **arguments):
    rng = np.random.default_rng(0)
    return [found.draw(rng, **arguments) for _ in range(count)]


class Passing:
    """A time model that lets everything pass and remembers what it was asked."""

    asked: list

    def __init__(self, table):
        self.table = table

    def sample(self, rng, draw, family, max_seconds, tries):
        self.asked.append((family, max_seconds, tries))
        while True:
            try:
                return draw(rng)
            except ConfigError:
                continue


@pytest.fixture
def passing(monkeypatch):
    monkeypatch.setattr(Passing, "asked", [], raising=False)
    monkeypatch.setattr(distribution, "Rejection", Passing)
    return Passing


def test_a_fixed_family_is_always_the_same_task_under_its_own_name():
    found = draws(made({"mine": {"task": MLP}}), 5)
    assert set(found) == {tasks.Draw("mine", ImageMlp(hidden=(4,)))}


def test_a_task_may_be_given_by_its_published_name_or_by_the_familys():
    name = "ImageMLP_FashionMnist8_Relu32"
    assert tasks.resolve_task(name, "x", "f") == tasks.resolve_task(None, name, "f")
    with pytest.raises(ConfigError, match=r"^task\.families\.mine\.task = 'ImageMLP_Fashion.*did you mean"):
        made({"mine": {"task": "ImageMLP_FashionMnist8_Relu3"}})


def test_the_same_generator_gives_the_same_draws():
    found = made({"a": {"sample": "image_mlp"}, "b": {"sample": "rnn_lm"}}, **EMBEDDED, augment=[{"kind": "velo"}])
    assert draws(found, 20) == draws(found, 20)
    assert len(set(draws(found, 20))) > 15


def test_families_are_drawn_by_weight():
    found = made({"rare": {"task": MLP}, "often": {"task": MLP, "weight": 3.0}})
    counts = Counter(draw.family for draw in draws(found, 2000))
    assert found.probabilities() == {"rare": 0.25, "often": 0.75}
    assert counts["often"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_what_is_drawn_comes_from_the_configured_data_sets_and_ranges():
    found = made({"image_mlp": {"sample": "image_mlp"}, "rnn_lm": {"sample": "rnn_lm"}}, **EMBEDDED)
    assert {name for draw in draws(found) for name in tasks.datasets_of(draw.static)} == {"digits", "pydoc"}


TIME = TimeConfig(max_seconds=[1.0, 2.0, 4.0], weights=[2.0, 1.0, 1.0], scale=10.0, tries=7)


def test_a_threshold_is_drawn_first_and_decides_which_families_there_are(passing):
    found = made({"small": {"task": MLP}, "large": {"task": MLP, "min_seconds": 2.0}}, time=TIME)
    draws(found, 4000)
    counts = Counter((family, seconds) for family, seconds, _ in passing.asked)
    assert {tries for *_, tries in passing.asked} == {7}
    expected = {("small", 10.0): 0.5, ("small", 20.0): 0.125, ("large", 20.0): 0.125}
    expected |= {("small", 40.0): 0.125, ("large", 40.0): 0.125}
    assert {key: count / 4000 for key, count in counts.items()} == pytest.approx(expected, abs=0.03)
    assert found.probabilities() == pytest.approx({"small": 0.75, "large": 0.25})


def test_a_family_that_is_asked_for_gets_a_threshold_that_it_may_have(passing):
    found = made({"small": {"task": MLP}, "large": {"task": MLP, "min_seconds": 2.0}}, time=TIME)
    draws(found, 50, family="large")
    assert {seconds for _, seconds, _ in passing.asked} == {20.0, 40.0}


def test_the_curriculum_scales_the_thresholds(passing):
    draws(made({"small": {"task": MLP}}, time=TIME), 30, size=0.5)
    assert {seconds for _, seconds, _ in passing.asked} == {5.0, 10.0, 20.0}


def test_augmentations_of_the_family_come_before_those_of_the_run():
    inner = {"kind": "reparam", "level": "global", "low": 0.5, "high": 2.0}
    found = made({"mine": {"task": MLP, "augment": [inner]}}, augment=[{"kind": "bfloat16"}])
    static = draws(found, 1)[0].static
    assert (static.kind, static.task.kind, static.task.task) == ("bfloat16", "reparam", ImageMlp(hidden=(4,)))


def test_an_impossible_combination_is_drawn_again_and_not_for_ever(monkeypatch):
    patient = made({"vit": {"sample": "vit"}}, **EMBEDDED)
    assert len(draws(patient, 50)) == 50, "patches larger than the image are among the draws"

    def never(rng, pool):
        raise ConfigError("patch", 16, "at most the image")

    monkeypatch.setitem(tasks.FAMILIES, "vit", tasks.FAMILIES["vit"]._replace(draw=never))
    with pytest.raises(ConfigError, match="patch = 16"):
        draws(made({"vit": {"sample": "vit"}}, **EMBEDDED, time=TimeConfig(tries=3)), 1)


# ---- data that is not there


def test_missing_data_is_an_error_that_names_the_data_set_and_the_way_out():
    with pytest.raises(tasks.DataError, match=r"mnist.*data\.missing=skip"):
        made({"image_mlp": {"sample": "image_mlp"}})
    with pytest.raises(tasks.DataError, match=r"cifar10.*data\.missing=skip"):
        made({"mine": {"task": MLP | {"dataset": "cifar10"}}})


def test_missing_data_falls_out_with_a_warning_that_names_it():
    families = {"image_mlp": {"sample": "image_mlp"}, "rnn_lm": {"sample": "rnn_lm"}, "fixed": {"task": MLP}}
    families["gone"] = {"task": MLP | {"dataset": "svhn"}}
    found = made(families, images=["digits", "mnist"], data=DataConfig(missing="skip"))
    assert found.families == ("image_mlp", "fixed")
    warnings = "\n".join(found.warnings)
    for name in ("mnist", "lm1b", "wikipedia", "svhn", "rnn_lm", "gone"):
        assert name in warnings
    assert len(found.warnings) == len(set(found.warnings))
    assert {draw.static.dataset for draw in draws(found, 100)} == {"digits"}
    assert sum(found.probabilities().values()) == pytest.approx(1)


def test_when_nothing_is_left_that_is_an_error():
    with pytest.raises(tasks.DataError, match=r"no task family is left.*lm1b"):
        made({"rnn_lm": {"sample": "rnn_lm"}}, data=DataConfig(missing="skip"))


def test_data_inside_augmentations_and_learned_optimizers_is_found():
    static = tasks.static_from_dict(
        {"kind": "bfloat16", "task": {"kind": "lopt_training", "optimizer": "adam", "inner": MLP}}
    )
    assert tasks.datasets_of(static) == ["digits"]


# ---- the shipped distributions


@pytest.mark.parametrize("option", ["velo", "velo_phase2", "velo_embedded"])
def test_the_shipped_mixtures_are_the_papers(option, passing):
    config = load([f"task={option}", "task.images=[digits]", "task.texts=[pydoc/bytes]"]).task
    assert set(config.families) == set(tasks.FAMILIES)
    least = {name: family.min_seconds for name, family in config.families.items() if family.min_seconds}
    published = dict.fromkeys(("rnn_lm", "transformer_lm", "resnet", "lopt_training"), 1e-4)
    slower_on_a_cpu = {"vit": 1e-4, "resnet": 4e-4, "transformer_lm": 1e-3}
    assert least == published | (slower_on_a_cpu if option == "velo_embedded" else {})
    assert config.augment == [{"kind": "velo"}]
    found = tasks.TaskDistribution(config, LIBRARY)
    shares = found.probabilities()
    if option == "velo_phase2":
        assert list(shares.values()) == pytest.approx([1 / 9] * 9), "every threshold of phase two admits all nine"
    elif option == "velo":
        light = 0.65 / 1.1 / 5 + 0.45 / 1.1 / 9  # C.5; the paper's probabilities sum to 1.1
        assert shares["vit"] == pytest.approx(light)
        assert shares["resnet"] == pytest.approx(0.45 / 1.1 / 9)
    assert {draw.family for draw in draws(found, 200)} == set(tasks.FAMILIES)


# ---- the distributions of numbers


def test_log_integers_include_both_ends_and_are_log_uniform():
    rng = np.random.default_rng(0)
    drawn = np.array([log_integer(rng, 4, 512) for _ in range(20000)])
    assert (drawn.min(), drawn.max()) == (4, 512)
    assert np.mean(drawn < 46) == pytest.approx(np.log(46 / 4) / np.log(513 / 4), abs=0.015)
    assert {log_integer(rng, 3, 3) for _ in range(5)} == {3}
    numbers = [log_number(rng, 1e-3, 1e-1) for _ in range(4000)]
    assert np.mean(np.array(numbers) < 1e-2) == pytest.approx(0.5, abs=0.03)
    assert {choice(rng, "ab") for _ in range(50)} == {"a", "b"}


def test_the_embedded_mixture_draws_what_its_time_model_lets_pass():
    config = load(["task=velo_embedded"]).task
    found = tasks.TaskDistribution(config, LIBRARY)
    thresholds, sample = [], found._rejection.sample
    found._rejection.sample = lambda *args: thresholds.append(args[3]) or sample(*args)
    drawn = draws(found, 300)
    counts = Counter(draw.family for draw in drawn)
    shares = found.probabilities()
    for family, share in shares.items():
        assert abs(counts[family] - 300 * share) < 4 * (300 * share) ** 0.5 + 1, (family, counts[family], 300 * share)
    model = found._rejection.model
    plain = [innermost(draw.static) for draw in drawn]
    prediction = model.predict(plain)
    assert prediction.runs.all()
    assert len(set(thresholds)) > 1, "thresholds differ from draw to draw"
    assert (prediction.seconds <= np.array(thresholds)).all(), "each draw is held to its own threshold"


def test_the_pool_of_the_paper():
    assert set(Pool().images) == {"mnist", "fashion_mnist", "cifar10", "cifar100", "imagenet16"}
    assert set(Pool().texts) == {
        (corpus, vocabulary) for corpus in ("lm1b", "wikipedia") for vocabulary in ("bytes", "32k")
    }
