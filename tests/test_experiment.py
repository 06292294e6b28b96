from __future__ import annotations

import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from visiontuner.errors import ExperimentError
from visiontuner.experiment.reading import apply_overrides
from visiontuner.experiment.schema import SEARCHABLE, Experiment, Range, Values, parse_duration


def mistake(raw, *overrides):
    """The message a user sees, which must be one line."""
    with pytest.raises(ExperimentError) as caught:
        Experiment.parse(raw, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def search(**keys):
    return {"search": keys}


def space(**domains):
    return search(space=domains)


# What is taken when nothing is said.


def test_without_a_word_the_default_experiment_is_taken():
    experiment = Experiment.parse({})
    assert experiment == Experiment(name="digits")
    assert experiment.mode == "max"


@pytest.mark.parametrize("content", ["", " \n", "# nothing yet\n", "---\n", "~", "{}"])
def test_an_empty_file_is_a_mistake_and_not_the_quickstart(tmp_path, content):
    file = tmp_path / "empty.yaml"
    file.write_text(content)
    with pytest.raises(ExperimentError, match=r"empty\.yaml is empty: .*quickstart"):
        Experiment.load(file)


def test_section_with_every_line_commented_out_is_the_default(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("training:\n  # epochs: 5\nsearch:\n")
    assert Experiment.load(file) == Experiment(name="digits")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos/labels.csv", "photos"),
        ("s3://bucket/dogs/train.PARQUET", "dogs"),
        ("photos/", "photos"),
        ("/data/My Photos", "My Photos"),
        ("https://example.org/a/dogImages.zip", "dogImages"),
        ("https://example.org/flower_photos.tar.gz", "flower_photos"),
        ("https://example.org/set.zip?X-Signature=secret#top", "set"),
        ("s3://bucket/", "bucket"),
        ("https://example.org/%E7%8C%AB.zip", "猫"),
        (".", "my photos"),
        ("..", "hundred 1"),
        ("../", "hundred 1"),
        ("Bilder: Hunde/Größe", "Größe"),
        ("Gro\u0308ße", "Größe"),  # as macOS writes it
        ("写真/犬と猫", "犬と猫"),
        ("कुत्ता", "कुत्ता"),
        ("../hundred 1/Собаки.tar.gz", "Собаки"),
    ],
)
def test_default_name_is_the_data_folders_name(source, name, tmp_path, monkeypatch):
    (tmp_path / "hundred 1" / "my photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "hundred 1" / "my photos")
    assert Experiment.parse({"data": {"source": source}}).name == name


@pytest.mark.parametrize(
    ("one", "other", "begins"),
    [
        ("🐶", "🐱", "images-"),
        ("dogs 🐶", "dogs 🐱", "dogs-"),
        ("cats&dogs", "cats+dogs", "cats-dogs-"),
        ("_photos", "photos", "photos"),
        ("/", "//!", "images-"),
        ("x" * 120, "x" * 121, "x" * 93 + "-"),
        ("犬" * 120, "犬" * 121, "犬" * 64 + "-"),
    ],
)
def test_two_folders_never_share_a_default_name(one, other, begins):
    names = [Experiment.parse({"data": {"source": source}}).name for source in (one, other)]
    assert len(set(names)) == 2
    for name in names:
        assert name.startswith(begins)
        assert Experiment.parse({"name": name}).name == name  # as a resumed search reads it
        assert len(f"{name}-train-20261130-120000".encode()) <= 255


def test_loss_is_minimised():
    assert Experiment.parse({"objective": "validation_loss"}).mode == "min"


def test_experiment_does_not_change():
    experiment = Experiment(name="a")
    with pytest.raises(ValueError, match="frozen"):
        experiment.training.epochs = 3  # type: ignore[misc]


# Rules.


@pytest.mark.parametrize("learning_rate", [0.0, -1e-3, float("nan")])
def test_experiment_rejects_learning_rate(learning_rate):
    with pytest.raises(ExperimentError, match="learning_rate must be > 0"):
        Experiment.parse({"training": {"learning_rate": learning_rate}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"training": {"learning_rate": math.inf}}, "training.learning_rate must be a finite"),
        ({"training": {"learning_rate": "fast"}}, "must be a number, got 'fast'"),
        ({"training": {"epochs": 0}}, "training.epochs must be >= 1, got 0"),
        ({"training": {"epochs": 2.5}}, "training.epochs must be a whole number, got 2.5"),
        ({"training": {"epochs": None}}, "training.epochs must be a whole number, got None"),
        ({"training": {"batch_size": 0}}, "training.batch_size must be >= 1"),
        ({"training": {"optimizer": "lion"}}, "one of 'adamw', 'adam' or 'sgd', got 'lion'"),
        ({"training": {"weight_decay": -1}}, "training.weight_decay must be >= 0"),
        ({"training": {"momentum": 1}}, "training.momentum must be < 1"),
        ({"training": {"dropout": 1.0}}, "training.dropout must be < 1"),
        ({"training": {"label_smoothing": -0.1}}, "training.label_smoothing must be >= 0"),
        ({"training": {"warmup_fraction": math.nan}}, "training.warmup_fraction"),
        ({"training": {"precision": "fp16"}}, "one of 'fp32' or 'bf16'"),
        ({"training": {"early_stop": 0}}, "training.early_stop must be >= 1"),
        ({"training": 5}, "training must hold keys and values, got 5"),
        ({"data": "photos"}, "data must hold keys and values, got 'photos'"),
        ({"data": {"source": ""}}, "data.source must not be empty"),
        ({"data": {"source": 7}}, "data.source must be text"),
        ({"data": {"sha256": "abc"}}, "data.sha256 must be 64 hexadecimal digits"),
        ({"data": {"limit_per_class": 0}}, "data.limit_per_class must be >= 1"),
        ({"data": {"on_bad_image": "ignore"}}, "one of 'skip' or 'fail'"),
        ({"model": {"image_size": 15}}, "model.image_size must be >= 16"),
        ({"model": {"train": "everything"}}, "model.train must be one of"),
        ({"model": {"views": 2}}, "model.views must be one of"),
        ({"model": {"views": "flip", "train": "all"}}, "model.train is all"),
        (
            {"model": {"views": "flip"}, "training": {"augmentation": "light"}},
            "with training.augmentation none are kept",
        ),
        ({"package": "int4"}, "package must be one of"),
        ({"name": "a/b"}, "name must start with a letter or digit"),
        ({"name": "x" * 101}, "up to 100"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"seed": 2**31}, "seed must be < 2147483648"),
        ({"objective": "accuracy"}, "'validation_macro_f1'"),
        (search(trials=0), "search.trials must be >= 1"),
        (search(cpus_per_trial=0), "search.cpus_per_trial must be > 0"),
        (search(gpus_per_trial=-1), "search.gpus_per_trial must be >= 0"),
        (search(algorithm="hyperband"), "one of 'random', 'optuna' or 'grid'"),
    ],
)
def test_value_breaks_a_rule(raw, message):
    assert message in mistake(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {"training": {"epochs": True}},
        {"training": {"learning_rate": True}},
        search(scheduler=False),
        search(time_budget=True),
        space(batch_size={"values": [True, 32]}),
        search(first=[{"learning_rate": 0.01, "batch_size": True}]),
    ],
)
def test_boolean_is_no_number_and_no_word(raw):
    assert "True" in mistake(raw) or "got true" in mistake(raw) or "got false" in mistake(raw)


