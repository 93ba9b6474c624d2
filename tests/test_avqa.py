import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lavish_fast import Model, checkpoint, media, optimize, training
from lavish_fast.backbones import Encoded
from lavish_fast.config import AVQAConfig, TrainConfig
from lavish_fast.tasks import avqa
from lavish_fast.tasks import avqa_questions as words_of
from parity import golden, randomise, relative_error, tiny_config

OUTPUTS = ("out_qa", "out_match_posi", "out_match_nega")
WORDS = ("<pad>", "Is", "the", "first", "more than", "left", "Left", "acoustic_guitar", "video", "How", "is", "")


def make_config(**changes):
    values = {
        "task": "avqa",
        "classes": ("yes", "no", "two", "violin"),
        "head": AVQAConfig(words=WORDS, length=6, width=16),
    }
    return tiny_config(**(values | changes))


def make_head(config, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return avqa.Head(config).to(dtype).eval()


def head_inputs(config, clips=2, frames=3, places=4, dtype=torch.float64, seed=1):
    """What the core gives the head: encoded streams, tokens of negative frames, questions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (clips * frames, places, config.width)
    streams = [torch.randn(shape, generator=generator).to(dtype) for _ in config.streams]
    encoded = Encoded([streams], [x.mean(1) for x in streams])
    question = torch.randint(len(config.head.words), (clips, config.head.length), generator=generator)
    if len(streams) == 1:
        return encoded, question
    return encoded, torch.randn(shape, generator=generator).to(dtype), question


# Parity with the released network


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden(dtype, limit, record_property):
    run = golden("avqa")
    model = run.model(dtype).eval()
    given = [run.input[name].to(dtype) for name in ("audio", "visual_posi", "visual_nega")]
    with torch.no_grad():
        outputs = model(*given, run.input["question"])
        without = model(given[0], given[1], question=run.input["question"])
    for name, got in zip(OUTPUTS, outputs, strict=True):
        error = relative_error(got, run.expect[name])
        record_property(f"{name} {dtype}", error)
        assert error <= limit, (name, error)
    assert torch.equal(without[0], outputs[0])
    assert without[2].shape == (0, 2)


def test_names_of_the_released_head_are_invertible_and_complete():
    ours = [name for name in avqa.HEAD_NAMES.values() if name is not None]
    assert len(set(ours)) == len(ours)
    names = {name.rsplit(".", 1)[0] for name, _ in make_head(make_config()).named_parameters()}
    assert {name.removesuffix(".out_proj") for name in names} == set(ours)


def test_sizes_are_read_from_the_tensors():
    config = make_config()
    tensors = {f"head.{name}": x for name, x in make_head(config).state_dict().items()}
    assert avqa.fitted(config, tensors) == config
    assert avqa.fitted(config, {}) == config
    tensors |= {"head.question.words.weight": torch.zeros(93, 512), "head.answer.weight": torch.zeros(42, 512)}
    fitted = avqa.fitted(config, tensors)
    assert (len(fitted.head.words), fitted.head.width, len(fitted.classes)) == (93, 512, 42)
    assert fitted.head.words[:2] == ("<pad>", "word 1")
    assert fitted.head.length == config.head.length


def test_kept_are_the_answers_probabilities():
    answer = torch.randn(2, 4, dtype=torch.bfloat16)
    kept = avqa.kept((answer, torch.zeros(6, 2), torch.zeros(0, 2)), 2)
    torch.testing.assert_close(kept, answer.float().softmax(1))


def test_official_names_round_trip():
    run = golden("avqa")
    official = checkpoint.to_official(run.model(torch.float32).state_dict(), "swinv2", avqa.HEAD_NAMES)
    unread = {name for name in run.state_dict if avqa.HEAD_NAMES.get(name.rsplit(".", 1)[0], "") is None}
    head = [name for name in run.state_dict if not re.match(r"swin\.|(audio|vis)_adapter", name)]
    assert len(unread) == 18
    assert {name for name in head if name in official} == set(head) - unread
    assert all(torch.equal(official[name], run.state_dict[name].float()) for name in set(head) - unread)


# The model


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return randomise(Model(config), seed).eval()


def test_negative_frames_meet_no_adapter_and_give_no_gradient():
    given = call()
    given["negative"].requires_grad_()
    statistics = []
    for negative in (given["negative"], None):
        model = make_model(make_config()).train()
        loss = avqa.loss(model(**(given | {"negative": negative})), torch.tensor([1, 3]))
        statistics.append([x for name, x in model.named_buffers() if "running" in name])
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for _, p in model.trainable_parameters())
        assert all(p.grad is None for p in model.backbone.parameters())
    assert given["negative"].grad is None
    assert len(statistics[0])
    assert all(torch.equal(x, y) for x, y in zip(*statistics, strict=True))


@pytest.mark.parametrize("modality", ["audio+video", "video", "audio"])
def test_optimized_models_give_the_same(modality):
    model = make_model(make_config(modality=modality))
    given = call()
    with torch.no_grad():
        expected = model(**given)
    for got, want in zip(optimize(model, compile=False)(**given), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_saved_models_come_back_with_their_vocabulary(tmp_path):
    model = make_model(make_config())
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path, backbone=model.backbone.state_dict())
    assert again.config == model.config
    assert torch.equal(again(**call())[0], model(**call())[0])


# The head


def head_by_hand(head, encoded, negative, question):
    """The released layers, clip by clip and frame by frame, on plain vectors."""
    clips, frames = len(question), len(encoded.pooled[0]) // len(question)

    def read(reading, asked, stream):
        weight, bias = reading.attention.in_proj_weight, reading.attention.in_proj_bias
        (wq, wk, wv), (bq, bk, bv) = weight.chunk(3), bias.chunk(3)
        q, k, v = wq @ asked + bq, stream @ wk.T + bk, stream @ wv.T + bv
        d = len(q) // 4
        parts = []
        for h in range(4):
            s = slice(h * d, (h + 1) * d)
            parts.append((k[:, s] @ q[s] / math.sqrt(d)).softmax(0) @ v[:, s])
        x = reading.attention.out_proj(torch.cat(parts))
        return reading.norm(x + reading.fc2(reading.fc1(x).relu()))

    def ground(tokens, audio):
        places = head.video_in(tokens)
        unit = torch.stack([place / place.norm() for place in places])
        p = (unit @ (audio / audio.norm())).softmax(0)
        grounded = sum(weight * place for weight, place in zip(p, unit))
        return head.grounding(torch.cat((places.mean(0), grounded)).tanh())

    answer, positive, wrong = [], [], []
    for b in range(clips):
        lstm = torch.nn.LSTM(*2 * head.question.words.weight.shape[1:]).to(encoded.pooled[0])
        lstm.load_state_dict(head.question.lstm.state_dict())
        _, (h, c) = lstm(head.question.words(question[b]).tanh()[:, None])
        asked = head.question.fc(torch.cat((h[0, 0], c[0, 0])).tanh())
        audio, seen = [], []
        for n in range(b * frames, (b + 1) * frames):
            audio.append(head.audio_out(head.audio_in(encoded.stages[-1][0][n]).mean(0).relu()))
            seen.append(ground(encoded.stages[-1][1][n], audio[-1]))
            positive.append(head.match(torch.cat((audio[-1], seen[-1]))))
            wrong.append(head.match(torch.cat((audio[-1], ground(negative[n], audio[-1])))))
        audio, seen = torch.stack(audio), torch.stack(seen)
        both = [read(head.read["audio"], asked, audio) + audio.mean(0)]
        both.append(read(head.read["video"], asked, seen) + seen.mean(0))
        answer.append(head.answer((head.fusion(torch.cat(both).tanh()) * asked).tanh()))
    return tuple(torch.stack(x) for x in (answer, positive, wrong))


@pytest.mark.parametrize("seed", range(5))
def test_head_equals_its_layers_by_hand(seed):
    config = make_config()
    head = make_head(config, seed=seed)
    randomise(head, seed)
    given = head_inputs(config, places=2 + 3 * seed, seed=seed)  # any number of places
    for got, expected in zip(head(*given), head_by_hand(head, *given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_clip_alone_equals_the_clip_in_a_batch():
    config = make_config()
    head = make_head(config)
    encoded, negative, question = head_inputs(config, clips=3)
    together = head(encoded, negative, question)
    for b in range(3):
        n = slice(3 * b, 3 * b + 3)
        one = Encoded([[x[n] for x in encoded.stages[-1]]], [x[n] for x in encoded.pooled])
        alone = head(one, negative[n], question[b : b + 1])
        for got, expected in zip(alone, (together[0][b : b + 1], together[1][n], together[2][n]), strict=True):
            torch.testing.assert_close(got, expected)


def test_without_negative_frames_the_rest_is_the_same():
    config = make_config()
    head = make_head(config)
    encoded, negative, question = head_inputs(config)
    answer, positive, wrong = head(encoded, negative, question)
    got = head(encoded, question)
    assert torch.equal(got[0], answer)
    assert torch.equal(got[1], positive)
    assert wrong.shape == (6, 2)
    assert got[2].shape == (0, 2)


def test_order_of_the_places_does_not_matter_and_the_cls_token_of_a_vit_is_none():
    config = make_config()
    head = make_head(config)
    encoded, negative, question = head_inputs(config)
    expected = head(encoded, negative, question)
    audio, video = encoded.stages[-1]
    shuffled = Encoded([[audio, video.flip(1)]], encoded.pooled)
    for got, want in zip(head(shuffled, negative.roll(1, 1), question), expected):
        torch.testing.assert_close(got, want)
    head.first_place = 1  # as for a ViT
    with_cls = [torch.cat((torch.randn_like(x[:, :1]), x), 1) for x in (video, negative)]
    for got, want in zip(head(Encoded([[audio, with_cls[0]]], encoded.pooled), with_cls[1], question), expected):
        torch.testing.assert_close(got, want)


def test_one_modality_variants():
    for modality, absent in (("video", "audio"), ("audio", "video")):
        config = make_config(modality=modality)
        head = make_head(config)
        assert not any(name.startswith((absent, f"read.{absent}", "match")) for name, _ in head.named_parameters())
        encoded, question = head_inputs(config)
        answer, *matches = head(encoded, question)
        assert answer.shape == (2, 4)
        assert [tuple(x.shape) for x in matches] == [(0, 2), (0, 2)]
        labels = torch.tensor([3, 0])
        torch.testing.assert_close(avqa.loss((answer, *matches), labels), F.cross_entropy(answer, labels))
        avqa.loss((answer, *matches), labels).backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        if modality == "video":  # the places are averaged
            places = head.video_in(encoded.stages[-1][0])
            mean = torch.cat((places.mean(1), F.normalize(places, dim=-1).mean(1)), -1)
            torch.testing.assert_close(head.ground(encoded.stages[-1][0], None), head.grounding(mean.tanh()))


def test_gradients_reach_every_parameter_and_are_right():
    config = make_config(head=AVQAConfig(words=WORDS, length=6, width=16))
    head = make_head(config)
    randomise(head, 3)
    encoded, negative, question = head_inputs(config, clips=2, frames=2, places=3)
    question = torch.arange(12).view(2, 6)
    audio, video = (x.requires_grad_() for x in encoded.stages[-1])
    labels = torch.tensor([1, 3])

    def of_inputs(audio, video):
        return avqa.loss(head(Encoded([[audio, video]], [audio.mean(1), video.mean(1)]), negative, question), labels)

    assert torch.autograd.gradcheck(of_inputs, (audio, video))
    of_inputs(audio, video).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
    # The step size of a central difference, along one random direction of all parameters.
    torch.manual_seed(0)
    steps = [torch.randn_like(p) for p in head.parameters()]
    slope = sum((p.grad * step).sum() for p, step in zip(head.parameters(), steps))
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, step in zip(head.parameters(), steps):
                p += 1e-6 * sign * step
            values.append(of_inputs(audio, video))
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=1e-8)


def test_dropout_is_in_training_only():
    config = make_config()
    head = make_head(config)
    given = head_inputs(config)
    assert torch.equal(head(*given)[0], head(*given)[0])
    head.train()
    first, second = head(*given), head(*given)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])  # nothing is dropped on the way to the match
    assert [m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)] == [0.1, 0.1]
    dropped = []
    for reading in head.read.values():
        reading.dropout.register_forward_hook(lambda module, args, out: dropped.append((args[0] >= 0).all().item()))
    head(*given)
    assert dropped == [True, False] * 2  # after the ReLU and after the second map, of each stream
    assert [m.dropout for m in head.modules() if isinstance(m, torch.nn.MultiheadAttention)] == [0.1, 0.1]


def test_the_head_compiles_without_a_break():
    config = make_config()
    head = make_head(config)
    given = head_inputs(config)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(*given), head(*given)):
        torch.testing.assert_close(got, expected)


def test_no_clips_give_no_answers():
    config = make_config()
    encoded, negative, question = head_inputs(config, clips=0)
    assert [tuple(x.shape) for x in make_head(config)(encoded, negative, question)] == [(0, 4), (0, 2), (0, 2)]


@pytest.mark.parametrize("extreme", ["zeros", "large", "nan in one clip"])
def test_extreme_features(extreme):
    config = make_config()
    head = make_head(config, torch.float32)
    encoded, negative, question = head_inputs(config, dtype=torch.float32)
    audio, video = encoded.stages[-1]
    if extreme == "zeros":
        video.zero_()
        negative.zero_()
        with torch.no_grad():
            head.video_in.bias.zero_()
    elif extreme == "large":
        video.mul_(1e3)
        audio.mul_(1e3)
    else:
        video[:3] = float("nan")
    outputs = head(Encoded(encoded.stages, [x.mean(1) for x in encoded.stages[-1]]), negative, question)
    expected = [True, extreme != "nan in one clip"]
    assert outputs[0].isfinite().all(1).tolist() == expected[::-1]
    assert outputs[1].isfinite().all(1).tolist() == [expected[1]] * 3 + [True] * 3
    assert outputs[2].isfinite().all()


# Loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_is_the_answers_cross_entropy_and_half_of_the_frames(dtype):
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(n, k, generator=generator).to(dtype).requires_grad_() for n, k in ((2, 5), (6, 2), (6, 2))]
    labels = torch.tensor([4, 1])
    answer, positive, negative = (x.detach().double().log_softmax(1).tolist() for x in outputs)
    expected = -(answer[0][4] + answer[1][1]) / 2
    expected -= 0.5 * (sum(row[1] for row in positive) + sum(row[0] for row in negative)) / 12
    loss = avqa.loss(tuple(outputs), labels)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in outputs)
    # Without negative frames the mean is over the positive ones.
    expected = -(answer[0][4] + answer[1][1]) / 2 - 0.5 * sum(row[1] for row in positive) / 6
    assert avqa.loss((*outputs[:2], outputs[2][:0]), labels).item() == pytest.approx(expected, rel=1e-6)


def test_importing_the_head_imports_no_decoder():
    code = "import sys, lavish_fast.tasks.avqa; sys.exit(bool({'av', 'torchaudio', 'h5py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Inputs


def call(clips=2, frames=3):
    torch.manual_seed(0)
    audio = torch.randn(clips, frames, 32, 32)
    positive, negative = (torch.randn(clips, frames, 3, 32, 32) for _ in range(2))
    return {"audio": audio, "positive": positive, "negative": negative, "question": torch.zeros(clips, 6).long()}


def test_inputs_by_name_and_in_the_released_order():
    given = call()
    found = avqa.inputs(make_config(), *given.values())
    assert list(found) == ["audio", "video", "negative", "question"]
    assert torch.equal(found["audio"], given["audio"].flatten(0, 1)[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(found["video"], given["positive"].flatten(0, 1))
    assert torch.equal(found["negative"], given["negative"].flatten(0, 1))
    assert torch.equal(found["question"], given["question"])
    assert list(avqa.inputs(make_config(), **(given | {"negative": None}))) == ["audio", "video", "question"]
    assert list(avqa.inputs(make_config(), **(given | {"audio": [given["audio"]]}))) == list(found)
    # A variant of one modality looks at nothing else.
    nothing = dict.fromkeys(("audio", "positive", "negative"))
    for modality, name in (("audio", "audio"), ("video", "positive")):
        one = avqa.inputs(make_config(modality=modality), **(given | nothing | {name: given[name]}))
        assert list(one) == [modality, "question"]
        assert list(avqa.inputs(make_config(modality=modality), **given)) == [modality, "question"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"audio": None}, r"audio: expected a floating tensor \(B, T, 32, 32\), got NoneType"),
        ({"positive": None}, r"positive: expected a floating tensor \(B, T, 3, 32, 32\), got NoneType"),
        ({"positive": torch.zeros(2, 3, 3, 32, 16)}, r"positive: expected .* got \(2, 3, 3, 32, 16\) float32"),
        ({"negative": torch.zeros(2, 3, 3, 32, 32).long()}, r"negative: expected .* got \(2, 3, 3, 32, 32\) int64"),
        ({"negative": torch.zeros(2, 2, 3, 32, 32)}, r"audio and positive and negative: .* and \(2, 2\)"),
        ({"audio": torch.zeros(1, 3, 32, 32)}, r"audio and positive and negative: expected the same clips"),
        ({"question": None}, r"question: expected an int64 tensor \(2, 6\), got NoneType"),
        ({"question": torch.zeros(2, 7).long()}, r"question: expected an int64 tensor \(2, 6\), got \(2, 7\) int64"),
        ({"question": torch.zeros(3, 6).long()}, r"question: expected an int64 tensor \(2, 6\), got \(3, 6\) int64"),
        ({"question": torch.zeros(2, 6)}, r"question: expected an int64 tensor \(2, 6\), got \(2, 6\) float32"),
        ({"question": torch.full((2, 6), 12)}, r"question: expected words from 0 to 11, got 12"),
        ({"question": torch.full((2, 6), -1)}, r"question: expected words from 0 to 11, got -1"),
    ],
)
def test_bad_inputs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        avqa.inputs(make_config(), **(call() | changes))


# Metric


@pytest.mark.parametrize("seed", range(20))
def test_accuracy_equals_counting_by_hand_whatever_the_batches(seed):
    chance = random.Random(seed)
    count, classes = chance.randrange(1, 60), chance.randrange(2, 43)
    types = {str(1000 + i): chance.choice(words_of.TYPES) for i in range(count)}
    ids = list(types)
    labels = [chance.randrange(classes) for _ in ids]
    scores = [[chance.random() for _ in range(classes)] for _ in ids]
    for row, label in zip(scores, labels):
        row[label] += chance.random()
    right = {name: max(range(classes), key=row.__getitem__) == label for name, row, label in zip(ids, scores, labels)}

    def share(chosen):
        chosen = [right[name] for name in ids if chosen(types[name])]
        return sum(chosen) / len(chosen) if chosen else None

    expected = {"accuracy": share(lambda kind: True)}
    for modality in ("Audio", "Visual", "Audio-Visual"):
        expected[modality.lower()] = share(lambda kind, m=modality: kind[0] == m)
    for kind in words_of.TYPES:
        expected[f"{kind[0]} {kind[1]}".lower()] = share(lambda k, kind=kind: k == kind)
    expected = {name: value for name, value in expected.items() if value is not None}
    expected |= {"correct": sum(right.values()), "total": count}

    order = list(range(count))
    for size in (1, 2, 3, 7):
        chance.shuffle(order)
        first, second = avqa.Metric(types), avqa.Metric(types)
        for number, start in enumerate(range(0, count, size)):
            some = order[start : start + size]
            logits = torch.tensor([scores[i] for i in some], dtype=torch.float64)
            outputs = (logits, torch.zeros(0, 2), torch.zeros(0, 2)) if number % 2 else logits
            metric = second if number % 3 else first
            metric.update(outputs, torch.tensor([labels[i] for i in some]), tuple(ids[i] for i in some))
        first.merge(second)
        assert first.results() == expected
        assert next(iter(first.results())) == "accuracy"


def test_types_are_pooled_and_not_averaged():
    types = {"1": ("Audio", "Counting"), "2": ("Audio", "Comparative"), "3": ("Audio", "Comparative")}
    metric = avqa.Metric(types)
    assert math.isnan(metric.results()["accuracy"])
    metric.update(torch.eye(3), torch.tensor([0, 1, 0]), ("1", "2", "3"))
    results = metric.results()
    shares = {"accuracy": 2 / 3, "audio": 2 / 3, "audio counting": 1.0, "audio comparative": 0.5}
    assert results == shares | {"correct": 2, "total": 3}
    with pytest.raises(ValueError, match="ids: expected those of questions whose type is known, got 4"):
        metric.update(torch.eye(3), torch.tensor([0, 1, 0]), ("1", "4", "3"))
    with pytest.raises(ValueError, match=r"logits: expected \(B, K\) for 2 questions .* got \(3, 3\)"):
        metric.update(torch.eye(3), torch.tensor([0, 1]), ("1", "2"))
    assert metric.results() == results


# Questions

ENTRY = {
    "video_id": "00000093",
    "question_id": 12,
    "type": '["Audio-Visual", "Counting"]',
    "question_content": "How many sounding <Object> in the video？",
    "templ_values": '["violin"]',
    "question_deleted": 0,
    "anser": "three",
}


def entry(number, content="Is the <Object> playing?", values='["violin"]', answer="yes", **changes):
    changes = {"question_content": content, "templ_values": values, "anser": answer, "question_id": number} | changes
    return ENTRY | changes


TRAIN = [
    ENTRY | {"video_id": "a", "question_id": 0},
    entry(1, "Is the <Object1> louder than the <Object2>?", '["acoustic_guitar", "violin"]', "no", video_id="b"),
    entry(
        2,
        "Are there <TH> two instruments sounding?  ",
        '["more than"]',
        "yes",
        video_id="c",
        type='["Audio", "Counting"]',
    ),
    entry(3, "Where is the <Object>?", '["violin"]', "left", video_id="d", type='["Visual", "Location"]'),
]
VAL = [entry(4, "Is the <Object> sounding?", '["violin"]', "no", video_id="b", type='["Audio", "Comparative"]')]
TEST = [entry(5, video_id="e", content="Is the <Object> louder?", values='["acoustic_guitar"]')]
TRAIN_WORDS = (
    *("<pad>", "How", "many", "sounding", "violin", "in", "the", "video"),
    *("Is", "acoustic_guitar", "louder", "than"),
    *("Are", "there", "more than", "two", "instruments", "Where", "is"),
)


def write_questions(root, folder="json", **splits):
    for split, rows in ({"train": TRAIN, "val": VAL, "test": TEST} | splits).items():
        path = root / folder / f"avqa-{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return root


def settled(root, **changes):
    return avqa.settle(make_config(**({"head": AVQAConfig(words=("<pad>",), width=16)} | changes)), root)


def test_questions_of_the_released_shape(tmp_path):
    write_questions(tmp_path)
    questions = words_of.read_questions(tmp_path / "json" / "avqa-train.json")
    assert questions[0] == words_of.Question(
        0, "a", ("Audio-Visual", "Counting"), ("How", "many", "sounding", "violin", "in", "the", "video"), "three"
    )
    assert questions[1].words == ("Is", "the", "acoustic_guitar", "louder", "than", "the", "violin")
    assert questions[2].words == ("Are", "there", "more than", "two", "instruments", "sounding")
    assert questions[3].words == ("Where", "is", "the", "violin")
    config = settled(tmp_path)
    assert config.head.words == TRAIN_WORDS
    assert config.classes == ("three", "no", "yes", "left")
    assert (config.head.length, config.head.width) == (14, 16)


def test_quirks_of_the_released_rules(tmp_path):
    # The last character goes whatever it is; two spaces make an empty word; values that no word asks for are let be.
    rows = [entry(0, "How many  strings", '["violin"]'), entry(1, "Is <A>", '["x"]')]
    questions = words_of.read_questions(write_questions(tmp_path, train=rows) / "json" / "avqa-train.json")
    assert questions[0].words == ("How", "many", "", "string")
    assert questions[1].words == ("Is", "x")
    renamed = {key: value for key, value in ENTRY.items() if key != "anser"} | {"answer": "seven"}
    path = write_questions(tmp_path, train=[renamed]) / "json" / "avqa-train.json"
    assert words_of.read_questions(path)[0].answer == "seven"


@pytest.mark.parametrize("folder", ["", "json", "data/json"])
def test_files_are_found(tmp_path, folder):
    write_questions(tmp_path, folder)
    assert words_of.questions_path(tmp_path, "val") == tmp_path / folder / "avqa-val.json"
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        words_of.questions_path(tmp_path, "dev")
    with pytest.raises(
        FileNotFoundError, match=r"expected avqa-train\.json there, in json/ or in data/json/, got none"
    ):
        words_of.questions_path(tmp_path / "elsewhere", "train")


BAD_ENTRIES = [
    (3, "expected an object, got int"),
    (ENTRY | {"question_id": "12"}, "question_id: expected int, got '12'"),
    (ENTRY | {"question_id": True}, "question_id: expected int, got True"),
    (ENTRY | {"video_id": 5}, "video_id: expected str, got 5"),
    (ENTRY | {"anser": None}, "anser: expected str, got None"),
    ({key: ENTRY[key] for key in ENTRY if key != "anser"}, "anser: expected str, got None"),
    (ENTRY | {"anser": ""}, "expected a question and an answer"),
    (ENTRY | {"question_content": "  "}, "expected a question and an answer"),
    (ENTRY | {"question_content": None}, "question_content: expected str, got None"),
    (ENTRY | {"type": ["Audio", "Counting"]}, "type: expected a string with a JSON list of strings"),
    (ENTRY | {"type": '["Audio", "Smelling"]'}, "type: expected one of Audio Counting, .* got '.*Smelling"),
    (ENTRY | {"type": '"Audio"'}, "type: expected a string with a JSON list of strings"),
    (ENTRY | {"templ_values": "['violin']"}, "templ_values: expected a string with a JSON list of strings"),
    (ENTRY | {"templ_values": "__import__('os').abort()"}, "templ_values: expected a string with a JSON list"),
    (ENTRY | {"templ_values": "[1]"}, "templ_values: expected a string with a JSON list of strings"),
    (ENTRY | {"templ_values": "[" * 100000}, "templ_values: expected a string with a JSON list of strings"),
    (ENTRY | {"templ_values": "[]"}, "templ_values: expected 1 for 'How many sounding <Object> in the video"),
    *(
        (ENTRY | {"video_id": name}, "expected a video id that is a plain file name")
        for name in ("../x", "a/b", "..", "", "C:\\a")
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ENTRIES)
def test_a_bad_entry_is_named(tmp_path, bad, message):
    path = write_questions(tmp_path, train=[ENTRY, bad, ENTRY]) / "json" / "avqa-train.json"
    with pytest.raises(ValueError, match=rf"avqa-train\.json, entry 1: (?s:{message})"):
        words_of.read_questions(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"[1", b"\xff\xfe\xfd", b"[" * 100000, b"null", b"\x80\x04K\x01."]
)
def test_a_file_that_holds_no_questions_is_named(tmp_path, content):
    path = tmp_path / "avqa-train.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"avqa-train\.json: expected .* got"):
        words_of.read_questions(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.just('["Audio", "Counting"]')
    | st.just('["a"]'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(ENTRY)), inner, max_size=7),
    max_leaves=12,
)


@given(json_values | st.fixed_dictionaries({key: st.just(value) | json_values for key, value in ENTRY.items()}))
def test_any_entry_is_a_safe_question_or_one_clear_error(row):
    try:
        question = words_of._parse(row)
    except ValueError as caught:
        error = str(caught)
    else:
        error = "expected, got"
        assert (Path("/data") / f"{question.video_id}.mp4").resolve().parent == Path("/data")
        assert question.kind in words_of.TYPES
        assert all(isinstance(word, str) for word in question.words)
    assert re.search("expected.* got", error, re.DOTALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How many sounding violin in the video?", "How many sounding violin in the video"),
        ("how MANY sounding Violin, in the   video ？", "How many sounding violin in the video"),
        ("  is the acoustic guitar louder than the violin", "Is the acoustic_guitar louder than the violin"),
        ("Is the acoustic_guitar louder?", "Is the acoustic_guitar louder"),
        ("where is the violin?!", "Where is the violin"),
        ("WHERE IS THE “VIOLIN”?", "Where is the violin"),
        ("Are there more than two instruments", "Are there|more than|two instruments"),
        ("there", "there"),
    ],
)
def test_typed_questions(tmp_path, text, expected):
    config = settled(write_questions(tmp_path))
    encoded = avqa.encode_question(text, config)
    words = [word for part in expected.split("|") for word in ([part] if part in TRAIN_WORDS else part.split())]
    assert encoded.dtype == torch.int64
    assert encoded.tolist() == [TRAIN_WORDS.index(word) for word in words] + [0] * (14 - len(words))


def test_of_words_that_differ_in_case_the_place_decides():
    config = make_config()
    words = [WORDS[i] for i in avqa.encode_question("is the left Left is", config)]
    assert words == ["Is", "the", "left", "left", "is", "<pad>"]
    assert WORDS[avqa.encode_question("LEFT", config)[0]] == "Left"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Is the vioiln louder?", "expected a word of the vocabulary, near to it violin, got 'vioiln'"),
        ("Is the Vidoe louder?", "near to it video, got 'Vidoe'"),
        ("Is the xyzzy louder?", "expected a word of the vocabulary, <pad>, How, many, .* and 14 more, got 'xyzzy'"),
        ("", "question: expected words, got ''"),
        (" ?？ ", "question: expected words, got"),
        ("pad the video", "expected a word of the vocabulary.* got 'pad'"),
        ("more violin", "got 'more'"),
        (" ".join(["the"] * 15), "expected at most 14 words, got 15"),
    ],
)
def test_typed_questions_that_cannot_be_asked_are_named(tmp_path, text, message):
    config = settled(write_questions(tmp_path))
    with pytest.raises(ValueError, match=message):
        avqa.encode_question(text, config)


@given(st.text(max_size=30))
def test_any_typed_question_is_encoded_or_refused(text):
    try:
        encoded = avqa.encode_question(text, make_config())
    except ValueError as caught:
        error = str(caught)
    else:
        error = "expected, got"
        assert encoded.shape == (6,)
    assert re.search("expected.* got", error, re.DOTALL)


# The data set


def fake_clip(path, *, frames, img_size, spectrogram, frame_rate, antialias=False):
    """A clip that tells which file it is of, and which frame a frame is; a file of one byte is a bad one."""
    if not Path(path).is_file():
        raise media.MediaError(path, "expected a file, got none")
    size = Path(path).stat().st_size
    if size == 1:
        raise media.MediaError(path, "expected a media file, got 1 byte")
    audio = torch.full((frames, spectrogram.frames, spectrogram.mel_bins), float(size))
    video = size + torch.arange(frames)[:, None, None, None] / 16 + torch.zeros(frames, 3, img_size, img_size)
    return media.Clip(audio, video, 10.0, ())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Five videos of MUSIC-AVQA's layout, as files of 10 to 14 bytes."""
    monkeypatch.setattr(media, "load_clip", fake_clip)
    write_questions(tmp_path)
    (tmp_path / "videos").mkdir()
    for size, name in enumerate("abcde", 10):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(bytes(size))
    return tmp_path


def write_frames(root, name, shade, pictures=3):
    from PIL import Image

    (root / "frames" / name).mkdir(parents=True)
    (root / "audio").mkdir(exist_ok=True)
    for number in range(pictures):
        image = np.full((24, 24, 3), shade + 10 * number, np.uint8)
        Image.fromarray(image).save(root / "frames" / name / f"{number + 1:06}.png")
    with wave.open(str(root / "audio" / f"{name}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.zeros(32000, np.int16).tobytes())


def test_items(data):
    config = settled(data)
    train = avqa.Dataset(data, "train", config)
    assert len(train) == 4
    item = train[1]
    assert list(item) == ["audio", "positive", "negative", "question", "labels", "id"]
    assert item["audio"].unique().tolist() == [11]
    assert item["audio"].shape == (3, 32, 32)
    assert item["positive"].shape == item["negative"].shape == (3, 3, 32, 32)
    assert item["positive"][:, 0, 0, 0].tolist() == [11, 11 + 1 / 16, 11 + 2 / 16]
    assert [TRAIN_WORDS[i] for i in item["question"]][:3] == ["Is", "the", "acoustic_guitar"]
    assert item["question"].dtype == item["labels"].dtype == torch.int64
    assert item["question"].shape == (14,)
    assert item["labels"].shape == ()
    assert config.classes[item["labels"]] == "no"
    assert item["id"] == "1"
    val = avqa.Dataset(data, "val", config)
    assert list(val[0]) == ["audio", "positive", "question", "labels", "id"]
    for modality in ("audio", "video"):
        alone = dataclasses.replace(config, modality=modality)
        assert "negative" not in avqa.Dataset(data, "train", alone)[0]
    assert [q.video_id for q in avqa.Dataset(data, "train", config, skip=("b",)).rows] == ["a", "c", "d"]
    assert avqa.Dataset(data, "train", config).metric().types["2"] == ("Audio", "Counting")


def test_items_are_what_the_model_takes(data):
    config = settled(data)
    items = [avqa.Dataset(data, "train", config)[i] for i in range(4)]
    batch = {name: torch.stack([item[name] for item in items]) for name in list(items[0])[:-1]}
    labels = batch.pop("labels")
    found = avqa.inputs(config, **batch)
    assert found["negative"].shape == found["video"].shape == (12, 3, 32, 32)
    assert labels.shape == (4,)


def test_negative_frames_are_of_another_video_and_reproducible(data):
    # Forty questions of four videos: each draws another video, and its frames in another order.
    rows = [entry(i, video_id="abcd"[i % 4]) for i in range(40)]
    write_questions(data, train=rows)
    train, again = (avqa.Dataset(data, "train", settled(data)) for _ in range(2))
    orders, pairs = set(), set()
    for index in random.Random(0).sample(range(40), 40):
        item = train[index]
        frames = item["negative"][:, 0, 0, 0]
        (other,) = frames.int().unique().tolist()
        assert other != item["audio"].unique().item()
        assert sorted((16 * (frames - other)).tolist()) == [0, 1, 2]
        assert torch.equal(item["negative"], again[index]["negative"])
        orders.add(tuple((frames - other).tolist()))
        pairs.add((index % 4, other))
    assert len(orders) == 6
    assert len(pairs) == 12
    loader = torch.utils.data.DataLoader(train, batch_size=None, num_workers=2)
    for index, item in enumerate(loader):
        assert torch.equal(item["negative"], train[index]["negative"])


def test_each_epoch_draws_negative_frames_of_its_own(data):
    write_questions(data, train=[entry(i, video_id="abcd"[i % 4]) for i in range(12)])
    train = avqa.Dataset(data, "train", settled(data))
    loader = torch.utils.data.DataLoader(train, batch_size=None, num_workers=2, persistent_workers=True)
    drawn = []
    for epoch in (0, 1, 0):
        train.set_epoch(epoch)
        drawn.append([item["negative"] for item in loader])
        for index, negative in enumerate(drawn[-1]):
            assert torch.equal(negative, train[index]["negative"])
    first, second, again = map(torch.stack, drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_with_extracted_frames_each_negative_frame_is_a_picture_of_another_video(data):
    for shade, name in zip((20, 80, 140), "abc"):
        (data / "videos" / f"{name}.mp4").unlink()
        write_frames(data, name, shade)
    write_questions(data, train=[entry(i, video_id="dabc"[i % 4]) for i in range(20)])
    config = settled(data, frames=4)
    train = avqa.Dataset(data, "train", config)
    shades = {name: {shade + 10 * i for i in range(3)} for shade, name in zip((20, 80, 140), "abc")}
    drawn = set()
    for index in range(20):
        frames = media.denormalise(train[index]["negative"])
        got = [frame.unique().tolist() for frame in frames]
        assert all(len(values) == 1 for values in got)
        own = shades.get("dabc"[index % 4], set())
        assert not own & {values[0] for values in got}
        drawn |= {values[0] for values in got}
    assert drawn == set().union(*shades.values())


def test_negative_frames_pass_over_broken_files(data):
    write_questions(data, train=[entry(i, video_id="abcd"[i % 4]) for i in range(40)])
    (data / "videos" / "a.mp4").write_bytes(b"x")
    train = avqa.Dataset(data, "train", settled(data))
    items = [train[i] for i in range(40)]
    failed = [i for i, item in enumerate(items) if isinstance(item, media.MediaError)]
    assert failed == list(range(0, 40, 4))
    for name in "bcd":
        (data / "videos" / f"{name}.mp4").write_bytes(b"x")
    write_questions(data, train=[*TRAIN, entry(9, video_id="e")])
    error = avqa.Dataset(data, "train", settled(data))[4]
    assert re.fullmatch(r".*/[abcd]\.mp4: expected a media file, got 1 byte", str(error))
    error = avqa.Dataset(data, "train", settled(data), skip=tuple("abcd"))[0]
    assert "expected another video of the split with media, for negative frames, got none" in str(error)


def test_missing_media_give_an_error_each(data):
    (data / "videos" / "b.mp4").unlink()
    train = avqa.Dataset(data, "train", settled(data))
    assert str(train[1]) == f"{data}/videos/b.mp4: expected a file, got none"
    assert train[0]["negative"][0, 0, 0, 0].int().item() in (12, 13)


def test_clips_are_decoded_once_if_cached(data, monkeypatch):
    calls = []
    monkeypatch.setattr(media, "load_clip", lambda path, **options: calls.append(path) or fake_clip(path, **options))
    for cache, expected in ((True, 4), (False, 16)):
        calls.clear()
        train = avqa.Dataset(data, "train", settled(data), cache=cache)
        for _ in range(2):
            for i in range(4):
                train[i]
        assert len(calls) == expected


def test_warnings_and_options_of_the_decoder_are_passed_on(data, monkeypatch):
    def load(path, *, antialias, **options):
        assert antialias
        return fake_clip(path, **options)._replace(warnings=("b.mp4: no audio stream",))

    monkeypatch.setattr(media, "load_clip", load)
    with pytest.warns(UserWarning, match=r"b\.mp4: no audio stream"):
        avqa.Dataset(data, "val", settled(data), antialias=True)[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (entry(7, "Is the <A> louder?", '["vioiln"]'), "question 7: .* near to it violin, got 'vioiln'"),
        (
            entry(7, "Is the violin louder?", answer="ye"),
            "question 7: expected one of the answers, near to it yes, got 'ye'",
        ),
        (entry(7, " ".join(["the"] * 15) + "?"), "question 7: expected at most 14 words, got 15"),
    ],
)
def test_questions_beyond_the_vocabulary_are_named(data, row, message):
    write_questions(data, test=[*TEST, row])
    with pytest.raises(ValueError, match=rf"avqa-test\.json: {message}"):
        avqa.Dataset(data, "test", settled(data))


def test_a_configuration_that_is_not_settled_is_refused(data):
    with pytest.raises(ValueError, match=r"question 0: expected a word of the vocabulary, .*got 'many'"):
        avqa.Dataset(data, "train", make_config(head=AVQAConfig(words=WORDS)))


def test_an_id_of_two_types_is_refused(data):
    twice = [entry(1, "Is the violin louder?"), entry(1, "Is the violin louder?", type='["Audio", "Counting"]')]
    write_questions(data, val=twice)
    with pytest.raises(ValueError, match=r"question 1: expected one type for each id, got .*Counting.* and .*'Audio'"):
        avqa.Dataset(data, "val", settled(data)).metric()


def test_training_and_evaluation_run_on_it(data, tmp_path):
    config = settled(data)
    sets = [avqa.Dataset(data, split, config) for split in ("train", "val", "test")]
    model = make_model(config)
    how = TrainConfig(batch_size=2, epochs=2, lr=1e-3, head_lr=1e-3)
    fit = training.fit(model, *sets[:2], how, tmp_path / "out", device="cpu")
    assert (fit.epochs, fit.steps, fit.skipped) == (2, 4, ())
    result = training.evaluate(model, sets[2], device="cpu")
    assert result.scores == {"accuracy": result.score, "audio-visual": result.score} | {
        "audio-visual counting": result.score,
        "correct": int(result.score),
        "total": 1,
    }
    assert result.predictions["5"].shape == (4,)
    assert result.predictions["5"].sum().item() == pytest.approx(1, abs=1e-5)


# verify


def test_verify_of_a_whole_data_set(data):
    report = avqa.verify(data, make_config(head=AVQAConfig()))
    assert report.ok, report.problems
    assert report.splits == {"train": 4, "val": 1, "test": 1}
    assert report.missing == {"train": (), "val": (), "test": ()}
    text = str(report)
    for expected in (
        "splits: train 4, val 1, test 1",
        f"note: val: {data}/json/avqa-val.json",
        "note: 1 videos are in train and val: b",
        "note: train: MUSIC-AVQA has 32087 questions, got 4",
        f"note: MUSIC-AVQA has 93 words, got {len(TRAIN_WORDS)}",
        "note: MUSIC-AVQA has 42 answers, got ",
    ):
        assert expected in text
    assert not report.published


def test_verify_reports_each_problem(data):
    config = make_config(head=AVQAConfig())
    (data / "videos" / "b.mp4").unlink()
    test = [
        *(*TEST, *TEST, 5, entry(8, "Is the sun playing?", answer="maybe")),
        entry(9, " ".join(["the"] * 15) + "?", video_id="../x"),
        entry(10, " ".join(["the"] * 15) + "?", video_id="f"),
    ]
    write_questions(data, test=test)
    (data / "json" / "avqa-val.json").write_text("[")
    report = avqa.verify(data, config)
    assert not report.ok
    text = str(report)
    for expected in (
        r"avqa-val\.json: expected JSON, got",
        r"avqa-test\.json, entry 2: expected an object, got int",
        r"avqa-test\.json, entry 4: expected a video id that is a plain file name, got '../x'",
        r"test: expected words of avqa-train\.json, got 'sun', 'playing'",
        r"test: expected answers of avqa-train\.json, got 'maybe'",
        r"test: 1 questions have more than 14 words: 10",
        r"test: 1 question ids come more than once: 5",
        r"train: 1 of 4 videos have no media: b",
        r"test: 2 of 3 videos have no media: 00000093, f",
    ):
        assert re.search(f"problem: .*{expected}", text), expected
    assert report.missing["test"] == ("00000093", "f")
    (data / "json" / "avqa-train.json").unlink()
    assert "expected avqa-train.json there, in json/ or in data/json/, got none" in str(avqa.verify(data, config))
    assert avqa.verify(data / "nowhere", config).splits == {}


def test_verify_decodes_when_asked(data):
    (data / "videos" / "c.mp4").write_bytes(b"x")
    report = avqa.verify(data, make_config(head=AVQAConfig()), decode=True, workers=0)
    assert report.undecodable == (f"{data}/videos/c.mp4: expected a media file, got 1 byte",)
    assert report.problems == report.undecodable


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((32087, 4595, 9185), []),
        ((32087, 4568, 9129), ["val: 4568 questions are of json_update/", "test: 9129 questions are of json_update/"]),
        (
            (32086, 4594, 9186),
            [
                "train: MUSIC-AVQA has 32087 questions, got 32086",
                "val: MUSIC-AVQA has 4595 questions, got 4594",
                "test: MUSIC-AVQA has 9185 questions, got 9186",
            ],
        ),
    ],
)
def test_verify_notes_sizes_that_are_not_the_published_ones(tmp_path, sizes, expected):
    content = " ".join(f"w{i}" for i in range(14)) + "?"
    train = [entry(i, content.replace("w", f"w{i % 7}-"), answer=f"answer {i % 42}") for i in range(42)]
    train = [row for row in train if not row["question_content"].startswith("w6")]
    words = sorted({word for q in map(words_of._parse, train) for word in q.words})
    # Ninety-two words beside the padding, as MUSIC-AVQA has.
    train += [entry(100, " ".join(f"x{i}" for i in range(92 - len(words))) + "?")]
    train += [entry(101 + i, "w0-0?", answer=f"answer {i}") for i in range(41)]
    train[-42]["anser"] = "answer 41"
    train += [entry(1000 + i, "w0-0?", answer="answer 0") for i in range(sizes[0] - len(train))]
    rows = [entry(i, "w0-0?", answer="answer 0") for i in range(sizes[2])]
    write_questions(tmp_path, train=train, val=rows[: sizes[1]], test=rows)
    config = settled(tmp_path)
    assert (len(config.head.words), len(config.classes)) == (93, 42)
    report = avqa.verify(tmp_path, config)
    notes = [note for note in report.notes if "question" in note or "MUSIC-AVQA" in note]
    assert report.published == (not expected)
    assert len(notes) == len(expected)
    for note, start in zip(notes, expected):
        assert note.startswith(start)
