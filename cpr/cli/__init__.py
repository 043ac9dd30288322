"""The command line: parse, call `cpr.app`, print, map the exit code. Only here is typer imported."""
