"""The command line, `dadi`: one file a verb; `main.py` puts them together."""
