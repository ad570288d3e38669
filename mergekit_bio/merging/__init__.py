"""Plan, fold, write, verify."""
