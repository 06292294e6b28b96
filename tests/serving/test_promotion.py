"""The champion moves only to a version that is better on the same test images."""

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from visiontuner.cli.judge import promote as command
from visiontuner.errors import TrackingError, UserMistake
from visiontuner.serving.promotion import Promotion, promote
from visiontuner.serving.registry import ModelReference, digest_of_test_set, find_version
from visiontuner.tracking.store import Store

pytestmark = [
    # MLflow 3.17 uses an option that SQLAlchemy 2.1 deprecates,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    # and warns about its own type hints when it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning"),
]

N = 100
NAMES = ("cat", "dog")
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, new_database: Callable[[Path], str]) -> str:
    return new_database(tmp_path_factory.mktemp("promotion") / "mlflow.db")


@pytest.fixture(scope="module")
def store(uri: str) -> Store:
    store = Store(uri)
    folder = Path(uri.removeprefix("sqlite:///")).parent / "artifacts"
    store.call("create_experiment", "pets", artifact_location=str(folder))
    return store


@pytest.fixture
def client(store: Store) -> MlflowClient:
    return MlflowClient(store.tracking_uri, store.tracking_uri)


@pytest.fixture
def name() -> str:
    return f"pets{next(_numbers)}"


class Registered:
    """Registers versions of one model, each on a run of its own."""

    def __init__(self, store: Store, name: str, folder: Path) -> None:
        self.store, self.name, self.folder = store, name, folder
        store.call("create_registered_model", name)
        self.experiment = store.call("get_experiment_by_name", "pets").experiment_id

    def version(self, *, run_id: str | None = None) -> str:
        """A version that nobody has evaluated yet."""
        if run_id is None:
            parent = self.store.call("create_run", self.experiment, run_name="pets-2026").info
            tags = {"mlflow.parentRunId": parent.run_id}
            run_id = self.store.call("create_run", self.experiment, tags=tags).info.run_id
        number = next(_numbers)
        tags = {"visiontuner.trial_id": "t0001", "visiontuner.classifier_digest": f"c{number}"}
        made = self.store.call(
            "create_model_version", self.name, f"runs:/{run_id}/model", run_id=run_id, tags=tags
        )
        self.store.call("set_registered_model_alias", self.name, "challenger", made.version)
        return str(made.version)

    def evaluated(self, wrong: Sequence[int], **parts: Any) -> str:
        """A version whose evaluation named these images wrongly."""
        number = self.version()
        self.evaluate(number, wrong, **parts)
        return number

    def evaluate(
        self,
        number: str,
        wrong: Sequence[int],
        *,
        names: Sequence[str] = NAMES,
        images: Sequence[int] = range(N),
        relabelled: Sequence[int] = (),
        digest: str = "d1",
        **report: Any,
    ) -> None:
        """Image i is a cat if i is even, and a dog if it is odd."""
        true = [NAMES[(i + (i in relabelled)) % 2] for i in images]
        labels = np.array([names.index(name) for name in true], dtype=np.int64)
        predicted = np.array(
            [(label + (i in wrong)) % len(names) for i, label in zip(images, labels, strict=True)]
        )
        probabilities = np.full((len(labels), len(names)), 0.1, dtype=np.float32)
        probabilities[np.arange(len(labels)), predicted] = 0.9
        self.write(
            number,
            {"class_names": list(names), "data_digest": digest, **report},
            probabilities=probabilities,
            labels=labels,
            digests=np.array([hashlib.sha256(str(i).encode()).hexdigest() for i in images]),
            paths=np.array([f"{i}.png" for i in images]),
        )

    def write(self, number: str, report: dict[str, Any], **arrays: Any) -> None:
        version = self.store.call("get_model_version", self.name, number)
        folder = self.folder / f"evaluation{number}"
        folder.mkdir(exist_ok=True)
        own = {
            "trial_id": "t0001",
            "classifier_digest": version.tags["visiontuner.classifier_digest"],
        }
        (folder / "report.json").write_text(json.dumps({**own, **report}))
        if "digests" in arrays:
            tested = digest_of_test_set(map(str, arrays["digests"]))
            self.store.call(
                "set_model_version_tag", self.name, number, "visiontuner.test_set", tested
            )
        if arrays:
            np.savez(folder / "predictions.npz", **arrays)
        self.store.call("log_artifacts", version.run_id, str(folder), "evaluation")

    def promote(self, which: str | None = None, **options: Any) -> Promotion:
        return promote(self.store, ModelReference(name=self.name, version=which), **options)

    @property
    def champion(self) -> str | None:
        aliases = self.store.call("get_registered_model", self.name).aliases
        return str(aliases["champion"]) if "champion" in aliases else None

    def tags(self, number: str) -> dict[str, str]:
        return dict(self.store.call("get_model_version", self.name, number).tags)


