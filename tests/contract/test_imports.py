"""The import table of docs/architecture.md, held against every source file."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUNTIME = {"numpy", "PIL", "tokenizers", "msgspec"}
RUNTIME_CONTRACTS = {"sdrt"}
ALLOWED = {
    "sdrt": RUNTIME | {"sdrt"},
    "sdrt/cli": RUNTIME | {"sdrt", "typer", "rich", "click"},
    "sdrt/runners": RUNTIME | {"sdrt", "openvino", "onnxruntime"},
    "export": {
        "sdrt",
        "numpy",
        "msgspec",
        "PIL",
        "torch",
        "diffusers",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
    }
    | {"safetensors", "onnx_ir"},
    "engines": {
        "sdrt",
        "numpy",
        "msgspec",
        "onnx",
        "google",
        "onnxruntime",
        "openvino",
        "PIL",
    },  # google.protobuf: onnx's
}
STAGES = {"export": "sdrt.export", "engines": "sdrt.engines", "benchmarks": "sdrt.benchmarks"}


def imported_modules(path: Path) -> set[str]:
    """Every absolute module name that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module)
            if node.module == "sdrt":
                found |= {f"sdrt.{alias.name}" for alias in node.names}
    return found


def files_of(folder: str) -> list[Path]:
    nested = {name for name in ALLOWED if name.startswith(folder + "/")}
    files = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if not any(path.is_relative_to(ROOT / name) for name in nested)]


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_the_table_allows(folder):
    files = files_of(folder)
    assert files
    for path in files:
        tops = {name.split(".")[0] for name in imported_modules(path)}
        surplus = tops - ALLOWED[folder] - set(sys.stdlib_module_names)
        assert not surplus, f"{path.relative_to(ROOT)} imports {sorted(surplus)}"


@pytest.mark.parametrize("folder", ["sdrt", "sdrt/cli", "sdrt/runners", "export", "engines"])
def test_no_stage_imports_another(folder):
    others = {module for name, module in STAGES.items() if name != folder}
    for path in files_of(folder):
        crossed = {
            name for name in imported_modules(path) if any(f"{name}.".startswith(f"{other}.") for other in others)
        }
        assert not crossed, f"{path.relative_to(ROOT)} imports {sorted(crossed)}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_sdrt_loads_no_heavy_module():
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "numpy", "PIL", "tokenizers"]
    loaded = run_python(f"import sys, sdrt, json; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))")
    assert json.loads(loaded) == []


def test_a_whole_image_is_made_without_torch_onnx_or_diffusers(tiny_bundle):
    code = (
        "import sys, json, sdrt\n"
        f"pipeline = sdrt.open({str(tiny_bundle)!r})\n"
        "pipeline.generate('a large red circle', num_inference_steps=2, seed=0)\n"
        "print(json.dumps([m for m in ('torch', 'diffusers', 'transformers', 'onnx') if m in sys.modules]))"
    )
    assert json.loads(run_python(code)) == []
