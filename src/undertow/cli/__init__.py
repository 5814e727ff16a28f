"""The command: parse, call one public function, print. Every error is one line; `--debug` shows the traceback."""

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from ..errors import UndertowError
from ..signals import TERMINATED, Terminated, interrupts, unwound_by_sigterm
from .check import check
from .completing import VARIABLE, answer
from .demo import demo
from .derive import derive
from .diagnose import diagnose
from .doctor import doctor
from .errors import error_line
from .explain import explain
from .export import export
from .models import models
from .printing import echo, echo_click_error, echo_error, nobody_reads, print_anywhere
from .quantiles import compare, quantiles
from .record import record, sites
from .report import WORDS, report
from .sweeps import status
from .trace import trace
from .trust import trust
from .view import view

INTERRUPTED = 130


class _App(click.Group):
    """The command; keeps the words it was called with, for what tells how it was made."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        words = list(args)
        context = super().make_context(info_name, args, parent, **extra)
        context.meta[WORDS] = words
        return context


@click.group(
    cls=_App,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Add --debug to any command to see the traceback behind an error.",
)
@click.version_option(package_name="undertow", message="%(prog)s %(version)s")
def app() -> None:
    """Show what flows backward through a neural network.

    \b
    undertow demo                                      packaged photographs, classifier and all three rules
    undertow explain cat.jpg --model torchvision:vgg16 which pixels spoke for the predicted class
    undertow trust cat.jpg --model demo                may that map be believed: six questions and a sentence
    undertow models resnet                             what can be named, and what of it works offline
    undertow record folder/ --model demo --out runs/a  each image's own gradients, into a run
    undertow quantiles runs/a                          what they are like, layer by layer
    undertow status runs/a                             how far it is, of many photographs or a long recording
    undertow check runs/a                              is all of it there, and as it was written
    undertow diagnose runs/a                           why gradients are zero, small or broken
    undertow report runs/a cats/                       one HTML page of it, to look at or to mail
    undertow view runs/a                               the same page, live, while a run is written
    undertow export runs/a --to tensorboard            also wandb, mlflow, csv, npz; maps too
    undertow trace --model demo                        what goes in and out of each layer, checked by formulas
    undertow derive chain "x1>n1 n1>n2" --wrt n1       the chain rule on paper, checked by numbers
    undertow doctor                                    what is installed here, and what works
    """


COMMANDS = (
    demo,
    explain,
    trust,
    models,
    sites,
    record,
    status,
    quantiles,
    compare,
    check,
    diagnose,
    report,
    view,
    export,
    trace,
    derive,
    doctor,
)
for command in COMMANDS:
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 done, 2 something could not be done, 1 a fault of our own.

    130 is Ctrl-C, and 143 is SIGTERM.
    """
    try:
        with warnings.catch_warnings(), unwound_by_sigterm(), interrupts() as interrupted:
            warnings.showwarning = _show_warning
            _run(list(sys.argv[1:] if arguments is None else arguments), interrupted)
    except Terminated:
        echo("terminated; what was finished is complete", err=True)
        sys.exit(TERMINATED)
    except KeyboardInterrupt:
        echo("interrupted; what was finished is complete", err=True)
        sys.exit(INTERRUPTED)


def _run(words: list[str], interrupted: Sequence[int]) -> None:
    """Run the command and exit; Ctrl-C, which `interrupted` tells from what a network raises itself, goes on."""
    if VARIABLE in os.environ:
        sys.exit(answer(app))
    print_anywhere()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else TensorFlow logs from C++, past Python
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        code = app.main(words, prog_name="undertow", standalone_mode=False, obj=debug)
    except click.ClickException as error:
        echo_click_error(error)
        sys.exit(error.exit_code)
    except Terminated:
        raise
    except (KeyboardInterrupt, SystemExit, click.Abort, BrokenPipeError) as error:
        if nobody_reads(error):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails at it once more at exit
            sys.exit(1)
        if interrupted and not isinstance(error, SystemExit):
            raise KeyboardInterrupt from error
        cause = error_line(error.__cause__ or error)
        echo_error(f"a network, or a file of yours, would end the program by {cause}; take that out")
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        echo_error(error_line(error))
        sys.exit(2 if isinstance(error, UndertowError | OSError) else 1)  # a disk that refuses is no fault of ours
    sys.exit(code if isinstance(code, int) else 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    echo(f"warning: {' '.join(str(message).split())}", err=True)