@pytest.fixture
def model(store: Store, name: str, tmp_path: Path) -> Registered:
    return Registered(store, name, tmp_path)


def test_the_first_evaluated_version_becomes_champion(model: Registered) -> None:
    number = model.evaluated(wrong=range(10))
    decided = model.promote()
    assert (decided.decision, decided.champion, decided.test) == ("promoted", None, None)
    assert decided.accuracy is not None
    assert decided.accuracy.value == pytest.approx(0.9)
    assert decided.accuracy.low < 0.9 < decided.accuracy.high
    assert model.champion == number
    assert model.tags(number)["visiontuner.promotion"] == "promoted"
    assert (
        "90 of 100 test images right (90.0 %" in model.tags(number)["visiontuner.promotion_reason"]
    )


def test_a_better_version_takes_over_and_says_why(model: Registered, client: MlflowClient) -> None:
    model.evaluated(wrong=range(20))
    model.promote()
    better = model.evaluated(wrong=range(5))
    decided = model.promote()
    assert model.champion == better
    assert decided.test is not None
    # 15 images that only the challenger names: p = 2 x 0.5^15.
    assert (decided.test.only_a, decided.test.only_b) == (15, 0)
    assert decided.test.p_value == pytest.approx(2 * 0.5**15)
    assert "better beyond noise" in decided.reason
    version = client.get_model_version(model.name, better)
    assert version.tags["visiontuner.promotion_reason"] == decided.reason
    assert decided.reason in (version.description or "")


def test_a_version_that_is_only_lucky_is_kept_back_and_says_why(model: Registered) -> None:
    first = model.evaluated(wrong=range(10))
    model.promote()
    lucky = model.evaluated(wrong=range(7))  # 3 images more: p = 0.25
    decided = model.promote()
    assert (decided.decision, model.champion) == ("kept", first)
    assert model.tags(lucky)["visiontuner.promotion"] == "kept"
    assert "no difference beyond noise" in model.tags(lucky)["visiontuner.promotion_reason"]


def test_every_further_model_on_the_same_images_needs_more_evidence(model: Registered) -> None:
    model.evaluated(wrong=range(10))
    model.promote()
    numbers = [model.evaluated(wrong=range(2)) for _ in range(4)]  # p = 2 x 0.5^8 = 0.0078
    decided = [model.promote(number, dry_run=True) for number in numbers]
    assert [d.look for d in decided] == [1, 2, 3, 4]
    assert [d.decision for d in decided] == ["promoted", "promoted", "promoted", "kept"]
    assert "in comparison 4 on these images p below 0.005 counts" in decided[3].reason
    assert "no difference beyond noise" in decided[3].reason


def test_other_images_and_other_versions_of_a_trial_are_no_looks(
    model: Registered, store: Store
) -> None:
    model.evaluated(wrong=(), images=range(50))
    champion = model.evaluated(wrong=range(10))
    model.promote(champion)
    run_id = store.call("get_model_version", model.name, champion).run_id
    model.evaluate(model.version(run_id=run_id), wrong=range(10))
    model.evaluated(wrong=range(3))
    assert model.promote().look == 1


def test_a_worse_version_is_kept_back(model: Registered) -> None:
    model.evaluated(wrong=range(5))
    model.promote()
    model.evaluated(wrong=range(40))
    assert "worse beyond noise" in model.promote().reason


