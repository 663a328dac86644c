"""`packetstack-operator`."""


def main() -> None:
    """Run until told to stop."""
