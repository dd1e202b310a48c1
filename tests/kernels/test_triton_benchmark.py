"""The benchmark for GPUs can be tried without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_a_dry_run_goes_through_all_parts(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--dry", "--json", str(tmp_path / "gpu.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["dry"]
    assert result["check"]["numbers"] > 100_000
    assert set(result["kernels"]) == {"bfloat16", "float32"}
    assert result["step"]["tiny"]["two forwards"]["ratio"] == 1.0
    assert set(result["goals"]) <= set(result)
