"""sdrt/plan."""
