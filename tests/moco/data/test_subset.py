"""Parts of a source: which images, in which order, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from moco.data.images import find_images
from moco.data.subset import SubsetSource, indices_from_list, stratified_indices
from moco.errors import ConfigError, DataError


@pytest.fixture
def source(image_folder):
    return find_images(image_folder)


def test_a_subset_is_a_source_in_the_given_order(source):
    part = SubsetSource(source, [20, 3, 3])
    assert len(part) == 3 and part.class_names == source.class_names
    assert part.labels == (1, 0, 0) and part.paths[0] == source.paths[20]
    assert part.path(1) == source.path(3)
    assert part.open(0).tobytes() == source.open(20).tobytes() != part.open(1).tobytes()
    if hasattr(source, "read_bytes"):
        assert part.read_bytes(2) == source.read_bytes(3)


def test_a_subset_of_unlabelled_images_has_no_labels(image_folder):
    assert SubsetSource(find_images(image_folder / "train" / "a"), [1]).labels is None


LABELS = [0] * 100 + [1] * 50 + [2] * 3


@pytest.mark.parametrize(
    "fraction, counts",
    [(0.1, {0: 10, 1: 5, 2: 1}), (0.01, {0: 1, 1: 1, 2: 1}), (0.5, {0: 50, 1: 25, 2: 2}),
     (1.0, {0: 100, 1: 50, 2: 3})],
)  # fmt: skip
def test_a_share_of_every_class(fraction, counts):
    chosen = stratified_indices(LABELS, fraction, seed=0)
    assert Counter(LABELS[i] for i in chosen) == counts
    assert chosen == sorted(set(chosen))


def test_the_share_is_a_function_of_labels_fraction_and_seed():
    chosen = stratified_indices(LABELS, 0.1, seed=3)
    assert stratified_indices(LABELS, 0.1, seed=3) == chosen
    assert stratified_indices(LABELS, 0.1, seed=4) != chosen
    assert set(chosen) < set(stratified_indices(LABELS, 0.5, seed=3))
    # The order of the classes does not enter.
    swapped = [2 - label for label in LABELS]
    assert stratified_indices(swapped, 1.0, seed=3) == list(range(153))


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_other_fractions_are_refused(fraction):
    with pytest.raises(ConfigError, match="fraction of the labels is"):
        stratified_indices(LABELS, fraction, seed=0)


def write(tmp_path, text):
    path = tmp_path / "list.txt"
    path.write_text(text)
    return str(path)


def test_a_list_names_images_by_path_or_with_a_label(source, tmp_path):
    path = write(tmp_path, "b/03.png 1\n\na/15.png\n")
    assert [source.paths[i] for i in indices_from_list(source, path)] == ["b/03.png", "a/15.png"]


def test_a_list_of_file_names_as_simclrs(image_folder, tmp_path):
    for folder in ("a", "b"):
        for file in (image_folder / "train" / folder).iterdir():
            file.rename(file.with_name(f"{folder}_{file.name}"))
    source = find_images(image_folder)
    found = indices_from_list(source, write(tmp_path, "b_07.png\na_00.png\n"))
    assert [source.paths[i] for i in found] == ["b/b_07.png", "a/a_00.png"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("a/99.png\n", "line 1: 'a/99.png' names no image"),
        ("a/01.png\n00.png\n", "line 2: '00.png' names 2 images"),
        ("a/01.png\na/01.png 0\n", "line 2: 'a/01.png' was named in line 1 already"),
        ("\n", "names no image; give one a line"),
    ],
)
def test_wrong_lists_are_refused(source, tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        indices_from_list(source, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_list_is_refused(source, tmp_path):
    with pytest.raises(DataError, match="none.txt: cannot be read"):
        indices_from_list(source, str(tmp_path / "none.txt"))
