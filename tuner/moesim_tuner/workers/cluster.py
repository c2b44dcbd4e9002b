"""Tasks run on an existing Dask cluster, through its `concurrent.futures` executor.

A Dask worker cannot end a task that hangs, and one that dies takes its other tasks along. So what runs there is a pool
of our own (`moesim_tuner.workers.pool`), one for each Dask worker, as many processes as it has threads: deaths, time
limits and numeric threads are as on one machine. Dask moves tasks and rows, and tries elsewhere when a whole worker is
lost. A pool ends with the study, or when nothing came for two minutes.

Workers must have the same moesim, and read the same files under the same paths: the first is checked by the hash of the
code, the second by the hash of the first scenario each worker loads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import sys
import threading
import time
from concurrent.futures import CancelledError, Future, InvalidStateError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moesim.errors import BadInput
from moesim.policy import load_plugin
from moesim.scenario.load import load_scenario_text
from moesim_tuner.records import Row, Task
from moesim_tuner.workers.pool import PoolWorkers

__all__ = ["ClusterWorkers", "facts"]

_CONNECT_S = 5
_IDLE_S = 120.0


class ClusterWorkers:
    """`Workers` of the cluster whose scheduler is at `address`. Raises BadInput where nobody answers, where it has no
    workers, and where theirs is another moesim, Python or NumPy. `result()` of a future raises BadInput when the
    cluster is lost, or a worker turns out to have other files."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._client = _connected(address)
        try:
            _check_versions(self._client, address)
            self._executor = self._client.get_executor(pure=False, retries=0)
        except BaseException:
            self._client.close(timeout=2)
            raise
        self._facts = _here()
        self._known: set[str] = set()
        self._open: dict[Future[Any], Future[Row]] = {}
        self._lock = threading.Lock()
        self._checker = ThreadPoolExecutor(1, "moesim-cluster")
        self._closed = False

    @property
    def parallel(self) -> int:
        """Threads of all workers that are there now."""
        threads: dict[str, int] = self._client.nthreads()
        return max(1, sum(threads.values()))

    def submit(self, task: Task) -> Future[Row]:
        """The row, some time."""
        row: Future[Row] = Future()
        if self._closed:
            row.cancel()
            return row
        try:
            asked = self._executor.submit(_on_worker, task, self._timeout_s, self._facts)
        except Exception as error:  # noqa: BLE001  Dask's errors have no common base
            row.set_exception(self._lost(error))
            return row
        with self._lock:
            self._open[asked] = row
        asked.add_done_callback(functools.partial(self._landed, task))
        return row

    def close(self) -> None:
        """Cancel what is not done, end the pools on the workers, leave the cluster as it was."""
        self._closed = True
        with self._lock:
            left = list(self._open.items())
        for asked, row in left:
            asked.cancel()
            row.cancel()
        with contextlib.suppress(Exception):
            self._client.run(_release, wait=False)
        self._checker.shutdown(wait=False)
        with contextlib.suppress(Exception):
            self._client.close(timeout=2)

    def _lost(self, error: BaseException) -> BadInput:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return BadInput(f"the cluster at {self._address} is lost ({what[:300]}); start it again and resume the study")

    def _landed(self, task: Task, asked: Future[Any]) -> None:
        """Runs in Dask's own thread: nothing here may wait."""
        with self._lock:
            row = self._open.pop(asked)
        try:
            worker, found = asked.result()
        except BadInput as error:
            _fail(row, error)
            return
        except CancelledError as error:
            if self._closed:
                row.cancel()
            else:
                _fail(row, self._lost(error))
            return
        except Exception as error:  # noqa: BLE001  Dask's errors have no common base
            if type(error).__name__ == "KilledWorker":
                _settle(row, Row("failed", reasons=("the cluster's worker died with this task, again and again",)))
            else:
                _fail(row, self._lost(error))
            return
        if worker in self._known or (not found.scenario_hash and found.state == "failed"):
            _settle(row, found)
        else:
            self._checker.submit(self._check, task, worker, found, row)

    def _check(self, task: Task, worker: str, found: Row, row: Future[Row]) -> None:
        """Does the worker read the same files?"""
        try:
            here = _hash_here(task)
        except Exception as error:  # noqa: BLE001  in a thread of its own: told to whoever waits for the row
            _fail(row, error)
            return
        if here == found.scenario_hash:
            self._known.add(worker)
            _settle(row, found)
        elif not found.scenario_hash:
            reason = "; ".join(found.reasons)
            _fail(row, BadInput(f"worker {worker} cannot load the scenario, which is fine here: {reason}. {_SAME}"))
        else:
            what = "a model, a profile or traffic"
            _fail(row, BadInput(f"worker {worker} has another file than this machine under one name: {what}. {_SAME}"))


