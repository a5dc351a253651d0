"""``python -m launch``: the same as ``ddpkit``."""

from ddpkit.__main__ import main

if __name__ == "__main__":
    main()
