"""sdrt/cli."""
