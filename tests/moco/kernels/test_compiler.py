"""The compiler of the kernels: what it is given, and what is said where it fails."""

import pytest

from moco.errors import ConfigError
from moco.kernels import compiler


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "does not compile batch_norm.cpp: no message"),
        ("no-such-compiler", "cannot be run"),
    ],
)
def test_a_compiler_that_fails_is_one_line(monkeypatch, command, message):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(ConfigError, match=f"{message}.*set COMPILE eager") as raised:
        compiler._compiled.__wrapped__()
    assert "\n" not in str(raised.value)


def test_no_compiler_at_all(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no C[+][+] compiler was found.*c[+][+], g[+][+]"):
        compiler._compiled.__wrapped__()
