# SPDX-License-Identifier: Apache-2.0
"""Tests run on the CPU, where they are exact; what only a GPU shows is asked for, see README.md."""

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# With AMX, products of more than 32 rows in bf16 round otherwise, also a long prompt's: the exact
# texts that tests compare with are those of a CPU without it. Read once, at import.
CPU_INFO = Path("/proc/cpuinfo")
if CPU_INFO.exists() and "amx_bf16" in CPU_INFO.read_text(encoding="utf-8"):
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX512")
