"""The command itself: its verbs, its version, its help, and what it does not import."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import latteflow as package

RECIPE = Path(__file__).parents[2] / "recipes" / "imagenet-256" / "generator.yaml"
VERBS = ["generate", "ask", "info", "data", "train"]


def test_says_its_version(latteflow):
    outcome = latteflow("--version")
    assert (outcome.code, outcome.out) == (0, f"latteflow {package.__version__}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(latteflow, verb):
    assert verb in latteflow("--help").out
    outcome = latteflow(verb, "--help")
    assert outcome.code == 0
    assert f" {verb} [OPTIONS]" in outcome.out


@pytest.mark.parametrize("words", [["paint"], ["generate"], ["generate", "a", "--out", "x.png", "--steps", "few"]])
def test_wrong_usage_leaves_with_2_and_no_traceback(latteflow, words):
    outcome = latteflow(*words)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert outcome.err != ""


def test_an_unknown_data_set_is_named(latteflow):
    assert "no data set is named 'imagenet'; there is: emoji" in latteflow("data", "imagenet").mistake


def test_help_loads_nothing_heavy():
    code = "import sys; from latteflow.cli.main import app; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "torchao", "transformers", "diffusers", "pyarrow", "PIL", "accelerate"]
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words", [["info", "--preset", "smolvlm-256m"], ["train", str(RECIPE), "--dry-run"]], ids=" ".join
)
def test_what_libraries_say_of_torchao_is_not_heard(words):
    """They import it wherever it is installed; verbs that load no model leave their verbosity as it is."""
    command = [sys.executable, "-c", "from latteflow.cli.main import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_warnings_of_the_same_loggers_are_heard(latteflow, caplog):
    latteflow("--version")
    names = ["torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"]
    for name in names:
        log = logging.getLogger(name)
        log.addHandler(caplog.handler)  # diffusers' do not reach the root
        log.warning("something else")
        log.removeHandler(caplog.handler)
    assert {record.name for record in caplog.records if record.getMessage() == "something else"} == set(names)
