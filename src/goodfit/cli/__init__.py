"""The command line: one function per command, each a thin call of the api."""
