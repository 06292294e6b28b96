import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontuner.evaluation.choice import (
    Candidate,
    Told,
    choose,
    corrected_for_choice,
    describe_gain,
    estimate_accuracy,
    image_scores,
    tied_with_best,
    training_seconds,
)
from visiontuner.journal import SearchRecord

OBJECTIVES = ["validation_accuracy", "validation_macro_f1", "validation_loss"]


def trained(skill, *, seed, images=240, classes=24):
    """Validation logits: what all trials see in an image, some noise of their own, and the skill.

    As two trainings with different seeds do, two calls with the same skill agree on most images.
    """
    shared = np.random.default_rng(0)
    labels = shared.integers(classes, size=images)
    seen = skill * np.eye(classes)[labels] + shared.normal(size=(images, classes))
    own = np.random.default_rng(seed).normal(size=(images, classes))
    return seen + 0.2 * own, labels


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_equal_configurations_are_tied_and_one_that_learned_nothing_is_not(objective):
    logits = {
        "same": trained(4.5, seed=1),
        "again": trained(4.5, seed=2),
        "bad": trained(0.3, seed=3),
    }
    scores = {name: image_scores(*pair, objective) for name, pair in logits.items()}
    best = max(["same", "again"], key=lambda name: scores[name].mean())
    assert set(tied_with_best(scores, best)) == {"same", "again"}
    assert tied_with_best(scores, best)[0] == best


def test_tied_trials_come_best_first():
    base = np.array([1.0] * 90 + [0.0] * 10)
    scores = {"t3": base, "t1": base.copy(), "t2": base.copy(), "t4": base.copy()}
    scores["t1"][0] = 0
    assert tied_with_best(scores, "t3") == ("t3", "t2", "t4", "t1")


def test_a_difference_counts_by_the_images_it_is_made_of():
    # Ten points better, on the same images: 30 gained and 5 lost; chance gives 18 and 17.
    best = np.array([1.0] * 200 + [0.0] * 50)
    other = best.copy()
    other[:30], other[-5:] = 0, 1
    assert tied_with_best({"a": best, "b": other}, "a") == ("a",)
    other[:30], other[-5:] = 1, 0
    other[:4], other[-3:] = 0, 1
    assert tied_with_best({"a": best, "b": other}, "a") == ("a", "b")


def test_few_images_tie_everything():
    scores = {"a": np.ones(3), "b": np.zeros(3)}
    assert tied_with_best(scores, "a") == ("a", "b")


def test_a_trial_alone_is_tied_with_nobody():
    assert tied_with_best({"a": np.array([1.0])}, "a") == ("a",)


def test_equal_trials_are_rarely_told_apart():
    generator = np.random.default_rng(5)
    behind = 0
    for _ in range(40):
        chance = np.clip(generator.normal(0.9, 0.2, size=240), 0, 1)
        pair = {name: (generator.random(240) < chance) * 1.0 for name in "ab"}
        best = max(pair, key=lambda name: pair[name].mean())
        behind += len(tied_with_best(pair, best, resamples=300)) == 1
    assert behind <= 6  # of 40; 2 on average


def equal_trials(generator, images, trials=32):
    """Right answers (N, T) of trials that each name 90 % of all images rightly."""
    chance = np.where(generator.random(images) < 0.8, 1.0, 0.5)[:, None]
    return (generator.random((images, trials)) < chance).astype(float)


def test_the_best_of_many_equal_trials_is_not_ahead_of_them():
    # Told apart one by one, five of 32 equal trials fell behind the luckiest, in 19 of 20 searches.
    generator = np.random.default_rng(3)
    searches_with_one_behind = 0
    for _ in range(40):
        scores = equal_trials(generator, 200)
        values = {f"t{i:02d}": column for i, column in enumerate(scores.T)}
        best = max(values, key=lambda name: values[name].mean())
        searches_with_one_behind += len(tied_with_best(values, best, resamples=500)) < 32
    assert searches_with_one_behind <= 6  # of 40; 2 on average


