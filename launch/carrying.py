"""Exceptions on their way from a rank to its caller, with their type, whatever their ``__init__`` looks like."""

from __future__ import annotations

import contextlib
import copyreg
import io
from typing import Any

import cloudpickle


def carried(error: BaseException) -> bytes:
    """An exception as bytes for `brought`; empty if even its type cannot travel."""
    for write in (cloudpickle.dumps, _dumps):
        # A type of the user's own may refuse to be pickled, or to be unpickled, in any way.
        with contextlib.suppress(Exception):
            data: bytes = write((error, tuple(each if _travels(each) else repr(each) for each in error.args)))
            if type(brought(data)) is type(error):
                return data
    return b""


def brought(data: bytes) -> BaseException:
    """The exception that `carried` was given, without its traceback and causes."""
    error: BaseException
    error, args = cloudpickle.loads(data)
    error.args = args
    return error


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Takes exceptions apart: for an ``__init__`` that wants other arguments, and contents that cannot travel.

    What it writes refers to nothing of ours: a rank knows this module by another name than its caller.
    """

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, BaseException):
            return super().reducer_override(obj)
        args = (each if _travels(each) else repr(each) for each in obj.args)
        state = {name: value for name, value in vars(obj).items() if _travels(value)}
        return copyreg.__newobj__, (type(obj), *args), state  # type: ignore[attr-defined]  # what pickle itself calls


def _dumps(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _travels(value: Any) -> bool:
    try:
        cloudpickle.loads(_dumps(value))
    except Exception:  # noqa: BLE001 - as above
        return False
    return True
