"""`python -m panotriton`."""

import sys

from panotriton.cli import main

if __name__ == "__main__":
    sys.exit(main())