def test_a_trial_that_is_worse_among_many_equal_ones_falls_behind():
    generator = np.random.default_rng(4)
    found = 0
    for _ in range(20):
        scores = equal_trials(generator, 300, trials=16)
        scores[:, 0] *= generator.random(300) > 0.12
        values = {f"t{i:02d}": column for i, column in enumerate(scores.T)}
        best = max(values, key=lambda name: values[name].mean())
        found += "t00" not in tied_with_best(values, best, resamples=500)
    assert found >= 17


@pytest.mark.parametrize("images", [30, 100])
def test_the_estimate_is_corrected_for_having_been_chosen(images):
    generator = np.random.default_rng(8)
    told, corrected = [], []
    for _ in range(150):
        right = equal_trials(generator, images)
        told.append(right.mean(axis=0).max())
        corrected.append(corrected_for_choice(right, right, resamples=100))
    assert np.mean(told) - 0.9 > 0.025
    assert np.mean(corrected) == pytest.approx(0.9, abs=0.01)


def test_a_trial_that_is_better_for_certain_needs_no_correction():
    right = np.zeros((200, 3))
    right[:150, 1] = 1
    assert corrected_for_choice(right, right) == pytest.approx(0.75, abs=0.005)
    losses = np.where(right == 1, 0.1, 2.0)
    assert corrected_for_choice(losses, -losses) == pytest.approx(0.575, abs=0.01)


def test_only_the_ranking_chooses():
    scores = np.tile([0.2, 0.8], (50, 1))
    assert corrected_for_choice(scores, -scores) == pytest.approx(0.2)


@pytest.mark.parametrize("shapes", [((1, 2), (1, 2)), ((5, 2), (5, 3)), ((5,), (5,))])
def test_a_correction_needs_images_of_the_same_trials(shapes):
    with pytest.raises(ValueError, match="the same trials"):
        corrected_for_choice(*map(np.ones, shapes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"b": np.ones(3)}, "has no scores"),
        ({"a": np.ones(3), "b": np.ones(4)}, "the same images"),
        ({"a": np.ones(0)}, "the same images"),
        ({"a": np.ones(2), "b": np.array([1.0, np.nan])}, "finite"),
    ],
)
def test_scores_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tied_with_best(values, "a")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), trials=st.integers(1, 6), images=st.integers(1, 40))
def test_the_best_is_tied_with_itself_and_with_its_twin(seed, trials, images):
    generator = np.random.default_rng(seed)
    values = {f"t{i}": generator.integers(2, size=images) * 1.0 for i in range(trials)}
    best = max(values, key=lambda name: values[name].mean())
    tied = tied_with_best({**values, "twin": values[best]}, best, resamples=100)
    assert tied[0] == best
    assert "twin" in tied
    assert len(set(tied)) == len(tied)


# what an objective is made of


def test_image_scores_by_hand():
    ln3 = np.log(3)
    logits = np.array([[0, ln3], [0, ln3], [0, ln3], [ln3, 0]])
    labels = np.array([1, 1, 0, 0])
    assert image_scores(logits, labels, "validation_accuracy").tolist() == [1, 1, 0, 1]
    losses = -np.log([0.75, 0.75, 0.25, 0.75])
    assert image_scores(logits, labels, "validation_loss") == pytest.approx(-losses)


def test_scores_for_macro_f1_give_every_class_the_same_say():
    # Class 0 has three images, all right, class 1 one, wrong, class 2 none: recall 1/2.
    logits = np.eye(3)[[0, 0, 0, 0]]
    scores = image_scores(logits, np.array([0, 0, 0, 1]), "validation_macro_f1")
    assert scores.mean() == pytest.approx(1 / 2)


# the choice


def candidate(name, right, losses, **facts):
    """A candidate by which of ten images it names right, and its losses."""
    correct = np.arange(10) < right
    return Candidate(
        name=name, value=right / 10, correct=correct, losses=np.asarray(losses, float), **facts
    )


LABELS = np.arange(10) % 2
NOISE = np.linspace(-0.05, 0.05, 10)


def chosen(*candidates, **options):
    options = {"objective": "validation_accuracy", "mode": "max", **options}
    return choose(candidates, LABELS, **options)


def test_of_the_tied_the_one_with_the_lowest_loss_is_kept():
    lucky = candidate("t0001", 9, np.full(10, 0.9))
    better = candidate("t0002", 8, np.full(10, 0.3))
    choice = chosen(lucky, better)
    assert (choice.best, choice.chosen, choice.tied) == ("t0001", "t0002", ("t0001", "t0002"))
    assert choice.reason == (
        "t0001 has the best objective; 1 other is statistically tied with it. "
        "t0002 is kept: the lowest loss of those."
    )


