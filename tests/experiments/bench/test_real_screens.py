"""Probes on screenshots of real applications: their boxes, baselines and training batches."""

import pytest
from absl import flags

import glm_edge as ge
from experiments.bench import real_screens
from experiments.nano.phone_screens import actions
from glm_edge import configs
from glm_edge.errors import DataError

CONFIG = configs.preset("nano")
HEADER = "image\tx0\ty0\tx1\ty1\tclass\ttext\tcontent_desc\tresource_id\tclickable\tleaf"


@pytest.fixture
def probes(tmp_path):
    """Two screens of 192 x 384 pixels, twice the model's size, of two applications."""
    image_module = pytest.importorskip("PIL.Image")
    lines = [HEADER]
    for name, colour in (("mail/a.png", 0), ("maps/b.png", 255)):
        (tmp_path / name).parent.mkdir()
        image_module.new("RGB", (192, 384), (colour, colour, colour)).save(tmp_path / name)
        rows = [
            (0, 0, 192, 384, "Everything"),
            (20, 40, 60, 80, "Send  now"),
            (100, 40, 140, 80, "Twice"),
            (100, 140, 140, 180, "twice"),
            (40, 300, 120, 340, "Reply"),
            (40, 200, 120, 240, "发送"),
        ]
        lines += [
            "\t".join([name, *map(str, box), "View", text, "", "", "1", "1"]) for *box, text in rows
        ]
    (tmp_path / "elements.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return real_screens.read_probes(str(tmp_path), CONFIG, 0.25)


def test_read_probes_scales_boxes_of_unique_names(probes):
    questions = [probe.item.question for probe in probes]
    assert [q.instruction_text for q in questions] == ["tap send now", "tap reply"] * 2
    assert questions[0].target.box == (10, 20, 30, 40)
    assert [probe.application for probe in probes] == ["mail", "mail", "maps", "maps"]
    assert probes[0].item.image.shape == (*CONFIG.vision_tower.image_size, 3)
    brightness = probes[0].item.image.max(), probes[2].item.image.min()
    assert brightness == pytest.approx((0.0, 1.0))
    texts = [actions.format_action(q.answer_action) for q in questions]
    assert real_screens.hits_of(probes, texts) == [1.0] * 4
    assert real_screens.hits_of(probes, texts[1::-1] * 2) == [0.0] * 4


def test_baselines_are_those_of_the_boxes(probes):
    assert real_screens.area(probes[0], CONFIG) == pytest.approx(20 * 20 / (96 * 192))
    assert real_screens.random_element_rate(probes[0]) == 0.5


def test_exchanged_takes_no_probes_own_screen(probes):
    images = [item.image for item in real_screens.exchanged(probes, 0)]
    assert [image.max() for image in images] == [1.0, 1.0, 0.0, 0.0]


def test_batches_of_mark_what_predicts_answers(probes):
    """The mask is 1 where the next token belongs to an answer or ends it."""
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    items = [probe.item for probe in probes]
    (batch,) = real_screens.batches_of(items, tokenizer, CONFIG, 0)
    answers = [actions.format_action(item.question.answer_action) for item in items]
    for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
        *answer, end = tokens[1:][mask[:-1] == 1].tolist()
        assert tokenizer.decode(answer, skip_special_tokens=False) in answers
        assert end == CONFIG.eos_token_ids[0]
    assert batch["images"].shape == (real_screens.BATCH, *CONFIG.vision_tower.image_size, 3)


def test_fine_tuned_measures_each_application_apart(probes, monkeypatch):
    """The model that answers an application has learned from the others only."""
    tokenizer = ge.load_tokenizer(ge.shipped("nano"))
    monkeypatch.setattr(real_screens, "FLAGS", flags.FlagValues())
    flags.DEFINE_integer("seed", 0, "", flag_values=real_screens.FLAGS)
    real_screens.FLAGS.mark_as_parsed()

    def train(batches):
        return "model", batches[0]["images"].max()

    monkeypatch.setattr(
        real_screens.tap_eval, "answers",
        lambda model, params, tokenizer, items: [f"{params} {items[0].image.max()}"] * len(items),
    )  # fmt: skip
    texts = real_screens.fine_tuned(probes, train, tokenizer, CONFIG)
    assert texts == ["1.0 0.0"] * 2 + ["0.0 1.0"] * 2
    with pytest.raises(DataError, match="mail: there is no other application"):
        real_screens.fine_tuned(probes[:2], train, tokenizer, CONFIG)


def test_read_probes_refuses_a_folder_without_names(tmp_path):
    (tmp_path / "elements.tsv").write_text(HEADER + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no element has a name of its own"):
        real_screens.read_probes(str(tmp_path), CONFIG, 0.25)
