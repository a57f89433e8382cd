"""Seeded fuzzing of a reader: a valid result or one line of a MocoError, never anything else."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from moco.errors import MocoError

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

MOST_SECONDS = 10  # for one example; a hang, not a speed
REFUSED = object()


def explore(check: Callable, *strategies, examples: int) -> int:
    """Call `check` with up to `examples` draws, the same ones in every run; a failure is minimised.

    Returns: the number of draws.
    """
    count = 0

    def counting(drawn: tuple) -> None:
        nonlocal count
        count += 1
        check(*drawn)

    limits = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    limits(hypothesis.given(st.tuples(*strategies))(counting))()
    return count


def is_noticed(check: Callable, *strategies, examples: int) -> bool:
    """Whether `explore` finds a failure: of a control, where a guard was removed."""
    try:
        explore(check, *strategies, examples=examples)
    except hypothesis.errors.HypothesisException:
        raise  # the test itself is wrong
    except Exception:
        return True
    return False


def read_or_refuse(read: Callable[[], object]) -> object:
    """What `read` returns, or REFUSED where it raised a MocoError of one line; else it fails."""

    def hang(signum, frame):
        raise AssertionError(f"not done after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(MOST_SECONDS)
    try:
        return read()
    except MocoError as error:
        text = str(error)
        assert text and text.isprintable() and len(text) <= 4000, text[:300]
        return REFUSED
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What JSON and YAML can hold that a reader may not expect.
ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**64, 10**400, 0.0, 0.5, -0.0, 1e308,
     float("nan"), float("inf"), "", "0", "None", "nan", "x" * 3000, "a\nb", "\x1b[2J", "\u202e",
     "../x", "/etc/passwd", "(1,)", "-" * 3000, "[" * 3000, "{'a': 1}", "(1, 'a')", "()"]
)  # fmt: skip


KEYS = st.text(max_size=8)


def trees(leaves=ODD, keys=KEYS, most: int = 12):
    """Nested dicts and lists of `leaves`."""
    return st.recursive(
        leaves | st.text(max_size=20) | st.integers() | st.floats(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=most,
    )


@st.composite
def mutated(draw, data: bytes) -> bytes:
    """`data` after one to four changes of bytes."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(out)))
        length = draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64, 512]))
        action = draw(st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]))
        if action == "replace":
            out[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif action == "insert":
            out[at:at] = draw(st.binary(max_size=8))
        elif action == "delete":
            del out[at : at + length]
        elif action == "repeat":
            out[at:at] = out[at : at + length]
        else:
            del out[at:]
    return bytes(out)
