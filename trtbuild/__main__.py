"""`python -m trtbuild` and the console script."""

from __future__ import annotations


def main() -> None:
    """Runs the command line."""
    from trtbuild.cli import run

    raise SystemExit(run())


if __name__ == "__main__":
    main()
