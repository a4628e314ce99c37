"""The package as a whole: its version, what importing it does, and what its requirements promise."""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import latteflow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}" in SpecifierSet(PROJECT["requires-python"])]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
    if not line.startswith("latteflow[")
]
CALLERS = {"aiohttp", "ftplib", "httpx", "httpx2", "requests", "smtplib", "socket", "telnetlib", "urllib", "urllib3"}
"""Packages that talk to the network by themselves: pictures, prompts and weights are nobody else's business."""
FETCH = [
    "src/latteflow/serve/api/fetch.py: httpx",
    "src/latteflow/serve/deploy/cluster.py: socket",
    "src/latteflow/serve/page/client.py: httpx",
]
"""The exceptions: pictures that a server's client names, from domains that its owner names, none by default; and the
page, which asks the server that it is part of; and a look whether a port is free, before Ray takes it."""


def python(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter whose working and home folder is ``folder``."""
    home = {name: str(folder) for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME")}
    environment = {**os.environ, **home, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def pin_of(name: str, python_version: str) -> Requirement | None:
    """The pin that pip would go by on that Python."""
    for pin in PINS:
        applies = pin.marker is None or pin.marker.evaluate({"python_version": python_version})
        if normalised(pin.name) == normalised(name) and applies:
            return pin
    return None


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def only_version(pin: Requirement) -> str:
    [specifier] = pin.specifier
    return specifier.version


def test_version_is_that_of_the_newest_release_in_the_changelog():
    releases = re.findall(r"^## \[(\d[^]]*)] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == latteflow.__version__


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == latteflow.__version__
    assert citation["version"] == latteflow.__version__
    assert importlib.metadata.version("latteflow") == latteflow.__version__


def test_command_prints_the_version():
    command = shutil.which("latteflow", path=str(Path(sys.executable).parent))
    assert command is not None, "the command is not installed beside the interpreter"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"latteflow {latteflow.__version__}\n", "")


@pytest.mark.parametrize("module", ["latteflow", "latteflow.errors", "latteflow.cli.main"])
def test_importing_loads_nothing_heavy(module, tmp_path):
    heavy = {
        "torch",
        "torchao",
        "numpy",
        "transformers",
        "diffusers",
        "datasets",
        "pyarrow",
        "accelerate",
        "PIL",
        "rich",
    }
    done = python(f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))", tmp_path)
    assert done.returncode == 0, done.stderr
    assert heavy & set(json.loads(done.stdout)) == set()


def test_public_names_are_found_when_first_used(tmp_path):
    code = """
import latteflow
transformer = latteflow.LatteFlowTransformer
from latteflow import LatteFlowPipeline
import latteflow.models.transformer, latteflow.pipeline
assert transformer is latteflow.models.transformer.LatteFlowTransformer
assert LatteFlowPipeline is latteflow.pipeline.LatteFlowPipeline
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_all_names_what_there_is():
    assert {"LatteFlowPipeline", "LatteFlowTransformer", "__version__"} <= set(latteflow.__all__)
    assert all(hasattr(latteflow, name) for name in latteflow.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LatteFlowPipelin"):
        _ = latteflow.LatteFlowPipelin
    with pytest.raises(ImportError):
        importlib.import_module("latteflow.no_such_module")


def test_importing_has_no_side_effects(tmp_path):
    """Every module; libraries are loaded first, so that what they do is not held against us."""
    modules = [
        "latteflow." + ".".join(file.relative_to(ROOT / "src/latteflow").with_suffix("").parts)
        for file in sorted((ROOT / "src/latteflow").rglob("*.py"))
        if file.stem not in ("__init__", "__main__")
    ]
    code = """
import importlib, io, os, sys, warnings
import torch, transformers, diffusers
from diffusers import AutoencoderDC, DiffusionPipeline
from transformers import Qwen2VLForConditionalGeneration
for extra in ("accelerate", "gradio", "peft", "pyarrow", "ray.serve"):
    try:
        importlib.import_module(extra)
    except ImportError:
        pass
def state():
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "files": set(os.listdir()),
        "random": torch.get_rng_state().tolist(), "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(), "gradients": torch.is_grad_enabled(), "filters": list(warnings.filters),
    }
before = state()
sys.stdout = sys.stderr = io.StringIO()
for module in sys.argv[1:]:
    importlib.import_module(module)
said, sys.stdout, sys.stderr = sys.stdout.getvalue(), sys.__stdout__, sys.__stderr__
assert said == "", said
after = state()
changed = [name for name in before if after[name] != before[name]]
assert changed == [], [(name, before[name], after[name]) for name in changed]
"""
    done = python(code, tmp_path, *modules)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_prints_nothing_and_writes_no_file(tmp_path):
    code = "import os; before = dict(os.environ); import latteflow; assert dict(os.environ) == before"
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_the_package_calls_out():
    """No telemetry: only the libraries' own downloads, of what the user names, leave the machine."""
    found = []
    for file in sorted((ROOT / "src/latteflow").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{name.name}" for name in node.names]
            for name in names:
                if name.startswith("urllib.parse"):
                    continue  # takes addresses apart, and asks nobody
                if name.split(".")[0] in CALLERS or name.startswith("http.client"):
                    found.append(f"{file.relative_to(ROOT).as_posix()}: {name}")
    assert found == FETCH


def test_torchvision_is_absent_or_works():
    """A torchvision that is there and cannot be imported breaks the image processors of transformers."""
    if importlib.util.find_spec("torchvision") is not None:
        importlib.import_module("torchvision")
    assert not any(normalised(requirement.name) == "torchvision" for requirement in (*REQUIREMENTS, *PINS))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_pins_are_within_the_ranges(requirement):
    for version in PYTHONS:
        pin = pin_of(requirement.name, version)
        if pin is not None:
            assert requirement.specifier.contains(only_version(pin)), f"{pin} is not in {requirement}"


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_everything_needed_to_run_is_pinned_on_the_newest_python(line):
    assert pin_of(Requirement(line).name, PYTHONS[-1]) is not None


@pytest.mark.parametrize("pin", [pin for pin in PINS if pin.marker is None or pin.marker.evaluate()], ids=str)
def test_pins_can_be_installed_on_every_python_we_promise(pin):
    # What a version needs is known of the versions that are here: those pinned for this Python.
    installed = importlib.metadata.metadata(pin.name)
    assert installed["Version"].split("+")[0] == only_version(pin)
    wanted = [v for v in PYTHONS if pin.marker is None or pin.marker.evaluate({"python_version": v})]
    needs = SpecifierSet(installed["Requires-Python"] or "")
    assert [version for version in wanted if f"{version}.99" not in needs] == [], f"{pin} needs Python {needs}"


def test_makefile_and_ci_name_the_same_pythons_as_the_package():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    bounds = re.search(r"\((3, \d+)\) <= sys.version_info < \((3, \d+)\)", makefile)
    assert bounds is not None
    lowest, above = (tuple(map(int, bound.split(", "))) for bound in bounds.groups())
    assert [f"3.{minor}" for minor in range(lowest[1], above[1])] == PYTHONS
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["linux"]["strategy"]["matrix"]["python"] == PYTHONS
