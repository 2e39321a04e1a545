"""Class names from files: lists, tables by WordNet id, id2label, WordNet's own database (a small one, laid out as `man wndb` says), and prompts."""
import json
import re

import pytest

from tests.evaluation.test_zero_shot import Labelled, run  # noqa: F401  (run is a fixture)
from vlm_jax.configs.common import imagenet, published_arg
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.class_names import ensemble, read_class_names, read_templates

SOURCE = "imagenet2012:validation"


def database(path, entries):
    """Writes a data.noun of {lemmas: superordinate's lemmas or None} and returns {lemmas: id}; the superordinates come first, an id is a byte."""
    content, ids = b"  1 This is a licence, whose lines begin with two blanks.\n", {}
    for lemmas, above in entries.items():
        ids[lemmas] = f"n{len(content):08d}"
        pointer = f"@ {ids[above][1:]} n 0000" if above else "~ 00000058 n 0000"
        words = " ".join(f"{lemma} 0" for lemma in lemmas.split())
        content += f"{len(content):08d} 05 n {len(lemmas.split()):02x} {words} 002 #m 00000058 n 0000 {pointer} | what @ 00000000 it is\n".encode()
    path.write_bytes(content)
    return ids


def test_names_of_wordnet_are_first_lemmas_and_shared_ones_say_what_they_are(tmp_path):
    path = tmp_path / "data.noun"
    ids = database(path, {"animal beast": None, "wading_bird wader": "animal beast", "lifting_device": None, "crane": "wading_bird wader",
                          "crane hoist": "lifting_device", "great_grey_owl": "animal beast"})
    wanted = [ids[name] for name in ("great_grey_owl", "crane", "crane hoist", "lifting_device")]
    assert read_class_names(str(path), wanted, SOURCE) == ["great grey owl", "crane (wading bird)", "crane (lifting device)", "lifting device"]
    with pytest.raises(ConfigError, match="there is no entry n00000059, so it is not WordNet 3.0's data.noun"):
        read_class_names(str(path), [wanted[0], "n00000059"], SOURCE)
    with pytest.raises(ConfigError, match="there is no entry n99999999"):
        read_class_names(str(path), [wanted[0], "n99999999"], SOURCE)
    with pytest.raises(ConfigError, match=r"WordNet names classes by ids .* calls its own \['zero'\]"):
        read_class_names(str(path), ["zero", "one"], SOURCE)


def test_wordnet_ids_are_refused_as_names_and_the_remedy_is_named():
    with pytest.raises(ConfigError, match=re.escape(f"{SOURCE}: its classes are called by WordNet ids (n01440764, ...)") + ".*set class_names.*wordnet-base"):
        read_class_names(None, ["n01440764", "n01443537"], SOURCE)
    assert read_class_names(None, ["n01440764", "goldfish"], SOURCE) == ["n01440764", "goldfish"], "one name that looks like an id is a name"


IDS = ["n01440764", "n01443537", "n02012849", "n03126707"]


@pytest.mark.parametrize("name, content", [
    ("names.txt", "tench\ngoldfish, Carassius auratus\ncrane\ncrane, hoist\n\n"),
    ("names.json", json.dumps(["tench", "goldfish, Carassius auratus", "crane", "crane, hoist"])),
])
def test_lists_are_taken_as_they_are(tmp_path, name, content):
    (tmp_path / name).write_text("\ufeff" * (name == "names.txt") + content)
    for ids in (IDS, None):
        assert read_class_names(str(tmp_path / name), ids, SOURCE) == ["tench", "goldfish, Carassius auratus", "crane", "crane, hoist"]


