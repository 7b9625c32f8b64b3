"""Warming before the peak, as far as it is words and arithmetic: messages, a job's life, plans, rates, manifests.

The superpeer runs the jobs (`superpeer/jobs.py`); `dadi prefetch` asks for them (`dadi/cli/prefetch.py`).
"""
