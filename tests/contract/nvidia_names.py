"""Run where the `tensorrt` extra is installed: does every name that sdrt uses of TensorRT and CUDA exist, with room
for the arguments that it is given? Prints how many were checked, or what is wrong, and exits 1.

The uses are read from the source, so a new call is checked without being listed here; only the kind of object that a
variable holds is.
"""

import ast
import inspect
import re
import sys
from pathlib import Path

import tensorrt_rtx as trt
from cuda.bindings import driver
from cuda.bindings import runtime as cuda

# By file: what a variable or attribute of that name holds.
HOLDS = {
    "sdrt/runners/nvidia.py": {"runtime": cuda},
    "sdrt/runners/cuda_python.py": {
        "self._cuda": cuda,
        "self._cuda_driver": driver,
        "trt": trt,
        "self._runtime": trt.Runtime,
        "self.engine": trt.ICudaEngine,
        "config": trt.IRuntimeConfig,
        "context": trt.IExecutionContext,
        "self.context": trt.IExecutionContext,
        "cache": trt.IRuntimeCache,
        "refitter": trt.Refitter,
        "inspector": trt.EngineInspector,
        "self.library.module": trt,
    },
    "engines/tensorrt_child.py": {
        "trt": trt,
        "session.library.module": trt,
        "builder": trt.Builder,
        "network": trt.INetworkDefinition,
        "config": trt.IBuilderConfig,
        "profile": trt.IOptimizationProfile,
        "parser": trt.OnnxParser,
        "faults[0]": trt.ParserError,
        "timing": trt.ITimingCache,
        "engine": trt.IHostMemory,
    },
}


def main(root):
    checked, faults = 0, []
    for name, holds in HOLDS.items():
        tree = ast.parse((root / name).read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            for place, owner, attribute, call in uses(node, holds, calls):
                checked += 1
                fault = check(owner, attribute, call)
                if fault:
                    faults.append(f"{name}:{place}: {fault}")
    return checked, faults


def uses(node, holds, calls):
    """(line, owner, attribute, call or None) for each use of a known object in the node."""
    if isinstance(node, ast.Attribute):
        owner = holds.get(ast.unparse(node.value))
        if owner is None and isinstance(node.value, ast.Attribute):
            base = holds.get(ast.unparse(node.value.value))  # trt.BuilderFlag.REFIT
            owner = getattr(base, node.value.attr, None) if inspect.ismodule(base) else None
        if owner is not None:
            call = calls.get(id(node))
            yield node.lineno, owner, node.attr, None if call is None else [*call.args, *call.keywords]
    called = {"self._call": cuda, "self._driver_call": driver}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in called:
        yield node.lineno, called[ast.unparse(node.func)], node.args[0].value, node.args[1:]


def check(owner, attribute, arguments):
    if not hasattr(owner, attribute):
        return f"{getattr(owner, '__name__', owner)} has no {attribute}"
    value = getattr(owner, attribute)
    if arguments is None or inspect.isclass(value):
        return None
    counts = list(parameter_counts(value, method=inspect.isclass(owner)))
    if counts and not any(least <= len(arguments) <= most for least, most in counts):
        return f"{attribute} is given {len(arguments)} arguments, but takes {counts}"
    return None


def parameter_counts(function, *, method):
    """(least, most) for each overload; from the signature, or from the first lines of a pybind11 docstring."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        for text in re.findall(r"^(?:\d+\. )?\w+\((.*)\) -> ", function.__doc__ or "", re.MULTILINE):
            given = [part for part in split(text) if not part.startswith("self")]
            yield sum("=" not in part for part in given), len(given)
        return
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return
    own = parameters[1:] if method else parameters
    yield sum(parameter.default is parameter.empty for parameter in own), len(own)


def split(text):
    """At the commas that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


if __name__ == "__main__":
    count, wrong = main(Path(sys.argv[1]))
    print("\n".join(wrong) if wrong else f"{count} uses checked")
    sys.exit(bool(wrong))