def test_all_mistakes_are_told_at_once():
    message = mistake({"seed": -1, "training": {"epochs": 0}, "sarch": {}})
    assert "seed must be" in message
    assert "training.epochs must be" in message
    assert "did you mean search?" in message


# Typos.


@pytest.mark.parametrize(
    ("raw", "hint"),
    [
        ({"trainng": {}}, "unknown key trainng; did you mean training?"),
        ({"training": {"epoch": 3}}, "unknown key training.epoch; did you mean epochs?"),
        ({"epochs": 3}, "unknown key epochs; did you mean training.epochs?"),
        ({"training": {"backbone": "x"}}, "did you mean model.backbone?"),
        ({"training": {"lr": 3}}, "unknown key training.lr; known: epochs, learning_rate"),
        ({"data": {"sorce": "x"}}, "did you mean source?"),
        (space(learning_rat={"low": 1, "high": 2}), "did you mean learning_rate?"),
        (space(colour={"low": 1, "high": 2}), "known: learning_rate, batch_size"),
        (space(dropout={"low": 0, "hih": 0.5}), "did you mean high?"),
        (space(dropout={"low": 0, "high": 0.5, "scale": "lg"}), "'linear' or 'log'"),
        (search(first=[{"batchsize": 3}]), "did you mean batch_size?"),
        ({1: 2}, "unknown key 1; known: name"),
    ],
)
def test_typo_names_the_nearest_known_key(raw, hint):
    assert hint in mistake(raw)


