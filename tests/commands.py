"""Runs a command inside this process as `python -m mscm.NAME` would: a new process waits seconds for its imports."""

import runpy
import signal
import sys
import warnings

import pytest
from absl import app, logging
from absl.testing import flagsaver

import mscm
from mscm import stopping


def run(name: str, *words: str) -> int:
    """Exit code of `python -m mscm.NAME WORDS`; what it prints goes where this process prints.

    Its flags are defined and parsed from scratch, and all that is forgotten afterwards.
    """
    module = f"mscm.{name}"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    verbosity = logging.get_verbosity()
    with flagsaver.flagsaver(), warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # the suite's are errors; a process prints them
        # absl's own start-up happens once in a process.
        patch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(sys.argv)))
        patch.setattr(sys, "argv", [module, *words])
        patch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back
        patch.setattr(stopping, "_asked", None)
        patch.delitem(sys.modules, module, raising=False)
        for other in ("run_flags", "process_flags", "sampler_flags"):  # they define flags, as the command does
            patch.delitem(sys.modules, f"mscm.{other}", raising=False)
            patch.delattr(mscm, other, raising=False)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return ended.code
        finally:
            logging.set_verbosity(verbosity)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


def refusal(capfd: pytest.CaptureFixture, name: str, *words: str) -> str:
    """The one sentence of a command that ends with an error of the user's making: no traceback, exit code 2."""
    capfd.readouterr()
    return sentence(run(name, *words), capfd.readouterr().err)


def sentence(code: int, errors: str) -> str:
    """The one of a command that ended with `code` after it printed `errors`, which are the user's."""
    assert code == 2 and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line