def test_force_moves_the_champion_against_the_test(model: Registered) -> None:
    model.evaluated(wrong=range(5))
    model.promote()
    worse = model.evaluated(wrong=range(40))
    decided = model.promote(force=True)
    assert decided.forced
    assert model.champion == worse
    assert "Forced against the test" in model.tags(worse)["visiontuner.promotion_reason"]


def test_a_dry_run_changes_nothing(model: Registered) -> None:
    number = model.evaluated(wrong=())
    before = model.tags(number)
    decided = model.promote(dry_run=True)
    assert (decided.decision, decided.changed) == ("promoted", False)
    assert model.champion is None
    assert model.tags(number) == before


def test_the_champion_itself_is_left_alone(model: Registered) -> None:
    model.evaluated(wrong=())
    model.promote()
    decided = model.promote()
    assert (decided.decision, decided.changed) == ("unchanged", False)


def test_a_version_never_evaluated_is_refused_with_the_command(
    model: Registered, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = model.version()
    monkeypatch.chdir(tmp_path)
    told = "visiontuner evaluate FOLDER` with the folder of the search pets-2026 first"
    with pytest.raises(UserMistake, match=told):
        model.promote()
    run_id = client.get_model_version(model.name, number).run_id
    parent = client.get_run(run_id).data.tags["mlflow.parentRunId"]
    for name, known in (("a-damaged-one", "{"), ("mine", json.dumps({"parent_run_id": parent}))):
        (tmp_path / "searches" / name).mkdir(parents=True)
        (tmp_path / "searches" / name / "mlflow.json").write_text(known)
    with pytest.raises(UserMistake, match="visiontuner evaluate searches/mine` first"):
        model.promote()
    decided = model.promote(force=True)
    assert model.champion == number
    assert "never evaluated" in decided.reason
    # And so is a comparison with it.
    model.evaluated(wrong=())
    with pytest.raises(UserMistake, match=f"Version {number} .* never evaluated"):
        model.promote()


def test_without_test_images_there_is_nothing_to_go_by(model: Registered) -> None:
    number = model.version()
    model.write(number, {"class_names": list(NAMES), "num_images": 0})
    with pytest.raises(UserMistake, match="without any test image"):
        model.promote()


def test_calibration_keeps_the_predictions_of_the_same_trial(
    model: Registered, store: Store
) -> None:
    """Two versions on one run; the evaluation is of the second classifier only."""
    first = model.version()
    run_id = store.call("get_model_version", model.name, first).run_id
    second = model.version(run_id=run_id)
    model.evaluate(second, wrong=range(3))
    model.promote(first)
    decided = model.promote(second)
    assert decided.test is not None
    assert decided.test.only_a == decided.test.only_b == 0
    assert "the same images" in decided.reason
    assert model.champion == first


def test_an_evaluation_of_another_trial_is_refused(model: Registered) -> None:
    number = model.version()
    model.evaluate(number, wrong=(), trial_id="t0009", classifier_digest="other")
    with pytest.raises(UserMistake, match="of trial t0009"):
        model.promote()


class TestTheSameImages:
    @pytest.fixture
    def champion(self, model: Registered) -> Registered:
        model.evaluated(wrong=range(20))
        model.promote()
        return model

    def test_their_order_and_that_of_the_classes_do_not_matter(self, champion: Registered) -> None:
        backwards = range(N - 1, -1, -1)
        champion.evaluated(wrong=range(5), names=("dog", "cat"), images=backwards)
        decided = champion.promote()
        assert decided.test is not None
        assert (decided.test.only_a, decided.test.only_b) == (15, 0)

    def test_copies_of_an_image_are_counted(self, champion: Registered) -> None:
        champion.evaluated(wrong=(), images=[0, *range(N - 1)])
        with pytest.raises(UserMistake, match="100 and 100, with 99 in common"):
            champion.promote()

    def test_other_images_are_refused_naming_both(self, champion: Registered) -> None:
        number = champion.evaluated(wrong=(), images=range(40, 140), digest="d2")
        with pytest.raises(
            UserMistake, match=rf"Versions {number} and .*60 in common \(data d2 and d1\).*--force"
        ):
            champion.promote()
        decided = champion.promote(force=True)
        assert champion.champion == number
        assert "Forced without a comparison" in decided.reason

    def test_other_labels_are_refused(self, champion: Registered) -> None:
        champion.evaluated(wrong=(), relabelled=[3, 4])
        with pytest.raises(UserMistake, match="the same 100, but 2 with another class"):
            champion.promote()

    def test_other_classes_are_refused(self, champion: Registered) -> None:
        champion.evaluated(wrong=(), names=("cat", "dog", "bird"))
        with pytest.raises(UserMistake, match="only the first knows 'bird'"):
            champion.promote()

    def test_more_training_images_are_said(self, champion: Registered) -> None:
        champion.evaluated(wrong=(), digest="d2")
        decided = champion.promote()
        assert decided.decision == "promoted"
        assert "data sets differ (d2 and d1), but not in test images" in decided.reason


class TestDamage:
    @pytest.mark.parametrize(
        "change",
        [
            {"labels": np.array([0, 1, 7])},
            {"labels": np.array([0.0, 1.0, 0.0])},
            {"labels": np.array([0, 1])},
            {"labels": np.array([], dtype=int)},
            {"probabilities": np.full((3, 2), np.nan)},
            {"probabilities": np.full((3, 5), 0.2)},
            {"digests": np.array(["a"])},
            {"digests": np.array([object()] * 3, dtype=object)},
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(
        self, model: Registered, change: dict[str, Any]
    ) -> None:
        arrays = {
            "probabilities": np.full((3, 2), 0.5),
            "labels": np.array([0, 1, 0]),
            "digests": np.array(["a", "b", "c"]),
        }
        model.write(model.version(), {"class_names": list(NAMES)}, **{**arrays, **change})
        with pytest.raises(UserMistake, match=r"predictions\.npz on run .* cannot be used"):
            model.promote()

    @pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04torn"])
    def test_a_torn_file_is_refused(self, model: Registered, content: bytes) -> None:
        number = model.version()
        folder = model.folder / f"evaluation{number}"
        folder.mkdir()
        (folder / "predictions.npz").write_bytes(content)
        model.write(number, {"class_names": list(NAMES)})
        with pytest.raises(UserMistake, match=r"predictions\.npz on run .* cannot be used"):
            model.promote()

    def test_missing_predictions_are_refused(self, model: Registered) -> None:
        model.write(model.version(), {"class_names": list(NAMES)})
        with pytest.raises(UserMistake, match=r"predictions\.npz on run .*it is missing"):
            model.promote()

    def test_a_damaged_report_is_refused(self, model: Registered, store: Store) -> None:
        run_id = store.call("get_model_version", model.name, model.version()).run_id
        store.call("log_text", run_id, "[1", "evaluation/report.json")
        with pytest.raises(UserMistake, match=r"report\.json on run .* cannot be used"):
            model.promote()


class Meanwhile:
    """A store on which somebody else moves the champion while we compare."""

    def __init__(self, model: Registered, to: str) -> None:
        self.tracking_uri = model.store.tracking_uri
        self.model, self.to = model, to

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        if method == "download_artifacts":
            self.model.store.call(
                "set_registered_model_alias", self.model.name, "champion", self.to
            )
        return self.model.store.call(method, *args, **kwargs)

    def download(self, artifact_uri: str, folder: Path) -> Path:
        return self.model.store.download(artifact_uri, folder)


def test_a_champion_that_moved_meanwhile_is_not_overwritten(model: Registered) -> None:
    other = model.evaluated(wrong=range(50))
    best = model.evaluated(wrong=())
    with pytest.raises(TrackingError, match=f"from none to version {other} meanwhile"):
        promote(Meanwhile(model, other), ModelReference(name=model.name))
    assert model.champion == other
    assert "visiontuner.promotion" not in model.tags(best)


def test_an_alias_of_a_deleted_version_does_not_hold(model: Registered, store: Store) -> None:
    first = model.evaluated(wrong=())
    model.promote()
    second = model.evaluated(wrong=range(50))
    store.call("delete_model_version", model.name, first)
    model.promote()
    assert model.champion == second


def test_what_a_person_wrote_in_the_description_stays(
    model: Registered, client: MlflowClient
) -> None:
    number = model.evaluated(wrong=())
    client.update_model_version(model.name, number, "Ask Ada.\nPromotion: kept. Long ago.")
    model.promote()
    description = client.get_model_version(model.name, number).description or ""
    assert description.startswith("Ask Ada.\nPromotion: promoted. ")
    assert "Long ago" not in description


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pets", ("pets", None, None)),
        ("pets/3", ("pets", "3", None)),
        ("pets@champion", ("pets", None, "champion")),
        ("models:/pets/3", ("pets", "3", None)),
        ("models:/pets@champion", ("pets", None, "champion")),
    ],
)
def test_how_a_model_is_named(text: str, expected: tuple[str, str | None, str | None]) -> None:
    reference = ModelReference.parse(text)
    assert (reference.name, reference.version, reference.alias) == expected


@pytest.mark.parametrize("text", ["", "models:/", "a/b", "a/1/2", "a@", "runs:/a", "a/-1"])
def test_what_is_no_name_of_a_model(text: str) -> None:
    with pytest.raises(UserMistake, match="is no model"):
        ModelReference.parse(text)


def test_what_is_not_there_is_named(model: Registered, store: Store) -> None:
    with pytest.raises(UserMistake, match="has no model 'unheard'"):
        find_version(store, ModelReference(name="unheard"))
    with pytest.raises(UserMistake, match="has no version yet"):
        find_version(store, ModelReference(name=model.name))
    number = model.version()
    with pytest.raises(UserMistake, match=f"has no version 99; its versions: {number}"):
        find_version(store, ModelReference(name=model.name, version="99"))
    with pytest.raises(UserMistake, match="no alias 'best'; it has: challenger"):
        find_version(store, ModelReference(name=model.name, alias="best"))


class TestCommand:
    @pytest.fixture
    def call(self, uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return lambda *arguments: CliRunner().invoke(command, list(arguments))

    def test_it_prints_the_test_and_the_decision(
        self, model: Registered, call: Callable[..., Any]
    ) -> None:
        first = model.evaluated(wrong=range(20))
        assert call(model.name).exit_code == 0
        second = model.evaluated(wrong=range(5))
        dry = call(model.name, "--dry-run")
        assert "Would be promoted. " in dry.stdout
        assert f"version {second}" in dry.stdout
        assert f"the champion, version {first}" in dry.stdout
        assert "right on 15 images" in dry.stdout
        assert model.champion == first
        done = call(model.name)
        assert f"It answers as models:/{model.name}@champion." in done.stdout
        assert model.champion == second

    def test_json_is_one_object(self, model: Registered, call: Callable[..., Any]) -> None:
        model.evaluated(wrong=range(20))
        answer = json.loads(call(model.name, "--json", "--dry-run").stdout)
        assert answer["decision"] == "promoted"
        assert answer["accuracy"]["value"] == pytest.approx(0.8)
        assert answer["test"] is None
        assert answer["dry_run"] is True

    def test_a_refusal_is_one_line_and_a_users_mistake(
        self, model: Registered, call: Callable[..., Any]
    ) -> None:
        model.version()
        refused = call(model.name)
        assert refused.exit_code == 2
        assert len(refused.stderr.strip().splitlines()) == 1

    def test_a_server_that_is_away(
        self, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:1")
        away = call("pets")
        assert away.exit_code == 1
        assert "cannot be reached" in away.stderr
        assert len(away.stderr.strip().splitlines()) == 1

    def test_a_look_makes_no_database(
        self, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
        assert "There is no MLflow database" in call("pets").stderr
        assert not (tmp_path / "none.db").exists()
