"""How well a model answers: suites of questions with checks, their answers, scores with intervals, and reports. Knows no HTTP."""
