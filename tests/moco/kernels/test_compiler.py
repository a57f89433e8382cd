"""The compiler of the kernels: what it is given, and what is said where it fails."""

import os
import stat

import pytest

from moco.errors import ConfigError
from moco.kernels import cache, compiler


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


@pytest.fixture
def kept_in(monkeypatch, tmp_path):
    """The folder of builds; compiling is a copy of the source, and what it copies is counted."""
    monkeypatch.setenv(cache.SETTING, str(tmp_path / "kept"))
    monkeypatch.setattr(compiler, "_load", lambda folder: sorted(folder.glob("*.so")))
    compiled = []

    def compile_(command, folder):
        compiled.append(command)
        for source in compiler._SOURCES:
            compiler._library_path(folder, source).write_bytes(source.read_bytes())
        return 3.0

    monkeypatch.setattr(compiler, "_compile", compile_)
    return tmp_path / "kept", compiled


def built():
    return compiler._compiled.__wrapped__()


def test_a_second_process_loads_what_the_first_compiled(kept_in):
    folder, compiled = kept_in
    first, said = built()
    assert said == f"compiled in 3.0 s, kept in {folder}"
    second, said = built()
    assert said == f"compiled before, kept in {folder}"
    assert first == second and len(first) == len(compiler._SOURCES) and len(compiled) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [p for p in folder.iterdir() if p.name.startswith(cache._UNFINISHED)] == []


def test_what_a_build_depends_on_makes_another_build(kept_in, monkeypatch, tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    given = {"sources": [source], "compiler": "c++", "version": "12", "flags": ["-O3"]}
    keys = [cache.key(**given)]
    keys += [
        cache.key(**{**given, **other})
        for other in ({"compiler": "g++"}, {"version": "13"}, {"flags": ["-O2"]})
    ]
    monkeypatch.setattr(cache, "_processor", lambda: "another")
    keys.append(cache.key(**given))
    monkeypatch.undo()
    monkeypatch.setattr(cache.torch, "__version__", "2.10.0")
    keys.append(cache.key(**given))
    monkeypatch.undo()
    source.write_text("int b;")
    keys.append(cache.key(**given))
    assert len(set(keys)) == len(keys)
    source.write_text("int a;")
    assert cache.key(**given) == keys[0]


@pytest.mark.parametrize("damage", ["a changed file", "a file more", "no hashes", "torn hashes"])
def test_a_damaged_build_is_compiled_again(kept_in, damage):
    folder, compiled = kept_in
    first, _ = built()
    (build,) = folder.iterdir()
    if damage == "a changed file":
        first[0].write_bytes(b"other code")
    elif damage == "a file more":
        (build / "more.so").write_bytes(b"")
    elif damage == "no hashes":
        (build / cache._HASHES).unlink()
    else:
        (build / cache._HASHES).write_text("{")
    assert built()[1].startswith("compiled in") and len(compiled) == 2
    assert first[0].read_bytes() != b"other code" and built()[1].startswith("compiled before")


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(kept_in, mode):
    folder, compiled = kept_in
    built()
    folder.chmod(mode)
    assert built()[1] == "compiled in 3.0 s" and len(compiled) == 2
    folder.chmod(0o700)
    (build,) = folder.iterdir()
    build.chmod(mode)
    assert built()[1].startswith("compiled in 3.0 s, kept") and len(compiled) == 3
    (build,) = folder.iterdir()
    assert stat.S_IMODE(build.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_folder_is_not_used(kept_in, tmp_path):
    folder, compiled = kept_in
    built()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert built()[1] == "compiled in 3.0 s" and len(compiled) == 2


@pytest.mark.parametrize("setting", ["off", "0", ""])
def test_it_can_be_turned_off(kept_in, monkeypatch, setting):
    folder, compiled = kept_in
    monkeypatch.setenv(cache.SETTING, setting)
    assert [built()[1] for _ in range(2)] == ["compiled in 3.0 s"] * 2
    assert len(compiled) == 2 and not folder.exists()


def test_the_builds_used_last_are_kept(kept_in):
    folder, _ = kept_in
    built()
    (current,) = folder.iterdir()
    for i in range(cache._NUM_KEPT + 2):
        (folder / f"old{i}").mkdir()
        os.utime(folder / f"old{i}", (i, i))
    unfinished = cache.start(folder / "new")
    (unfinished / "a.so").write_bytes(b"a")
    assert cache.keep(unfinished, folder / "new")
    left = {path.name for path in folder.iterdir()}
    assert len(left) == cache._NUM_KEPT and {"new", current.name} <= left and "old0" not in left


def test_another_process_that_was_first_wins(kept_in):
    folder, _ = kept_in
    unfinished = [cache.start(folder / "build") for _ in range(2)]
    for i, path in enumerate(unfinished):
        (path / "a.so").write_bytes(bytes([i]))
    assert all(cache.keep(path, folder / "build") for path in unfinished)
    assert (folder / "build" / "a.so").read_bytes() == b"\0"
    assert [path.name for path in folder.iterdir()] == ["build"]


def test_files_that_cannot_be_loaded_there_are_compiled_elsewhere(kept_in, monkeypatch):
    folder, compiled = kept_in

    def load(path):
        if folder in path.parents:
            raise OSError("failed to map segment from shared object")
        return ["loaded"]

    monkeypatch.setattr(compiler, "_load", load)
    assert built() == (["loaded"], "compiled in 3.0 s") and len(compiled) == 2
