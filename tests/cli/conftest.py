"""The command as users run it: what ``main`` prints and how it leaves."""

import sys
from dataclasses import dataclass

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from latteflow.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def mistake(self):
        """The one line on stderr that a mistake of the user's becomes."""
        assert self.code == 2, self
        assert self.out == ""
        assert self.err.startswith("latteflow: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def latteflow(monkeypatch, capsys):
    """Run ``latteflow WORDS...`` and return its outcome."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["latteflow", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    diffusers_logging.set_verbosity_warning()
    diffusers_logging.enable_progress_bar()
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
