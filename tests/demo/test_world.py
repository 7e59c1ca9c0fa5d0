"""The world: same seed, same bytes; splits apart; domains hold what training never shows."""

import random

import pytest

from cwdpo_bench.demo.world import (
    COLOURS,
    HELD_OUT,
    IMAGE_SIZE,
    NOVEL_COLOURS,
    NOVEL_SHAPES,
    SHAPES,
    Scene,
    Thing,
    draw_scene,
    png_bytes,
    relations,
    render,
)

SPLITS = ("pretraining", "pairs", "probe", "validation", "test")


def test_same_seed_renders_the_same_bytes():
    def picture(seed: int) -> bytes:
        rng = random.Random(seed)
        return png_bytes(render(draw_scene(rng, "test", style="striped"), rng))

    assert picture(3) == picture(3)
    assert picture(3) != picture(4)


def test_images_give_nine_tokens():
    rng = random.Random(0)
    image = render(draw_scene(rng, "test"), rng)
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE) == (84, 84)
    assert image.mode == "RGB"


@pytest.mark.parametrize("shape", [*SHAPES, *NOVEL_SHAPES])
@pytest.mark.parametrize("size", ["small", "large"])
def test_every_shape_is_seen_in_its_own_cell_only(shape, size):
    rng = random.Random(0)
    thing = Thing(1, 2, shape, "red", size)
    image = render(Scene((thing,), "white"), rng)
    reds = [
        (x, y)
        for x in range(84)
        for y in range(84)
        if (p := image.getpixel((x, y)))[0] > 150 and p[1] < 120
    ]
    assert len(reds) > 40
    assert all(56 <= x < 84 and 28 <= y < 56 for x, y in reds)


def test_a_scene_belongs_to_one_split_whatever_its_style_or_order_of_drawing():
    rng = random.Random(0)
    for split in SPLITS:
        for _ in range(40):
            scene = draw_scene(rng, split)
            assert scene.split == split
            assert Scene(scene.things, scene.background, "striped").split == split
            assert list(scene.things) == sorted(scene.things)


def test_training_never_shows_what_the_other_domains_hold():
    rng = random.Random(1)
    seen = [t for _ in range(300) for t in draw_scene(rng, "pretraining").things]
    assert not {(t.shape, t.colour) for t in seen} & HELD_OUT
    assert {t.shape for t in seen} == set(SHAPES)
    assert {t.colour for t in seen} == set(COLOURS)

    for _ in range(60):
        near = draw_scene(rng, "test", domain="near-domain")
        assert any((t.shape, t.colour) in HELD_OUT for t in near.things)
        assert all(t.shape in SHAPES and t.colour in COLOURS for t in near.things)
        out = draw_scene(rng, "test", domain="out-domain")
        assert any(t.shape in NOVEL_SHAPES or t.colour in NOVEL_COLOURS for t in out.things)


def test_held_out_combinations_leave_every_shape_and_colour_seen():
    kinds = {(s, c) for s in SHAPES for c in COLOURS} - HELD_OUT
    assert {s for s, _ in kinds} == set(SHAPES)
    assert {c for _, c in kinds} == set(COLOURS)


def test_relations_turn_round_when_the_things_change_places():
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    first, second = (Thing(r, c, "star", "blue", "small") for r, c in ((0, 2), (1, 0)))
    assert set(relations(first, second)) == {"right of", "above"}
    assert {turned[r] for r in relations(first, second)} == set(relations(second, first))
