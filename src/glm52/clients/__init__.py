"""Real clients against the server, and a matrix of what works: ``glm52 agent-check``."""
