"""`python -m packetstack_operator`."""

from packetstack_operator.main import main

main()
