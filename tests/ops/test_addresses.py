"""Secrets in the addresses of stores: not shown, and not stored."""

import pytest

from raydml.ops.addresses import redacted, without_secrets


def test_addresses_lose_their_passwords() -> None:
    assert (
        redacted("at http://me:pw@host:5000/x and postgresql://u:p@h/d")
        == "at http://***@host:5000/x and postgresql://***@h/d"
    )
    assert redacted("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"
    assert redacted("http://host:5000/#/experiments/1") == "http://host:5000/#/experiments/1"


@pytest.mark.parametrize(
    "address",
    [
        "http://user:PLANTED@host:5000",
        "http://user:a@PLANTED@host:5000/x",
        "postgresql://user:PLA/NTED/PLANTED@host/db",
        "https://PLANTED@host",
        "https://host/?token=PLANTED&x=1",
        "https://host/path?access_token=PLANTED&x=1",
        "https://host/x?X-Amz-Signature=PLANTED",
        "postgresql://host/db?user=me&password=PLANTED",
        "mysql://host/db?sslpassword=PLANTED",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BSERVER%3Dhost%3BUID%3Dme%3BPWD%3DPLANTED%3BENCRYPT%3Dyes",
        "mssql: Driver=ODBC;Uid=me;Pwd=PLANTED;Encrypt=yes",
    ],
)
def test_no_part_of_a_secret_is_shown(address: str) -> None:
    shown = redacted(f"MLflow at '{address}' cannot be used")
    assert "PLANTED" not in shown
    assert "host" in shown or "Driver" in shown
    assert shown.startswith("MLflow at '")
    assert shown.endswith("' cannot be used")


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("http://user:PLANTED@host:5000", "http://host:5000"),
        ("https://user:a@PLANTED@host/base/path@x?workspace=1", "https://host/base/path@x?workspace=1"),
        ("https://host/?token=PLANTED&x=1", "https://host/?x=1"),
        ("https://host/?x=1&api_key=PLANTED", "https://host/?x=1"),
        ("https://host/?password=PLANTED", "https://host/"),
        ("postgresql://user:PLANTED@host:1/db", "postgresql://user@host:1/db"),
        ("mysql+pymysql://user:PLA/NTED@host/db?charset=utf8", "mysql+pymysql://user@host/db?charset=utf8"),
        (
            "postgresql://host/db?user=me&password=PLANTED&sslmode=require",
            "postgresql://host/db?user=me&sslmode=require",
        ),
        (
            "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3DPLANTED%3BENCRYPT%3Dyes",
            "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BENCRYPT%3Dyes",
        ),
        ("http://host:5000", "http://host:5000"),
        ("http://host/path@x", "http://host/path@x"),
        ("sqlite:////tmp/a@b/what?/mlflow.db", "sqlite:////tmp/a@b/what?/mlflow.db"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_an_address_is_stored_without_its_secrets(address: str, stored: str) -> None:
    assert without_secrets(address) == stored
    assert without_secrets(stored) == stored
