"""Does every name that the runner uses of ONNX Runtime exist, with room for the arguments that it is given?

The uses are read from the source, so a new call is checked without being listed here; only the kind of object that a
variable holds is.
"""

import ast
import inspect
import re
from pathlib import Path

import onnxruntime
import pytest

from sdrt.runners import bound_session

ROOT = Path(__file__).parents[2]
HOLDS = {
    "sdrt/runners/onnxruntime_session.py": {
        "onnxruntime": onnxruntime,
        "onnxruntime.OrtValue": onnxruntime.OrtValue,
        "onnxruntime.InferenceSession": onnxruntime.InferenceSession,
        "options": onnxruntime.SessionOptions,
        "session": onnxruntime.InferenceSession,
        "made": onnxruntime.RunOptions,
        "device": onnxruntime.OrtEpDevice,
        "part": onnxruntime.OrtEpAssignedSubgraph,
    },
    "sdrt/cli/doctor.py": {"onnxruntime": onnxruntime},
}
PLAYED = {
    bound_session.Session: onnxruntime.InferenceSession,
    bound_session.Binding: onnxruntime.IOBinding,
    bound_session.Value: onnxruntime.OrtValue,
}


def uses():
    for name, holds in HOLDS.items():
        tree = ast.parse((ROOT / name).read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in holds:
                yield name, holds[ast.unparse(node.value)], node.attr, calls.get(id(node))


def test_the_uses_are_found():
    found = {attribute for _, _, attribute, _ in uses()}
    assert {"register_execution_provider_library", "add_provider_for_devices", "preload_dlls", "ep_name"} <= found


@pytest.mark.parametrize(("file", "owner", "attribute", "call"), tuple(uses()))
def test_a_name_exists_and_takes_its_arguments(file, owner, attribute, call):
    value = getattr(owner, attribute)
    if call is None:
        return
    keywords = {keyword.arg: None for keyword in call.keywords}
    if inspect.isfunction(value) or value is onnxruntime.InferenceSession:
        own = [None] if inspect.isclass(owner) else []
        inspect.signature(value).bind(*own, *call.args, **keywords)
    else:  # compiled: its docstring begins with its signature, a constructor's is empty
        declared = (value.__doc__ or "").partition("->")[0]
        assert (len(call.args), keywords) == (len(re.findall(r"\barg[0-9]+:", declared)), {})


@pytest.mark.parametrize(
    ("protocol", "name"),
    [(protocol, name) for protocol in PLAYED for name in vars(protocol) if not name.startswith("_")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_bindings_are_asked_has_the_same_parameters_in_onnxruntime(protocol, name):
    ours = inspect.signature(getattr(protocol, name)).parameters
    theirs = inspect.signature(getattr(PLAYED[protocol], name)).parameters
    assert list(ours) == list(theirs)[: len(ours)]
    for added in list(theirs)[len(ours) :]:
        assert theirs[added].default is not inspect.Parameter.empty


def test_values_are_made_as_the_session_makes_them():
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    assert list(inspect.signature(made).parameters)[:3] == ["shape", "element_type", "device_type"]


def test_the_fallback_is_switched_off_by_its_name():
    """It is a keyword argument without a name in the signature, so a renamed one would be ignored."""
    assert 'kwargs.get("enable_fallback"' in inspect.getsource(onnxruntime.InferenceSession.__init__)
