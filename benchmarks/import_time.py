"""Seconds that `import lapa` adds to `from transformers import AutoModel`, each in a fresh process.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

SCRIPT = """
import time
start = time.perf_counter()
from transformers import AutoModel
middle = time.perf_counter()
import lapa
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    runs = []
    for _ in range(7):
        output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        runs.append([float(value) for value in output.split()])
    auto_model, lapa = (statistics.median(column) for column in zip(*runs))
    print(f"from transformers import AutoModel: {auto_model:.2f} s; import lapa after it: {lapa:.3f} s (medians of 7)")


if __name__ == "__main__":
    main()
