"""Runs tests/test_webgpu.py on a software adapter, SwiftShader, which needs no GPU (Linux).

    python .ci/webgpu.py [PYTEST ARGUMENTS]

Makes a virtual environment in a temporary directory with onnxruntime-webgpu, which cannot share one with onnxruntime.
SwiftShader and the Vulkan loader come with Debian's packages chromium and libvulkan1; VK_ICD_FILENAMES names another
adapter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = "/usr/lib/chromium/vk_swiftshader_icd.json"


def main() -> int:
    adapter = os.environ.get("VK_ICD_FILENAMES", ADAPTER)
    if not Path(adapter).is_file():
        raise SystemExit(f"{adapter} is not there: apt install chromium libvulkan1, or set VK_ICD_FILENAMES")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[export,test]"], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime-webgpu>=1.27"], check=True)
        command = [python, "-m", "pytest", "-q", "-rs", "tests/test_webgpu.py", *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, "VK_ICD_FILENAMES": adapter}).returncode


if __name__ == "__main__":
    sys.exit(main())
