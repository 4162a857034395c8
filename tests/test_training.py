"""Training of the demo model: its forward pass is the runtime's, its rows of questions are prompts, a run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import tokenizers

import phisight
from phisight.export.names import EMBEDDINGS, HEAD
from phisight.sequence import IMAGE_SLOT
from phisight.tasks import TASKS, draw, grids_of, sample
from phisight.tasks.canvas import Canvas
from phisight.tasks.question import Question

torch = pytest.importorskip("torch", reason="PyTorch, the extra [train], is not installed")

from phisight.training import __main__ as command  # noqa: E402
from phisight.training.architecture import MODEL, first_weights  # noqa: E402
from phisight.training.batches import draw_batch, training_rng  # noqa: E402
from phisight.training.checkpoint import adopt, read_weights  # noqa: E402
from phisight.training.dialogue import Dialogue, make_rows  # noqa: E402
from phisight.training.forward import encode, logits, prompt_logits  # noqa: E402
from phisight.training.labels import GLYPHS, LABELS, label_patches  # noqa: E402
from phisight.training.losses import hidden_states  # noqa: E402
from phisight.training.optimizer import QUERY_KEY_BOUND, Buffers, slots, update  # noqa: E402
from phisight.training.recipe import CONTINUED, FROM_NOISE, rate_at  # noqa: E402
from phisight.training.vocabulary import Vocabulary, tokenizer_json  # noqa: E402

DEMO = Path(phisight.__file__).parent / "demo/checkpoint"


@pytest.fixture(scope="module")
def dialogue() -> Dialogue:
    return Dialogue(Vocabulary(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return read_weights(DEMO)


def test_the_runtime_computes_what_was_trained(weights: dict[str, torch.Tensor], exported: Callable[..., Path]) -> None:
    """Float32 logits of every position within 3e-4 of PyTorch's, and the same greedy answers, on 20 questions."""
    model = phisight.load(exported(DEMO, decoder="f32"), threads=2)
    greedy = model.options(temperature=0, max_tokens=60)
    for index in range(20):
        drawn = sample(TASKS[index % len(TASKS)], 7000 + index)
        images = [model.preprocess(picture) for picture in drawn.pictures]
        prompt = model.prompt(drawn.question.text, len(images))
        answer = [token.token_id for token in model.generate_tokens(prompt.ids, images, greedy)]
        ids = [*prompt.ids, *answer]
        with torch.inference_mode():
            sizes = iter(image.num_patches for image in images)
            known = torch.tensor([i for id_ in ids for i in ([-1] * next(sizes) if id_ == IMAGE_SLOT else [id_])])
            pictures = [(torch.tensor(image.pixel_values), image.grid) for image in images]
            wanted = prompt_logits(weights, MODEL, known, pictures).numpy()
        np.testing.assert_allclose(model.score(ids, images), wanted, rtol=0, atol=3e-4)
        said = wanted[-len(answer) - 1 :].argmax(-1).tolist()
        assert said == [*answer, MODEL.generation.eos_token_ids[0]]


@pytest.mark.parametrize("mode", ["think", "nothink"])
def test_a_block_is_a_prompt(dialogue: Dialogue, mode: phisight.prompt.Mode) -> None:
    """Opening, image tokens and a block are the ids that the runtime makes of the same question and answer."""
    prompts = phisight.load("demo", threads=1).prompts
    question = Question("chart", "value", "How tall is the red bar?", "red 3", "3", thinks=mode == "think")
    block, given = _block_in_its_own_way(dialogue, question)
    message = phisight.prompt.user_message(question.text, 1)
    built = prompts.build([message], mode=mode)
    prefix = [*dialogue.opening, IMAGE_SLOT, *dialogue.after_picture]
    assert [*prefix, *block][: len(built.ids)] == list(built.ids)
    assert len(prefix) + given == len(built.ids) - 1  # how the answer begins is learned
    spoken = "<think>red 3</think>3" if mode == "think" else "<|dummy_84|>3"
    rest = [*prefix, *block][len(built.ids) - 1 :]
    assert dialogue.vocabulary.text(rest) == spoken + "<|im_end|>"


