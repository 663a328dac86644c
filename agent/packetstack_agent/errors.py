"""What can go wrong in the agent, as one line for the user."""


class AgentError(Exception):
    """One line: which thing, what is wrong with it, what would be right."""


class NativeError(AgentError):
    """A call into libpacketstack failed; the text is the library's own."""
