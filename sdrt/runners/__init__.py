"""sdrt/runners."""
