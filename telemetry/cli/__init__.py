"""The command line, `lmt`: one command a file."""


def main() -> int:
    """Entry point."""
    return 0
