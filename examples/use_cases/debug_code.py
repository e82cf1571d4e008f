"""Debugging: explains what is wrong with a program, given the program and the error that it raises.

python examples/use_cases/debug_code.py broken.py
"""

import subprocess
import sys
from pathlib import Path

from connection import ask, words

SAMPLE = "prices = [3, 5]\nprint(sum(prices) / count(prices))\n"


def main() -> None:
    names = words()
    source = Path(names[0]).read_text() if names else SAMPLE
    # The program is yours: do not run what you do not trust.
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode == 0:
        print("The program runs without an error.")
        return
    error = done.stderr.strip().splitlines()[-1]
    print(error)
    print(ask(f"This Python program fails with `{error}`. What is wrong, and how is it corrected?\n\n{source}"))


if __name__ == "__main__":
    main()
