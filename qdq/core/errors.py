"""The exceptions of qdq: every one carries the exit code that the command line ends with.

    QdqError                  2   anything a user can act on
    +- InputError             2   a file, an option or a sample is wrong
    |  +- ModelError          2   the ONNX model is wrong
    |  +- StaleFileError      2   a plan or a table made from another model
    +- MissingRuntimeError    3   a package or a device that this step needs is absent

A message is one paragraph: what, where, got, needed, fix. `engines.EngineError` and `calib_data.DataError` are
the roots of the two other packages, which import nothing of this one, and carry an `exit_code` too.
"""

from __future__ import annotations


class QdqError(Exception):
    """Root of what qdq raises on purpose; anything else is a bug of ours."""

    exit_code = 2


class InputError(QdqError):
    """A file, an option or a sample that the user gave is wrong."""


class ModelError(InputError):
    """The ONNX model is missing, broken, or not of a kind that qdq handles."""


class StaleFileError(InputError):
    """A plan or a table was made from another model than the one given."""


class MissingRuntimeError(QdqError):
    """A package or a device that this step needs is not on this machine."""

    exit_code = 3
