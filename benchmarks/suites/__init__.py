"""The suites: which model, which cases, which bars."""
