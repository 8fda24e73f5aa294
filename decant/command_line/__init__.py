"""The command line: the menu, settings from files and flags, and what both may say."""
