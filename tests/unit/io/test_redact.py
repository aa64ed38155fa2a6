from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.io import redact as redact_module
from harness.io.redact import (
    is_secret_name,
    redact,
    redact_message,
    redact_named,
    redact_tree,
    remember,
    without_password,
)

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


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        (
            "postgresql://host/db?user=me&password=hunter2&sslmode=on",
            "postgresql://host/db?user=me&password=***&sslmode=on",
        ),
        ("mssql+pyodbc://host/db?driver=x;PWD=hunter2", "mssql+pyodbc://host/db?driver=x;PWD=***"),
        ("https://host/?token=hunter2#part", "https://host/?token=***"),
    ],
)
def test_password_is_gone_when_it_stands_in_the_query_of_a_uri(uri: str, written: str) -> None:
    assert without_password(uri) == written


@pytest.mark.parametrize("name", ["X-Amz-Signature", "X-Goog-Signature", "sig", "X-Amz-Security-Token"])
def test_signature_is_gone_when_an_address_is_signed(name: str) -> None:
    text = f"403 Forbidden for url: https://bucket.s3/key?partNumber=2&{name}=0a1b2c3d&X-Amz-Expires=60 (again)"
    assert redact_message(text) == text.replace("0a1b2c3d", "***")


def test_password_is_gone_wherever_it_stands_when_its_address_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact_module, "_known", set())
    remember("postgresql://me:p%40ss-word@host/db")
    remember(None)
    assert redact_message("given p%40ss-word, meant p@ss-word") == "given ***, meant ***"


@given(
    st.sampled_from(["MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "AZURE_ACCESS_KEY"])
)
def test_value_is_gone_wherever_it_stands_when_the_environment_has_it_as_a_secret(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "hunter2+x")
        patch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter3@host")
        patch.setenv("AWS_ACCESS_KEY_ID", "who-it-is")
        text = "signed with hunter2+x by who-it-is for hunter3 (hunter2)"
        assert redact_message(text) == "signed with *** by who-it-is for *** (hunter2)"


def test_short_value_stays_when_it_is_in_all_words() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        assert redact("the latest test") == "the latest test"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('connect(host="db", password="hunter2")', 'connect(host="db", password=***)'),
        ("refused: password=hunter2 host=db", "refused: password=*** host=db"),
        ("{'password': 'hunter2', 'host': 'db'}", "{'password': ***, 'host': 'db'}"),
        ("password authentication failed for user me", "password authentication failed for user me"),
        ("the token is missing: give one", "the token is missing: give one"),
    ],
)
def test_message_keeps_its_words_when_its_secrets_are_replaced(text: str, written: str) -> None:
    assert redact_message(text) == written


def test_settings_keep_their_form_when_their_secrets_are_replaced() -> None:
    settings = {"width": 8, "db": {"password": [1, 2], "uri": "postgresql://me:hunter2@h/d"}, "list": ("a", None)}
    assert redact_tree(settings) == {
        "width": 8,
        "db": {"password": "***", "uri": "postgresql://me:***@h/d"},
        "list": ["a", None],
    }


def test_values_are_the_same_objects_but_for_secrets_when_another_library_gets_them() -> None:
    shape = (3, 4)
    values = {"hub_token": "hf_abc", "lr": 0.1, "shape": shape, "hub": {"api_key": 3, "url": "s3://me:abc@host/x"}}
    found = redact_named(values)
    assert found == {
        "hub_token": "***",
        "lr": 0.1,
        "shape": shape,
        "hub": {"api_key": "***", "url": "s3://me:***@host/x"},
    }
    assert found["shape"] is shape
    # A metric may be named like a secret; what is logged with it as text may be one.
    assert redact_named({"loss/token": 0.5, "hub_token": "hf_abc"}, only_text=True) == {
        "loss/token": 0.5,
        "hub_token": "***",
    }
    assert redact_named({"hub_token": None}) == {"hub_token": None}
