"""Jobs that each run in a process of their own, so that none sees another's settings or memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection

from moco.child_processes import end_with_parent


@contextmanager
def own_processes(
    jobs: Mapping[str, tuple[Callable[[int], object], Callable[[], object]]],
) -> Iterator[dict[str, Callable[[int], None]]]:
    """The jobs as functions that run them in forked processes, which wait in between.

    Args:
        jobs: name -> (job, what its process does first).
    Yields: {name: function of the round's number}; it raises RuntimeError where its job does.
    """
    context = multiprocessing.get_context("fork")
    connections, processes = {}, []
    for name, (job, prepare) in jobs.items():
        connections[name], theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, job, prepare), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    try:
        yield {name: _caller(name, connection) for name, connection in connections.items()}
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _caller(name: str, connection: Connection) -> Callable[[int], None]:
    def call(number: int) -> None:
        connection.send(number)
        try:
            problem = connection.recv()
        except EOFError:
            problem = "its process died"
        if problem is not None:
            raise RuntimeError(f"{name}: {problem}")

    return call


def _serve(connection: Connection, job: Callable[[int], object], prepare: Callable) -> None:
    end_with_parent()
    prepare()
    while True:
        number = connection.recv()
        try:
            job(number)
        except Exception as error:  # whatever a job raises is told to the caller
            connection.send(f"{type(error).__name__}: {error}")
        else:
            connection.send(None)
