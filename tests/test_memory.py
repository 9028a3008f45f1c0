"""Freed memory stays with the process, where glibc's malloc would return it."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from lightning_sparse._memory import keep_freed
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed()

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is known to return freed memory")
def test_intermediate_results_cause_no_page_faults_once_freed_memory_is_kept():
    usual, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, word], check=True, capture_output=True, text=True).stdout)
        for word in ("usual", "keep")
    )
    assert kept < usual / 10, (usual, kept)
