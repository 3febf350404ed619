from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from dinov2_fast.errors import ConfigError, DataError, NumericsError
from dinov2_fast.evaluation import knn
from dinov2_fast.models.presets import create_model
from dinov2_fast.models.pretrained import save_backbone
from tests.inputs import randn

KS = (1, 3, 10, 64)  # 64 exceeds the 40 training images: all of them vote


def plain_loop(
    train: Tensor, labels: Tensor, test: Tensor, k: int, max_k: int, temperature: float
) -> list[int]:
    """The protocol in float64, one image, one neighbour at a time."""
    predicted = []
    train_rows, label_list = train.double().tolist(), labels.tolist()
    for row in test.double().tolist():
        similarity = []
        for position, other in enumerate(train_rows):
            lengths = math.hypot(*row) * math.hypot(*other)
            dot = sum(a * b for a, b in zip(row, other, strict=True))
            similarity.append((-dot / lengths if lengths else 0.0, position))
        nearest = sorted(similarity)[:max_k]
        total = sum(math.exp(-value / temperature) for value, _ in nearest)
        votes: dict[int, float] = {}
        for value, position in nearest[:k]:
            label = label_list[position]
            votes[label] = votes.get(label, 0.0) + math.exp(-value / temperature) / total
        predicted.append(min(votes, key=lambda label: (-votes[label], label)))
    return predicted


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_predictions_equal_a_plain_float64_loop(temperature: float):
    train, test = randn(40, 13), randn(29, 13, seed=1)
    labels = torch.arange(40) % 7
    predicted = knn.knn_predict(train, labels, test, ks=KS, temperature=temperature)
    for k in KS:
        assert predicted[k].tolist() == plain_loop(train, labels, test, k, 40, temperature)


def test_leave_one_out_equals_a_loop_over_sets_without_the_image():
    features, labels = randn(23, 5), torch.arange(23) % 4
    predicted = knn.knn_predict_leave_one_out(features, labels, ks=(1, 5, 100))
    for i in range(23):
        others = torch.arange(23) != i
        alone = knn.knn_predict(
            features[others], labels[others], features[i : i + 1], ks=(1, 5, 100)
        )
        assert {k: int(p[i]) for k, p in predicted.items()} == {k: int(p) for k, p in alone.items()}


@pytest.mark.parametrize("rows", [1, 7, 100])  # one at a time, ragged last chunk, all at once
def test_chunks_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch):
    train, test, labels = randn(50, 8), randn(30, 8, seed=1), torch.arange(50) % 5
    whole = knn.knn_predict(train, labels, test)
    alone = knn.knn_predict_leave_one_out(train, labels)
    monkeypatch.setattr(knn, "_MAX_CHUNK_ROWS", rows)
    assert all(torch.equal(whole[k], p) for k, p in knn.knn_predict(train, labels, test).items())
    again = knn.knn_predict_leave_one_out(train, labels)
    assert all(torch.equal(alone[k], p) for k, p in again.items())


def test_similarities_of_one_chunk_stay_below_the_memory_budget():
    for num_train in (10, 10**5, 10**7, 10**9):
        chunks = list(knn._chunks(10_000, num_train))[:3]
        assert all(
            (c.stop - c.start) * num_train <= max(knn._MAX_CHUNK_ELEMENTS, num_train)
            for c in chunks
        )


def test_equal_similarities_rank_by_position_in_the_training_set():
    # Ten copies of one vector around another: any subset of the copies has the same similarities.
    train = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] + [[1.0, 0.0]] * 5)
    found = knn.nearest_neighbors(train, torch.tensor([[1.0, 0.0], [1.0, 1e-3]]), 7)
    assert found.tolist() == [[0, 1, 2, 3, 4, 6, 7]] * 2


def test_equal_votes_go_to_the_smaller_label():
    train = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    predicted = knn.knn_predict(train, torch.tensor([5, 2]), torch.tensor([[1.0, 0.0]]), ks=(2,))
    assert predicted[2].tolist() == [2]