def _block_in_its_own_way(dialogue: Dialogue, question: Question) -> tuple[list[int], int]:
    class Usual(Random):
        def random(self) -> float:
            return 0.99

    return dialogue.block(question, Usual())


def test_questions_that_share_a_picture_do_not_see_each_other(
    weights: dict[str, torch.Tensor], dialogue: Dialogue
) -> None:
    rng = training_rng("test")
    batch = draw_batch(rng, {"ground": 1, "read": 1}, 800, 100)
    rows = make_rows(dialogue, batch.questions, prefix=_prefix(dialogue, batch), length=100, rng=rng)
    assert rows.blind.any()
    assert (rows.blocks.max(1).values > 1).all()
    with torch.inference_mode():
        features = encode(weights, MODEL.vision, batch.patches, batch.grid)
        for row in range(2):
            for number in range(1, int(rows.blocks[row].max()) + 1):
                (places,) = (rows.blocks[row] == number).nonzero(as_tuple=True)
                wanted = (torch.full_like(places, row), places)
                hidden = hidden_states(weights, dialogue, rows, features, batch.per_row, wanted)
                pictures = [] if rows.blind[row][places[0]] else [(batch.patches[row], batch.grid)]
                slots_ = [-1] * (batch.grid[0] * batch.grid[1])
                before = [*dialogue.opening, *slots_, *dialogue.after_picture] if pictures else []
                alone = prompt_logits(weights, MODEL, torch.tensor([*before, *rows.ids[row][places]]), pictures)
                torch.testing.assert_close(logits(weights, hidden), alone[len(before) :], atol=2e-4, rtol=1e-4)


def _prefix(dialogue: Dialogue, batch: object) -> int:
    rows, columns = batch.grid  # type: ignore[attr-defined]
    return len(dialogue.opening) + batch.per_row * (rows * columns + len(dialogue.after_picture))  # type: ignore[attr-defined]


def test_thoughts_that_are_cut_are_not_learned(dialogue: Dialogue) -> None:
    question = Question("read", "code", "Read the code.", "A B C D", "ABCD", thinks=True)
    lengths = set()
    for seed in range(400):
        block, given = dialogue.block(question, Random(seed))
        thought = dialogue.vocabulary.text(block).partition("<think>")[2].partition("</think>")[0]
        learned = dialogue.vocabulary.text(block[given:])
        assert learned.endswith("ABCD<|im_end|>")
        if thought != "A B C D" and "<think>" in dialogue.vocabulary.text(block):
            assert learned == "ABCD<|im_end|>"
            lengths.add(len(thought))
    assert len(lengths) > 2


def test_labels_lie_where_the_things_are() -> None:
    names = list(LABELS)
    canvas = Canvas((64, 96), (255, 255, 255))
    canvas.marks.append(canvas.text("A7", 34, 40, "DejaVuSans", 14, (0, 0, 0)))
    canvas.shape("square", (200, 0, 0), "red", 80, 8, 12)
    labels, boxes = label_patches(canvas, (4, 6))
    grid = labels.reshape(4, 6, -1)
    first = grid[2, 2]  # its centre is at x 39, y 35
    assert first[names.index("glyph_left")] == GLYPHS.index("A") + 1
    assert first[names.index("glyph_right")] == 0 or first[names.index("place_right")] == 2
    assert grid[0, 5, names.index("shape")] == 2
    assert grid[0, 5, names.index("colour")] == 1
    assert (labels > 0).any(1).sum() <= 3
    assert (boxes == -1).all()


def test_labels_follow_a_picture_that_is_resized() -> None:
    canvas = Canvas((60, 90), (255, 255, 255))
    canvas.shape("circle", (200, 0, 0), "red", 61, 30, 12)  # comes to x 65, the fifth column, of 96 pixels
    labels, _ = label_patches(canvas, (4, 6))
    assert labels.reshape(4, 6, -1)[:, :, list(LABELS).index("shape")].nonzero()[1].tolist() == [4]


