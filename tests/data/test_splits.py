import pytest

from raydml.data.catalog import Catalog, ImageFile, catalog_of
from raydml.data.splits import largest_num_folds, make_split
from tests.data.refusals import SPLIT, assert_contains, refusal


def classes_of(num_classes: int, given: list[str] | None = None) -> Catalog:
    """Two images a class; `given` is one part a class."""
    parts = given or [""] * num_classes
    rows = [ImageFile(f"{c:03d}/{i}.png", f"class{c:02d}", 1, parts[c]) for c in range(num_classes) for i in range(2)]
    return catalog_of("image_list", None, rows)


class TestSplit:
    @pytest.mark.parametrize("order", ["sorted", "shuffled"])
    @pytest.mark.parametrize("num_classes", [8, 13, 81])
    def test_folds_partition_the_development_classes(self, num_classes, order):
        catalog = classes_of(num_classes)
        settings = {**SPLIT, "order": order, "num_folds": 2 if num_classes == 8 else 3}
        search = make_split(catalog, **settings)
        development = set(search.train) | set(search.val)
        seen: list[int] = []
        for fold in range(settings["num_folds"]):
            split = make_split(catalog, **{**settings, "fold": fold})
            assert split.test == search.test  # the seal does not move with the fold
            assert set(split.train) | set(split.val) == development
            assert not set(split.train) & set(split.val)
            seen += split.val
        assert sorted(seen) == sorted(development)
        assert not development & set(search.test)
        assert development | set(search.test) == set(range(num_classes))

    def test_sizes(self):
        # 11 classes: test ceil(5.5) = 6, val ceil(0.4 * 5) = 2
        split = make_split(classes_of(11), **{**SPLIT, "val_fraction": 0.4})
        assert (split.train, split.val, split.test) == ((0, 1, 2), (3, 4), (5, 6, 7, 8, 9, 10))
        # 0.07 * 100 is 7.000000000000001 in floating point
        assert len(make_split(classes_of(100), **{**SPLIT, "test_fraction": 0.07}).test) == 7
        first = make_split(classes_of(20), **{**SPLIT, "num_folds": 3, "fold": 0})
        assert first.val == (0, 1, 2, 3)  # 10 = 4 + 3 + 3

    @pytest.mark.parametrize(
        ("num_classes", "expected"),
        # By hand: half, rounded up, is sealed and a quarter of the rest, rounded up, validates; but two at least.
        [(6, (2, 2, 2)), (7, (2, 2, 3)), (8, (2, 2, 4)), (10, (3, 2, 5)), (26, (9, 4, 13)), (5000, (1875, 625, 2500))],
    )
    def test_two_classes_at_least_are_in_each_part(self, num_classes, expected):
        split = make_split(classes_of(num_classes), **{**SPLIT, "val_fraction": 0.25})
        assert (len(split.train), len(split.val), len(split.test)) == expected

    @pytest.mark.parametrize("order", ["sorted", "shuffled"])
    @pytest.mark.parametrize(
        "given", [None, ["test", "train", "val", "train", "train", "val", "train", "test"]], ids=["made", "given"]
    )
    def test_without_validation_all_development_classes_train_and_the_seal_stays(self, given, order):
        catalog = classes_of(8, given)
        search = make_split(catalog, **{**SPLIT, "order": order})
        split = make_split(catalog, **{**SPLIT, "order": order, "val_fraction": 0.0})
        assert split.val == ()
        assert split.test == search.test
        assert set(split.train) == set(search.train) | set(search.val)
        everything = make_split(catalog, **{**SPLIT, "order": order, "val_fraction": 0.0, "test_fraction": 0.0})
        assert (everything.train, everything.val, everything.test) == (tuple(range(8)), (), ())

    @pytest.mark.parametrize("num_classes", [1, 2, 5])
    def test_too_few_classes_are_refused_with_counts_and_cure(self, num_classes):
        message = refusal(make_split, classes_of(num_classes), **SPLIT)
        images = f"{num_classes} class{'' if num_classes == 1 else 'es'}, {2 * num_classes} images"
        assert_contains(message, images, "needs 6 classes", "class00", "Cure: add classes", "--data-root")

    @pytest.mark.parametrize(
        ("num_development", "num_folds", "num_used", "expected"),
        # 4 classes in 4 folds leave one to validate; 7 in 4 are 2, 2, 2, 1: the first three can be used.
        [(4, 4, 2, 2), (7, 4, 3, 4), (7, 4, 4, 3), (60, 4, 2, 4), (3, 4, 2, 4)],
    )
    def test_folds_are_as_many_as_leave_two_classes_on_each_side(self, num_development, num_folds, num_used, expected):
        assert largest_num_folds(num_development, num_folds, num_used) == expected

    def test_shuffled_order_is_fixed_for_ever(self):
        # printf '3/class00' | sha256sum and so on puts them in the order 3 0 2 5 4 6 1 7.
        split = make_split(classes_of(8), **{**SPLIT, "order": "shuffled", "seed": 3})
        assert (split.train, split.val, split.test) == ((0, 3), (2, 5), (1, 4, 6, 7))
        others = {make_split(classes_of(8), **{**SPLIT, "order": "shuffled", "seed": s}).test for s in range(20)}
        assert len(others) > 10

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"test_fraction": 0.95}, "the train part is empty"),
            ({"val_fraction": 0.95}, "the train part has one class"),
            ({"fold": 1, "num_folds": 4}, "data.split.num_folds = 4 is too many"),
        ],
    )
    def test_refusals_name_the_key(self, change, part):
        assert part in refusal(make_split, classes_of(10), **{**SPLIT, **change})

    def test_given_split_must_not_share_a_class(self):
        catalog = classes_of(6, ["train", "train", "val", "val", "test", "test"])
        assert catalog.given_split is not None
        shared = Catalog(**{**vars(catalog), "given_split": ("test", *catalog.given_split[1:])})
        assert "class00 (test, train)" in refusal(make_split, shared, **SPLIT)

    def test_given_split_without_val_is_divided_and_without_test_refused(self):
        split = make_split(classes_of(6, ["train"] * 4 + ["test"] * 2), **SPLIT)
        assert (split.train, split.val, split.test) == ((0, 1), (2, 3), (4, 5))
        message = refusal(make_split, classes_of(4, ["train", "train", "val", "val"]), **SPLIT)
        assert_contains(message, "the test part is empty", "data.list_file")

    def test_given_split_with_folds_keeps_its_test_classes(self):
        catalog = classes_of(8, ["test", "train", "val", "train", "train", "val", "train", "test"])
        folds = [make_split(catalog, **{**SPLIT, "num_folds": 3, "fold": fold}) for fold in range(3)]
        assert {split.test for split in folds} == {(0, 7)}
        assert [split.val for split in folds] == [(1, 2), (3, 4), (5, 6)]

    def test_one_image_classes_are_divided_like_others(self):
        counts = [1, 1, 1, 2, 1, 1, 2, 1]
        rows = [ImageFile(f"{c}-{i}.jpg", f"class{c}", 1) for c, count in enumerate(counts) for i in range(count)]
        split = make_split(catalog_of("x", None, rows), **SPLIT)
        assert (split.train, split.val, split.test) == ((0, 1), (2, 3), (4, 5, 6, 7))

    @pytest.mark.parametrize(("part", "pairs"), [("val", (6,)), ("test", (3,))])
    def test_a_part_without_a_query_that_can_find_anything_is_refused(self, part, pairs):
        rows = [ImageFile(f"{c}-{i}.jpg", f"class{c}", 1) for c in range(8) for i in range(2 if c in pairs else 1)]
        message = refusal(make_split, catalog_of("x", None, rows), **SPLIT)
        assert_contains(message, f"no class of the {part} part", "data.min_images_per_class = 2")

    def test_queries_of_other_classes_than_the_gallery_are_refused(self):
        roles = {4: ("query", "query"), 5: ("gallery", "gallery"), 6: ("query",), 7: ("gallery",)}
        rows = [
            ImageFile(f"{c}-{i}.jpg", f"class{c}", 1, "test" if c > 3 else "train", role)
            for c in range(8)
            for i, role in enumerate(roles.get(c, ("", "")))
        ]
        assert "no class of the test part (4 classes)" in refusal(make_split, catalog_of("x", None, rows), **SPLIT)
        rows[-1] = rows[-1]._replace(class_name="class6")
        assert make_split(catalog_of("x", None, rows), **SPLIT).test == (4, 5, 6)

    def test_many_classes(self):
        """The sizes of Stanford Online Products."""
        num_train, num_test = 11_318, 11_316
        names = [f"{c:05d}" for c in range(1, num_train + num_test + 1)]
        parts = {name: "train" if int(name) <= num_train else "test" for name in names}
        rows = [ImageFile(f"{name}-{i}", name, 1, parts[name]) for name in names for i in range(2)]
        split = make_split(catalog_of("sop", None, rows), **{**SPLIT, "val_fraction": 0.1})
        assert (len(split.train), len(split.val), len(split.test)) == (10_186, 1_132, num_test)
        assert split.val == tuple(range(10_186, num_train))

    def test_the_cure_of_a_benchmark_names_no_list_file(self):
        rows = [ImageFile(f"{c}{i}", f"{c}", 1, "train") for c in range(4) for i in range(2)]
        message = refusal(make_split, catalog_of("sop", None, rows), **SPLIT)
        assert_contains(message, "the test part is empty", "the lists of sop decide")
        assert "data.list_file" not in message
