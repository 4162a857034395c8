"""At the real widths, two layers deep: anonymous memory of the export and of a run. Soak only.

The checkpoint takes 4 GB of disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

LIMIT = 2 << 30
GGUF_LIMIT = 3 << 29
ROOT = Path(__file__).resolve().parent.parent

WATCHED = """
import sys, threading, time, psutil
from phisight.cli.main import main
peak = 0
def watch():
    global peak
    process = psutil.Process()
    while True:
        info = process.memory_info()
        peak = max(peak, info.rss - info.shared)
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
code = main(sys.argv[1:])
print("peak", peak, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="memory without file mappings is only told apart on Linux")
def test_memory(tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "checkpoint", tmp_path / "model"
    assert _peak("synth", str(checkpoint), "--layers", "2", "--width", "real") < LIMIT
    assert _peak("export", str(checkpoint), str(model), "--decoder", "int4") < LIMIT
    gguf = ["export", str(checkpoint), str(tmp_path / "gguf"), "--format", "gguf", "--decoder", "q4_0"]
    assert _peak(*gguf) < GGUF_LIMIT
    picture = tmp_path / "picture.png"
    Image.effect_noise((960, 960), 80).convert("RGB").save(picture)  # 3600 patches, the most there are
    run = ["run", str(model), "What is this?", "--image", str(picture), "--max-tokens", "8", "--temperature", "0"]
    assert _peak(*run) < LIMIT

    bench = [sys.executable, str(ROOT / "bench/stages.py"), str(model), "--grids", "16x16", "--prefill", "256"]
    done = subprocess.run(bench, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["peak_anonymous_mib"] * 2**20 < LIMIT


def _peak(*arguments: str) -> int:
    """Peak anonymous memory of a command in bytes."""
    done = subprocess.run([sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rsplit("peak ", 1)[1])
