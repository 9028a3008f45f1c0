"""raise_malloc_thresholds keeps freed memory in the process (glibc would return it)."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from lightning_sparse import raise_malloc_thresholds
torch.set_num_threads(1)
raise_malloc_thresholds()

def step():
    kept = [torch.ones(1 << 18) for _ in range(8)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(5):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is known to return freed memory")
def test_intermediate_results_cause_no_page_faults() -> None:
    """8 MB per step are 2,000 pages; without ``raise_malloc_thresholds`` most processes have about 30,000 page faults."""
    assert int(subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout) < 100