def test_collapsed_features_are_classified_without_preference_for_large_labels():
    train, labels = torch.ones(300, 4), torch.arange(300) % 3
    predicted = knn.knn_predict(train, labels, torch.ones(5, 4), ks=(1, 200))
    # The nearest is the first; of the first 200, labels 0 and 1 have 67 votes each.
    assert predicted[1].tolist() == [0] * 5
    assert predicted[200].tolist() == [0] * 5


def test_length_of_a_feature_does_not_matter():
    train, test, labels = randn(30, 6), randn(20, 6, seed=1), torch.arange(30) % 3
    scale = torch.arange(1, 31).float()[:, None]
    plain = knn.knn_predict(train, labels, test, ks=(5,))
    scaled = knn.knn_predict(train * 2.0 ** scale.round(), labels, test * 8, ks=(5,))
    assert torch.equal(plain[5], scaled[5])


def test_a_vector_of_zeros_is_similar_to_nothing_and_breaks_nothing():
    train = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    predicted = knn.knn_predict(train, torch.tensor([0, 1, 2]), torch.tensor([[1.0, 0.0]]), ks=(1,))
    assert predicted[1].tolist() == [1]
    found = knn.nearest_neighbors(train, torch.tensor([[1.0, 0.0]]), 3)
    assert found.tolist() == [[1, 0, 2]]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 15), st.integers(0, 10**6))
def test_any_small_problem_equals_the_loop(num_train: int, num_test: int, k: int, seed: int):
    train, test = randn(num_train, 3, seed=seed), randn(num_test, 3, seed=seed + 1)
    labels = torch.arange(num_train) * 7 % 5
    predicted = knn.knn_predict(train, labels, test, ks=(k,))[k]
    assert predicted.tolist() == plain_loop(train, labels, test, k, k, knn.TEMPERATURE)


