"""Reports (level 4): pictures and tables that a person reads."""