def test_key_written_twice_is_a_mistake(tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text("training:\n  epochs: 5\nseed: 1\ntraining:\n  dropout: 0.1\n")
    with pytest.raises(ExperimentError, match=r"'training' is there twice.*line 4"):
        Experiment.load(file)


# Numbers that YAML 1.1 reads in its own way.


def load(tmp_path, content: str) -> Experiment:
    file = tmp_path / "experiment.yaml"
    file.write_text(content)
    return Experiment.load(file)


@pytest.mark.parametrize(
    ("line", "meaning"),
    [
        ("search: {time_budget: 1:30}", "1:30 is 90 to YAML 1.1"),
        ("search: {time_budget: 1:30.5}", "1:30.5 is 90.5 to YAML 1.1"),
        ("training: {batch_size: 010}", "010 is 8 to YAML 1.1"),
        ("training: {batch_size: 08}", "08 is unclear to YAML 1.1"),
        ("training: {batch_size: 0x10}", "0x10 is 16 to YAML 1.1"),
        ("training: {batch_size: 0b10}", "0b10 is 2 to YAML 1.1"),
        ("training: {batch_size: 1_000}", "1_000 is 1000 to YAML 1.1"),
        ("training: {learning_rate: 0.00_1}", "0.00_1 is 0.001 to YAML 1.1"),
        ("search: {space: {batch_size: {values: [32, 064]}}}", "064 is 52 to YAML 1.1"),
        ("data: {source: 010}", "010 is 8 to YAML 1.1"),
        ("name: 2024_05", "2024_05 is 202405 to YAML 1.1"),
        ("name: 12:30", "12:30 is 750 to YAML 1.1"),
    ],
)
def test_number_that_only_yaml_reads_so_is_a_mistake(tmp_path, line, meaning):
    with pytest.raises(ExperimentError) as caught:
        load(tmp_path, f"# a comment\n{line}\n")
    assert f"experiment.yaml, line 2: {meaning}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_override_with_a_number_that_only_yaml_reads_so_is_a_mistake():
    assert "1:30 is 90 to YAML 1.1" in mistake({}, "search.time_budget=1:30")
    assert "010 is 8 to YAML 1.1" in mistake({}, "training.batch_size=010")
    assert "is not YAML" in mistake({}, "search.space={dropout: {values: [0]}, dropout: {}}")


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("training: {learning_rate: 1e-3}", "training.learning_rate", 0.001),
        ("training: {learning_rate: 1E-3}", "training.learning_rate", 0.001),
        ("training: {learning_rate: .5e-2}", "training.learning_rate", 0.005),
        ("training: {learning_rate: 1.e-3}", "training.learning_rate", 0.001),
        ("training: {batch_size: 1e2}", "training.batch_size", 100),
        ("training: {batch_size: +64}", "training.batch_size", 64),
        ("training: {freeze_batch_norm: no}", "training.freeze_batch_norm", False),
        ("search: {time_budget: 1e3}", "search.time_budget", 1000.0),
        ("search: {time_budget: 90m}", "search.time_budget", 5400.0),
        ("data: {source: 2024-05-01}", "data.source", "2024-05-01"),
        ("name: 2024-05-01", "name", "2024-05-01"),
        ("name: '010'", "name", "010"),
        ("name: '1e5'", "name", "1e5"),
        ("data: {source: photos/1e5}", "name", "1e5"),
        ("data: {source: '1:30'}", "data.source", "1:30"),
    ],
)
def test_what_everybody_reads_alike_is_taken(tmp_path, line, path, value):
    experiment = load(tmp_path, line)
    read = experiment
    for key in path.split("."):
        read = getattr(read, key)
    assert (read, type(read)) == (value, type(value))
    again = Experiment.parse(yaml.safe_load(experiment.to_yaml()))
    assert again == load(tmp_path, experiment.to_yaml()) == experiment
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("training: {batch_size: yes}", "training.batch_size: got true; YAML reads yes"),
        ("name: on", "name: got true; YAML reads yes"),
        ("training: {augmentation: off}", "training.augmentation: got false; YAML reads"),
        ("search: {space: {batch_size: {values: [32, on]}}}", "must hold numbers or words"),
        ("search: {space: {dropout: {low: no, high: 0.5}}}", "dropout.low: got false"),
        ("training: {epochs: 2024-05-01}", "training.epochs must be a whole number"),
        ("search: {time_budget: 2024-05-01}", "must be a duration"),
        ("training: {epochs: " + "9" * 5000 + "}", "is not YAML"),
    ],
)
def test_word_or_date_in_the_place_of_something_else_is_a_mistake(tmp_path, line, message):
    with pytest.raises(ExperimentError) as caught:
        load(tmp_path, line)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# The search space.


