"""accelerate launch train.py recipe=NAME [key=value ...]: see --help."""

import sys

from dfkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
