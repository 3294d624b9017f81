"""The command line ``rdt``; its entry point is :func:`rdt_core.cli.entry.main`."""
