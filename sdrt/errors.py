"""Every error that sdrt raises on purpose, as one tree.

SdrtError
├── RequestError      the caller asked for something impossible (a bad argument: exit code 2)
├── CheckpointError   the model folder is missing, incomplete, hostile or of an unknown kind
├── ExportError       tracing a component, or its check against PyTorch, failed
├── BuildError        composing, compiling or sealing engines failed
├── BundleError       a bundle is damaged, of another version, or not a bundle
├── BackendError      a backend is absent, refuses the device, or failed while running
├── ParityError       a result is not what the reference says it must be (also: not finite)
├── OutputError       a result cannot be written where it was asked for
├── BusyError         the queue is full; the request may be sent again later
├── ClosedError       the batcher is closed for good; sending the request again does not help
└── Cancelled         the work was stopped on request (exit code 130)
"""

from collections.abc import Callable
from functools import partial


class SdrtError(Exception):
    """What happened, with the values, and in `hint` what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Callable[[str], "SdrtError"], tuple[str]]:
        """So that it can be copied, and sent to another process, whole."""
        return partial(type(self), hint=self.hint), (self.message,)


class RequestError(SdrtError):
    """An argument is outside what this bundle or command can do."""

    exit_code = 2


class CheckpointError(SdrtError):
    """The model folder cannot be used."""


class ExportError(SdrtError):
    """A component could not be traced or does not agree with PyTorch."""


class BuildError(SdrtError):
    """Engines could not be made or sealed."""


class BundleError(SdrtError):
    """The bundle cannot be opened as it is."""


class BackendError(SdrtError):
    """The backend cannot do what the bundle needs on this machine."""


class ParityError(SdrtError):
    """A result disagrees with its reference, or holds NaN or infinity."""


class OutputError(SdrtError):
    """The target of a result cannot be written."""


class BusyError(SdrtError):
    """There is no room for another request now."""


class ClosedError(SdrtError):
    """What was asked has ended, and will take no request again."""


class Cancelled(SdrtError):  # noqa: N818  (it is no failure)
    """The work was stopped on request."""

    exit_code = 130  # as of a program that Ctrl-C ended
