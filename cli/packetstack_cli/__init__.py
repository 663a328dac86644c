"""The `packetstack` command."""
