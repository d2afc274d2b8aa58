"""``python -m tfprune`` is the command line."""

from tfprune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