def test_exponent_without_a_dot_is_a_number():
    experiment = Experiment.parse(
        yaml.safe_load("search: {space: {learning_rate: {low: 1e-4, high: 1e-1, scale: log}}}")
    )
    assert experiment.search.space == {"learning_rate": Range(low=1e-4, high=1e-1, scale="log")}


def test_batch_sizes_are_whole_numbers_however_they_are_written():
    experiment = Experiment.parse(
        search(
            space={"batch_size": {"values": [32.0, "64", 128]}},
            first=[{"batch_size": 64.0}],
        )
    )
    values = experiment.search.space["batch_size"].values
    assert values == (32, 64, 128)
    assert all(type(value) is int for value in values)
    assert type(experiment.search.first[0]["batch_size"]) is int


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (search(space={}), "search.space: must name at least one of learning_rate"),
        (search(space=None), "search.space: must name at least one"),
        (space(learning_rate=0.1), "learning_rate must be {low: …, high: …, scale: log}"),
        (space(learning_rate=[0.1]), "or {values: [...]}"),
        (space(learning_rate={"low": 0.1, "high": 0.001}), "low must be < high"),
        (space(learning_rate={"low": 0.1, "high": 0.1}), "low must be < high"),
        (space(weight_decay={"low": 0, "high": 1, "scale": "log"}), "low must be > 0 on a log"),
        (space(learning_rate={"low": -1, "high": 1}), "search.space.learning_rate must be > 0"),
        (space(learning_rate={"low": math.nan, "high": 1}), "low must be a finite number"),
        (space(learning_rate={"low": 0.1, "high": math.inf}), "high must be a finite number"),
        (space(learning_rate={"high": 1}), "search.space.learning_rate.low is missing"),
        (space(learning_rate={"values": []}), "values must not be empty"),
        (space(learning_rate={"values": 0.1}), "values must be a list"),
        (space(learning_rate={"values": [0.1, math.nan]}), "learning_rate"),
        (space(batch_size={"values": [32, 32.0]}), "the same value twice"),
        (space(batch_size={"values": [32], "low": 8}), "has values and low"),
        (space(batch_size={"low": 1.5, "high": 8}), "batch_size must be a whole number, got 1.5"),
        (space(batch_size={"values": [0]}), "search.space.batch_size must be >= 1"),
        (space(epochs={"values": ["many"]}), "search.space.epochs must be a whole number"),
        (space(dropout={"low": 0, "high": 1}), "search.space.dropout must be < 1"),
        (space(optimizer={"values": ["adamw", "lion"]}), "got 'lion'"),
        (space(optimizer={"low": 1, "high": 2}), "optimizer needs {values: [...]}"),
        (search(algorithm="grid"), "a grid needs {values: [...]}, not a range"),
        (
            search(
                algorithm="grid",
                space={
                    "batch_size": {"values": list(range(1, 401))},
                    "epochs": {"values": list(range(1, 401))},
                },
            ),
            "search.space has 160,000 combinations, and a grid runs all of them",
        ),
    ],
)
def test_search_space_breaks_a_rule(raw, message):
    assert message in mistake(raw)


def test_every_searchable_name_is_a_training_value_or_the_network():
    values = {**Experiment(name="a").training.model_dump(), "backbone": "efficientnet_lite0"}
    assert set(SEARCHABLE) <= values.keys()
    for name in SEARCHABLE:
        experiment = Experiment.parse(space(**{name: {"values": [values[name]]}}))
        assert experiment.search.space[name] == Values(values=(values[name],))


