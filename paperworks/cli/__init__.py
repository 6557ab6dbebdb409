"""The command line: `paperworks COMMAND ...`; every command is a module, imported only when it is asked for."""
