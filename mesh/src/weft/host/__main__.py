"""`python -m weft.host TARGET`."""

from weft.host.process import leave, main

if __name__ == "__main__":
    leave(main())
