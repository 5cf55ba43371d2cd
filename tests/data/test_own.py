"""A user's own data: tables of every make, folders of all sorts, and how they are divided."""

import json

import numpy as np
import pytest
from PIL import Image

from emollama_jax.data import inspect
from emollama_jax.data.builders import own, own_table
from emollama_jax.data.builders.divide import divide
from emollama_jax.data.builders.stored import StoredSet
from emollama_jax.data.media import PICTURES, read_image
from emollama_jax.data.split import Split
from emollama_jax.errors import UserError
from tests.helpers import official_trees
from tests.helpers.prepared_sets import prepare


def picture(path, level=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, 60, 60)).save(path, format="JPEG")


@pytest.fixture
def home(tmp_path):
    for i in (1, 2, 3):
        picture(tmp_path / "img" / f"{i}.jpg", 40 * i)
    return tmp_path


def table(home, text, name="list.csv"):
    path = home / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return own.list_own(path, "own/t")


def found_in(found):
    """Path → (label, split)."""
    return {
        item.id: (found.classes[item.label], split)
        for split, items in found.splits.items()
        for item in items
    }


# ---- tables


@pytest.mark.parametrize(
    "text",
    [
        "path;label;split\nimg/1.jpg;happy;train\nimg/2.jpg;sad;test\n",
        "image_path,emotion,Usage\nimg/1.jpg,happy,Training\nimg/2.jpg,sad,PrivateTest\n",
        "Image Path\tExpression\tset\nimg\\1.jpg\tHappy\ttrain\nimg\\2.jpg\tSAD\ttest\n",
        'path,label,caption,split\nimg/1.jpg,happy,"a face,\nlaughing",train\n'
        'img/2.jpg,sad,"a face",test\n',
        ",pth,label,split\n0,img/1.jpg,happy,train\n1,img/2.jpg,sad,test\n",
        "filename|class|partition\nimg/1.jpg|happy|training\nimg/2.jpg|sad|testing\n",
        "img,label,class,split\nimg/1.jpg,0,happy,train\nimg/2.jpg,1,sad,test\n",
        "path,label,split\nimg/1.jpg,happy,train\nimg/2.jpg,sad,test\n".encode("utf-16"),
        json.dumps(
            [
                {"image": ["img/1.jpg"], "label": "happy", "split": "train"},
                {"image": "img/2.jpg", "label": "sad", "split": "test"},
            ]
        ),
    ],
)
def test_one_table_in_every_dress(home, text):
    for name in ("list.csv", "list.txt"):
        splits = table(home, text, name).splits
        assert {split: [item.media.name for item in items] for split, items in splits.items()} == {
            "train": ["1.jpg"],
            "test": ["2.jpg"],
        }
        assert [pair[0] for pair in found_in(table(home, text, name)).values()] == ["happy", "sad"]


def test_the_columns_that_were_taken_are_told(home):
    told = table(home, "file,image_path,emotion\nx,img/1.jpg,happy\ny,img/2.jpg,sad\n").told
    assert told[0] == "columns: path from 'image_path', label from 'emotion'"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label,label\nimg/1.jpg,sad,3\n", "2 columns are called 'label'"),
        ("path,Label,label\nimg/1.jpg,sad,happy\n", "'Label' and 'label' both name the label"),
        ("path,label\nimg/1.jpg,3\n", "line 2: label '3' is a number"),
        ("path,label\nimg/1.jpg,-.5\n", "line 2: label '-.5' is a number"),
        ("path,class,label\nimg/1.jpg,1,0\n", "is a number"),
        ('{"path": "img/1.jpg", "label": ["sad"]}', r"line 1: label \['sad'\], wanted a word"),
        ('{"path": "img/1.jpg", "label": null}', "line 1: the label is empty"),
        ('{"path": ["a", "b"], "label": "sad"}', "wanted the path of one file"),
        ("path,label\nhttps://x.org/1.jpg,sad\n", "is a URL: download it"),
        ("path,label\nmissing/1.jpg,sad\n", "none of its 1 files is there.*relative to"),
        ("path,label,split\nimg/1.jpg,sad,\n", "split '', wanted train"),
        ("Usage,Image name,neutral,happiness,contempt\nTraining,a,1,2,3\n", "prepared as ferplus"),
        ("path label\nimg/1.jpg sad\n", r"no column path \(found: path label; wanted e.g. path"),
    ],
)
def test_tables_are_refused_by_what_is_wrong(home, text, said):
    with pytest.raises(UserError, match=said):
        table(home, text)


