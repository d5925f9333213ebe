"""`python -m onelayer`, which is also what `torchrun -m onelayer` starts."""

import os
import sys

from onelayer.cli import main

if __name__ == "__main__":
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Threads that torch leaves behind after sharded training abort some processes (2 of 25 seen) while they end,
        # and torchrun then calls a run failed that is complete.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
