from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.redact import is_secret_name, redact, without_password

letters = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=8)
# What a user may paste unquoted: more than a URI allows, as long as it ends before the path.
passwords = st.text("QWERTZUIOP!$%&@:=+~-", min_size=1, max_size=12)


@given(letters, passwords, letters, st.sampled_from(["", ":5000"]), st.sampled_from(["", "/db?x=1"]))
def test_password_is_gone_when_it_stands_in_a_uri(user: str, password: str, host: str, port: str, path: str) -> None:
    uri = f"postgresql://{user}:{password}@{host}{port}{path}"
    expected = f"postgresql://{user}:***@{host}{port}{path}"
    assert without_password(uri) == expected
    assert redact(f"--uri {uri} --seed 3") == f"--uri {expected} --seed 3"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:///mlflow.db",
        "sqlite:////absolute/mlflow.db",
        "http://localhost:5000",
        "databricks",
        "file:///tmp/a:b@c",
        "https://host:5000/#/a@b",
    ],
)
def test_uri_is_unchanged_when_it_has_no_password(uri: str) -> None:
    assert without_password(uri) == uri
    assert redact(uri) == uri


@given(
    st.sampled_from(["password", "hf_token", "AWS_SECRET_ACCESS_KEY", "api_key", "api-key", "db.password.value"]),
    st.sampled_from(["=", " ", ": "]),
    st.text("QWERTZ/+&%", min_size=1, max_size=12),
)
def test_value_is_gone_when_an_option_is_named_like_a_secret(name: str, between: str, value: str) -> None:
    assert redact(f"run --{name}{between}{value} --seed 3") == f"run --{name}{between}*** --seed 3"
    assert is_secret_name(name)


def test_value_is_gone_when_it_is_quoted() -> None:
    assert redact("x --password 'two words' y") == "x --password *** y"
    assert "hunter" not in redact("{'a': {'password': 'hunter two'}}")


@pytest.mark.parametrize("text", ["max_tokens=5", "--task.init_args.tokenizer bpe", "num_tokens: 3", "pad_token_id=0"])
def test_value_stays_when_tokens_are_those_of_a_language_model(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("name", ["max_tokens", "tokenizer.name", "tokens.all", "trainer.max_epochs", "pad_token_id"])
def test_name_is_no_secret_when_it_only_resembles_one(name: str) -> None:
    assert not is_secret_name(name)


def test_user_alone_is_replaced_when_a_uri_has_no_password() -> None:
    # It is often a token.
    assert without_password("https://hf_abc@host/path") == "https://***@host/path"
    assert redact("see https://hf_abc@host/path") == "see https://***@host/path"
