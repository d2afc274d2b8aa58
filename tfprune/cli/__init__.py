"""The command line; thin: each command calls the public functions and prints one report."""
