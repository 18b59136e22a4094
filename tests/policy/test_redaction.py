"""Secrets and personal data are found in every place a value has, and prose is left alone."""

import base64
import json
import time
from typing import Any

import pytest

from weft.policy.redaction import MARK, Redacted, Redactor

# Put together here, so that no scanner of repositories takes them for real ones.
A36, A40 = "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cD3fG6", "aB3dE6gH9jK2mN5pQ8sT1vW4xY7zA0cD3fG6hI9k"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9" + ".eyJ" + "zdWIiOiIxMjM0In0" + ".abcDEF123_-x"
KEY = "-----BEGIN " + "OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1r\n-----END OPENSSH PRIVATE KEY-----"
SECRETS = {
    "aws-key": ["AKIA" + "IOSFODNN7EXAMPLE", "key=ASIA" + "IOSFODNN7EXAMPLE;"],
    "github-token": ["ghp_" + A36, "github_" + "pat_11ABCDEFG0abcdefghijkl"],
    "gitlab-token": ["glpat-" + "abcdefghij1234567890"],
    "slack-token": ["xoxb-" + "123456789012-abcdefghij"],
    "google-key": ["AIza" + "SyA1234567890abcdefghijklmnopqrstuv"],
    "model-key": ["sk-ant-" + "api03-abcdefghij1234567890", "sk-" + A36, "hf_" + A36],
    "payment-key": ["sk_live_" + "abcdefghij1234567890"],
    "package-token": ["npm_" + A36],
    "private-key": [KEY, KEY.partition("-----END")[0]],
    "nats-seed": ["SU" + "AIBDPBAUTWCWBKIO6XHQNINK5FWJW4OHLXC3HQ2KFE4PEJUA44CNHTC4"],
    "jwt": [JWT],
    "bearer": ["Authorization: Bearer abc123def456ghi7", "basic dXNlcjpwYXNzd29yZA=="],
    "url-password": ["postgres://me:hunter2@db.example.org/x", "redis://:s3cr3t@10.0.0.1"],
    "password": [
        "password=hunter2", "api_key: 'abcdef'", '"client_secret" : "x9x9x9x9"', "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI",
        "token => 9f8e7d6c5b", "PGPASSWORD=letmein",
    ],
}  # fmt: skip
PERSONAL = {
    "email": ["mail jane.doe+x@mail.example.co.uk now", "a@b.io"],
    "card": ["4111 1111 1111 1111", "card 5500-0000-0000-0004.", "378282246310005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432"],
    "ssn": ["123-45-6789"],
    "phone": ["+49 30 901820 123", "+1 (415) 555-2671"],
}
PROSE = [
    "The password must be changed every month; ask for a token: see the manual.",
    "Secret: keeping things simple.",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b on 2026-01-05T10:00:00.123456Z",
    "order 4111111111111112, invoice 2026-000123456789, version 1.2.3-rc.4",
    "uuid 123e4567-e89b-12d3-a456-426614174000 and path /usr/lib/python3.11/site-packages",
    "Bearer tokens are credentials; basic authentication is older.",
    "see https://example.org:8080/path?x=1#y and user@ or @user, a+b=c",
    "Rooms 101-22-33 and 000-12-3456; call 555-0100.",
    "data: iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==",
    "task sk-1 sg. key-value su sa",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in SECRETS.items() for text in texts])
def test_secrets_are_taken_out(kind: str, text: str) -> None:
    found = Redacted()
    made = Redactor().text(f"before {text} after", found)
    assert made.startswith("before ")
    assert f"{MARK}{kind}]" in made, made
    assert set(found.counts) == {kind}
    if "END" in text or "BEGIN" not in text:
        assert made.endswith(" after")


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in PERSONAL.items() for text in texts])
def test_personal_data_is_taken_out_where_asked_for(kind: str, text: str) -> None:
    assert f"{MARK}{kind}]" in Redactor(["pii"]).text(text)
    assert Redactor(["secrets"]).text(text) is text


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_left_alone(text: str) -> None:
    assert Redactor(["secrets", "pii"]).text(text) is text


def test_what_was_injected_is_found_wherever_it_comes_back() -> None:
    redactor = Redactor(known=["zebra-crossing-7", "abc"])
    assert redactor.text("it was zebra-crossing-7, abc") == f"it was {MARK}secret], abc"
    hidden = base64.b64encode(b"user:zebra-crossing-7 ok").decode()
    assert redactor.value({"x": [hidden]}) == {"x": [f"{MARK}secret]"]}


def test_base64_of_a_secret_is_a_secret() -> None:
    hidden = base64.b64encode(f"the key is {SECRETS['github-token'][0]}".encode()).decode()
    assert Redactor().text(f"see {hidden}!") == f"see {MARK}github-token]!"
    url = base64.urlsafe_b64encode(f"ÿ?>{'x' * 30}".encode()).decode()
    assert Redactor().text(url) is url


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"apiKey": "x", "n": 1}, {"apiKey": f"{MARK}secret]", "n": 1}),
        (
            {"Authorization": "y", "Set-Cookie": "a=b"},
            {"Authorization": f"{MARK}secret]", "Set-Cookie": f"{MARK}secret]"},
        ),
        ({"db_password": 1234}, {"db_password": f"{MARK}secret]"}),
        (
            {"credentials": {"user": "u", "n": [1, None, True]}},
            {"credentials": {"user": f"{MARK}secret]", "n": [f"{MARK}secret]", None, True]}},
        ),
        ({"token": "abc"}, {"token": f"{MARK}secret]"}),
        ({"email": "x"}, {"email": f"{MARK}personal]"}),
        ({"card": 4111111111111111}, {"card": f"{MARK}card]"}),
        ({"a": [{"b": "password=hunter2"}]}, {"a": [{"b": f"password={MARK}password]"}]}),
        ({"ghp_" + A36: 1}, {f"{MARK}github-token]": 1}),
    ],
)
def test_keys_and_nested_values_are_looked_at(value: Any, wanted: Any) -> None:
    before = json.dumps(value)
    assert Redactor(["secrets", "pii"]).value(value) == wanted
    assert json.dumps(value) == before


@pytest.mark.parametrize(
    "value",
    [
        {"tokens": 12, "max_tokens": 5, "token": 7, "secretary": "Ann", "passport": "no", "pinned": True},
        {"password": None, "api_key": "", "x": [1, 2.5, "text", {"y": []}]},
    ],
)
def test_a_value_with_nothing_in_it_is_the_same_object(value: Any) -> None:
    found = Redacted()
    assert Redactor(["secrets", "pii"]).value(value, found) is value
    assert not found


def test_nesting_without_end_is_cut_off() -> None:
    deep: Any = "password=hunter2"
    for _ in range(500):
        deep = [deep]
    assert "hunter2" not in json.dumps(Redactor().value(deep))


def test_redacting_twice_changes_nothing() -> None:
    redactor = Redactor(["secrets", "pii"])
    text = redactor.text(" | ".join(one for texts in (*SECRETS.values(), *PERSONAL.values()) for one in texts))
    assert redactor.text(text) == text


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "a@" * 50_000, "1 " * 100_000, "1" * 200_000, "password=" * 20_000, "eyJ" + "a." * 60_000,
     "://" * 60_000, "x://" + "a" * 100_000, "+1" * 80_000, "-----BEGIN PRIVATE KEY-----" * 5_000, "AB12" * 50_000],
    ids=range(11),
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    Redactor(["secrets", "pii"]).text(text)
    assert time.process_time() - begun < 2.0
