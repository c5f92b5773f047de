"""What importing costs, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = """
import sys
heavy = [name for name in ("torch", "transformers", "accelerate", "triton") if name in sys.modules]
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "code",
    [
        "import lm_telemetry",
        "import lm_telemetry.settings, lm_telemetry.schema, lm_telemetry.catalogue, lm_telemetry.instruments.base",
        "import lm_telemetry.queries, lm_telemetry.exporters.prometheus, lm_telemetry.writer, lm_telemetry.run",
        "from lm_telemetry.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from lm_telemetry.cli import main\nmain(['views'])",
        "from lm_telemetry.cli import main\nmain(['sql', 'select 1', '--store', '.'])",
    ],
)
def test_asking_needs_neither_torch_nor_transformers(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", f"{code}\n{HEAVY}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_console_scripts_are_installed():
    for script in ("lmt", "lm-telemetry"):
        path = Path(sys.executable).parent / script
        done = subprocess.run([path, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "sql" in done.stdout


def test_the_folders_are_not_top_level_packages(tmp_path):
    code = "import importlib.util as u; assert all(u.find_spec(n) is None for n in ('telemetry', 'hooks', 'exporters'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


ALLOWED = {
    "kernels": set(),
    "hooks": {"kernels", "errors"},
    "queries": {"schema", "catalogue", "errors", "remote", "store"},
    "exporters": {"schema", "catalogue", "columns", "errors", "queries", "writer", "settings", "meant", "terminal"},
}
TORCHLESS = ("queries", "exporters")


def imported(path):
    """Modules a file imports at run time; imports for the type checker only are left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports inside the project are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "lm_telemetry")


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in imported(path):
            parts = module.split(".")
            if parts[0] == "lm_telemetry" and len(parts) > 1:
                assert parts[1] in ALLOWED[folder] | {folder}, f"{path.relative_to(ROOT)} imports {module}"
            if folder in TORCHLESS:
                assert parts[0] not in {"torch", "transformers"}, f"{path.relative_to(ROOT)} imports {module}"
