"""Parsers and decisions of cpr.linux, on recorded and on hostile texts."""
