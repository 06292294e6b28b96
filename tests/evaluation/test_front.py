from visiontuner.evaluation.compare import NetworkPoint, front, front_table
from visiontuner.evaluation.intervals import Interval


def point(name: str, accuracy: float, ms: float, megabytes: float, price: float) -> NetworkPoint:
    return NetworkPoint(
        backbone=name,
        accuracy=Interval(value=accuracy, low=accuracy - 0.02, high=accuracy + 0.02),
        cost={"ms_one_thread": ms, "megabytes": megabytes, "dollars_per_million": price},
    )


SMALL = point("small", 0.90, 5, 14, 0.1)
LARGE = point("large", 0.95, 20, 20, 0.4)
SLOW = point("slow", 0.93, 25, 18, 0.5)  # smaller than `large`, which beats it in all else
BEATEN = point("beaten", 0.89, 6, 14, 0.1)  # `small` is better or as good in everything
TWIN = point("twin", 0.90, 5, 14, 0.1)


def test_front_holds_what_no_other_network_beats() -> None:
    assert front([BEATEN, LARGE, SMALL, SLOW]) == [LARGE, SMALL, SLOW]


def test_equal_networks_are_both_on_the_front() -> None:
    assert front([SMALL, TWIN]) == [SMALL, TWIN]


def test_table_has_the_most_accurate_first_and_says_what_is_on_the_front() -> None:
    rows = front_table([SMALL, BEATEN, LARGE])
    assert [(row["backbone"], row["on_front"]) for row in rows] == [
        ("large", True),
        ("small", True),
        ("beaten", False),
    ]
    assert rows[0]["accuracy_low"] == 0.95 - 0.02
    assert rows[0]["ms_one_thread"] == 20
