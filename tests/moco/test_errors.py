"""Messages: one line, whatever a file's names hold."""

import pickle
import signal

import pytest

from moco.errors import CheckpointError, DataError, MocoError, Stopped, exit_on_error


def test_a_plain_message_is_kept():
    assert str(CheckpointError("a.pth: is damaged; give another é")) == (
        "a.pth: is damaged; give another é"
    )


@pytest.mark.parametrize(
    "given, shown",
    [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("a\u202eb", r"a\u202eb"), ("\udcff", r"\udcff")],
)
def test_what_steers_a_terminal_is_escaped(given, shown):
    assert str(DataError(f"x: {given}")) == f"x: {shown}"


def test_a_long_message_loses_its_middle():
    text = str(MocoError("start " + "x" * 100_000 + " end"))
    assert len(text) <= 4000 and text.startswith("start x") and text.endswith("x end")


def test_an_error_survives_its_way_from_a_worker_process():
    error = pickle.loads(pickle.dumps(DataError("a\nb")))
    assert type(error) is DataError and str(error) == r"a\nb"


@pytest.mark.parametrize(
    "error, status, out, err",
    [
        (DataError("a.png: is damaged"), 2, "", "error: a.png: is damaged\n"),
        (Stopped("stopped; start it again", signal.SIGINT), 130, "stopped; start it again\n", ""),
        (Stopped("stopped", signal.SIGTERM), 143, "stopped\n", ""),
        (KeyboardInterrupt(), 130, "", "stopped by Ctrl-C\n"),
        (SystemExit(7), 7, "", ""),
    ],
)
def test_how_a_command_line_ends(error, status, out, err, capsys):
    @exit_on_error
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, *capsys.readouterr()) == (status, out, err)