# The first configurations.


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"learning_rate": 0.1}, "search.first: must be a list"),
        ([5], "search.first[0] must hold a value for each"),
        ([{"learning_rate": 0.1}], "search.first[0]: gives no value for batch_size; add one"),
        (
            [{"learning_rate": 0.1, "batch_size": 32, "dropout": 0.1}],
            "search.first[0]: dropout is not in search.space; add it there",
        ),
        (
            [{"learning_rate": 0.2, "batch_size": 32}],
            "search.first[0].learning_rate must be in search.space (0.0001 to 0.1), got 0.2",
        ),
        (
            [{"learning_rate": 0.01, "batch_size": 48}],
            "search.first[0].batch_size must be in search.space (32, 64, 128, 256), got 48",
        ),
        ([{"learning_rate": math.nan, "batch_size": 32}], "search.first[0].learning_rate"),
        ([{"learning_rate": 0.01, "batch_size": 32}] * 2, "search.first[1]: repeats"),
    ],
)
def test_first_configuration_breaks_a_rule(first, message):
    assert message in mistake(search(first=first))


def test_ends_of_a_range_belong_to_it():
    first = [{"learning_rate": end, "batch_size": 32} for end in (1e-4, 1e-1)]
    assert len(Experiment.parse(search(first=first)).search.first) == 2


def test_first_configurations_need_a_trial_each():
    first = [{"learning_rate": rate, "batch_size": 32} for rate in (0.01, 0.02, 0.03)]
    assert "search.trials must be >= 3" in mistake(search(first=first, trials=2))


# Durations.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5h", 5400), ("1d", 86400), (" 5 m ", 300)],
)
def test_duration(text, seconds):
    assert parse_duration(text) == seconds
    assert Experiment.parse(search(time_budget=text)).search.time_budget == seconds


@pytest.mark.parametrize("text", ["30 min", "h", "-1h", "1h30m", "", "inf", "1e3s"])
def test_no_duration(text):
    assert "a duration such as 90s, 30m or 2h" in mistake(search(time_budget=text))


@pytest.mark.parametrize("seconds", [0, -1, "0s", math.nan, math.inf])
def test_time_budget_is_positive_and_ends(seconds):
    assert "search.time_budget must be" in mistake(search(time_budget=seconds))


# Overrides.


def test_override_replaces_one_value_and_leaves_the_rest():
    raw = {"training": {"epochs": 20, "dropout": 0.1}}
    experiment = Experiment.parse(raw, ["training.epochs=5", "search.trials = 4"])
    assert (experiment.training.epochs, experiment.training.dropout) == (5, 0.1)
    assert experiment.search.trials == 4
    assert raw == {"training": {"epochs": 20, "dropout": 0.1}}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a.b=1e-4", 1e-4),
        ("a.b=[1e-4, 2]", [1e-4, 2]),
        ("a.b={low: 1e-4}", {"low": 1e-4}),
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b=x=y", "x=y"),
        (r"a.b=C:\photos", r"C:\photos"),
        (" a . b = text ", "text"),
    ],
)
def test_override_value_is_yaml(override, value):
    assert apply_overrides({}, [override]) == {"a": {"b": value}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs", "write it as section.key=value"),
        ("=5", "write it as section.key=value"),
        ("training..epochs=5", "write it as section.key=value"),
        ("training.epochs=[", "is not YAML"),
        ("training.epochs=!!python/name:os.system", "is not YAML"),
        ("training.epoch=5", "did you mean epochs?"),
        ("epochs=5", "did you mean training.epochs?"),
        ("training.epochs=&a [*a]", "hold themselves"),
        ("search.first.0.batch_size=5", "first is a list; write all of it"),
    ],
)
def test_override_breaks_a_rule(override, message):
    raw = search(first=[{"learning_rate": 0.01, "batch_size": 32}])
    assert message in mistake(raw, override)


def test_last_override_wins():
    overrides = ["training.epochs=5", "training.epochs=6"]
    assert Experiment.parse({}, overrides).training.epochs == 6


