"""Guards of the project's shape: import direction, public names, options, docs, sizes. Each fails when violated."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import goodfit
from goodfit.config.request import options

SOURCE = Path(goodfit.__file__).parent
REPOSITORY = SOURCE.parent.parent

# Lowest first; folders on one line never import each other. `runtime` must work without torch, so it lies at the bottom.
LAYERS = [
    {"core"},
    {"config", "runtime"},
    {"data", "models", "metrics"},
    {"tasks", "engine"},
    {"planning"},
    {"outcome", "watch"},
    {"api"},
    {"studies"},
    {"cli"},
]
TORCH_FREE = ("core", "config", "runtime", "cli", "watch")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PUBLIC = [
    "DataError", "ExportError", "GoodfitError", "OutOfMemory", "RequestError", "Run", "Stopped", "StorageError",
    "TrainingError", "WeightsError", "audit", "demo", "extend", "fit", "list_models", "plan", "predict", "resume",
    "test", "train",
]  # fmt: skip

OPTIONS = [
    "data", "model", "pretrained", "epochs", "time", "batch", "imgsz", "device", "seed", "project", "name",
    "exist_ok", "latency", "latency_threads", "plan", "task", "format", "image_column", "text_column", "label_column",
    "split_column", "group", "twins", "header", "encoding", "images", "annotations", "crowds", "labels", "like", "resplit", "split",
    "split_seed", "fraction", "max_bad", "suspects", "cache", "workers", "prefetch", "max_det", "augment", "policy", "erase",
    "close_augment", "flip", "mixup", "cutmix", "mosaic", "copy_paste", "scale", "multi_scale", "progressive", "balance", "optimizer", "lr",
    "lr_find", "head_lr", "layer_decay", "freeze", "unfreeze", "weight_decay", "momentum", "schedule", "warmup",
    "decay", "milestones", "period", "gamma", "lrf", "accumulate", "batch_study", "clip", "clip_value",
    "label_smoothing", "dropout", "drop_path", "ema", "swa", "patience", "min_delta", "monitor", "measure", "memory",
    "precision", "channels_last", "compile", "threads", "deterministic", "rehearse",
]  # fmt: skip


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imported_folders(path: Path) -> set[str]:
    """The goodfit folders that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "goodfit" and len(parts) > 1:
                found.add(parts[1])
    return found


def import_violations(root: Path) -> list[str]:
    level = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}
    found = []
    for path in sorted(root.rglob("*.py")):
        folder = path.relative_to(root).parts[0]
        if folder not in level:
            continue
        for other in imported_folders(path) & set(level):
            if other != folder and level[other] >= level[folder]:
                found.append(f"{path.relative_to(root)} imports {other}")
    return found


def test_folders_import_downwards_only():
    folders = {p.name for p in SOURCE.iterdir() if (p / "__init__.py").is_file()}
    assert folders == set().union(*LAYERS), "a folder without a place in the layers"
    assert import_violations(SOURCE) == []


def test_within_data_the_formats_and_the_checks_do_not_know_each_other():
    for path in (SOURCE / "data").rglob("*.py"):
        own = path.parent.name
        forbidden = {"formats": {"checks"}, "checks": {"formats"}}.get(own, {"formats", "checks"})
        for name in forbidden:
            assert f"goodfit.data.{name}" not in path.read_text("utf-8"), f"{path} imports {name}"


def test_the_import_check_sees_a_violation(tmp_path):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "bad.py").write_text("def f():\n    from goodfit.engine import loop\n")
    assert import_violations(tmp_path) == ["core/bad.py imports engine"]


def test_the_engine_never_imports_a_task():
    assert all("tasks" not in imported_folders(p) for p in (SOURCE / "engine").glob("*.py"))


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_folders_without_torch(folder):
    for path in (SOURCE / folder).rglob("*.py"):
        names = re.findall(r"^(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert not {"torch", "timm", "torchvision"} & set(names), path


def test_public_names():
    assert goodfit.__all__ == PUBLIC == sorted(PUBLIC, key=str)
    for name in PUBLIC:
        assert getattr(goodfit, name).__doc__, f"{name} has no docstring"


def test_options_are_frozen():
    assert list(options()) == OPTIONS


def test_every_option_is_helped_and_unambiguous():
    seen: set[str] = set()
    for name, option in options().items():
        assert option.help, name
        for spelling in (name, *option.aliases):
            assert spelling not in seen, f"{spelling} is spelled twice"
            seen.add(spelling)


def test_every_command_is_helped_and_in_the_readme():
    from goodfit.cli.main import COMMANDS, USAGE

    readme = (REPOSITORY / "README.md").read_text("utf-8")
    for name, command in COMMANDS.items():
        assert command.__doc__ and name in USAGE
        assert f"goodfit {name}" in readme, f"{name} is not in the README"


def test_files_and_functions_are_short():
    long = []
    for path in sources():
        text = path.read_text("utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            long.append(f"{path.relative_to(SOURCE)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
                long.append(f"{path.relative_to(SOURCE)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_public_functions_have_docstrings():
    missing = []
    for path in sources():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    missing.append(f"{path.relative_to(SOURCE)}: {node.name}")
                for child in node.body if isinstance(node, ast.ClassDef) else []:
                    public = isinstance(child, ast.FunctionDef) and not child.name.startswith("_")
                    if public and not is_protocol(node) and ast.get_docstring(child) is None:
                        missing.append(f"{path.relative_to(SOURCE)}: {node.name}.{child.name}")
    assert missing == []


def is_protocol(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def test_four_hops_from_command_to_update():
    """cli.train → api.train → engine.loop.fit → engine.step.train_step → optimizer.step, kept true by reading calls."""

    def calls(file: str, function: str) -> set[str]:
        tree = ast.parse((SOURCE / file).read_text("utf-8"))
        (node,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function]
        names = [c.func for c in ast.walk(node) if isinstance(c, ast.Call)]
        return {f.id if isinstance(f, ast.Name) else f.attr for f in names if isinstance(f, ast.Name | ast.Attribute)}

    assert "train" in calls("cli/main.py", "train")
    assert "fit" in calls("api/train.py", "train")
    assert "fit" in calls("api/train.py", "resume")
    assert "train_step" in calls("engine/loop.py", "fit")
    assert "step" in calls("engine/step.py", "train_step")


def test_nothing_runs_code_from_files():
    """No pickle, eval, exec, yaml tags or shell on any path: `yaml.load` only with the restricted loader."""
    pattern = re.compile(
        r"\b(pickle|marshal|shelve|joblib)\b|\b(eval|exec)\(|torch\.load\(|shell=True|extractall|os\.system"
    )
    found = []
    for path in sources():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            code = line.split("#")[0]
            if pattern.search(code) and '"""' not in code and ".eval(" not in code and "no pickle" not in code:
                found.append(f"{path.relative_to(SOURCE)}:{number}: {line.strip()}")
    assert found == []


@pytest.mark.parametrize("statement", ["import goodfit", "import goodfit.cli.main", "import goodfit.runtime"])
def test_imports_load_no_torch(statement):
    code = f"import sys; {statement}; print([m for m in ('torch', 'timm', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch():
    code = (
        "import sys; from goodfit.cli.main import main; main(['--help']); main(['train', '--help']); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--label-smoothing" in done.stdout