@pytest.mark.parametrize("task", ["read", "ground", "count", "chart"])
def test_every_drawn_picture_can_be_labelled(task: str) -> None:
    rng = Random(3)
    for _ in range(30):
        grid = rng.choice(grids_of(task))
        labels, _ = label_patches(draw(task, rng, grid).canvases[0], grid)
        assert (labels >= 0).all()
        assert (labels < np.array(list(LABELS.values()))).all()
        assert (labels > 0).any()


def test_muon_turns_a_gradient_into_an_orthogonal_step_and_queries_and_keys_stay_small() -> None:
    first = first_weights(0)
    placed = slots({name: tuple(tensor.shape) for name, tensor in first.items()}, 2)
    assert {slot.owner for slot in placed} == {0, 1}
    buffers = Buffers.zeros(placed[-1].end, 2)
    for slot in placed:
        slot.of(buffers.weights).copy_(first[slot.name])
    buffers.gradients.normal_(generator=torch.Generator().manual_seed(1))
    update(buffers, [(slot, 0.1) for slot in placed], 1)
    changed = {slot.name: slot.of(buffers.weights) for slot in placed}
    name = "model.layers.0.self_attn.o_proj.weight"
    step = (changed[name] - first[name] * (1 - 0.1 * 0.02)) / 0.1
    singular = torch.linalg.svdvals(step)
    assert singular.max() < 1.35  # Newton-Schulz leaves them near 1
    assert singular[: len(singular) // 2].min() > 0.6
    for _ in range(200):
        update(buffers, [(slot, 0.1) for slot in placed if "qkv_proj" in slot.name], 1)
    heads = changed["model.layers.0.self_attn.qkv_proj.weight"][:384].unflatten(0, (6, 64))
    sizes = heads.square().mean((1, 2)).sqrt() * MODEL.decoder.hidden_size**0.5
    assert sizes.max() <= QUERY_KEY_BOUND * 1.001
    assert sizes.max() > QUERY_KEY_BOUND * 0.9


def test_weights_adopted_from_another_vocabulary(tmp_path: Path) -> None:
    tokenizer = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["A"], ids["B"] = ids["B"], ids["A"]
    fresh = first_weights(1)
    adopt(fresh, DEMO, json.dumps(tokenizer))
    found = read_weights(DEMO)
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(fresh[name][ids["A"]], found[name][ids["B"]])
        assert torch.equal(fresh[name][ids["7"]], found[name][ids["7"]])


def test_the_rate_rises_and_falls() -> None:
    for stage in (*FROM_NOISE, *CONTINUED):
        assert 0 < rate_at(stage, 0) < stage.rate[0]
        assert rate_at(stage, stage.warmup) == pytest.approx(stage.rate[0], rel=0.1)
        assert rate_at(stage, stage.steps) == pytest.approx(stage.rate[1])
    assert FROM_NOISE[-1].rate[1] == CONTINUED[-1].rate[1] == 0


def test_the_vocabulary_is_the_shipped_one() -> None:
    assert tokenizer_json() == json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_smoke_run_that_is_cut_ends_as_one_that_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through the command line, from a trained checkpoint: at once, and in two parts."""
    options = ["--smoke", "--start", str(DEMO)]
    assert command.main([str(tmp_path / "whole"), *options]) == 0
    assert command.main([str(tmp_path / "parts"), *options, "--minutes", "1e-9"]) == 0
    assert not (tmp_path / "parts/checkpoint").exists()
    assert command.main([str(tmp_path / "parts"), *options]) == 0
    whole, parts = (tmp_path / name / "checkpoint/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == [stage.name for stage in CONTINUED]
    assert "time is up" in capfd.readouterr().out
    model = phisight.config.ModelConfig.from_checkpoint(tmp_path / "whole/checkpoint")
    assert model.decoder == MODEL.decoder
    assert model.images == MODEL.images
