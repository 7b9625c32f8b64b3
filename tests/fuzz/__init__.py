"""Everything that parses bytes from outside, fed with bytes from outside: by hypothesis in CI, by atheris at leisure.

`targets.py` is the list, `seeds.py` what they take to begin with, `snapshotter.py` a target of more than a line.
`test_fuzz.py` runs each of them for a moment; `make fuzz` (`__main__.py`) runs them for as long as one likes, keeps
what it learnt in `.cache/fuzz`, and stops at the first input that breaks the rule. Such an input goes into
`crashes/TARGET.what` as a file: `test_fuzz.py` feeds those too, for ever.
"""
