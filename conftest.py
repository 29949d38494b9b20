# SPDX-License-Identifier: Apache-2.0
"""Tests run on the CPU, where they are exact; what only a GPU shows is asked for, see README.md."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