# Files.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must hold keys and values, got list"),
        (b"training: [\n", "is not YAML"),
        (b"training: &a [*a]\n", "training must hold keys and values"),
        (b"training: &a {epochs: *a}\n", "hold themselves"),
        (b"training: " + b"[" * 10_000, "is not YAML"),
        ("name: dogs\n".encode("utf-16"), r"is not UTF-8 \(byte 0xff\): save it as UTF-8\."),
        ("name: H\xfcndchen\n".encode("cp1252"), r"is not UTF-8 \(byte 0xfc\): save it as UTF-8\."),
        (b"name: \x00\n", "is not YAML"),
        (b"a: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"training:\n\tepochs: 5\n", "is not YAML"),
    ],
)
def test_file_that_is_no_experiment(tmp_path, content, message):
    file = tmp_path / "experiment.yaml"
    file.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as caught:
        Experiment.load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_points_to_the_examples(tmp_path):
    with pytest.raises(ExperimentError, match=r"No such file.*experiments/"):
        Experiment.load(tmp_path / "nowhere.yaml")


def test_folder_is_no_experiment_file(tmp_path):
    with pytest.raises(ExperimentError, match="Cannot read the experiment file"):
        Experiment.load(tmp_path)


# Round trips.

rates = st.floats(min_value=1e-8, max_value=10, allow_nan=False)
experiments = st.builds(
    lambda low, factor, sizes, seed, budget: {
        "seed": seed,
        "search": {
            "time_budget": budget,
            "space": {
                "learning_rate": {"low": low, "high": low * factor, "scale": "log"},
                "batch_size": {"values": sizes},
            },
        },
    },
    rates,
    st.floats(min_value=1.5, max_value=1e4),
    st.lists(st.integers(1, 4096), min_size=1, unique=True),
    st.integers(0, 2**31 - 1),
    st.none() | st.floats(min_value=1, max_value=1e6),
)


@given(experiments)
def test_experiment_reads_back_exactly(raw):
    experiment = Experiment.parse(raw)
    assert Experiment.parse(yaml.safe_load(experiment.to_yaml())) == experiment
    assert Experiment.parse(experiment.model_dump(mode="json")) == experiment


def test_flat_names_are_dotted_and_complete():
    flat = Experiment.parse({"training": {"epochs": 5}}).flatten()
    assert flat["name"] == "digits"
    assert flat["training.epochs"] == "5"
    assert flat["data.limit_per_class"] == "null"
    assert flat["search.space.learning_rate.low"] == "0.0001"
    assert flat["search.space.batch_size.values"] == "[32, 64, 128, 256]"
    assert all(isinstance(value, str) for value in flat.values())


# Training the network.


def test_a_frozen_network_trains_on_features_unless_its_images_change():
    def trains_on_images(**sections: object) -> bool:
        return Experiment.parse({"name": "a", **sections}).trains_on_images

    assert not trains_on_images()
    assert not trains_on_images(training={"augmentation": "none"})
    assert trains_on_images(training={"augmentation": "light"})
    assert trains_on_images(model={"train": "all"}, training={"augmentation": "none"})


def test_more_than_the_head_trains_with_light_augmentation_unless_told_otherwise():
    assert Experiment.parse({"name": "a", "model": {"train": "all"}}).augmentation.flip == 0.5
    assert Experiment.parse({"name": "a"}).augmentation.is_off


def test_two_stages_are_a_head_search_and_then_whole_trainings():
    raw = {
        "name": "a",
        "model": {"train": "last_stage"},
        "training": {"augmentation": "strong"},
        "search": {"stages": {"best": 2, "epochs": 4}},
    }
    experiment = Experiment.parse(raw)
    first, second = experiment.head_stage(), experiment.network_stage()
    assert not first.trains_on_images
    assert second.trains_on_images
    assert (second.training.epochs, second.search.scheduler) == (4, "none")
    assert first.search.space == experiment.search.space


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.augmentation=strnog"], "training.augmentation: must be none, light, strong"),
        (["training.augmentation={crop_scal: 0.5}"], "did you mean crop_scale?"),
        (["search.stages.bst=2"], "did you mean best?"),
        (["search.stages={best: 2}"], "search.stages is for training the network; set model.train"),
        (["training.layer_decay=0.7"], "training.layer_decay is for training the network"),
        (["training.freeze_batch_norm=true"], "training.freeze_batch_norm is for training"),
        (["model.train=al"], "model.train must be one of 'head', 'last_stage' or 'all'"),
    ],
)
def test_a_mistake_in_what_is_trained_is_one_line(overrides: list[str], message: str):
    with pytest.raises(ExperimentError, match=re.escape(message)):
        Experiment.parse({"name": "a"}, overrides)
