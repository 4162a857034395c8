"""The project's shape: which way imports point, what `import phisight` loads, what is portable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {"runtime": "phisight", "quant": "phisight.quant", "export": "phisight.export", "demo": "phisight.training"}
MAY_NOT_IMPORT = {
    "runtime": ("phisight.quant", "phisight.export", "phisight.training"),
    "quant": ("phisight.export", "phisight.training"),
    "export": ("phisight.training",),
    "demo": (),
}
AT_IMPORT_TIME = {"numpy", "PIL", "tokenizers", "jinja2", "phisight"}
POSIX_ONLY = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"}


def _sources(layer: str) -> Iterator[Path]:
    return (path for path in (ROOT / layer).rglob("*.py") if "__pycache__" not in path.parts)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    files = list(_sources(layer))
    assert len(files) > 3
    for path in files:
        if layer == "runtime" and "cli" in path.parts:  # the top of the program may reach everything
            continue
        for name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            assert not name.startswith(MAY_NOT_IMPORT[layer]), f"{path.relative_to(ROOT)} imports {name}"


def test_the_command_line_imports_exporters_only_when_it_uses_them() -> None:
    for path in (ROOT / "runtime/cli").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = list(_imports(node)) if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not any(name.startswith(("phisight.export", "phisight.quant")) for name in names), path.name


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_for_posix_alone(layer: str) -> None:
    for path in _sources(layer):
        roots = {name.split(".")[0] for name in _imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert not roots & POSIX_ONLY, f"{path.relative_to(ROOT)} imports {roots & POSIX_ONLY}"


def test_import_phisight_loads_no_engine() -> None:
    code = "import sys, phisight; print(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = set(_python(code).split()) - set(_python("import sys; print(' '.join(sys.modules))").split())
    third_party = loaded - set(sys.stdlib_module_names) - AT_IMPORT_TIME - {"markupsafe", "cython_runtime"}
    assert not third_party - {name for name in third_party if name.startswith("_")}, third_party


def test_the_runtime_answers_without_the_exporters_packages() -> None:
    code = """
import sys
for name in ("torch", "transformers", "onnx", "safetensors", "gguf", "ml_dtypes"):
    sys.modules[name] = None  # an import of it raises
import phisight
model = phisight.load("demo", threads=1)
picture = sys.argv[1]
print(model.generate("What does the text say?", [picture], options=model.options(temperature=0)).text)
"""
    assert _python(code, str(ROOT / "runtime/demo/pictures/price.png")).strip() == "$6.75"


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
