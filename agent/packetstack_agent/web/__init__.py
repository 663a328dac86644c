"""How the agent is asked: one HTTP application, all of it on a unix socket, what only reads on a TCP port too."""
