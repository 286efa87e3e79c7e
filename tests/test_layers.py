"""Who may import whom: Ray stays in its wing, imports run in no circle, the library knows no job scripts."""

import ast
import importlib.util
import subprocess
import sys

import pytest
from conftest import ROOT

WITHOUT_RAY = ("hrm_lm.data", "hrm_lm.models", "hrm_lm.training", "hrm_lm.report")


def module_name(file) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): ast.parse(file.read_text()) for file in sorted((ROOT / "hrm_lm").rglob("*.py"))}


def imported(tree: ast.Module) -> list[str]:
    """Every module that is imported, at the top or in a function; of `from a import b` both a and a.b.

    What stands under `if __name__ == "__main__"` is a command, and not the module.
    """
    names = []
    nodes = [node for top in tree.body if not is_main(top) for node in ast.walk(top)]
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports here are absolute"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def is_main(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def of_package(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.slow
def test_data_models_training_and_reports_load_no_ray():
    modules = [module for module in MODULES if of_package(module, *WITHOUT_RAY)]
    if importlib.util.find_spec("triton") is None:  # PyTorch for CPUs comes without it
        modules.remove("hrm_lm.models.float8_kernels")
    code = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nassert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [module for module in MODULES if of_package(module, *WITHOUT_RAY)])
def test_data_models_training_and_reports_name_no_ray_in_any_function(module):
    assert not [name for name in imported(MODULES[module]) if of_package(name, "ray")]


def test_the_library_does_not_know_what_is_submitted():
    assert not [module for module, tree in MODULES.items() if any(of_package(n, "ray_jobs") for n in imported(tree))]


def test_what_ray_does_not_promise_is_used_in_three_files_of_one_package():
    private = ("ray.train._internal", "ray.train.v2", "ray.experimental", "ray._private", "ray.serve._private")
    users = {module for module, tree in MODULES.items() if any(of_package(n, *private) for n in imported(tree))}
    assert users == {"hrm_lm.cluster.ray_private", "hrm_lm.cluster.failures", "hrm_lm.cluster.scaling"}


def test_imports_run_in_no_circle():
    # Imports in functions count, too.
    graph = {module: {name for name in imported(tree) if name in MODULES} for module, tree in MODULES.items()}
    while free := {module for module, names in graph.items() if not names}:
        graph = {module: names - free for module, names in graph.items() if module not in free}
    assert not graph, f"these import one another, or what does: {sorted(graph)}"
