"""The command line: `key=value` arguments and a few flags; errors are one line and exit code 2."""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from accelerate import PartialState

from dfkd import recipe as recipes
from dfkd.assemble import TRAINABLE
from dfkd.dry_run import dry_run
from dfkd.errors import UserError
from dfkd.judge import FEWEST, IMAGES, USAGE, judge
from dfkd.models import list_models
from dfkd.run import run
from dfkd.runtime import command_of
from generators import GeneratorError

# What a flag takes: --FLAG=VALUE, or nothing.
FLAGS = {
    "--list": "",
    "--help": "",
    "-h": "",
    "--print-config": "",
    "--dry-run": "",
    "--quality": "SOURCE, a generator's folder, a folder of images, noise or real",
    "--images": f"an integer from {FEWEST}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 where the user must change something, 128 and more where a
    signal stopped it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _act(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # of `--list | head`: what is left to say nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (UserError, GeneratorError) as error:
        _tell(str(error))
        code = 2
    except KeyboardInterrupt as interrupt:
        _tell(str(interrupt) or "interrupted")
        code = 128 + signal.SIGINT
    if PartialState._shared_state.get("num_processes", 1) > 1:  # it may have been interrupted before it knows
        # The other ranks may be waiting in a collective; leave at once, and the launcher ends them.
        sys.stderr.flush()
        os._exit(code)
    return code


def _act(given: list[str]) -> int:
    flags = _flags([argument for argument in given if argument.startswith("-")])
    if flags.keys() & {"--help", "-h"}:
        print(f"{recipes.help_text()}\n{USAGE}")
        return 0
    if "--list" in flags:
        print(recipes.list_text(list_models(), list(TRAINABLE)))
        return 0
    loaded = recipes.load_recipe([argument for argument in given if not argument.startswith("-")])
    command = command_of(given)
    if "--print-config" in flags:
        print(recipes.print_config(loaded))
    elif "--dry-run" in flags:
        dry_run(loaded)
    elif "--quality" in flags:
        judge(loaded, flags["--quality"], int(flags.get("--images", IMAGES)), command)
    else:
        return run(loaded, command)
    return 0


def _flags(given: list[str]) -> dict[str, str]:
    """Flags with their values. Raises UserError for one that is unknown or takes no such value."""
    flags = {}
    for flag, equals, value in (argument.partition("=") for argument in given):
        if flag not in FLAGS:
            raise UserError(f"unknown option {flag}; choose from {', '.join(FLAGS)}; keys are given as key=value")
        if bool(FLAGS[flag]) != bool(value) or bool(equals) != bool(value):
            raise UserError(
                f"{flag}{equals}{value}: {flag} takes {f'=VALUE: {FLAGS[flag]}' if FLAGS[flag] else 'no value'}"
            )
        flags[flag] = value
    if "--images" in flags and not (flags["--images"].isdecimal() and int(flags["--images"]) >= FEWEST):
        raise UserError(f"--images={flags['--images']} is not allowed; it takes {FLAGS['--images']}")
    if "--images" in flags and "--quality" not in flags:
        raise UserError("--images says of how many images --quality is measured; give --quality=SOURCE too")
    if "--quality" in flags and flags.keys() & {"--dry-run", "--print-config"}:
        raise UserError("--quality goes with --images alone; leave --dry-run and --print-config out")
    return flags


def _tell(text: str) -> None:
    """An error on the main process, or on this one where it is not known yet which that is."""
    rank = int(os.environ.get("RANK", "0"))
    # The newline in the same write: print() writes it apart, and the lines of two processes may then run together.
    with suppress(BrokenPipeError):  # nobody reads it
        sys.stderr.write(f"error: {text}\n" if not rank else f"error (process {rank}): {text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