def test_accuracy_is_the_percentage_of_right_answers():
    train = torch.eye(4)
    accuracy = knn.knn_accuracy(
        train, torch.tensor([0, 1, 2, 3]), train, torch.tensor([0, 1, 2, 9]), ks=(1,)
    )
    assert accuracy == {1: 75.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_features": torch.ones(0, 3)}, "n >= 1"),
        ({"test_features": torch.ones(2, 4)}, r"\[m, 3\]"),
        ({"train_labels": torch.zeros(3)}, "integers"),
        ({"train_labels": torch.tensor([0, -1, 2, 1])}, "at least 0"),
        ({"ks": (0, 5)}, "ks"),
        ({"ks": ()}, "ks"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, words: str):
    arguments = {
        "train_features": randn(4, 3),
        "train_labels": torch.arange(4),
        "test_features": randn(2, 3),
        **change,
    }
    with pytest.raises(ValueError, match=words):
        knn.knn_predict(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_of_a_diverged_network_are_an_error_and_not_an_accuracy(value: float):
    features = randn(4, 3)
    features[2, 1] = value
    with pytest.raises(NumericsError, match=r"train_features.* 1 of 4"):
        knn.knn_predict(features, torch.arange(4), randn(2, 3))
    with pytest.raises(NumericsError, match=r"test_features.* 1 of 4"):
        knn.knn_predict(randn(4, 3), torch.arange(4), features)


def test_leave_one_out_of_a_single_image_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        knn.knn_predict_leave_one_out(randn(1, 3), torch.tensor([0]))


def _write_classes(root: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """Noisy pictures of one colour each class, so that any network can tell them apart."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(sorted(counts.items())):
        folder = root / name
        folder.mkdir(parents=True)
        color = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [120, 120, 120]])[number]
        for i in range(count):
            pixels = np.clip(color + rng.normal(0, 12, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = create_model("debug", image_px=28, layer_scale=1.0)
    path = tmp_path / "weights.safetensors"
    save_backbone(model, path)
    return path


@pytest.mark.parametrize("name", ["test", "val"])
def test_folders_of_train_and_test_images_are_classified(tmp_path: Path, weights: Path, name: str):
    _write_classes(tmp_path / "set" / "train", {"blue": 6, "green": 6, "red": 6})
    _write_classes(tmp_path / "set" / name, {"blue": 2, "green": 2, "red": 2}, seed=1)
    result = knn.evaluate_knn(weights, data=tmp_path / "set", num_workers=0, device="cpu")
    assert (result["train_images"], result["test_images"], result["classes"]) == (18, 6, 3)
    assert result["accuracy"][10] == 100.0
    assert result["image_px"] == 28
    assert not result["leave_one_out"]
    assert json.loads(json.dumps(result))["accuracy"]["10"] == 100.0
    text = knn.format_result(result)
    assert "100.00 %" in text
    assert text.count("every training image votes") == 3  # k = 20, 100 and 200 of 18 images


def test_one_folder_of_classes_is_classified_leaving_one_out(tmp_path: Path, weights: Path):
    _write_classes(tmp_path / "set", {"blue": 5, "green": 5, "red": 5})
    result = knn.evaluate_knn(weights, data=tmp_path / "set", num_workers=2, device="cpu", ks=(3,))
    assert result["leave_one_out"]
    assert result["accuracy"] == {3: 100.0}
    assert "by the others" in knn.format_result(result)


def test_classes_are_matched_by_name_and_not_by_number(tmp_path: Path, weights: Path):
    # Sorted, green is class 1 among the training images and class 0 among the test images.
    _write_classes(tmp_path / "a", {"blue": 4, "green": 4, "red": 4})
    test = _write_classes(tmp_path / "b", {"blue": 1, "green": 3, "red": 3}, seed=1)
    (test / "blue" / "0.png").unlink()
    result = knn.evaluate_knn(
        weights, train=tmp_path / "a", test=test, num_workers=0, device="cpu", ks=(3,)
    )
    assert result["accuracy"] == {3: 100.0}


def test_test_classes_without_training_images_count_as_errors_and_are_named(
    tmp_path: Path, weights: Path
):
    _write_classes(tmp_path / "a", {"blue": 4, "green": 4})
    _write_classes(tmp_path / "b", {"blue": 2, "zebra": 2})
    result = knn.evaluate_knn(
        weights, train=tmp_path / "a", test=tmp_path / "b", num_workers=0, device="cpu", ks=(3,)
    )
    assert result["unknown_classes"] == ["zebra"]
    assert result["accuracy"] == {3: 50.0}
    assert "zebra" in knn.format_result(result)


def test_unreadable_images_are_reported_and_the_rest_is_evaluated(tmp_path: Path, weights: Path):
    root = _write_classes(tmp_path / "set", {"blue": 5, "green": 5})
    (root / "blue" / "broken.png").write_bytes(b"no image")
    result = knn.evaluate_knn(weights, data=root, num_workers=2, device="cpu", ks=(3,))
    assert [Path(name).name for name, _ in result["unreadable"]] == ["broken.png"]
    assert result["train_images"] == 10
    assert "broken.png" in knn.format_result(result)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({}, "--data DIR"),
        ({"data": "set", "train": "set/train"}, "--data DIR"),
        ({"data": "set", "test": "set/train"}, "--test goes with --train"),
        ({"data": "set"}, "neither test/ nor val/"),
        ({"data": "flat"}, "no labels"),
        ({"data": "nowhere"}, "nowhere"),
        ({"train": "set/train", "test": "other"}, "no class in common"),
        ({"data": "single"}, "2 classes or more that vote, got blue alone"),
    ],
)
def test_folders_that_make_no_sense_are_explained(
    tmp_path: Path, weights: Path, folders: dict[str, str], words: str
):
    _write_classes(tmp_path / "set" / "train", {"blue": 2, "green": 2})
    _write_classes(tmp_path / "other", {"cat": 2, "dog": 2})
    _write_classes(tmp_path / "single", {"blue": 2})
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "flat" / "a.png")
    paths = {key: tmp_path / name for key, name in folders.items()}
    with pytest.raises((ConfigError, DataError), match=words) as caught:
        knn.evaluate_knn(weights, num_workers=0, device="cpu", **paths)
    assert isinstance(caught.value, ConfigError) == ("--" in words)  # usage, or the data
