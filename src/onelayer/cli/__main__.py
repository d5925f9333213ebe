"""`python -m onelayer.cli`."""

import sys

from onelayer.cli import main

if __name__ == "__main__":
    sys.exit(main())
