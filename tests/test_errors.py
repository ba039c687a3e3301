"""Every error says what happened and what to do, wherever it is taken."""

import copy
import pickle

import pytest

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
