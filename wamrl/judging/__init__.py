"""Judging policies in imagination, what `wamrl.evaluate` is made of.

settings: those of the run, checked. policies: who is judged. worlds: their episodes in the simulator and in
imagination. agreement: statistics of two judgements, on plain arrays. verdict: all of them together, and what to warn
of. outcome: results.json and episodes.csv. films: one start in both worlds.
"""
