"""Items made in other processes, in order, by torch's DataLoader."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch.utils.data

from goodfit.core.errors import GoodfitError


class Items(Protocol):
    """What is made one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Carried:
    """The same items; an error of ours is one, as torch would hand on its message alone, below a traceback."""

    items: Items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.items[number]
        except GoodfitError as error:
            return error


def made_in_processes(items: Items, workers: int, prefetch: int) -> Iterator[Any]:
    """All items in order, made in so many processes by torch's DataLoader, which only starts them and keeps the order.

    A process that dies is noticed at the next item, five seconds later at most, by an error that begins with "DataLoader worker".
    """
    with _without_torch_handler():
        made = iter(
            torch.utils.data.DataLoader(
                _Carried(items),
                batch_size=None,
                num_workers=min(workers, len(items)),
                prefetch_factor=prefetch,
                worker_init_fn=_ignore_signals,
            )
        )
    try:
        for item in made:
            if isinstance(item, GoodfitError):
                raise item
            yield item
    finally:
        del made  # a traceback that is kept would keep the processes


@contextlib.contextmanager
def _without_torch_handler() -> Iterator[None]:
    """Take out what torch sets for SIGCHLD: it raises wherever the main process is when a loader process dies, in the midst of an update
    too, where nothing can be saved."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if str(getattr(before, "__module__", "")).startswith("torch."):  # of a loader of somebody else's
        before = signal.SIG_DFL
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def _ignore_signals(_worker: int) -> None:
    """Signals reach every process of a group; the main one decides what follows, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
