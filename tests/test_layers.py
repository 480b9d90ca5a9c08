"""Imports point downwards only: the layers of the source, and who may know which library."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# (layer, unit, module patterns): the first that fits. A module may import lower layers, and its own within its unit.
LAYERS = (
    # Commands that stand beside what they are about: before the pattern that would take them.
    (6, "convert", ("mscm.metrics.convert",)),
    (6, "reference", ("mscm.metrics.reference",)),
    (6, "selfcheck", ("mscm.metrics.selfcheck",)),
    (6, "report_command", ("mscm.report.__main__",)),
    (0, "types", ("mscm.types",)),
    (0, "compilation", ("mscm.compilation",)),
    (0, "terminal", ("mscm.output", "mscm.terminal")),
    (0, "files", ("mscm.arrays", "mscm.atomic", "mscm.failures", "mscm.processes", "mscm.remote", "mscm.torch_files")),
    (1, "diffusion", ("mscm.diffusion.schedule", "mscm.diffusion.prediction", "mscm.diffusion.steps")),
    (2, "diffusion", ("mscm.diffusion.denoiser", "mscm.diffusion.sampler", "mscm.diffusion.paths")),
    (2, "objectives", ("mscm.objectives.*",)),
    (2, "models", ("mscm.models.*",)),
    (3, "training", ("mscm.training.*",)),
    (4, "data", ("mscm.data.*",)),
    (4, "config", ("mscm.config",)),
    (4, "checkpoint", ("mscm.checkpoint",)),
    (4, "lease", ("mscm.lease",)),
    (4, "metrics", ("mscm.metrics.*",)),
    (4, "report", ("mscm.report.*",)),
    (4, "cost", ("mscm.cost.*",)),
    (5, "build", ("mscm.experiment", "mscm.methods", "mscm.sampling", "mscm.evaluation", "mscm.cli",
                 "mscm.run_flags", "mscm.process_flags", "mscm.sampler_flags", "mscm.training_loop",
                 "mscm.distributed", "mscm.planning", "mscm.evaluation_loop", "mscm.averages",
                 "mscm.comparison", "mscm.demonstration", "mscm.dry_run", "mscm.exporting", "mscm.replay",
                 "mscm.run_report", "mscm.score_rows", "mscm.stopping", "mscm.teachers")),
    (6, "main", ("mscm.main",)),
    (6, "eval", ("mscm.eval",)),
    (6, "sample", ("mscm.sample",)),
    (6, "demo", ("mscm.demo",)),
    (6, "export", ("mscm.export",)),
    (6, "prepare", ("mscm.prepare",)),
    (6, "plan", ("mscm.plan",)),
    (6, "compare", ("mscm.compare",)),
    (6, "import_teacher", ("mscm.import_teacher",)),
)

# What a unit may not import although its layer would allow it.
_MATHEMATICS = ("mscm.diffusion", "mscm.objectives", "mscm.models", "mscm.training")
FORBIDDEN = {
    "models": ("mscm.diffusion", "mscm.objectives", "mscm.training"),
    "objectives": ("optax", "flax", "mscm.training"),
    "data": _MATHEMATICS,
    "metrics": _MATHEMATICS,
    "report": _MATHEMATICS,
    "cost": _MATHEMATICS,
}

# Libraries that only the named units may import; the two modules of clu import TensorFlow.
RESERVED = {
    "orbax": ("checkpoint",),
    "ml_collections": ("config", "build", "main", "eval", "sample", "plan", "reference"),
    "tensorflow": (),
    "clu.metric_writers": (),
    "clu.periodic_actions": (),
}


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _modules(root: Path) -> dict[str, Path]:
    modules = {}
    for path in sorted((root / "mscm").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _place(module: str, path: Path, modules: dict[str, Path]) -> tuple[int, str] | None:
    """Layer and unit of a module. A package counts as the highest of its modules for those who import it."""
    if path.name == "__init__.py":
        below = [_place(name, p, modules) for name, p in modules.items() if name.startswith(module + ".")]
        return max((place for place in below if place), default=(0, module))
    for layer, unit, patterns in LAYERS:
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return layer, unit
    return None


def _imports(module: str, path: Path, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported, also inside functions and under TYPE_CHECKING."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                # "from mscm import types" imports a module, "from mscm.types import Level" a name of one. For other
                # libraries the full name is kept: "from clu import metric_writers" imports clu.metric_writers.
                yield node.lineno, source if _within(name, "mscm") and name not in modules else name


def violations(root: Path) -> list[str]:
    modules = _modules(root)
    found = []
    for module, path in modules.items():
        place = _place(module, path, modules)
        if place is None:
            found.append(f"{module} stands in no layer: add it to LAYERS in tests/test_layers.py")
            continue
        layer, unit = place
        for line, name in _imports(module, path, modules):
            where = f"{path.relative_to(root)}:{line}: {module} imports {name}"
            if any(_within(name, library) and unit not in units for library, units in RESERVED.items()):
                found.append(f"{where}, which is reserved to other modules")
            if any(_within(name, package) for package in FORBIDDEN.get(unit, ())):
                found.append(f"{where}, which {unit} must not know")
            elif not _within(name, "mscm"):
                continue
            elif path.name == "__init__.py":
                # Otherwise importing one module of a package would import all of them.
                found.append(f"{where}, but a package imports nothing of mscm")
            elif name not in modules:
                found.append(f"{where}, which does not exist")
            elif (target := _place(name, modules[name], modules)) is not None:
                if not (target[0] < layer or target == (layer, unit)):
                    found.append(f"{where}: layer {layer} ({unit}) may not reach layer {target[0]} ({target[1]})")
    return found


def test_imports_point_downwards():
    assert not violations(ROOT), "\n".join(violations(ROOT))


def _plant(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for package in path.relative_to(root).parents[:-1]:
            (root / package / "__init__.py").touch()
    return violations(root)


_TREE = {
    "mscm/types.py": "import jax\n",
    "mscm/diffusion/steps.py": "from mscm.types import Level\n",
    "mscm/diffusion/sampler.py": "from mscm.diffusion import denoiser, steps\n",
    "mscm/diffusion/denoiser.py": "from .prediction import to_x\n",
    "mscm/diffusion/prediction.py": "from ..types import Level\n",
    "mscm/objectives/diffusion.py": "from mscm.objectives import distance\nimport mscm.diffusion.steps\n",
    "mscm/objectives/distance.py": "",
    "mscm/models/uvit.py": "import flax.linen as nn\n",
    "mscm/training/step.py": "import optax\n",
    "mscm/metrics/moments.py": "",
    "mscm/checkpoint.py": "import orbax.checkpoint as ocp\n",
    "mscm/experiment.py": "import ml_collections\nfrom mscm import checkpoint\nfrom mscm.models import uvit\n",
    "mscm/evaluation.py": "from mscm import experiment\n",
    "mscm/main.py": "from ml_collections import config_flags\nfrom mscm import evaluation, experiment\n",
    "mscm/eval.py": "",
}


def test_checker_accepts_a_good_tree(tmp_path):
    assert _plant(tmp_path, _TREE) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("mscm/diffusion/steps.py", "from mscm.diffusion import sampler", "layer 1 (diffusion) may not reach layer 2"),
        ("mscm/diffusion/steps.py", "from . import sampler", "layer 1 (diffusion) may not reach layer 2"),
        ("mscm/types.py", "from mscm import diffusion", "layer 0 (types) may not reach layer 2"),
        ("mscm/types.py", "import mscm.experiment", "layer 0 (types) may not reach layer 5"),
        ("mscm/models/uvit.py", "from mscm.diffusion.steps import ddim", "models must not know"),
        ("mscm/models/uvit.py", "from ..diffusion import steps", "models must not know"),
        ("mscm/objectives/distance.py", "import optax", "objectives must not know"),
        ("mscm/objectives/distance.py", "from flax import linen", "objectives must not know"),
        ("mscm/objectives/distance.py", "from mscm.models import uvit", "may not reach layer 2 (models)"),
        ("mscm/objectives/distance.py", "from mscm.training import step", "objectives must not know"),
        ("mscm/diffusion/denoiser.py", "def f():\n    from mscm.training import step", "may not reach layer 3"),
        ("mscm/metrics/moments.py", "import mscm.diffusion.steps", "metrics must not know"),
        ("mscm/metrics/moments.py", "from mscm import checkpoint", "may not reach layer 4 (checkpoint)"),
        ("mscm/training/step.py", "import ml_collections", "reserved"),
        ("mscm/experiment.py", "from orbax import checkpoint", "reserved"),
        ("mscm/experiment.py", "from mscm.evaluation import score\nimport tensorflow as tf", "reserved"),
        ("mscm/experiment.py", "from clu import metric_writers", "reserved"),
        ("mscm/main.py", "from mscm import eval", "layer 6 (main) may not reach layer 6 (eval)"),
        ("mscm/main.py", "import mscm.nowhere", "does not exist"),
        ("mscm/models/__init__.py", "from mscm.models import uvit", "a package imports nothing of mscm"),
        ("mscm/helpers.py", "", "stands in no layer"),
        ("mscm/diffusion/helpers.py", "", "stands in no layer"),
    ],
)
def test_checker_finds_a_planted_import(tmp_path, file, text, complaint):
    found = _plant(tmp_path, _TREE | {file: text})
    assert len(found) == 1 and complaint in found[0], found
    assert ("stands in no layer" in complaint) or file in found[0]
