"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a served model: the harness asks and scores, answers are kept as of any suite.

The package lm-eval is optional: it is imported when a task is asked for.
"""
