"""Clips say what their sentence says, and are functions of sentence and seed."""

import dataclasses

import numpy as np
import pytest
import torch

from fpsc.demo.clips import (
    COLOURS,
    DIRECTIONS,
    EXAMPLE,
    FRAMES,
    HEIGHT,
    TEMPLATE,
    TEXT_DIM,
    TEXT_TOKENS,
    VOCABULARY,
    WIDTH,
    PromptError,
    Scene,
    clip,
    encode_prompt,
    parse_prompt,
    random_scene,
    render,
)

SCENE = parse_prompt(EXAMPLE)


def scene(**changes: str) -> Scene:
    return dataclasses.replace(SCENE, **changes)


def drawn(of: Scene, seed: int = 3, **kwargs: int) -> torch.Tensor:
    return render(of, np.random.RandomState(seed), **kwargs)


def covered(picture: torch.Tensor, colour: str) -> torch.Tensor:
    """bool [F, H, W]: pixels of exactly this colour; a texture's dark half is another colour."""
    target = torch.tensor(COLOURS[colour])[:, None, None, None] * 2 - 1
    return ((picture - target).abs() < 1e-3).all(0)


def centre(mask: torch.Tensor) -> torch.Tensor:
    """float [2]: mean (y, x) of a mask [H, W]."""
    return mask.nonzero().float().mean(0)


def test_the_same_seed_gives_the_same_clip_and_another_seed_another() -> None:
    first, said = clip(11)
    again, said_again = clip(11)
    other, _ = clip(12)
    assert first.shape == (3, FRAMES, HEIGHT, WIDTH) and first.dtype == torch.float32
    assert torch.equal(first, again) and said == said_again
    assert not torch.equal(first, other)
    assert first.min() >= -1 and first.max() <= 1


def test_pixels_are_pinned() -> None:
    """Shipped weights were trained on these pixels: a change of the drawing must be noticed."""
    picture, said = clip(5)
    assert said.prompt == (
        "a red square moves up in front of a striped green disc moving right over stripes "
        "drifting left"
    )
    assert picture.double().mean().item() == pytest.approx(-0.1894885, abs=1e-5)
    assert picture.double().square().mean().item() == pytest.approx(0.1432123, abs=1e-5)


@pytest.mark.parametrize("frames", [1, 4, 15])
def test_a_part_of_a_clip_is_cut_from_the_whole(frames: int) -> None:
    whole = drawn(SCENE)
    assert torch.equal(drawn(SCENE, frames=frames, first=1), whole[:, 1 : 1 + frames])
    part = drawn(SCENE, frames=frames)  # somewhere in it
    places = range(FRAMES - frames + 1)
    assert sum(torch.equal(part, whole[:, p : p + frames]) for p in places) == 1


@pytest.mark.parametrize("frames", [0, 17])
def test_lengths_that_a_clip_does_not_have(frames: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1\.\.16"):
        drawn(SCENE, frames=frames)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", ["disc", "square", "triangle"])
def test_the_front_shape_moves_where_the_sentence_says(shape: str, direction: str) -> None:
    masks = covered(drawn(scene(front_shape=shape, front_direction=direction)), "red")
    moved = centre(masks[10]) - centre(masks[5])  # the middle, where no edge cuts it
    along = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    assert 5 * 1.8 <= moved @ along <= 5 * 2.6
    assert abs(moved @ along.flip(0)) < 0.5


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_back_shape_moves_where_the_sentence_says(direction: str) -> None:
    """Through a front so small that its place does not count: the box of what is blue moves."""
    picture = drawn(scene(back_direction=direction, back_shape="square"))
    blue = (picture[2] - picture[0]) > 0.15  # both halves of the texture, not grey, not red
    moved = box_centre(blue[14]) - box_centre(blue[1])
    along = torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
    assert 13 * 0.6 - 1.5 <= moved @ along <= 13 * 1.2 + 1.5


def box_centre(mask: torch.Tensor) -> torch.Tensor:
    places = mask.nonzero().float()
    return (places.amin(0) + places.amax(0)) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_front_shape_hides_the_back_one(seed: int) -> None:
    """All of the front shape is seen while it passes, and a part of the back one is not."""
    with_back = drawn(scene(front_shape="square"), seed)
    front = covered(with_back, "red")
    areas = front.sum((1, 2)).float()
    meeting = int(0.5 * FRAMES)
    assert areas[meeting] >= 0.9 * areas.max()
    blue = ((with_back[2] - with_back[0]) > 0.15).sum((1, 2))
    assert blue.min() < 0.9 * blue.max()


@pytest.mark.parametrize("ground", ["stripes", "checks"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_ground_drifts_where_the_sentence_says(ground: str, direction: str) -> None:
    picture = drawn(scene(ground=ground, ground_direction=direction))
    before, after = picture[0, 7], picture[0, 9]
    dy, dx = DIRECTIONS[direction]
    border = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    border[6:-6, 6:-6] = False  # where no shape is in these frames

    def mismatch(pixels: int) -> float:
        shifted = torch.roll(before, (pixels * dy, pixels * dx), (0, 1))
        return float((shifted - after)[border].abs().mean())

    # 2 frames at 0.75 to 1.5 pixels: 2 or 3 pixels forwards explain it better than any backwards.
    assert min(mismatch(2), mismatch(3)) < min(mismatch(p) for p in (0, -1, -2, -3))


def test_edges_are_antialiased() -> None:
    levels = drawn(scene(ground="stripes", front_shape="disc"))[:, 8].unique()
    assert levels.numel() > 50


def test_sentences_are_read_back() -> None:
    rng = np.random.RandomState(0)
    for _ in range(200):
        said = random_scene(rng)
        assert parse_prompt(said.prompt) == said
        assert said.front_colour != said.back_colour
    assert parse_prompt("  " + EXAMPLE.upper() + ".") == SCENE


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "ends after 0 words"),
        ("a cat", "word 2 of the prompt is 'cat'; expected one of red, green, blue, yellow"),
        ("a red disc moves", "ends after 4 words; expected one of left, right, up, down"),
        (EXAMPLE + " slowly", "goes on after word 18 with 'slowly'"),
    ],
)
def test_other_sentences_are_refused_with_the_vocabulary(prompt: str, message: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse_prompt(prompt)
    assert message in str(caught.value)
    for word in (*COLOURS, *DIRECTIONS, "disc", "checks", EXAMPLE):
        assert word in str(caught.value)


def test_encoding_of_a_sentence() -> None:
    code = encode_prompt(SCENE)
    assert code.shape == (TEXT_TOKENS, TEXT_DIM) and code.dtype == torch.float32
    assert torch.equal(code, encode_prompt(parse_prompt(EXAMPLE)))
    assert (code[: len(TEMPLATE)].abs().sum(1) > 0).all()
    assert not code[len(TEMPLATE) :].any() and not encode_prompt(None).any()
    # A word is the same vector wherever it stands; its place is another part of the code.
    half = TEXT_DIM // 2
    assert torch.equal(code[0, :half], code[8, :half])
    assert not torch.equal(code[0, half:], code[8, half:])


def test_encoding_tells_colours_of_front_and_back_apart() -> None:
    swapped = scene(front_colour="blue", back_colour="red")
    difference = (encode_prompt(swapped) - encode_prompt(SCENE)).abs().sum(1)
    assert difference.nonzero().flatten().tolist() == [1, 10]


def test_vocabulary_is_what_the_template_needs() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert set(SCENE.prompt.split()) <= set(VOCABULARY)
