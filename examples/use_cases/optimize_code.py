"""Optimization: asks for a faster version of a function, and keeps it only if it still gives the same results.

python examples/use_cases/optimize_code.py
"""

import re
import subprocess
import sys

from connection import ask

SLOW = """def unique(items):
    found = []
    for item in items:
        if item not in found:
            found.append(item)
    return found
"""
CHECK = "\nassert unique([3, 1, 3, 2, 1]) == [3, 1, 2]\nassert unique([]) == []\n"


def main() -> None:
    answer = ask(f"Make this Python function faster. It must keep the order. Answer with the code only.\n\n{SLOW}")
    block = re.search(r"```(?:python)?\n(.*?)```", answer, re.DOTALL)
    candidate = block[1] if block else answer
    print(candidate)
    # In a process of its own, which is ended if it hangs. It does not protect against code with bad intentions.
    command = [sys.executable, "-I", "-c", candidate + CHECK]
    try:
        works = subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    print("It gives the same results." if works else "It does not give the same results: the old version stays.")


if __name__ == "__main__":
    main()
