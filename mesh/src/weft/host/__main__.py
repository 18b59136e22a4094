"""`python -m weft.host TARGET`."""

import sys

from weft.host.process import main

if __name__ == "__main__":
    sys.exit(main())
