"""Every error says what happened and what to do, wherever it is taken."""

import copy
import pickle

import pytest

import sdrt
from sdrt import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SdrtError)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("take", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))], ids=["copy", "pickle"])
def test_an_error_is_whole_in_a_copy_and_in_another_process(kind, take):
    error = kind("what happened", hint="what to do")
    taken = take(error)
    assert taken is not error
    assert type(taken) is kind
    assert (taken.message, taken.hint, str(taken)) == ("what happened", "what to do", "what happened")
    assert taken.exit_code == error.exit_code


def test_the_errors_that_a_service_tells_apart_are_public_and_not_each_other():
    public = [getattr(sdrt, name) for name in sdrt.__all__ if name in vars(errors)]
    named = [errors.BusyError, errors.Cancelled, errors.ClosedError, errors.RequestError]
    assert public == [*named, errors.SdrtError]
    assert not any(issubclass(one, other) for one in named for other in named if one is not other)
