import pytest

from visiontuner.redaction import recognisable, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:5000/a b@c", "http://host:5000/a b@c"),
        ("at http://me:pass@host:5000: refused", "at http://host:5000: refused"),
        ("http://me:p@ss@host/x", "http://host/x"),
        ("'https://host/a?X-Amz-Signature=12ab' is away", "'https://host/a' is away"),
    ],
)
def test_a_message_shows_urls_without_password_and_query(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/show?id=3&size=large", "https://host/show?id=3&size=large"),
        ("https://me:pass@host/a.png", "https://host/a.png"),
        (
            "https://host/a.png?X-Amz-Date=1&X-Amz-Signature=12ab&x=2",
            "https://host/a.png?X-Amz-Date=1&X-Amz-Signature=…&x=2",
        ),
        ("https://host/a.png?api_key=12ab#b", "https://host/a.png?api_key=…#b"),
    ],
)
def test_a_url_stays_recognisable_without_its_secrets(url: str, shown: str) -> None:
    assert recognisable(url) == shown