@pytest.mark.parametrize(
    ("gap", "kept"),
    [(0.0, "regression"), (0.01, "regression"), (0.2, "t0001"), (-0.2, "regression")],
)
def test_the_simplest_is_kept_unless_a_trial_has_a_lower_loss_beyond_noise(gap, kept):
    trial = candidate("t0001", 8, 0.5 - gap + NOISE)
    regression = candidate("regression", 8, 0.5 - NOISE)
    assert chosen(trial, regression, simplest=["gone", "regression"]).chosen == kept


def test_a_network_is_not_given_up_for_a_simple_head():
    network = candidate("t0001", 9, 0.49 + NOISE, is_network=True)
    regression = candidate("regression", 8, 0.5 - NOISE)
    assert chosen(network, regression, simplest=["regression"]).chosen == "t0001"


def test_what_is_behind_by_the_objective_is_not_kept_for_its_loss():
    many = np.arange(400) < 380
    few = np.arange(400) < 300
    candidates = [
        Candidate(name="t0001", value=0.95, correct=many, losses=np.full(400, 0.5)),
        Candidate(name="t0002", value=0.75, correct=few, losses=np.full(400, 0.1)),
    ]
    choice = choose(
        candidates, np.arange(400) % 2, objective="validation_accuracy", mode="max",
        simplest=["t0002"],
    )  # fmt: skip
    assert (choice.chosen, choice.tied) == ("t0001", ("t0001",))


def test_the_cheapest_of_the_tied_is_chosen():
    trials = [
        candidate("t0002", 9, np.full(10, 0.2), seconds=9.0),
        candidate("t0005", 8, np.full(10, 0.3), seconds=1.5),
        candidate("t0006", 8, np.full(10, 0.3), seconds=0.1, can_be_kept=False),
    ]
    choice = chosen(*trials, prefer="cheapest")
    assert (choice.best, choice.chosen) == ("t0002", "t0005")
    assert "1.5 s of training instead of 9.0 s" in choice.reason


def test_the_estimate_takes_off_what_the_luck_of_the_choice_gave():
    """Of 60 equal candidates the best seems better than it is; the estimate says what it is."""
    generator = np.random.default_rng(3)
    gaps = []
    for _ in range(20):
        correct = generator.random((60, 60)) < 0.7
        losses = 1.0 - correct + 0.1 * generator.random((60, 60))
        best = correct[:, losses.mean(axis=0).argmin()].mean()
        estimate = estimate_accuracy(correct, losses)
        assert estimate.low < estimate.value < estimate.high
        assert best > 0.75
        gaps.append(estimate.value - 0.7)
    assert abs(np.mean(gaps)) < 0.02


@pytest.mark.parametrize(
    ("tied", "end"),
    [
        ({"t0003"}, "the search is ahead beyond noise."),
        ({"t0003", "t0001"}, "tied; the search gained nothing here."),
        ({"logistic_regression"}, "the search is behind logistic regression."),
    ],
)
def test_one_line_says_what_the_search_gained(tied, end):
    line = describe_gain(
        Told("Search", "t0003", 0.955),
        [Told("logistic regression", "logistic_regression", 0.958), Told("defaults", "t0001", 0.9)],
        tied,
        objective="validation_accuracy",
    )
    assert line == f"Search 95.5 %, logistic regression 95.8 %, defaults 90.0 %: {end}"


def test_training_seconds_are_the_sum_of_the_epochs():
    def event(kind, **fields):
        return {"event": kind, "search_id": "s", "time": 0.0, "attempt": 1, **fields}

    record = SearchRecord.of(
        [
            event("trial_started", trial_id="t1", configuration={}),
            event("epoch", trial_id="t1", step=1, metrics={"epoch_seconds": 1.5}),
            event("epoch", trial_id="t1", step=2, metrics={"epoch_seconds": 0.5}),
            event("trial_started", trial_id="t2", configuration={}),
        ]
    )
    assert training_seconds(record) == {"t1": 2.0}