@pytest.mark.parametrize("name, content", [
    ("mapping.txt", "n03126707 crane, hoist\nn01443537 goldfish, Carassius auratus\nn99999999 unused\nn02012849 crane\nn01440764\ttench\n"),
    ("mapping.json", json.dumps({"n03126707": "crane, hoist", "n01443537": "goldfish, carp", "n02012849": "crane", "n01440764": "tench"})),
    ("config.json", json.dumps({"model_type": "vit", "id2label": {"3": "crane, hoist", "1": "goldfish, carp", "0": "tench", "2": "crane"}})),
])
def test_tables_are_put_in_the_order_of_the_labels_and_give_first_synonyms_that_are_unique(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_class_names(str(tmp_path / name), IDS, SOURCE) == ["tench", "goldfish", "crane", "crane, hoist"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"one\ntwo\n", "2 names, but .* has 4 classes"),
    ("b.txt", b"one\n\ntwo\nthree\n", "4 names, of which 1 are empty"),
    ("c.txt", b"\xff\xfe", "cannot be read"),
    ("d.txt", b"n01440764\nn01443537\nn02012849\nn03126707\n", "it holds WordNet ids alone"),
    ("e.txt", b"n01440764 tench\nn01443537 goldfish\n", r"does not name n02012849 \(2 of 4 are missing\)"),
    ("f.json", b"{", "not JSON"), ("g.json", b"[" * 100_000, "not JSON"), ("h.json", b"[1, 2]", "neither a JSON list"), ("i.json", b"3", "neither a JSON list"),
    ("j.json", b'{"id2label": {"0": "a", "2": "b"}}', "not 0 to 1"), ("k.json", b"{}", "it does not name n01440764|at least two"),
    ("missing.txt", None, "cannot be read .No such file.*one name a line"), ("data.noun", None, "cannot be read .No such file.*wordnet-base"),
])
def test_files_that_name_no_classes(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_class_names(str(tmp_path / name), IDS, SOURCE)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_a_table_by_id_needs_a_source_with_ids(tmp_path):
    (tmp_path / "m.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    with pytest.raises(ConfigError, match="names classes by id, and photos has no ids"):
        read_class_names(str(tmp_path / "m.txt"), None, "photos")


def test_prompts_by_name_by_file_and_by_list(tmp_path):
    prompts = ensemble()
    assert len(set(prompts)) == len(prompts) == 80 and all(prompt.count("{}") == 1 and "  " not in prompt for prompt in prompts)
    assert read_templates("ensemble") == prompts and read_templates(("a {}",)) == ["a {}"]
    (tmp_path / "prompts.txt").write_text("a {} at night\nmy {}\n")
    assert read_templates(str(tmp_path / "prompts.txt")) == ["a {} at night", "my {}"]
    with pytest.raises(ConfigError, match='write a list, "ensemble"'):
        read_templates("ensembel")
    with pytest.raises(ConfigError, match="there are none"):
        read_templates([])


def test_the_evaluator_takes_names_and_prompts_from_files(run, tmp_path, capsys):  # noqa: F811
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in ("cat", "dog", "dog", "owl", "ape", "bee", "elk")))
    (tmp_path / "prompts.txt").write_text("a {}\n")
    vectors = {"a cat": [1, 0], "a dog": [0, 1], "a owl": [-1, 0], "a ape": [0, -1], "a bee": [.6, -.8], "a elk": [-.8, -.6]}
    metrics = run([0, 1], [[1, 0], [0, 1]], vectors, class_names=str(tmp_path / "names.txt"), templates=str(tmp_path / "prompts.txt"))
    assert metrics["top1"] == 0.5, "dog stands twice, so it ties"
    assert "1 names belong to several classes (dog)" in capsys.readouterr().out and len(Labelled.class_names) == 7


def test_the_published_recipes_read_names_and_prompts_that_the_argument_names():
    section = imagenet(published_arg("data_dir=sets,class_names=names.txt,templates=mine.txt", shards="s.tar", tokenizer="t.model"))
    assert section["class_names"] == "names.txt" and section["templates"] == "mine.txt" and section["source"]["data_dir"] == "sets"
    section = imagenet(published_arg(None, shards="s.tar", tokenizer="t.model"))
    assert section["templates"] == "ensemble" and section["class_names"].endswith("data.noun")
