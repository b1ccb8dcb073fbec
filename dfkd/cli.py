"""The command line: `key=value` arguments and a few flags; errors are one line and exit code 2."""

import os
import shlex
import sys
from collections.abc import Sequence

from accelerate import PartialState

from dfkd import recipe as recipes
from dfkd.errors import UserError
from dfkd.models import list_models
from dfkd.run import dry_run, run
from generators import GENERATORS, GeneratorError

FLAGS = ("--list", "--help", "-h", "--print-config", "--dry-run")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 where the user must change something."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _act(given)
    except (UserError, GeneratorError) as error:
        _tell(str(error))
        if PartialState._shared_state and PartialState().num_processes > 1:
            # The other ranks may be waiting in a collective; leave at once, and the launcher ends them.
            sys.stderr.flush()
            os._exit(2)
        return 2


def _act(given: list[str]) -> int:
    flags = {argument for argument in given if argument.startswith("-")}
    unknown = sorted(flags - set(FLAGS))
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; choose from {', '.join(FLAGS)}; keys are given as key=value")
    if flags & {"--help", "-h"}:
        print(recipes.help_text())
        return 0
    if "--list" in flags:
        print(recipes.list_text(list_models(), sorted(GENERATORS)))
        return 0
    loaded = recipes.load_recipe([argument for argument in given if argument not in flags])
    if "--print-config" in flags:
        print(recipes.print_config(loaded))
    elif "--dry-run" in flags:
        dry_run(loaded)
    else:
        run(loaded, shlex.join(["accelerate", "launch", "train.py", *given]))
    return 0


def _tell(text: str) -> None:
    """An error on the main process, or on this one where it is not known yet which that is."""
    rank = int(os.environ.get("RANK", "0"))
    # The newline in the same write: print() writes it apart, and the lines of two processes may then run together.
    sys.stderr.write(f"error: {text}\n" if not rank else f"error (process {rank}): {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