# ---- FER2013


def fer(rows, header="emotion,pixels,Usage"):
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


GREY = " ".join(["80"] * 48 * 48)
RAMP = " ".join(str(i % 256) for i in range(48 * 48))


def test_fer2013(tmp_path):
    path = tmp_path / "fer2013.csv"
    usage = ("Training", "PublicTest", "PrivateTest")
    path.write_text(fer([(i, RAMP if i == 3 else GREY, usage[i % 3]) for i in range(7)]))
    found = own.list_own(path, "own/fer")
    assert [label for label, _ in found_in(found).values()] != sorted(own_table.FER2013)
    assert found_in(found) == {
        f"fer{i:07d}": (name, ("train", "validation", "test")[i % 3])
        for i, name in enumerate(own_table.FER2013)
    }
    folder, _ = prepare("own/fer", path, tmp_path / "data")
    example = Split(tmp_path / "data", "own/fer", "train").examples[1]
    assert example["id"] == "fer0000003" and example["kind"] == "image"
    pixels = read_image(example["media"])
    np.testing.assert_array_equal(pixels[..., 0].ravel(), np.arange(48 * 48) % 256)
    path.write_text(path.read_text().replace("80 80", "81 80"))
    before = folder.stat().st_mtime_ns
    prepare("own/fer", path, tmp_path / "data")  # other pixels are another set
    assert folder.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("text", "splits"),
    [
        (fer([(0, "Training", GREY), (6, "PublicTest", GREY)], "emotion, Usage, pixels"), 2),
        (fer([(n, GREY) for n in (4, 4, 4)], "emotion,pixels"), 3),  # the challenge's train.csv
        (fer([("happy", GREY, "Training")]), 1),
    ],
)
def test_fer2013_in_other_dress(tmp_path, text, splits):
    found = table(tmp_path, text)
    assert len(found.splits) == splits
    assert set(found.classes) <= set(own_table.FER2013)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (fer([(7, GREY, "Training")]), "emotion 7, and FER2013's are 0"),
        (fer([(0, GREY[:-3], "Training")]), "line 2: 2303 pixels"),
        (fer([(0, GREY, "Training"), (0, "300 " + GREY[3:], "Training")]), "line 3: 2304 pixels"),
        (fer([(0, "x" + GREY, "Training")]), "line 2: wanted pixels from 0 to 255"),
        (fer([(GREY, "Training")], "pixels,Usage"), "no column label"),
        ("path,emotion\nfer0.png,3\n", "label '3' is a number"),  # nothing shows that it is FER2013
    ],
)
def test_fer2013_is_refused(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        table(tmp_path, text)


# ---- LLaVA's JSON


def item(path, *turns, key="image", **more):
    roles = ("human", "gpt")
    talk = [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]
    return {"id": path, key: path, "conversations": talk, **more}


ASK = "<image>\nWhat is the emotion?"


@pytest.mark.parametrize(
    ("items", "labels"),
    [
        ([item("img/1.jpg", ASK, "happy")], ["happy"]),
        ([item("img/1.jpg", ASK, " Sadness. "), {"id": "text", "conversations": []}], ["sadness"]),
        (
            [
                item("img/1.jpg", "Describe.", "Raised brows.", ASK, "surprise"),
                item("img/1.jpg", "Why?", "I see the mouth."),
            ],
            ["surprise"],
        ),
        ([item("img/1.jpg", "Choose: {bored, sad}.", "bored")], ["bored"]),
        ([item("img/1.jpg", "Hm?", "A long talk.", label="awe")], ["awe"]),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_llava(home, items, labels, name):
    text = json.dumps(items) if name == "a.json" else "\n".join(map(json.dumps, items))
    assert [label for label, _ in found_in(table(home, text, name)).values()] == labels


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([item("img/1.jpg", ASK, "She looks happy.")], "item 1: no answer is just a class word"),
        ([item("img/1.jpg", ASK, "happy or sad")], "no answer is just a class word"),
        ([item("img/1.jpg", "Is she sad (yes, no)?", "yes")], "no answer is just a class word"),
        ([item("img/1.jpg", "One of [yes, no].", "yes")], "no answer is just a class word"),
        ([item("img/1.jpg", ASK, "3")], "no answer is just a class word"),
        (
            [item("img/1.jpg", ASK, "happy"), item("img/1.jpg", ASK, "sad")],
            "item 2: img/1.jpg is 'sad', but 'happy' in item 1",
        ),
        ([{"image": "img/1.jpg", "conversations": ["happy"]}], "item 1: conversations, wanted"),
    ],
)
def test_llava_is_refused(home, items, said):
    with pytest.raises(UserError, match=said):
        table(home, json.dumps(items), "a.json")


# ---- folders


def test_every_ending_of_the_one_list_is_kept(tmp_path):
    endings = [e for e in PICTURES if e not in (".heic", ".heif", ".avif", ".jp2")]
    for n, ending in enumerate(endings):
        for label in ("happiness", "sadness"):
            picture(tmp_path / "photos" / label / f"{n}{ending.upper() if n % 2 else ending}")
    found = own.list_own(tmp_path / "photos", "own/endings")
    assert sum(map(len, found.splits.values())) == 2 * len(endings)
    assert not any("skipped" in line for line in found.told)
    lines = [f"photos/{name},{label}" for name, (label, _) in found_in(found).items()]
    whole = table(tmp_path, "\n".join(["path,label", *lines]))
    assert sum(map(len, whole.splits.values())) == 2 * len(endings)


def test_what_is_skipped_is_counted_and_named(tmp_path):
    for label in ("happy", "sad"):
        picture(tmp_path / label / "1.jpg")
    for name in ("list.csv", "happy/notes.txt", "happy/b.docx", "sad/raw.cr2", "sad/README"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("happy/.DS_Store", "sad/Thumbs.db", "._x.jpg", "desktop.ini"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "angry").mkdir()
    told = own.list_own(tmp_path, "own/t").told
    assert "skipped 4 hidden files, or of the operating system" in told
    for line in (
        "skipped 1 file, no picture or clip (.csv): list.csv",
        "skipped 1 file, no picture or clip (.txt): happy/notes.txt",
        "skipped 1 file, no picture or clip (.docx): happy/b.docx",
        "skipped 1 file, no picture or clip (.cr2): sad/raw.cr2",
        "skipped 1 file, no picture or clip (no ending): sad/README",
        "classes without examples: angry",
    ):
        assert line in told
    assert prepare("own/t", tmp_path, tmp_path.with_name("data"))[1] == told
    assert list(inspect.inspect(tmp_path.with_name("data"), "own/t").notes) == told


def test_frames_that_are_not_read_are_named(tmp_path):
    clip = tmp_path / "happy" / "clip"
    for n in (1, 2):
        picture(clip / f"{n}.jpg")
    (clip / "notes.txt").write_bytes(b"x")
    assert own.list_own(tmp_path, "own/t").told[0].endswith("(.txt): happy/clip/notes.txt")


def test_what_cannot_be_decoded_is_named_with_the_reason(tmp_path, monkeypatch):
    for label in ("happy", "sad"):
        picture(tmp_path / label / "1.jpg")
        (tmp_path / label / "2.heic").write_bytes(b"\0\0\0\x18ftypheic")

    def refuse(path):
        raise UserError(f"{path}: HEIC needs the extra")

    monkeypatch.setattr(own, "read_image", refuse)
    found = own.list_own(tmp_path, "own/t")
    assert sorted(found_in(found)) == ["happy/1.jpg", "sad/1.jpg"]
    (line,) = [line for line in found.told if "cannot be read" in line]
    assert line.startswith("skipped 2 files that cannot be read here: happy/2.heic, sad/2.heic")
    assert line.endswith("HEIC needs the extra)")
    rows = table(tmp_path, "path,label\nhappy/1.jpg,happy\nsad/2.heic,sad\n")
    assert list(found_in(rows)) == ["happy/1.jpg"] and "sad/2.heic" in " ".join(rows.told)


def test_one_broken_animation_stops_nothing(tmp_path):
    for label in ("happy", "sad"):
        picture(tmp_path / label / "1.jpg")
        for ending in ("webp", "gif"):
            (tmp_path / label / f"2.{ending}").write_bytes(b"RIFF")
    found = own.list_own(tmp_path, "own/t")
    assert found.kind == "image" and sum(map(len, found.splits.values())) == 6


def test_a_folder_without_classes_names_its_table(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\n")
    with pytest.raises(UserError, match=r"for its table, --source .*list\.csv"):
        own.list_own(tmp_path, "own/t")
    (tmp_path / "happy").mkdir()
    with pytest.raises(UserError, match="no pictures and no clips in it; skipped 1 file"):
        own.list_own(tmp_path, "own/t")


def test_two_words_for_one_emotion_are_told(home):
    told = table(home, "path,label\nimg/1.jpg,happy\nimg/2.jpg,happiness\n").told
    assert "happiness and happy are two classes, and usually one emotion" in " ".join(told)


# ---- dividing


def splits_of(count, classes=("a", "b"), subjects=None):
    ids = [f"{n}.jpg" for n in range(count)]
    return divide(ids, [classes[n % len(classes)] for n in range(count)], subjects or [""] * count)


def test_a_tenth_of_each_class_is_tested():
    found, rule = splits_of(100)
    for start in (0, 1):
        of_class = found[start::2]
        assert [of_class.count(s) for s in ("train", "validation", "test")] == [40, 5, 5]
    assert rule.endswith("by a hash of the names: train 80, validation 10, test 10")
    assert splits_of(100)[0] == found
    more = splits_of(102)[0][:100]  # other examples change little
    assert sum(a != b for a, b in zip(found, more, strict=True)) <= 4


@pytest.mark.parametrize(("count", "tested"), [(1, 0), (2, 0), (3, 1), (9, 1), (20, 2)])
def test_small_classes(count, tested):
    found, rule = splits_of(count, classes=("a",))
    assert (found.count("test"), found.count("validation")) == (tested, tested)
    assert ("too few, train only: a" in rule) == (count < 3)


def test_a_name_that_comes_twice_has_one_split():
    ids = [f"{n % 15}.jpg" for n in range(30)]
    found, _ = divide(ids, ["a"] * 30, [""] * 30)
    assert found[:15] == found[15:] and "test" in found


@pytest.mark.parametrize("people", [3, 7, 40])
def test_nobody_is_in_two_splits(people):
    subjects = [f"p{n // 3 % people}" for n in range(400)]
    found, rule = splits_of(400, subjects=subjects)
    homes = {person: set() for person in subjects}
    for person, split in zip(subjects, found, strict=True):
        homes[person].add(split)
    assert all(len(home) == 1 for home in homes.values())
    assert set(found) == {"train", "validation", "test"}
    assert "whole people" in rule
    assert set(splits_of(400, subjects=[f"p{n % 2}" for n in range(400)])[0]) == {"train"}


def test_people_are_stored(tmp_path):
    lines = ["path,label,subject_id"]
    for n in range(12):
        picture(tmp_path / f"{n}.jpg", 20 * n)
        lines.append(f"{n}.jpg,{('happy', 'sad')[n % 2]},person {n // 3}")
    official_trees.write_lines(tmp_path / "list.csv", lines)
    prepare("own/people", tmp_path / "list.csv", tmp_path / "data")
    people = {}
    for split in ("train", "validation", "test"):
        people[split] = {
            int(e["subject"]) for e in Split(tmp_path / "data", "own/people", split).examples
        }
    assert sorted(p for found in people.values() for p in found) == [0, 1, 2, 3]
    assert StoredSet(tmp_path / "data", "own/people").metadata["told"]
