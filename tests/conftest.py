"""Shared fixtures: where the golden files lie, and how a test says that they are not there."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PHISIGHT_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands keep what they keep where no other test, nor the user, sees it."""
    monkeypatch.setenv("PHISIGHT_CACHE", str(tmp_path / "own cache"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers produced by the official reference code."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip(f"no golden files at {path}: set PHISIGHT_SHARED to the folder that holds golden/")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(golden: Path) -> Path:
    """A small random checkpoint with the real architecture and tensor names, in float32. Read only."""
    return golden / "tiny_model"


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint that a test may change."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    for file in tiny_checkpoint.iterdir():  # contents alone: the golden files may be read-only
        shutil.copyfile(file, directory / file.name)
    return directory


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(checkpoint, options of ExportOptions by name) -> its ONNX model directory, made once. Read only."""
    from phisight.export.checkpoint import Checkpoint
    from phisight.export.convert import export_onnx, plan_export
    from phisight.export.plan import ExportOptions

    root = tmp_path_factory.mktemp("exported")
    made: dict[tuple[object, ...], Path] = {}

    def export(directory: Path, **options: Any) -> Path:
        key = (directory, *sorted(options.items()))
        if key not in made:
            checkpoint = Checkpoint.open(directory)
            out = root / str(len(made))
            export_onnx(checkpoint, plan_export(checkpoint, ExportOptions(**options)), out)
            made[key] = out
        return made[key]

    return export


@pytest.fixture(scope="session")
def exported_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(checkpoint, options of GgufOptions by name) -> its GGUF model directory without ONNX, made once. Read only."""
    from phisight.export.checkpoint import Checkpoint
    from phisight.export.convert import export_gguf, plan_gguf
    from phisight.export.gguf_plan import GgufOptions

    root = tmp_path_factory.mktemp("exported_gguf")
    made: dict[tuple[object, ...], Path] = {}

    def export(directory: Path, **options: Any) -> Path:
        key = (directory, *sorted(options.items()))
        if key not in made:
            checkpoint = Checkpoint.open(directory)
            out = root / str(len(made))
            export_gguf(checkpoint, plan_gguf(checkpoint, GgufOptions(onnx_vision="none", **options)), out)
            made[key] = out
        return made[key]

    return export


@pytest.fixture(scope="session")
def synthetic_image() -> Callable[[str, int, int, int], Image.Image]:
    """The golden files' synthetic images: (mode, width, height, seed) -> image."""
    return _synthetic_image


def _synthetic_image(mode: str, width: int, height: int, seed: int) -> Image.Image:
    y = np.arange(height, dtype=np.int64)[:, None]
    x = np.arange(width, dtype=np.int64)[None, :]

    def plane(channel: int) -> NDArray[np.int64]:
        waves = 5 * (y >> 3) * (x >> 3) + ((x * y) >> 4)
        values: NDArray[np.int64] = (y * (7 + seed) + x * (13 + 2 * seed) + 61 * channel + waves) & 255
        return values

    if mode == "1":
        return Image.fromarray(plane(0) >= 128)
    if mode == "I;16":
        return Image.fromarray((256 * plane(0) + plane(1)).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((256 * plane(0) + plane(1)).astype(np.int32))
    if mode == "F":
        return Image.fromarray((plane(0) + 0.5).astype(np.float32))
    base = mode.removesuffix("+trns")
    channels = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}[base]
    data = np.stack([plane(channel) for channel in range(channels)], axis=-1).astype(np.uint8)
    image = Image.frombytes(base, (width, height), data.tobytes())
    if base == "P":
        colours = ((3 * i + 93, 5 * i + 155, 7 * i + 217) for i in range(256))
        image.putpalette([value & 255 for colour in colours for value in colour])
    if mode.endswith("+trns"):
        image.info["transparency"] = 0
    return image


@dataclass(frozen=True)
class Served:
    """A server that runs in a thread of the tests."""

    host: str
    port: int
    model: Any
    server: Any

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, key: str = "any", **options: Any) -> Any:
        """OpenAI's own client, which must not ask again by itself."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60} | options)

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        service = self.server.service
        return service.places.taken == 0 and service.engine.waiting == 0 and not service.engine.running

    def until_idle(self, seconds: float = 30) -> None:
        """Wait for it, no longer than so."""
        end = time.monotonic() + seconds
        while not self.idle:
            assert time.monotonic() < end
            time.sleep(0.01)

    @contextmanager
    def slowly(self, seconds: float = 0.02) -> Iterator[None]:
        """Every token takes this long, and no answer ends by itself."""
        decoder, steps = self.model._decoder, type(self.model._decoder).steps
        stop = list(self.model.manifest.model.generation.eos_token_ids)

        def slow(token_ids: Any, *, most: int) -> Any:
            time.sleep(seconds * len(token_ids))
            logits = steps(decoder, token_ids, most=most).copy()
            logits[..., stop] = np.float32(-1e9)
            return logits

        decoder.steps = slow
        try:
            yield
        finally:
            del decoder.steps


@contextmanager
def serving(**settings: Any) -> Iterator[Served]:
    """The built-in model behind a running server; settings are fields of Access and Limits, and slots."""
    import phisight
    from phisight.serve.server import Server, listen
    from phisight.serve.settings import Access, Limits, ServeSettings

    def of(kind: type) -> dict[str, Any]:
        return {field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings}

    model = phisight.load("demo", threads=1)
    server = Server(model, ServeSettings(("demo",), Access(**of(Access)), Limits(**of(Limits)), **settings))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served("127.0.0.1", listener.getsockname()[1], model, server)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Served]]:
    """`serving`, until the module's last test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(**settings))