_SAME = "Workers need the same files under the same paths (a shared folder), and the same MOESIM_HOME"


def _settle(row: Future[Row], found: Row) -> None:
    with contextlib.suppress(InvalidStateError):
        row.set_result(found)


def _fail(row: Future[Row], error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):
        row.set_exception(error)


def _hash_here(task: Task) -> str:
    """Hash of the task's scenario as this machine loads it; "" where it is none."""
    try:
        for module in task.plugins:
            load_plugin(module)
        return load_scenario_text(task.text, Path(task.base), task.overrides, task.seed, task.name).hash
    except BadInput:
        return ""


# ---- the cluster


def _connected(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError:
        raise BadInput("--cluster needs Dask: pip install 'moesim[cluster]'") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # its warnings would tear the progress apart
    try:
        return Client(address, timeout=_CONNECT_S, set_as_default=False, name="moesim-tune")
    except (OSError, TimeoutError):
        reason = f"nobody answers there within {_CONNECT_S} s. Start `dask scheduler` and `dask worker`, or correct it"
    except Exception as error:  # noqa: BLE001  a wrong address, or versions that do not go together
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raise BadInput(f"--cluster {address}: {reason}")


def _check_versions(client: Any, address: str) -> None:
    try:
        found = client.run(facts, on_error="return")
    except Exception as error:  # noqa: BLE001  Dask's errors have no common base
        found = {address: error}
    if not found:
        raise BadInput(f"--cluster {address}: the scheduler has no workers. Start some with `dask worker {address}`")
    here = _here()
    for worker, there in found.items():
        if isinstance(there, BaseException):
            what = " ".join(f"{type(there).__name__}: {there}".split())[:300]
            raise BadInput(f"worker {worker} cannot run moesim_tuner: {what}. Install the same moesim there")
        _compare(here, there, str(worker))


def _compare(here: dict[str, str], there: dict[str, str], worker: str) -> None:
    different = [f"{name} {there[name]} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    if different:
        raise BadInput(
            f"worker {worker} must run what this machine runs: {', '.join(different)}. Install the same there"
        )


def _here() -> dict[str, str]:
    return facts()


@functools.cache
def facts() -> dict[str, str]:
    """What decides a row besides the task: versions of Python and NumPy, and the code of moesim, as a hash."""
    import numpy as np

    import moesim
    import moesim_tuner

    digest = hashlib.blake2b(digest_size=6)
    for package in (moesim, moesim_tuner):
        assert package.__file__ is not None
        root = Path(package.__file__).parent
        for file in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".yaml")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return {
        "Python": "{}.{}".format(*sys.version_info[:2]),
        "NumPy": np.__version__,
        "moesim": f"{moesim.__version__} ({digest.hexdigest()})",
    }


# ---- on a Dask worker


class _Rented:
    """A pool for one Dask worker, which ends when nobody has used it for a while."""

    def __init__(self, number: int, timeout_s: float) -> None:
        self.pool = PoolWorkers(number, timeout_s)
        self.timeout_s = timeout_s
        self.used = time.monotonic()
        self.busy = 0


_rented: dict[str, _Rented] = {}
_renting = threading.Lock()


def _on_worker(task: Task, timeout_s: float, wanted: dict[str, str]) -> tuple[str, Row]:
    """What Dask runs: a task on the pool beside this worker. Returns the worker's address with the row."""
    from distributed import get_worker

    worker = get_worker()
    _compare(wanted, facts(), worker.address)
    with _renting:
        rented = _rented.get(worker.address)
        if rented is not None and rented.timeout_s != timeout_s and not rented.busy:
            rented.pool.close()
            rented = None
        if rented is None:
            rented = _rented[worker.address] = _Rented(worker.state.nthreads, timeout_s)
            threading.Thread(target=_end_idle, args=(worker.address, rented), daemon=True).start()
        rented.busy += 1
    try:
        return worker.address, rented.pool.submit(task).result()
    finally:
        with _renting:
            rented.busy -= 1
            rented.used = time.monotonic()


def _end_idle(address: str, rented: _Rented) -> None:
    while True:
        time.sleep(_IDLE_S / 4)
        with _renting:
            if _rented.get(address) is not rented:
                return
            if not rented.busy and time.monotonic() - rented.used > _IDLE_S:
                del _rented[address]
                break
    rented.pool.close()


async def _release(dask_worker: Any) -> None:
    """End the pool of this worker."""
    with _renting:
        rented = _rented.pop(dask_worker.address, None)
    if rented is not None:
        threading.Thread(target=rented.pool.close, daemon=True).start()
